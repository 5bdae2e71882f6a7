"""Whole runs: every notebook with its exercises solved, runs that are interrupted or killed, and
a recipe on a model folder.

nbmake 1.5.5 executes the solved notebooks. It reads small parameters from a cell's metadata:
{"nbmake": {"mock": {"MODEL": "tiny-random", "STEPS": 2}}} on the parameters cell. After that cell
has run it executes `NAME = value` for each: strings between single quotes (so without quotes or
backslashes of their own), everything else as Python prints it.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import nbformat
import psutil
import pytest
import yaml
from conftest import tiny_model
from nbclient.output_widget import OutputWidget
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from nbmake.nb_run import NotebookRun

from helpers import __main__
from helpers.workbook import executing, notebooks, runner

PATHS = notebooks.resolve()


# -- solved notebooks --------------------------------------------------------------------------


def exercises(nb):
    """(checker, the folded solution's code) of each exercise, in order."""
    cells = [notebooks.tagged(nb, tag) for tag in ("exercise", "checker", "solution")]
    found = []
    for parts in zip(*cells, strict=True):
        places = [nb.cells.index(cell) for cell in parts]
        assert places == sorted(places), f"exercise at cell {places[0] + 1} is out of order"
        _, checker, solution = parts
        codes = re.findall(r"```python\n(.*?)```", solution.source, re.S)
        assert len(codes) == 1 and "<details" in solution.source, (
            f"cell {places[2] + 1} needs <details> and one ```python block"
        )
        found.append((checker, codes[0]))
    return found


def solved(nb):
    """The notebook with each solution run, and its checker again, just after that checker met the
    unsolved exercise."""
    for checker, code in exercises(nb):
        after = nb.cells.index(checker) + 1
        again = new_code_cell(checker.source, metadata={"tags": ["checked-again"]})
        nb.cells[after:after] = [new_code_cell(code), again]
    return nb


def said(cell):
    words = []
    for output in cell.outputs:
        words += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
    return "".join(words).strip()


def check_solved(result):
    """What nbmake executed: no error, and each checker tells solved from unsolved."""
    assert result.error is None, result.error.trace
    assert notebooks.widget_errors(result.nb) == []
    before = notebooks.tagged(result.nb, "checker")
    after = notebooks.tagged(result.nb, "checked-again")
    for number, (unsolved, right) in enumerate(zip(before, after, strict=True), 1):
        assert said(unsolved) and "Correct" not in said(unsolved), f"exercise {number}, unsolved"
        assert "Correct" in said(right), f"exercise {number}, solved: {said(right)!r}"


@pytest.fixture(scope="module")
def executed(tmp_path_factory, request):
    """{name of a notebook: its run, under way}: solved copies, two at a time, one thread each."""
    folder = tmp_path_factory.mktemp("solved")
    patch = pytest.MonkeyPatch()
    patch.setattr(OutputWidget, "sync_state", lambda self: None)  # see helpers/workbook/executing
    for name, value in runner.ONE_THREAD.items():
        patch.setenv(name, value)
    wanted = [getattr(item, "callspec", None) for item in request.session.items]
    names = [call.params["name"] for call in wanted if call and "name" in call.params]
    pool, runs = ThreadPoolExecutor(2), {}
    for path in PATHS:
        if path.stem in names:
            nbformat.write(solved(notebooks.read(path)), folder / path.name)
            runs[path.stem] = pool.submit(NotebookRun(folder / path.name, 600).execute)
    yield runs
    pool.shutdown(cancel_futures=True)
    patch.undo()


@pytest.mark.parametrize("name", [path.stem for path in PATHS])
def test_a_notebook_runs_and_its_checkers_tell_solved_from_unsolved(executed, name):
    check_solved(executed[name].result())


def test_a_wrong_solution_would_be_noticed(tmp_path):
    def notebook(solution):
        checker = "print('Correct' if answer == 4 else 'not yet: what is 2 + 2?')"
        folded = f"<details>\n\n```python\nanswer = {solution}\n```\n</details>"
        cells = [
            new_code_cell("answer = None", metadata={"tags": ["exercise"]}),
            new_code_cell(checker, metadata={"tags": ["checker"]}),
            new_markdown_cell(folded, metadata={"tags": ["solution"]}),
        ]
        return new_notebook(cells=cells)

    def run(nb):
        nbformat.write(nb, tmp_path / "x.ipynb")
        return NotebookRun(tmp_path / "x.ipynb", 60).execute()

    done = run(solved(notebook(4)))
    check_solved(done)
    assert said(notebooks.tagged(done.nb, "checker")[0]) == "not yet: what is 2 + 2?"
    with pytest.raises(AssertionError, match="exercise 1, solved"):
        check_solved(run(solved(notebook(5))))
    with pytest.raises(ValueError):
        exercises(new_notebook(cells=notebook(4).cells[:2]))


# -- interrupted -------------------------------------------------------------------------------


def command_of(tmp_path):
    """`python -m helpers run` in a repository at `tmp_path`."""
    code = (
        "import sys; from pathlib import Path; from helpers import __main__, ledger\n"
        "from helpers.workbook import notebooks, runner\n"
        f"runner.ROOT = notebooks.ROOT = ledger.ROOT = Path({str(tmp_path)!r})\n"
        "sys.exit(__main__.main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", code, "run", "--workers"]


def test_a_run_killed_at_random_moments_is_complete_in_the_end(tmp_path):
    """Whatever is left behind, the next run takes it up, and no file is a part of one."""
    folder, build = tmp_path / "notebooks", tmp_path / "build"
    folder.mkdir()
    work = "from helpers.models import load\nlm = load('tiny-random')\nprint(lm.n_layers)"
    for name in ("00_a", "01_b", "02_c"):
        cells = [new_code_cell(work), new_code_cell("import time\ntime.sleep(1)")]
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    command = command_of(tmp_path)
    asked = {"env": {**runner.os.environ, "WORKBOOK_BUILD": str(build)}, "text": True}
    moments = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([*command, "2"], **asked, stdout=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(0.5, 15))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for path in build.glob("[0-9]*.ipynb"):
            nbformat.read(path, as_version=4)
    time.sleep(2)  # the killed run's kernels end
    done = subprocess.run([*command, "2"], **asked, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.stem for path in build.glob("*.ipynb")) == ["00_a", "01_b", "02_c"]
    json.loads((build / "ledger.json").read_text(encoding="utf-8"))
    assert not list(build.glob(".*.ipynb"))


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_takes_its_kernels_along_and_goes_on(tmp_path, sign):
    folder, build = tmp_path / "notebooks", tmp_path / "build"
    folder.mkdir()
    sources = {"00_a": "1", "01_b": "open('b', 'w')\nimport time\ntime.sleep(600)"}
    sources["02_c"] = sources["01_b"].replace("'b'", "'c'")
    for name, source in sources.items():
        nbformat.write(new_notebook(cells=[new_code_cell(source)]), folder / f"{name}.ipynb")
    command = command_of(tmp_path)
    environment = {**runner.os.environ, "WORKBOOK_BUILD": str(build)}
    process = subprocess.Popen([*command, "2"], env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "b").exists() and (tmp_path / "c").exists(), process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 4  # two workers and their kernels
    process.send_signal(sign)
    _, said = process.communicate(timeout=30)
    assert psutil.wait_procs(children, timeout=20)[1] == []
    assert sorted(path.name for path in build.glob("[0-9]*.ipynb")) == ["00_a.ipynb"]
    if sign == signal.SIGINT:
        assert process.returncode == 130 and said.strip().count("\n") == 0
        assert not list(build.glob(".*.ipynb"))
    for name in ("01_b", "02_c"):
        nb = new_notebook(cells=[new_code_cell("print('quick')")])
        nbformat.write(nb, folder / f"{name}.ipynb")
    again = subprocess.run([*command, "2"], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout
    assert "skipped 00_a" in again.stdout and "finished 01_b" in again.stdout
    assert not list(build.glob(".*.ipynb"))


def test_a_kernel_that_lost_its_port_is_started_once_more():
    def run(dies, words):
        tried.append(1)
        if len(tried) <= dies:
            raise RuntimeError(words)
        return "done"

    port = "Kernel died before replying to kernel_info"
    for dies, words, tries in ((1, port, 2), (2, port, 2), (1, "something else", 1)):
        tried = []
        if tries > dies:
            assert executing.once_more(run, dies, words) == "done"
        else:
            with pytest.raises(RuntimeError, match=words):
                executing.once_more(run, dies, words)
        assert len(tried) == tries


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)


# -- another model -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A small random Qwen2 with its tokenizer, as a user would save one."""
    lm, path = tiny_model("qwen2"), tmp_path / "a model"  # (with a blank in its path)
    lm.model.save_pretrained(path)
    lm.tokenizer.save_pretrained(path)
    return path


SMALL = dict(N_VECTORS=3, STEPS=2, MAX_NEW_TOKENS=4, N_PROMPTS=2, RADII=[1.0, 4.0])


def test_notebooks_run_on_a_model_folder(folder, tmp_path, monkeypatch, capfd):
    """By rule and by a recipe, which wins."""
    monkeypatch.setenv("WORKBOOK_BUILD", str(tmp_path / "build"))
    asked = tmp_path / "mine.yaml"
    recipe = {"notebooks": ["00", "01"], "parameters": {**SMALL, "SOURCE_LAYER": 1}}
    asked.write_text(yaml.safe_dump(recipe))
    assert __main__.main(["run", "-f", str(asked), "--model", str(folder)]) == 0
    out = capfd.readouterr().out
    assert "block 1 to 2: the calibrated radius is" in out and "finished 00_start_here" in out
    assert "finished 01_layer_norm_geometry" in out and "the ledger as it was" in out
    (made,) = (tmp_path / "build" / "runs").iterdir()
    assert not list(made.glob("*.failed.ipynb"))
    assert not (tmp_path / "build" / "ledger.json").exists()
    printed = json.dumps(nbformat.read(made / "00_start_here.ipynb", as_version=4))
    assert "4 blocks, d_model 32" in printed


@pytest.mark.parametrize(
    "name, asked",
    [
        ("00", dict(N_VECTORS=1, STEPS=1, MAX_NEW_TOKENS=1)),
        ("01", dict(N_PROMPTS=1, N_VECTORS=1, RADII=[40.0, 5.0])),
        ("02", dict(N_PROMPTS=1, N_VECTORS=1)),
        ("02c", dict(N_PROMPTS=1, N_VECTORS=1, ADAM_STEPS=1, SETTLING_STEPS=1)),
        ("02b", dict(N_PROMPTS=1, SEEDS=[1], N_DAMAGED=1, N_DECIDING=1, BLOCKS=[3, 7, 23])),
        ("02b", dict(SOURCE_LAYER=0, TARGET_LAYER=1, BLOCKS=[3, 1])),
        ("03", dict(N_SEEDS=1, RADII=[8.0, 1.0], N_DIRECTIONS=1)),
        ("04", dict(N_PROMPTS=1, N_VECTORS=1, COEFFS=[1.0, -2.0], RADII=[4.0])),
        ("05", dict(N_ASKED=1, SEEDS=[1], N_TEST=1, N_VALIDATION=1)),
        ("06", dict(SEEDS=[1], SOURCES=[1], N_VECTORS=1)),
        ("explorer", dict(N_VECTORS=1, STEPS=1, RADIUS=0.5)),
    ],
)
def test_every_legal_value_runs(name, asked, tmp_path):
    """Kind 16: smallest values, a single unit, lists in descending order, on the tiny model."""
    (path,) = notebooks.resolve([name])
    (cell,) = notebooks.tagged(notebooks.read(path), "parameters")
    values = {**cell.metadata["nbmake"]["mock"], **asked}
    assert runner.run([path], values, build=tmp_path, workers=1) == []


def legal(values):
    """(name, value) to run whole: each parameter at its other legal values. Those that are refused
    are in tests/test_workbook.py, and so is what only a real model has room for."""
    for name, value in values.items():
        if name == "SOURCE_LAYER":
            others = [0, values["TARGET_LAYER"] - 1]
        elif name == "TARGET_LAYER":
            others = [values["SOURCE_LAYER"] + 1]
        elif isinstance(value, list):
            others = [value[::-1], value[:1], value[1:]]
        elif isinstance(value, float):
            others = [1e-6, 1e6]
        else:
            others = [1, value + 1] if isinstance(value, int) else []
        yield from ((name, other) for other in others if other not in (value, []))


@pytest.mark.skipif("TABLE" not in os.environ, reason="some 200 whole runs: set TABLE=1")
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_whole_table_of_parameters(path, tmp_path, monkeypatch):
    """Kind 16, once: TABLE=1 pytest tests/slow/test_whole_runs.py -k whole_table. It succeeds, or
    the cell after the parameters refuses."""
    for name, value in runner.ONE_THREAD.items():
        monkeypatch.setenv(name, value)
    nb = notebooks.read(path)
    (cell,) = notebooks.tagged(nb, "parameters")
    usual = {**notebooks.parameters_of(nb), **cell.metadata["nbmake"]["mock"]}
    asked = list(legal(usual))

    def wrong(number):
        name, value = asked[number]
        build = tmp_path / str(number)
        if runner.run([path], {**usual, name: value}, build=build, workers=1):
            (failed,) = build.glob("runs/*/*.failed.ipynb")
            done = notebooks.read(failed)
            raised = [c for c in done.cells for o in c.get("outputs", []) if "ename" in o]
            if not raised or "parameters.check(" not in raised[-1].source:
                return name, value

    with ThreadPoolExecutor(2) as pool:
        assert [found for found in pool.map(wrong, range(len(asked))) if found] == []


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(MODEL="no such model"), "There is no model 'no such model'"),
        (dict(NO_SUCH=3), "No notebook of this run has a parameter 'NO_SUCH'"),
        (dict(SOURCE_LAYER=9), "source_layer 9 is outside the model: it has 4 blocks"),
    ],
)
def test_a_recipe_that_cannot_run_is_one_sentence_and_writes_nothing(
    folder, tmp_path, monkeypatch, capfd, change, message
):
    monkeypatch.setenv("WORKBOOK_BUILD", str(tmp_path / "build"))
    usual = {"MODEL": str(folder), "SOURCE_LAYER": 1, "TARGET_LAYER": 3, "RADIUS": "calibrated"}
    asked = tmp_path / "mine.yaml"
    asked.write_text(yaml.safe_dump({"notebooks": ["00"], "parameters": {**usual, **change}}))
    assert __main__.main(["run", "-f", str(asked)]) == 2
    said = capfd.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "build").exists()
