"""Figures and small tables of the workbook: pure functions that return a matplotlib figure or HTML, and `show`."""
import html
import io

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, Image, display

# Okabe-Ito colours, told apart by the colour-blind; one meaning each throughout the workbook
COLOURS = {"learned": "#D55E00", "random": "#0072B2", "clean": "#000000", "other": "#009E73", "fourth": "#CC79A7", "fifth": "#E69F00"}
STYLE = {"font.size": 11, "axes.titlesize": 12.5, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "figure.constrained_layout.use": True}
plt.rcParams.update(STYLE)  # the whole workbook looks alike


def colour(label, i=0):
    """The colour that belongs to a label's first word, else the i-th of the palette."""
    return COLOURS.get(str(label).split()[0].lower().strip(","), list(COLOURS.values())[(i + 3) % len(COLOURS)])


def panels(n=1, width=7.2, height=3.6, **options):
    """A figure and its n axes side by side."""
    figure, axes = plt.subplots(1, n, figsize=(width, height), squeeze=False, **options)
    return figure, axes[0]


def show(figure, alt):
    """Display a figure once as PNG with its alt text, and close it."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    plt.close(figure)
    display(Image(picture.getvalue(), alt=alt, width=int(figure.get_figwidth() * 96)))


def _finish(ax, title, xlabel, ylabel, legend=True):
    ax.set_title(title)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best", fontsize=10)
    return ax


def lines(series, title, xlabel, ylabel, log=False, logx=False, ax=None, marks=()):
    """`series`: {label: (x [n], y [n] or [n, k])}; a matrix shows its median and the range from its lowest to its highest.

    `marks`: (value, label) pairs, drawn as dashed horizontal lines.
    """
    figure, ax = (ax.figure, ax) if ax is not None else (lambda f, a: (f, a[0]))(*panels())
    for i, (label, (x, y)) in enumerate(series.items()):
        x, y = np.asarray(x, float), np.asarray(y, float)
        if y.ndim == 2:
            ax.fill_between(x, y.min(1), y.max(1), color=colour(label, i), alpha=0.18, linewidth=0)
            y = np.median(y, 1)
        ax.plot(x, y, color=colour(label, i), label=label, marker="o" if len(x) < 30 else None, markersize=3.5, linewidth=1.8)
    for at, label in marks:
        ax.axhline(at, color="0.35", linestyle="--", linewidth=1)
        ax.annotate(label, (1, at), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=9.5, color="0.25")
    if log:
        ax.set_yscale("log")
    if logx:
        ax.set_xscale("log")
    _finish(ax, title, xlabel, ylabel)
    return figure


def strips(groups, title, ylabel, ax=None, marks=(), log=False, seed=0):
    """`groups`: {label: values}, one dot per value, side by side, with the median as a bar."""
    figure, ax = (ax.figure, ax) if ax is not None else (lambda f, a: (f, a[0]))(*panels())
    jitter = np.random.default_rng(seed)
    for i, (label, values) in enumerate(groups.items()):
        values = np.asarray(values, float).ravel()
        ax.scatter(i + jitter.uniform(-0.16, 0.16, len(values)), values, s=22, alpha=0.65, color=colour(label, i), linewidths=0)
        ax.plot([i - 0.28, i + 0.28], [np.median(values)] * 2, color=colour(label, i), linewidth=2.5)
    for at, label in marks:
        ax.axhline(at, color="0.35", linestyle="--", linewidth=1)
        ax.annotate(label, (1, at), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=9.5, color="0.25")
    ax.set_xticks(range(len(groups)), list(groups))
    ax.set_xlim(-0.6, len(groups) - 0.4)
    if log:
        ax.set_yscale("log")
    _finish(ax, title, "", ylabel, legend=False)
    return figure


def heatmaps(matrices, title, label, limit=1.0):
    """`matrices`: {name: [n, n]} with one diverging colour scale from −limit to limit."""
    figure, axes = panels(len(matrices), width=3.7 * len(matrices) + 0.8, height=3.7)
    for ax, (name, matrix) in zip(axes, matrices.items()):
        image = ax.imshow(np.asarray(matrix, float), vmin=-limit, vmax=limit, cmap="PuOr_r")
        ax.grid(False)
        _finish(ax, name, "vector", "vector", legend=False)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=list(axes), shrink=0.85, label=label)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5)
    return figure


def bars(values, title, xlabel, log=False, formatted="{:,.3g}"):
    """Horizontal bars {label: value}, each with its number."""
    figure, (ax,) = panels(height=0.45 * len(values) + 1.3)
    names = list(values)
    ax.barh(range(len(names)), [values[k] for k in names], color=[colour(k, i) for i, k in enumerate(names)], height=0.62)
    for i, k in enumerate(names):
        ax.annotate(formatted.format(values[k]), (values[k], i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=10)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.14)
    if log:
        ax.set_xscale("log")
    _finish(ax, title, xlabel, "", legend=False)
    return figure


def said(rows, title, xlabel):
    """What each vector does and what the model then says: `rows` of (group, size of the change, text), one bar each."""
    figure, (ax,) = panels(width=9.2, height=0.36 * len(rows) + 1.25)
    top = max(size for _, size, _ in rows)
    for i, (group, size, text) in enumerate(rows):
        ax.barh(i, size, color=colour(group, i), height=0.7, label=group if group not in [r[0] for r in rows[:i]] else None)
        ax.annotate(shorten(text, 62), (size, i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9.5)
    ax.set_xlim(0, 2.6 * top)
    ax.set_yticks([])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    _finish(ax, title, xlabel, "", legend=False)
    ax.legend(loc="upper right", fontsize=10)
    return figure


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
    _finish(ax, title, "θ₁", "θ₂", legend=False)
    ax.legend(loc="upper left", fontsize=9.5, frameon=True)
    return figure


# ---------------------------------------------------------------------------------------------- text
def shorten(text, n) -> str:
    """One line of at most n characters, cut at a word, dollar signs kept from becoming mathematics."""
    text = " ".join(text.split())
    text = text if len(text) <= n else text[:n].rsplit(" ", 1)[0] + " …"
    return text.replace("$", r"\$")


def text_table(rows, columns, n=220):
    """An HTML table of texts, everything escaped (a completion of `<script>` is shown, not run); longer texts are cut at n."""
    def cell(value):
        text = f"{value:,.3g}" if isinstance(value, float) else str(value)
        text = " ".join(text.split()) if len(text) <= n else " ".join(text[:n].split()) + " …"
        return html.escape(text) or "<i>(nothing)</i>"
    head = "".join(f'<th style="text-align:left">{html.escape(c)}</th>' for c in columns)
    body = "".join("<tr>" + "".join(f'<td style="text-align:left;vertical-align:top">{cell(v)}</td>' for v in row) + "</tr>" for row in rows)
    return HTML(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
