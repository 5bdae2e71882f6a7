"""Stand-ins for the computed sweeps, made by the tiny random model in seconds."""

from pathlib import Path

from helpers.models import load
from helpers.studies import explorer, goldilocks, store, sweeps

PROMPTS = ["How do I bake bread?", "Tell me about <b>tea</b> & <script>alert('x')</script>."]


def make(folder: Path) -> Path:
    """explorer.json and goldilocks.json of "tiny-random" in `folder`."""
    lm = load("tiny-random")
    at = {"part": "A", "model": lm.name, "radius": [1.0, 2.0, 4.0, 16.0], "target_layer": 4}
    at |= {"steps": 2, "max_new_tokens": 8}
    few = {"learned": 2, "random": 1}
    wide = sweeps.grid(
        prompt=PROMPTS, source_layer=[1, 2], seed=61, n_vectors=few, coeffs=[[-1.0, 1.0, 2.0]], **at
    )
    deep = sweeps.grid(
        prompt=PROMPTS[0], source_layer=1, seed=[1, 2], n_vectors={"learned": 2, "random": 2}, **at
    )
    for study, configs in ((explorer.STUDY, wide), (goldilocks.STUDY, deep)):
        meta = {
            "command": f"python -m helpers sweep {study.name} --model tiny-random",
            "model": lm.name,
            "model_hash": lm.weights_hash,
            "dtype": "float32",
            "workers": 1,
            "versions": {},
            "computed": len(configs),
            "cells": len(configs),
            "seconds": 1,
        }
        store.write(study.name, study.live(lm, configs, progress=False), meta, folder)
    return folder
