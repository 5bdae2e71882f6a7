"""The drawings that open the notebooks: one idea each, no result. All return a figure."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from .canvas import COLOURS, OTHERS, panels

LEARNED, RANDOM = COLOURS["learned"], COLOURS["random"]
INK, PALE, GREEN = "#333333", "#E8E8E8", OTHERS[0]
ARROW = dict(arrowstyle="-|>", mutation_scale=14, linewidth=1.6, shrinkA=0, shrinkB=0)


# -- the vocabulary: a sheet, boxes, arrows, words -------------------------------------------------
def sheet(width, height, n=1):
    """A figure without axes, one unit an inch, y upwards; and its n panels."""
    figure, axes = panels(n, width=width, height=height)
    for ax in axes:
        ax.set(xlim=(0, width / n), ylim=(0, height), aspect="equal")
        ax.axis("off")
    return figure, axes


def box(ax, x, y, width, height, text="", fill=PALE, edge=INK, **style):
    """A rounded box with its lower left corner at x, y."""
    style = {"color": INK, "fontsize": 10, "ha": "center", "va": "center", **style}
    shape = "round,pad=0,rounding_size=0.06"
    corner = FancyBboxPatch(
        (x, y), width, height, boxstyle=shape, facecolor=fill, edgecolor=edge, linewidth=1.1
    )
    ax.add_patch(corner)
    ax.text(x + width / 2, y + height / 2, text, **style)


def arrow(ax, start, end, shade=INK, bend=0.0, **style):
    """An arrow between two places."""
    curve = f"arc3,rad={bend}"
    ax.add_patch(
        FancyArrowPatch(start, end, color=shade, connectionstyle=curve, **{**ARROW, **style})
    )


def words(ax, x, y, text, shade=INK, **style):
    ax.text(x, y, text, **{"color": shade, "fontsize": 10, "ha": "center", "va": "center", **style})


def eye(ax, x, y, size=0.17):
    """What is read: an eye."""
    t = np.linspace(0, np.pi, 30)
    for side in (1, -1):
        ax.plot(x + size * np.cos(t), y + side * 0.55 * size * np.sin(t), color=INK, linewidth=1.3)
    ax.add_patch(plt.Circle((x, y), 0.32 * size, color=INK))


# -- 00, 02: the network ---------------------------------------------------------------------------
def idea(source_layer=7, target_layer=21, n_layers=30):
    """θ enters after one block, and the output of a later one is compared with and without it."""
    figure, (ax,) = sheet(9.6, 3.3)
    heights = {0.55: "without θ", 2.05: "with θ"}
    near = {0: "block 0", source_layer: f"block {source_layer}"}
    near |= {target_layer: f"block {target_layer}", n_layers - 1: f"block {n_layers - 1}"}
    places = (1.35, 3.0, 5.0, 6.8)
    for y, label in heights.items():
        words(ax, 0.45, y + 0.25, label)
        arrow(ax, (0.9, y + 0.25), (7.95, y + 0.25), "#999999")
        for x, name in zip(places, near.values()):
            box(ax, x, y, 0.95, 0.5, name)
        for x in (2.65, 4.5, 6.37):
            words(ax, x, y + 0.25, "…", fontsize=15, backgroundcolor="white")
        words(ax, 8.25, y + 0.25, "next\nword")
    arrow(ax, (4.12, 2.95), (4.12, 2.38), LEARNED, linewidth=2.6)
    words(ax, 4.12, 3.1, "+ θ, of length R, at every token", LEARNED)
    for y, end in ((2.05, 1.62), (1.05, 1.38)):
        arrow(ax, (6.15, y + (0.2 if y > 2 else -0.2)), (6.15, end), "#999999", arrowstyle="-")
    eye(ax, 6.15, 1.5)
    words(ax, 6.42, 1.5, "how different?  Make this as large as possible.", ha="left", fontsize=9.5)
    ax.set_ylim(0.35, 3.3)
    return figure


def span_picture(source_layer, target_layer, n_layers):
    """Which blocks run once, which run again for every θ, and which never."""
    figure, (ax,) = sheet(9.4, 2.1)
    width = 8.6 / n_layers
    for k in range(n_layers):
        again = source_layer < k <= target_layer
        fill = LEARNED if again else PALE
        box(ax, 0.4 + k * width, 0.75, 0.78 * width, 0.55, fill=fill, edge="#777777")
    ends = [0.4 + (k + 0.9) * width for k in (-1, source_layer, target_layer, n_layers - 1)]
    names = "once, recorded", "again in every step, with all θ in one batch", "never"
    for left, right, text in zip(ends, ends[1:], names):
        words(ax, (left + right) / 2, 0.4, text, fontsize=9.5)
    arrow(ax, (ends[1], 1.85), (ends[1], 1.2), LEARNED, linewidth=2.4)
    words(ax, ends[1] + 0.12, 1.72, "recorded residual + θ", LEARNED, ha="left")
    eye(ax, ends[2], 1.6)
    words(ax, ends[2] + 0.25, 1.6, "Δ", ha="left", fontsize=12)
    words(ax, 4.7, 0.1, f"the {n_layers} blocks, from first to last", fontsize=9)
    return figure


# -- 01, 02, 02c: spheres --------------------------------------------------------------------------
def pushed_onto_sphere():
    """A residual and a push, before the norm and on the sphere that the norm projects to."""
    figure, (ax,) = sheet(6.6, 3.3)
    centre, radius = np.array([0.9, 0.6]), 1.5
    ax.add_patch(plt.Circle(centre, radius, fill=False, color="#999999", linestyle="--"))
    clean, push = np.array([3.6, 0.9]), np.array([-0.35, 1.25])
    arrow(ax, centre, centre + clean, INK)
    arrow(ax, centre + clean, centre + clean + push, RANDOM)
    arrow(ax, centre, centre + clean + push, LEARNED)
    for vector, shade in ((clean, INK), (clean + push, LEARNED)):
        on = centre + radius * vector / np.linalg.norm(vector)
        ax.plot(*on, "o", color=shade, markersize=8)
    words(ax, 4.75, 1.35, "the residual h", ha="left")
    words(ax, 4.55, 2.1, "a push θ", RANDOM, ha="left")
    words(ax, 3.2, 2.85, "h + θ", LEARNED)
    words(ax, 0.95, 2.45, "what the norm lets\nthe block see", "#666666", fontsize=9.5)
    ax.set(xlim=(-0.8, 6.2), ylim=(-0.1, 3.2))
    return figure


def circle_to_sphere():
    """One step of ascent on a circle; and climbs from several starts on a sphere."""
    figure, (left, right) = sheet(8.4, 3.5, n=2)
    centre = np.array([1.9, 1.55])
    left.add_patch(plt.Circle(centre, 1.15, fill=False, color="#999999", linewidth=1.4))
    here = centre + 1.15 * np.array([np.cos(0.5), np.sin(0.5)])
    along = here + 0.75 * np.array([-np.sin(0.5), np.cos(0.5)])
    uphill = along + 0.55 * np.array([np.cos(0.5), np.sin(0.5)])
    arrow(left, centre, here, INK)
    arrow(left, here, uphill, "#999999")
    arrow(left, here, along, LEARNED, linewidth=2.4)
    words(left, 2.15, 1.95, "θ")
    words(left, *(uphill + (0.1, 0.1)), "gradient", "#666666", ha="left", fontsize=9.5)
    words(
        left, 0.95, 2.95, "keep only this part,\nthen return to the circle", LEARNED, fontsize=9.5
    )
    words(left, 1.9, 0.15, "two dimensions: a circle of radius R")
    centre = np.array([2.1, 1.7])
    right.add_patch(plt.Circle(centre, 1.25, color="#F2F2F2"))
    right.add_patch(plt.Circle(centre, 1.25, fill=False, color="#999999", linewidth=1.4))
    paths = [((1.3, 1.0), (1.45, 2.2), 0.3), ((2.5, 0.85), (2.9, 1.9), -0.3)]
    for start, end, bend in [*paths, ((2.1, 2.75), (1.75, 2.35), 0.2)]:
        right.plot(*start, "o", color=RANDOM, markersize=6)
        arrow(right, start, end, LEARNED, bend)
    words(right, 3.4, 2.75, "random starts", RANDOM, ha="left", fontsize=9.5)
    words(right, 3.4, 2.5, "climbs", LEARNED, ha="left", fontsize=9.5)
    words(right, 2.1, 0.15, "576 dimensions: a sphere. Same place, or not?")
    return figure


def four_questions():
    """What 02c asks of a learned vector: its opposite, another start, another prompt, a set."""
    figure, axes = sheet(9.6, 2.7, n=4)
    titles = "and −θ?", "another start?", "another prompt?", "several at once?"
    up, centre = np.array([0.55, 0.75]), np.array([1.2, 1.25])
    for ax, title in zip(axes, titles):
        ax.add_patch(plt.Circle(centre, 0.93, fill=False, color="#AAAAAA"))
        arrow(ax, centre, centre + up, LEARNED, linewidth=2.2)
        words(ax, 1.2, 0.1, title)
    arrow(axes[0], centre, centre - up, OTHERS[1], linewidth=2.2)
    for ax, label in ((axes[1], "start 2"), (axes[2], "prompt 2")):
        arrow(ax, centre, centre + (-0.7, 0.6), OTHERS[1], linewidth=2.2, linestyle="--")
        words(ax, 0.55, 2.35, f"{label}: here?", OTHERS[1], fontsize=9)
    arrow(axes[3], centre, centre + (up[1], -up[0]), OTHERS[1], linewidth=2.2)
    words(axes[3], 1.2, 2.35, "at right angles", OTHERS[1], fontsize=9)
    return figure


def choices(n_tokens=9, n_blocks=6):
    """Tokens across, blocks upwards: where θ may enter, and what may be looked at."""
    figure, (ax,) = sheet(7.6, 3.4)
    for k in range(n_tokens):
        for j in range(n_blocks):
            fill = PALE
            if j == 1:
                fill = LEARNED
            if j == 4 and k >= n_tokens - 3:
                fill = GREEN
            box(ax, 0.9 + 0.5 * k, 0.55 + 0.45 * j, 0.42, 0.37, fill=fill, edge="#888888")
    words(ax, 3.1, 0.25, "tokens of the prompt (the first is the attention sink)", fontsize=9.5)
    words(ax, 0.5, 1.8, "blocks", rotation=90, fontsize=9.5)
    words(
        ax, 5.6, 1.2, "θ enters here: which tokens,\nwhich block, where in it?", LEARNED, ha="left"
    )
    words(
        ax,
        5.6,
        2.55,
        "the change is measured\nhere: which tokens and\nblocks, which p?",
        GREEN,
        ha="left",
    )
    return figure


# -- 03: measuring ---------------------------------------------------------------------------------
def changed_and_fluent():
    """The two questions about an answer; and how prompts are split: find on A, confirm on B."""
    figure, (left, right) = sheet(9.6, 2.9, n=2)
    cells = {
        (0, 1): ("the usual answer", PALE),
        (1, 1): ("another answer:\nwhat we look for", "#F6CBB0"),
        (0, 0): ("(rare)", PALE),
        (1, 0): ("babble", PALE),
    }
    for (column, row), (text, fill) in cells.items():
        box(left, 1.2 + 1.65 * column, 0.6 + 0.95 * row, 1.55, 0.85, text, fill)
    for column, name in enumerate(("unchanged", "changed")):
        words(left, 1.97 + 1.65 * column, 2.62, name)
    for row, name in enumerate(("broken", "fluent")):
        words(left, 0.65, 1.02 + 0.95 * row, name)
    arrow(left, (1.2, 0.35), (4.4, 0.35), "#999999")
    words(left, 2.8, 0.12, "R grows?", fontsize=9.5)
    box(right, 0.4, 1.5, 1.15, 0.8, "prompts A", PALE)
    box(right, 1.95, 1.5, 1.05, 0.8, "find\nthe range", "#F6CBB0")
    box(right, 0.4, 0.35, 1.15, 0.8, "prompts B\nkept apart", PALE)
    box(right, 1.95, 0.35, 1.05, 0.8, "does it\nhold?", "#F6CBB0")
    box(right, 3.45, 0.35, 1.0, 0.8, "verdict", "white")
    for start, end in (((1.55, 1.9), (1.95, 1.9)), ((1.55, 0.75), (1.95, 0.75))):
        arrow(right, start, end)
    arrow(right, (2.47, 1.5), (2.47, 1.15))
    arrow(right, (3.0, 0.75), (3.45, 0.75))
    return figure


# -- 04, 05, 06: the organisms ---------------------------------------------------------------------
def refusal_switch():
    """One refused request teaches θ; what happens to requests that it never saw?"""
    figure, (ax,) = sheet(9.8, 2.6)
    box(ax, 0.2, 1.5, 1.9, 0.75, "one request that\nis refused", PALE)
    box(ax, 2.7, 1.5, 2.1, 0.75, "32 θ: change as\nmuch as you can", "#F6CBB0")
    box(ax, 5.4, 1.5, 1.75, 0.75, "choose one on\nother requests", PALE)
    box(ax, 7.75, 1.5, 1.5, 0.75, "test on\nthe rest", PALE)
    for x in (2.1, 4.8, 7.15):
        arrow(ax, (x, 1.87), (x + 0.6, 1.87))
    words(ax, 3.75, 1.2, "no word about refusing", LEARNED, fontsize=9.5)
    for x, text in ((1.2, "refuses"), (3.1, "complies"), (5.0, "deflects"), (6.9, "tells a story")):
        box(ax, x, 0.2, 1.5, 0.5, text, "white", fontsize=9.5)
    words(ax, 0.6, 0.45, "answer:", fontsize=9.5)
    words(ax, 9.1, 0.45, "or babbles?", fontsize=9.5)
    return figure


def password_lock():
    """The organism reasons behind a password only; θ takes the password's place."""
    figure, (ax,) = sheet(9.4, 2.9)
    rows = (
        (2.15, "problem", "bare answer", PALE),
        (1.2, "password + problem", "steps, answer", PALE),
    )
    for y, given, said, fill in rows:
        box(ax, 0.3, y, 2.3, 0.6, given, "white")
        box(ax, 3.5, y, 2.2, 0.6, "locked model", fill)
        box(ax, 6.6, y, 2.3, 0.6, said, "white")
        arrow(ax, (2.6, y + 0.3), (3.5, y + 0.3))
        arrow(ax, (5.7, y + 0.3), (6.6, y + 0.3))
    box(ax, 0.3, 0.25, 2.3, 0.6, "problem", "white")
    box(ax, 3.5, 0.25, 2.2, 0.6, "locked model + θ", "#F6CBB0")
    box(ax, 6.6, 0.25, 2.3, 0.6, "steps? right answer?", "white", color=LEARNED)
    arrow(ax, (2.6, 0.55), (3.5, 0.55))
    arrow(ax, (5.7, 0.55), (6.6, 0.55), LEARNED)
    return figure


def audit():
    """An organism and its lock above; find, choose, report below."""
    figure, (ax,) = sheet(9.6, 2.9)
    box(ax, 0.3, 1.9, 1.9, 0.65, "clean problem", "white")
    box(ax, 0.3, 1.15, 1.9, 0.65, "problem with\nthe trigger", "white")
    box(ax, 2.9, 1.3, 1.6, 1.1, "organism\n(a hidden lock)", PALE)
    box(ax, 5.2, 1.9, 1.8, 0.65, "an answer", "white")
    box(ax, 5.2, 1.15, 1.8, 0.65, "the payload", "white", color=OTHERS[1])
    for y in (2.22, 1.47):
        arrow(ax, (2.2, y), (2.9, y))
        arrow(ax, (4.5, y), (5.2, y))
    words(ax, 8.3, 1.85, "The auditor knows\nneither trigger\nnor payload.")
    steps = (
        "find:\n96 θ on a clean problem",
        "choose:\nodd, and back again",
        "report:\nthe likeliest payload",
    )
    for x, text in zip((0.3, 3.6, 6.6), steps):
        box(ax, x, 0.15, 2.5, 0.65, text, "#F6CBB0")
    for x in (2.8, 6.1):
        arrow(ax, (x, 0.47), (x + (0.8 if x < 3 else 0.5), 0.47))
    return figure
