"""Running, refreshing and checking notebooks (small ones made here, with real kernels), their
parameters, the benchmarks, the command line, and what README and packaging files promise."""

import argparse
import ast
import errno
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
import yaml
from importlinter.cli import lint_imports
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from papermill.translators import PythonTranslator

from helpers import __main__, ledger, training
from helpers.models import prompts
from helpers.residual import LayerSpan
from helpers.workbook import bench, doctor, notebooks, parameters, results, runner

ROOT = Path(__file__).resolve().parents[1]
PATHS = notebooks.resolve()
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository of its own: notebooks/, helpers/, data/ and a build folder."""
    for folder in ("notebooks", "helpers", "data/cache"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "helpers" / "some.py").write_text("x = 1\n")
    (tmp_path / "data" / "some.json").write_text("{}")
    (tmp_path / "README.md").write_text("\n".join(["# A title", *results.MARKS, "The end.", ""]))
    monkeypatch.setattr(runner, "CELL_SECONDS", 120)
    for module in (runner, notebooks, ledger):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for name in ("WORKBOOK_BUILD", "WORKBOOK_DEFAULT_RUN", "WORKBOOK_NOTEBOOK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def add(tree, name, *sources, known="RADIUS = 10.0\nNAME = 'a'", tags=()):
    """A notebook of these code cells, after a cell of parameters."""
    cells = [new_markdown_cell("# A title")]
    if known:
        cells.append(new_code_cell(known, metadata={"tags": ["parameters"]}))
    cells += [new_code_cell(source, metadata={"tags": list(tags)}) for source in sources]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell{number}"
    path = tree / "notebooks" / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def texts(path):
    """Everything that an executed notebook printed."""
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


# -- running -----------------------------------------------------------------------------------


def test_a_default_run_then_nothing_then_only_what_changed(tree, capsys, monkeypatch):
    wrong = tree / "other" / "kernels" / "python3"  # of the same name, elsewhere on this machine
    wrong.mkdir(parents=True)
    kernel = {"argv": ["/bin/false"], "display_name": "x", "language": "python"}
    (wrong / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tree / "other"))
    show = "import os; print(os.environ['WORKBOOK_DEFAULT_RUN'], os.environ['WORKBOOK_NOTEBOOK'])"
    add(tree, "01_b", show)
    add(tree, "00_a", "import os, sys; print(sys.executable); print(os.getcwd())")
    build = tree / "build"
    stale = build / "claims" / "00_a" / "objective-over-random.json"
    ledger.write_atomically(stale, "{}")
    before = dict(runner.os.environ)
    assert runner.run(build=build, workers=1) == []
    out = capsys.readouterr().out
    assert out.index("finished 00_a: 3 cells") < out.index("running 01_b: 3 cells")
    assert "Claims" in out and (build / "ledger.json").exists()
    assert texts(build / "00_a.ipynb").split() == [sys.executable, str(tree)]
    assert texts(build / "01_b.ipynb").split() == ["1", "01_b"]
    assert not stale.exists() and dict(runner.os.environ) == before

    runner.run(build=build)
    out = capsys.readouterr().out
    assert "skipped 00_a: unchanged since its last run" in out and "skipped 01_b" in out
    assert "running" not in out

    add(tree, "01_b", "print('new')")
    runner.run(build=build)
    out = capsys.readouterr().out
    assert "skipped 00_a" in out and "finished 01_b" in out
    assert texts(build / "01_b.ipynb") == "new\n"


def test_two_at_a_time_with_one_thread_each_and_those_that_time_something_alone(
    tree, capsys, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    meet = (
        "import os, time\nfrom pathlib import Path\nPath('{}').touch()\nbegan = time.monotonic()\n"
        "while not Path('{}').exists() and time.monotonic() - began < 100: time.sleep(.05)\n"
        "print(Path('{}').exists(), os.environ['OMP_NUM_THREADS'])"
    )
    alone = "import os; print(os.environ['OMP_NUM_THREADS'])\nimport time; time.sleep(1)"
    add(tree, "00_a", alone, tags=["times"])
    add(tree, "01_b", meet.format("b", "c", "c"))
    add(tree, "02_c", meet.format("c", "b", "b"))
    assert runner.run(build=tree / "build", workers=2) == []
    assert texts(tree / "build" / "00_a.ipynb") == "7\n"
    assert texts(tree / "build" / "01_b.ipynb") == texts(tree / "build" / "02_c.ipynb")
    assert texts(tree / "build" / "01_b.ipynb") == "True 1\n"
    lines = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == ["running 01_b", "running 02_c"]
    assert {*lines[2:4]} == {"finished 01_b", "finished 02_c"}
    assert lines[4:6] == ["running 00_a", "finished 00_a"]


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_workers(tree, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source = "import torch\ntorch.manual_seed(0)\nx = torch.randn(300, 300)\nprint((x @ x).sum())"
    for name in ("00_a", "01_b"):
        add(tree, name, source)
    for workers in (1, 2):
        assert runner.run(build=tree / str(workers), workers=workers) == []
    found = {texts(tree / n / f"{name}.ipynb") for n in ("1", "2") for name in ("00_a", "01_b")}
    assert len(found) == 1


def test_on_a_terminal_one_line_says_what_runs(tree, capsys, monkeypatch):
    add(tree, "00_a", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    runner.run(build=tree / "build")
    out = capsys.readouterr().out
    assert re.search(r"\r\x1b\[Krunning 00 · 0 of 1 finished · \d+ s", out)
    assert "running 00_a:" not in out and "finished 00_a" in out


def test_the_key_covers_source_helpers_data_and_parameters(tree):
    path = add(tree, "00_a", "1")

    def key(values=None):
        return runner.Job(path, values or {}, tree, True, runner.surroundings_hash()).key

    seen = [key(), key({"RADIUS": 3}), key({"RADIUS": 4})]
    for change in (
        lambda: (tree / "helpers" / "some.py").write_text("x = 2\n"),
        lambda: (tree / "data" / "some.json").write_text("[]"),
        lambda: (tree / "data" / "some.json").rename(tree / "data" / "other.json"),
        lambda: add(tree, "00_a", "2"),
        lambda: add(tree, "00_a", "2", known=None),
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
    callback = "@interact(x=3)\ndef show(x):\n    raise KeyError('hidden')"
    add(tree, "00_bad", "print('so far')", "\n# why\nnumber = 1 / 0")
    add(tree, "01_callback", f"from ipywidgets import interact\n\n{callback}")
    add(tree, "02_dead", "import os; os.kill(os.getpid(), 9)")
    add(tree, "03_good", "print('fine')")
    build = tree / "build"
    assert runner.run(build=build, workers=2) == ["00_bad", "01_callback", "02_dead"]
    out = capsys.readouterr().out
    assert "FAILED 00_bad" in out and "cell 4 of 4: # why" in out
    assert "ZeroDivisionError: division by zero" in out and "Kernel died" in out
    assert "a widget's callback raised\n  KeyError: 'hidden'" in out and "finished 03_good" in out
    assert "so far" in texts(build / "00_bad.failed.ipynb")
    assert not (build / "00_bad.ipynb").exists()

    add(tree, "00_bad", "print('mended')")
    assert runner.run(["00"], build=build) == []
    assert (build / "00_bad.ipynb").exists() and not (build / "00_bad.failed.ipynb").exists()
    assert not list(build.glob(".*.ipynb"))


def test_parameters_go_where_they_are_known_and_never_to_the_ledger(tree, capsys):
    show = "import os\nprint(RADIUS, repr(NAME), repr(os.environ.get('WORKBOOK_DEFAULT_RUN')))"
    add(tree, "00_a", show)
    add(tree, "01_b", "print(OTHER)", known="OTHER = [3]")
    recipe = tree / "recipe.yaml"
    recipe.write_text(
        "notebooks: ['00', '01']\nparameters: {RADIUS: 3, NAME: \"it's\", OTHER: [1, 2]}\n"
    )
    build = tree / "build"
    assert runner.run(parameters={"RADIUS": 2.5}, recipe=recipe, build=build) == []
    (folder,) = (build / "runs").iterdir()
    assert texts(folder / "00_a.ipynb") == "2.5 \"it's\" ''\n"
    assert texts(folder / "01_b.ipynb") == "[1, 2]\n"
    assert not list(build.glob("*.*")) and "the ledger as it was" in capsys.readouterr().out
    runner.run(parameters={"RADIUS": 2.5}, recipe=recipe, build=build)
    assert "skipped 00_a" in capsys.readouterr().out


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("- 1\n", "must be a mapping"),
        ("a: [1", "not valid YAML"),
        ("1: 2", "must be a mapping"),
        ("notebooks: 3", "may hold a list 'notebooks'"),
        ("parameters: {RADIUS: 1}\nseed: 3", "nothing beside them"),
        ("RADIUS: 3\nRADIUS: 4", "the key 'RADIUS' stands twice, again in line 2"),
        ("parameters: {A: 1}\nparameters: {B: 1}", "the key 'parameters' stands twice"),
        ("notebooks: []\nparameters: {RADIUS: 3}", "its list 'notebooks' is empty"),
        ("RADIUS: ten", "RADIUS is 'ten': it has to be a number, such as 10.0."),
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
    add(tree, "00_a", "1", known=None)
    for arguments, message in (
        (["run", "00_a", "-p", "SEED", "3"], "00_a takes no parameters: it has 0 cells tagged"),
        (["run", "--workers", "0"], "one or more notebooks run at a time"),
        (["run", "-p", "SEED", "3", "-p", "SEED", "4"], "-p SEED stands twice"),
    ):
        assert __main__.main(arguments) == 2
        assert message in capsys.readouterr().err
    (tree / "notebooks" / "01_b.ipynb").write_text("not json")
    assert __main__.main(["check", "01"]) == 2
    assert "is not a notebook" in capsys.readouterr().err
    at_work = pytest.raises(notebooks.UserError, match="Another run is at work")
    with runner.FileLock(tree / ".lock"), at_work:
        runner.run(["00"], build=tree)
    with pytest.raises(SystemExit):
        __main__.main(["run", "--fast"])


def test_a_foreign_notebook_never_counts(tree, capsys):
    """Kind 10: neither for the ledger nor for the README."""
    own = add(tree, "00_a", "print('own')")
    record = "import os\nprint(repr(os.environ['WORKBOOK_DEFAULT_RUN']))"
    (tree / "elsewhere").mkdir()
    foreign = add(tree, "00_b", record).rename(tree / "elsewhere" / "00_a.ipynb")
    assert runner.run([foreign], build=tree / "build") == []
    (folder,) = (tree / "build" / "runs").iterdir()
    assert texts(folder / "00_a.ipynb") == "''\n"
    assert "With notebooks of your own" in capsys.readouterr().out
    assert [path.name for path in (tree / "build").iterdir()] == ["runs"]
    before = (tree / "README.md").read_text(), foreign.read_bytes()
    with pytest.raises(notebooks.UserError, match="is not a notebook of .*notebooks"):
        runner.refresh([foreign], build=tree / "build")
    with pytest.raises(notebooks.UserError, match="Two notebooks are called 00_a"):
        runner.run([own, foreign], build=tree / "build")
    assert before == ((tree / "README.md").read_text(), foreign.read_bytes())


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_of_another_encoding_loses_a_letter_and_nothing_else(
    tree, monkeypatch, encoding
):
    """Kind 24."""
    add(tree, "00_bad", "θ = 1 / 0  # →")
    add(tree, "01_good", "print('θ')")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("WORKBOOK_BUILD", str(tree / "build"))
    assert __main__.main(["run"]) == 1
    terminal.flush()
    out = terminal.buffer.getvalue().decode(encoding)
    assert "FAILED 00_bad" in out and "? = 1 / 0  # ?" in out and "finished 01_good" in out
    assert (tree / "build" / "ledger.json").exists()
    assert texts(tree / "build" / "01_good.ipynb") == "θ\n"


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_one_sentence(
    tree, capsys, monkeypatch
):
    """Kind 25."""
    add(tree, "00_a", "1")
    (tree / "build").write_text("a file")
    monkeypatch.setenv("WORKBOOK_BUILD", str(tree / "build"))
    assert __main__.main(["run"]) == 2
    said = capsys.readouterr().err
    assert str(tree / "build") in said and said.count("\n") == 1
    monkeypatch.setenv("WORKBOOK_BUILD", str(tree / "other"))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "ledger.json")

    monkeypatch.setattr(results, "write", full)
    assert __main__.main(["run"]) == 2
    assert capsys.readouterr().err == "ledger.json: No space left on device.\n"
    assert (tree / "other" / "00_a.ipynb").exists()  # what was computed is there


def test_only_files_that_exist_are_named(tree, capsys, monkeypatch):
    """Kind 31: a process that dies at once, where an earlier run left files."""
    add(tree, "00_a", "1")
    (tree / "build").mkdir()
    for name in ("00_a.failed.ipynb", ".00_a.partial.ipynb"):
        (tree / "build" / name).write_text("of an earlier run")
    monkeypatch.setattr(sys, "executable", shutil.which("false") or sys.executable)
    assert runner.run(build=tree / "build") == ["00_a"]
    out = capsys.readouterr().out
    assert "its process ended with 1" in out and "as far as it came" not in out
    assert not list((tree / "build").glob("*00_a*"))


def test_a_part_of_a_notebook_is_no_result(tree, capsys, monkeypatch):
    """Kind 25: what a full disk leaves is removed, not offered."""
    add(tree, "00_a", "1")
    partial, script = tree / "build" / ".00_a.partial.ipynb", tree / "full"
    script.write_text(f"""#!/bin/sh\nprintf '{{"cells": [' > '{partial}'\nexit 1\n""")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert runner.run(build=tree / "build") == ["00_a"]
    assert "as far as it came" not in capsys.readouterr().out
    assert not list((tree / "build").glob("*00_a*"))


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_path_with_an_accent_runs_in_every_locale(tree, locale):
    """Kind 24, and with Python's own remedy for LANG=C turned off."""
    build = tree / "b é"
    add(tree, "00_a", "print('fine')")
    code = (
        "import sys; from pathlib import Path; from helpers.workbook import notebooks, runner\n"
        "runner.ROOT = notebooks.ROOT = Path(sys.argv[1])\n"
        "sys.exit(bool(runner.run(build=Path(sys.argv[2]))))"
    )
    strict = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(tree), str(build)]
    done = subprocess.run(command, env={**os.environ, **strict}, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fine" in texts(build / "00_a.ipynb")


def test_another_clone_is_refused_and_doctor_says_whose_helpers_are_imported(
    tree, capsys, monkeypatch
):
    """Kind 30."""
    (tree / "helpers" / "__main__.py").touch()
    monkeypatch.chdir(tree / "notebooks")
    assert doctor.other_clone(ROOT / "notebooks") is None
    assert __main__.main(["run"]) == 2
    said = capsys.readouterr().err
    assert f"You are in the clone {tree}" in said and str(ROOT) in said
    assert said.count("\n") == 1
    good, found = doctor._clone()
    assert not good and str(tree) in found and str(ROOT) in found
    monkeypatch.chdir(tree / "notebooks" / "..")
    monkeypatch.setattr(doctor, "ROOT", tree)  # a clone where another one is installed
    good, found = doctor._clone()
    assert not good and str(ROOT) in found and "not those of" in found


POSIX = {
    "fork",
    "forkpty",
    "sched_getaffinity",
    "sysconf",
    "getuid",
    "geteuid",
    "killpg",
    "getpgid",
}
POSIX |= {"setsid", "mkfifo", "umask", "SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "setrlimit"}
POSIX_MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty"}


@pytest.mark.parametrize("path", sorted((ROOT / "helpers").rglob("*.py")), ids=lambda p: p.stem)
def test_what_only_posix_has_stands_behind_a_guard(path):
    """On Windows there is none of it: use it inside `try`, or after a look at os.name."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    guarded = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) or (
            isinstance(node, ast.If) and "os.name" in ast.unparse(node)
        ):
            guarded |= set(map(id, ast.walk(node)))
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        where = f"{path.name}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.attr not in POSIX, where
            assert (node.value.id, node.attr) != ("os", "kill"), where
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & POSIX_MODULES, where
        if isinstance(node, ast.keyword):
            assert node.arg != "preexec_fn", where
        if isinstance(node, ast.Call) and "get_context" in ast.unparse(node.func):
            assert "fork" not in ast.unparse(node), where
        if isinstance(node, ast.Call) and re.search(
            r"\.(read|write)_text$", ast.unparse(node.func)
        ):
            assert "encoding" in ast.unparse(node), f"{where}: Windows reads another encoding"


# -- parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [("3", 3), ("0.5", 0.5), ("1e-3", 0.001), ("True", True), ("None", None), ("a b", "a b")],
)
def test_values_on_the_command_line(text, value):
    parsed = parameters.parse_value(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("depth", [12, 16, 24, 26, 28, 30, 32])
@each_notebook
def test_another_model_has_its_layers_at_the_same_depth_and_none_of_the_defaults_own(path, depth):
    own = notebooks.parameters_of(notebooks.read(path))
    found = parameters.by_rule(own, "another", depth)
    assert found["MODEL"] == "another" and found["SWEEP"] == "live"
    assert found["RADIUS"] == found["RADII"] == parameters.CALIBRATED
    assert 0 <= found["SOURCE_LAYER"] < found["TARGET_LAYER"] < depth
    assert abs(found["SOURCE_LAYER"] / depth - own["SOURCE_LAYER"] / 30) < 1 / depth
    assert all(found[name] is None for name in own if name.endswith("ORGANISM"))
    for name in {"BLOCKS", "LAYERS", "SOURCES"} & set(own):
        assert found[name] == sorted(set(found[name])) and found[name][-1] < depth
    if depth == 30:
        assert all(found[name] == own[name] for name in parameters.LAYERS if name in own)


def test_a_recipe_hands_none_to_the_notebooks_that_have_organisms():
    paths = notebooks.resolve(["00", "05"])
    first, second = parameters.for_notebooks(paths, {}, {"ORGANISM": None}).values()
    assert first == {} and second == {"ORGANISM": None}
    assert "ORGANISM = None\n" in PythonTranslator.codify(second)


def test_a_recipe_runs_a_part_of_its_notebooks_too():
    paths = notebooks.resolve(["00"])
    recipe = {"MODEL": "m", "SOURCE_LAYER": 3, "ORGANISM": None, "BLOCKS": [1], "RADIUS": 3.0}
    found = parameters.for_notebooks(paths, {"RADIUS": 4.0}, recipe)
    assert found == {paths[0]: {"MODEL": "m", "SOURCE_LAYER": 3, "RADIUS": 4.0}}
    unknown = pytest.raises(notebooks.UserError, match="has a parameter 'NO_SUCH'")
    with unknown:
        parameters.for_notebooks(paths, {}, {**recipe, "NO_SUCH": 1})
    with pytest.raises(notebooks.UserError, match="has a parameter 'ORGANISM'"):
        parameters.for_notebooks(paths, {"ORGANISM": None}, {})


def test_calibrated_becomes_numbers_of_the_model(capfd, tiny):
    paths = notebooks.resolve(["00", "03"])
    typed = {"SOURCE_LAYER": 1, "STEPS": 2}
    found = parameters.for_notebooks(paths, typed, {}, "tiny-random")
    first, third = found.values()
    radius = first["RADIUS"]
    assert f"block 1 to 4: the calibrated radius is {radius:g}" in capfd.readouterr().out
    assert first["STEPS"] == 2 and "RADII" not in first and third["RADIUS" in third or "SWEEP"]
    assert third["RADII"] == pytest.approx([s * radius for s in parameters.SPREAD], rel=0.1)
    chats = [tiny.chat_prompt(text) for text in prompts.texts("everyday", split="train", n=3)]
    span = LayerSpan(tiny, chats, 1, 4, slice(-3, None))
    low, high = training.jacobian_ratio(span, [radius / 1.15, radius * 1.15], n_directions=30)
    assert low < 0.5 < high
    own = {"MODEL": "no such model", "RADIUS": 3.0}  # a number of one's own: nothing is loaded
    assert parameters.for_notebooks(paths[:1], {}, own) == {paths[0]: own}


def test_the_default_model_by_name_is_a_default_run():
    from helpers.models import DEFAULT

    paths = notebooks.resolve(["00"])
    assert parameters.for_notebooks(paths, {}, {}, DEFAULT) == {paths[0]: {}}


KINDS = {"RADIUS": 10.0, "N": 3, "RADII": [1.0, 2.0], "NAME": "a", "ORGANISM": "b", "GRIDS": None}


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("RADIUS", "1e1", 10.0),
        ("RADIUS", "10", 10.0),
        ("RADIUS", "calibrated", "calibrated"),
        ("N", "1e1", 10),
        ("RADII", "[4, 8]", [4.0, 8.0]),
        ("RADII", "[1e1]", [10.0]),
        ("NAME", "42", "42"),
        ("NAME", "None", "None"),
        ("ORGANISM", "None", None),
        ("GRIDS", "None", None),
    ],
)
def test_what_is_typed_and_what_a_recipe_holds_are_read_alike(tree, name, text, value):
    """Kind 22."""
    path = tree / "recipe.yaml"
    path.write_text(f"{name}: {text}")
    _, recipe = parameters.read_recipe(path)
    for given in (text, recipe[name]):
        found = parameters.fitted(name, given, KINDS[name])
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("RADIUS", "[1]"),
        ("RADIUS", True),
        ("N", "2.5"),
        ("N", "many"),
        ("RADII", "4.0"),
        ("RADII", "[1, 'x']"),
        ("NAME", [1]),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value):
    """Kind 22."""
    with pytest.raises(notebooks.UserError, match=f"^{name} is .*: it has to be .*, such as "):
        parameters.fitted(name, value, KINDS[name])


def test_a_recipe_names_notebooks_as_they_are_called(tree):
    """Kind 22: to YAML, 00 is the number 0."""
    path = tree / "recipe.yaml"
    path.write_text("notebooks: [00, 02b, '01', 08]")
    assert parameters.read_recipe(path)[0] == ["00", "02b", "01", "08"]


def test_a_model_beside_the_person_is_found_from_where_notebooks_run(tree, monkeypatch):
    """Kind 23."""
    path = add(tree, "00_a", "1", known="MODEL = 'x'\nRADIUS = 1.0")
    (tree / "elsewhere" / "mymodel").mkdir(parents=True)
    monkeypatch.chdir(tree / "elsewhere")
    monkeypatch.setenv("HOME", str(tree))
    monkeypatch.setenv("USERPROFILE", str(tree))
    for typed, found in (
        ("mymodel", str(tree / "elsewhere" / "mymodel")),
        ("~/elsewhere/mymodel", str(tree / "elsewhere" / "mymodel")),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
    ):
        assert parameters.for_notebooks([path], {"MODEL": typed}, {}) == {path: {"MODEL": found}}


def opening(path):
    """(parameters, code): the committed ones, and the statements that check them."""
    nb = notebooks.read(path)
    (cell,) = [cell for cell in nb.cells if "parameters.check(" in cell.source]
    (given,) = notebooks.tagged(nb, "parameters")
    code = nb.cells[nb.cells.index(given) + 1 : nb.cells.index(cell)]
    before = [other.source for other in code if other.cell_type == "code"]
    statements = [line for source in before for line in ast.parse(source).body]
    imports = [line for line in statements if isinstance(line, (ast.Import, ast.ImportFrom))]
    assert statements == imports, "only imports between the parameters and their check"
    lines = []
    for line in ast.parse(cell.source).body:
        text = ast.unparse(line)
        if isinstance(line, (ast.Expr, ast.Assign)) and ("parameters." in text or "least" in text):
            lines.append(text)
    return notebooks.parameters_of(nb), "\n".join(lines)


def variants(name, value):
    """(value, whether it is refused): smallest, largest, reversed, single, empty."""
    if isinstance(value, list):
        yield from ((value[::-1], False), (value[:1], False), ([], True), (value * 2, True))
        yield from ((value[0], True), ([None], True))
    elif name in ("SOURCE_LAYER", "TARGET_LAYER"):
        yield from ((-1, True), (30, True), (29, name == "SOURCE_LAYER"))
        yield from ((0, name == "TARGET_LAYER"), (1.5, True))
    elif isinstance(value, int):
        yield from ((1, False), (-1, True), (10**6, name in ("N_VECTORS", "CONTROL_LAYER")))
        yield from ((0, not name.endswith(("SEED", "LAYER"))), (True, True))
    elif isinstance(value, float):
        yield from ((1e-6, False), (1e6, False), (0.0, True), (float("nan"), True))
    elif name in ("SPLIT", "SWEEP", "PLACE"):
        yield ("other", True)


@each_notebook
def test_a_notebook_refuses_what_cannot_be_in_the_cell_after_the_parameters(path):
    """Kind 16: every parameter at its smallest, largest, reversed, single and empty value."""
    committed, code = opening(path)
    lm = SimpleNamespace(n_layers=30, d_model=576)
    more = re.findall(r"([A-Z_]+)=\d", code)  # names that must be more than the smallest
    for name, value in committed.items():
        many = isinstance(value, list)
        for other, refused in [(value, False), *variants(name, value)]:
            refused |= name in more and other == (value[:1] if many else 1)
            if path.stem == "explorer" and other in (30, 0, 29, 10**6) and name != "STEPS":
                continue  # it has no model at that point: LayerSpan refuses later
            names = {**committed, name: other, "parameters": parameters, "lm": lm}
            try:
                exec(code, names)
            except notebooks.UserError as error:
                assert refused, f"{name} = {other!r}: {error}"
                assert name in str(error) or repr(other) in str(error)
                assert "\n" not in str(error)
            else:
                assert not refused, f"{name} = {other!r} is not refused"


def test_layers_of_another_depth_are_taken_at_the_same_depth_and_that_is_said(capsys):
    """Kind 14: the blocks of 02b on a model of 18."""
    lm = SimpleNamespace(n_layers=18)
    blocks = [3, 7, 11, 15, 19, 23]
    assert parameters.at_depth(blocks, lm, below=17) == [1, 4, 6, 9, 11, 13]
    assert "[1, 4, 6, 9, 11, 13]" in capsys.readouterr().out
    assert parameters.at_depth([16, 1], lm, below=17) == [16, 1]
    assert parameters.at_depth([11, 15], lm, below=9) == [6]
    assert parameters.at_depth(blocks, SimpleNamespace(n_layers=30), below=29) is blocks
    with pytest.raises(notebooks.UserError, match="none lies below 3"):
        parameters.at_depth([15], lm, below=3)


# -- the committed notebooks -------------------------------------------------------------------


def test_refresh_cleans_and_is_idempotent(tree, capsys):
    source = (
        "import sys, time\nfrom pathlib import Path\nfrom tqdm.auto import tqdm\n"
        "for _ in tqdm(range(2)):\n    print(_, flush=True); time.sleep(.05)\n"
        "print(Path.home() / 'x', Path.cwd() / 'y')"
    )
    path = add(tree, "00_a", source, "import ipywidgets\nipywidgets.IntSlider()", "RADIUS")
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].metadata["nbmake"] = {"mock": {"RADIUS": 1}}
    nb.metadata["papermill"] = {"version": "1"}
    nb.cells[2].metadata["execution"] = {"iopub.status.busy": "2024"}
    nbformat.write(nb, path)
    assert any("not those of its present source" in problem for problem in notebooks.check())
    assert runner.refresh(build=tree / "build") == [] and notebooks.check() == []
    once = path.read_bytes()
    nb = nbformat.read(path, as_version=4)
    assert texts(path) == "0\n1\n~/x ./y\n"
    assert nb.cells[3].outputs == [] and nb.cells[4].outputs[0].data == {"text/plain": "10.0"}
    assert set(nb.metadata) == {"kernelspec", "language_info", "workbook"}
    assert nb.cells[1].metadata == {"nbmake": {"mock": {"RADIUS": 1}}, "tags": ["parameters"]}
    assert nb.cells[2].metadata == {"tags": []}
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


def cell(number, **changes):
    return lambda nb: nb.cells[number - 1].update(**changes)


def tags(number, *names):
    return lambda nb: nb.cells[number - 1].metadata.update(tags=list(names))


def output(kind, **fields):
    return lambda nb: nb.cells[2].outputs.append(new_output(kind, **fields))


def shown(**data):
    return output("display_data", data={"/".join(k.split("_")): v for k, v in data.items()})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (cell(3, source="print(2)"), "not those of its present source"),
        (cell(3, execution_count=7), "not executed once each from top to bottom"),
        (cell(3, execution_count=None), "not executed once each from top to bottom"),
        (lambda nb: nb.metadata.update(widgets={notebooks.WIDGET_STATE: {}}), "widget state"),
        (lambda nb: nb.cells[1].metadata.update(papermill={}), "traces of an execution"),
        (output("error", ename="ValueError", evalue="", traceback=[]), "an error: ValueError"),
        (output("stream", name="stderr", text="Warning"), "cell 3 writes to stderr: 'Warning'"),
        (output("display_data", data={notebooks.WIDGET_VIEW: {}}), "whose state is not committed"),
        (output("stream", name="stdout", text="/home/ann/x"), "of this machine: '/home/ann/x'"),
        (shown(text_html="<a href='C:\\Users\\ann'>"), "names a path of this machine"),
        (shown(text_plain="x" * 1_000_001), "bytes, more than 1,000,000"),
        (cell(3, source="a = 1\n" * 26), "cell 3 has 26 lines, more than 25"),
        (tags(2), "0 cells tagged 'parameters'"),
        (tags(3, "parameters"), "2 cells tagged 'parameters'"),
        (cell(2, source="RADIUS = 2 * 5"), "'RADIUS = 2 * 5', which is not NAME = literal"),
        (cell(2, source="RADIUS ="), "invalid syntax"),
    ],
)
def test_check_finds(tree, spoil, message):
    path, nb = clean_notebook(tree)
    assert notebooks.check() == []
    spoil(nb)
    nbformat.write(nb, path)
    found = [problem for problem in notebooks.check() if message in problem]
    assert found and found[0].startswith("00_a.ipynb: "), notebooks.check()


def test_the_command_line(tree, capsys):
    path, nb = clean_notebook(tree)
    assert __main__.main(["check"]) == 0
    assert "current, in order and clean" in capsys.readouterr().out
    nb.cells[2].source = "print(2)"
    nbformat.write(nb, path)
    assert __main__.main(["check", str(path)]) == 1 and "present source" in capsys.readouterr().out


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
    assert re.search(r"\d+ minutes?", opening.source), "its minutes come first"
    assert re.search(r"claim", opening.source, re.I), "its claims come first"
    (given,) = notebooks.tagged(nb, "parameters")
    mock = given.metadata.get("nbmake", {}).get("mock", {})
    assert mock.get("MODEL") == "tiny-random" and set(mock) <= set(notebooks.parameters_of(nb))
    words = "".join(value for value in mock.values() if isinstance(value, str))
    assert not set("'\\") & set(words)  # nbmake does not escape
    assert notebooks.tagged(nb, "exercise"), "no exercise"


@each_notebook
def test_visible_code_comes_in_short_steps(path):
    """At most two visible code cells in a row, none over 20 lines, half of them at most 6."""
    lengths, in_a_row = [], 0
    for cell in notebooks.read(path).cells:
        folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        tags = cell.metadata.get("tags", [])
        assert folded == ("hide-input" in tags), "folded in Jupyter and on the page, or in neither"
        if cell.cell_type != "code":
            in_a_row = 0
        elif folded:
            assert cell.source.startswith("# "), "a folded cell says what is inside"
        else:
            in_a_row += 1
            assert in_a_row <= 2, f"three in a row: {cell.source[:60]!r}"
            lengths.append(sum(bool(line.strip()) for line in cell.source.splitlines()))
    assert max(lengths) <= 20 and statistics.median(lengths) <= 6


@pytest.mark.parametrize("n_vectors, steps, radius", [(1, 1, 0.5), (3, 4, 2.0)])
def test_the_method_of_notebook_02_is_that_of_helpers(tiny, n_vectors, steps, radius):
    nb = notebooks.read(ROOT / "notebooks" / "02_training_one_vector.ipynb")
    (method,) = notebooks.tagged(nb, "method")
    names = {name: getattr(training, name) for name in ("normalise", "orthonormalise")}
    names["torch"] = torch
    exec(method.source, names)
    span = LayerSpan(tiny, ["What is the time?", "Hello"], 1, 4, target_positions=slice(-3, None))
    start = training.random_vectors(span, radius, n_vectors, seed=3, orthogonal=True).tensor

    def objective(theta):
        return span.delta(theta).norm(dim=-1).pow(2).sum(-1).mean(1)

    ours = names["workbook_melbo"](objective, start, radius, steps)
    theirs = training.train(span, radius, n_vectors, steps=steps, seed=3, progress=False).vectors
    torch.testing.assert_close(ours, theirs.tensor, rtol=1e-3, atol=1e-4 * radius)


# -- benchmarks: what they count is right, and they run through; no time is asserted -----------

TINY = dict(vectors=4, tokens=8, distance=2, steps=1, depth=6, width=96)
AXES = {
    "vectors": (2, 4, 8),
    "tokens": (6, 12, 24),
    "distance": (2, 4, 8),
    "steps": (1, 2, 4),
    "depth": (4, 8),
    "width": (96, 192),
}


@pytest.fixture(scope="module")
def record():
    return bench.scaling(AXES, TINY, repeats=1, counts=(2,), n_cells=2, sizes=TINY)


def test_nothing_is_worse_than_linear(record):
    """By arithmetic and memory, which are the same on every machine."""
    exponents = {axis: found["exponents"] for axis, found in record["axes"].items()}
    for axis in ("vectors", "distance", "steps", "depth"):
        assert exponents[axis]["arithmetic"] < 1.02 and exponents[axis]["memory"] < 1.02, axis
    assert exponents["vectors"]["arithmetic"] == pytest.approx(1, abs=1e-3)
    assert exponents["steps"]["memory"] == pytest.approx(0, abs=0.1)
    assert exponents["width"]["arithmetic"] == pytest.approx(2, abs=0.1)  # matrices
    assert list(record["workers"]) == [2] and record["workers"][2] > 0


def test_memory_is_what_the_allocator_holds(capfd):
    def run(n=10**6):
        x = torch.zeros(n)  # 4 MB
        y = x + 1  # 8 MB at once
        del x
        return y * 2  # 8 MB again

    assert bench.peak_bytes(run) == pytest.approx(8e6, rel=0.01)
    assert bench.peak_bytes(lambda: None) == 0


@pytest.mark.parametrize(
    "sizes, values, slope",
    [([1, 2, 4], [3, 6, 12], 1), ([1, 2, 4], [5] * 3, 0), ([1, 10], [1, 100], 2)],
)
def test_an_exponent_is_a_slope_of_logs(sizes, values, slope):
    assert bench.exponent(sizes, values) == pytest.approx(slope, abs=1e-9)


def test_operations_are_counted_as_by_hand():
    span = bench.span_of({**TINY, "depth": 4})
    blocks = span.lm.blocks[2:4]
    weights = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2)
    attention = 2 * 2 * 2 * 96 * 8 * 8  # blocks, QKᵀ and PV, × and +, width, tokens squared
    counted = bench.flops(lambda: training.value(span, torch.ones(1, 96)))
    assert counted - 2 * 8 * weights in (0, attention)


def test_the_published_loop_and_power_iteration_meet(tiny):
    found = bench.against_published(tiny, steps=3, n_vectors=2, source=1, target=4)
    assert found["published_steps"] == 3 >= found["tuned_steps"]
    assert all(value > 0 for name, value in found.items() if name.endswith("seconds"))
    assert list(found["power"]) == list(bench.WAYS)
    for name, way in found["power"].items():
        assert way["reached"] and way["seconds"] > 0 and way["faster"] > 0
        assert way["objective"] >= found["objective"] > 0
        alike = way["median_cosine_to_full_precision"]
        assert 0.9 < alike <= 1.0001 and ("mixed" in name or alike == pytest.approx(1))


def test_completions_are_timed_against_plain_generation(tiny):
    found = bench.completions(tiny, n_vectors=3, source=1, max_new_tokens=3)
    assert list(found) == ["generate", "complete", "complete, mixed", "same_texts"]
    assert all(number > 0 for number in list(found.values())[:3]) and 0 <= found["same_texts"] <= 1
    assert bench.share_of_products(tiny, n_vectors=2, source=1, target=3) > 0


def test_the_records_of_a_card_on_a_cpu(tiny):
    same = bench.parity("tiny-random", "cpu", source=1, target=3, n_vectors=2, steps=2)
    assert same == {"lowest_cosine": pytest.approx(1), "objective_off_by": 0}
    run = bench.many_vectors(tiny, source=1, target=3, n_vectors=6, steps=2)
    assert run["vectors"] == 6 and run["seconds"] > 0 and run["tflops_per_second"] > 0
    batches = bench.generation(tiny, (1, 2), source=1, max_new_tokens=3)
    assert [one["batch"] for one in batches] == [1, 2]
    json.dumps([same["objective_off_by"], run, batches])


def test_the_bench_command_writes_a_record(record, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "scaling", lambda: record)
    assert __main__.main(["bench", "--scaling", "--out", str(tmp_path / "new")]) == 0
    written = json.loads((tmp_path / "new" / "scaling.json").read_text())
    assert written["machine"]["torch"] == torch.__version__ and "axes" in written
    assert written["command"] == "python -m helpers bench --scaling"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert __main__.main(["bench", "--gpu", "--out", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "There is no CUDA device here" in said and said.count("\n") == 1
    assert not (tmp_path / "none").exists()


# -- the package, the command line and the files around it -------------------------------------


def test_rooms_import_one_way_and_the_explorer_no_torch():
    """The contracts of pyproject.toml."""
    broken = lint_imports(str(ROOT / "pyproject.toml"), no_cache=True)
    assert not broken, "make lint says which"


def test_doctor_here_and_where_nothing_is_installed(capsys):
    assert __main__.main(["doctor"]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "as pinned" in out and len(out.splitlines()) <= 24
    bare = [sys.executable, "-S", "-m", "helpers"]
    asked = {"cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run([*bare, "doctor"], **asked)
    assert done.returncode == 1 and "missing" in done.stdout and done.stderr == ""
    assert "pip install -r" in done.stdout
    done = subprocess.run([*bare, "run"], **asked)
    assert done.returncode == 2 and "doctor says what is missing" in done.stderr
    assert done.stderr.count("\n") == 1


def test_sweep_computes_those_that_are_named(monkeypatch, capsys):
    from helpers import studies

    asked = []
    monkeypatch.setattr(studies, "names", lambda: ("one", "two"), raising=False)
    monkeypatch.setattr(studies, "run", lambda *given: asked.append(given), raising=False)
    assert __main__.main(["sweep", "two", "--workers", "1"]) == 0
    assert __main__.main(["sweep", "--model", "m", "--prompts", "other"]) == 0
    assert asked == [
        ("two", None, 1, "everyday"),
        ("one", "m", 2, "other"),
        ("two", "m", 2, "other"),
    ]
    assert __main__.main(["sweep", "three"]) == 2
    assert "There is no sweep 'three'; there are one, two." in capsys.readouterr().err


README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def commands():
    """Shell commands of the README, one a piece: its code blocks' lines and its inline code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))
    lines = "\n".join([*blocks, *inline]).splitlines()
    pieces = [piece for line in lines for piece in re.split(r"&&|;|\|", line)]
    return [piece.split("#")[0].strip(" $") for piece in pieces]


def test_make_targets_exist():
    words = []
    for command in commands():
        if re.match(r"make\s", command):
            words += [word for word in command.split()[1:] if not re.match(r"-|.*=", word)]
    assert {"run", "test"} <= set(words) <= set(re.findall(r"^([a-z]+):", MAKEFILE, re.M))


def test_helper_commands_exist_and_have_the_options_shown():
    parser = __main__.parser()
    named = set()
    for command in commands():
        words = re.split(r"-m helpers\s+", command)
        if len(words) == 2 and words[1] and not re.search(r"…|\[", words[1]):
            options = parser.parse_args(words[1].split())  # exits, and so fails, where wrong
            assert isinstance(options, argparse.Namespace)
            named.add(options.command)
    assert {"run", "doctor"} <= named


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#\s]+)", README) + re.findall(r'src="([^"]+)"', README)
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_every_requirement_is_pinned_and_has_its_reason():
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and line[0] != "#"]
    wrong = [x for x in lines if not re.fullmatch(r"([\w.-]+==[\w.]+|-e \.)\s+# \S.{10,}", x)]
    assert wrong == [] and lines[-1].startswith("-e .")
    assert len(doctor.pins()) == len(lines) - 1 and doctor.pins()["torch"] == "2.13.0"


def test_environment_points_to_the_one_list():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["dependencies"][-1] == {"pip": ["-r requirements.txt"]}
    assert "pip" in environment["dependencies"]


def test_ci_checks_style_then_runs_the_two_commands():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    lines = script.read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines
    made = [line for line in lines if line.startswith("make ")]
    assert made == ["make lint", "make test", "make run"]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_refuses_an_old_python(tmp_path):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", "run", f"PYTHON={old}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_results_in_the_readme_are_the_last_verdicts():
    assert set(results.MARKS) <= set(README.splitlines())
    listed = dict(re.findall(r"^\| \**(.+?)\** \| .*\| ([\w ]+) \|$", README, re.M))
    for claim in ledger.claims().values():
        last = claim["last_verdict"] or "not attempted"
        assert listed.get(claim["claim"]) == last, claim["id"]
