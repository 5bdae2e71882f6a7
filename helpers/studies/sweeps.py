"""Sweeps: a pure function over a grid of configurations, on any executor, each result kept as soon as it is there.

    with sweeps.pool(2) as workers:  # `cell(radius, seed)` returns a dict; it stands in a module, where workers can import it
        results = sweeps.run(sweeps.grid(radius=[4, 8], seed=range(3)), cell, workers, store="build/sweeps")

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

_PROCESS = (
    uuid.uuid4().hex
)  # with the process number (a fork copies it): is this the process that asked?
_models, _lock, _threads = threading.local(), threading.Lock(), None


class Sweep(list):
    """Results in the order of the grid, None where a run failed. `configs`: the grid; `failed`: {index: traceback, or how the run
    was lost}; `computed`: how many were computed now (the store had the others); `message`: what failed and what to do, or ""."""

    def __init__(self, results, configs, failed, computed, message):
        super().__init__(results)
        self.configs, self.failed, self.computed, self.message = configs, failed, computed, message

    def table(self):
        """A pandas DataFrame: one row per run that succeeded, its configuration and its result side by side."""
        import pandas

        return pandas.DataFrame(
            [
                {**config, **result}
                for config, result in zip(self.configs, self)
                if result is not None
            ]
        )


# -- the grid ----------------------------------------------------------------------------------------------------------


def grid(**axes):
    """The product of the axes as a list of dicts, the last axis varying fastest; a value that is no list is an axis of one."""
    axes = {
        name: list(axis)
        if isinstance(axis, Iterable) and not isinstance(axis, (str, dict))
        else [axis]
        for name, axis in axes.items()
    }
    for name, axis in axes.items():
        if not axis:
            raise UserError(f"The axis {name!r} of the grid is empty: give it at least one value.")
    return [dict(zip(axes, values)) for values in product(*axes.values())]


def _texts(configs, function, executor):
    """The configurations as JSON texts: what is hashed, and what the function gets. UserError where that cannot be."""
    if "<" in getattr(function, "__qualname__", "<"):
        raise UserError(
            f"{function!r} has no name by which workers and stores could know it: define it in a module."
        )
    if isinstance(executor, ProcessPoolExecutor) and not hasattr(
        sys.modules[function.__module__], "__file__"
    ):
        raise UserError(
            f"{function.__name__} is defined in a notebook, where other processes cannot import it: use a module."
        )
    configs, texts = grid(**configs) if isinstance(configs, dict) else list(configs), []
    if not configs:
        raise UserError("The grid is empty: give at least one configuration.")
    for number, config in enumerate(configs):
        try:
            inspect.signature(function).bind(**config)
            texts.append(json.dumps(config, sort_keys=True, default=_plain, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"Entry {number} of the grid, {config!r:.80}, does not fit {function.__name__}: {error}."
            ) from None
    return texts


def _plain(value):
    """What json does not know: numbers and arrays of NumPy and PyTorch."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r:.80} is not JSON: use numbers, strings, lists and dicts")


# -- what a result depends on ------------------------------------------------------------------------------------------


def code_version(function):
    """A hash of all that a result may hang on: the package's sources, the function's own module, and the prompts."""
    file = getattr(sys.modules[function.__module__], "__file__", None)
    if not file:
        raise UserError(
            f"{function.__name__} is defined in a notebook: use a module, or give its version as code=."
        )
    files = [
        *(ROOT / "helpers").rglob("*.py"),
        *(ROOT / "data" / "prompts").glob("*.json"),
        Path(file),
    ]
    digest = hashlib.sha256()
    for path in sorted(set(files)):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def _model_hash(model):
    """Text as it is; of a LanguageModel its weights', with its adapter's where it has one."""
    if getattr(model, "organism", None) is None:
        return getattr(model, "weights_hash", model)
    adapter = ROOT / "data" / "organisms" / model.organism / "adapter_model.safetensors"
    return f"{model.weights_hash}+{hashlib.sha256(adapter.read_bytes()).hexdigest()}"


class _Store:
    """A folder that holds, per function and code version, a folder of results: a JSON file each, named by its content hash."""

    def __init__(self, folder, function, code, model_hash):
        name, code = (
            f"{function.__module__}.{function.__qualname__}",
            str(code or code_version(function)),
        )
        self.about = {"function": name, "code": code, "model_hash": _model_hash(model_hash)}
        self.root, self.name = Path(folder), name
        self.folder = self.root / f"{name}-{hashlib.sha256(code.encode()).hexdigest()[:8]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(
                dir=self.folder
            ).close()  # read-only? Known now, not after the first hour
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error):
        return UserError(
            f"The store {self.root} cannot be used ({error.strerror or error}): free space, or give another folder; "
            "every result in it is whole, and the same call goes on from there."
        )

    def _path(self, text, end=".json"):
        return self.folder / (
            hashlib.sha256(json.dumps([self.about, text], sort_keys=True).encode()).hexdigest()
            + end
        )

    def read(self, text):
        """The result of a configuration, or None."""
        try:
            return json.loads(self._path(text).read_text(encoding="utf-8"))["result"]
        except (
            FileNotFoundError,
            ValueError,
            KeyError,
            TypeError,
        ):  # a file that we did not write is computed again
            return None
        except OSError as error:
            raise self._unusable(error) from None

    def keep(self, text, outcome):
        """Write a result, once (the earlier one is returned if another sweep was faster), or a traceback beside it."""
        if "result" in outcome and (earlier := self.read(text)) is not None:
            return earlier
        record = {**self.about, "config": json.loads(text), **outcome}
        try:
            path, failed = self._path(text), self._path(text, ".failed.json")
            write_atomically(
                path if "result" in outcome else failed, json.dumps(record, indent=1) + "\n"
            )
            if "result" in outcome:
                failed.unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from None
        return outcome.get("result")

    def say_others(self):
        others = [
            path
            for path in self.root.glob(f"{self.name}-*/*.json")
            if path.parent != self.folder and not path.name.endswith(".failed.json")
        ]
        if others:
            print(
                f"{self.root} also holds {len(others)} results of {self.name} from another version of the code: they are left "
                "as they are, and not used."
            )


# -- the runs ----------------------------------------------------------------------------------------------------------


def run(grid, function, executor=None, store=None, progress=True, code=None, model_hash=None):
    """`function(**config)` for every configuration of the grid: a `Sweep`, the list of results in the grid's order.

    grid: a list of dicts, or a dict of axes. function: importable and pure, returns a dict that JSON can hold. executor: None (in
    this process), any of concurrent.futures' kind (`pool`), a Dask client or its get_executor(). store: a folder; each result is
    written there when it is known, and found again by function, code version, model hash and configuration. code: text (default:
    `code_version`); model_hash: text or a LanguageModel. A run that fails stops no other; the end says which did. UserError: an
    empty axis, a configuration that does not fit, a store that cannot be written.
    """
    texts = _texts(grid, function, executor)
    kept = None if store is None else _Store(store, function, code, model_hash)
    unique, failed = dict.fromkeys(texts), {}
    results = {text: result for text in unique if kept and (result := kept.read(text)) is not None}
    todo = [text for text in unique if text not in results]
    if kept and todo:
        kept.say_others()
    with (
        tqdm(
            total=len(unique), initial=len(results), desc=function.__name__, disable=not progress
        ) as bar,
        closing(_outcomes(todo, function, executor, kept)) as outcomes,
    ):
        for text, outcome in outcomes:
            if kept and "lost" not in outcome:
                outcome["result"] = kept.keep(text, outcome)
            if outcome.get("result") is not None:
                results[text] = outcome["result"]
            else:
                failed[text] = outcome.get("error") or outcome["lost"]
                bar.set_postfix(failed=len(failed))
            bar.update()
    message = _message(function, failed, len(unique), kept)
    print(message, end="\n" if message else "")
    return Sweep(
        [results.get(text) for text in texts],
        [json.loads(text) for text in texts],
        {i: failed[text] for i, text in enumerate(texts) if text in failed},
        len(todo) - len(failed),
        message,
    )


def _outcomes(todo, function, executor, kept):
    """(configuration, outcome) pairs as they come. Closing it cancels what has not begun."""
    if executor is None:
        for text in todo:
            earlier = kept and kept.read(text)  # another sweep may be at work on this store
            yield text, _work(function, text) if earlier is None else {"result": earlier}
        return
    executor = executor.get_executor() if hasattr(executor, "get_executor") else executor
    futures, origin = (
        {},
        (os.getpid(), _PROCESS, uuid.uuid4().hex),
    )  # the last, so that Dask sees a new task in a retry
    try:
        for text in todo:
            try:
                futures[executor.submit(_work, function, text, origin)] = text
            except Exception as error:  # a pool that broke or was shut down
                yield text, {"lost": f"not begun: {type(error).__name__}: {error}"}
        for future in as_completed(futures):
            try:
                outcome = future.result()
            except (
                Exception
            ) as error:  # the function's own are caught in `_work`: a worker or the scheduler died
                outcome = {"lost": f"lost: {type(error).__name__}: {error}"}
            yield futures[future], outcome
    finally:
        for future in futures:
            future.cancel()


def _work(function, text, origin=None):
    """One run, in whatever process: its result or its traceback, the seconds it took and what it was computed with."""
    if origin and origin[:2] != (os.getpid(), _PROCESS) and _threads is None:
        limit_threads(int(os.environ.get("WORKBOOK_THREADS", 1)))
    start = time.perf_counter()
    try:
        result = function(**json.loads(text))
        if not isinstance(result, dict):
            raise TypeError(f"{function.__name__} returned {result!r:.80}, where a dict is needed.")
        outcome = {
            "result": json.loads(json.dumps(result, default=_plain))
        }  # just what the store would give back
    except Exception:
        outcome = {"error": traceback.format_exc()}
    versions = {
        "python": sys.version.split()[0],
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    return {**outcome, "seconds": round(time.perf_counter() - start, 3), "versions": versions}


def _message(function, failed, total, kept):
    if not failed:
        return ""
    text, problem = next(iter(failed.items()))
    tracebacks = f"tracebacks in {kept.folder}/*.failed.json" if kept else "tracebacks in .failed"
    again = (
        "the same call again computes only these"
        if kept
        else "with a store, the same call again would compute only these"
    )
    return (
        f"{len(failed)} of {total} runs of {function.__name__} failed, the first with {text}: "
        f"{problem.strip().splitlines()[-1]:.200} ({tracebacks}; {again})."
    )


# -- workers -----------------------------------------------------------------------------------------------------------


def limit_threads(n=1):
    """Let this process compute with n threads. A worker does so before its first run, with 1 so that workers do not fight over
    the cores; where each has more to itself, set WORKBOOK_THREADS in its environment, or pool(threads=…)."""
    global _threads
    _threads = n
    os.environ |= {
        "OMP_NUM_THREADS": str(n),
        "MKL_NUM_THREADS": str(n),
    }  # for a torch imported later
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
    return ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (threads,)
    )


def _start_worker(threads):
    if (
        signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    ):  # ignored: begun in the background, where Ctrl-C is for others
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # Ctrl-C reaches workers too: they end at once, without a traceback each
    limit_threads(threads)


def model(name=None, organism=None, **how):
    """`loading.load(name, organism, **how)`, loaded once in a worker and kept (the two last used; each thread has its own, since
    steering puts hooks on a model: so give Dask workers one thread each)."""
    from ..models import loading

    loaded, key = _models.__dict__.setdefault("loaded", {}), (name, organism, *sorted(how.items()))
    if key not in loaded:
        while len(loaded) > 1:
            del loaded[next(iter(loaded))]
        with _lock:  # transformers changes global settings while it loads
            loaded[key] = loading.load(name or loading.DEFAULT, organism, **how)
    loaded[key] = loaded.pop(key)  # the last used comes last
    return loaded[key]
