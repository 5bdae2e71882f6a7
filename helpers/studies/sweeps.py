"""Sweeps: a pure function over a grid of configurations, on any executor, each result kept at once.

    with sweeps.pool(2) as workers:  # `cell(radius, seed)`, a function of a module, returns a dict
        grid = sweeps.grid(radius=[4, 8], seed=range(3))
        results = sweeps.run(grid, cell, workers, store="build/cells")

The same call again computes only what is missing. On a cluster: data/recipes/slurm_sweep.py.
"""

import ast
import hashlib
import inspect
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from itertools import product
from numbers import Integral
from pathlib import Path

from tqdm.auto import tqdm

from .. import ROOT, UserError
from ..ledger import write_atomically
from .store import adapter_hash, try_to_write, usable

_kept = threading.local()  # the model that a worker's thread loaded last
_loading = threading.Lock()
_limited = False  # has this process been told how many threads to use?


class Sweep(list):
    """Results in the order of the grid, None where a run failed.

    `failed`: {index: traceback, or how the run was lost}; `computed`: how many were computed now
    (the store had the others); `message`: what failed and what to do, or "".
    """

    def __init__(self, results, failed, computed, message):
        super().__init__(results)
        self.failed, self.computed, self.message = failed, computed, message


def grid(**axes) -> list[dict]:
    """The product of the axes, the last varying fastest; what is no list is an axis of one."""
    values = {}
    for name, axis in axes.items():
        several = isinstance(axis, Iterable) and not isinstance(axis, (str, dict))
        values[name] = list(axis) if several else [axis]
        if not values[name]:
            raise UserError(f"The axis {name!r} of the grid is empty: give it at least one value.")
    return [dict(zip(values, point)) for point in product(*values.values())]


def run(grid, function, executor=None, store=None, progress=True, model_hash=None) -> Sweep:
    """`function(**config)` for every configuration of the grid, in the grid's order.

    function: of a module, pure, returns a dict that JSON can hold. executor: None (this process),
    any of concurrent.futures' kind (`pool`), a Dask client or its get_executor(). store: a folder;
    each result is written there when it is known, and found again by function, code version, model
    hash (text or a LanguageModel) and configuration. A run that fails stops no other; the end says
    which did. UserError: a configuration that does not fit, a store that cannot be written."""
    texts = _texts(grid, function)
    executor = executor.get_executor() if hasattr(executor, "get_executor") else executor
    if executor is not None and not hasattr(executor, "submit"):
        raise UserError(f"executor {executor!r:.80} runs nothing: give None, a pool or a client.")
    kept = None if store is None else _Store(store, function, _model_hash(model_hash))
    unique = list(dict.fromkeys(texts))
    found = {text: kept.read(text) for text in unique} if kept else {}
    results = {text: result for text, result in found.items() if result is not None}
    todo = [text for text in unique if text not in results]
    failed, name = {}, function.__name__
    bar = tqdm(total=len(unique), initial=len(results), desc=name, disable=not progress)
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
    message = _message(name, failed, len(unique), kept) if failed else ""
    if message:
        print(message)
    lost = {i: failed[text] for i, text in enumerate(texts) if text in failed}
    return Sweep([results.get(t) for t in texts], lost, len(todo) - len(failed), message)


def _texts(configs, function) -> list[str]:
    """The configurations as JSON: what is hashed, and what the function gets."""
    if "<" in getattr(function, "__qualname__", "<") or not _file(function):
        raise UserError(f"{function!r} is no function of a module: workers could not find it.")
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


def _message(name, failed, total, kept):
    text, problem = next(iter(failed.items()))
    where = "tracebacks in .failed; with a store, the same call again would compute only these"
    if kept:
        where = f"tracebacks in {kept.folder}/*.failed.json; the same call again computes these"
    what = f"{len(failed)} of {total} runs of {name} failed, the first with {text}"
    return f"{what}: {problem.strip().splitlines()[-1]:.200} ({where})."


# -- what a result depends on, and where it is kept ------------------------------------------------
def _file(function):
    return getattr(sys.modules[function.__module__], "__file__", None)


def code_version(function) -> str:
    """A hash of all that a result may hang on: our sources, the function's module, the prompts."""
    sources, texts = (ROOT / "helpers").rglob("*.py"), (ROOT / "data" / "prompts").glob("*.json")
    digest = hashlib.sha256()
    for path in sorted({*sources, *texts, Path(_file(function))}):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def _model_hash(model):
    """Text as it is; of a LanguageModel its weights', with its adapter's where it has one."""
    if getattr(model, "organism", None):
        return f"{model.weights_hash}+{adapter_hash(model.organism)}"
    return getattr(model, "weights_hash", model)


class _Store:
    """A folder per function and code version: a JSON file per result, named by what it hangs on."""

    def __init__(self, root, function, model_hash):
        name, code = f"{function.__module__}.{function.__qualname__}", code_version(function)
        self.about = {"function": name, "code": code, "model_hash": model_hash}
        self.folder = Path(root) / f"{name}-{code[:8]}"
        with self._usable():
            try_to_write(self.folder)

    def _usable(self):
        again = "free space or give another folder, and call again: every result in it is whole"
        return usable(f"The store {self.folder.parent}", again)

    def _path(self, text, end=".json"):
        key = json.dumps([self.about, text], sort_keys=True)
        return self.folder / (hashlib.sha256(key.encode()).hexdigest() + end)

    def read(self, text):
        """The result of a configuration, or None, also for a file that we did not write."""
        with self._usable():
            try:
                return json.loads(self._path(text).read_text(encoding="utf-8"))["result"]
            except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
                return None

    def keep(self, text, outcome):
        """Write a result, once (if another sweep was faster, its is returned), or a traceback."""
        done = "result" in outcome
        if done and (earlier := self.read(text)) is not None:
            return earlier
        record = json.dumps({**self.about, "config": json.loads(text), **outcome}, indent=1)
        failed = self._path(text, ".failed.json")
        with self._usable():
            write_atomically(self._path(text) if done else failed, record + "\n")
            if done:
                failed.unlink(missing_ok=True)
        return outcome.get("result")


# -- the runs, in this process and in others -------------------------------------------------------
def _outcomes(todo, function, executor, kept):
    """(configuration, outcome) pairs as they come. Closing it cancels what has not begun."""
    if executor is None:
        for text in todo:
            earlier = kept and kept.read(text)  # another sweep may be at work on this store
            yield text, _work(function, text) if earlier is None else {"result": earlier}
        return
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


def _work(function, text, origin=None) -> dict:
    """One run, in whatever process: its result, as a store would give it, or its traceback."""
    if origin and origin[0] != os.getpid() and not _limited:
        limit_threads()
    try:
        result = function(**json.loads(text))
        if not isinstance(result, dict):
            raise TypeError(f"{function.__name__} returned {result!r:.80}, where a dict is needed.")
        return {"result": json.loads(json.dumps(result, default=_plain))}
    except Exception:
        return {"error": traceback.format_exc()}


def limit_threads():
    """Let this process compute with one thread, so that workers do not fight over the cores, or
    with as many as WORKBOOK_THREADS in its environment says."""
    global _limited
    _limited = True
    n = os.environ.get("WORKBOOK_THREADS", "1")
    os.environ |= {"OMP_NUM_THREADS": n, "MKL_NUM_THREADS": n}  # for a torch imported later
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(n))


def pool(workers) -> ProcessPoolExecutor:
    """Worker processes (spawned) of one thread each."""
    if not isinstance(workers, Integral) or workers < 1:
        raise UserError(f"A pool needs at least 1 worker, a whole number, not {workers!r}.")
    # a worker imports the script that started it, and must not start workers in turn
    if getattr(multiprocessing.current_process(), "_inheriting", False) or _unguarded():
        raise UserError(
            f"{Path(sys.modules['__main__'].__file__).name} starts workers, which import it: "
            'put what it does below the line `if __name__ == "__main__":`.'
        )
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)


def _unguarded() -> bool:
    """Was this called from the script's own lines, not below an `if` that asks for __name__?"""
    path, frame = getattr(sys.modules["__main__"], "__file__", None), inspect.currentframe()
    while frame and (frame.f_code.co_filename, frame.f_code.co_name) != (path, "<module>"):
        frame = frame.f_back
    if path is None or frame is None or not Path(path).is_file():  # a notebook, a prompt
        return False
    for node in ast.walk(ast.parse(Path(path).read_bytes())):
        if isinstance(node, ast.If) and node.lineno <= frame.f_lineno <= node.end_lineno:
            if "__name__" in ast.unparse(node.test):
                return False
    return True


def _start_worker():
    # Ctrl-C reaches workers too: let them end at once, without a traceback each. (All processes
    # that were begun in the background ignore it.)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    limit_threads()


def model(name, organism=None):
    """The model, loaded once in a worker and kept until it needs another. Each thread has its own,
    since steering puts hooks on a model: so give Dask workers one thread each."""
    from ..models import load

    if getattr(_kept, "key", None) != (name, organism):
        _kept.key = _kept.model = None
        with _loading:  # transformers changes global settings while it loads
            _kept.model = load(name, organism)
        _kept.key = name, organism
    return _kept.model
