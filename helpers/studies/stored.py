"""Stored sweeps: computed by `python -m helpers grid NAME`, kept in data/explorer with what they were made with, and read by
notebooks, which can compute any part of one here and now instead.

    cells = stored.cells("refusal", configs, lm, SWEEP, cell)   # SWEEP: "stored" or "live"; [{"config", "result"}, …]
"""

import hashlib
import json
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

from tqdm.auto import tqdm

from .. import DATA, ledger
from ..models.obtain import DEFAULT
from . import store, sweeps


def adapter_hash(organism) -> str:
    """sha256 of an organism's adapter."""
    return hashlib.sha256(
        (DATA / "organisms" / organism / "adapter_model.safetensors").read_bytes()
    ).hexdigest()


def read(name, lm, folder=None) -> dict:
    """{"meta", "cells"}; ValueError where there is none, or where another model or another version of an adapter made it."""
    sweep = store.read(name, lm, folder)
    for organism, digest in sweep["meta"].get("organisms", {}).items():
        if digest != adapter_hash(organism):
            raise ValueError(
                f"The sweep {name}.json was made with another adapter than data/organisms/{organism}: "
                f"compute it again with python -m helpers grid {name}."
            )
    return sweep


def cells(
    name, configs, lm, sweep="stored", function=None, labels=(), folder=None, progress=True
) -> list[dict]:
    """The cells of just these configurations, in their order: from the stored sweep, or (`sweep` "live") computed by
    `function(lm, **config)`, where model, organism and `labels` are left out. ValueError where the stored one lacks some."""
    if sweep == "live":
        skip = {"model", "organism", *labels}
        return [
            {"config": c, "result": function(lm, **{k: v for k, v in c.items() if k not in skip})}
            for c in tqdm(configs, desc="cells", leave=False, disable=not progress)
        ]
    if sweep != "stored":
        raise ValueError(f'sweep is {sweep!r}: use "stored" or "live".')
    kept = {
        json.dumps(one["config"], sort_keys=True): one for one in read(name, lm, folder)["cells"]
    }
    wanted = [json.dumps(c, sort_keys=True) for c in configs]
    if lacking := [text for text in wanted if text not in kept]:
        raise ValueError(
            f"The stored sweep {name}.json lacks {len(lacking)} of the {len(wanted)} cells asked for (the first: "
            f"{lacking[0]:.300}): it has those of the default parameters only, others can be computed live."
        )
    return [kept[text] for text in wanted]


def compute(
    name, parts, function, workers=2, folder=None, store=None, unpack=None, code=None, options=""
) -> Path:
    """Run a sweep on a pool of one-thread workers (1: in this process), resumable, and write <name>.json.

    parts: a function of the list of cells done so far (which grows), that yields (LanguageModel, configurations) one after
    another. function: as in `sweeps.run`, `code`, too. unpack(config, result): the cells of one run, where it is not just one.
    options: what the command that this is called by has after the name.
    """
    start, done, organisms, runs, computed = time.perf_counter(), [], {}, 0, 0
    store = store or ledger.build_folder() / "sweeps"
    with sweeps.pool(workers) if workers > 1 else nullcontext() as pool:
        for lm, configs in parts(done):
            found = sweeps.run(configs, function, pool, store, code=code, model_hash=lm)
            if found.failed:
                raise ValueError(found.message)
            for c, r in zip(found.configs, found):
                done += unpack(c, r) if unpack else [{"config": c, "result": r}]
            if lm.organism:
                organisms[lm.organism] = adapter_hash(lm.organism)
            runs, computed = runs + len(found), computed + found.computed
    options = (f" --model {lm.name}" if lm.name != DEFAULT else "") + options
    meta = {
        "command": f"python -m helpers grid {name}{options}",
        "model": lm.name,
        "model_hash": lm.weights_hash,
        "organisms": organisms,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
        "workers": workers,
        "cells": len(done),
        "runs": runs,
        "computed": computed,
        "seconds": round(time.perf_counter() - start),
    }
    return store.write(name, done, meta, folder or store.folder_of(lm.name))
