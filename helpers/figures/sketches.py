"""Pictures that explain: a 2-D objective on its circle (notebook 02), point clouds and a pushed token (notebook 01)."""

import matplotlib.pyplot as plt
import numpy as np

from .canvas import COLOURS, colour, finish, panels


def circle_toy(function, radius, paths, title, gradients=None):
    """A 2-D objective as contours, the circle ‖θ‖ = radius on it, and paths {label: [steps, 2]} along the circle."""
    figure, (ax,) = panels(width=5.6, height=4.8)
    side = np.linspace(-1.5 * radius, 1.5 * radius, 121)
    x, y = np.meshgrid(side, side)
    z = np.asarray(function(np.stack([x, y], -1).reshape(-1, 2)), float).reshape(x.shape)
    filled = ax.contourf(x, y, z, 14, cmap="Greys", alpha=0.75)
    figure.colorbar(filled, ax=ax, shrink=0.85, label="objective ‖Δ‖²")
    angle = np.linspace(0, 2 * np.pi, 200)
    ax.plot(radius * np.cos(angle), radius * np.sin(angle), color="k", linewidth=1.2)
    for i, (label, path) in enumerate(paths.items()):
        path = np.asarray(path, float)
        ax.plot(*path.T, "o-", color=colour(label, i), markersize=3.5, linewidth=1.5, label=label)
        ax.plot(*path[-1], "*", color=colour(label, i), markersize=15, markeredgecolor="w")
    ax.set_aspect("equal")
    ax.grid(False)
    finish(ax, title, "θ₁", "θ₂", legend=False)
    ax.legend(loc="upper left", fontsize=9.5, frameon=True)
    return figure


def clouds(rows, title, limit=3.0):
    """3-D point clouds, one row of pictures per entry of `rows`: {label: {step: points [n, 3] or None}}, coloured by the angle
    of the row's first cloud, so that one point keeps its colour."""
    steps = list(next(iter(rows.values())))
    figure, axes = plt.subplots(
        len(rows),
        len(steps),
        figsize=(2.4 * len(steps), 2.4 * len(rows) + 0.4),
        squeeze=False,
        subplot_kw={"projection": "3d"},
    )
    for row, (line, (label, clouds_)) in enumerate(zip(axes, rows.items())):
        start = np.asarray(clouds_[steps[0]], float)
        shade = np.arctan2(start[:, 1], start[:, 0])
        for i, (ax, step) in enumerate(zip(line, steps)):
            if clouds_[step] is None:
                ax.set_axis_off()
                ax.text2D(
                    0.5, 0.5, "(no such step)", transform=ax.transAxes, ha="center", color="0.4"
                )
            else:
                ax.scatter(
                    *np.asarray(clouds_[step], float).T,
                    c=shade,
                    cmap="twilight_shifted",
                    s=9,
                    alpha=0.85,
                    linewidths=0,
                )
            ax.set(
                **{f"{axis}lim": (-limit, limit) for axis in "xyz"},
                **{f"{axis}ticklabels": [] for axis in "xyz"},
            )
            ax.view_init(elev=20, azim=-28)
            ax.set_box_aspect((1, 1, 1), zoom=1.15)
            ax.set_title(step if row == 0 else "", fontsize=11, loc="center")
        line[0].text2D(
            -0.06,
            0.5,
            label,
            transform=line[0].transAxes,
            rotation=90,
            va="center",
            fontsize=11.5,
            weight="bold",
        )
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5)
    return figure


def push_picture(ratio, angles, title, cosine=0.0, upto=90):
    """Left: a token v (scaled to 1), a push of `ratio` at right angles to it (or at `cosine`), and what the norm leaves of their
    sum, a point on the circle. Right: `angles` measured in degrees, from 0 to `upto`, beside the one drawn."""
    figure, (left, right) = panels(
        2, width=9.2, height=3.8, gridspec_kw={"width_ratios": [1, 1.15]}
    )
    total = np.array([1 + ratio * cosine, ratio * np.sqrt(1 - cosine**2)])
    turned = np.degrees(np.arctan2(total[1], total[0]))
    around = np.linspace(0, 2 * np.pi, 200)
    left.plot(np.cos(around), np.sin(around), color="0.6", linewidth=1, linestyle=":")
    for start, end, shade, text, at in (
        ((0, 0), (1, 0), COLOURS["clean"], "v", (0.5, -0.04)),
        ((1, 0), total, COLOURS["random"], "θ", (1 + (total[0] - 1) / 2, total[1] / 2)),
    ):
        left.annotate(
            "",
            end,
            start,
            arrowprops={
                "arrowstyle": "-|>",
                "color": shade,
                "linewidth": 2,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
        left.annotate(
            text,
            at,
            xytext=(4, -13) if text == "v" else (7, -4),
            textcoords="offset points",
            color=shade,
            fontsize=12,
        )
    left.plot([0, total[0]], [0, total[1]], color=COLOURS["learned"], linewidth=1.2, linestyle="--")
    left.plot(*(total / np.linalg.norm(total)), "o", color=COLOURS["learned"], markersize=9)
    arc = np.radians(np.linspace(0, turned, 50))
    left.plot(0.35 * np.cos(arc), 0.35 * np.sin(arc), color=COLOURS["learned"])
    left.annotate(
        f"{turned:.1f}°",
        (0.4 * np.cos(arc[-1]), 0.4 * np.sin(arc[-1])),
        xytext=(-4, 6),
        textcoords="offset points",
        ha="right",
        color=COLOURS["learned"],
        fontsize=11,
    )
    left.set_aspect("equal")
    left.set_xlim(-0.35, max(1.45, total[0] + 0.3))
    left.set_ylim(-0.35, max(1.25, total[1] + 0.2))
    finish(
        left,
        f"ρ = ‖θ‖ / ‖v‖ = {ratio:.2f}",
        "along v (lengths of v)",
        "at right angles",
        legend=False,
    )
    angles = np.asarray(angles, float).ravel()
    right.hist(
        angles[~np.isnan(angles)],
        bins=np.linspace(0, upto, 46),
        color=COLOURS["random"],
        alpha=0.75,
    )
    right.axvline(turned, color=COLOURS["learned"], linewidth=1.8)
    side = 1 if turned < upto / 2 else -1
    right.annotate(
        f"drawn: {turned:.1f}°",
        (turned, 0.93),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        xytext=(6 * side, 0),
        ha="left" if side > 0 else "right",
        color=COLOURS["learned"],
    )
    right.set_xlim(0, upto)
    finish(
        right,
        "measured after the norm",
        "degrees that a token turns",
        "pairs of token and random θ",
        legend=False,
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5)
    return figure
