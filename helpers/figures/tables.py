"""Numbers, words and tables, as every figure and panel writes them."""

from numbers import Integral, Real

import numpy as np
from IPython.display import HTML

from ..ledger import html_table

INK = "var(--jp-content-font-color1, #1a1a1a)"
FONT = f"font:14px/1.4 system-ui,sans-serif;color:{INK}"
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


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
