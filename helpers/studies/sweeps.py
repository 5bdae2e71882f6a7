"""Sweeps: a pure function over a grid of configurations, on any executor, each result kept as soon as it is there.

    with sweeps.pool(2) as workers:  # `cell(radius, seed)` returns a dict; it stands in a module, where workers can import it
        results = sweeps.run(sweeps.grid(radius=[4, 8], seed=range(3)), cell, workers, store="build/cells")

The same call again computes only what is missing, on whatever executor. On a cluster: data/recipes/slurm_sweep.py.
"""

import hashlib
import inspect
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from importlib.metadata import version
from itertools import product
from pathlib import Path

from tqdm.auto import tqdm

from .. import ROOT, UserError
from ..ledger import write_atomically
from .store import adapter_hash

_kept = threading.local()  # the model that a worker's thread loaded last
_loading = threading.Lock()
_limited = False  # has this process been told how many threads to use?


class Sweep(list):
    """Results in the order of the grid, None where a run failed. `configs`: the grid; `failed`: {index: traceback, or how the run
    was lost}; `computed`: how many were computed now (the store had the others); `message`: what failed and what to do, or ""."""

    def __init__(self, results, configs, failed, computed, message):
        super().__init__(results)
        self.configs, self.failed = configs, failed
        self.computed, self.message = computed, message


# -- the grid --------------------------------------------------------------------------------------
def grid(**axes) -> list[dict]:
    """The product of the axes as a list of dicts, the last axis varying fastest; a value that is no list is an axis of one."""
    values = {}
    for name, axis in axes.items():
        several = isinstance(axis, Iterable) and not isinstance(axis, (str, dict))
        values[name] = list(axis) if several else [axis]
        if not values[name]:
            raise UserError(f"The axis {name!r} of the grid is empty: give it at least one value.")
    return [dict(zip(values, point)) for point in product(*values.values())]


def _texts(configs, function, executor):
    """The configurations as JSON texts: what is hashed, and what the function gets. UserError where that cannot be."""
    if "<" in getattr(function, "__qualname__", "<"):
        raise UserError(
            f"{function!r} has no name by which workers and stores could know it: define it in a module."
        )
    if isinstance(executor, ProcessPoolExecutor) and not _file(function):
        raise UserError(
            f"{function.__name__} is defined in a notebook, where other processes cannot import it: use a module."
        )
    configs = grid(**configs) if isinstance(configs, dict) else list(configs)
    if not configs:
        raise UserError("The grid is empty: give at least one configuration.")
    texts = []
    for number, config in enumerate(configs):
        try:
            inspect.signature(function).bind(**config)
            texts.append(json.dumps(config, sort_keys=True, default=_plain, allow_nan=False))
        except (TypeError, ValueError) as error:
            what = f"Entry {number} of the grid, {config!r:.80}, does not fit {function.__name__}"
            raise UserError(f"{what}: {error}.") from None
    return texts


def _plain(value):
    """What json does not know: numbers and arrays of NumPy and PyTorch."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r:.80} is not JSON: use numbers, strings, lists and dicts")


# -- what a result depends on, and where it is kept ------------------------------------------------
def _file(function):
    return getattr(sys.modules[function.__module__], "__file__", None)


def code_version(function) -> str:
    """A hash of all that a result may hang on: the package's sources, the function's own module, and the prompts."""
    if not _file(function):
        raise UserError(
            f"{function.__name__} is defined in a notebook: use a module, or give its version as code=."
        )
    sources, texts = (ROOT / "helpers").rglob("*.py"), (ROOT / "data" / "prompts").glob("*.json")
    digest = hashlib.sha256()
    for path in sorted({*sources, *texts, Path(_file(function))}):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


class _Store:
    """A folder with, per function and code version, a folder of results: a JSON file each, named by its content hash."""

    def __init__(self, folder, function, code, model_hash):
        name = f"{function.__module__}.{function.__qualname__}"
        code = str(code or code_version(function))
        self.about = {"function": name, "code": code, "model_hash": model_hash}
        self.root = Path(folder)
        self.folder = self.root / f"{name}-{hashlib.sha256(code.encode()).hexdigest()[:8]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()  # read-only? Said now, not in an hour
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error):
        return UserError(
            f"The store {self.root} cannot be used ({error.strerror or error}): free space, or give another folder; "
            "every result in it is whole, and the same call goes on from there."
        )

    def _path(self, text, end=".json"):
        key = json.dumps([self.about, text], sort_keys=True)
        return self.folder / (hashlib.sha256(key.encode()).hexdigest() + end)

    def read(self, text):
        """The result of a configuration, or None, also for a file that we did not write."""
        try:
            return json.loads(self._path(text).read_text(encoding="utf-8"))["result"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        except OSError as error:
            raise self._unusable(error) from None

    def keep(self, text, outcome):
        """Write a result, once (the earlier one is returned if another sweep was faster), or a traceback beside it."""
        done = "result" in outcome
        if done and (earlier := self.read(text)) is not None:
            return earlier
        record = json.dumps({**self.about, "config": json.loads(text), **outcome}, indent=1)
        failed = self._path(text, ".failed.json")
        try:
            write_atomically(self._path(text) if done else failed, record + "\n")
            if done:
                failed.unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from None
        return outcome.get("result")


# -- the runs --------------------------------------------------------------------------------------
def run(grid, function, executor=None, store=None, progress=True, code=None, model_hash=None):
    """`function(**config)` for every configuration of the grid: a `Sweep`, the list of results in the grid's order.

    grid: a list of dicts, or a dict of axes. function: importable and pure, returns a dict that JSON can hold. executor: None (in
    this process), any of concurrent.futures' kind (`pool`), a Dask client or its get_executor(). store: a folder; each result is
    written there when it is known, and found again by function, code version, model hash and configuration. code: text (default:
    `code_version`); model_hash: text or a LanguageModel. A run that fails stops no other; the end says which did. UserError: an
    empty axis, a configuration that does not fit, a store that cannot be written.
    """
    texts = _texts(grid, function, executor)
    kept = None if store is None else _Store(store, function, code, _model_hash(model_hash))
    unique = list(dict.fromkeys(texts))
    found = {text: kept.read(text) for text in unique} if kept else {}
    results = {text: result for text, result in found.items() if result is not None}
    todo = [text for text in unique if text not in results]
    failed = {}
    bar = tqdm(
        total=len(unique), initial=len(results), desc=function.__name__, disable=not progress
    )
    with bar, closing(_outcomes(todo, function, executor, kept)) as outcomes:
        for text, outcome in outcomes:
            if kept and "lost" not in outcome:
                outcome["result"] = kept.keep(text, outcome)
            if outcome.get("result") is not None:
                results[text] = outcome["result"]
            else:
                failed[text] = outcome.get("error") or outcome["lost"]
                bar.set_postfix(failed=len(failed))
            bar.update()
    message = _message(function, failed, len(unique), kept) if failed else ""
    if message:
        print(message)
    lost = {i: failed[text] for i, text in enumerate(texts) if text in failed}
    configs = [json.loads(text) for text in texts]
    computed = len(todo) - len(failed)
    return Sweep([results.get(text) for text in texts], configs, lost, computed, message)


def _model_hash(model):
    """Text as it is; of a LanguageModel its weights', with its adapter's where it has one."""
    if getattr(model, "organism", None):
        return f"{model.weights_hash}+{adapter_hash(model.organism)}"
    return getattr(model, "weights_hash", model)


def _outcomes(todo, function, executor, kept):
    """(configuration, outcome) pairs as they come. Closing it cancels what has not begun."""
    if executor is None:
        for text in todo:
            earlier = kept and kept.read(text)  # another sweep may be at work on this store
            yield text, _work(function, text) if earlier is None else {"result": earlier}
        return
    executor = executor.get_executor() if hasattr(executor, "get_executor") else executor
    origin = os.getpid(), uuid.uuid4().hex  # the second, so that Dask sees a new task in a retry
    futures = {}
    try:
        for text in todo:
            try:
                futures[executor.submit(_work, function, text, origin)] = text
            except Exception as error:  # a pool that broke or was shut down
                yield text, {"lost": f"not begun: {type(error).__name__}: {error}"}
        for future in as_completed(futures):
            try:
                outcome = future.result()
            except Exception as error:  # not the function's own: a worker or the scheduler died
                outcome = {"lost": f"lost: {type(error).__name__}: {error}"}
            yield futures[future], outcome
    finally:
        for future in futures:
            future.cancel()


def _work(function, text, origin=None):
    """One run, in whatever process: its result or its traceback, the seconds it took and what it was computed with."""
    if origin and origin[0] != os.getpid() and not _limited:
        limit_threads(int(os.environ.get("WORKBOOK_THREADS", 1)))
    start = time.perf_counter()
    try:
        result = function(**json.loads(text))
        if not isinstance(result, dict):
            raise TypeError(f"{function.__name__} returned {result!r:.80}, where a dict is needed.")
        outcome = {"result": json.loads(json.dumps(result, default=_plain))}  # as a store gives it
    except Exception:
        outcome = {"error": traceback.format_exc()}
    versions = {name: version(name) for name in ("torch", "transformers")}
    versions["python"] = sys.version.split()[0]
    return {**outcome, "seconds": round(time.perf_counter() - start, 3), "versions": versions}


def _message(function, failed, total, kept):
    text, problem = next(iter(failed.items()))
    where = "tracebacks in .failed; with a store, the same call again would compute only these"
    if kept:
        where = (
            f"tracebacks in {kept.folder}/*.failed.json; the same call again computes only these"
        )
    last = problem.strip().splitlines()[-1]
    what = f"{len(failed)} of {total} runs of {function.__name__} failed"
    return f"{what}, the first with {text}: {last:.200} ({where})."


# -- workers ---------------------------------------------------------------------------------------
def limit_threads(n=1):
    """Let this process compute with n threads. A worker does so before its first run, with 1 so that workers do not fight over
    the cores; where each has more to itself, set WORKBOOK_THREADS in its environment, or pool(threads=…)."""
    global _limited
    _limited = True
    os.environ |= {"OMP_NUM_THREADS": str(n), "MKL_NUM_THREADS": str(n)}  # for a later torch
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(n)


def pool(workers=None, threads=1):
    """A ProcessPoolExecutor whose workers compute with `threads` threads each; by default it fills this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = max(1, cores // max(1, threads)) if workers is None else workers
    if workers < 1 or threads < 1:
        raise UserError(
            f"A pool needs at least 1 worker with 1 thread, not {workers} with {threads}."
        )
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, spawn, _start_worker, (threads,))


def _start_worker(threads):
    # Ctrl-C reaches workers too: they end at once, without a traceback each. Begun in the background, all ignore it.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    limit_threads(threads)


def model(name, organism=None):
    """The model, loaded once in a worker and kept until it needs another; each thread has its own, since steering puts hooks
    on a model: so give Dask workers one thread each."""
    from ..models import load

    if getattr(_kept, "key", None) != (name, organism):
        _kept.key = _kept.model = None
        with _loading:  # transformers changes global settings while it loads
            _kept.model = load(name, organism)
        _kept.key = name, organism
    return _kept.model
