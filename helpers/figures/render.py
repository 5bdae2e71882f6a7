"""What panels show, as HTML (all text escaped) and as still figures: pure functions, no torch."""

import base64
import html
from dataclasses import dataclass
from difflib import SequenceMatcher

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML
from matplotlib import colormaps

from ..ledger import html_table
from ..studies.store import AXES, BINS, GAUGES, place
from . import canvas, charts, geometry
from .canvas import block, cell, colour, finish, headline, number, panels, shorten

PANEL_ERROR = "workbook-panel-error"  # the class of an error that a panel caught and shows
COLUMNS = {
    "radius": "R",
    "kind": "kind",
    "vector": "vector",
    "objective": "objective ‖Δ‖²",
    "kl": "KL, nats",
    "surprise": "surprise, nats",
    "distance": "distance",
    "changed": "changed",
    "fluent": "fluent",
    "text": "what the model says",
}  # of the live lab's table
WIDTH = 200  # of a gauge, in SVG units
GOOD = canvas.OTHERS[0]  # where a gauge should stand
FAINT = "var(--jp-border-color1, #999)"
FRAME = canvas.COLOURS["learned"]  # of the setting shown, in the heat map
MARK = "background:#ffe49c;color:#000;text-decoration:underline;text-decoration-thickness:2px"


# -- text ------------------------------------------------------------------------------------------
def marked(clean, said) -> tuple[str, str]:
    """Both texts as HTML, escaped, the words that one has and the other has not marked."""
    a, b = clean.split(), said.split()
    left, right = [], []
    for kind, i, j, k, n in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for words, out in ((a[i:j], left), (b[k:n], right)):
            text = html.escape(" ".join(words))
            if text:
                same = kind == "equal"
                out.append(text if same else f'<mark style="{MARK};padding:0 2px">{text}</mark>')
    return " ".join(left) or "<i>(nothing)</i>", " ".join(right) or "<i>(nothing)</i>"


def render_texts(clean, said, title="steered") -> str:
    """The unsteered and the steered completion side by side, as HTML."""
    box = f"flex:1;min-width:0;border:1px solid {FAINT};border-radius:4px;padding:4px 10px"
    both = ""
    for name, text in zip(("unsteered", title), marked(clean, said)):
        both += f'<div style="{box}"><b>{html.escape(name)}</b><br>{text}</div>'
    return block(both, "display:flex;gap:10px;overflow-wrap:anywhere")


def verdict(view) -> str:
    """The two judgements in plain words."""
    if view["fluent"]:
        return "● changed, and still fluent" if view["changed"] else "○ close to its own answer"
    near = "✕ not fluent, though close to its own answer"
    return "✕ changed, no longer fluent" if view["changed"] else near


def render_verdict(view, numbers) -> str:
    """The judgements, and beside them numbers in words."""
    return block(f"<b>{verdict(view)}</b> &nbsp; {html.escape(numbers)}", "font-size:15.5px")


def render_error(error) -> str:
    """An exception in plain words."""
    name, text = "", str(error)
    if not isinstance(error, (ValueError, FloatingPointError, OSError)):
        name = PANEL_ERROR  # for which executed notebooks are scanned
        text = f"This should not happen, please report it: {type(error).__name__}: {error}"
    style = f"{canvas.FONT};font-size:15px"
    return f'<div class="{name}" style="{style}"><b>⚠ {html.escape(text)}</b></div>'


# -- the gauges: numbers of a setting among those of the whole sweep ------------------------------
@dataclass(frozen=True)
class Gauge:
    """A number of one setting among those of the whole sweep; places on its scale are 0 … 1."""

    said: str  # label and value
    label: str
    value: float | None
    unit: str
    at: float | None  # the value's place
    good: tuple | None  # from which place to which it counts as well
    ends: list  # the numbers at 0 and 1
    log: str  # "log" of a logarithmic scale, else ""
    hills: dict  # {kind: histogram [BINS], −1 … 1}: the first kind's above the line, others' below


def read_gauges(grid, view) -> list[Gauge]:
    """The gauges of a setting: what their HTML and their still picture both show."""
    found = []
    for name, (label, unit, log) in GAUGES.items():
        low, high, counts = grid.scales[name]
        value, good = view[name], None
        at = None if value is None or value != value else place(value, low, high, log)
        if name == "surprise":
            good = tuple(place(v, low, high) for v in view["fluent_range"])
        elif name == "distance":  # farther away than the own answers
            good = place(view["own_spread"], low, high), 1.0
        hills = {}
        for i, (kind, count) in enumerate(counts.items()):
            hills[kind] = (-1 if i else 1) * count / max(count.max(), 1)
        said = f"{label}: {number(value, unit)}"
        scale = [number(low), number(high)], "log" if log else ""
        found.append(Gauge(said, label, value, unit, at, good, *scale, hills))
    return found


def _svg(gauge) -> str:
    """The good range, the hills behind a base line, and a marker at the value."""
    drawn = ""
    if gauge.good:
        x, to = (WIDTH * v for v in gauge.good)
        size = f'x="{x:.1f}" width="{to - x:.1f}" y="0" height="48"'
        drawn += f'<rect {size} fill="{GOOD}" opacity="0.3"/>'
    for i, (kind, heights) in enumerate(gauge.hills.items()):
        steps = " ".join(f"V{24 - 20 * h:.1f}h{WIDTH / BINS:g}" for h in heights)
        drawn += f'<path d="M0 24{steps}V24z" fill="{colour(kind, i)}" opacity="0.8"/>'
    drawn += f'<path d="M0 24H{WIDTH}" stroke="currentColor" stroke-width="0.7"/>'
    if gauge.at is not None:
        x = gauge.at * WIDTH
        drawn += f'<path d="M{x:.1f} 0V48" stroke="currentColor" stroke-width="2.5"/>'
        drawn += f'<path d="M{x - 6:.1f} -7h12l-6 8z" fill="currentColor"/>'
    said = f'role="img" aria-label="{html.escape(gauge.said)}"'
    size = f'viewBox="-6 -8 {WIDTH + 12} 57" preserveAspectRatio="none"'
    return f'<svg {said} {size} style="width:100%;height:52px;display:block">{drawn}</svg>'


def render_gauges(grid, view) -> str:
    """The gauges as HTML: the whole sweep behind, the good range, and you are here."""
    parts = ""
    for gauge in read_gauges(grid, view):
        low, high = gauge.ends
        parts += (
            '<div style="flex:1;min-width:0"><div style="font-size:12.5px;line-height:1.25;'
            f'height:32px">{html.escape(gauge.label)}</div>'
            f'<b style="font-size:15px">{number(gauge.value)}</b> '
            f'<span style="font-size:11.5px">{html.escape(gauge.unit)}</span>{_svg(gauge)}'
            '<div style="display:flex;justify-content:space-between;font-size:11.5px">'
            f"<span>{low}</span><span>{gauge.log}</span><span>{high}</span></div></div>"
        )
    return block(parts, "display:flex;gap:18px")


def render_legend(grid) -> str:
    """What the gauges' colours mean, and where the numbers come from."""
    names = []
    for i, kind in enumerate(next(iter(grid.scales.values()))[2]):
        square = f'<span style="color:{colour(kind, i)}">■</span> {html.escape(kind)}'
        names.append(f"{square} ({'below' if i else 'above'} the line)")
    known = [name for name in ("model", "model_hash", "dtype", "command") if name in grid.meta]
    made = html.escape(", ".join(str(grid.meta[name])[:40] for name in known))
    good = f'<span style="background:{GOOD}50">shaded</span>'
    where = f"▼ you are here; behind it the whole sweep: {', '.join(names)}"
    far = "fluent, and farther away than the model's own samples"
    return block(f"{where}; {good}: {far}. {made}", "font-size:12px")


def draw_gauge(ax, gauge):
    """The still picture of one gauge."""
    edges = np.linspace(0, 1, BINS + 1)
    for i, (kind, heights) in enumerate(gauge.hills.items()):
        ax.stairs(heights, edges, fill=True, alpha=0.6, color=colour(kind, i))
    if gauge.good:
        ax.axvspan(*gauge.good, color=GOOD, alpha=0.2, linewidth=0)
    if gauge.at is not None:
        ax.axvline(gauge.at, color="k", linewidth=2.2)
    ax.set_title(gauge.said, fontsize=10)
    ax.set_xticks([0, 1], gauge.ends, fontsize=9)
    ax.set_yticks([])


# -- the heat map ----------------------------------------------------------------------------------
def shade(count, of) -> tuple[str, str]:
    """Background and text colour of a cell: cividis, dark for none of them, light for all."""
    red, green, blue, _ = colormaps["cividis"](count / max(of, 1))
    light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
    back = "".join(f"{int(255 * part):02x}" for part in (red, green, blue))
    return f"#{back}", "black" if light else "white"


def heat_map(grid, state, view) -> dict:
    """{(source layer, R): (how many change and stay fluent, is it the setting shown)}"""
    found, shown = {}, (state["source_layer"], state["radius"])
    for layer, counts in zip(grid.options["source_layer"], view["both"]):
        for radius, count in zip(grid.options["radius"], counts):
            found[layer, radius] = count, (layer, radius) == shown
    return found


def render_still(grid, state):
    """The panel standing still: the heat map with the setting framed, and the gauges."""
    view = grid.view(state)
    figure = plt.figure(figsize=(9.4, 4.4))
    left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    _draw_heat_map(left.subplots(), grid, state, view)
    for ax, gauge in zip(right.subplots(len(GAUGES), 1), read_gauges(grid, view)):
        draw_gauge(ax, gauge)
    whose = f"{state['kind']} vector {state['vector']} × {state['coeff']:g}"
    where = f"R {state['radius']:g} after block {state['source_layer']}"
    figure.suptitle(f"{where}, {whose}: {verdict(view)}", x=0.01, ha="left", fontsize=11.5)
    return figure


def _draw_heat_map(ax, grid, state, view):
    layers, radii = grid.options["source_layer"], grid.options["radius"]
    for (layer, radius), (count, here) in heat_map(grid, state, view).items():
        i, j = layers.index(layer), radii.index(radius)
        back, ink = shade(count, view["of"])
        frame = {"facecolor": back, "edgecolor": FRAME if here else "none", "lw": 3}
        ax.add_patch(plt.Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, **frame))
        weight = "bold" if here else None
        ax.text(j, i, count, ha="center", va="center", color=ink, weight=weight)
    ax.set(xlim=(-0.6, len(radii) - 0.4), ylim=(len(layers) - 0.4, -0.6))
    ax.set_xticks(range(len(radii)), [f"{r:g}" for r in radii])
    ax.set_yticks(range(len(layers)), layers)
    ax.grid(False)
    question = f"How many of {view['of']} change and stay fluent?"
    finish(ax, question, AXES["radius"], AXES["source_layer"], legend=False)


# -- by radius (notebook 03) -----------------------------------------------------------------------
def as_img(figure, alt) -> str:
    """A figure as an <img> of HTML, PNG inside, and closed."""
    style = f"max-width:100%;width:{int(figure.get_figwidth() * 96)}px;background:white"
    png = base64.b64encode(canvas.drawn(figure, 110).getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" style="{style}" src="data:image/png;base64,{png}">'


def render_radius(found, radius):
    """The Goldilocks figure, `radius` marked. `found`: by R, as `store.shares` gives it."""
    figure, (left, right) = panels(2, width=9.2, height=3.3, sharey=True)
    same = {"ylim": (-0.04, 1.09), "marks": [(radius, f"R = {radius:g}")]}
    changed = {kind: shares["changed"] for kind, shares in found.items()}
    both = {kind: shares["both"] for kind, shares in found.items()}
    words = ("Who changes the answer?", AXES["radius"], "share of vectors")
    charts.curves(changed, *words, ax=left, **same)
    charts.curves(both, "And stays fluent?", AXES["radius"], "", ax=right, legend=False, **same)
    return figure


def render_said(sweep, radius) -> str:
    """What is said at one R, as an HTML table: the first 3 prompts, vector 0 of each kind."""
    rows = {}
    for one in sweep["cells"]:
        prompt, result = one["config"]["prompt"], one["result"]
        if one["config"]["radius"] != radius or prompt in rows or len(rows) == 3:
            continue
        said = {}
        for row in result["rows"]:
            if (row["vector"], row["coeff"], row["temperature"]) == (0, 1, 0):
                said[row["kind"]] = HTML(marked(result["clean"], row["text"])[1])
        rows[prompt] = [prompt, result["clean"], said["learned"], said["random"]]
    columns = ["prompt", "unsteered", "learned vector 0", "random vector 0"]
    return block(html_table(columns, rows.values(), cell), "overflow-wrap:anywhere")


def render_turn(angles, length, radius, layer, word):
    """How far pushes of norm R turn a token of norm `length`: `angles` [n_vectors] in degrees."""
    angles = np.asarray(angles, float)
    token = f"token {shorten(repr(word), 20)} of norm {length:,.0f}"
    turn = f"median turn {np.median(angles):.1f}°"
    upto = max(15, 15 * np.ceil(1.2 * angles.max() / 15))
    title = f"R = {radius:g} after block {layer}, {token}: {turn}"
    return geometry.push_picture(radius / length, angles, title, upto=upto)


def render_tokens(words, moved) -> str:
    """A prompt as HTML, each token shaded by how far its residual moved (`moved` [n_tokens])."""
    box = "padding:2px 3px;margin:1px;border-radius:3px;display:inline-block;text-align:center"
    spans = ""
    for word, value in zip(words, np.asarray(moved, float), strict=True):
        back, ink = shade(min(value, 1), 1)
        style = f"background:{back};color:{ink};{box};white-space:pre"
        text = html.escape(word.replace("\n", "↵"))
        size = f'<span style="font-size:11px">{value:.2f}</span>'
        spans += f'<span title="{value:.2f}" style="{style}">{text}<br>{size}</span>'
    return block(spans, "font-size:15px")


def render_token_grid(words, moved):
    """The same standing still: tokens across, layers down; `moved` {kind: [n_layers, n_tokens]}."""
    figure, axes = panels(len(moved), width=9.4, height=4.4, sharey=True)
    names = [word.replace("\n", "↵") for word in words]
    for ax, (kind, values) in zip(axes, moved.items()):
        shares = np.minimum(np.asarray(values, float), 1)
        image = ax.imshow(shares, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
        ax.grid(False)
        down = "after block" if ax is axes[0] else ""
        finish(ax, kind, "token of the prompt", down, legend=False)
    figure.colorbar(image, ax=list(axes), label="‖moved‖ / ‖residual‖ (1: or more)", pad=0.01)
    headline(figure, "How far has each token's residual moved?")
    return figure


# -- the live lab's tables -------------------------------------------------------------------------
def render_table(rows, by="radius", down=False) -> str:
    """The completions with their numbers, sorted by one of COLUMNS; no number comes last."""
    ordered = sorted((r for r in rows if r[by] is not None), key=lambda r: r[by], reverse=down)
    ordered += [r for r in rows if r[by] is None]
    body = [[row[name] for name in COLUMNS] for row in ordered]
    return block(html_table(COLUMNS.values(), body, cell), "font-size:13px")


def render_tried(rows) -> str:
    """A line per R: how many vectors changed the answer, stayed fluent, and did both."""
    body = []
    rows = [row | {"both": row["changed"] and row["fluent"]} for row in rows]
    for radius in sorted({row["radius"] for row in rows}):
        here = [row for row in rows if row["radius"] == radius]
        learned = [row for row in here if row["kind"] == "learned"]
        chance = [row for row in here if row["kind"] == "random"]
        bar = "█" * sum(row["both"] for row in learned)
        both = HTML(f"<b>{_share(learned, 'both')}</b> {bar}")
        shares = _share(learned, "changed"), _share(learned, "fluent"), both
        body.append([radius, *shares, _share(chance, "both")])
    columns = ["R", "learned: changed", "fluent", "both", "random: both"]
    return block(html_table(columns, body, cell), "font-size:13px")


def _share(rows, name):
    return f"{sum(row[name] for row in rows)} of {len(rows)}" if rows else "–"
