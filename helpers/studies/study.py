"""A study: what one cell computes, which cells there are, and where they are kept or computed.

chain_of_thought.cells(lm, "stored", "main", radii=[8.0])  # or "live"; [{"config", "result"}, …]
studies.run("chain_of_thought")  # computes them all into data/sweeps/chain_of_thought.json
"""

import inspect
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from numbers import Integral
from pathlib import Path
from pkgutil import resolve_name

from tqdm.auto import tqdm

from .. import UserError, ledger
from ..models.packaged import DEFAULT
from . import store, sweeps


def names() -> tuple[str, ...]:
    """The studies that have a sweep, which is called like its notebook."""
    found = "what_vectors_are goldilocks explorer anti_refusal chain_of_thought backdoors"
    return tuple(found.split())


def run(name, model=None, workers=2, prompt_set="everyday", executor=None) -> Path:
    """Compute the whole sweep of a study and write it: see `Study.compute`."""
    if name not in names():
        raise UserError(f"There is no study {name!r}: use one of {', '.join(names())}.")
    study = import_module(f".{name}", __package__).STUDY
    return study.compute(model, workers, prompt_set, executor)


def _as_it_is(cell):
    return cell


@dataclass(frozen=True)
class Study:
    """One experiment: `cell(lm, **config)` → {"rows": […], …} measures one cell, `grid(lm, part,
    **axes)` lists the configurations of a part, of the model using name, organism and depth only.

    organisms: {part: organism that it is computed on}. table(cells): a DataFrame; rules are applied
    here, not stored. labels: what of a configuration the cell does not get. together: an axis whose
    values a cell takes as a list, giving {"results": one per value}. plan(done): pairs (part,
    axes), where parts depend on the cells `done`. hide, show: applied before storing, and after.
    """

    name: str
    cell: Callable
    grid: Callable
    organisms: dict
    table: Callable = store.rows
    labels: tuple = ("part",)
    together: str | None = None
    plan: Callable | None = None
    hide: Callable = _as_it_is
    show: Callable = _as_it_is

    def configs(self, lm, part, **axes) -> list[dict]:
        """The configurations of one part."""
        if part not in self.organisms:
            known = ", ".join(self.organisms)
            raise UserError(f"part {part!r} of the study {self.name} is unknown: use {known}.")
        about = {"part": part, "model": lm.name, "organism": lm.organism}
        try:
            return [{**about, **config} for config in self.grid(lm, part, **axes)]
        except ValueError as error:  # an axis that the reader chose
            raise UserError(str(error)) from None

    def cells(self, lm, sweep, part, progress=True, **axes) -> list[dict]:
        """The cells of one part, [{"config", "result"}, …]: of the stored `sweep`, or "live"."""
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
                f"The stored sweep {self.name}.json lacks {len(lacking)} of the {len(wanted)} "
                f"cells asked for (the first: {lacking[0]:.300}): it has those of the default "
                "parameters, others can be computed live."
            )
        return [self.show(kept[text]) for text in wanted]

    def live(self, lm, configs, progress=True, **options) -> list[dict]:
        """The cells of these configurations, computed here and now; `options` go to the cell."""
        found = {}
        for labelled in tqdm(self._runs(configs), "cells", leave=False, disable=not progress):
            config = json.loads(_key(self._arguments(labelled, "model", "organism")))
            result = self.cell(lm, **config, **options)  # in the order that a worker gets it
            for one in self._split(labelled, result):
                found[_key(one["config"])] = self.show(self.hide(one))
        return [found[_key(config)] for config in configs]

    def compute(self, model=None, workers=2, prompt_set="everyday", executor=None) -> Path:
        """Run all parts on one-thread workers (1: in this process) or on `executor`, as in
        `sweeps.run`, and write the sweep. Resumable: what was computed stays in build/cells."""
        from ..models import load  # here, because it imports torch
        from ..models.prompts import names as prompt_sets

        prompts = {} if prompt_set == "everyday" else {"prompt_set": prompt_set}
        if prompts and "prompt_set" not in inspect.signature(self.grid).parameters:
            raise UserError(f"The study {self.name} asks prompts of its own, not {prompt_set!r}.")
        if prompt_set not in prompt_sets():
            known = ", ".join(prompt_sets())
            raise UserError(f"There is no prompt set {prompt_set!r}: data/prompts has {known}.")
        if not isinstance(workers, Integral) or workers < 1:
            raise UserError(f"workers is {workers!r}: give a whole number of at least 1.")
        folder = store.folder_of(model or DEFAULT, prompt_set)
        with store.usable(f"The folder {folder}", "make it writable, or give another folder"):
            store.try_to_write(folder)
        start, done, lm = time.perf_counter(), [], None
        count = {"runs": 0, "computed": 0}
        adapters = {}
        cell = f"{self.cell.__module__}:{self.cell.__qualname__}"
        pool = sweeps.pool(workers) if executor is None and workers > 1 else nullcontext(executor)
        with pool as where:
            for part, axes in self.plan(done) if self.plan else [(p, {}) for p in self.organisms]:
                organism = self.organisms[part]
                if lm is None or lm.organism != organism:
                    lm = load(model or DEFAULT, organism)
                if organism:
                    adapters[organism] = store.adapter_hash(organism)
                runs = self._runs(self.configs(lm, part, **axes, **prompts))
                kept = ledger.build_folder() / "cells"
                calls = [{"cell": cell, **self._arguments(run)} for run in runs]
                found = sweeps.run(calls, run_cell, where, kept, model_hash=lm)
                if found.failed:
                    raise UserError(found.message)
                for labelled, result in zip(runs, found):
                    done += self._split(labelled, result)
                count["runs"] += len(runs)
                count["computed"] += found.computed
        command = f"python -m helpers sweep {self.name}"
        command += f" --model {lm.name}" if lm.name != DEFAULT else ""
        command += f" --prompts {prompt_set}" if prompts else ""
        meta = {
            "command": command,
            "model": lm.name,
            "model_hash": lm.weights_hash,
            "organisms": adapters,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "device": lm.device.type,
            "starts": "hash of prompt, source layer and seed",
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
            "workers": workers,
            "cells": len(done),
            **count,
            "seconds": round(time.perf_counter() - start),
        }
        return store.write(self.name, [self.hide(cell) for cell in done], meta, folder)

    def _runs(self, configs) -> list[dict]:
        """The configurations; those that differ in `together` alone as one, with a list of it."""
        if self.together is None:
            return configs
        found = {}
        for config in configs:
            rest = {k: v for k, v in config.items() if k != self.together}
            one = found.setdefault(_key(rest), {**rest, self.together: []})
            one[self.together].append(config[self.together])
        return list(found.values())

    def _arguments(self, labelled, *others) -> dict:
        """What the cell is called with: all but labels, and others that are left out."""
        return {k: v for k, v in labelled.items() if k not in (*self.labels, *others)}

    def _split(self, labelled, result) -> list[dict]:
        """The cells of one run."""
        if self.together is None:
            return [{"config": labelled, "result": result}]
        pairs = zip(labelled[self.together], result["results"])
        return [{"config": {**labelled, self.together: v}, "result": one} for v, one in pairs]


def run_cell(cell, model, organism=None, **config) -> dict:
    """A cell for a sweep's worker: the function as "module:name", the model by its name."""
    return resolve_name(cell)(sweeps.model(model, organism), **config)


def _key(config) -> str:
    return json.dumps(config, sort_keys=True)
