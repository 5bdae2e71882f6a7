"""The whole road, on every architecture and in every dtype: load, layer span, train, steer, complete, metrics, save, load."""

import pytest
import torch
from conftest import ALL_ARCHITECTURES, tiny_model
from test_metrics import surprise_directly
from test_residual import one_thread  # noqa: F401

from helpers import metrics
from helpers.generation import complete
from helpers.models import load
from helpers.residual import LayerSpan, capture
from helpers.steering import SteeringVectors, steer
from helpers.training import random_vectors, train

PROMPTS = ["Hello there, you", "A prompt that is longer than the window", "Hm."]
TIED = {
    "llama_tied": True,
    "llama_untied_mqa": False,
    "gpt2": True,
    "gemma": True,
    "bloom": True,
    "mistral": False,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of an architecture, saved once for all its dtypes."""
    made = {}

    def folder(architecture):
        if architecture not in made:
            made[architecture], lm = tmp_path_factory.mktemp(architecture), tiny_model(architecture)
            lm.model.save_pretrained(made[architecture])
            lm.tokenizer.save_pretrained(made[architecture])
        return made[architecture]

    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")
def test_the_whole_road(architecture, dtype, folders, tmp_path):
    lm = load(folders(architecture), dtype=dtype)
    assert lm.n_layers == 4 and lm.d_model == 32 and lm.dtype == getattr(torch, dtype)
    if architecture in TIED:
        tied = lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
        assert tied == TIED[architecture]

    span = LayerSpan(lm, PROMPTS, 1, 3, slice(-2, None))
    result = train(span, 3.0, 3, steps=3, progress=False)
    vectors = result.vectors
    assert (result.best > result.start).all() and vectors.tensor.norm(dim=1).sub(
        3
    ).abs().max() < 1e-3

    clean = capture(lm, PROMPTS, 3)[0]
    with steer(lm, vectors[0]):
        moved = capture(lm, PROMPTS, 3)[0]
    expected, delta = (moved - clean)[:, -2:], span.delta(vectors.tensor[:1])[0]
    assert (delta - expected).norm() <= (
        1e-4 if dtype == "float32" else 0.05
    ) * expected.norm()  # the span is the model
    assert torch.equal(
        capture(lm, PROMPTS, 3)[0].nan_to_num(), clean.nan_to_num()
    )  # which is what it was

    said = complete(lm, PROMPTS, vectors, max_new_tokens=5)
    own = complete(lm, PROMPTS, max_new_tokens=5)
    assert len(said) == 3 and complete(lm, PROMPTS, 0 * vectors, max_new_tokens=5) == [own] * 3
    if dtype == "float32":  # padding and batch change nothing (in half precision two words may tie)
        for tokens in ("all", "generated"):
            together = complete(lm, PROMPTS, vectors[:2], max_new_tokens=5, tokens=tokens)
            assert together == [
                [
                    complete(lm, prompt, vector, max_new_tokens=5, tokens=tokens)[0][0]
                    for prompt in PROMPTS
                ]
                for vector in (vectors[0], vectors[1])
            ]

    absolute, relative = metrics.change(span, vectors)
    assert (
        relative.shape == (3, 3)
        and (relative > metrics.change(span, random_vectors(span, 1e-3, 3))[1]).all()
    )
    assert torch.as_tensor(metrics.kl_next_token(lm, PROMPTS, vectors)).isfinite().all()
    asked, texts = (
        [PROMPTS[1], PROMPTS[0], PROMPTS[1]],
        ["some words", "others, and a few more", "Five!"],
    )
    nll, expected = (
        metrics.surprise(lm, asked, texts),
        [surprise_directly(lm, *pair) for pair in zip(asked, texts)],
    )
    assert abs(nll - expected).max() <= (1e-3 if dtype == "float32" else 0.1)

    vectors.save(tmp_path / "vectors.safetensors")
    again = load(folders(architecture), dtype=dtype)
    kept = SteeringVectors.load(tmp_path / "vectors.safetensors", again)
    assert torch.equal(kept.tensor, vectors.tensor) and again.weights_hash == lm.weights_hash
    assert complete(again, PROMPTS, kept, max_new_tokens=5) == said


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")
def test_every_site_is_there_or_refused_by_name(architecture):
    lm = tiny_model(architecture)
    for site in ("resid_pre", "resid_mid", "mlp_out", "resid_post"):
        try:
            delta = LayerSpan(lm, PROMPTS, 1, 3, slice(-2, None), site=site).delta(
                torch.ones(1, 32)
            )
        except ValueError as error:
            assert f"site {site!r} does not exist in {type(lm.blocks[1]).__name__}" in str(error)
            continue
        assert delta.abs().max() > 1e-3
