"""Whatever is asked of the public doors: an answer of numbers, or one of the documented errors in
one sentence. `FUZZ=10000 pytest tests/test_fuzz.py` tries more."""

import os
from functools import cache

import numpy as np
import torch
from conftest import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import no_hooks, one_thread  # noqa: F401

from helpers.generation import complete
from helpers.metrics import change, surprise
from helpers.residual import SITES, LayerSpan, capture
from helpers.steering import SteeringVectors
from helpers.training import train

MODELS = ["llama", "gpt2", "gemma3", "gpt_neox", "bloom", "mpt", "falcon", "opt"]
DTYPES = ["float32", "bfloat16", "float16"]
many = settings(
    max_examples=int(os.environ.get("FUZZ", 300)),
    deadline=None,
    derandomize="FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


@cache
def model(architecture, dtype):
    lm = tiny_model(architecture)
    lm.model.to(getattr(torch, dtype))
    return lm


def mostly(good, other):
    """Values that are right, and one in ten that may be anything."""
    return st.integers(0, 9).flatmap(lambda k: good if k else other)


words = st.text("abc .é", min_size=1, max_size=9).map(lambda text: "a" + text)
prompts = mostly(
    words | st.lists(words, min_size=1, max_size=4) | st.just(["a"] * 4),
    st.text(max_size=12) | st.lists(st.text(max_size=3), max_size=2) | st.just("x" * 600),
)
odd = st.integers(-9, 9) | st.sampled_from([1.0, True, None, "1", np.int64(-1)])
layers = mostly(st.integers(0, 1) | st.sampled_from([np.int64(1), -4]), odd)
targets = st.integers(2, 3) | st.lists(st.integers(2, 3), min_size=1, max_size=2)
positions = mostly(
    st.sampled_from(["all", "all_but_first", "last", -1, [0, -1], slice(-2, None)]),
    st.one_of(
        st.sampled_from(["prompt", "generated", "end", None, 1.5]),
        st.integers(-4, 4),
        st.lists(st.integers(-3, 3) | st.booleans(), max_size=3),
        st.builds(slice, *[st.none() | st.integers(-3, 3)] * 3),
    ),
)
wild = st.floats() | st.sampled_from([0, 1e5, -1e30, "2", None, np.float32(2), [1.0, 2.0], True])
seeds = st.integers(-3, 9) | st.just(2**62)
asked = dict(
    architecture=st.sampled_from(MODELS),
    dtype=st.sampled_from(DTYPES),
    text=prompts,
    layer=layers,
    target=mostly(targets, odd | st.lists(odd, max_size=2)),
    where=positions,
    steered=positions,
    site=st.sampled_from(SITES),
    coeff=mostly(st.floats(-8, 8), wild),
    radius=mostly(st.floats(0.1, 8), wild),
    n=mostly(st.integers(1, 3), st.sampled_from([0, -1, np.int64(2), 1.5, None])),
    seed=mostly(seeds, st.sampled_from([np.int64(4), 0.5, 10**30])),
    door=st.sampled_from(["capture", "span", "train", "complete", "surprise"]),
)


def answer(lm, door, text, layer, target, where, steered, site, coeff, radius, n, seed):
    """All the tensors that a door gives."""
    if door == "capture":
        found = capture(lm, text, layer, site)
        return [found[:, :, -1]]
    if door == "surprise":
        return [torch.tensor([x for x in surprise(lm, "a", [text]) if not np.isnan(x)])]
    if door == "complete":
        vectors = SteeringVectors(torch.ones(2, lm.d_model), layer, site, radius)
        said, first = complete(lm, text, vectors, coeff, where, n, abs(coeff), seed, first=True)
        assert len(said) == 2 and all(isinstance(words, str) for words in said[0] + said[1])
        return [first.exp()]
    span = LayerSpan(lm, text, layer, target, where, steered, site)
    if door == "span":
        return [span.delta(torch.ones(2, lm.d_model))]
    result = train(span, radius, n, steps=1, seed=seed, progress=False)
    sizes = change(span, result.vectors) if span.single else []
    return [result.vectors.tensor, result.best, *sizes]


@many
@given(**asked)
def test_numbers_or_one_sentence(architecture, dtype, door, **values):
    lm = model(architecture, dtype)
    if door == "complete" and not isinstance(values["coeff"], float):
        values["coeff"] = 1.0
    if door == "surprise" and not isinstance(values["text"], str):
        values["text"] = "one text"
    try:
        for tensor in answer(lm, door, **values):
            assert tensor.isfinite().all()
    except (ValueError, FloatingPointError) as error:  # ModelError is a ValueError
        said = str(error)
        assert "\n" not in said and len(said) > 20 and said.endswith("."), said
    assert no_hooks(lm)
