"""The pictures of the workbook: functions that take numbers and return a matplotlib figure."""

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import LogLocator

from .canvas import (
    COLOURS,
    OTHERS,
    colour,
    drawable,
    finish,
    headline,
    note,
    one_panel,
    panels,
    shorten,
)

DOTS = {"s": 22, "alpha": 0.65, "linewidths": 0}


def lines(series, title, xlabel, ylabel, log=False, logx=False, ax=None, marks=()):
    """`series`: {label: (x [n], y [n] or [n, k])}; k > 1: median, range. `marks`: (y, label)."""
    ax = one_panel(ax)
    for i, (label, (x, y)) in enumerate(series.items()):
        x, y = np.asarray(x, float), np.asarray(y, float)
        shade = colour(label, i)
        if y.ndim == 2:
            ax.fill_between(x, y.min(1), y.max(1), color=shade, alpha=0.18, linewidth=0)
            y = np.median(y, 1)
        dot = "o" if len(x) < 30 else None
        ax.plot(x, y, color=shade, label=label, marker=dot, markersize=3.5, linewidth=1.8)
    _dashed(ax, marks)
    ax.set_yscale("log" if log else "linear")
    if logx:
        ax.set_xscale("log")
    elif all(float(v).is_integer() for x, _ in series.values() for v in x):
        ax.xaxis.get_major_locator().set_params(integer=True)  # there is no block 7.5
    return finish(ax, title, xlabel, ylabel)


def strips(groups, title, ylabel, ax=None, marks=(), log=False):
    """`groups`: {label: values}, one dot per value, side by side, with the median as a bar."""
    ax = one_panel(ax)
    jitter = np.random.default_rng(0)
    for i, (label, values) in enumerate(groups.items()):
        values, shade = np.asarray(values, float).ravel(), colour(label, i)
        aside = i + jitter.uniform(-0.16, 0.16, len(values))
        ax.scatter(aside, values, color=shade, **DOTS)
        ax.plot([i - 0.28, i + 0.28], [np.median(values)] * 2, color=shade, linewidth=2.5)
    _dashed(ax, marks)
    ax.set_xticks(range(len(groups)), list(groups))
    ax.set_xlim(-0.6, len(groups) - 0.4)
    ax.set_yscale("log" if log else "linear")
    return finish(ax, title, "", ylabel, legend=False)


def points(groups, title, xlabel, ylabel, logx=False):
    """`groups`: {label: (x, y)}, one dot each."""
    ax = one_panel()
    for i, (label, (x, y)) in enumerate(groups.items()):
        ax.scatter(x, y, color=colour(label, i), label=label, **DOTS)
    ax.set_xscale("log" if logx else "linear")
    return finish(ax, title, xlabel, ylabel)


def bars(values, title, xlabel, formatted, log=False):
    """Horizontal bars {label: value}, each with its number."""
    ax = one_panel(height=0.45 * len(values) + 1.3)
    for i, (label, value) in enumerate(values.items()):
        ax.barh(i, value, color=colour(label, i), height=0.62)
        note(ax, formatted.format(value), (value, i), (4, 0), va="center", fontsize=10)
    _name_rows(ax, values)
    ax.margins(x=0.14)
    ax.set_xscale("log" if log else "linear")
    return finish(ax, title, xlabel, "", legend=False)


def said(rows, title, xlabel):
    """What vectors do and the model then says, one bar each: (group, size of the change, text)."""
    ax = one_panel(width=9.2, height=0.36 * len(rows) + 1.25)
    drawn = {}
    for i, (group, size, text) in enumerate(rows):
        drawn[group] = ax.barh(i, size, color=colour(group, i), height=0.7)
        note(ax, drawable(shorten(text, 62)), (size, i), (5, 0), va="center", parse_math=False)
    _name_rows(ax, [""] * len(rows))
    ax.set_yticks([])
    ax.set_xlim(0, 2.6 * max(size for _, size, _ in rows))
    ax.legend(drawn.values(), drawn, loc="upper right")
    return finish(ax, title, xlabel, "", legend=False)


# -- heat maps -------------------------------------------------------------------------------------
def heatmaps(matrices, title, label, limit=1.0):
    """`matrices`: {name: [n, n]} with one diverging colour scale from −limit to limit."""
    figure, axes = panels(len(matrices), width=3.7 * len(matrices) + 0.8, height=3.7)
    for ax, (name, matrix) in zip(axes, matrices.items()):
        image = ax.imshow(np.asarray(matrix, float), vmin=-limit, vmax=limit, cmap="PuOr_r")
        ax.grid(False)
        finish(ax, name, "vector", "vector", legend=False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=list(axes), shrink=0.85, label=label)
    headline(figure, title)
    return figure


def grid(
    matrix, rows, columns, title, xlabel, ylabel, label, formatted="{:.0f}", limits=None, ax=None
):
    """A heat map [n_rows, n_columns] with numbers (NaN: none). Colours are logarithmic (values over
    0), or diverge from the middle of `limits` (low, high). `label`: of the colour bar, if any."""
    matrix = np.asarray(matrix, float)
    size = {"width": max(5.0, 0.31 * len(columns) + 1.6), "height": 0.42 * len(rows) + 1.6}
    ax = one_panel(ax, **size)
    low, high = limits or (np.nanmin(matrix), np.nanmax(matrix))
    if limits:
        scale, shades, fontsize = Normalize(low, high), "PuOr_r", 9
        dark = np.abs(matrix - (low + high) / 2) > 0.35 * (high - low)
    else:
        scale, shades, fontsize = LogNorm(low, high), "cividis", 7.5
        dark = matrix < np.sqrt(low * high)
    image = ax.imshow(matrix, norm=scale, cmap=shades, aspect="auto")
    for i, j in np.argwhere(~np.isnan(matrix)):
        style = {"fontsize": fontsize, "color": "w" if dark[i, j] else "k"}
        ax.text(j, i, formatted.format(matrix[i, j]), ha="center", va="center", **style)
    step = 1 + len(columns) // 16
    ax.set_xticks(range(0, len(columns), step), list(columns)[::step])
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(False)
    if label:
        bar = ax.figure.colorbar(image, ax=ax, label=label, shrink=0.95, pad=0.015)
        bar.ax.minorticks_off()
        if not limits:
            bar.set_ticks([v for v in (0.5, 1, 2, 5, 10, 20, 45, 90) if low <= v <= high])
            bar.ax.yaxis.set_major_formatter("{x:g}")
    return finish(ax, title, xlabel, ylabel, legend=False)


# -- rates and counts ------------------------------------------------------------------------------
def curves(series, title, xlabel, ylabel, ax=None, shade=None, ylim=None, marks=(), legend=True):
    """`series`: {label: (x, y, low, high)} with intervals as error bars, on a logarithmic x axis
    whose ticks are the x themselves. `shade`: (from, to) on x; `marks`: (x, label) pairs."""
    ax = one_panel(ax)
    if shade:
        band = {"color": "#F0E442", "alpha": 0.3, "linewidth": 0, "label": "range"}
        ax.axvspan(shade[0] / 1.12, shade[1] * 1.12, **band)
    style = {"marker": "o", "markersize": 4, "linewidth": 1.8, "elinewidth": 1.1, "capsize": 2}
    for i, (label, (x, y, low, high)) in enumerate(series.items()):
        aside = 1.02 ** (i - (len(series) - 1) / 2)  # side by side, not on top of each other
        x, y, low, high = (np.asarray(v, float) for v in (x, y, low, high))
        reach = np.maximum([y - low, high - y], 0)  # a share of 0 or 1 can miss it by rounding
        ax.errorbar(x * aside, y, reach, color=colour(label, i), label=label, **style)
    for at, label in marks:
        ax.axvline(at, color="0.35", linestyle="--", linewidth=1)
        note(ax, label, (at, 1), (3, -11), xycoords=("data", "axes fraction"))
    ticks = sorted({float(v) for x, *_ in series.values() for v in x})
    narrow = ax.figure.get_figwidth() / len(ax.figure.axes) < 4
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=8.5 if narrow else None)
    ax.minorticks_off()
    if ylim:
        ax.set_ylim(*ylim)
    return finish(ax, title, xlabel, ylabel, legend)


def rates(groups, title, xlabel):
    """Conditions as rows: `groups` {condition: {label: (share, low, high)}}, shares of 0 … 1."""
    ax = one_panel(height=0.5 * len(groups) + 1.5)
    labels = list(next(iter(groups.values())))
    for i, label in enumerate(labels):
        share, low, high = np.array([row[label] for row in groups.values()], float).T
        y = np.arange(len(groups)) + 0.24 * (i - (len(labels) - 1) / 2)
        style = {"fmt": "os^D"[i % 4], "markersize": 6, "elinewidth": 1.5, "capsize": 2.5}
        reach = np.maximum([share - low, high - share], 0)
        ax.errorbar(share, y, xerr=reach, color=colour(label, i), label=label, **style)
    _name_rows(ax, groups)
    ax.set_xlim(-0.03, 1.03)
    _legend_below(ax, 4)
    return finish(ax, title, xlabel, "", legend=False)


def versus(groups, title, xlabels, interval):
    """Options as rows, one panel per measure: `groups` {option: {label: values [n, n_measures]}},
    one dot per value, the median as a bar, and `interval(values)` → (low, high) as a line below."""
    figure, axes = panels(len(xlabels), width=9.4, height=0.55 * len(groups) + 1.5, sharey=True)
    for j, (ax, xlabel) in enumerate(zip(axes, xlabels)):
        for row, sets in enumerate(groups.values()):
            for i, (label, values) in enumerate(sets.items()):
                x = np.asarray(values, float)[:, j]
                _dots(ax, x, row + 0.4 * (i - (len(sets) - 1) / 2), label, i, interval(x))
        ax.set_xscale("log")
        ax.minorticks_off()
        low, high = ax.get_xlim()
        if high / low < 100:  # decades alone would be one or two ticks
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter("{x:g}")
        finish(ax, "", xlabel, "", legend=False)
        ax.grid(axis="y", visible=False)
    _name_rows(axes[0], groups)
    _legend_below(axes[0], 4)
    headline(figure, title)
    return figure


def _dots(ax, x, y, label, i, reach):
    """One set of `versus`: its values at height y, their median, and below them the interval."""
    shade, known = colour(label, i), ax.get_legend_handles_labels()[1]
    new = None if label in known else label
    ax.scatter(x, np.full(len(x), y), s=18, alpha=0.5, linewidths=0, color=shade, label=new)
    ax.plot([np.median(x)] * 2, [y - 0.17, y + 0.17], color=shade, linewidth=2.5)
    ax.plot(reach, [y + 0.17] * 2, color=shade, linewidth=1.2)


def stacked(counts, title, xlabel):
    """`counts`: a DataFrame, one horizontal bar per row, one colour per column, each numbered."""
    green, purple, orange, sky, _ = OTHERS
    shades = [green, sky, orange, "#BBBBBB", "#4D4D4D", purple, COLOURS["learned"]]
    ax = one_panel(width=8.4, height=0.5 * len(counts) + 1.7)
    left = np.zeros(len(counts))
    readable = 0.03 * counts.to_numpy().sum(1).max()  # a part that holds its number
    for i, kind in enumerate(counts.columns):
        values, shade = counts[kind].to_numpy(float), shades[i % len(shades)]
        style = {"left": left, "color": shade, "height": 0.62, "label": str(kind)}
        parts = ax.barh(range(len(counts)), values, **style)
        numbers = [f"{value:g}" if value > readable else "" for value in values]
        ink = "w" if shade == "#4D4D4D" else "k"
        ax.bar_label(parts, numbers, label_type="center", color=ink, fontsize=9.5)
        left = left + values
    _name_rows(ax, counts.index)
    _legend_below(ax, 5)
    return finish(ax, title, xlabel, "", legend=False)


# -- what several of them have --------------------------------------------------------------------
def _legend_below(ax, ncols):
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=ncols)


def _name_rows(ax, names):
    """One named row per entry, the first at the top."""
    ax.set_yticks(range(len(names)), list(names))
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def _dashed(ax, marks):
    """`marks`: (y, label) pairs, drawn as dashed horizontal lines."""
    for y, label in marks:
        ax.axhline(y, color="0.35", linestyle="--", linewidth=1)
        place = {"xycoords": ("axes fraction", "data"), "ha": "right"}
        note(ax, label, (1, y), (-2, 3), color="0.25", **place)
