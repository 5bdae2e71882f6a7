"""What all figures and panels share: colours, style, axes, `show`, numbers, words, tables."""

import io
from functools import cache
from numbers import Integral, Real

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from IPython.display import HTML, Image, display
from matplotlib import font_manager

from ..ledger import html_table

# Okabe-Ito colours, told apart by the colour-blind; one meaning each throughout the workbook
COLOURS = {"learned": "#D55E00", "random": "#0072B2", "clean": "#000000"}
OTHERS = ["#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F"]
FONT = "font:14px/1.4 system-ui,sans-serif;color:var(--jp-content-font-color1, #1a1a1a)"
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

plt.rc("font", size=11)  # the whole workbook looks alike
plt.rc("axes", titlesize=12.5, titlelocation="left", grid=True)
plt.rc("axes.spines", top=False, right=False)
plt.rc("grid", alpha=0.25)
plt.rc("legend", frameon=False, fontsize=10)
plt.rc("figure.constrained_layout", use=True)


def colour(label, i=0):
    """The colour that belongs to a label's first word, else the i-th of the others."""
    return COLOURS.get(str(label).split()[0].lower().strip(","), OTHERS[i % len(OTHERS)])


def panels(n=1, width=7.2, height=3.6, **options):
    """A figure and its n axes side by side."""
    figure, axes = plt.subplots(1, n, figsize=(width, height), squeeze=False, **options)
    return figure, axes[0]


def one_panel(ax=None, **size):
    """`ax`, or the axes of a new figure of that size."""
    return panels(**size)[1][0] if ax is None else ax


def drawn(figure, dpi) -> io.BytesIO:
    """A figure as PNG, and closed."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    plt.close(figure)
    return file


def show(figure, alt):
    """Display a figure once as PNG with its alt text, and close it."""
    small = io.BytesIO()  # 128 colours take a third of the bytes
    PIL.Image.open(drawn(figure, 130)).convert("RGB").quantize(128).save(
        small, "png", optimize=True
    )
    display(Image(small.getvalue(), alt=alt, width=int(figure.get_figwidth() * 96)))


def finish(ax, title, xlabel, ylabel, legend=True):
    """Title, axes' names and, where something has a label, the legend. Returns the figure."""
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best")
    return ax.figure


def headline(figure, title):
    """The title above all panels. A model's dollar signs are no mathematics."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, parse_math=False)


def note(ax, text, at, offset, **style):
    """A text `offset` points away from the place `at`."""
    ax.annotate(text, at, xytext=offset, textcoords="offset points", **{"fontsize": 9.5, **style})


@cache
def _glyphs() -> frozenset:
    """What the figures' font can draw."""
    return frozenset(
        font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    )


def drawable(text) -> str:
    """The text without what the font lacks: a model may answer with an emoji, whole or in part."""
    shown = (
        letter
        for letter in text
        if ord(letter) in _glyphs() and letter != "\N{REPLACEMENT CHARACTER}"
    )
    return "".join(shown) or "(no words)"


# -- HTML ------------------------------------------------------------------------------------------
def number(value, unit="") -> str:
    """A value with 3 digits, as every panel and figure writes it."""
    if value is None or value != value:
        return "–"
    if abs(value) >= 1e5:
        mantissa, power = f"{value:.1e}".split("e")
        text = f"{mantissa}·10{str(int(power)).translate(SUPERSCRIPT)}"
    elif abs(value) >= 1000:
        text = f"{float(f'{value:.3g}'):,.0f}"
    else:
        text = f"{value:.3g}" if abs(value) >= 1e-4 else "0"
    return f"{text} {unit}" if unit else text


def shorten(text, n) -> str:
    """One line of at most n characters, cut at a word; a first word longer than that is cut."""
    text = " ".join(text.split())
    return text if len(text) <= n else text[: n - 1].rsplit(" ", 1)[0] + " …"


def cell(value, n=220) -> str:
    """A value as a table shows it: yes or no, a number, "–" for none, a text on one line."""
    if hasattr(value, "_repr_html_"):  # HTML already
        return value
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if value is None or (isinstance(value, Real) and not isinstance(value, Integral)):
        return number(value)
    return shorten(str(value), n) or "(nothing)"


def text_table(rows, columns, n=220) -> HTML:
    """A table, everything escaped (a completion of `<script>` is shown, not run), cut at n."""
    return HTML(html_table(columns, rows, lambda value: cell(value, n)))


def block(inner, style="") -> str:
    """HTML in the panels' font."""
    return f'<div style="{FONT};{style}">{inner}</div>'
