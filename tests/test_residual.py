"""helpers.residual: the layer span against full forward passes that an independent, plain hook has changed."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import residual
from helpers.models import LanguageModel, random_weights_
from helpers.residual import SITES, LayerSpan, capture, resolve_layer, select_tokens
from helpers.steering import SteeringVectors, steer

PROMPTS = ["A cat sat.", "How do I bake bread at home?", "Hm."]  # three lengths: padding matters
PARALLEL = ("tiny-gpt_neox", "tiny-phi")  # attention and MLP side by side: nothing between them
# Where attention's contribution to the residual leaves it, by name: adding there is adding to resid_mid.
ATTENTION_OUT = {
    "tiny-random": "self_attn.o_proj",
    "tiny-llama": "self_attn.o_proj",
    "tiny-qwen2": "self_attn.o_proj",
    "tiny-mistral": "self_attn.o_proj",
    "tiny-gemma3": "post_attention_layernorm",
    "tiny-gpt2": "attn.c_proj",
    "sequential": "attention.dense",
}
SPECS = [
    "all",
    "all_but_first",
    "last",
    slice(None),
    slice(-3, None),
    slice(1, -1),
    slice(None, -2),
    slice(0, None, 2),
    [0, -1],
    [2],
    [-1, -3],
    -2,
    1,
]
few = settings(max_examples=20, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """With models this small a second thread only waits, ten times as long on a busy machine."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


# --- the reference: one prompt at a time, whole model, a plain hook ---------------------------------------------------


@contextmanager
def plain_add(lm, layer, site, addend):
    """Add `addend` [n_tokens, d_model] at a site, with the simplest hook there is; written without helpers.residual."""

    def pre(module, args, kwargs):
        if args:
            return (args[0] + addend, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + addend}

    def post(module, args, output):
        return output + addend

    block = lm.blocks[layer]
    if site == "resid_pre":
        handle = block.register_forward_pre_hook(pre, with_kwargs=True)
    elif site == "resid_post":
        handle = block.register_forward_hook(post)
    else:
        handle = block.get_submodule(
            "mlp" if site == "mlp_out" else ATTENTION_OUT[lm.name]
        ).register_forward_hook(post)
    try:
        yield
    finally:
        handle.remove()


def run_plain(lm, ids):
    """Logits [n_tokens, vocabulary] and every block's output [n_layers, n_tokens, d_model] for one unpadded prompt."""
    outputs = []
    handles = [
        b.register_forward_hook(lambda module, args, out: outputs.append(out[0].clone()))
        for b in lm.blocks
    ]
    try:
        with torch.no_grad():
            logits = lm.model(input_ids=torch.as_tensor(ids)[None], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits, torch.stack(outputs)


def ids_of(lm, prompt):
    return lm.encode(prompt)["input_ids"][0].tolist()


def picked(spec, length):
    """The positions that a spec names in a prompt of this length, in the plainest way."""
    if isinstance(spec, str):
        spec = {"all": slice(None), "all_but_first": slice(1, None), "last": slice(-1, None)}[spec]
    everything = list(range(length))
    if isinstance(spec, slice):
        return everything[spec]
    return sorted({everything[i] for i in ([spec] if isinstance(spec, int) else spec)})


def reference_delta(
    lm, prompt, source, target, vector, site="resid_post", steered="all", positions="all"
):
    """Steered − clean [n_positions, d_model] at block `target`'s output, from two full forward passes of this prompt alone."""
    ids = ids_of(lm, prompt)
    addend = torch.zeros(len(ids), lm.d_model)
    addend[picked(steered, len(ids))] = vector
    clean = run_plain(lm, ids)[1][target]
    with plain_add(lm, source, site, addend.to(clean.dtype)):
        changed = run_plain(lm, ids)[1][target]
    return (changed.float() - clean.float())[picked(positions, len(ids))]


def some_vectors(lm, n=3, norm=3.0, seed=0):
    return norm * torch.nn.functional.normalize(
        torch.randn(n, lm.d_model, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def assert_equals_reference(
    lm, span, vectors, prompts, source, targets, site="resid_post", steered="all", positions="all"
):
    delta = span.delta(vectors)
    for v, vector in enumerate(vectors):
        for p, prompt in enumerate(prompts):
            for k, target in enumerate(targets):
                expected = reference_delta(
                    lm, prompt, source, target, vector, site, steered, positions
                )
                ours = delta[v, p] if span.single else delta[v, p, k]
                torch.testing.assert_close(
                    ours[len(ours) - len(expected) :], expected, atol=2e-4, rtol=1e-3
                )
                assert not ours[: len(ours) - len(expected)].any()  # filled up in front
    return delta


# --- span = full forward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one prompt", "three lengths"])
def test_span_is_the_full_forward_pass(architectures, site, prompts):
    lm = architectures
    if site == "resid_mid" and lm.name in PARALLEL:
        pytest.skip("refused by name, see below")
    vectors = some_vectors(lm)
    span = LayerSpan(lm, prompts, 1, 3, site=site)
    delta = assert_equals_reference(lm, span, vectors, prompts, 1, [3], site)
    assert (
        delta.shape == (3, len(prompts), max(len(ids_of(lm, p)) for p in prompts), lm.d_model)
        and delta.dtype == torch.float32
    )
    assert (
        delta.norm(dim=-1).max() > 0.5
    )  # the vectors do something: the comparison is not of zeros


@pytest.mark.parametrize("site", SITES)
def test_several_target_layers_add_a_dimension(tiny, site):
    vectors = some_vectors(tiny, 2)
    span = LayerSpan(tiny, PROMPTS, -5, [4, -4, 5], target_positions=slice(-2, None), site=site)
    delta = assert_equals_reference(
        tiny, span, vectors, PROMPTS, 1, [4, 2, 5], site, positions=slice(-2, None)
    )
    assert delta.shape == (2, 3, 3, 2, tiny.d_model)
    alone = LayerSpan(tiny, PROMPTS, 1, [4], target_positions=slice(-2, None), site=site).delta(
        vectors
    )
    assert alone.shape == (2, 3, 1, 2, tiny.d_model)  # a list of one is still a list
    torch.testing.assert_close(alone[:, :, 0], delta[:, :, 0])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_target_and_steered_positions(tiny, spec):
    vectors = some_vectors(tiny, 2)
    assert_equals_reference(
        tiny,
        LayerSpan(tiny, PROMPTS, 1, 4, target_positions=spec),
        vectors,
        PROMPTS,
        1,
        [4],
        positions=spec,
    )
    assert_equals_reference(
        tiny,
        LayerSpan(tiny, PROMPTS, 1, 4, steered_positions=spec),
        vectors,
        PROMPTS,
        1,
        [4],
        steered=spec,
    )


@few
@given(
    steered=st.sampled_from(SPECS),
    positions=st.sampled_from(SPECS),
    source=st.integers(0, 3),
    gap=st.integers(1, 2),
    site=st.sampled_from(SITES),
    seed=st.integers(0, 99),
)
def test_any_combination_is_the_full_forward_pass(
    tiny, steered, positions, source, gap, site, seed
):
    span = LayerSpan(tiny, PROMPTS, source, source + gap, positions, steered, site)
    vectors = some_vectors(tiny, 2, seed=seed)
    assert_equals_reference(
        tiny, span, vectors, PROMPTS, source, [source + gap], site, steered, positions
    )


@few
@given(
    start=st.integers(-6, 6) | st.none(),
    stop=st.integers(-6, 6) | st.none(),
    step=st.sampled_from([1, 2, 3, -1]),
)
def test_shorter_prompts_are_filled_up_in_front(tiny, start, stop, step):
    spec = slice(start, stop, step)
    if not all(picked(spec, len(ids_of(tiny, p))) for p in PROMPTS):
        with pytest.raises(ValueError, match="selects no token"):
            LayerSpan(tiny, PROMPTS, 1, 2, target_positions=spec)
        return
    span = LayerSpan(tiny, PROMPTS, 1, 2, target_positions=spec)
    counts = [len(picked(spec, len(ids_of(tiny, p)))) for p in PROMPTS]
    n = max(counts)
    assert span.target_mask.tolist() == [[False] * (n - c) + [True] * c for c in counts]
    assert not span.delta(some_vectors(tiny))[:, ~span.target_mask].any()
    assert not span.clean_target[~span.target_mask].any()


# --- invariants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_batch_is_one_at_a_time(tiny, site):
    vectors = some_vectors(tiny, 5)
    span = LayerSpan(tiny, PROMPTS, 1, 4, site=site)
    together = span.delta(vectors)
    torch.testing.assert_close(
        together, torch.cat([span.delta(v[None]) for v in vectors]), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        together, span.delta(SteeringVectors(vectors, 1, site)), atol=0, rtol=0
    )


def test_zero_changes_nothing(architectures):
    for site in SITES:
        if not (site == "resid_mid" and architectures.name in PARALLEL):
            span = LayerSpan(architectures, PROMPTS, 0, [1, 3], site=site)
            assert span.delta(torch.zeros(2, architectures.d_model)).abs().max() < 1e-5


def test_injection_is_exact_at_the_source_and_nothing_earlier_changes(architectures):
    lm, layer = architectures, 2
    vector = some_vectors(lm, 1)
    clean = capture(lm, PROMPTS)
    with steer(lm, SteeringVectors(vector, layer)):
        changed = capture(lm, PROMPTS)
    real = ~clean[0].isnan().any(-1)
    assert torch.equal(changed[:layer][:, real], clean[:layer][:, real])
    assert torch.equal(changed[layer][real], clean[layer][real] + vector)
    assert (changed[layer + 1] - clean[layer + 1])[real].norm(dim=-1).min() > 0


def test_tokens_before_the_steered_one_do_not_change(architectures):
    span = LayerSpan(architectures, PROMPTS[1], 1, 3, steered_positions=[4])
    size = span.delta(some_vectors(architectures)).norm(dim=-1)[:, 0]
    assert size[:, :4].max() < 1e-5 and size[:, 4].min() > 0.5
    if architectures.name not in (
        "tiny-mistral",
        "tiny-gemma3",
    ):  # their attention window ends before
        assert size[:, -1].min() > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adding_to_the_mlp_output_is_adding_to_the_block_output_only_where_nothing_comes_between(
    architecture,
):
    lm = tiny_model(architecture)
    vectors = some_vectors(lm)
    at_mlp, at_end = (
        LayerSpan(lm, PROMPTS, 1, 3, site=site).delta(vectors) for site in ("mlp_out", "resid_post")
    )
    if architecture == "gemma3":  # a norm after the MLP
        assert (at_mlp - at_end).norm() > 0.1 * at_end.norm()
    else:
        torch.testing.assert_close(at_mlp, at_end, atol=1e-4, rtol=1e-3)


def test_next_blocks_input_is_this_blocks_output(architectures):
    vectors = some_vectors(architectures)
    one, other = (
        LayerSpan(architectures, PROMPTS, 1, 3),
        LayerSpan(architectures, PROMPTS, 2, 3, site="resid_pre"),
    )
    torch.testing.assert_close(one.delta(vectors), other.delta(vectors), atol=0, rtol=0)
    assert torch.equal(one.clean_source, other.clean_source)


def test_a_small_memory_budget_changes_nothing(tiny):
    vectors = some_vectors(tiny, 9)
    small, large = (
        LayerSpan(tiny, PROMPTS, 1, 4, memory_budget=1),
        LayerSpan(tiny, PROMPTS, 1, 4, memory_budget=2**40),
    )
    assert small.chunk == 1 < large.chunk
    assert (
        small.bytes_per_vector
        == large.bytes_per_vector
        > 4 * sum(len(ids_of(tiny, p)) for p in PROMPTS) * tiny.d_model
    )
    middle = LayerSpan(tiny, PROMPTS, 1, 4, memory_budget=2 * small.bytes_per_vector + 1)
    assert middle.chunk == 2
    torch.testing.assert_close(small.delta(vectors), large.delta(vectors), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
def test_half_precision(architecture):
    lm = tiny_model(architecture)
    vectors = some_vectors(lm)
    exact = LayerSpan(lm, PROMPTS, 1, 3).delta(vectors)
    lm.model.to(torch.bfloat16)
    for site in SITES[2:]:
        span = LayerSpan(lm, PROMPTS, 1, 3, site=site)
        delta = span.delta(vectors)
        assert delta.dtype == torch.float32 and span.clean_source.dtype == torch.float32
        for p, prompt in enumerate(PROMPTS):
            expected = reference_delta(lm, prompt, 1, 3, vectors[0], site)
            assert (delta[0, p, -len(expected) :] - expected).norm() < 0.1 * expected.norm()
    assert (delta - exact).norm() < 0.1 * exact.norm()


def test_gradient_is_that_of_finite_differences():
    lm = tiny_model("llama")
    lm.model.double()
    span = LayerSpan(
        lm, PROMPTS, 1, 3, target_positions=slice(-3, None), steered_positions="all_but_first"
    )
    theta, step = some_vectors(lm, 2), 1e-2
    weights = torch.randn(span.clean_target.shape, generator=torch.Generator().manual_seed(1))
    score = lambda v: (span.delta(v) * weights).flatten(1).sum(1).double()  # noqa: E731
    asked = theta.clone().requires_grad_()
    gradient = torch.autograd.grad(score(asked).sum(), asked)[0]
    for direction in some_vectors(lm, 4, norm=1.0, seed=2):
        difference = (score(theta + step * direction) - score(theta - step * direction)) / (
            2 * step
        )
        torch.testing.assert_close(
            (gradient @ direction).double(), difference, atol=2e-3, rtol=2e-3
        )


def test_gradient_reaches_vectors_of_every_site(architectures):
    for site in SITES:
        if not (site == "resid_mid" and architectures.name in PARALLEL):
            theta = some_vectors(architectures, 2).requires_grad_()
            LayerSpan(architectures, PROMPTS, 1, 3, site=site).delta(theta).pow(2).sum().backward()
            assert theta.grad.norm(dim=-1).min() > 0
    assert all(p.grad is None and not p.requires_grad for p in architectures.model.parameters())


def test_span_leaves_nothing_on_the_model_and_the_vectors_alone(tiny):
    before, vectors = {k: v.clone() for k, v in tiny.model.state_dict().items()}, some_vectors(tiny)
    kept = vectors.clone()
    for site in SITES:
        LayerSpan(tiny, PROMPTS, 1, 4, site=site).delta(vectors)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.model.modules())
    assert all(
        torch.equal(v, before[k]) for k, v in tiny.model.state_dict().items()
    ) and torch.equal(vectors, kept)


# --- resid_mid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt_neox", "phi"])
def test_parallel_blocks_have_nothing_between_attention_and_mlp(architecture):
    lm = tiny_model(architecture)
    vector = SteeringVectors(some_vectors(lm, 1), 1, "resid_mid")
    for use in (
        lambda: LayerSpan(lm, PROMPTS, 1, 3, site="resid_mid"),
        lambda: capture(lm, PROMPTS, 1, "resid_mid"),
        lambda: steer(lm, vector).__enter__(),
    ):
        name = type(lm.blocks[0]).__name__
        with pytest.raises(
            ValueError, match=rf"'resid_mid' does not exist in {name}.*parallel.*use resid_pre"
        ):
            use()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_the_same_class_with_blocks_in_sequence_has_it():
    parallel = tiny_model("gpt_neox")
    config = transformers.GPTNeoXConfig(
        **{**parallel.model.config.to_dict(), "use_parallel_residual": False}
    )
    model = random_weights_(transformers.GPTNeoXForCausalLM(config), 1)
    lm = LanguageModel("sequential", model, parallel.tokenizer, "0")
    assert_equals_reference(
        lm,
        LayerSpan(lm, PROMPTS, 1, 3, site="resid_mid"),
        some_vectors(lm),
        PROMPTS,
        1,
        [3],
        "resid_mid",
    )


def test_resid_mid_is_what_attention_leaves(architectures):
    lm = architectures
    if lm.name in PARALLEL:
        pytest.skip("refused by name")
    outputs = []
    handle = (
        lm.blocks[2]
        .get_submodule(ATTENTION_OUT[lm.name])
        .register_forward_hook(lambda m, a, out: outputs.append(out))
    )
    before = capture(lm, PROMPTS[1], 2, "resid_pre")[0]
    handle.remove()
    torch.testing.assert_close(
        capture(lm, PROMPTS[1], 2, "resid_mid")[0], before + outputs[-1], atol=1e-5, rtol=1e-5
    )


def test_resid_mid_is_found_once_and_under_another_steering():
    lm, passes = tiny_model("llama"), []
    two = SteeringVectors(some_vectors(lm, 2, norm=100.0), 1)
    handle = lm.decoder.register_forward_hook(lambda *_: passes.append(1))
    with steer(
        lm, two, tokens=[9]
    ):  # 2 rows and a 10th token: neither fits the pass that looks for the place
        with steer(lm, SteeringVectors(some_vectors(lm, 1), 1, "resid_mid")):
            pass
    span = LayerSpan(lm, PROMPTS, 1, 3, site="resid_mid")
    passes.clear()
    span.delta(some_vectors(lm))
    handle.remove()
    assert not passes


# --- capture ----------------------------------------------------------------------------------------------------------


def test_capture_is_what_a_plain_hook_sees_and_padding_is_nan(architectures):
    lm = architectures
    ours = capture(lm, PROMPTS)
    assert ours.shape[:2] == (4, 3) and ours.dtype == torch.float32
    for p, prompt in enumerate(PROMPTS):
        alone = run_plain(lm, ids_of(lm, prompt))[1]
        torch.testing.assert_close(
            ours[:, p, ours.shape[2] - alone.shape[1] :], alone, atol=1e-4, rtol=1e-4
        )
        assert ours[:, p, : ours.shape[2] - alone.shape[1]].isnan().all()


def test_capture_of_chosen_layers(tiny):
    everything = capture(tiny, PROMPTS)
    assert torch.equal(
        capture(tiny, PROMPTS, [3, -6]).nan_to_num(), everything[[3, 0]].nan_to_num()
    )
    assert torch.equal(capture(tiny, PROMPTS, -1).nan_to_num(), everything[5:].nan_to_num())
    assert torch.equal(
        capture(tiny, PROMPTS, [3, 4], "resid_pre").nan_to_num(), everything[[2, 3]].nan_to_num()
    )
    mid, mlp = (capture(tiny, PROMPTS, 2, site) for site in ("resid_mid", "mlp_out"))
    torch.testing.assert_close((mid + mlp).nan_to_num(), everything[2:3].nan_to_num())


# --- layers, tokens, errors -------------------------------------------------------------------------------------------


@few
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    spec=st.sampled_from(SPECS),
    left=st.booleans(),
)
def test_select_tokens(lengths, spec, left):
    width = max(lengths)
    rows = [[0] * (width - n) + [1] * n if left else [1] * n + [0] * (width - n) for n in lengths]
    try:
        expected = [[width - n + i if left else i for i in picked(spec, n)] for n in lengths]
    except IndexError:
        expected = None
    if expected is None or not all(expected):
        with pytest.raises(ValueError, match="positions"):
            select_tokens(spec, torch.tensor(rows))
    else:
        chosen = select_tokens(spec, torch.tensor(rows))
        assert (
            chosen.dtype == torch.bool and [r.nonzero()[:, 0].tolist() for r in chosen] == expected
        )


def test_numpy_integers_are_layers(tiny):
    assert resolve_layer(tiny, np.int64(-1)) == 5 and type(resolve_layer(tiny, np.int64(2))) is int
    span = LayerSpan(tiny, PROMPTS, np.int64(1), np.int64(3))
    assert span.delta(some_vectors(tiny)).ndim == 4


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(source_layer=6),
            r"source_layer 6 is outside the model: it has 6 blocks, so use 0 … 5 or -6 … -1",
        ),
        (dict(source_layer=-7), r"source_layer -7 .* 6 blocks"),
        (dict(source_layer=1.0), r"source_layer 1\.0 .* 6 blocks"),
        (dict(source_layer=True), r"source_layer True .* 6 blocks"),
        (dict(source_layer="1"), r"source_layer '1' .* 6 blocks"),
        (dict(target_layers=9), r"target_layer 9 .* use 0 … 5"),
        (dict(target_layers=[3, 9]), r"target_layer 9 .* use 0 … 5"),
        (dict(target_layers=1), r"target_layers 1 must come after source_layer 1: use 2 … 5"),
        (
            dict(target_layers=[4, 0]),
            r"target_layers \[4, 0\] must come after source_layer 1: use 2 … 5",
        ),
        (dict(target_layers=[]), r"target_layers \[\] must come after"),
        (
            dict(source_layer=5, target_layers=5),
            r"source_layer 5: that is the last block, so use a source_layer of 0 … 4",
        ),
        (
            dict(target_positions=[2, 3]),
            r"target_positions 3 is outside prompt 2, which has 3 tokens: use -3 … 2",
        ),
        (dict(target_positions=-5), r"target_positions -5 is outside prompt 2, which has 3 tokens"),
        (
            dict(target_positions="first"),
            r"target_positions 'first' is not a role: use one of all, all_but_first, last",
        ),
        (dict(steered_positions="prompt"), r"steered_positions 'prompt' is not a role"),
        (
            dict(target_positions=slice(5, None)),
            r"slice\(5, None, None\) selects no token of prompt 2, which has 3 tokens",
        ),
        (dict(steered_positions=[]), r"steered_positions \[\] selects no token of prompt 0"),
        (
            dict(site="attn_out"),
            r"site 'attn_out' is unknown: use one of resid_pre, resid_mid, mlp_out, resid_post",
        ),
        (dict(memory_budget=0), r"memory_budget 0 is not a number of bytes above 0"),
        (dict(prompts=[]), r"no prompt"),
        (dict(prompts=["fine", "  "]), r"Prompt 1 is '  '"),
    ],
)
def test_span_refuses_early_and_by_name(tiny, change, message):
    arguments = {"prompts": PROMPTS, "source_layer": 1, "target_layers": 4} | change
    with pytest.raises(ValueError, match=message) as caught:
        LayerSpan(tiny, **arguments)
    assert "\n" not in str(caught.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.model.modules())


@pytest.mark.parametrize("shape", [(32,), (2, 31), (0, 32), (1, 2, 32)])
def test_delta_refuses_vectors_of_another_shape(tiny, shape):
    with pytest.raises(ValueError, match=r"do not fit: \[n_vectors, 32\] is needed"):
        LayerSpan(tiny, PROMPTS, 1, 4).delta(torch.zeros(shape))


def test_capture_refuses_by_name(tiny):
    with pytest.raises(ValueError, match=r"layer 6 is outside the model.*0 … 5"):
        capture(tiny, PROMPTS, [0, 6])
    with pytest.raises(ValueError, match="site 'mlp' is unknown"):
        capture(tiny, PROMPTS, 0, "mlp")


def test_a_block_without_an_mlp_refuses_the_site():
    lm = tiny_model("llama")
    lm.blocks[1] = torch.nn.Identity()
    with pytest.raises(ValueError, match="'mlp_out' does not exist in Identity"):
        with residual.add_at(lm, 1, "mlp_out", lambda hidden: 0):
            pass


def test_a_block_that_cannot_be_replayed_is_noticed():
    lm, calls = tiny_model("llama"), []
    lm.blocks[2].register_forward_hook(
        lambda module, args, output: calls.append(1) or output + len(calls)
    )
    with pytest.raises(
        RuntimeError, match=r"tiny-llama does not reproduce its own forward pass \(off by"
    ):
        LayerSpan(lm, PROMPTS, 1, 3)
