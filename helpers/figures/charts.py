"""Figures and small tables of the workbook: pure functions that return a matplotlib figure or HTML, and `show`."""

import html

import numpy as np
from IPython.display import HTML

from .canvas import COLOURS, OTHERS, colour, finish, panels, show  # noqa: F401 (a notebook finds all of them here)
from .sketches import circle_toy, clouds, push_picture  # noqa: F401


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
        ax.plot(
            x,
            y,
            color=colour(label, i),
            label=label,
            marker="o" if len(x) < 30 else None,
            markersize=3.5,
            linewidth=1.8,
        )
    for at, label in marks:
        ax.axhline(at, color="0.35", linestyle="--", linewidth=1)
        ax.annotate(
            label,
            (1, at),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=9.5,
            color="0.25",
        )
    if log:
        ax.set_yscale("log")
    if logx:
        ax.set_xscale("log")
    elif all(float(v).is_integer() for x, _ in series.values() for v in x):
        ax.xaxis.get_major_locator().set_params(integer=True)  # there is no block 7.5
    finish(ax, title, xlabel, ylabel)
    return figure


def strips(groups, title, ylabel, ax=None, marks=(), log=False, seed=0):
    """`groups`: {label: values}, one dot per value, side by side, with the median as a bar."""
    figure, ax = (ax.figure, ax) if ax is not None else (lambda f, a: (f, a[0]))(*panels())
    jitter = np.random.default_rng(seed)
    for i, (label, values) in enumerate(groups.items()):
        values = np.asarray(values, float).ravel()
        ax.scatter(
            i + jitter.uniform(-0.16, 0.16, len(values)),
            values,
            s=22,
            alpha=0.65,
            color=colour(label, i),
            linewidths=0,
        )
        ax.plot(
            [i - 0.28, i + 0.28], [np.median(values)] * 2, color=colour(label, i), linewidth=2.5
        )
    for at, label in marks:
        ax.axhline(at, color="0.35", linestyle="--", linewidth=1)
        ax.annotate(
            label,
            (1, at),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=9.5,
            color="0.25",
        )
    ax.set_xticks(range(len(groups)), list(groups))
    ax.set_xlim(-0.6, len(groups) - 0.4)
    if log:
        ax.set_yscale("log")
    finish(ax, title, "", ylabel, legend=False)
    return figure


def points(groups, title, xlabel, ylabel, logx=False):
    """`groups`: {label: (x, y)}, one dot each."""
    figure, (ax,) = panels()
    for i, (label, (x, y)) in enumerate(groups.items()):
        ax.scatter(x, y, s=22, alpha=0.65, linewidths=0, color=colour(label, i), label=label)
    if logx:
        ax.set_xscale("log")
    finish(ax, title, xlabel, ylabel)
    return figure


def heatmaps(matrices, title, label, limit=1.0):
    """`matrices`: {name: [n, n]} with one diverging colour scale from −limit to limit."""
    figure, axes = panels(len(matrices), width=3.7 * len(matrices) + 0.8, height=3.7)
    for ax, (name, matrix) in zip(axes, matrices.items()):
        image = ax.imshow(np.asarray(matrix, float), vmin=-limit, vmax=limit, cmap="PuOr_r")
        ax.grid(False)
        finish(ax, name, "vector", "vector", legend=False)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=list(axes), shrink=0.85, label=label)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5)
    return figure


def bars(values, title, xlabel, log=False, formatted="{:,.3g}"):
    """Horizontal bars {label: value}, each with its number."""
    figure, (ax,) = panels(height=0.45 * len(values) + 1.3)
    names = list(values)
    ax.barh(
        range(len(names)),
        [values[k] for k in names],
        color=[colour(k, i) for i, k in enumerate(names)],
        height=0.62,
    )
    for i, k in enumerate(names):
        ax.annotate(
            formatted.format(values[k]),
            (values[k], i),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
        )
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.14)
    if log:
        ax.set_xscale("log")
    finish(ax, title, xlabel, "", legend=False)
    return figure


def said(rows, title, xlabel):
    """What each vector does and what the model then says: `rows` of (group, size of the change, text), one bar each."""
    figure, (ax,) = panels(width=9.2, height=0.36 * len(rows) + 1.25)
    top = max(size for _, size, _ in rows)
    for i, (group, size, text) in enumerate(rows):
        ax.barh(
            i,
            size,
            color=colour(group, i),
            height=0.7,
            label=group if group not in [r[0] for r in rows[:i]] else None,
        )
        ax.annotate(
            shorten(text, 62),
            (size, i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
        )
    ax.set_xlim(0, 2.6 * top)
    ax.set_yticks([])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    finish(ax, title, xlabel, "", legend=False)
    ax.legend(loc="upper right", fontsize=10)
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
    body = "".join(
        "<tr>"
        + "".join(f'<td style="text-align:left;vertical-align:top">{cell(v)}</td>' for v in row)
        + "</tr>"
        for row in rows
    )
    return HTML(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def grid(
    matrix, rows, columns, title, xlabel, ylabel, label, formatted="{:.0f}", limits=None, ax=None
):
    """A heat map [n_rows, n_columns] with its number in each cell (NaN: none). The colour scale is logarithmic, so values must be
    above 0; or, with `limits` (low, high), linear and diverging from their middle."""
    from matplotlib.colors import LogNorm, Normalize

    matrix = np.asarray(matrix, float)
    if ax is None:
        _, (ax,) = panels(width=max(5.0, 0.31 * len(columns) + 1.6), height=0.42 * len(rows) + 1.6)
    low, high = limits or (np.nanmin(matrix), np.nanmax(matrix))
    image = ax.imshow(
        matrix,
        norm=(Normalize if limits else LogNorm)(low, high),
        cmap="PuOr_r" if limits else "cividis",
        aspect="auto",
    )
    for i, j in np.argwhere(~np.isnan(matrix)):
        dark = (
            abs(matrix[i, j] - (low + high) / 2) > 0.35 * (high - low)
            if limits
            else matrix[i, j] < np.sqrt(low * high)
        )
        ax.text(
            j,
            i,
            formatted.format(matrix[i, j]),
            ha="center",
            va="center",
            fontsize=7.5 if not limits else 9,
            color="w" if dark else "k",
        )
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
    finish(ax, title, xlabel, ylabel, legend=False)
    return ax.figure


# ---------------------------------------------------------------------------------------------- rates by radius (notebook 03)
def curves(series, title, xlabel, ylabel, ax=None, shade=None, ylim=None, marks=(), legend=True):
    """`series`: {label: (x, y, low, high)} with intervals as error bars, on a logarithmic x axis whose ticks are the x themselves.

    `shade`: (from, to) on x, drawn as a band; `marks`: (x, label) pairs, drawn as dashed vertical lines.
    """
    figure, ax = (ax.figure, ax) if ax is not None else (lambda f, a: (f, a[0]))(*panels())
    ticks = sorted({float(v) for x, *_ in series.values() for v in x})
    if shade:
        ax.axvspan(
            shade[0] / 1.12, shade[1] * 1.12, color="#F0E442", alpha=0.3, linewidth=0, label="range"
        )
    for i, (label, (x, y, low, high)) in enumerate(series.items()):
        x = np.asarray(x, float) * 1.02 ** (
            i - (len(series) - 1) / 2
        )  # side by side, not on top of each other
        y, low, high = (np.asarray(v, float) for v in (y, low, high))
        ax.errorbar(
            x,
            y,
            np.maximum([y - low, high - y], 0),
            color=colour(label, i),
            label=label,
            marker="o",
            markersize=4,
            linewidth=1.8,
            elinewidth=1.1,
            capsize=2,
        )
    for at, label in marks:
        ax.axvline(at, color="0.35", linestyle="--", linewidth=1)
        ax.annotate(
            label,
            (at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -11),
            textcoords="offset points",
            fontsize=9.5,
        )
    ax.set_xscale("log")
    ax.set_xticks(
        ticks,
        [f"{t:g}" for t in ticks],
        fontsize=8.5 if figure.get_figwidth() / len(figure.axes) < 4 else None,
    )
    ax.minorticks_off()
    if ylim:
        ax.set_ylim(*ylim)
    finish(ax, title, xlabel, ylabel, legend)
    return figure


# ---------------------------------------------------------------------------------------------- choices (notebook 02b)
def versus(groups, title, xlabels, interval, log=True):
    """Options as rows, one panel per measure: `groups` {option: {label: values [n, n_measures]}}, one dot per value, the median
    as a bar, and `interval(values)` → (low, high) as a line below the dots."""
    from matplotlib.ticker import LogLocator

    figure, axes = panels(len(xlabels), width=9.4, height=0.55 * len(groups) + 1.5, sharey=True)
    for (j, ax), (row, (option, sets)) in (
        (a, b) for a in enumerate(axes) for b in enumerate(groups.items())
    ):
        for i, (label, values) in enumerate(sets.items()):
            x, y = np.asarray(values, float)[:, j], row + 0.4 * (i - (len(sets) - 1) / 2)
            new = label not in ax.get_legend_handles_labels()[1]
            ax.scatter(
                x,
                np.full(len(x), y),
                s=18,
                alpha=0.5,
                linewidths=0,
                color=colour(label, i),
                label=label if new else None,
            )
            ax.plot([np.median(x)] * 2, [y - 0.17, y + 0.17], color=colour(label, i), linewidth=2.5)
            ax.plot(interval(x), [y + 0.17] * 2, color=colour(label, i), linewidth=1.2)
    for ax, label in zip(axes, xlabels):
        ax.set_yticks(range(len(groups)), list(groups))
        if log:
            ax.set_xscale("log")
            ax.minorticks_off()
            if np.divide(*ax.get_xlim()[::-1]) < 100:  # decades alone would be one or two ticks
                ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(axis="y", visible=False)
        finish(ax, "", label, "", legend=False)
    axes[0].set_ylim(len(groups) - 0.4, -0.6)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=10
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5)
    return figure


# ---------------------------------------------------------------------------------------------- kinds of answers (notebook 04)
def stacked(counts, title, xlabel):
    """`counts`: a DataFrame of counts, one horizontal bar per row, one colour per column, each with its number."""
    shades = ["#009E73", "#56B4E9", "#E69F00", "#BBBBBB", "#4D4D4D", "#CC79A7", "#D55E00"]
    figure, (ax,) = panels(width=8.4, height=0.5 * len(counts) + 1.7)
    left = np.zeros(len(counts))
    for i, kind in enumerate(counts.columns):
        values = counts[kind].to_numpy(float)
        ax.barh(
            range(len(counts)),
            values,
            left=left,
            color=shades[i % len(shades)],
            height=0.62,
            label=str(kind),
        )
        for row, value in enumerate(values):
            if value > 0.03 * counts.to_numpy().sum(1).max():
                ax.text(
                    left[row] + value / 2,
                    row,
                    f"{value:g}",
                    ha="center",
                    va="center",
                    fontsize=9.5,
                    color="w" if i == 4 else "k",
                )
        left += values
    ax.set_yticks(range(len(counts)), list(counts.index))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    finish(ax, title, xlabel, "", legend=False)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=10)
    return figure


# ---------------------------------------------------------------------------------------------- rates with intervals (notebook 05)
def rates(groups, title, xlabel):
    """Conditions as rows: `groups` {condition: {label: (share, low, high)}}, a dot and its interval per label, on 0 … 1."""
    figure, (ax,) = panels(height=0.5 * len(groups) + 1.5)
    labels = list(next(iter(groups.values())))
    for i, label in enumerate(labels):
        share, low, high = np.array([row[label] for row in groups.values()], float).T
        y = np.arange(len(groups)) + 0.24 * (i - (len(labels) - 1) / 2)
        ax.errorbar(
            share,
            y,
            xerr=np.maximum([share - low, high - share], 0),
            color=colour(label, i),
            label=label,
            fmt="os^D"[i % 4],
            markersize=6,
            elinewidth=1.5,
            capsize=2.5,
        )
    ax.set_yticks(range(len(groups)), list(groups))
    ax.invert_yaxis()
    ax.set_xlim(-0.03, 1.03)
    ax.grid(axis="y", visible=False)
    finish(ax, title, xlabel, "", legend=False)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=10)
    return figure
