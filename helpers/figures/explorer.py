"""Panels: they pass on to `render` what controls say, and show an error where it happens."""

import html

import ipywidgets as widgets
import numpy as np

from ..studies import store
from ..studies.store import AXES, Grid
from . import render
from .canvas import block, number, shorten

PANEL = {"max_width": "1080px"}


def field(make, value, label, width="440px", label_width="210px", **more):
    """A widget of the class `make` that answers when it is left or let go, not at each key."""
    if hasattr(make, "continuous_update"):
        more["continuous_update"] = False
    style, layout = {"description_width": label_width}, {"width": width}
    return make(value=value, description=label, style=style, layout=layout, **more)


def slider(options, value, label, *widths) -> widgets.SelectionSlider:
    """A slider over values that exist; it answers to the arrow keys too."""
    made = field(widgets.SelectionSlider, value, label, *widths, options=_named(options))
    made.layout.margin = "0 0 2px 0"
    return made


def _named(values):
    return [(f"{v:g}" if isinstance(v, (int, float)) else str(v), v) for v in values]


def html_box(height, value="") -> widgets.HTML:
    """An HTML widget of fixed height: what is above and below it stays where it is."""
    place = {"height": height, "overflow": "auto", "width": "100%", "margin": "2px 0"}
    return widgets.HTML(value, layout=place)


class GridPanel(widgets.VBox):
    """The grid explorer of a sweep or a Grid, opened at the setting `start` {axis: value}:
    `controls` {axis: widget}, `cells` {(layer, radius): button}."""

    def __init__(self, sweep, start=None):
        self.grid = sweep if isinstance(sweep, Grid) else Grid(sweep)
        state = self.grid.start() | (start or {})
        self.grid.view(state)  # a start that was not computed is said before anything is drawn
        self.controls = self._controls(self.grid.options, state)
        self.quiet = False  # controls are being set, without a drawing for each
        self.cells, self.heat_title = {}, widgets.HTML()
        self.texts, self.gauges, self.said = map(html_box, ("108px", "126px", "28px"))
        prompt, *others = self.controls.values()
        left = widgets.VBox(others, layout={"margin": "0 18px 0 0"})
        top = widgets.HBox([left, self._heat_map()])
        legend = html_box("40px", render.render_legend(self.grid))
        super().__init__([prompt, top, self.said, self.texts, self.gauges, legend], layout=PANEL)
        for control in self.controls.values():
            control.observe(self._changed, "value")
        self.draw()

    @property
    def state(self) -> dict:
        """The setting shown, {axis: value}."""
        return {axis: self.controls[axis].value for axis in AXES}

    def _controls(self, values, state):
        values = values | {"vector": self.grid.vectors[state["kind"]]}
        values["prompt"] = [(shorten(text, 60), text) for text in values["prompt"]]
        controls = {}
        for axis, label in AXES.items():
            if axis in ("prompt", "kind"):
                widths = ("520px", "60px") if axis == "prompt" else ()
                of = {"options": values[axis]}
                controls[axis] = field(widgets.Dropdown, state[axis], label, *widths, **of)
            else:
                controls[axis] = slider(values[axis], state[axis], label)
        return controls

    def _cell(self, layer, radius):
        size = {"width": "48px", "height": "34px", "margin": "1px", "padding": "0"}
        button = widgets.Button(layout=size)
        button.on_click(lambda _: self.select(layer, radius))
        return button

    def _heat_map(self):
        layers, radii = self.grid.options["source_layer"], self.grid.options["radius"]
        shown = []
        for layer in layers:
            shown.append(_label(layer, 36))
            for radius in radii:
                self.cells[layer, radius] = self._cell(layer, radius)
                shown.append(self.cells[layer, radius])
        shown += [_label("", 20), *(_label(f"{radius:g}", 20) for radius in radii)]
        columns = {"grid_template_columns": f"34px repeat({len(radii)}, 50px)"}
        words = "rows: source layer (block), columns: R (norm of θ)"
        foot = widgets.HTML(block(words, "font-size:13px"))
        return widgets.VBox([self.heat_title, widgets.GridBox(shown, layout=columns), foot])

    def select(self, layer, radius):
        """What a click on a cell does."""
        self.quiet = True
        self.controls["source_layer"].value = layer
        self.controls["radius"].value = radius
        self.quiet = False
        self._changed()

    def _changed(self, _=None):
        if self.quiet:
            return
        self.quiet = True
        try:
            self._offer(self.grid.vectors[self.controls["kind"].value])
            self.draw()
        except Exception as error:  # in a callback it would vanish in the kernel's log
            self.said.value = render.render_error(error)
        finally:
            self.quiet = False

    def _offer(self, there):
        """The vectors of the kind: the slider keeps its number where there is one."""
        vector, options = self.controls["vector"], _named(there)
        if list(vector.options) != options:
            kept = vector.value if vector.value in there else there[0]
            vector.options = options
            vector.value = kept

    def draw(self):
        """Show the setting that the controls say."""
        state, view = self.state, self.grid.view(self.state)
        norm, change = number(view["norm"]), number(view["relative"])
        numbers = f"‖coefficient · θ‖ = {norm}, relative change at the target {change}"
        self.said.value = render.render_verdict(view, numbers)
        title = f"steered: {state['kind']} vector {state['vector']} × {state['coeff']:g}"
        self.texts.value = render.render_texts(view["clean"], view["text"], title)
        self.gauges.value = render.render_gauges(self.grid, view)
        question = f"How many of {view['of']} {state['kind']} vectors change and stay fluent?"
        self.heat_title.value = block(f"<b>{html.escape(question)}</b>")
        for place, (count, here) in render.heat_map(self.grid, state, view).items():
            self._paint(place, count, view["of"], here)

    def _paint(self, place, count, of, here):
        """A button's look; ipywidgets sends only what has changed."""
        (layer, radius), button = place, self.cells[place]
        button.style.button_color, button.style.text_color = render.shade(count, of)
        said = f"block {layer}, R {radius:g}: {count} of {of} change and stay fluent"
        button.description = f"▸{count}◂" if here else f"{count}"
        button.tooltip = f"{said} (shown now)" if here else said
        button.style.font_weight = "bold" if here else "normal"
        button.layout.border = f"3px solid {render.FRAME if here else 'transparent'}"


def _label(text, height):
    style = f"font-size:13px;text-align:center;line-height:{height}px"
    return widgets.HTML(
        block(html.escape(str(text)), style), layout={"width": "auto", "margin": "0"}
    )


# -- one slider, no kernel -------------------------------------------------------------------------
def radius_slider(sweep) -> widgets.VBox:
    """The Goldilocks figure and what is said, for every R of a sweep, and a slider that chooses
    among them in the browser itself: it goes on working in an exported page, without a kernel."""
    found = store.shares(sweep)
    radii = sorted({one["config"]["radius"] for one in sweep["cells"]})
    pages = []
    for radius in radii:
        alt = f"Share of vectors that change the answer, by R; R = {radius:g} is marked."
        picture = render.as_img(render.render_radius(found, radius), alt)
        pages.append(html_box("620px", picture + render.render_said(sweep, radius)))
    chosen = slider(radii, radii[0], AXES["radius"], "440px", "110px")
    stack = widgets.Stack(pages, selected_index=chosen.index, layout={"height": "630px"})
    widgets.jslink((chosen, "index"), (stack, "selected_index"))
    return widgets.VBox([chosen, stack], layout={"max_width": "1000px"})


# -- geometry (notebook 01), tokens ----------------------------------------------------------------
class FigurePanel(widgets.VBox):
    """Controls {name: widget} above a picture: `drawn(**values) → HTML` of their values."""

    def __init__(self, controls, drawn, height):
        self.controls, self.drawn, self.picture = controls, drawn, html_box(height)
        super().__init__([*controls.values(), self.picture], layout=PANEL)
        for control in controls.values():
            control.observe(self.draw, "value")
        self.draw()

    def draw(self, _=None):
        """Show the picture of what the controls say."""
        values = {name: control.value for name, control in self.controls.items()}
        try:
            self.picture.value = self.drawn(**values)
        except Exception as error:  # in a callback it would vanish in the kernel's log
            self.picture.value = render.render_error(error)


def geometry_panel(angles, lengths, radii, words, start) -> FigurePanel:
    """`angles`: degrees after the norm [n_radii, n_layers, n_vectors, n_prompts, n_tokens], NaN: no
    own token; `lengths`: the residuals' norms [n_layers, n_prompts, n_tokens]; `words`: per prompt
    its tokens as text; `start`: (R, layer) to open with."""
    angles, lengths = np.asarray(angles, float), np.asarray(lengths, float)
    tokens = []
    for i, t in np.argwhere(~np.isnan(angles[0, 0, 0])).tolist():
        word = words[i][t].strip() or repr(words[i][t])
        tokens.append((f"prompt {i + 1}, token {t + 1}: {word}", (i, t)))
    controls = {
        "token": field(widgets.Dropdown, tokens[0][1], "prompt and token", options=tokens),
        "radius": slider(radii, start[0], AXES["radius"]),
        "layer": slider(range(angles.shape[1]), start[1], "added after block (number)"),
    }

    def drawn(token, radius, layer):
        i, t = token
        turned = angles[list(radii).index(radius), layer, :, i, t]
        figure = render.render_turn(turned, lengths[layer, i, t], radius, layer, words[i][t])
        turn = f"turns this token by {np.median(turned):.1f} degrees."
        return render.as_img(figure, f"A push of {radius:g} after block {layer} {turn}")

    return FigurePanel(controls, drawn, "390px")


def token_panel(words, moved, layer=0) -> FigurePanel:
    """The prompt's tokens shaded by how far each moved: `moved` {kind: [n_layers, n_tokens]}."""
    kinds, n_layers = list(moved), len(next(iter(moved.values())))
    controls = {
        "kind": field(widgets.Dropdown, kinds[0], AXES["kind"], options=kinds),
        "layer": slider(range(n_layers), layer, "after block (number)"),
    }

    def drawn(kind, layer):
        return render.render_tokens(words, moved[kind][layer])

    return FigurePanel(controls, drawn, "170px")
