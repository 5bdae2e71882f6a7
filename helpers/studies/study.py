"""A study: what one cell computes, which cells there are, and where they are kept or computed here and now.

chain_of_thought.cells(lm, "stored", "main", radii=[8.0])   # [{"config", "result"}, …]; "live" computes them
studies.run("chain_of_thought")                             # all of them → data/sweeps/chain_of_thought.json
"""

import inspect
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name

from tqdm.auto import tqdm

from .. import UserError, ledger
from ..models.packaged import DEFAULT
from . import store, sweeps

NAMES = ("goldilocks", "explorer", "anti_refusal", "chain_of_thought", "backdoors")


def names() -> tuple[str, ...]:
    """The studies that have a sweep, which is called like its notebook."""
    return NAMES


def run(name, model=None, workers=2, prompt_set="everyday", executor=None) -> Path:
    """Compute the whole sweep of a study and write it: see `Study.compute`."""
    if name not in NAMES:
        raise UserError(f"There is no study {name!r}: use one of {', '.join(NAMES)}.")
    study = import_module(f".{name}", __package__).STUDY
    return study.compute(model, workers, prompt_set, executor)


@dataclass(frozen=True)
class Study:
    """cell(lm, **config) → {"rows": […], …} measures one cell; grid(lm, part, **axes) lists the configurations of one part, which
    hang on nothing computed (of the model: its name, organism and depth); organisms: {part: organism that it is computed on}.

    table(cells): a DataFrame in which rules are applied to what was said. labels: names in a configuration that the cell does not
    get. together: an axis whose values a cell takes as a list, giving {"results": one per value}. plan(done): pairs (part, axes),
    where parts depend on the cells `done` so far. hide, show: what a cell goes through before it is stored, and after.
    """

    name: str
    cell: Callable
    grid: Callable
    organisms: dict
    table: Callable = store.rows
    labels: tuple = ("part",)
    together: str | None = None
    plan: Callable | None = None
    hide: Callable = field(default=lambda cell: cell)
    show: Callable = field(default=lambda cell: cell)

    def configs(self, lm, part, **axes) -> list[dict]:
        """The configurations of one part."""
        if part not in self.organisms:
            known = ", ".join(self.organisms)
            raise UserError(f"part {part!r} of the study {self.name} is unknown: use {known}.")
        about = {"part": part, "model": lm.name, "organism": lm.organism}
        return [{**about, **config} for config in self.grid(lm, part, **axes)]

    def cells(self, lm, sweep, part, progress=True, **axes) -> list[dict]:
        """The cells of one part, [{"config", "result"}, …]: from the stored sweep (`sweep` "stored"), or computed here and now
        ("live"). UserError where the stored sweep lacks some."""
        configs = self.configs(lm, part, **axes)
        if sweep == "live":
            return self.live(lm, configs, progress)
        if sweep != "stored":
            raise UserError(f'sweep is {sweep!r}: use "stored" or "live".')
        kept = {_key(one["config"]): one for one in store.read(self.name, lm)["cells"]}
        wanted = [_key(config) for config in configs]
        lacking = [text for text in wanted if text not in kept]
        if lacking:
            raise UserError(
                f"The stored sweep {self.name}.json lacks {len(lacking)} of the {len(wanted)} cells asked for (the "
                f"first: {lacking[0]:.300}): it has those of the default parameters, others can be computed live."
            )
        return [self.show(kept[text]) for text in wanted]

    def live(self, lm, configs, progress=True, **options) -> list[dict]:
        """The cells of these configurations, computed here and now; `options` go to the cell as they are."""
        found = {}
        for labelled in tqdm(self._runs(configs), "cells", leave=False, disable=not progress):
            result = self.cell(lm, **self._arguments(labelled), **options)
            for one in self._split(labelled, result):
                found[_key(one["config"])] = self.show(self.hide(one))
        return [found[_key(config)] for config in configs]

    def compute(self, model=None, workers=2, prompt_set="everyday", executor=None) -> Path:
        """Run all parts on a pool of one-thread workers (1: in this process) or on `executor`, as in `sweeps.run`, and write the
        sweep into the folder that `store.folder_of` says. Resumable: what was computed stays in build/cells."""
        from ..models import load  # here, because it imports torch

        prompts = self._axes_of(prompt_set)
        start, done, lm = time.perf_counter(), [], None
        count = {"cells": 0, "runs": 0, "computed": 0}
        adapters = {}
        pool = sweeps.pool(workers) if executor is None and workers > 1 else nullcontext(executor)
        with pool as where:
            for part, axes in self.plan(done) if self.plan else [(p, {}) for p in self.organisms]:
                organism = self.organisms[part]
                if lm is None or lm.organism != organism:
                    lm = load(model or DEFAULT, organism)
                if organism:
                    adapters[organism] = store.adapter_hash(organism)
                runs = self._runs(self.configs(lm, part, **axes, **prompts))
                found = sweeps.run(self._calls(runs), run_cell, where, _cells(), model_hash=lm)
                if found.failed:
                    raise UserError(found.message)
                for labelled, result in zip(runs, found):
                    done += self._split(labelled, result)
                count["runs"] += len(runs)
                count["computed"] += found.computed
        count["cells"] = len(done)
        command = f"python -m helpers sweep {self.name}"
        command += f" --model {lm.name}" if lm.name != DEFAULT else ""
        command += f" --prompts {prompt_set}" if prompts else ""
        meta = {
            "command": command,
            "model": lm.name,
            "model_hash": lm.weights_hash,
            "organisms": adapters,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
            "workers": workers,
            **count,
            "seconds": round(time.perf_counter() - start),
        }
        folder = store.folder_of(lm.name, prompt_set)
        return store.write(self.name, [self.hide(cell) for cell in done], meta, folder)

    def _axes_of(self, prompt_set) -> dict:
        """What the grid is told of another set of prompts than the usual one."""
        if prompt_set == "everyday":
            return {}
        if "prompt_set" not in inspect.signature(self.grid).parameters:
            raise UserError(
                f"The study {self.name} asks prompts of its own: leave {prompt_set!r} out."
            )
        return {"prompt_set": prompt_set}

    def _calls(self, runs) -> list[dict]:
        """What `run_cell` is called with."""
        cell = f"{self.cell.__module__}:{self.cell.__qualname__}"
        calls = []
        for run in runs:
            who = {"cell": cell, "model": run["model"], "organism": run["organism"]}
            calls.append(who | self._arguments(run))
        return calls

    def _runs(self, configs) -> list[dict]:
        """The configurations; those that differ in the axis `together` alone as one, with a list of its values."""
        if self.together is None:
            return configs
        found = {}
        for config in configs:
            rest = {k: v for k, v in config.items() if k != self.together}
            one = found.setdefault(_key(rest), {**rest, self.together: []})
            one[self.together].append(config[self.together])
        return list(found.values())

    def _arguments(self, labelled) -> dict:
        """What the cell is called with: all but the model, which it is handed, and labels."""
        left_out = ("model", "organism", *self.labels)
        return {k: v for k, v in labelled.items() if k not in left_out}

    def _split(self, labelled, result) -> list[dict]:
        """The cells of one run."""
        if self.together is None:
            return [{"config": labelled, "result": result}]
        pairs = zip(labelled[self.together], result["results"])
        return [{"config": {**labelled, self.together: v}, "result": one} for v, one in pairs]


def run_cell(cell, model, organism=None, **config) -> dict:
    """A cell for a sweep's worker: the function as "module:name", the model by its name, loaded once per process."""
    return resolve_name(cell)(sweeps.model(model, organism), **config)


def _cells() -> Path:
    """Where each computed cell is kept until the sweep is written, and after."""
    return ledger.build_folder() / "cells"


def _key(config) -> str:
    return json.dumps(config, sort_keys=True)
