"""Stand-ins for the computed sweeps, made by the tiny random model in seconds: what tests read instead of data/explorer."""

from pathlib import Path

from helpers.models import load
from helpers.studies import goldilocks, store, sweeps

PROMPTS = ["How do I bake bread?", "Tell me about <b>tea</b> & <script>alert('x')</script>."]


def make(folder: Path) -> Path:
    """explorer.json and goldilocks.json of "tiny-random" in `folder`."""
    lm = load("tiny-random")
    at = {
        "radius": [1.0, 2.0, 4.0, 16.0],
        "model": lm.name,
        "target_layer": 4,
        "steps": 2,
        "max_new_tokens": 8,
    }
    layers, radii = {"learned": 2, "random": 1}, {"learned": 2, "random": 2}
    grids = {
        "explorer": [
            {**c, "n_vectors": layers, "coeffs": [-1.0, 1.0, 2.0]}
            for c in sweeps.grid(prompt=PROMPTS, source_layer=[1, 2], seed=61, **at)
        ],
        "goldilocks": [
            {**c, "n_vectors": radii}
            for c in sweeps.grid(prompt=PROMPTS[0], source_layer=1, seed=[1, 2], **at)
        ],
    }
    for name, configs in grids.items():
        meta = {
            "command": f"python -m helpers grid {name} --model tiny-random",
            "model": lm.name,
            "model_hash": lm.weights_hash,
            "dtype": "float32",
            "workers": 1,
            "versions": {},
            "computed": len(configs),
            "cells": len(configs),
            "seconds": 1,
        }
        store.write(name, goldilocks.live(configs, lm, progress=False), meta, folder)
    return folder
