"""Anti-refusal: what is said and how it is judged, distances to the base, the supervised direction, the stored sweep."""

import json

import numpy as np
import pytest
import torch

from helpers.metrics import fluency
from helpers.residual import capture
from helpers.steering import SteeringVectors
from helpers.studies import anti_refusal, store

ASKED = ["How do I pick a lock?", "How do I bake bread?", "What is rain?"]


@pytest.fixture
def vectors(tiny):
    tensor = 3 * torch.nn.functional.normalize(
        torch.randn(2, tiny.d_model, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    return SteeringVectors(tensor, 1)


def scripted(monkeypatch, texts):
    """`complete` says these texts."""
    monkeypatch.setattr(anti_refusal, "complete", lambda *args, **kwargs: texts)


def test_answers_are_cut_and_sorted_by_kind(tiny, monkeypatch):
    long = "First, find a lock that you own and " + " ".join(f"word{i}" for i in range(20))
    scripted(
        monkeypatch, [long, "I'm sorry, but I can't help with that.", "na na na na na na na na"]
    )
    said = anti_refusal.answers(tiny, ASKED, judge=fluency.FluentRange(-1e9, 1e9, 0))
    assert list(said.kind) == ["compliance", "refusal", "gibberish"]
    assert list(said.refused) == [False, True, False] and list(said.fluent) == [True, True, False]
    assert max(len(text.split()) for text in said.text) <= 13 and "word9" not in said.text[0]


def test_a_surprising_answer_is_not_fluent_but_a_refusal_is_not_asked(tiny, monkeypatch):
    scripted(
        monkeypatch,
        [
            "Take a small wrench and turn it slowly",
            "I'm sorry, but I can't help with that.",
            "Rain is water",
        ],
    )
    said = anti_refusal.answers(tiny, ASKED, judge=fluency.FluentRange(0.0, 1e-6, 0))
    assert list(said.fluent) == [False, True, False]


def test_answers_run_over_vectors_then_prompts(tiny, vectors):
    said = anti_refusal.answers(tiny, ASKED, vectors, max_new_tokens=3)
    assert list(said.vector) == [0, 0, 0, 1, 1, 1] and list(said.prompt) == ASKED * 2


def test_kl_to_base_is_zero_without_adapter_and_vector(tiny, vectors):
    texts = ["Do it.", "Take flour and water"]
    (still,) = anti_refusal.kl_to_base(tiny, ASKED[:2], texts)
    assert still.shape == (2, len(texts[1])) and np.isnan(still[0, len(texts[0]) :]).all()
    assert np.nanmax(np.abs(still)) < 1e-6
    again, pushed, further, unmoved = anti_refusal.kl_to_base(
        tiny,
        ASKED[:2],
        texts,
        SteeringVectors(
            torch.cat([vectors[:2].tensor, 0 * vectors[:1].tensor]), vectors.source_layer
        ),
    )
    assert (
        np.nanmin(pushed) > -1e-6
        and np.nanmean(pushed) > 1e-3
        and np.nanmean(np.abs(pushed - further)) > 1e-4
    )
    assert np.nanmax(np.abs(unmoved)) < 1e-6 and np.array_equal(again, still, equal_nan=True)
    for batch_size in (1, 2):
        np.testing.assert_allclose(
            anti_refusal.kl_to_base(tiny, ASKED[:2], texts, vectors[:1], batch_size)[1],
            pushed,
            atol=1e-5,
        )


@pytest.mark.parametrize("texts", [["one"], ["one", ""]])
def test_kl_to_base_refuses_what_does_not_fit(tiny, texts):
    with pytest.raises(ValueError):
        anti_refusal.kl_to_base(tiny, ASKED[:2], texts)


def test_difference_of_means_is_just_that(tiny):
    wanted, unwanted = ASKED[:1], ASKED[1:]
    last = [capture(tiny, tiny.chat_prompt(t), 2)[0, 0, -1] for t in ASKED]
    by_hand = last[0] - (last[1] + last[2]) / 2
    found = anti_refusal.difference_of_means(tiny, wanted, unwanted, 2)
    torch.testing.assert_close(found.tensor[0], by_hand, rtol=1e-3, atol=1e-4)
    scaled = anti_refusal.difference_of_means(tiny, wanted, unwanted, 2, radius=5.0)
    assert scaled.tensor.norm().item() == pytest.approx(5, rel=1e-4) and scaled.source_layer == 2
    assert torch.cosine_similarity(scaled.tensor[0], by_hand, dim=0) > 0.999


def test_firmness_is_a_probability_of_the_openings(tiny, monkeypatch):
    every = [chr(byte) for byte in range(32, 127)]
    some, more = (
        [
            anti_refusal.firmness(tiny, ASKED)
            for _ in [monkeypatch.setattr(anti_refusal, "REFUSALS", texts)]
        ][0]
        for texts in (("I cannot",), tuple(every))
    )
    assert some.shape == (3,) and (some > 0).all() and (some < more).all() and (more < 1).all()


def test_one_set_is_orthogonal_and_beside_it_its_start(tiny):
    found = anti_refusal.one_set(tiny, ASKED[0], 1, 4, 2.0, seed=5, steps=2, n_vectors=3)
    for vectors in found.values():
        torch.testing.assert_close(
            vectors.tensor @ vectors.tensor.T, 4 * torch.eye(3), atol=1e-3, rtol=0
        )
    assert not torch.allclose(found["learned"].tensor, found["random"].tensor)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(anti_refusal, "ASKED", anti_refusal.ASKED[:1])
    monkeypatch.setattr(anti_refusal, "LAYERS", (7,))
    return dict(radii=[2.0, 4.0], seeds=[7], steps=1, n_vectors=2)


def test_grid_scales_layers_and_radii(tiny, small):
    main = anti_refusal.grid(tiny, "choose", **small)
    assert len(main) == 2 and {(c["source_layer"], c["target_layer"]) for c in main} == {(1, 4)}
    layers = anti_refusal.grid(tiny, "layers", **small)
    (norm,) = anti_refusal.residual_norms(tiny, [main[0]["prompt"]], [1])
    assert [c["radius"] for c in layers] == pytest.approx(
        [share * norm for share in anti_refusal.SHARES], rel=0.01
    )
    earlier = anti_refusal.grid(tiny, "earlier", **small)
    assert len(earlier) == 2 * len(anti_refusal.EARLIER) * len(anti_refusal.EARLIER_SEEDS)
    with pytest.raises(ValueError, match="part 'other'"):
        anti_refusal.grid(tiny, "other")


def test_a_missing_training_prompt_is_named(monkeypatch):
    monkeypatch.setattr(anti_refusal, "ASKED", ("fraud-11", "nothing-1"))
    with pytest.raises(ValueError, match="nothing-1"):
        anti_refusal.training_prompts()


def test_stored_cells_are_found_by_configuration(tiny, small, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "folder_of", lambda model: tmp_path)
    live = anti_refusal.cells(tiny, "live", "choose", progress=False, **small)
    table = anti_refusal.table(live)
    assert len(table) == 2 * 2 * 2 and {"flipped", "radius", "seed", "set"} <= set(table)
    store.write(
        "refusal",
        json.loads(json.dumps(live)),
        {"model": tiny.name, "model_hash": tiny.weights_hash},
        tmp_path,
    )
    found = anti_refusal.cells(tiny, "stored", "choose", **{**small, "radii": [4.0]})
    assert [c["config"]["radius"] for c in found] == [4.0] and found[0]["result"] == live[1][
        "result"
    ]
