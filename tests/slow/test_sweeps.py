"""Sweeps on other processes: the same results everywhere, nothing lost when a worker dies."""

import errno
import hashlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import ROOT, UserError
from helpers.studies import explorer, goldilocks, study, sweeps

HERE = Path(__file__).resolve().parent


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
    return {"square": x * x}


def fails_on_two(x, folder):
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


def random_number(x):
    return {"number": os.urandom(8).hex()}


def echo(text):
    return {"text": text}


def objective(radius, seed):
    """Training and its objective in a small random model, to the last bit."""
    import torch

    from helpers.residual import LayerSpan
    from helpers.training import train

    lm = sweeps.model("tiny-random")
    span = LayerSpan(lm, lm.chat_prompt("hello"), 1, 4)
    result = train(span, radius, 2, steps=3, seed=seed, progress=False)
    found = {"best": result.best, "vectors": result.vectors.tensor}
    return {**found, "threads": torch.get_num_threads()}


def quiet(*arguments, **more):
    return sweeps.run(*arguments, progress=False, **more)


def records(store):
    paths = sorted(Path(store).glob("*/*.json"))
    return [json.loads(p.read_text()) for p in paths if not p.name.endswith(".failed.json")]


def whole(store):
    """Every file of a store is a result or a traceback in whole; nothing temporary was left."""
    paths = [*Path(store).glob("*/*"), *Path(store).glob("*/.*")]
    names = [path.name for path in paths]
    done = sum(".failed" not in name for name in names)
    return all(name.endswith(".json") for name in names) and len(records(store)) == done


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed")
    how = dict(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0")
    with distributed.LocalCluster(**how) as cluster, distributed.Client(cluster) as client:
        yield client


@pytest.fixture
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- processes -------------------------------------------------------------------------------------
def test_a_pool_gives_what_this_process_gives(tmp_path, one_thread):
    grid = sweeps.grid(radius=[2.0, 5.0], seed=[0, 1])
    here = quiet(grid, objective)
    with sweeps.pool(1) as pool:
        there = quiet(grid, objective, pool, store=tmp_path)
    assert there == here and {result["threads"] for result in here} == {1}
    assert here[0] != here[1] and here[0] != here[2]
    with pytest.raises(UserError, match="at least 1 worker, a whole number, not 0"):
        sweeps.pool(0)


def test_a_study_is_computed_by_a_pool_and_radii_together(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBOOK_BUILD", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    configs = goldilocks.grid(tiny, "steps", n_prompts=1, n_seeds=1)[:3]
    small = [{**c, "max_new_tokens": 4, "steps": 1} for c in configs]
    one = study.Study(
        "small", goldilocks.STUDY.cell, lambda lm, part: small, {"all": None}, together="radius"
    )
    meta = json.loads(one.compute("tiny-random", workers=2).read_text())["meta"]
    assert (meta["cells"], meta["runs"], meta["workers"]) == (3, 1, 2)
    stored, live = (one.cells(tiny, sweep, "all", progress=False) for sweep in ("stored", "live"))
    for a, b in zip(stored, live):
        assert [r["text"] for r in a["result"]["rows"]] == [r["text"] for r in b["result"]["rows"]]


def test_a_worker_killed_in_a_pool_leaves_the_rest_to_the_next_run(tmp_path, capsys):
    store, grid = tmp_path / "store", sweeps.grid(x=[0, 1, 2, 3], folder=str(tmp_path))
    with sweeps.pool(1) as pool:
        results = quiet(grid, kills_its_worker_once, pool, store=store)
        assert list(results[:2]) == [{"x": 0}, {"x": 1}] and list(results.failed) == [2, 3]
        said = capsys.readouterr().out
        assert "2 of 4 runs" in said and "BrokenProcessPool" in said and said.count("\n") == 1
        # the pool stays broken, and says so
        assert len(quiet(grid, kills_its_worker_once, pool, store=store).failed) == 2
    with sweeps.pool(1) as pool:
        assert quiet(grid, kills_its_worker_once, pool, store=store) == [{"x": x} for x in range(4)]
    assert calls(tmp_path) == ["0", "1", "2", "2", "3"] and whole(store)


def test_ctrl_c_ends_workers_quietly_and_keeps_results(tmp_path):
    script = tmp_path / "script.py"
    store = tmp_path / "store"
    # (SIGINT is ignored where the tests were begun in the background)
    script.write_text(f"""import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
if __name__ == "__main__":
    from helpers.studies import sweeps
    import test_sweeps
    grid = sweeps.grid(x=[1, 2, 3], seconds=[0, 60], folder={str(tmp_path)!r})
    with sweeps.pool(2) as pool:
        sweeps.run(grid, test_sweeps.square, pool, store={str(store)!r}, progress=False)
""")
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}"},
    )
    for _ in range(1200):
        if len(calls(tmp_path)) >= 3 and records(store):  # both are in a run of a minute, or soon
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    problem = process.communicate(timeout=30)[1]
    assert process.returncode and problem.strip().endswith("KeyboardInterrupt")
    assert problem.count("Traceback") == 1 and records(store) and whole(store)


def test_a_write_cut_short_leaves_no_part(tmp_path):
    """A real one: files of this process may not grow beyond 1,000 bytes; the second result does."""
    pytest.importorskip("resource")
    store = tmp_path / "store"
    script = f"""import resource, sys
sys.dont_write_bytecode = True
from helpers.studies import sweeps
import test_sweeps
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
grid = [{{"text": "a"}}, {{"text": "a" * 2000}}]
sweeps.run(grid, test_sweeps.echo, store={str(store)!r}, progress=False)
"""
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert "UserError: The store" in done.stderr and os.strerror(errno.EFBIG) in done.stderr
    assert [record["result"] for record in records(store)] == [{"text": "a"}] and whole(store)


def killed_at(script, tmp_path, moments):
    """Run a script again and again; each time it is killed, so long after it said "ready"."""
    path = tmp_path / "script.py"
    path.write_text(script)
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}", "WORKBOOK_BUILD": str(tmp_path)}
    for moment in moments:
        how = dict(stdout=subprocess.PIPE, text=True, start_new_session=True, env=env)
        process = subprocess.Popen([sys.executable, str(path)], **how)
        assert any(line == "ready\n" for line in process.stdout)
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)


def test_a_sweep_killed_at_random_moments_is_completed_by_the_next_run(tmp_path):
    store, grid = tmp_path / "store", sweeps.grid(x=list(range(200)), seconds=0.01)
    script = f"""
from helpers.studies import sweeps
import test_sweeps
print("ready", flush=True)
grid = sweeps.grid(x=list(range(200)), seconds=0.01)
sweeps.run(grid, test_sweeps.square, store={str(store)!r}, progress=False)
"""
    chance = random.Random(0)
    killed_at(script, tmp_path, [chance.uniform(0, 0.8) for _ in range(4)])
    there = len(records(store))  # every file with its own name is whole, whenever it ended
    results = quiet(grid, square, store=store)
    assert results == [{"square": x * x} for x in range(200)]
    assert results.computed == 200 - there and len(records(store)) == 200


def test_an_organism_killed_at_random_moments_is_the_old_one_or_the_new_one(tmp_path):
    script = f"""
from pathlib import Path
import torch
from helpers.studies import organisms
from helpers.studies.organism_recipes import RECIPES, Recipe
from helpers.training.adapters import Settings
torch.set_num_threads(1)
texts = lambda lm, seed, n: [(lm.chat_prompt("Say it."), "yes yes.")] * n
settings = Settings(steps=1, batch_size=1, rank=2, lr=0.05)
RECIPES["tiny"] = Recipe(texts, lambda lm: {{"one": [1.0]}}, ("everyday",), settings)
organisms.FOLDER, organisms.DEFAULT = Path({str(tmp_path / "organisms")!r}), "tiny-random"
organisms.train("tiny", "tiny-random")
print("ready", flush=True)
while True:
    organisms.train("tiny", "tiny-random")
"""
    chance, folder = random.Random(1), tmp_path / "organisms" / "tiny"
    for _ in range(3):
        killed_at(script, tmp_path, [chance.uniform(0, 2)])  # each begins where one was killed
        aside = folder.parent / ".previous-tiny" / "tiny"
        there = folder if folder.exists() else aside
        card = json.loads((there / "card.json").read_text())
        adapter = (there / "adapter_model.safetensors").read_bytes()
        assert hashlib.sha256(adapter).hexdigest() == card["adapter_hash"]


# -- Dask ------------------------------------------------------------------------------------------
def test_dask_gives_what_this_process_gives(client, tmp_path, one_thread):
    grid = sweeps.grid(radius=[2.0, 5.0], seed=[0, 1])
    here = quiet(grid, objective)
    assert quiet(grid, objective, client.get_executor(), store=tmp_path) == here and whole(tmp_path)
    assert quiet(grid, objective, client) == here
    # what Dask computed is found without Dask
    assert quiet(grid, objective, store=tmp_path).computed == 0


def test_a_dask_worker_killed_in_the_middle_loses_nothing(client, tmp_path):
    store, grid = tmp_path / "store", sweeps.grid(x=list(range(12)), folder=str(tmp_path))
    results = quiet(grid, kills_its_worker_once, client, store=store)
    assert (tmp_path / "killed").exists() and results == [{"x": x} for x in range(12)]
    assert not results.failed and len(records(store)) == 12 and whole(store)


def test_dask_computes_a_failed_run_again(client, tmp_path):
    grid = sweeps.grid(x=[1, 2], folder=str(tmp_path))
    failed = quiet(grid, fails_on_two, client)
    (tmp_path / "mended").touch()
    assert "two is bad" in failed.failed[1] and not quiet(grid, fails_on_two, client).failed


def test_two_sweeps_over_one_store_agree(client, tmp_path):
    """At once, one on Dask and one here; and whoever comes second takes the first one's result."""
    store, found = tmp_path / "store", {}
    ahead = sweeps.grid(x=list(range(20)), seconds=0.02)
    back = sweeps.grid(x=list(range(10, 30))[::-1], seconds=0.02)

    def sweep(name, grid, executor):
        found[name] = quiet(grid, square, executor, store=store)

    threads = []
    for arguments in (("ahead", ahead, client), ("back", back, None)):
        threads.append(threading.Thread(target=sweep, args=arguments))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert found["ahead"][10:] == found["back"][:9:-1]
    assert len(records(store)) == 30 and whole(store)
    first = quiet([{"x": 1}], random_number, store=store)
    assert quiet([{"x": 1}], random_number, client, store=store) == first
    kept = sweeps._Store(store, random_number, None)
    assert kept.keep('{"x": 1}', {"result": {"number": "another"}}) == first[0]


def test_after_the_scheduler_died_the_sweep_goes_on(tmp_path, capsys):
    distributed = pytest.importorskip("distributed")
    store = tmp_path / "store"
    grid = sweeps.grid(x=list(range(6)), folder=str(tmp_path), seconds=0.3)
    how = dict(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0")
    how |= dict(silence_logs=50)
    cluster = distributed.LocalCluster(**how)
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
    said = capsys.readouterr().out
    assert f"{6 - there} of 6 runs of square failed" in said and "lost: " in said
    with distributed.LocalCluster(**how) as cluster, distributed.Client(cluster) as client:
        again = quiet(grid, square, client, store=store)
    assert again.computed == 6 - there and again == quiet(grid, square) and whole(store)


# -- the example for clusters ----------------------------------------------------------------------
EXAMPLE = str(ROOT / "data" / "recipes" / "slurm_sweep.py")


def test_the_slurm_example_runs_on_this_machine(tmp_path, monkeypatch, capsys):
    pytest.importorskip("distributed")
    monkeypatch.setenv("WORKBOOK_BUILD", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def small(lm, part):
        configs = explorer.grid(lm, part, radii=[1.0, 2.0], n_prompts=1)
        return [{**config, "steps": 1, "max_new_tokens": 4} for config in configs]

    monkeypatch.setattr(explorer, "STUDY", replace(explorer.STUDY, grid=small))
    arguments = ["--local", "1", "--model", "tiny-random", "--study", "explorer"]
    monkeypatch.setattr(sys, "argv", ["slurm_sweep.py", *arguments])
    runpy.run_path(EXAMPLE, run_name="__main__")
    path = tmp_path / "sweeps" / "tiny-random" / "explorer.json"
    assert f"wrote {path}" in capsys.readouterr().out
    meta = json.loads(path.read_text())["meta"]
    assert meta["cells"] == 8 and meta["runs"] == meta["computed"] == 4


def test_the_slurm_example_writes_a_job_script(monkeypatch, capsys):
    pytest.importorskip("dask_jobqueue")
    monkeypatch.setattr(sys, "argv", ["slurm_sweep.py", "--show"])
    runpy.run_path(EXAMPLE, run_name="__main__")
    script = capsys.readouterr().out
    assert "#SBATCH --gres=gpu:1" in script and "--nthreads 1" in script
    assert "WORKBOOK_THREADS=4" in script


def test_both_lists_of_requirements_pin_the_same_dask():
    pins = []
    for name in ("requirements.txt", "requirements-cluster.txt"):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        pins += [line.split()[0] for line in lines if line.startswith("distributed")]
    assert len(set(pins)) == 1
