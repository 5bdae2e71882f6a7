"""What a computed sweep says at one setting, as HTML and as still figures: pure functions, numbers in, HTML or a figure out.

A `judging.Grid` says what there is to show. All text is escaped. Nothing here needs torch or a browser.
"""

import base64
import html
import io
from difflib import SequenceMatcher

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colormaps

from ..studies.store import AXES, BINS, GAUGES, place
from . import charts

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
INK, FAINT = "var(--jp-content-font-color1, #1a1a1a)", "var(--jp-border-color1, #999)"
FONT = f"font:14px/1.4 system-ui,sans-serif;color:{INK}"
FRAME = "#D55E00"  # of the setting shown, in the heat map
MARK = "background:#ffe49c;color:#000;text-decoration:underline;text-decoration-thickness:2px;padding:0 2px"


# ---------------------------------------------------------------------------------------------- text
def marked(clean, said) -> tuple[str, str]:
    """Both texts as HTML, everything escaped, the words that one has and the other has not marked."""
    a, b, left, right = clean.split(), said.split(), [], []
    for kind, i, j, k, n in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for words, out in ((a[i:j], left), (b[k:n], right)):
            text = html.escape(" ".join(words))
            out += (
                [text if kind == "equal" else f'<mark style="{MARK}">{text}</mark>'] if text else []
            )
    return tuple(" ".join(out) or "<i>(nothing)</i>" for out in (left, right))


def render_texts(clean, said, title="steered") -> str:
    """The unsteered and the steered completion side by side, as HTML."""
    left, right = marked(clean, said)
    box = f"flex:1;min-width:0;overflow-wrap:anywhere;border:1px solid {FAINT};border-radius:4px;padding:4px 10px"
    both = "".join(
        f'<div style="{box}"><b>{html.escape(name)}</b><br>{text}</div>'
        for name, text in (("unsteered", left), (title, right))
    )
    return f'<div style="{FONT};display:flex;gap:10px">{both}</div>'


def verdict(view) -> str:
    """The two judgements in plain words."""
    words = {
        (False, True): "○ close to the model's own answer",
        (True, True): "● changed, and still fluent",
        (True, False): "✕ changed, no longer fluent",
        (False, False): "✕ not fluent, though close to its own answer",
    }
    return words[bool(view["changed"]), bool(view["fluent"])]


def render_error(error) -> str:
    """An exception in plain words. One that no input should cause carries a class for which executed notebooks are scanned."""
    expected = isinstance(error, (ValueError, FloatingPointError, OSError))
    text = (
        str(error)
        if expected
        else f"This should not happen, please report it: {type(error).__name__}: {error}"
    )
    return f'<div class="{"" if expected else PANEL_ERROR}" style="{FONT};font-size:15px"><b>⚠ {html.escape(text)}</b></div>'


def number(value, unit="") -> str:
    """A value with 3 digits, as every panel and figure writes it."""
    if value is None or value != value:
        return "–"
    if abs(value) >= 1e5:
        mantissa, power = f"{value:.1e}".split("e")
        text = (
            f"{mantissa}·10{str(int(power)).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
        )
    else:
        text = (
            f"{float(f'{value:.3g}'):,.0f}"
            if abs(value) >= 1000
            else f"{value:.3g}"
            if abs(value) >= 5e-4
            else "0"
        )
    return text + (f" {unit}" if unit else "")


# ---------------------------------------------------------------------------------------------- gauges
def _limits(name, view, scale):
    """(from, to) of what counts as well on this gauge, in 0 … 1, or None: fluent range; farther away than the own answers."""
    low, high, _ = scale
    if name == "surprise":
        return [place(v, low, high) for v in view["fluent_range"]]
    return [place(view["own_spread"], low, high), 1.0] if name == "distance" else None


def _hills(counts, side, base=24, height=20):
    """A histogram as the path of an SVG, hills above (side 1) or below (−1) the base line."""
    top = max(counts.max(), 1)
    steps = " ".join(f"V{base - side * height * c / top:.1f}h{WIDTH / BINS:g}" for c in counts)
    return f"M0 {base}{steps}V{base}z"


def render_gauges(grid, view) -> str:
    """The gauges as HTML: the whole sweep behind (learned above the line, random below), the good range, and you are here."""
    parts = []
    for name, (label, unit, log) in GAUGES.items():
        low, high, counts = scale = grid.scales[name]
        hills = "".join(
            f'<path d="{_hills(c, 1 if i == 0 else -1)}" fill="{charts.colour(kind, i)}" opacity="0.8"/>'
            for i, (kind, c) in enumerate(counts.items())
        )
        limits = _limits(name, view, scale)
        good = (
            ""
            if not limits
            else (
                f'<rect x="{limits[0] * WIDTH:.1f}" width="{(limits[1] - limits[0]) * WIDTH:.1f}" y="0" '
                'height="48" fill="#009E73" opacity="0.3"/>'
            )
        )
        here, value = "", view[name]
        if value is not None and value == value:
            x = place(value, low, high, log) * WIDTH
            here = (
                f'<path d="M{x:.1f} 0V48" stroke="currentColor" stroke-width="2.5"/>'
                f'<path d="M{x - 6:.1f} -7h12l-6 8z" fill="currentColor"/>'
            )
        said = f"{label}: {number(value, unit)}"
        parts.append(
            '<div style="flex:1;min-width:0">'
            f'<div style="font-size:12.5px;line-height:1.25;height:32px">{html.escape(label)}</div>'
            f'<b style="font-size:15px">{number(value)}</b> <span style="font-size:11.5px">{html.escape(unit)}</span>'
            f'<svg role="img" aria-label="{html.escape(said)}" viewBox="-6 -8 {WIDTH + 12} 57" preserveAspectRatio="none" '
            f'style="width:100%;height:52px;display:block">{good}{hills}'
            f'<path d="M0 24H{WIDTH}" stroke="currentColor" stroke-width="0.7"/>{here}</svg>'
            f'<div style="display:flex;justify-content:space-between;font-size:11.5px"><span>{number(low)}</span>'
            f"<span>{'log' if log else ''}</span><span>{number(high)}</span></div></div>"
        )
    return f'<div style="{FONT};display:flex;gap:18px">{"".join(parts)}</div>'


def render_legend(grid) -> str:
    """What the gauges' colours mean, and where the numbers come from."""
    kinds = list(next(iter(grid.scales.values()))[2])
    names = [
        f'<span style="color:{charts.colour(kind, i)}">■</span> {kind} ({"above" if i == 0 else "below"} the line)'
        for i, kind in enumerate(kinds)
    ]
    made = ", ".join(
        str(grid.meta[name])[:40]
        for name in ("model", "model_hash", "dtype", "command")
        if name in grid.meta
    )
    return (
        f'<div style="{FONT};font-size:12px">▼ you are here; behind it the whole sweep: {", ".join(names)}; '
        '<span style="background:#009E7350">shaded</span>: fluent, and farther away than the model\'s own samples. '
        f"{html.escape(made)}</div>"
    )


# ---------------------------------------------------------------------------------------------- the heat map
def shade(count, of) -> tuple[str, str]:
    """Background and text colour of a cell: cividis, dark for none of them, light for all."""
    red, green, blue, _ = colormaps["cividis"](count / max(of, 1))
    light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
    return (
        f"#{int(255 * red):02x}{int(255 * green):02x}{int(255 * blue):02x}",
        "black" if light else "white",
    )


def render_still(grid, state):
    """The static twin of the panel: the heat map with the setting framed, and the gauges, as one figure."""
    view, (layers, radii) = grid.view(state), (grid.options["source_layer"], grid.options["radius"])
    figure = plt.figure(figsize=(9.4, 4.4))
    left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    ax = left.subplots()
    for i, j in np.ndindex(len(layers), len(radii)):
        back, ink = shade(view["both"][i][j], view["of"])
        here = (layers[i], radii[j]) == (state["source_layer"], state["radius"])
        ax.add_patch(
            plt.Rectangle(
                (j - 0.46, i - 0.46),
                0.92,
                0.92,
                facecolor=back,
                edgecolor=FRAME if here else "none",
                lw=3,
            )
        )
        ax.text(
            j,
            i,
            view["both"][i][j],
            ha="center",
            va="center",
            color=ink,
            weight="bold" if here else None,
        )
    ax.set(xlim=(-0.6, len(radii) - 0.4), ylim=(len(layers) - 0.4, -0.6))
    ax.set_xticks(range(len(radii)), [f"{r:g}" for r in radii])
    ax.set_yticks(range(len(layers)), layers)
    ax.grid(False)
    charts.finish(
        ax,
        f"How many of {view['of']} change and stay fluent?",
        AXES["radius"],
        AXES["source_layer"],
        legend=False,
    )
    axes = right.subplots(len(GAUGES), 1)
    for ax, (name, (label, unit, log)) in zip(axes, GAUGES.items()):
        low, high, counts = scale = grid.scales[name]
        for i, (kind, c) in enumerate(counts.items()):
            ax.stairs(
                (1 - 2 * min(i, 1)) * c / max(c.max(), 1),
                np.linspace(0, 1, BINS + 1),
                fill=True,
                alpha=0.6,
                color=charts.colour(kind, i),
            )
        if limits := _limits(name, view, scale):
            ax.axvspan(*limits, color="#009E73", alpha=0.2, linewidth=0)
        if view[name] is not None and view[name] == view[name]:
            ax.axvline(place(view[name], low, high, log), color="k", linewidth=2.2)
        ax.set_title(f"{label}: {number(view[name], unit)}", fontsize=10)
        ax.set_xticks([0, 1], [number(low), number(high)], fontsize=9)
        ax.set_yticks([])
    whose = f"{state['kind']} vector {state['vector']} × {state['coeff']:g}"
    title = f"R {state['radius']:g} after block {state['source_layer']}, {whose}: {verdict(view)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5)
    return figure


# ---------------------------------------------------------------------------------------------- by radius (notebook 03)
def as_img(figure, alt) -> str:
    """A figure as an <img> of HTML, PNG inside, and closed."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return (
        f'<img alt="{html.escape(alt)}" style="max-width:100%;width:{int(figure.get_figwidth() * 96)}px;background:white" '
        f'src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
    )


def render_radius(found, radius):
    """The Goldilocks figure, `radius` marked: by R, which share of learned and random vectors changes the answer, and does so
    fluently. `found` as `judging.shares` gives it."""
    figure, axes = charts.panels(2, width=9.2, height=3.3, sharey=True)
    names = {"changed": "Who changes the answer?", "both": "And stays fluent?"}
    for ax, (measure, title) in zip(axes, names.items()):
        charts.curves(
            {kind: measures[measure] for kind, measures in found.items()},
            title,
            "R (norm of θ)",
            "share of vectors" if ax is axes[0] else "",
            ax=ax,
            ylim=(-0.04, 1.09),
            marks=[(radius, f"R = {radius:g}")],
            legend=measure == "changed",
        )
    return figure


def render_said(sweep, radius, n_prompts=3) -> str:
    """What is said at one R: the first prompts and their first seed, vector 0 of each kind (not picked), as an HTML table."""
    body, seen = [], set()
    for cell in sweep["cells"]:
        config, result = cell["config"], cell["result"]
        if config["radius"] != radius or config["prompt"] in seen or len(seen) == n_prompts:
            continue
        seen.add(config["prompt"])
        said = {
            r["kind"]: r["text"]
            for r in result["rows"]
            if (r["vector"], r["coeff"], r["temperature"]) == (0, 1, 0)
        }
        texts = [
            html.escape(result["clean"]),
            *(marked(result["clean"], said[k])[1] for k in ("learned", "random")),
        ]
        body.append(
            "<tr>"
            + "".join(
                f'<td style="text-align:left;vertical-align:top;width:25%;padding:3px 8px">{t}</td>'
                for t in (f"<b>{html.escape(config['prompt'])}</b>", *texts)
            )
            + "</tr>"
        )
    head = "".join(
        f'<th style="text-align:left;padding:3px 8px">{name}</th>'
        for name in ("prompt", "unsteered", "learned vector 0", "random vector 0")
    )
    return f'<table style="{FONT};width:100%;table-layout:fixed;overflow-wrap:anywhere"><tr>{head}</tr>{"".join(body)}</table>'


# ---------------------------------------------------------------------------------------------- one token, all tokens
def render_turn(angles, length, radius, layer, word):
    """How far pushes of norm R turn one token, after the norm: `angles` [n_vectors] in degrees, `length` the token's own norm."""
    angles = np.asarray(angles, float)
    title = f"R = {radius:g} after block {layer}, token {charts.shorten(repr(word), 20)} of norm {length:,.0f}: "
    return charts.push_picture(
        radius / length,
        angles,
        f"{title}median turn {np.median(angles):.1f}°",
        upto=max(15, 15 * np.ceil(1.2 * angles.max() / 15)),
    )


def render_tokens(words, moved) -> str:
    """A prompt as HTML, each token shaded by how far its residual moved: `moved` [n_tokens], relative to its own norm."""
    spans = []
    for word, value in zip(words, np.asarray(moved, float), strict=True):
        back, ink = shade(min(value, 1), 1)
        spans.append(
            f'<span title="{value:.2f}" style="background:{back};color:{ink};padding:2px 3px;margin:1px;'
            'border-radius:3px;display:inline-block;text-align:center;white-space:pre">'
            f"{html.escape(word.replace(chr(10), '↵'))}"
            f'<br><span style="font-size:11px">{value:.2f}</span></span>'
        )
    return f'<div style="{FONT};font-size:15px">{"".join(spans)}</div>'


def render_token_grid(words, moved):
    """The static twin: tokens across, layers down; `moved` {kind: [n_layers, n_tokens]}."""
    figure, axes = charts.panels(len(moved), width=9.4, height=4.4, sharey=True)
    for ax, (kind, values) in zip(axes, moved.items()):
        image = ax.imshow(
            np.minimum(np.asarray(values, float), 1), vmin=0, vmax=1, cmap="cividis", aspect="auto"
        )
        ax.set_xticks(
            range(len(words)),
            [w.replace("\n", "↵").replace("$", r"\$") for w in words],
            rotation=90,
            fontsize=7,
        )
        ax.grid(False)
        charts.finish(
            ax, kind, "token of the prompt", "after block" if ax is axes[0] else "", legend=False
        )
    figure.colorbar(image, ax=list(axes), label="‖moved‖ / ‖residual‖ (1: or more)", pad=0.01)
    figure.suptitle("How far has each token's residual moved?", x=0.01, ha="left", fontsize=12.5)
    return figure


# ---------------------------------------------------------------------------------------------- the live lab's tables
def cell(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return html.escape(value) if isinstance(value, str) else number(value)


def _table(head, body):
    style = f"border-bottom:1px solid {FAINT};padding:2px 8px;text-align:left;vertical-align:top"
    rows = ["".join(f'<td style="{style}">{c}</td>' for c in row) for row in body]
    names = "".join(f'<th style="{style}">{html.escape(c)}</th>' for c in head)
    body = "</tr><tr>".join([names, *rows])
    return f'<table style="{FONT};font-size:13px;border-collapse:collapse"><tr>{body}</tr></table>'


def render_table(rows, by="radius", down=False) -> str:
    """The completions with their numbers, everything escaped, sorted by one of COLUMNS; what has no number comes last."""
    known = [r for r in rows if r[by] is not None]
    ordered = sorted(known, key=lambda r: r[by], reverse=down) + [r for r in rows if r[by] is None]
    return _table(COLUMNS.values(), [[cell(r[c]) for c in COLUMNS] for r in ordered])


def render_tried(rows) -> str:
    """A line per R: how many learned vectors changed the answer, stayed fluent, did both, and how many random ones did both."""

    def share(part, *names):
        return (
            f"{sum(all(r[name] for name in names) for r in part)} of {len(part)}" if part else "–"
        )

    body = []
    for radius in sorted({r["radius"] for r in rows}):
        learned, chance = (
            [r for r in rows if (r["radius"], r["kind"]) == (radius, kind)]
            for kind in ("learned", "random")
        )
        bar = "█" * sum(r["changed"] and r["fluent"] for r in learned)
        body.append(
            [
                number(radius),
                share(learned, "changed"),
                share(learned, "fluent"),
                f"<b>{share(learned, 'changed', 'fluent')}</b> {bar}",
                share(chance, "changed", "fluent"),
            ]
        )
    return _table(["R", "learned: changed", "fluent", "both", "random: both"], body)
