"""Controls, the rule for R, absorption, cells, and the files that sweeps are kept in."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from helpers import metrics
from helpers.models import DEFAULT, load
from helpers.residual import LayerSpan, capture
from helpers.studies import goldilocks, store
from helpers.training import controls, jacobian, normalise, random_vectors

QUESTION = "Why do cats purr?"


@pytest.fixture(scope="module")
def lm():
    return load("tiny-random")


@pytest.fixture(scope="module")
def span(lm):
    return LayerSpan(lm, lm.chat_prompt(QUESTION), 1, 4, slice(-3, None))


@pytest.fixture(scope="module")
def cells(lm):
    config = {
        "prompt": QUESTION,
        "source_layer": 1,
        "target_layer": 4,
        "radius": 2.0,
        "seed": 3,
        "steps": 1,
        "max_new_tokens": 8,
        "n_vectors": {"learned": 2, "random": 2, "covariance": 1, "scaled": 1},
        "coeffs": [-1.0, 1.0],
        "sampled": ["random"],
    }
    return goldilocks.live([config], lm, progress=False)


# ---------------------------------------------------------------------------------------------- controls
def test_covariance_vectors_have_the_norm_and_prefer_the_large_directions(lm, span):
    drawn = controls.covariance_vectors(span, 3.0, 64, seed=1).tensor
    assert torch.allclose(drawn.norm(dim=1), torch.full((64,), 3.0), rtol=1e-5)
    assert torch.equal(drawn, controls.covariance_vectors(span, 3.0, 64, seed=1).tensor)
    rows = capture(lm, goldilocks.prompts.texts("reference_texts"), 1)[0]
    rows = rows[~rows.isnan().any(-1)]
    top = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:3]
    isotropic = random_vectors(span, 3.0, 64, seed=1, orthogonal=False).tensor
    assert (drawn @ top.T).pow(2).sum(1).mean() > 1.5 * (isotropic @ top.T).pow(2).sum(1).mean()


def test_scaled_vectors_cause_the_wanted_change_and_keep_their_direction(span):
    random = random_vectors(span, 0.5, 3, seed=2)
    wanted = 3 * metrics.change(span, random)[1].median().item()
    scaled = controls.scaled_to_effect(span, random, wanted)
    assert torch.allclose(metrics.change(span, scaled)[1][:, 0], torch.full((3,), wanted), rtol=0.1)
    assert torch.allclose(normalise(scaled.tensor), normalise(random.tensor), atol=1e-5)


def test_scaling_stops_at_the_limit_and_leaves_strong_vectors_alone(span):
    random = random_vectors(span, 0.5, 2, seed=2)
    assert torch.allclose(
        controls.scaled_to_effect(span, random, 1e9, upto=4.0).tensor, 4 * random.tensor
    )
    assert torch.allclose(controls.scaled_to_effect(span, random, 1e-9).tensor, random.tensor)


# ---------------------------------------------------------------------------------------------- the rule for R
def toy(function, d_model=8):
    return SimpleNamespace(lm=SimpleNamespace(d_model=d_model), delta=function)


def test_jacobian_ratio_is_zero_for_a_linear_span_and_known_for_a_cubic_one():
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    assert jacobian.jacobian_ratio(toy(lambda v: v @ matrix), [1, 10, 100]).max() < 1e-4
    cubic = toy(lambda v: v * (1 + (v.norm(dim=-1, keepdim=True) / 100) ** 2))
    assert jacobian.jacobian_ratio(cubic, [10, 50]) == pytest.approx([0.01, 0.25], rel=0.01)
    assert jacobian.calibrated_radius(cubic) == pytest.approx(100 * math.sqrt(0.5), rel=0.03)


def test_the_calibrated_radius_has_the_ratio_asked_for(span):
    for ratio in (0.2, 0.5):
        radius = jacobian.calibrated_radius(span, ratio, n_directions=4)
        assert jacobian.jacobian_ratio(span, [radius], n_directions=4)[0] == pytest.approx(
            ratio, rel=0.03
        )


def test_a_linear_span_has_no_calibrated_radius():
    with pytest.raises(ValueError, match="linear"):
        jacobian.calibrated_radius(toy(lambda v: 2 * v), n_directions=2)
    with pytest.raises(ValueError, match="ratio 0 is not"):
        jacobian.calibrated_radius(toy(lambda v: 2 * v), 0)


@pytest.mark.parametrize("radii", [[], [0.0], [-1.0, 2.0], [float("nan")]])
def test_bad_radii_are_named(span, radii):
    with pytest.raises(ValueError, match="radi"):
        jacobian.jacobian_ratio(span, radii)


# ---------------------------------------------------------------------------------------------- absorption
def test_absorption_starts_with_theta_itself_and_its_parts_add_up(lm, span):
    vectors = random_vectors(span, 2.0, 3, seed=4)
    found = goldilocks.absorption(lm, span.prompts[0], vectors, 4)
    assert found["cosine"].shape == (3, 3, 3) and torch.allclose(
        found["cosine"][0], torch.ones(3, 3), atol=1e-4
    )
    clean = capture(lm, span.prompts, 1)[0, 0, -3:].norm(dim=-1)
    assert torch.allclose(found["relative"][0], (2.0 / clean).expand(3, 3), rtol=1e-4)
    delta = span.delta(vectors)[:, 0].norm(
        dim=-1
    )  # what leaves the last block: Δ + both responses, part along, part aside
    last = capture(lm, span.prompts, 3)[0, 0, -3:].norm(dim=-1) * found["relative"][-1]
    middle = last * ((1 + found["attention"][-1]) ** 2 + found["attention aside"][-1] ** 2).sqrt()
    leaves = middle * ((1 + found["mlp"][-1]) ** 2 + found["mlp aside"][-1] ** 2).sqrt()
    assert torch.allclose(leaves, delta, rtol=1e-3)


def test_absorption_needs_a_later_block(lm, span):
    with pytest.raises(ValueError, match="upto 1 does not come after source_layer 1: use 2 … 5"):
        goldilocks.absorption(lm, span.prompts[0], random_vectors(span, 1.0, 1), 1)


# ---------------------------------------------------------------------------------------------- cells and their table
def test_a_cell_holds_every_vector_coefficient_and_sample(cells):
    rows = cells[0]["result"]["rows"]
    assert len(rows) == (2 + 2 + 1 + 1) * 2 + 2 * 2
    assert {r["temperature"] for r in rows if r["kind"] == "learned"} == {0.0}
    assert all(r["radius"] == pytest.approx(2.0, rel=1e-3) for r in rows if r["kind"] != "scaled")
    json.dumps(cells, allow_nan=False)


def test_a_cell_is_the_same_every_time(lm, cells):
    again = goldilocks.live([cells[0]["config"]], lm, progress=False)
    assert [r["objective"] for r in again[0]["result"]["rows"]] == pytest.approx(
        [r["objective"] for r in cells[0]["result"]["rows"]]
    )


def test_radii_that_speak_in_one_batch_are_the_cells_one_by_one(lm, cells):
    configs = [{**cells[0]["config"], "model": lm.name, "radius": r} for r in (2.0, 5.0)]
    alone = goldilocks.live(configs, lm, progress=False)
    (together,) = goldilocks._together(configs)
    for one, result in zip(alone, goldilocks.run_cells(**together)["results"], strict=True):
        for a, b in zip(one["result"]["rows"], result["rows"], strict=True):
            assert {k: v for k, v in a.items() if isinstance(v, str)} == {
                k: v for k, v in b.items() if isinstance(v, str)
            }
            assert [a[k] for k in ("vector", "coeff", "temperature")] == [
                b[k] for k in ("vector", "coeff", "temperature")
            ]
            assert [a[k] for k in ("radius", "objective", "kl")] == pytest.approx(
                [b[k] for k in ("radius", "objective", "kl")], rel=2e-3
            )


def test_the_kl_of_a_cell_is_that_of_the_next_token(lm, span, cells):
    theta = random_vectors(span, 2.0, 2, seed=3)[0]
    (row,) = [
        r
        for r in cells[0]["result"]["rows"]
        if (r["kind"], r["vector"], r["coeff"], r["temperature"]) == ("random", 0, -1.0, 0)
    ]
    assert row["kl"] == pytest.approx(
        metrics.kl_next_token(lm, span.prompts, -1.0 * theta).item(), rel=2e-3
    )


def test_opposite_coefficients_are_opposite_pushes(lm, span, cells):
    rows = [
        r
        for r in cells[0]["result"]["rows"]
        if r["kind"] == "random" and r["vector"] == 0 and r["temperature"] == 0
    ]
    theta = random_vectors(span, 2.0, 2, seed=3)[0]
    for row in rows:
        assert row["relative"] == pytest.approx(
            metrics.change(span, row["coeff"] * theta)[1].item(), rel=2e-3
        )
    assert {r["coeff"] for r in rows} == {-1.0, 1.0}


def test_the_table_judges_by_distance_and_fluency(cells):
    config, result = cells[0]["config"], dict(cells[0]["result"])
    base = {
        "kind": "learned",
        "vector": 0,
        "coeff": 1.0,
        "temperature": 0.0,
        "radius": 2.0,
        "objective": 1.0,
        "relative": 0.1,
        "kl": 0.1,
    }
    text = "the cat sat on a mat and looked at the moon"
    rows = [
        {**base, "text": text, "distance": d, "surprise": s}
        for d, s in ((0.6, 2.0), (0.4, 2.0), (0.6, 9.0), (0.6, None))
    ]
    judged = store.table(
        [
            {
                "config": config,
                "result": {**result, "own_spread": 0.5, "fluent": [1.0, 3.0], "rows": rows},
            }
        ]
    )
    assert judged.changed.tolist() == [True, False, True, True]
    assert judged.fluent.tolist() == [True, True, False, False]
    assert judged.both.tolist() == [True, False, False, False] and set(judged.radius) == {2.0}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"radius": -1.0}, "radius -1"),
        ({"target_layer": 1}, "must come after source_layer 1"),
        ({"n_vectors": {"lucky": 2}}, "kind 'lucky' is unknown"),
        ({"source_layer": 9}, "use 0 … 5"),
    ],
)
def test_a_cell_refuses_bad_input_in_a_sentence(lm, cells, change, message):
    with pytest.raises(ValueError, match=message):
        goldilocks.live([{**cells[0]["config"], **change}], lm, progress=False)


def test_a_prompt_of_one_token_is_refused(lm):
    short = SimpleNamespace(
        chat_prompt=lambda text: text,
        encode=lambda text: {"input_ids": torch.ones(1, 1, dtype=torch.long)},
    )
    with pytest.raises(ValueError, match="'a' has 1 token"):
        goldilocks.cell(short, "a", 1, 4, 2.0, 0)


@pytest.mark.parametrize("layers", [[], [3, 1], [1, 1], [1, 4], [9]])
def test_source_layers_in_order_and_before_the_target(lm, layers):
    with pytest.raises(ValueError, match="source"):
        goldilocks.check_layers(lm, layers, 4)


# ---------------------------------------------------------------------------------------------- grids and files
def test_range_is_confirmed_on_other_prompts_and_seeds():
    main = goldilocks.grids("m")["goldilocks"]
    prompts_of, seeds_of = (
        {p: {c[key] for c in main if c["part"] == p} for p in "AB"} for key in ("prompt", "seed")
    )
    assert not prompts_of["A"] & prompts_of["B"] and not seeds_of["A"] & seeds_of["B"]
    assert len(prompts_of["B"]) >= 3 and len(seeds_of["B"]) >= 3


@pytest.mark.parametrize("depth", [6, 12, 30, 32])
def test_grids_scale_with_the_depth(depth):
    for configs in goldilocks.grids("m", depth).values():
        assert all(0 <= c["source_layer"] < c["target_layer"] < depth for c in configs)


def test_a_sweep_is_read_back_for_its_own_model_only(tmp_path, lm, cells):
    meta = {"model": lm.name, "model_hash": lm.weights_hash}
    store.write("small", cells, meta, tmp_path)
    assert store.read("small", lm, tmp_path)["cells"] == json.loads(json.dumps(cells))
    store.write("small", cells, {**meta, "model_hash": "abc"}, tmp_path)
    with pytest.raises(
        ValueError, match="made by tiny-random with weights abc.*python -m helpers grid small"
    ):
        store.read("small", lm, tmp_path)


def test_a_missing_or_broken_sweep_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no sweep 'none'.*python -m helpers grid none"):
        store.read("none", folder=tmp_path)
    for content in (
        "{",
        "[]",
        '{"meta": {}}',
        '{"meta": {"model": "m", "model_hash": "x"}, "cells": []}',
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json is not a sweep"):
            store.read("bad", folder=tmp_path)


def test_only_the_default_models_sweeps_go_into_the_repository():
    assert store.folder_of(DEFAULT) == store.FOLDER
    assert store.FOLDER not in store.folder_of("org/model").parents


def test_an_unknown_grid_is_refused():
    with pytest.raises(ValueError, match="no grid 'x': use one of goldilocks, steps, explorer"):
        goldilocks.compute("x", "tiny-random")


def test_compute_writes_what_read_reads(tmp_path, lm, monkeypatch):
    small = {"steps": goldilocks.grids(lm.name, lm.n_layers, n_prompts=1, n_seeds=1)["steps"][:2]}
    monkeypatch.setattr(
        goldilocks,
        "grids",
        lambda *a, **k: {"steps": [{**c, "max_new_tokens": 4} for c in small["steps"]]},
    )
    path = goldilocks.compute(
        "steps", "tiny-random", workers=1, folder=tmp_path / "out", store=tmp_path / "store"
    )
    sweep = store.read("steps", lm, tmp_path / "out")
    assert (
        path.name == "steps.json"
        and len(sweep["cells"]) == 2
        and sweep["meta"]["command"].endswith("--model tiny-random")
    )


def test_another_prompt_set_is_computed_beside_the_committed_one(tmp_path, monkeypatch):
    configs = goldilocks.grids("m", prompt_set="geography")["explorer"]
    assert {c["prompt"] for c in configs} <= set(
        goldilocks.prompts.texts("geography", split="train")
    )
    assert len({c["prompt"] for c in configs}) == 3
    monkeypatch.setenv("WORKBOOK_BUILD", str(tmp_path))
    folders = {
        store.folder_of(model, there)
        for model in (DEFAULT, "org/model")
        for there in ("everyday", "geography")
    }
    assert len(folders) == 4 and store.folder_of(DEFAULT, "geography").is_relative_to(tmp_path)
    small = [
        {**c, "steps": 1, "max_new_tokens": 4}
        for c in goldilocks.grids("tiny-random", 6, [2.0], 1, 1, "geography")["explorer"][:1]
    ]
    monkeypatch.setattr(goldilocks, "grids", lambda *a, prompt_set, **k: {"explorer": small})
    path = goldilocks.compute(
        "explorer", "tiny-random", workers=1, store=tmp_path / "store", prompt_set="geography"
    )
    meta = json.loads(path.read_text())["meta"]
    assert path.parent.name == "tiny-random--geography" and meta["command"].endswith(
        "--model tiny-random --prompts geography"
    )
