"""The science that a notebook keeps to itself, for tests: its cells with a tag, executed."""

import ast
from types import SimpleNamespace

from helpers import ROOT
from helpers.workbook import notebooks


def lesson(name, tag="lesson") -> SimpleNamespace:
    """What the tagged cells of a notebook define, beside what its cells import."""
    nb = notebooks.read(ROOT / "notebooks" / f"{name}.ipynb")
    names = {}
    for cell in nb.cells:
        for line in ast.parse(cell.source).body if cell.cell_type == "code" else ():
            if isinstance(line, (ast.Import, ast.ImportFrom)):
                exec(ast.unparse(line), names)
    for cell in notebooks.tagged(nb, tag):
        exec(cell.source, names)
    return SimpleNamespace(**names)
