"""What all figures share: colours, style, panels, and `show`."""

import io

import matplotlib.pyplot as plt
import PIL.Image
from IPython.display import Image, display

# Okabe-Ito colours, told apart by the colour-blind; one meaning each throughout the workbook
COLOURS = {"learned": "#D55E00", "random": "#0072B2", "clean": "#000000"}
OTHERS = ["#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F"]
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.constrained_layout.use": True,
}
plt.rcParams.update(STYLE)  # the whole workbook looks alike


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


def show(figure, alt):
    """Display a figure once as PNG with its alt text, and close it."""
    drawn, small = io.BytesIO(), io.BytesIO()  # 128 colours take a third of the bytes
    figure.savefig(drawn, format="png", dpi=130)
    plt.close(figure)
    PIL.Image.open(drawn).convert("RGB").quantize(128).save(small, "png", optimize=True)
    display(Image(small.getvalue(), alt=alt, width=int(figure.get_figwidth() * 96)))


def finish(ax, title, xlabel, ylabel, legend=True):
    """Title, axes' names and, where something has a label, the legend. Returns the figure."""
    ax.set_title(title)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best")
    return ax.figure


def headline(figure, title):
    """The title above all panels. A model's dollar signs are no mathematics."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, parse_math=False)


def note(ax, text, at, offset, **style):
    """A text `offset` points away from the place `at`."""
    ax.annotate(text, at, xytext=offset, textcoords="offset points", **{"fontsize": 9.5, **style})
