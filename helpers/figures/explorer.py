"""Panels of ipywidgets around `helpers.render`: the grid explorer, a slider that needs no kernel, geometry, tokens.

A panel passes on what its controls say, and shows an error where it happens. Nothing here needs torch, trains, or computes a
metric: `grid_panel` reads a file of `python -m helpers grid`; the live lab is `helpers.live`.
"""

import ipywidgets as widgets
import numpy as np

from ..studies import store
from ..studies.store import AXES, Grid
from .render import (
    FONT,
    FRAME,
    as_img,
    number,
    render_error,
    render_gauges,
    render_legend,
    render_radius,
    render_said,
    render_texts,
    render_tokens,
    render_turn,
    shade,
    verdict,
)

WIDE = {"style": {"description_width": "210px"}, "layout": {"width": "440px"}}


def slider(options, value, label, width="210px", whole="440px"):
    """A SelectionSlider over values that exist; it answers when let go, and to the arrow keys."""
    named = [(f"{v:g}" if isinstance(v, (int, float)) else str(v), v) for v in options]
    return widgets.SelectionSlider(
        options=named,
        value=value,
        description=label,
        continuous_update=False,
        style={"description_width": width},
        layout={"width": whole, "margin": "0 0 2px 0"},
    )


def html_box(height, value=""):
    """An HTML widget of fixed height: what is above and below it stays where it is."""
    return widgets.HTML(
        value, layout={"height": height, "overflow": "auto", "width": "100%", "margin": "2px 0"}
    )


class GridPanel(widgets.VBox):
    """The grid explorer. `controls` {axis: widget}, `cells` {(layer, radius): button}; setting a control's value draws anew."""

    def __init__(self, sweep, start=None):
        self.grid = grid = sweep if isinstance(sweep, Grid) else Grid(sweep)
        state = grid.start() | (start or {})
        grid.view(state)  # a start that was not computed is said before anything is drawn
        self.controls = self._controls(grid.options, state)
        self.texts, self.gauges, self.said = html_box("108px"), html_box("126px"), html_box("28px")
        self.cells = {
            (k, r): self._cell(k, r)
            for k in grid.options["source_layer"]
            for r in grid.options["radius"]
        }
        prompt, *others = self.controls.values()
        top = widgets.HBox(
            [widgets.VBox(others, layout={"margin": "0 18px 0 0"}), self._heat_map()]
        )
        legend = html_box("40px", render_legend(grid))
        super().__init__(
            [prompt, top, self.said, self.texts, self.gauges, legend],
            layout={"max_width": "1080px"},
        )
        for control in self.controls.values():
            control.observe(self._changed, "value")
        self.draw()

    @property
    def state(self):
        return {axis: self.controls[axis].value for axis in AXES}

    def _controls(self, values, state):
        prompts = [(p if len(p) < 64 else p[:60] + " …", p) for p in values["prompt"]]
        return {
            "prompt": widgets.Dropdown(
                options=prompts,
                value=state["prompt"],
                description=AXES["prompt"],
                style={"description_width": "60px"},
                layout={"width": "520px"},
            ),
            **{
                axis: slider(values[axis], state[axis], AXES[axis])
                for axis in ("source_layer", "radius")
            },
            "kind": widgets.Dropdown(
                options=values["kind"], value=state["kind"], description=AXES["kind"], **WIDE
            ),
            "vector": slider(self.grid.vectors[state["kind"]], state["vector"], AXES["vector"]),
            "coeff": slider(values["coeff"], state["coeff"], AXES["coeff"]),
        }

    def _cell(self, layer, radius):
        button = widgets.Button(
            layout={"width": "48px", "height": "34px", "margin": "1px", "padding": "0"}
        )
        button.on_click(lambda _: self.select(layer, radius))
        return button

    def _heat_map(self):
        layers, radii = self.grid.options["source_layer"], self.grid.options["radius"]

        def name(text, height=20):
            style = f"{FONT};font-size:13px;text-align:center;line-height:{height}px"
            return widgets.HTML(
                f'<div style="{style}">{text}</div>', layout={"width": "auto", "margin": "0"}
            )

        rows = [[name(k, 36), *(self.cells[k, r] for r in radii)] for k in layers]
        rows += [[name(""), *(name(f"{r:g}") for r in radii)]]
        columns = f"34px repeat({len(radii)}, 50px)"
        box = widgets.GridBox(
            [w for row in rows for w in row], layout={"grid_template_columns": columns}
        )
        self.heat_title = widgets.HTML()
        foot = widgets.HTML(
            f'<div style="{FONT};font-size:13px">rows: source layer (block), columns: R (norm of θ)</div>'
        )
        return widgets.VBox([self.heat_title, box, foot])

    def select(self, layer, radius):
        """What a click on a cell does."""
        self.controls["source_layer"].value, self.controls["radius"].value = layer, radius

    def _changed(self, change):
        try:
            if change["owner"] is self.controls["kind"]:
                self._offer(self.grid.vectors[change["new"]])
            self.draw()
        except Exception as error:  # in a callback it would vanish in the kernel's log
            self.said.value = render_error(error)

    def _offer(self, there):
        """The vectors of a kind: the slider keeps its number where there is one."""
        vector = self.controls["vector"]
        kept = vector.value if vector.value in there else there[0]
        vector.unobserve(self._changed, "value")
        vector.options = [(f"{v:g}", v) for v in there]
        vector.value = kept
        vector.observe(self._changed, "value")

    def draw(self):
        state, view = self.state, self.grid.view(self.state)
        kind = state["kind"]
        numbers = f"‖coefficient · θ‖ = {number(view['norm'])}, relative change at the target {number(view['relative'])}"
        self.said.value = (
            f'<div style="{FONT};font-size:16px"><b>{verdict(view)}</b> &nbsp; {numbers}</div>'
        )
        title = f"steered: {kind} vector {state['vector']} × {state['coeff']:g}"
        self.texts.value = render_texts(view["clean"], view["text"], title)
        self.gauges.value = render_gauges(self.grid, view)
        question = f"How many of {view['of']} {kind} vectors change and stay fluent?"
        self.heat_title.value = f'<div style="{FONT}"><b>{question}</b></div>'
        for i, j in np.ndindex(len(view["both"]), len(view["both"][0])):
            layer, radius = self.grid.options["source_layer"][i], self.grid.options["radius"][j]
            self._paint(
                self.cells[layer, radius],
                view["both"][i][j],
                view["of"],
                layer,
                radius,
                (layer, radius) == (state["source_layer"], state["radius"]),
            )

    def _paint(self, button, count, of, layer, radius, here):
        """A button's look; ipywidgets sends only what has changed."""
        back, ink = shade(count, of)
        button.description = f"▸{count}◂" if here else f"{count}"
        button.tooltip = f"block {layer}, R {radius:g}: {count} of {of} change and stay fluent" + (
            " (shown now)" if here else ""
        )
        button.style.button_color, button.style.text_color = back, ink
        button.style.font_weight = "bold" if here else "normal"
        button.layout.border = f"3px solid {FRAME if here else 'transparent'}"


def grid_panel(sweep, start=None) -> GridPanel:
    """The grid explorer of a sweep that `store.read("explorer")` gave; `start` {axis: value} is the setting it opens with."""
    return GridPanel(sweep, start)


# ---------------------------------------------------------------------------------------------- one slider, no kernel
def radius_slider(sweep, radius=None) -> widgets.VBox:
    """The Goldilocks figure and what is said, for every R of a sweep, and a slider that chooses among them in the browser itself:
    it goes on working in an exported page, without a kernel."""
    found, radii = store.shares(sweep), sorted({c["config"]["radius"] for c in sweep["cells"]})
    pages = [
        widgets.HTML(
            as_img(
                render_radius(found, r),
                f"Share of vectors that change the answer, by R; R = {r:g} is marked.",
            )
            + render_said(sweep, r),
            layout={"height": "620px", "overflow": "auto"},
        )
        for r in radii
    ]
    chosen = slider(radii, radii[0] if radius is None else radius, "R (norm of θ)", "110px")
    stack = widgets.Stack(pages, selected_index=chosen.index, layout={"height": "630px"})
    widgets.jslink((chosen, "index"), (stack, "selected_index"))
    return widgets.VBox([chosen, stack], layout={"max_width": "1000px"})


# ---------------------------------------------------------------------------------------------- geometry (notebook 01), tokens
class FigurePanel(widgets.VBox):
    """Controls {name: widget} above a picture that `render(**values) → HTML` makes of their values."""

    def __init__(self, controls, render, height):
        self.controls, self.render, self.picture = controls, render, html_box(height)
        super().__init__([*controls.values(), self.picture], layout={"max_width": "1080px"})
        for control in controls.values():
            control.observe(self.draw, "value")
        self.draw()

    def draw(self, _=None):
        try:
            self.picture.value = self.render(
                **{name: control.value for name, control in self.controls.items()}
            )
        except Exception as error:  # in a callback it would vanish in the kernel's log
            self.picture.value = render_error(error)


def geometry_panel(angles, lengths, radii, words, start=None) -> FigurePanel:
    """R and layer against the angle after the norm, on the residuals of the chosen prompt and token.

    `angles`: `geometry.turn_grid` [n_radii, n_layers, n_vectors, n_prompts, n_tokens], NaN where no own token is; `lengths`: the
    residuals' norms [n_layers, n_prompts, n_tokens]; `words`: per prompt its tokens as text; `start`: (R, layer) to open with.
    """
    angles, lengths = np.asarray(angles, float), np.asarray(lengths, float)
    places = [
        (i, t)
        for i in range(angles.shape[3])
        for t in range(angles.shape[4])
        if not np.isnan(angles[0, 0, 0, i, t])
    ]
    tokens = [
        (f"prompt {i + 1}, token {t + 1}: {words[i][t].strip() or words[i][t]!r}", (i, t))
        for i, t in places
    ]
    radius, layer = start or (radii[0], 0)
    controls = {
        "token": widgets.Dropdown(options=tokens, description="prompt and token", **WIDE),
        "radius": slider(radii, radius, AXES["radius"]),
        "layer": slider(range(angles.shape[1]), layer, "added after block (number)"),
    }

    def render(token, radius, layer):
        i, t = token
        turned, length = angles[list(radii).index(radius), layer, :, i, t], lengths[layer, i, t]
        return as_img(
            render_turn(turned, length, radius, layer, words[i][t]),
            f"A push of {radius:g} after block {layer} turns this token by {np.median(turned):.1f} degrees.",
        )

    return FigurePanel(controls, render, "390px")


def token_panel(words, moved, layer=0) -> FigurePanel:
    """The prompt's tokens shaded by how far each residual moved, relative to its length; `moved` {kind: [n_layers, n_tokens]}."""
    moved = {kind: np.asarray(values, float) for kind, values in moved.items()}
    controls = {
        "kind": widgets.Dropdown(options=list(moved), description=AXES["kind"], **WIDE),
        "layer": slider(range(len(next(iter(moved.values())))), layer, "after block (number)"),
    }
    return FigurePanel(
        controls, lambda kind, layer: render_tokens(words, moved[kind][layer]), "170px"
    )
