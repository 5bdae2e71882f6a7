"""Sweeps: nothing computed twice, nothing lost, the same results on every executor. Workers import this module's functions."""

import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest

from helpers import UserError, ledger
from helpers.studies import sweeps

ROOT = Path(__file__).resolve().parents[1]


def note(folder, name):
    """One line for each call: what was really computed."""
    with open(Path(folder) / "calls", "a") as file:
        file.write(f"{name}\n")


def calls(folder):
    path = Path(folder) / "calls"
    return sorted(path.read_text().split()) if path.exists() else []


def square(x, folder=None, seconds=0):
    if folder:
        note(folder, x)
    time.sleep(seconds)
    return {"square": x * x, "pair": (x, numpy.float32(0.1)), "array": numpy.arange(2)}


def fails_on_two(x, folder):
    note(folder, x)
    if x == 2 and not (Path(folder) / "mended").exists():
        raise ZeroDivisionError("two is bad")
    return {"x": x}


def kills_its_worker_once(x, folder):
    """The worker that gets 2 first is killed in the middle of the run."""
    note(folder, x)
    killed = Path(folder) / "killed"
    if x == 2 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"x": x}


def no_dict(x):
    return [x]


def stubborn(x):
    raise KeyboardInterrupt


def interrupted_on_two(x, folder):
    return stubborn(x) if x == 2 and not (Path(folder) / "mended").exists() else square(x, folder)


def random_number(x):
    return {"number": os.urandom(8).hex()}


def objective(radius, seed):
    """Training and its objective in a small random model, to the last bit."""
    import torch

    from helpers.residual import LayerSpan
    from helpers.training import train

    lm = sweeps.model("tiny-random")
    result = train(
        LayerSpan(lm, lm.chat_prompt("hello"), 1, 4), radius, 2, steps=3, seed=seed, progress=False
    )
    return {
        "best": result.best,
        "vectors": result.vectors.tensor,
        "threads": torch.get_num_threads(),
    }


def quiet(*arguments, **more):
    return sweeps.run(*arguments, progress=False, **more)


def records(store, end=".json"):
    found = [
        json.loads(path.read_text())
        for path in sorted(Path(store).glob("*/*"))
        if path.name.endswith(end)
    ]
    return [record for record in found if ("error" in record) == (end != ".json")]


def whole(store):
    """Every file of a store is a result or a traceback in whole; nothing temporary was left."""
    names = [path.name for path in Path(store).glob("*/*")]
    return all(name.endswith(".json") and not name.startswith(".") for name in names) and len(
        records(store)
    ) == sum(".failed" not in name for name in names)


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- the grid ----------------------------------------------------------------------------------------------------------


def test_a_grid_is_a_product_and_single_values_stay():
    assert sweeps.grid(radius=[4, 8], seed=range(2), model="tiny") == [
        {"radius": 4, "seed": 0, "model": "tiny"},
        {"radius": 4, "seed": 1, "model": "tiny"},
        {"radius": 8, "seed": 0, "model": "tiny"},
        {"radius": 8, "seed": 1, "model": "tiny"},
    ]
    assert [config["x"] for config in sweeps.grid(x=numpy.arange(3))] == [0, 1, 2]
    assert quiet({"x": [1, 2]}, square) == quiet(sweeps.grid(x=[1, 2]), square)


@pytest.mark.parametrize(
    "grid, function, message",
    [
        ({"x": [1], "folder": []}, square, "The axis 'folder' of the grid is empty"),
        ([], square, "The grid is empty"),
        ([{"x": 1}, 7], square, "Entry 1 of the grid, 7, does not fit square"),
        ([{"y": 1}], square, "Entry 0 of the grid, {'y': 1}, does not fit square: .*'[xy]'"),
        ([{"x": float("nan")}], square, "does not fit square: .*JSON"),
        ([{"x": object()}], square, "does not fit square: .*is not JSON"),
        ([{"x": 1}], lambda x: {"x": x}, "has no name"),
        ([{"x": 1}], "square", "has no name"),
    ],
)
def test_bad_grids_are_one_sentence_and_write_nothing(tmp_path, grid, function, message):
    with pytest.raises(UserError, match=message) as caught:
        quiet(grid, function, store=tmp_path / "store")
    assert "\n" not in str(caught.value) and not (tmp_path / "store").exists()


# -- what is computed, and what is kept --------------------------------------------------------------------------------


def test_results_come_in_the_grids_order_and_plain():
    results = quiet([{"x": 3}, {"x": 1}, {"x": 3}], square)
    assert results[1] == {"square": 1, "pair": [1, float(numpy.float32(0.1))], "array": [0, 1]}
    assert [result["square"] for result in results] == [9, 1, 9] and results.computed == 2
    assert results.table()["square"].tolist() == [9, 1, 9] and results.table()["x"].tolist() == [
        3,
        1,
        3,
    ]


def test_a_second_run_computes_only_what_is_missing(tmp_path):
    store, folder = tmp_path / "store", str(tmp_path)
    first = quiet(sweeps.grid(x=[1, 2], folder=folder), square, store=store, model_hash="abc")
    again = quiet(sweeps.grid(x=[2, 3, 1], folder=folder), square, store=store, model_hash="abc")
    assert calls(tmp_path) == ["1", "2", "3"] and again.computed == 1
    assert [again[2], again[0]] == list(first) and whole(store)
    (record,) = [record for record in records(store) if record["config"]["x"] == 3]
    assert (
        record["result"] == again[1]
        and record["function"] == "test_sweeps.square"
        and record["model_hash"] == "abc"
    )
    assert record["code"] == sweeps.code_version(square) and {"python", "torch"} <= set(
        record["versions"]
    )
    quiet(sweeps.grid(x=[1, 2], folder=folder), square, store=store, model_hash="another model")
    assert calls(tmp_path) == ["1", "1", "2", "2", "3"]


def test_a_language_model_stands_for_its_weights(tmp_path, tiny):
    quiet({"x": 1}, square, store=tmp_path, model_hash=tiny)
    assert records(tmp_path)[0]["model_hash"] == tiny.weights_hash


def test_another_version_of_the_code_is_said_and_not_used(tmp_path, capsys):
    store, grid = tmp_path / "store", sweeps.grid(x=[1, 2], folder=str(tmp_path))
    quiet(grid, square, store=store, code="old")
    assert capsys.readouterr().out == ""
    quiet(grid, square, store=store, code="new")
    assert (
        "also holds 2 results of test_sweeps.square from another version of the code"
        in capsys.readouterr().out
    )
    assert len(calls(tmp_path)) == 4 and len(records(store)) == 4
    assert quiet(grid, square, store=store, code="old").computed == 0  # left as they were


def test_the_code_version_follows_imports_into_helpers(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "helpers", tmp_path / "helpers")
    shutil.copytree(ROOT / "data" / "prompts", tmp_path / "data" / "prompts")
    monkeypatch.setattr(sweeps, "ROOT", tmp_path)
    source = [
        "from helpers import figures",
        "from helpers.training import train",
        "def f(x):",
        "    from helpers import prompts",
    ]
    (tmp_path / "cell_of_a_test.py").write_text("\n".join(source))
    monkeypatch.syspath_prepend(str(tmp_path))
    import cell_of_a_test

    before = sweeps.code_version(cell_of_a_test.f)

    def changed(name):
        with open(tmp_path / name, "a") as file:
            file.write("\n")
        nonlocal before
        before, last = sweeps.code_version(cell_of_a_test.f), before
        return before != last

    assert changed("cell_of_a_test.py") and changed("helpers/training.py")
    assert changed("helpers/steering.py")  # by way of training
    assert (
        changed("data/prompts/everyday.json")
        and not changed("helpers/figures.py")
        and not changed("helpers/runner.py")
    )


def test_a_function_of_a_notebook_needs_a_version(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "a_notebook", type(sys)("a_notebook"))
    scope = {"__name__": "a_notebook"}
    exec("def f(x):\n    return {'x': x}", scope)
    assert quiet({"x": 1}, scope["f"]) == [{"x": 1}]
    assert quiet({"x": 1}, scope["f"], store=tmp_path / "store", code="1") == [{"x": 1}]
    with pytest.raises(UserError, match="f is defined in a notebook: use a module"):
        quiet({"x": 1}, scope["f"], store=tmp_path / "other")
    with (
        sweeps.pool(1) as pool,
        pytest.raises(UserError, match="where other processes cannot import it"),
    ):
        quiet({"x": 1}, scope["f"], pool)


def test_a_failure_stops_no_other_and_is_retried_alone(tmp_path, capsys):
    store, grid = tmp_path / "store", sweeps.grid(x=[1, 2, 3], folder=str(tmp_path))
    results = quiet(grid, fails_on_two, store=store)
    said = capsys.readouterr().out
    assert [result and result["x"] for result in results] == [1, None, 3] and list(
        results.failed
    ) == [1]
    assert results.computed == 2
    assert (
        "1 of 3 runs of fails_on_two failed" in said
        and "ZeroDivisionError: two is bad" in said
        and said.count("\n") == 1
    )
    assert "the same call again" in said and results.table()["x"].tolist() == [1, 3]
    (record,) = records(store, ".failed.json")
    assert (
        "two is bad" in record["error"]
        and "fails_on_two" in record["error"]
        and record["config"]["x"] == 2
    )
    (tmp_path / "mended").touch()
    assert [result["x"] for result in quiet(grid, fails_on_two, store=store)] == [1, 2, 3]
    assert (
        calls(tmp_path) == ["1", "2", "2", "3"]
        and not records(store, ".failed.json")
        and capsys.readouterr().out == ""
    )


def test_a_result_that_is_no_dict_is_a_failure():
    assert "returned [1], where a dict is needed" in quiet({"x": 1}, no_dict).failed[0]


def test_progress_counts_what_the_store_had(tmp_path, capsys):
    quiet({"x": [1]}, square, store=tmp_path)
    sweeps.run({"x": [1, 2]}, square, store=tmp_path)
    assert "square: 100%" in (said := capsys.readouterr().err) and "2/2" in said


# -- stores that fail --------------------------------------------------------------------------------------------------


def test_a_store_that_cannot_be_is_one_sentence_before_anything_is_computed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    stores = [tmp_path / "file", tmp_path / "file" / "below"] + [
        Path("/proc/sweep")
    ] * sys.platform.startswith("linux")
    for store in stores:
        with pytest.raises(UserError, match=f"The store {store} cannot be used") as caught:
            quiet(sweeps.grid(x=1, folder=str(tmp_path)), square, store=store)
        assert "\n" not in str(caught.value)

    def read_only(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(sweeps.tempfile, "TemporaryFile", read_only)
    with pytest.raises(UserError, match=os.strerror(errno.EROFS)):
        quiet(sweeps.grid(x=1, folder=str(tmp_path)), square, store=tmp_path / "store")
    assert calls(tmp_path) == [] and (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_fills_up_leaves_whole_results(tmp_path, monkeypatch):
    store, grid, replace, done = (
        tmp_path / "store",
        sweeps.grid(x=[1, 2, 3], folder=str(tmp_path)),
        os.replace,
        [],
    )

    def full(source, target):
        if done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done.append(replace(source, target))

    monkeypatch.setattr(ledger.os, "replace", full)
    with pytest.raises(
        UserError, match=f"cannot be used .{os.strerror(errno.ENOSPC)}.: free space"
    ):
        quiet(grid, square, store=store)
    assert whole(store) and len(records(store)) == 1
    monkeypatch.undo()
    assert quiet(grid, square, store=store).computed == 2 and whole(store)


def test_a_write_cut_short_leaves_no_part(tmp_path):
    """A real one: files of this process may not grow beyond 1,000 bytes, and the second result is longer."""
    pytest.importorskip("resource")
    script = (
        "import resource, sys; sys.dont_write_bytecode = True; from helpers import sweeps; import test_sweeps; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY)); "
        "grid = [{'text': 'a'}, {'text': 'a' * 2000}]; "
        f"sweeps.run(grid, test_sweeps.echo, store={str(tmp_path / 'store')!r}, progress=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )
    assert "UserError: The store" in done.stderr and os.strerror(errno.EFBIG) in done.stderr
    assert [record["result"] for record in records(tmp_path / "store")] == [
        {"text": "a"}
    ] and whole(tmp_path / "store")


def echo(text):
    return {"text": text}


def test_a_damaged_file_is_computed_again(tmp_path):
    quiet({"x": 1}, square, store=tmp_path)
    (path,) = tmp_path.glob("*/*.json")
    path.write_text(path.read_text()[:20])
    assert quiet({"x": 1}, square, store=tmp_path).computed == 1 and whole(tmp_path)


def test_an_interrupted_sweep_keeps_what_was_done(tmp_path):
    store, grid = tmp_path / "store", sweeps.grid(x=[1, 2, 3], folder=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        quiet(grid, interrupted_on_two, store=store)
    assert len(records(store)) == 1 and whole(store)
    (tmp_path / "mended").touch()
    assert quiet(grid, interrupted_on_two, store=store).computed == 2


# -- other processes ---------------------------------------------------------------------------------------------------


def test_a_pool_gives_what_this_process_gives(tmp_path, one_thread):
    here = quiet(sweeps.grid(radius=[2.0, 5.0], seed=[0, 1]), objective)
    with sweeps.pool(1) as pool:
        there = quiet(sweeps.grid(radius=[2.0, 5.0], seed=[0, 1]), objective, pool, store=tmp_path)
    assert there == here and {result["threads"] for result in here} == {1}
    assert here[0] != here[1] and here[0] != here[2]


def test_a_worker_killed_in_a_pool_leaves_the_rest_to_the_next_run(tmp_path, capsys):
    store, grid = tmp_path / "store", sweeps.grid(x=[0, 1, 2, 3], folder=str(tmp_path))
    with sweeps.pool(1) as pool:
        results = quiet(grid, kills_its_worker_once, pool, store=store)
        assert list(results[:2]) == [{"x": 0}, {"x": 1}] and list(results.failed) == [2, 3]
        assert (
            "2 of 4 runs" in (said := capsys.readouterr().out)
            and "BrokenProcessPool" in said
            and said.count("\n") == 1
        )
        assert (
            len(quiet(grid, kills_its_worker_once, pool, store=store).failed) == 2
        )  # the pool stays broken, and says so
    with sweeps.pool(1) as pool:
        assert quiet(grid, kills_its_worker_once, pool, store=store) == [{"x": x} for x in range(4)]
    assert calls(tmp_path) == ["0", "1", "2", "2", "3"] and whole(store)


def test_ctrl_c_ends_workers_quietly_and_keeps_results(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests were begun in the background
if __name__ == "__main__":
    from helpers.studies import sweeps
    import test_sweeps
    with sweeps.pool(2) as pool:
        sweeps.run(sweeps.grid(x=[1, 2, 3], seconds=[0, 60], folder={str(tmp_path)!r}), test_sweeps.square, pool,
                   store={str(tmp_path / "store")!r}, progress=False)
""")
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}"},
    )
    for _ in range(600):
        if len(calls(tmp_path)) >= 3 and records(
            tmp_path / "store"
        ):  # both workers are in a run of a minute, or will be
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    problem = process.communicate(timeout=30)[1]
    assert (
        process.returncode
        and problem.strip().endswith("KeyboardInterrupt")
        and problem.count("Traceback") == 1
    )
    assert records(tmp_path / "store") and whole(tmp_path / "store")


@pytest.mark.parametrize("workers, threads", [(0, 1), (1, 0)])
def test_a_pool_needs_a_worker_and_a_thread(workers, threads):
    with pytest.raises(UserError, match="at least 1 worker with 1 thread"):
        sweeps.pool(workers, threads)


def test_a_model_is_loaded_once_in_each_thread(monkeypatch):
    from helpers import models

    monkeypatch.setattr(models, "load", lambda name, organism, **how: object())
    monkeypatch.setattr(sweeps, "_models", threading.local())
    first, seen = sweeps.model("a"), []
    thread = threading.Thread(target=lambda: seen.append(sweeps.model("a")))
    thread.start()
    thread.join()
    assert sweeps.model("a") is first and seen[0] is not first
    assert sweeps.model("a", dtype="float32") is not first and sweeps.model("a") is first
    sweeps.model("b")  # the third: the one longest unused goes
    assert sweeps.model("a") is first and len(sweeps._models.loaded) == 2


# -- Dask --------------------------------------------------------------------------------------------------------------


def test_dask_gives_what_this_process_gives(client, tmp_path, one_thread):
    grid = sweeps.grid(radius=[2.0, 5.0], seed=[0, 1])
    here = quiet(grid, objective)
    assert quiet(grid, objective, client.get_executor(), store=tmp_path) == here and whole(tmp_path)
    assert quiet(grid, objective, client) == here
    assert (
        quiet(grid, objective, store=tmp_path).computed == 0
    )  # what Dask computed is found without Dask


def test_a_dask_worker_killed_in_the_middle_loses_nothing(client, tmp_path):
    store, grid = tmp_path / "store", sweeps.grid(x=list(range(12)), folder=str(tmp_path))
    results = quiet(grid, kills_its_worker_once, client, store=store)
    assert (
        (tmp_path / "killed").exists()
        and results == [{"x": x} for x in range(12)]
        and not results.failed
    )
    assert len(records(store)) == 12 and whole(store)


def test_dask_computes_a_failed_run_again(client, tmp_path, capsys):
    grid = sweeps.grid(x=[1, 2], folder=str(tmp_path))
    failed = quiet(grid, fails_on_two, client)
    (tmp_path / "mended").touch()
    assert "two is bad" in failed.failed[1] and not quiet(grid, fails_on_two, client).failed


def test_two_sweeps_over_one_store_agree(client, tmp_path):
    """At once, one on Dask and one here; and whoever comes second takes the first one's result."""
    store, found = tmp_path / "store", {}
    left, right = (
        sweeps.grid(x=list(range(20)), seconds=0.02),
        sweeps.grid(x=list(range(10, 30))[::-1], seconds=0.02),
    )
    threads = [
        threading.Thread(
            target=lambda n=n, g=g, e=e: found.update({n: quiet(g, square, e, store=store)})
        )
        for n, g, e in (("left", left, client), ("right", right, None))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        found["left"][10:] == found["right"][:9:-1] and len(records(store)) == 30 and whole(store)
    )
    first = quiet({"x": 1}, random_number, store=store)
    kept = sweeps._Store(store, random_number, None, None)
    assert kept.keep('{"x": 1}', {"result": {"number": "another"}}) == first[0]
    assert quiet({"x": 1}, random_number, client, store=store) == first


def test_after_the_scheduler_died_the_sweep_goes_on(tmp_path, capsys):
    distributed = pytest.importorskip("distributed")
    store, grid = (
        tmp_path / "store",
        sweeps.grid(x=list(range(6)), folder=str(tmp_path), seconds=0.3),
    )
    settings = dict(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    )
    cluster = distributed.LocalCluster(**settings)
    client = distributed.Client(cluster, timeout=2)

    def end():
        while len(records(store)) < 2:
            time.sleep(0.02)
        cluster.close()

    ending = threading.Thread(target=end)
    ending.start()
    results = quiet(grid, square, client, store=store)
    ending.join()
    client.close()
    there = len(records(store))
    assert 2 <= there < 6 and len(results.failed) == 6 - there and whole(store)
    assert (
        f"{6 - there} of 6 runs of square failed" in (said := capsys.readouterr().out)
        and "lost: " in said
    )
    with distributed.LocalCluster(**settings) as cluster, distributed.Client(cluster) as client:
        again = quiet(grid, square, client, store=store)
    assert again.computed == 6 - there and again == quiet(grid, square) and whole(store)


# -- the example for clusters ------------------------------------------------------------------------------------------


def test_the_slurm_example_runs_on_this_machine(tmp_path, monkeypatch, capsys):
    pytest.importorskip("distributed")

    from helpers.studies import goldilocks

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        goldilocks, "grids", lambda model, depth: {"goldilocks": sweeps.grid(x=range(3))}
    )
    monkeypatch.setattr(goldilocks, "run_cell", square)
    monkeypatch.setattr(
        sys, "argv", ["slurm_sweep.py", "--local", "1", "--model", "tiny-random", "--depth", "6"]
    )
    runpy.run_path(str(ROOT / "data" / "recipes" / "slurm_sweep.py"), run_name="__main__")
    assert (
        "3 of 3 runs are in build/sweeps" in capsys.readouterr().out
        and len(records(tmp_path / "build" / "sweeps")) == 3
    )


def test_the_slurm_example_writes_a_job_script(monkeypatch, capsys):
    pytest.importorskip("dask_jobqueue")
    monkeypatch.setattr(sys, "argv", ["slurm_sweep.py", "--show"])
    runpy.run_path(str(ROOT / "data" / "recipes" / "slurm_sweep.py"), run_name="__main__")
    script = capsys.readouterr().out
    assert (
        "#SBATCH --gres=gpu:1" in script
        and "WORKBOOK_THREADS=4" in script
        and "--nthreads 1" in script
    )


def test_both_lists_of_requirements_pin_the_same_dask():
    pins = [
        line.split()[0]
        for name in ("requirements.txt", "requirements-cluster.txt")
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        if line.startswith("distributed")
    ]
    assert len(set(pins)) == 1
