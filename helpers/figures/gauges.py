"""The gauges of the grid explorer: a setting's numbers among those of the whole sweep."""

import html
from dataclasses import dataclass

import numpy as np

from ..studies.store import BINS, GAUGES, place
from .canvas import OTHERS, colour
from .tables import block, number

WIDTH = 200  # of a gauge, in SVG units
GOOD = OTHERS[0]  # where a gauge should stand


@dataclass(frozen=True)
class Gauge:
    """A number of one setting among those of the whole sweep; places on its scale are 0 … 1."""

    said: str  # label and value
    label: str
    value: float | None
    unit: str
    at: float | None  # the value's place
    good: tuple | None  # from which place to which it counts as well
    ends: tuple  # the values at 0 and 1
    log: bool
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
        found.append(Gauge(said, label, value, unit, at, good, (low, high), log, hills))
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
        ends = [number(gauge.ends[0]), "log" if gauge.log else "", number(gauge.ends[1])]
        scale = "".join(f"<span>{end}</span>" for end in ends)
        parts += (
            '<div style="flex:1;min-width:0"><div style="font-size:12.5px;line-height:1.25;'
            f'height:32px">{html.escape(gauge.label)}</div>'
            f'<b style="font-size:15px">{number(gauge.value)}</b> '
            f'<span style="font-size:11.5px">{html.escape(gauge.unit)}</span>{_svg(gauge)}'
            '<div style="display:flex;justify-content:space-between;font-size:11.5px">'
            f"{scale}</div></div>"
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
    ax.set_xticks([0, 1], [number(end) for end in gauge.ends], fontsize=9)
    ax.set_yticks([])
