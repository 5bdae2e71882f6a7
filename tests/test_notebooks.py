"""The notebooks themselves. `pytest` also runs each of them through nbmake (see addopts in pyproject.toml).

nbmake 1.5.5 reads small parameters from a cell's metadata: {"nbmake": {"mock": {"MODEL": "tiny-random", "STEPS": 2}}} on the
parameters cell. After that cell has run it executes `NAME = value` for each: strings between single quotes (so without quotes
or backslashes of their own), everything else as Python prints it. It runs in notebooks/, and writes nothing back.
"""

import re
from pathlib import Path

import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers import training
from helpers.residual import LayerSpan
from helpers.workbook import notebooks, runner

ROOT = Path(__file__).resolve().parents[1]
PATHS = notebooks.resolve()
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def mock(nb):
    return notebooks.tagged(nb, "parameters")[0].metadata.get("nbmake", {}).get("mock", {})


def exercises(nb):
    """(exercise, checker, the folded solution's code) of each exercise, in order."""
    cells = {tag: notebooks.tagged(nb, tag) for tag in ("exercise", "checker", "solution")}
    found = list(zip(cells["exercise"], cells["checker"], cells["solution"], strict=True))
    codes = []
    for exercise, checker, solution in found:
        places = [nb.cells.index(cell) for cell in (exercise, checker, solution)]
        assert places == sorted(places), (
            f"exercise, checker, solution are out of order at cell {places[0] + 1}"
        )
        blocks = re.findall(r"```python\n(.*?)```", solution.source, re.S)
        assert len(blocks) == 1 and "<details" in solution.source, (
            f"cell {places[2] + 1} needs <details> and one ```python block"
        )
        codes.append(blocks[0])
    return [(exercise, checker, code) for (exercise, checker, _), code in zip(found, codes)]


def solved(nb):
    """The notebook with each solution run, and its checker run again, just after that checker met the unsolved exercise."""
    for _, checker, code in exercises(nb):
        after = nb.cells.index(checker) + 1
        again = new_code_cell(checker.source, metadata={"tags": ["checked-again"]})
        nb.cells[after:after] = [new_code_cell(code), again]
    return nb


def said(cell):
    return "".join(
        output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
        for output in cell.outputs
    )


def test_the_first_notebooks_are_there():
    assert {"00", "02"} <= {path.stem.split("_")[0] for path in PATHS}


@each_notebook
def test_committed_notebook_is_current_in_order_and_clean(path):
    assert notebooks.check([path]) == []


@each_notebook
def test_house_style(path):
    nb = notebooks.read(path)
    opening = nb.cells[0]
    assert opening.cell_type == "markdown" and opening.source.startswith("# ")
    assert re.search(r"\d+ minutes?", opening.source) and re.search(
        r"claim", opening.source, re.I
    ), "minutes and claims first"
    assert mock(nb).get("MODEL") == "tiny-random" and set(mock(nb)) <= set(
        notebooks.parameters_of(nb)
    )
    assert not any(
        set("'\\") & set(value) for value in mock(nb).values() if isinstance(value, str)
    )  # nbmake does not escape
    assert exercises(nb), "no exercise"


@each_notebook
def test_checkers_tell_solved_from_unsolved(path, tmp_path):
    nb = notebooks.read(path)
    done, problem = runner.execute(solved(nb), tmp_path / path.name, mock(nb), tmp_path, path.stem)
    assert done is not None, problem
    before, after = notebooks.tagged(done, "checker"), notebooks.tagged(done, "checked-again")
    assert len(before) == len(after) == len(exercises(notebooks.read(path)))
    for number, (unsolved, right) in enumerate(zip(before, after), 1):
        assert said(unsolved).strip() and "Correct" not in said(unsolved), (
            f"exercise {number}, unsolved: {said(unsolved)!r}"
        )
        assert "Correct" in said(right), (
            f"the solution of exercise {number} is not accepted: {said(right)!r}"
        )


def test_a_wrong_solution_would_be_noticed(tmp_path):
    checker = "print('Correct' if answer == 4 else 'not yet: what is 2 + 2?')"
    nb = new_notebook(
        cells=[
            new_code_cell("answer = None", metadata={"tags": ["exercise"]}),
            new_code_cell(checker, metadata={"tags": ["checker"]}),
            new_markdown_cell(
                "<details>\n\n```python\nanswer = 4\n```\n</details>",
                metadata={"tags": ["solution"]},
            ),
        ]
    )
    done, problem = runner.execute(solved(nb), tmp_path / "x.ipynb")
    assert problem is None
    assert [said(cell).strip() for cell in notebooks.tagged(done, "checker")] == [
        "not yet: what is 2 + 2?"
    ]
    assert [said(cell).strip() for cell in notebooks.tagged(done, "checked-again")] == ["Correct"]
    nb = new_notebook(cells=nb.cells[:2])
    with pytest.raises(ValueError):
        exercises(nb)


@pytest.mark.parametrize("n_vectors, steps, radius", [(1, 1, 0.5), (3, 4, 2.0)])
def test_the_method_of_notebook_02_is_that_of_helpers(tiny, n_vectors, steps, radius):
    nb = notebooks.read(ROOT / "notebooks" / "02_training_one_vector.ipynb")
    (cell,) = notebooks.tagged(nb, "method")
    names = {
        "torch": torch,
        "normalise": training.normalise,
        "orthonormalise": training.orthonormalise,
    }
    exec(cell.source, names)
    span = LayerSpan(tiny, ["What is the time?", "Hello"], 1, 4, target_positions=slice(-3, None))
    theirs = training.train(
        span, radius, n_vectors, steps=steps, seed=3, progress=False
    ).vectors.tensor
    torch.testing.assert_close(
        names["melbo"](span, radius, n_vectors, steps, seed=3),
        theirs,
        rtol=1e-3,
        atol=1e-4 * radius,
    )
