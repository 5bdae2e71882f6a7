"""Running, resuming, refreshing and checking notebooks: on small notebooks made here, with real kernels where it matters."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers import __main__, ledger
from helpers.workbook import notebooks, runner

PARAMETERS = new_code_cell("RADIUS = 10.0\nNAME = 'a'", metadata={"tags": ["parameters"]})


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository of its own: notebooks/, helpers/, data/ and a build folder."""
    for folder in ("notebooks", "helpers", "data/cache"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "helpers" / "some.py").write_text("x = 1\n")
    (tmp_path / "data" / "some.json").write_text("{}")
    (tmp_path / "README.md").write_text("\n".join(["# A title", *ledger.MARKS, "The end.", ""]))
    monkeypatch.setattr(runner, "CELL_SECONDS", 120)
    for module in (runner, notebooks, ledger):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for name in ("WORKBOOK_BUILD", "WORKBOOK_DEFAULT_RUN", "WORKBOOK_NOTEBOOK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def add(tree, name, *sources, parameters=True):
    cells = (
        [new_markdown_cell("# A title")]
        + [PARAMETERS] * parameters
        + [new_code_cell(source) for source in sources]
    )
    path = tree / "notebooks" / f"{name}.ipynb"
    nbformat.write(
        new_notebook(
            cells=[nbformat.from_dict({**cell, "id": f"cell{i}"}) for i, cell in enumerate(cells)]
        ),
        path,
    )
    return path


def texts(path):
    """Everything that an executed notebook printed."""
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def test_a_default_run_then_nothing_then_only_what_changed(tree, capsys, monkeypatch):
    wrong = (
        tree / "other" / "kernels" / "python3"
    )  # a kernel of the same name, elsewhere on this machine
    wrong.mkdir(parents=True)
    (wrong / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tree / "other"))
    add(
        tree,
        "01_b",
        "import os; print('default', os.environ['WORKBOOK_DEFAULT_RUN'], os.environ['WORKBOOK_NOTEBOOK'])",
    )
    add(tree, "00_a", "import os, sys; print(sys.executable); print(os.getcwd())")
    stale = tree / "build" / "claims" / "00_a" / "objective-over-random.json"
    ledger.write_atomically(stale, "{}")
    assert runner.run(build=tree / "build") == []
    out = capsys.readouterr().out
    assert (
        out.index("finished 00_a: 3 cells") < out.index("running 01_b: 3 cells") and "Claims" in out
    )
    assert texts(tree / "build" / "00_a.ipynb").split() == [sys.executable, str(tree)]
    assert texts(tree / "build" / "01_b.ipynb").split() == ["default", "1", "01_b"]
    assert not stale.exists() and "WORKBOOK_DEFAULT_RUN" not in os.environ
    assert (tree / "build" / "ledger.json").exists()

    runner.run(build=tree / "build")
    out = capsys.readouterr().out
    assert (
        "skipped 00_a: unchanged since its last run" in out
        and "skipped 01_b" in out
        and "running" not in out
    )

    add(tree, "01_b", "print('new')")
    runner.run(build=tree / "build")
    out = capsys.readouterr().out
    assert (
        "skipped 00_a" in out
        and "finished 01_b" in out
        and texts(tree / "build" / "01_b.ipynb") == "new\n"
    )


def test_the_key_covers_source_helpers_data_and_parameters(tree):
    path = add(tree, "00_a", "1")

    def key(parameters=None):
        return runner._key(notebooks.read(path), parameters or {}, runner._surroundings_hash())

    seen = [key(), key({"RADIUS": 3}), key({"RADIUS": 4})]
    for change in (
        lambda: (tree / "helpers" / "some.py").write_text("x = 2\n"),
        lambda: (tree / "data" / "some.json").write_text("[]"),
        lambda: (tree / "data" / "some.json").rename(tree / "data" / "other.json"),
        lambda: add(tree, "00_a", "2"),
        lambda: add(tree, "00_a", "2", parameters=False),
    ):
        change()
        seen.append(key())
    assert len(set(seen)) == len(seen)
    (tree / "data" / "cache" / "model.bin").write_text("downloaded")
    nb = nbformat.read(path, as_version=4)
    nb.cells[-1].outputs = [new_output("stream", name="stdout", text="2")]
    nbformat.write(nb, path)
    assert key() == seen[-1]  # neither the cache nor the outputs count


def test_a_failing_notebook_is_reported_and_the_others_run(tree, capsys):
    add(tree, "00_bad", "print('so far')", "\n# why\nnumber = 1 / 0")
    add(
        tree,
        "01_callback",
        "from ipywidgets import interact\n\n@interact(x=3)\ndef show(x):\n    raise KeyError('hidden')",
    )
    add(tree, "02_good", "print('fine')")
    build = tree / "build"
    assert runner.run(build=build) == ["00_bad", "01_callback"]
    out = capsys.readouterr().out
    assert (
        "FAILED 00_bad" in out
        and "cell 4 of 4: # why" in out
        and "ZeroDivisionError: division by zero" in out
    )
    assert "a widget's callback raised\n  KeyError: 'hidden'" in out and "finished 02_good" in out
    assert (
        "so far" in texts(build / "00_bad.failed.ipynb") and not (build / "00_bad.ipynb").exists()
    )

    add(tree, "00_bad", "print('mended')")
    assert runner.run(["00"], build=build) == []
    assert (build / "00_bad.ipynb").exists() and not (build / "00_bad.failed.ipynb").exists()
    assert not list(build.glob(".*.ipynb"))


def test_an_interrupted_run_leaves_nothing_half_written_and_goes_on(tree, capsys, monkeypatch):
    add(tree, "00_a", "print(1)")
    add(tree, "01_b", "print(2)")
    build, execute = tree / "build", runner.execute

    def interrupted(nb, output, *rest):
        if "01_b" in str(output):
            Path(output).write_text("{half")
            raise KeyboardInterrupt
        return execute(nb, output, *rest)

    monkeypatch.setattr(runner, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run(build=build)
    assert sorted(path.name for path in build.glob("*.ipynb")) == ["00_a.ipynb"] and not list(
        build.glob(".*.ipynb")
    )
    monkeypatch.setattr(runner, "execute", execute)
    capsys.readouterr()
    assert runner.run(build=build) == []
    out = capsys.readouterr().out
    assert "skipped 00_a" in out and "finished 01_b" in out


def test_a_killed_run_goes_on(tree, capsys):
    add(tree, "00_a", "print(1)")
    slow = add(tree, "01_b", "import time\nopen('started', 'w').close()\ntime.sleep(600)")
    code = (
        "from pathlib import Path; from helpers import ledger, notebooks, runner; "
        f"runner.ROOT = notebooks.ROOT = ledger.ROOT = Path({str(tree)!r}); runner.run(build={str(tree / 'build')!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (
        not (tree / "started").exists() and time.monotonic() < deadline and process.poll() is None
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.wait()
    assert (tree / "started").exists() and not (tree / "build" / "01_b.ipynb").exists()
    add(tree, slow.stem, "print('quick')")
    assert runner.run(build=tree / "build") == []
    out = capsys.readouterr().out
    assert "skipped 00_a" in out and texts(tree / "build" / "01_b.ipynb") == "quick\n"


def test_parameters_go_where_they_are_known_and_never_to_the_ledger(tree, capsys):
    show = "import os\nprint(RADIUS, repr(NAME), os.environ.get('WORKBOOK_DEFAULT_RUN'))"
    add(tree, "00_a", show)
    path = add(tree, "01_b", "print(OTHER)")
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].source = "OTHER = 1"
    nbformat.write(nb, path)
    recipe = tree / "recipe.yaml"
    recipe.write_text(
        "notebooks: ['00', '01']\nparameters: {RADIUS: 3, NAME: \"it's\", OTHER: [1, 2]}\n"
    )
    assert runner.run(parameters={"RADIUS": 2.5}, recipe=recipe, build=tree / "build") == []
    (folder,) = (tree / "build" / "runs").iterdir()
    assert (
        texts(folder / "00_a.ipynb") == '2.5 "it\'s" None\n'
        and texts(folder / "01_b.ipynb") == "[1, 2]\n"
    )
    assert (
        not list((tree / "build").glob("*.*")) and "the ledger as it was" in capsys.readouterr().out
    )
    runner.run(parameters={"RADIUS": 2.5}, recipe=recipe, build=tree / "build")
    assert "skipped 00_a" in capsys.readouterr().out


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("- 1\n", "must be a mapping"),
        ("a: [1", "not valid YAML"),
        ("1: 2", "must be a mapping"),
        ("notebooks: 3", "may hold a list 'notebooks'"),
        ("parameters: {RADIUS: 1}\nseed: 3", "nothing beside them"),
        ("RADUIS: 3", "No notebook of this run has a parameter 'RADUIS'; they have NAME, RADIUS."),
        ("notebooks: ['09']", "There is no notebook '09'; there are 00_a."),
        (None, "cannot be read"),
    ],
)
def test_mistakes_are_said_in_one_sentence_before_anything_runs(tree, capsys, recipe, message):
    add(tree, "00_a", "1")
    path = tree / "recipe.yaml"
    if recipe:
        path.write_text(recipe)
    assert __main__.main(["run", "-f", str(path)]) == 2
    streams = capsys.readouterr()
    assert message in streams.err and streams.err.count("\n") == 1 and streams.out == ""
    assert not (tree / "build").exists()


def test_other_mistakes(tree, capsys):
    with pytest.raises(notebooks.UserError, match="There are no notebooks"):
        runner.run(build=tree / "build")
    add(tree, "00_a", "1", parameters=False)
    assert __main__.main(["run", "00_a", "-p", "SEED", "3"]) == 2
    assert "00_a takes no parameters: it has 0 cells tagged 'parameters'" in capsys.readouterr().err
    (tree / "notebooks" / "01_b.ipynb").write_text("not json")
    assert __main__.main(["check", "01"]) == 2
    assert "is not a notebook" in capsys.readouterr().err
    with (
        runner.FileLock(tree / ".lock"),
        pytest.raises(notebooks.UserError, match="Another run is at work"),
    ):
        runner.run(["00"], build=tree)
    with pytest.raises(SystemExit):
        __main__.main(["run", "--fast"])


@pytest.mark.parametrize(
    "text, value",
    [("3", 3), ("0.5", 0.5), ("1e-3", 0.001), ("True", True), ("None", None), ("a b", "a b")],
)
def test_values_on_the_command_line(text, value):
    parsed = runner.parse_value(text)
    assert parsed == value and type(parsed) is type(value)


def test_refresh_cleans_and_is_idempotent(tree, capsys):
    source = (
        "import sys, time\nfrom pathlib import Path\nfrom tqdm.auto import tqdm\n"
        "for _ in tqdm(range(2)):\n    print(_, flush=True); time.sleep(.05)\nprint(Path.home() / 'x', Path.cwd() / 'y')"
    )
    path = add(tree, "00_a", source, "import ipywidgets\nipywidgets.IntSlider()", "RADIUS")
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].metadata["nbmake"] = {"mock": {"RADIUS": 1}}
    nb.metadata["papermill"] = {"version": "1"}
    nb.cells[2].metadata["execution"] = {"iopub.status.busy": "2024"}
    nbformat.write(nb, path)
    assert any("not those of its present source" in problem for problem in runner.check())
    assert runner.refresh(build=tree / "build") == [] and runner.check() == []
    once = path.read_bytes()
    nb = nbformat.read(path, as_version=4)
    assert texts(path) == "0\n1\n~/x ./y\n"
    assert nb.cells[3].outputs == [] and nb.cells[4].outputs[0].data == {"text/plain": "10.0"}
    assert set(nb.metadata) == {"kernelspec", "language_info", "workbook"}
    assert (
        nb.cells[1].metadata == {"nbmake": {"mock": {"RADIUS": 1}}, "tags": ["parameters"]}
        and nb.cells[2].metadata == {}
    )
    capsys.readouterr()
    runner.refresh(build=tree / "build")
    assert "skipped 00_a" in capsys.readouterr().out and path.read_bytes() == once

    add(tree, "00_a", "1 / 0")
    broken = path.read_bytes()
    assert runner.refresh(build=tree / "build") == ["00_a"] and path.read_bytes() == broken
    with pytest.raises(notebooks.UserError, match="no notebook"):
        runner.refresh(["7"])


def clean_notebook(tree):
    path = add(tree, "00_a", "print(1)")
    nb = notebooks.read(path)
    for count, cell in enumerate(nb.cells[1:], 1):
        cell.execution_count = count
    nb.cells[2].outputs = [new_output("stream", name="stdout", text="1\n")]
    nb.metadata["workbook"] = {"source_hash": notebooks.source_hash(nb)}
    nbformat.write(nb, path)
    return path, nb


def _output(kind, **fields):
    return lambda nb: nb.cells[2].outputs.append(new_output(kind, **fields))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda nb: nb.cells[2].update(source="print(2)"), "not those of its present source"),
        (
            lambda nb: nb.cells[2].update(execution_count=7),
            "not executed once each from top to bottom",
        ),
        (
            lambda nb: nb.cells[2].update(execution_count=None),
            "not executed once each from top to bottom",
        ),
        (lambda nb: nb.metadata.update(widgets={notebooks.WIDGET_STATE: {}}), "widget state"),
        (lambda nb: nb.cells[1].metadata.update(papermill={}), "traces of an execution"),
        (
            _output("error", ename="ValueError", evalue="x", traceback=[]),
            "cell 3 shows an error: ValueError",
        ),
        (
            _output("stream", name="stderr", text="Warning: old"),
            "cell 3 writes to stderr: 'Warning: old'",
        ),
        (
            _output("display_data", data={notebooks.WIDGET_VIEW: {"model_id": "1"}}),
            "shows a widget whose state is not committed",
        ),
        (
            _output("stream", name="stdout", text="/home/ann/x"),
            "names a path of this machine: '/home/ann/x'",
        ),
        (
            _output("display_data", data={"text/html": "<a href='C:\\Users\\ann'>"}),
            "names a path of this machine",
        ),
        (
            _output("display_data", data={"text/plain": "x" * 1_000_001}),
            "bytes, more than 1,000,000",
        ),
        (lambda nb: nb.cells[2].update(source="a = 1\n" * 26), "cell 3 has 26 lines, more than 25"),
        (lambda nb: nb.cells[1].metadata.update(tags=[]), "0 cells tagged 'parameters'"),
        (
            lambda nb: nb.cells[2].metadata.update(tags=["parameters"]),
            "2 cells tagged 'parameters'",
        ),
        (
            lambda nb: nb.cells[1].update(source="RADIUS = 2 * 5"),
            "'RADIUS = 2 * 5', which is not NAME = literal",
        ),
        (lambda nb: nb.cells[1].update(source="RADIUS ="), "invalid syntax"),
    ],
)
def test_check_finds(tree, spoil, message):
    path, nb = clean_notebook(tree)
    assert runner.check() == []
    spoil(nb)
    nbformat.write(nb, path)
    problems = runner.check()
    assert any(message in problem and problem.startswith("00_a.ipynb: ") for problem in problems), (
        problems
    )


def test_the_command_line(tree, capsys):
    path, nb = clean_notebook(tree)
    assert (
        __main__.main(["check"]) == 0 and "current, in order and clean" in capsys.readouterr().out
    )
    nb.cells[2].source = "print(2)"
    nbformat.write(nb, path)
    assert __main__.main(["check", str(path)]) == 1 and "present source" in capsys.readouterr().out


def test_doctor_here_and_where_nothing_is_installed(capsys):
    assert __main__.main(["doctor"]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "as pinned" in out and len(out.splitlines()) <= 24
    root = Path(__file__).resolve().parents[1]
    bare = subprocess.run(
        [sys.executable, "-S", "-m", "helpers", "doctor"], cwd=root, capture_output=True, text=True
    )
    assert (
        bare.returncode == 1
        and "missing" in bare.stdout
        and "pip install -r" in bare.stdout
        and bare.stderr == ""
    )
    bare = subprocess.run(
        [sys.executable, "-S", "-m", "helpers", "run"], cwd=root, capture_output=True, text=True
    )
    assert (
        bare.returncode == 2
        and "doctor says what is missing" in bare.stderr
        and bare.stderr.count("\n") == 1
    )
