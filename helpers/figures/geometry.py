"""The toy on a circle, clouds on the way through a norm, a push and the angle it turns a token by:
pictures of numbers that functions take, matplotlib figures that they return."""

import matplotlib.pyplot as plt
import numpy as np

from .canvas import COLOURS, colour, finish, headline, note, one_panel, panels

CLEAN, PUSH, RESULT = COLOURS["clean"], COLOURS["random"], COLOURS["learned"]


def circle_toy(function, radius, paths, title):
    """An objective of 2-D θ as contours, the circle ‖θ‖ = radius, and paths {label: [steps, 2]}."""
    ax = one_panel(width=5.6, height=4.8)
    side = np.linspace(-1.5 * radius, 1.5 * radius, 121)
    x, y = np.meshgrid(side, side)
    z = np.asarray(function(np.stack([x, y], -1).reshape(-1, 2)), float).reshape(x.shape)
    filled = ax.contourf(x, y, z, 14, cmap="Greys", alpha=0.75)
    ax.figure.colorbar(filled, ax=ax, shrink=0.85, label="objective ‖Δ‖²")
    ax.plot(*_arc(radius, 0, 2 * np.pi), color="k", linewidth=1.2)
    for i, (label, path) in enumerate(paths.items()):
        path, shade = np.asarray(path, float), colour(label, i)
        ax.plot(*path.T, "o-", color=shade, markersize=3.5, linewidth=1.5, label=label)
        ax.plot(*path[-1], "*", color=shade, markersize=15, markeredgecolor="w")
    ax.set_aspect("equal")
    ax.grid(False)
    ax.legend(loc="upper left", fontsize=9.5, frameon=True)
    return finish(ax, title, "θ₁", "θ₂", legend=False)


def _arc(radius, start, end):
    """x and y of 200 points on a circle around 0, from angle `start` to `end` (radians)."""
    angle = np.linspace(start, end, 200)
    return radius * np.cos(angle), radius * np.sin(angle)


def clouds(rows, title):
    """3-D point clouds, one row of pictures per entry of `rows`: {label: {step: points [n, 3] or
    None}}, coloured by the angle of the row's first cloud, so that one point keeps its colour."""
    steps = list(next(iter(rows.values())))
    shape, size = (len(rows), len(steps)), (2.4 * len(steps), 2.4 * len(rows) + 0.4)
    space = {"projection": "3d"}
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, subplot_kw=space)
    for row, (line, (label, pictures)) in enumerate(zip(axes, rows.items())):
        start = np.asarray(pictures[steps[0]], float)
        shade = np.arctan2(start[:, 1], start[:, 0])
        for ax, step in zip(line, steps):
            _cloud(ax, pictures[step], shade)
            ax.set_title(step if row == 0 else "", fontsize=11, loc="center")
        style = {"rotation": 90, "va": "center", "fontsize": 11.5, "weight": "bold"}
        line[0].text2D(-0.06, 0.5, label, transform=line[0].transAxes, **style)
    headline(figure, title)
    return figure


def _cloud(ax, cloud, shade):
    """One picture of `clouds`: points [n, 3], or that there is no such step."""
    if cloud is None:
        ax.set_axis_off()
        words = {"transform": ax.transAxes, "ha": "center", "color": "0.4"}
        ax.text2D(0.5, 0.5, "(no such step)", **words)
        return
    style = {"cmap": "twilight_shifted", "s": 9, "alpha": 0.85, "linewidths": 0}
    ax.scatter(*np.asarray(cloud, float).T, c=shade, **style)
    for side in "xyz":
        ax.set(**{f"{side}lim": (-3, 3), f"{side}ticklabels": []})
    ax.view_init(elev=20, azim=-28)
    ax.set_box_aspect((1, 1, 1), zoom=1.15)


def push_picture(ratio, angles, title, upto=90):
    """Left: a token v (scaled to 1), a push of `ratio` at right angles to it, and what the norm
    leaves of their sum, a point on the circle. Right: `angles` measured in degrees, from 0 to
    `upto`, beside the one drawn."""
    shares = {"gridspec_kw": {"width_ratios": [1, 1.15]}}
    figure, (left, right) = panels(2, width=9.2, height=3.8, **shares)
    turned = np.degrees(np.arctan(ratio))
    _push(left, ratio, turned)
    angles = np.asarray(angles, float).ravel()
    bins = np.linspace(0, upto, 46)
    right.hist(angles[~np.isnan(angles)], bins=bins, color=PUSH, alpha=0.75)
    right.axvline(turned, color=RESULT, linewidth=1.8)
    side = 1 if turned < upto / 2 else -1  # the words stand where there is room
    place = {"xycoords": ("data", "axes fraction"), "ha": "left" if side > 0 else "right"}
    drawn = f"drawn: {turned:.1f}°"
    note(right, drawn, (turned, 0.93), (6 * side, 0), color=RESULT, fontsize=11, **place)
    right.set_xlim(0, upto)
    words = ("degrees that a token turns", "pairs of token and random θ")
    finish(right, "measured after the norm", *words, legend=False)
    headline(figure, title)
    return figure


def _push(ax, ratio, turned):
    """The left half of `push_picture`: v, θ, their sum, and the angle `turned` (degrees)."""
    ax.plot(*_arc(1, 0, 2 * np.pi), color="0.6", linewidth=1, linestyle=":")
    arrow = {"arrowstyle": "-|>", "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (1, 0), (0, 0), arrowprops={**arrow, "color": CLEAN})
    ax.annotate("", (1, ratio), (1, 0), arrowprops={**arrow, "color": PUSH})
    note(ax, "v", (0.5, -0.04), (4, -13), color=CLEAN, fontsize=12)
    note(ax, "θ", (1, ratio / 2), (7, -4), color=PUSH, fontsize=12)
    ax.plot([0, 1], [0, ratio], color=RESULT, linewidth=1.2, linestyle="--")
    x, y = _arc(0.35, 0, np.radians(turned))
    ax.plot(x, y, color=RESULT)
    ax.plot(x[-1] / 0.35, y[-1] / 0.35, "o", color=RESULT, markersize=9)
    end = (x[-1] * 0.4 / 0.35, y[-1] * 0.4 / 0.35)
    note(ax, f"{turned:.1f}°", end, (-4, 6), ha="right", color=RESULT, fontsize=11)
    ax.set(aspect="equal", xlim=(-0.35, 1.45), ylim=(-0.35, max(1.25, ratio + 0.2)))
    ratio_said = f"ρ = ‖θ‖ / ‖v‖ = {ratio:.2f}"
    finish(ax, ratio_said, "along v (lengths of v)", "at right angles", legend=False)
