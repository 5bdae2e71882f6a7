"""helpers.metrics: numbers against direct computations and published tables; the distance against people's own judgement."""

import copy

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_residual import PROMPTS, few, ids_of, one_thread, run_plain, some_vectors  # noqa: F401

from helpers import metrics
from helpers.generation import complete
from helpers.models import LanguageModel, prompts
from helpers.residual import LayerSpan, capture
from helpers.steering import SteeringVectors, steer

TEXTS = [
    "The quick brown fox jumps.",
    "Bread needs flour, water and salt.",
    "Short text.",
    "No, not at all; it rained a week.",
]


def vectors_for(lm, n=3, norm=4.0):
    return SteeringVectors(some_vectors(lm, n, norm), 1, radius=norm)


# --- change inside the model ------------------------------------------------------------------------------------------


def test_change_is_the_mean_over_each_prompts_own_tokens(tiny):
    vectors = some_vectors(tiny)
    absolute, relative = metrics.change(LayerSpan(tiny, PROMPTS, 1, 4), vectors)
    assert absolute.shape == relative.shape == (3, 3)
    for p, prompt in enumerate(PROMPTS):
        span = LayerSpan(tiny, prompt, 1, 4)
        size, clean = span.delta(vectors)[:, 0].norm(dim=-1), span.clean_target[0].norm(dim=-1)
        torch.testing.assert_close(absolute[:, p], size.mean(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(relative[:, p], (size / clean).mean(1), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"one target layer, this one has \[3, 4\]"):
        metrics.change(LayerSpan(tiny, PROMPTS, 1, [3, 4]), vectors)


def kl(clean, steered):
    """KL in nats between rows of logits, in float64."""
    p, q = clean.double().log_softmax(-1), steered.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_kl_of_the_next_token(architectures):
    lm, vectors, coeffs = architectures, vectors_for(architectures, norm=20.0), [1.0, -1.0, 0.3]
    values = metrics.kl_next_token(lm, PROMPTS, vectors, coeffs, batch_size=4)
    assert values.shape == (3, 3) and (values >= -1e-6).all() and values.max() > 1e-2
    for v, coeff in enumerate(coeffs):
        for p, prompt in enumerate(PROMPTS):
            clean = run_plain(lm, ids_of(lm, prompt))[0][-1]
            with steer(lm, vectors[v], coeff):
                expected = kl(clean, run_plain(lm, ids_of(lm, prompt))[0][-1])
            assert values[v, p].item() == pytest.approx(expected.item(), rel=1e-2, abs=1e-5)


def test_kl_is_zero_without_steering(tiny):
    assert metrics.kl_next_token(tiny, PROMPTS, vectors_for(tiny), coeff=0).abs().max() < 1e-5
    assert (
        metrics.kl_along(tiny, PROMPTS[0], TEXTS[0], vectors_for(tiny), coeff=0).abs().max() < 1e-5
    )
    assert metrics.kl_next_token(tiny, PROMPTS[0], vectors_for(tiny)).shape == (3, 1)


def test_kl_along_a_text(tiny):
    vectors, prompt, text = vectors_for(tiny), PROMPTS[1], TEXTS[0]
    values = metrics.kl_along(tiny, prompt, text, vectors, coeff=[1.0, 2.0, -1.0])
    before, after = (
        ids_of(tiny, prompt),
        tiny.tokenizer(text, add_special_tokens=False)["input_ids"],
    )
    clean = run_plain(tiny, before + after)[0]
    for v, coeff in enumerate([1.0, 2.0, -1.0]):
        with steer(tiny, vectors[v], coeff):
            steered = run_plain(tiny, before + after)[0]
        expected = kl(clean, steered)[len(before) - 1 : -1].mean().item()
        assert values[v].item() == pytest.approx(expected, rel=1e-2) and expected > 1e-3


@pytest.mark.parametrize(
    "call",
    [
        lambda lm, c: metrics.kl_next_token(lm, PROMPTS, vectors_for(lm), c),
        lambda lm, c: metrics.kl_along(lm, PROMPTS[0], TEXTS[0], vectors_for(lm), c),
    ],
)
def test_a_wrong_number_of_coefficients_is_refused(tiny, call):
    with pytest.raises(ValueError, match="one for each of the 3 vectors"):
        call(tiny, [1.0, 2.0])


# --- fluency ----------------------------------------------------------------------------------------------------------


def surprise_directly(lm, prompt, text):
    """One unbatched pass; the mean over the completion's tokens from the 5th on."""
    before, after = ids_of(lm, prompt), lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    logp = run_plain(lm, before + after)[0].log_softmax(-1)
    nll = [-logp[len(before) - 1 + k, token].item() for k, token in enumerate(after)]
    return np.mean(nll[4:]) if len(nll) > 4 else np.nan


def test_surprise_is_the_direct_computation(architectures):
    lm, texts = architectures, [*TEXTS, "Hi", "", "Five!", "Oops"]
    asked = [PROMPTS[i % 3] for i in range(len(texts))]
    expected = [surprise_directly(lm, p, t) for p, t in zip(asked, texts)]
    assert np.isnan(expected).tolist() == [False] * 4 + [True, True, False, True]
    for batch_size in (1, 3, 8):
        np.testing.assert_allclose(
            metrics.surprise(lm, asked, texts, batch_size), expected, rtol=1e-4
        )
    same = metrics.surprise(lm, PROMPTS[1], texts[:3])
    np.testing.assert_allclose(
        same, [surprise_directly(lm, PROMPTS[1], t) for t in texts[:3]], rtol=1e-4
    )


def test_token_nll_is_one_at_a_time_the_same(tiny):
    texts = ["a longer text", "b", "", "ccc"]
    together = metrics.token_nll(tiny, ["hello"] * 4, texts)
    assert [len(v) for v in together] == [13, 1, 0, 3]
    for text, values in zip(texts, together):
        np.testing.assert_allclose(
            metrics.token_nll(tiny, ["hello"], [text])[0], values, rtol=1e-3, atol=1e-4
        )


def test_surprise_refuses_lists_of_different_lengths(tiny):
    for asked in (PROMPTS[:2], PROMPTS):
        with pytest.raises(ValueError, match=f"{len(asked)} prompts do not fit 4 completions"):
            metrics.surprise(tiny, asked, TEXTS)
    assert len(metrics.surprise(tiny, "Hm.", [])) == 0


def test_fluency_and_distance_are_those_of_the_base_model_without_its_adapter():
    peft = pytest.importorskip("peft")
    lm = tiny_model("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
        wrapped = LanguageModel(
            lm.name,
            peft.get_peft_model(copy.deepcopy(lm.model), config),
            lm.tokenizer,
            "0",
            organism="o",
        )
    with torch.no_grad():
        adapted = wrapped.model(**wrapped.encode(PROMPTS)).logits
        assert not torch.allclose(adapted, lm.model(**lm.encode(PROMPTS)).logits, atol=0.1)
    np.testing.assert_allclose(
        metrics.surprise(wrapped, PROMPTS[0], TEXTS),
        metrics.surprise(lm, PROMPTS[0], TEXTS),
        rtol=1e-5,
    )
    torch.testing.assert_close(
        metrics.distance(wrapped, TEXTS, TEXTS), metrics.distance(lm, TEXTS, TEXTS)
    )
    assert metrics.fluent_range(wrapped, PROMPTS, max_new_tokens=6) == metrics.fluent_range(
        lm, PROMPTS, max_new_tokens=6
    )
    with torch.no_grad():
        assert torch.equal(
            wrapped.model(**wrapped.encode(PROMPTS)).logits, adapted
        )  # and it is back afterwards


@pytest.mark.parametrize(
    "text, share",
    [
        ("one two three four", 1.0),
        ("go go go go go", 0.25),
        ("a b a b a b", 0.4),
        ("haha", 2 / 3),
        ("aaaa", 1 / 3),
        ("", 0.0),
        ("  ", 0.0),
        ("x", 0.0),
    ],
)
def test_distinct2(text, share):
    assert metrics.distinct2(text) == pytest.approx(share)


@few
@given(text=st.text(max_size=30))
def test_distinct2_is_a_share(text):
    assert 0 <= metrics.distinct2(text) <= 1


def test_fluent_range_wants_a_usual_surprise_and_no_loop():
    fluent = metrics.FluentRange(1.0, 3.0, 100)
    for nll, text, expected in [
        (2.0, "it is quite all right", True),
        (1.0, "at the lower edge", True),
        (0.9, "too plain it is", False),
        (3.1, "too odd it is", False),
        (np.nan, "hm", False),
        (2.0, "no no no no no no", False),
    ]:
        assert fluent([nll], [text]).tolist() == [expected]
    assert fluent([2.0, 9.0], ["one of two", "two of two"]).tolist() == [True, False]


def test_fluent_range_covers_what_the_model_says(tiny):
    asked = [f"{i} {PROMPTS[i % 3]}" for i in range(12)]
    fluent = metrics.fluent_range(tiny, asked, max_new_tokens=12)
    nll = {
        t: metrics.surprise(tiny, asked, complete(tiny, asked, temperature=t, max_new_tokens=12))
        for t in (0.0, 1.0)
    }
    assert fluent.n == sum(np.isfinite(x).sum() for x in nll.values()) > 20
    ends = [np.nanpercentile(x, [1, 99]) for x in nll.values()]
    assert (fluent.low, fluent.high) == pytest.approx(
        (min(e[0] for e in ends), max(e[1] for e in ends)), rel=1e-5
    )
    assert ends[0][0] < ends[1][0]
    for too_little in (dict(prompts=asked, max_new_tokens=1), dict(prompts=PROMPTS[0])):
        with pytest.raises(
            ValueError, match="too few or too short to calibrate on; use more prompts or tokens"
        ):
            metrics.fluent_range(tiny, **too_little)


# --- distance ---------------------------------------------------------------------------------------------------------


def test_distance_is_symmetric_and_zero_to_itself(architectures):
    d = metrics.distance(architectures, TEXTS, TEXTS)
    assert (
        d.shape == (4, 4)
        and d.diagonal().abs().max() < 1e-5
        and d.min() > -1e-5
        and d.max() <= 2 + 1e-5
    )
    torch.testing.assert_close(d, d.T)
    off = d[~torch.eye(4, dtype=torch.bool)]
    assert off.min() > 1e-3
    assert metrics.diversity(architectures, TEXTS) == pytest.approx(off.mean().item(), abs=1e-5)
    torch.testing.assert_close(
        metrics.distance(architectures, TEXTS[:1], TEXTS[1:]), d[:1, 1:], atol=1e-5, rtol=1e-4
    )


def test_embedding_does_not_depend_on_the_batch_and_every_token_counts_alike(tiny):
    together = metrics.embed(tiny, TEXTS)
    torch.testing.assert_close(
        together, torch.cat([metrics.embed(tiny, t) for t in TEXTS]), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(4))
    means = metrics._means(tiny, TEXTS)
    for text, mean in zip(TEXTS, means):
        hidden = capture(tiny, text, 3)[0, 0, 1:]  # without the first token
        torch.testing.assert_close(
            mean, torch.nn.functional.normalize(hidden, dim=-1).mean(0), atol=1e-5, rtol=1e-4
        )


def test_own_spread_is_a_quantile_of_the_models_own_samples(tiny):
    options = dict(temperature=0.7, max_new_tokens=10, seed=2)
    apart = metrics.distance(tiny, "a clean answer", complete(tiny, PROMPTS[:1] * 7, **options))[0]
    for q, expected in ((0, apart.min()), (0.5, apart.median(dim=0).values), (1, apart.max())):
        spread = metrics.own_spread(
            tiny, PROMPTS[0], "a clean answer", n_samples=7, quantile=q, **options
        )
        assert spread == pytest.approx(expected.item(), abs=1e-5)


def test_degenerate_texts_have_a_distance(tiny):
    assert metrics.distance(tiny, ["", " ", "x"], TEXTS).isfinite().all()
    assert np.isnan(metrics.diversity(tiny, TEXTS[:1])) and metrics.diversity(
        tiny, TEXTS[:1] * 3
    ) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="texts is empty"):
        metrics.embed(tiny, [])


def test_distance_ranks_texts_as_people_do(default_lm):
    """A paraphrase is nearer than the same content in another voice, and that nearer than another subject."""
    sets = prompts.items("distance_check")
    embedded = metrics.embed(
        default_lm,
        [item[k] for k in ("original", "paraphrase", "persona", "unrelated") for item in sets],
    )
    original, *others = embedded.view(4, len(sets), -1)
    paraphrase, persona, unrelated = (1 - (original * other).sum(-1) for other in others)
    assert paraphrase.mean() < persona.mean() < unrelated.mean()
    assert (paraphrase < unrelated).float().mean() >= 0.8
    assert (paraphrase < persona).float().mean() >= 0.8 and (
        persona < unrelated
    ).float().mean() >= 0.8


# --- rates and intervals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hits, n, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 10, 0.0179, 0.4042),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),  # the last four: Newcombe (1998), table I
    ],
)
def test_wilson_against_published_values(hits, n, low, high):
    assert metrics.wilson(hits, n) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


@few
@given(n=st.integers(0, 200), share=st.floats(0, 1))
def test_wilson_is_an_interval_around_the_rate(n, share):
    hits = round(share * n)
    low, high = metrics.wilson(hits, n)
    assert (
        0 <= low <= (hits / n if n else 0.5) + 1e-12
        and (hits / n if n else 0.5) - 1e-12 <= high <= 1
    )
    mirrored = metrics.wilson(n - hits, n)
    assert mirrored == (pytest.approx(1 - high, abs=1e-9), pytest.approx(1 - low, abs=1e-9))
    wider = metrics.wilson(hits, n, z=2.576)
    assert wider[0] <= low + 1e-12 and high <= wider[1] + 1e-12


@pytest.mark.parametrize("hits, n", [(3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_rate(hits, n):
    with pytest.raises(
        ValueError, match=rf"{hits} hits of {n} is not a rate: hits must lie in 0 … {n}"
    ):
        metrics.wilson(hits, n)


def test_bootstrap_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(1.0, 2.0, (150, 30))
    covered = [
        low <= 1.0 <= high
        for low, high in (
            metrics.bootstrap(s, n_resamples=400, seed=i) for i, s in enumerate(samples)
        )
    ]
    assert 0.87 <= np.mean(covered) <= 0.99
    covered = [
        low <= 1.0 <= high
        for low, high in (metrics.bootstrap(s, level=0.5, n_resamples=400) for s in samples)
    ]
    assert 0.35 <= np.mean(covered) <= 0.62


def test_bootstrap_resamples_units_with_a_seed():
    values = np.random.default_rng(1).normal(size=10)
    assert (
        metrics.bootstrap(values) == metrics.bootstrap(values) != metrics.bootstrap(values, seed=1)
    )
    low, high = metrics.bootstrap(values, np.median)
    assert low <= np.median(values) <= high
    rows = np.repeat(
        values[:, None], 50, axis=1
    )  # 50 vectors of one set that all say the same are not 50 observations
    assert metrics.bootstrap(rows) == pytest.approx(metrics.bootstrap(values))
    assert metrics.bootstrap([3.0] * 5) == (3.0, 3.0)
    for bad in ([1.0], 1.0, []):
        with pytest.raises(ValueError, match="at least two units"):
            metrics.bootstrap(bad)
