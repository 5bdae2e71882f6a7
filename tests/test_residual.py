"""helpers.residual: the layer span against full forward passes that an independent, plain hook has
changed; the sites of every architecture; norms; memory."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import transformers
from conftest import ALL_ARCHITECTURES, ARCHITECTURES, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from reference import (  # noqa: F401
    ATTENTION_OUT,
    PARALLEL,
    PROMPTS,
    few,
    ids_of,
    no_hooks,
    one_thread,
    picked,
    reference_delta,
    run_plain,
    some_vectors,
)

from helpers.generation import complete
from helpers.models import LanguageModel, ModelError, random_weights_
from helpers.residual import SITES, LayerSpan, capture, edit_at, memory, norms, sites
from helpers.residual import span as span_module
from helpers.steering import SteeringVectors, steer
from helpers.training import train, value, value_and_grad

SPECS = ["all", "all_but_first", "last", slice(None), slice(-3, None), slice(1, -1)]
SPECS += [slice(None, -2), slice(0, None, 2), [0, -1], [2], [-1, -3], -2, 1]


def sites_of(lm):
    return [site for site in SITES if not (site == "resid_mid" and lm.name in PARALLEL)]


def assert_equals_reference(lm, span, vectors, source, targets, site="resid_post", **where):
    delta = span.delta(vectors)
    for v, vector in enumerate(vectors):
        for p, prompt in enumerate(span.prompts):
            for k, target in enumerate(targets):
                ours = delta[v, p] if span.single else delta[v, p, k]
                plain = reference_delta(lm, prompt, source, target, vector, site, **where)
                filled = len(ours) - len(plain)  # up, in front
                torch.testing.assert_close(ours[filled:], plain, atol=2e-4, rtol=1e-3)
                assert not ours[:filled].any()
    return delta


# --- span = full forward --------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one prompt", "three lengths"])
def test_span_is_the_full_forward_pass(architectures, site, prompts):
    lm = architectures
    if site not in sites_of(lm):
        pytest.skip("refused by name, see below")
    span = LayerSpan(lm, prompts, 1, 3, site=site)
    delta = assert_equals_reference(lm, span, some_vectors(lm), 1, [3], site)
    longest = max(len(ids_of(lm, p)) for p in prompts)
    assert delta.shape == (3, len(prompts), longest, lm.d_model) and delta.dtype == torch.float32
    assert delta.norm(dim=-1).max() > 0.5  # the vectors do something: not zeros are compared


@pytest.mark.parametrize("site", SITES)
def test_several_target_layers_add_a_dimension(tiny, site):
    vectors, last_two = some_vectors(tiny, 2), slice(-2, None)
    span = LayerSpan(tiny, PROMPTS, -5, [4, -4, 5], last_two, site=site)
    delta = assert_equals_reference(tiny, span, vectors, 1, [4, 2, 5], site, positions=last_two)
    assert delta.shape == (2, 3, 3, 2, tiny.d_model)
    alone = LayerSpan(tiny, PROMPTS, 1, [4], last_two, site=site).delta(vectors)
    assert alone.shape == (2, 3, 1, 2, tiny.d_model)  # a list of one is still a list
    torch.testing.assert_close(alone[:, :, 0], delta[:, :, 0])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_target_and_steered_positions(tiny, spec):
    vectors = some_vectors(tiny, 2)
    span = LayerSpan(tiny, PROMPTS, 1, 4, target_positions=spec)
    assert_equals_reference(tiny, span, vectors, 1, [4], positions=spec)
    span = LayerSpan(tiny, PROMPTS, 1, 4, steered_positions=spec)
    assert_equals_reference(tiny, span, vectors, 1, [4], steered=spec)


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
    where = dict(steered=steered, positions=positions)
    assert_equals_reference(tiny, span, vectors, source, [source + gap], site, **where)


@few
@given(
    start=st.integers(-6, 6) | st.none(),
    stop=st.integers(-6, 6) | st.none(),
    step=st.sampled_from([1, 2, 3, -1]),
)
def test_shorter_prompts_are_filled_up_in_front(tiny, start, stop, step):
    spec = slice(start, stop, step)
    counts = [len(picked(spec, len(ids_of(tiny, p)))) for p in PROMPTS]
    if not all(counts):
        with pytest.raises(ValueError, match="selects no token"):
            LayerSpan(tiny, PROMPTS, 1, 2, target_positions=spec)
        return
    span = LayerSpan(tiny, PROMPTS, 1, 2, target_positions=spec)
    n = max(counts)
    assert span.target_mask.tolist() == [[False] * (n - c) + [True] * c for c in counts]
    assert not span.delta(some_vectors(tiny))[:, ~span.target_mask].any()
    assert not span.clean_target[~span.target_mask].any()


# --- invariants -----------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_batch_is_one_at_a_time(tiny, site):
    vectors = some_vectors(tiny, 5)
    span = LayerSpan(tiny, PROMPTS, 1, 4, site=site)
    together = span.delta(vectors)
    alone = torch.cat([span.delta(v[None]) for v in vectors])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    as_a_set = span.delta(SteeringVectors(vectors, 1, site))
    torch.testing.assert_close(together, as_a_set, atol=0, rtol=0)


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
    if architectures.name not in ("tiny-mistral", "tiny-gemma3"):  # whose window ends before
        assert size[:, -1].min() > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mlp_output_is_block_output_only_where_nothing_comes_between(architecture):
    lm = tiny_model(architecture)
    at_mlp = LayerSpan(lm, PROMPTS, 1, 3, site="mlp_out").delta(some_vectors(lm))
    at_end = LayerSpan(lm, PROMPTS, 1, 3).delta(some_vectors(lm))
    if architecture == "gemma3":  # a norm after the MLP
        assert (at_mlp - at_end).norm() > 0.1 * at_end.norm()
    else:
        torch.testing.assert_close(at_mlp, at_end, atol=1e-4, rtol=1e-3)


def test_next_blocks_input_is_this_blocks_output(architectures):
    vectors = some_vectors(architectures)
    one = LayerSpan(architectures, PROMPTS, 1, 3)
    other = LayerSpan(architectures, PROMPTS, 2, 3, site="resid_pre")
    torch.testing.assert_close(one.delta(vectors), other.delta(vectors), atol=0, rtol=0)
    assert torch.equal(one.clean_source, other.clean_source)


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
    span = LayerSpan(lm, PROMPTS, 1, 3, slice(-3, None), steered_positions="all_but_first")
    theta, step = some_vectors(lm, 2), 1e-2
    weights = torch.randn(span.clean_target.shape, generator=torch.Generator().manual_seed(1))
    score = lambda v: (span.delta(v) * weights).flatten(1).sum(1).double()  # noqa: E731
    asked = theta.clone().requires_grad_()
    gradient = torch.autograd.grad(score(asked).sum(), asked)[0]
    for direction in some_vectors(lm, 4, norm=1.0, seed=2):
        moved = score(theta + step * direction) - score(theta - step * direction)
        along = (gradient @ direction).double()
        torch.testing.assert_close(along, moved / (2 * step), atol=2e-3, rtol=2e-3)


def test_zero_changes_nothing_and_the_gradient_reaches_vectors_of_every_site(architectures):
    for site in sites_of(architectures):
        span = LayerSpan(architectures, PROMPTS, 0, [1, 3], site=site)
        assert span.delta(torch.zeros(2, architectures.d_model)).abs().max() < 1e-5
        theta = some_vectors(architectures, 2).requires_grad_()
        span.delta(theta).pow(2).sum().backward()
        assert theta.grad.norm(dim=-1).min() > 0
    assert all(p.grad is None and not p.requires_grad for p in architectures.model.parameters())


def test_span_leaves_nothing_on_the_model_and_the_vectors_alone(tiny):
    before, vectors = deepcopy(tiny.model.state_dict()), some_vectors(tiny)
    for site in SITES:
        LayerSpan(tiny, PROMPTS, 1, 4, site=site).delta(vectors)
    assert no_hooks(tiny) and torch.equal(vectors, some_vectors(tiny))
    assert all(torch.equal(v, before[k]) for k, v in tiny.model.state_dict().items())


# --- sites ----------------------------------------------------------------------------------------


def test_parallel_blocks_have_nothing_between_attention_and_mlp():
    for architecture in ("gpt_neox", "phi"):
        lm = tiny_model(architecture)
        expected = rf"'resid_mid' does not exist in {type(lm.blocks[0]).__name__}.*parallel.*use "
        with pytest.raises(ValueError, match=expected):
            LayerSpan(lm, PROMPTS, 1, 3, site="resid_mid")
        with pytest.raises(ValueError, match=expected):
            edit_at(lm, 1, "resid_mid", lambda hidden: hidden).__enter__()
        assert no_hooks(lm)


def test_the_same_class_with_blocks_in_sequence_has_it():
    parallel = tiny_model("gpt_neox")
    settings = {**parallel.model.config.to_dict(), "use_parallel_residual": False}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**settings))
    lm = LanguageModel("sequential", random_weights_(model, 1), parallel.tokenizer, "0")
    span = LayerSpan(lm, PROMPTS, 1, 3, site="resid_mid")
    assert_equals_reference(lm, span, some_vectors(lm), 1, [3], "resid_mid")


def test_attention_is_what_comes_between(architectures):
    lm, outputs = architectures, []
    keep = lambda module, args, out: outputs.append(out)  # noqa: E731
    handle = lm.blocks[2].get_submodule(ATTENTION_OUT[lm.name]).register_forward_hook(keep)
    attention = capture(lm, PROMPTS[1], 2, "attn_out")[0]
    handle.remove()
    torch.testing.assert_close(attention, outputs[-1].float(), atol=1e-5, rtol=1e-5)
    if "resid_mid" in sites_of(lm):
        before, after = (capture(lm, PROMPTS[1], 2, f"resid_{at}")[0] for at in ("pre", "mid"))
        torch.testing.assert_close(after, before + attention, atol=1e-5, rtol=1e-5)


IN_PARALLEL = ("gpt_neox", "phi", "falcon", "cohere2", "gptj")
NO_ATTN_OUT = ("falcon_h1",)  # added to a state space's output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_adding_to_attention_is_adding_to_what_comes_of_it(architecture, dtype):
    """attn_out + v is resid_mid + v with blocks in sequence, resid_post + v with parallel ones."""
    lm, delta = tiny_model(architecture), {}
    lm.model.to(dtype)
    for site in ("attn_out", "resid_mid", "resid_post"):
        try:
            delta[site] = LayerSpan(lm, PROMPTS, 1, 3, site=site).delta(some_vectors(lm))
        except ValueError as error:
            assert f"site {site!r} does not exist in {type(lm.blocks[1]).__name__}" in str(error)
    assert ("attn_out" in delta) == (architecture not in NO_ATTN_OUT)
    assert ("resid_mid" in delta) == (architecture not in IN_PARALLEL)
    same = "resid_post" if architecture in IN_PARALLEL else "resid_mid"
    if "attn_out" in delta and same in delta:
        off = (delta["attn_out"] - delta[same]).norm() / delta[same].norm()
        assert off < (1e-5 if dtype is torch.float32 else 0.1)


@pytest.mark.parametrize("site", SITES)
def test_an_edit_replaces_the_value(tiny, site):
    """One that keeps the value changes nothing; one that puts another prompt's value there makes it
    that prompt's, for the blocks after it."""
    here, there = "A cat sat.", "The cow la"
    ids = [ids_of(tiny, prompt) for prompt in (here, there)]
    clean, other = (run_plain(tiny, each)[1] for each in ids)
    with edit_at(tiny, 2, site, lambda hidden: hidden):
        torch.testing.assert_close(run_plain(tiny, ids[0])[1], clean, atol=1e-5, rtol=1e-5)
    put = capture(tiny, there, 2, site)[0]
    with edit_at(tiny, 2, site, lambda hidden: put):
        found = run_plain(tiny, ids[0])[1]
        torch.testing.assert_close(capture(tiny, here, 2, site)[0], put, atol=0, rtol=0)
    assert torch.equal(found[:2], clean[:2]) and no_hooks(tiny)
    if site.startswith("resid"):
        torch.testing.assert_close(found[2:], other[2:], atol=1e-4, rtol=1e-4)
    else:
        assert (found[2] - clean[2]).norm() > 0.1


def test_sites_are_found_once_and_under_another_steering():
    lm, passes = tiny_model("llama"), []
    two = SteeringVectors(some_vectors(lm, 2, norm=100.0), 1)
    handle = lm.decoder.register_forward_hook(lambda *_: passes.append(1))
    with steer(lm, two, tokens=[9]):  # 2 rows, a 10th token: neither fits the pass that looks
        with steer(lm, SteeringVectors(some_vectors(lm, 1), 1, "resid_mid")):
            pass
    span = LayerSpan(lm, PROMPTS, 1, 3, site="resid_mid")
    passes.clear()
    span.delta(some_vectors(lm))
    handle.remove()
    assert not passes


# --- capture and norms ----------------------------------------------------------------------------


def test_capture_is_what_a_plain_hook_sees_and_padding_is_nan(architectures):
    lm = architectures
    ours = capture(lm, PROMPTS)
    assert ours.shape[:2] == (4, 3) and ours.dtype == torch.float32
    for p, prompt in enumerate(PROMPTS):
        alone = run_plain(lm, ids_of(lm, prompt))[1]
        padding = ours.shape[2] - alone.shape[1]
        torch.testing.assert_close(ours[:, p, padding:], alone, atol=1e-4, rtol=1e-4)
        assert ours[:, p, :padding].isnan().all()


def test_capture_of_chosen_layers(tiny):
    found = lambda *where: capture(tiny, PROMPTS, *where).nan_to_num()  # noqa: E731
    everything = found()
    assert torch.equal(found([3, -6]), everything[[3, 0]])
    assert torch.equal(found(-1), everything[5:])
    assert torch.equal(found([3, 4], "resid_pre"), everything[[2, 3]])
    torch.testing.assert_close(found(2, "resid_mid") + found(2, "mlp_out"), everything[2:3])


def test_input_norm_of_every_architecture(architectures):
    names = {"tiny-gpt2": "ln_1"}
    block = architectures.blocks[2]
    expected = block.get_submodule(names.get(architectures.name, "input_layernorm"))
    assert norms.input_norm(architectures, 2) is expected and no_hooks(architectures)
    with pytest.raises(ValueError, match="layer 9 is outside"):
        norms.input_norm(architectures, 9)


@pytest.mark.parametrize("radii", [[], [5, 0], -2.0, [float("nan")]], ids=str)
def test_bad_radii(radii):
    with pytest.raises(ValueError, match="radii is empty|radius (0|-2|nan) is not a norm"):
        norms.check_radii(radii)


# --- layers, tokens, errors -----------------------------------------------------------------------


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
        expected = [[]]
    if not all(expected):
        with pytest.raises(ValueError, match="positions"):
            sites.select_tokens(spec, torch.tensor(rows))
    else:
        chosen = sites.select_tokens(spec, torch.tensor(rows))
        assert chosen.dtype == torch.bool
        assert [row.nonzero()[:, 0].tolist() for row in chosen] == expected


def test_numpy_integers_are_layers(tiny):
    assert (
        sites.resolve_layer(tiny, np.int64(-1)) == 5
        and type(sites.resolve_layer(tiny, np.int64(2))) is int
    )
    span = LayerSpan(tiny, PROMPTS, np.int64(1), np.int64(3))
    assert span.delta(some_vectors(tiny)).ndim == 4


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("source_layer", 6, "6 is outside the model: it has 6 blocks, so use 0 … 5 or -6 … -1"),
        ("source_layer", -7, r"source_layer -7 .* 6 blocks"),
        ("source_layer", 1.0, r"source_layer 1\.0 .* 6 blocks"),
        ("source_layer", True, r"source_layer True .* 6 blocks"),
        ("source_layer", "1", r"source_layer '1' .* 6 blocks"),
        ("source_layer", 5, "that is the last block, so use a source_layer of 0 … 4"),
        ("target_layers", 9, r"target_layer 9 .* use 0 … 5"),
        ("target_layers", [3, 9], r"target_layer 9 .* use 0 … 5"),
        ("target_layers", 1, "target_layers 1 must come after source_layer 1: use 2 … 5"),
        ("target_layers", [4, 0], r"\[4, 0\] must come after source_layer 1: use 2 … 5"),
        ("target_layers", [], r"target_layers \[\] must come after"),
        ("target_positions", [2, 3], "3 is outside prompt 2, which has 3 tokens: use -3 … 2"),
        ("target_positions", -5, "target_positions -5 is outside prompt 2, which has 3 tokens"),
        ("target_positions", "first", "'first' is not a role: use one of all, all_but_first, last"),
        ("target_positions", slice(5, None), "slice.5, None, None. selects no token of prompt 2"),
        ("steered_positions", "prompt", "steered_positions 'prompt' is not a role"),
        ("steered_positions", [], r"steered_positions \[\] selects no token of prompt 0"),
        ("site", "attn", "'attn' is unknown: use one of resid_pre, resid_mid, attn_out, mlp_out"),
        ("memory_budget", 0, "memory_budget 0 is not a number of bytes above 0"),
        ("prompts", [], "no prompt"),
        ("prompts", ["fine", "  "], "Prompt 1 is '  '"),
    ],
)
def test_span_refuses_early_and_by_name(tiny, argument, value, message):
    arguments = {"prompts": PROMPTS, "source_layer": 1, "target_layers": 4, argument: value}
    with pytest.raises(ValueError, match=message) as caught:
        LayerSpan(tiny, **arguments)
    assert "\n" not in str(caught.value) and no_hooks(tiny)


@pytest.mark.parametrize("shape", [(32,), (2, 31), (0, 32), (1, 2, 32)])
def test_delta_refuses_vectors_of_another_shape(tiny, shape):
    with pytest.raises(ValueError, match=r"do not fit: \[n_vectors, 32\] is needed"):
        LayerSpan(tiny, PROMPTS, 1, 4).delta(torch.zeros(shape))


class Doubled(torch.nn.Module):
    def forward(self, hidden_states, **others):
        return 2 * hidden_states


def test_capture_and_edits_refuse_by_name(tiny):
    with pytest.raises(ValueError, match=r"layer 6 is outside the model.*0 … 5"):
        capture(tiny, PROMPTS, [0, 6])
    with pytest.raises(ValueError, match="site 'mlp' is unknown"):
        capture(tiny, PROMPTS, 0, "mlp")
    lm = tiny_model("llama")
    lm.blocks[1] = Doubled()
    for site in ("resid_mid", "attn_out", "mlp_out"):
        with pytest.raises(ValueError, match=f"'{site}' does not exist in Doubled"):
            edit_at(lm, 1, site, lambda hidden: hidden).__enter__()


def test_a_block_that_cannot_be_replayed_is_noticed():
    lm, calls = tiny_model("llama"), []
    drift = lambda module, args, output: calls.append(1) or output + len(calls)  # noqa: E731
    lm.blocks[2].register_forward_hook(drift)
    with pytest.raises(RuntimeError, match="does not reproduce its own forward pass .off by"):
        LayerSpan(lm, PROMPTS, 1, 3)


# --- memory: chunks from a budget; where it runs out, halves, and the same results ----------------

CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: {}: you tried to allocate"
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError(CPU.format("can't allocate memory")),
    RuntimeError(CPU.format("not enough memory")),
    RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
]
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)


def short_of_memory(run, rows_of, at_most, error, sizes):
    """A stand-in for `run` that has no room for more than `at_most` rows; `sizes` takes what was
    asked of it."""

    def stand_in(*args, **kwargs):
        sizes.append(rows_of(*args, **kwargs))
        if sizes[-1] > at_most:
            raise error
        return run(*args, **kwargs)

    return stand_in


def span_of(lm, **options):
    return LayerSpan(lm, ["hello there", "you"], 1, 3, slice(-2, None), **options)


def test_a_small_memory_budget_changes_nothing(tiny):
    vectors = some_vectors(tiny, 9)
    small = LayerSpan(tiny, PROMPTS, 1, 4, memory_budget=1)
    large = LayerSpan(tiny, PROMPTS, 1, 4, memory_budget=2**40)
    assert small.chunk == 1 < large.chunk and small.bytes_per_vector == large.bytes_per_vector
    n_tokens = sum(len(ids_of(tiny, p)) for p in PROMPTS)
    assert large.bytes_per_vector > 4 * n_tokens * tiny.d_model
    torch.testing.assert_close(small.delta(vectors), large.delta(vectors), atol=1e-5, rtol=1e-4)


def test_chunks_come_from_what_is_free_or_given(monkeypatch, tiny):
    need = span_of(tiny).bytes_per_vector
    assert span_of(tiny, memory_budget=3 * need + 1).chunk == 3
    monkeypatch.setattr(span_module, "free_memory", lambda device: 10 * need)
    assert span_of(tiny).chunk == 5  # half of what is free
    monkeypatch.setattr(span_module, "free_memory", lambda device: 0)
    assert span_of(tiny).chunk == 1
    assert memory.free_memory(torch.device("cpu")) > 10**8


@each_error
def test_gradients_in_halves_are_the_same(error, monkeypatch, capsys, tiny):
    whole, span, vectors, sizes = span_of(tiny), span_of(tiny), some_vectors(tiny, 11), []
    whole.chunk = span.chunk = 11
    expected = value_and_grad(whole, vectors)
    monkeypatch.setattr(span, "_run", short_of_memory(span._run, len, 3, error, sizes))
    for one, other in zip(value_and_grad(span, vectors), expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert sizes == [11, 5, 2, 2, 2, 2, 2, 1] and span.chunk == 2
    said = "Out of memory: going on with {} vectors at a time.\n"
    assert capsys.readouterr().out == said.format(5) + said.format(2)
    sizes.clear()
    value_and_grad(span, vectors)  # remembered
    assert max(sizes) == 2 and not capsys.readouterr().out


def test_training_goes_on_and_learns_the_same(monkeypatch, capsys, tiny):
    span, sizes = span_of(tiny), []
    expected = train(span_of(tiny), 3.0, 6, steps=3, progress=False)
    monkeypatch.setattr(span, "_run", short_of_memory(span._run, len, 2, ERRORS[0], sizes))
    found = train(span, 3.0, 6, steps=3, progress=False)
    assert "going on with" in capsys.readouterr().out and max(sizes) > 2
    torch.testing.assert_close(found.vectors.tensor, expected.vectors.tensor, rtol=1e-3, atol=1e-4)
    # without a gradient too
    whole, span, vectors = span_of(tiny), span_of(tiny), some_vectors(tiny, 9)
    monkeypatch.setattr(span, "_run", short_of_memory(span._run, len, 4, ERRORS[1], []))
    span.chunk = 3
    torch.testing.assert_close(value(span, vectors), value(whole, vectors), rtol=1e-4, atol=1e-4)
    assert "going on with 4 vectors" in capsys.readouterr().out and span.chunk == 1


@each_error
def test_completions_in_halves_are_the_same(error, monkeypatch, capsys):
    lm, sizes = tiny_model("llama"), []
    vectors, asked = SteeringVectors(some_vectors(lm, 3), 1), ["hello", "a longer prompt"]
    options = dict(max_new_tokens=4, temperature=1.0)
    expected, rows = complete(lm, asked, vectors, **options), lambda **kw: len(kw["input_ids"])
    short = short_of_memory(lm.model.generate, rows, 2, error, sizes)
    monkeypatch.setattr(lm.model, "generate", short)
    assert complete(lm, asked, vectors, **options) == expected and sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    assert "going on with 1 completions at a time" in capsys.readouterr().out and no_hooks(lm)


def test_not_even_one_is_one_sentence(capsys):
    def never(part):
        raise ERRORS[2]

    expected = "Out of memory with 1 of the vectors at a time .*: use shorter"
    with pytest.raises(MemoryError, match=expected) as caught:
        memory.in_parts(never, [1, 2, 3], 8, "vectors")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None
    assert capsys.readouterr().out.count("going on with") == 1  # 3 → 1


def test_other_errors_are_not_a_lack_of_memory():
    for error in (RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError("x")):
        run = short_of_memory(None, len, 0, error, sizes := [])
        with pytest.raises(type(error)):
            memory.in_parts(run, [1, 2], 2)
        assert sizes == [2] and not memory.is_out_of_memory(error)
    assert all(map(memory.is_out_of_memory, ERRORS))
    with pytest.raises(RuntimeError) as caught:  # a real allocation that fails
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_out_of_memory(caught.value)


# --- nothing silent, nothing raw ------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_kind_3_and_28_the_parts_add_up_wherever_the_block_adds_them(architecture):
    lm = tiny_model(architecture)
    if architecture in ("gemma2", "gemma3", "olmo2"):
        pytest.skip("a norm comes after the MLP")
    parallel = architecture in IN_PARALLEL
    before = capture(lm, PROMPTS[0], 1, "resid_pre" if parallel else "resid_mid")
    if parallel:
        before = before + capture(lm, PROMPTS[0], 1, "attn_out")
    whole = before + capture(lm, PROMPTS[0], 1, "mlp_out")
    torch.testing.assert_close(whole, capture(lm, PROMPTS[0], 1), atol=1e-5, rtol=1e-5)
    put = torch.zeros(1, len(ids_of(lm, PROMPTS[0])), lm.d_model)
    with edit_at(lm, 1, "mlp_out", lambda hidden: put):  # ablated
        torch.testing.assert_close(capture(lm, PROMPTS[0], 1), before, atol=1e-5, rtol=1e-5)
    assert not put.any() and no_hooks(lm)


@pytest.mark.parametrize("architecture", ["opt", "bloom", "mpt"])
def test_kind_28_resid_mid_is_replaced_as_a_whole(architecture):
    """The middle of another prompt, put there, gives that prompt's block."""
    lm, (here, there) = tiny_model(architecture), ("A cat sat.", "The cow la")
    put = capture(lm, there, 2, "resid_mid")[0]
    with edit_at(lm, 2, "resid_mid", lambda hidden: put):
        found = capture(lm, here, 2)
    torch.testing.assert_close(found, capture(lm, there, 2), atol=1e-4, rtol=1e-4)


CHANGES = {
    "attention implementation": lambda lm: lm.model.set_attn_implementation("eager"),
    "dtype": lambda lm: lm.model.double(),
    "weights": lambda lm: lm.model.load_state_dict(tiny_model("llama", 1).model.state_dict()),
    "weights of one block": lambda lm: lm.blocks[2].mlp.up_proj.weight.mul_(2),
    "weights of another model": lambda lm: setattr(lm, "model", tiny_model("llama", 1).model),
}


@pytest.mark.parametrize("what", CHANGES)
def test_kind_4_a_span_says_that_its_model_has_changed(what):
    lm = tiny_model("llama")
    span = LayerSpan(lm, PROMPTS, 1, 3)
    with torch.no_grad():
        CHANGES[what](lm)
    expected = f"The {what.split(' of')[0]} of tiny-llama changed after .*: make it again"
    with pytest.raises(ModelError, match=expected):
        span.delta(some_vectors(lm))
    with pytest.raises(ModelError, match=expected):
        train(span, 1.0, progress=False)
    LayerSpan(lm, PROMPTS, 1, 3).delta(some_vectors(lm))


def test_kind_4_a_base_put_in_and_taken_out_again():
    lm, layer = tiny_model("llama"), tiny_model("llama").blocks[1].mlp.up_proj
    lm.blocks[1].mlp.up_proj.register_buffer("base_weight", 2 * layer.weight.data)
    span = LayerSpan(lm, PROMPTS, 1, 3)
    expected = span.delta(some_vectors(lm))
    with lm.base(), pytest.raises(ModelError, match="The weights of tiny-llama changed"):
        span.delta(some_vectors(lm))
    assert torch.equal(span.delta(some_vectors(lm)), expected)


def test_kind_9_torchs_defaults_and_inference_mode_play_no_part(tiny):
    ask = dict(radius=3.0, n_vectors=2, steps=2, progress=False)
    expected = train(LayerSpan(tiny, PROMPTS, 1, 3), **ask).vectors
    said = complete(tiny, PROMPTS, expected, temperature=1.0, max_new_tokens=4)
    torch.set_default_dtype(torch.float64)
    try:
        assert train(LayerSpan(tiny, PROMPTS, 1, 3), **ask).vectors == expected
        assert complete(tiny, PROMPTS, expected, temperature=1.0, max_new_tokens=4) == said
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):  # any other device
        assert train(LayerSpan(tiny, PROMPTS, 1, 3), **ask).vectors == expected
        assert complete(tiny, PROMPTS, expected, temperature=1.0, max_new_tokens=4) == said
    with torch.inference_mode():
        span, vectors = LayerSpan(tiny, PROMPTS, 1, 3), 1.0 * expected
        assert train(span, **ask).vectors == expected
    assert train(span, **ask).vectors == expected
    value_and_grad(span, vectors.tensor)


@pytest.mark.parametrize("architecture", ["mpt", "bloom", "llama", "gpt2", "falcon"])
@pytest.mark.parametrize("asked", ["abcd", ["abcd"] * 4, ["abcd", "ab", "abc", "a"]], ids=str)
def test_kind_13_batch_dimensions_are_known(architecture, asked):
    """As many prompts as tokens, or as heads: sizes tell nothing."""
    lm = tiny_model(architecture)
    span = LayerSpan(lm, asked, 1, 3)
    assert_equals_reference(lm, span, some_vectors(lm, 4), 1, [3])


def test_kind_19_and_20_numbers_of_numpy_and_wrong_kinds(tiny):
    span = LayerSpan(tiny, PROMPTS, np.int64(1), torch.tensor(3), np.array([-1, 0]))
    ask = dict(steps=np.int64(2), seed=np.int64(1), progress=False)
    found = train(span, np.float32(3), torch.tensor(2), **ask)
    assert found.vectors == train(span, 3.0, 2, steps=2, seed=1, progress=False).vectors
    assert norms.check_radii(np.array([1.0, 2])) == [1, 2] and norms.check_radii(np.int64(3)) == [3]
    with pytest.raises(ValueError, match="radius '8' is text|radius '8' is not a norm"):
        train(span, "8")
    with pytest.raises(ValueError, match="vectors is of type TrainingResult: give SteeringVectors"):
        span.delta(found)
    for wrong in (tiny, "span", None):
        with pytest.raises(ValueError, match="span is of type .*: give a LayerSpan"):
            train(wrong, 1.0)
    with pytest.raises(ValueError, match="lm is of type str"):
        LayerSpan("tiny-random", PROMPTS, 1, 3)
