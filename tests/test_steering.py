"""helpers.steering: the model is left as it was, the right tokens are steered, and a file gives
back what went in."""

import copy
import json
import os
import pickle

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    PARALLEL,
    PROMPTS,
    few,
    ids_of,
    one_thread,  # noqa: F401
    picked,
    plain_add,
    run_plain,
    some_vectors,
)
from safetensors.torch import save_file

from helpers.models import LanguageModel, random_weights_
from helpers.residual import SITES, LayerSpan, capture
from helpers.steering import FORMAT, Scope, SteeringVectors, coefficients, steer

N_NEW = 5
ROLES = ["all", "prompt", "generated", "last", "all_but_first", [0, -1], slice(1, None), -2]
SCOPES = [Scope("last", True), Scope([0], True), Scope(None, False), Scope(slice(1, None), True)]


def vectors_for(lm, n=1, layer=1, site="resid_post", norm=4.0, seed=0):
    return SteeringVectors(some_vectors(lm, n, norm, seed), layer, site, norm, {"model": lm.name})


def sites_of(lm):
    return [site for site in SITES if not (site == "resid_mid" and lm.name in PARALLEL)]


def hooks(lm):
    """Every hook on any module of the model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = lm.model.named_modules()
    return [
        (name, kind, *getattr(m, kind)) for name, m in modules for kind in kinds if getattr(m, kind)
    ]


@torch.no_grad()
def logits(lm, prompts=PROMPTS):
    return lm.model(**lm.encode(prompts), use_cache=False).logits


def snapshot(lm):
    """All a steering could have left: weights, attributes of modules, what the model says."""
    weights = {name: value.clone() for name, value in lm.model.state_dict().items()}
    attributes = {name: sorted(vars(m)) for name, m in lm.model.named_modules()}
    return weights, attributes, logits(lm), lm.model.training


def assert_unchanged(lm, before):
    weights, attributes, said, training = snapshot(lm)
    assert hooks(lm) == [] and attributes == before[1] and training == before[3]
    assert weights.keys() == before[0].keys()
    assert all(torch.equal(value, before[0][name]) for name, value in weights.items())
    assert torch.equal(said, before[2])


# --- non-mutating ---------------------------------------------------------------------------------
def test_model_is_bit_for_bit_what_it_was(architectures):
    lm = architectures
    before = snapshot(lm)
    for site in sites_of(lm):
        vectors = vectors_for(lm, site=site)
        with steer(lm, vectors, coeff=3.0):
            assert not torch.equal(logits(lm), before[2])
            lm.model.generate(**lm.encode(PROMPTS), max_new_tokens=2)
        assert_unchanged(lm, before)
        with pytest.raises(KeyError, match="inside"):
            with steer(lm, vectors):
                raise KeyError("inside")
        assert_unchanged(lm, before)
        with pytest.raises(ValueError, match="do not fit a batch"):
            with steer(lm, vectors_for(lm, 2, site=site)):
                logits(lm)  # raised by the hook, in the middle of a forward pass
        assert_unchanged(lm, before)


def test_nested_steering_adds_and_ends_in_any_order(tiny):
    before, one, two = snapshot(tiny), vectors_for(tiny), vectors_for(tiny, seed=1)
    with steer(tiny, SteeringVectors(one.tensor + two.tensor, 1)):
        summed = logits(tiny)
    with steer(tiny, one):
        alone = logits(tiny)
        with steer(tiny, two):
            torch.testing.assert_close(logits(tiny), summed, atol=1e-4, rtol=1e-4)
        assert torch.equal(logits(tiny), alone)
    assert_unchanged(tiny, before)
    first, second = steer(tiny, one), steer(tiny, two, tokens="generated")
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None), second.__exit__(None, None, None)
    assert_unchanged(tiny, before)


@pytest.mark.parametrize(
    "layer, options",
    [(9, {}), (1, {"coeff": float("nan")}), (1, {"coeff": [1, 2]}), (1, {"tokens": "first"})],
)
def test_a_refusal_leaves_no_hook(tiny, layer, options):
    with pytest.raises(ValueError):
        with steer(tiny, vectors_for(tiny, layer=layer), **options):
            pytest.fail("should have been refused")
    assert hooks(tiny) == []


def test_vectors_handed_in_are_never_changed(tiny):
    tensor = some_vectors(tiny, 3)
    kept = tensor.clone()
    vectors = SteeringVectors(tensor, 1, radius=3.0)
    2 * vectors, -vectors, vectors[0], vectors[1:]
    with steer(tiny, vectors, coeff=[1.0, -2.0, 0.5]):
        tiny.model.generate(**tiny.encode(PROMPTS), max_new_tokens=3)
    assert torch.equal(tensor, kept) and torch.equal(vectors.tensor, kept) and vectors.radius == 3.0
    tensor.zero_()  # nor does changing what was handed in change the vectors
    assert torch.equal(vectors.tensor, kept)


@pytest.mark.parametrize("tokens", ["all", "prompt", "generated", [0]])
def test_coefficient_zero_is_unsteered_bit_for_bit(architectures, tokens):
    lm = architectures
    clean = logits(lm)
    said = lm.model.generate(**lm.encode(PROMPTS), max_new_tokens=4)
    for site in sites_of(lm):
        with steer(lm, vectors_for(lm, site=site), coeff=0, tokens=tokens):
            assert torch.equal(logits(lm), clean)
            assert torch.equal(lm.model.generate(**lm.encode(PROMPTS), max_new_tokens=4), said)


# --- the right tokens, under the KV cache and under left padding ----------------------------------
def steered_places(tokens, n_prompt, n_all):
    """The positions of a prompt + completion that a role or scope names, in the plainest way."""
    if isinstance(tokens, Scope):
        prompt = [] if tokens.prompt is None else picked(tokens.prompt, n_prompt)
        return prompt + (list(range(n_prompt, n_all)) if tokens.generated else [])
    if tokens in ("all", "generated"):
        return list(range(0 if tokens == "all" else n_prompt, n_all))
    return picked("all" if tokens == "prompt" else tokens, n_prompt)


def assert_generation_is_the_uncached_one(lm, prompts, vectors, tokens, coeff=1.0):
    """The logits of every step of a cached, padded `generate` against one uncached pass of each row
    with a plain hook."""
    encoded = lm.encode(prompts)
    width = encoded["input_ids"].shape[1]
    settings = dict(max_new_tokens=N_NEW, output_logits=True, return_dict_in_generate=True)
    with steer(lm, vectors, coeff, tokens):
        out = lm.model.generate(**encoded, **settings)
    assert len(out.logits) == N_NEW
    for row, prompt in enumerate(prompts):
        ids = ids_of(lm, prompt)
        n, said = len(ids), out.sequences[row, width:].tolist()
        addend = torch.zeros(n + N_NEW - 1, lm.d_model)
        theta = vectors.tensor[row if len(vectors) > 1 else 0]
        addend[steered_places(tokens, n, n + N_NEW - 1)] = coeff * theta
        with plain_add(lm, vectors.source_layer, vectors.site, addend):
            expected = run_plain(lm, ids + said[:-1])[0][n - 1 :]
        ours = torch.stack([step[row] for step in out.logits])
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)
        assert expected.argmax(-1)[0] == said[0]


@pytest.mark.parametrize("tokens", ROLES + SCOPES, ids=str)
def test_roles_under_cache_and_padding(architectures, tokens):
    vectors = vectors_for(architectures)
    assert_generation_is_the_uncached_one(architectures, PROMPTS, vectors, tokens)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("tokens", ["all", "prompt", "generated", [-1], SCOPES[0]], ids=str)
def test_roles_at_every_site(tiny, site, tokens):
    vectors = vectors_for(tiny, site=site)
    assert_generation_is_the_uncached_one(tiny, PROMPTS, vectors, tokens, coeff=-1.5)


def test_without_padding_generate_drops_the_mask_and_roles_still_hold(tiny):
    for tokens in ROLES + SCOPES:
        assert_generation_is_the_uncached_one(tiny, PROMPTS[:1], vectors_for(tiny), tokens)


def test_a_scope_says_what_a_word_does():
    assert Scope.of("all") == Scope() and Scope.of("prompt") == Scope(generated=False)
    assert Scope.of("generated") == Scope(prompt=None) and Scope.of("last") == Scope("last", False)
    assert Scope.of([1]) == Scope([1], False) and Scope.of(Scope([1])) == Scope([1], True)
    with pytest.raises(ValueError, match="tokens 'generate' is not a role"):
        Scope("generate")


def test_padding_on_the_right_is_not_steered_either(tiny):
    rows = [ids_of(tiny, p) for p in PROMPTS]
    width = max(map(len, rows))
    ids = torch.tensor([r + [tiny.tokenizer.pad_token_id] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    vectors = vectors_for(tiny)
    for tokens in ("all", "last", [0, 2]):
        with steer(tiny, vectors, tokens=tokens), torch.no_grad():
            ours = tiny.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, r in enumerate(rows):
            addend = torch.zeros(len(r), tiny.d_model)
            addend[picked(tokens, len(r))] = vectors.tensor[0]
            with plain_add(tiny, 1, "resid_post", addend):
                expected = run_plain(tiny, r)[0]
            torch.testing.assert_close(ours[row, : len(r)], expected, atol=1e-4, rtol=1e-3)


def test_positions_need_a_mask_that_tells_padding(tiny):
    n = 6
    four = torch.ones(1, 1, n, n).tril().log()  # ready-made: padding cannot be read off it
    ids = torch.arange(n)[None]
    for tokens in ("all", "prompt"):
        with steer(tiny, vectors_for(tiny), tokens=tokens), torch.no_grad():
            ready = tiny.model(input_ids=ids, attention_mask=four, use_cache=False).logits
            plain = tiny.model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(ready, plain, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match=r"tokens \[1\] cannot be told from padding"):
        with steer(tiny, vectors_for(tiny), tokens=[1]), torch.no_grad():
            tiny.model(input_ids=ids, attention_mask=four, use_cache=False)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([7], "tokens 7 is outside prompt 2, which has 3 tokens: use -3 … 2"),
        ("generate", "tokens 'generate' is not a role"),
    ],
)
def test_a_position_outside_the_prompt_is_refused(tiny, tokens, message):
    with pytest.raises(ValueError, match=message):
        with steer(tiny, vectors_for(tiny), tokens=tokens):
            logits(tiny)


# --- one vector per row ---------------------------------------------------------------------------
def test_one_vector_per_row_is_one_at_a_time(architectures):
    lm, vectors, coeffs = architectures, vectors_for(architectures, 3), [1.0, -2.0, 0.5]
    with steer(lm, vectors, coeffs):
        together = logits(lm)
    for row, coeff in enumerate(coeffs):
        with steer(lm, vectors[row], coeff):
            torch.testing.assert_close(together[row], logits(lm)[row], atol=1e-5, rtol=1e-4)
    assert_generation_is_the_uncached_one(lm, PROMPTS, vectors, "all")
    assert_generation_is_the_uncached_one(lm, PROMPTS, vectors, "generated")


@pytest.mark.parametrize("n", [2, 4])
def test_another_number_of_vectors_than_rows_is_refused(tiny, n):
    with pytest.raises(ValueError, match=f"{n} vectors do not fit a batch of 3 rows: give one"):
        with steer(tiny, vectors_for(tiny, n)):
            logits(tiny)
    assert hooks(tiny) == []


def test_coefficients():
    assert coefficients(2, 3).tolist() == [2, 2, 2]
    assert coefficients(torch.tensor([1.0, 3.0]), 2).tolist() == [1, 3]
    for bad in ([1.0, 2.0], float("nan"), [1.0, 2.0, float("inf")], []):
        with pytest.raises(ValueError, match="one finite number, or one for each of the 3 vectors"):
            coefficients(bad, 3)


# --- hook = bias edit -----------------------------------------------------------------------------
BIASES = {"llama": "down_proj", "gpt2": "c_proj", "gpt_neox": "dense_4h_to_h", "phi": "fc2"}


@pytest.mark.parametrize("architecture", BIASES)
def test_hook_is_a_bias_edit(architecture):
    lm = tiny_model(architecture)
    if architecture == "llama":  # the published method writes into this bias
        config = transformers.LlamaConfig(**{**lm.model.config.to_dict(), "mlp_bias": True})
        model = random_weights_(transformers.LlamaForCausalLM(config), 0)
        lm = LanguageModel(lm.name, model, lm.tokenizer, "0")
    vectors, edited = vectors_for(lm, site="mlp_out"), copy.deepcopy(lm)
    # the bias also goes to padding, which nobody reads
    real = lm.encode(PROMPTS)["attention_mask"].bool()
    edited.blocks[1].mlp.get_submodule(BIASES[architecture]).bias.data += 2 * vectors.tensor[0]
    with steer(lm, vectors, coeff=2.0):
        torch.testing.assert_close(logits(lm)[real], logits(edited)[real], atol=1e-4, rtol=1e-4)
        said = lm.model.generate(**lm.encode(PROMPTS), max_new_tokens=6)
    assert torch.equal(said, edited.model.generate(**edited.encode(PROMPTS), max_new_tokens=6))
    assert (logits(lm) - logits(edited)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_vectors_stay_fp32_whatever_the_model(dtype):
    lm = tiny_model("llama")
    lm.model.to(dtype)
    vectors = vectors_for(lm)
    before = capture(lm, PROMPTS[0], 1)
    with steer(lm, vectors):
        assert logits(lm).dtype == dtype
        moved = capture(lm, PROMPTS[0], 1) - before
    torch.testing.assert_close(moved, vectors.tensor.expand_as(before), atol=0.05, rtol=0)
    assert vectors.tensor.dtype == torch.float32


# --- the artefact ---------------------------------------------------------------------------------
@few
@given(n=st.integers(1, 4), d=st.integers(1, 5), factor=st.floats(-10, 10), seed=st.integers(0, 99))
def test_algebra(n, d, factor, seed):
    tensor = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    v = SteeringVectors(tensor, 3, "mlp_out", 2.0, {"a": 1})
    for product in (factor * v, v * factor):
        assert torch.equal(product.tensor, tensor * factor)
        assert product.radius == pytest.approx(2 * abs(factor))
    assert torch.equal((-v).tensor, -tensor) and (-v).radius == 2.0
    assert torch.equal(v[0].tensor, tensor[:1]) and torch.equal(v[-1].tensor, tensor[-1:])
    assert torch.equal(v[:2].tensor, tensor[:2])
    assert torch.equal(v[[n - 1, 0]].tensor, tensor[[n - 1, 0]])
    assert len(v) == n == len(list(v)) and len(v[0]) == 1
    for other in (factor * v, -v, v[0], v[:1]):
        assert (other.source_layer, other.site, other.provenance) == (3, "mlp_out", {"a": 1})
    assert torch.equal(v.tensor, tensor)


def test_one_vector_may_come_flat_in_any_dtype_and_with_a_gradient():
    v = SteeringVectors(torch.ones(4, dtype=torch.float64, requires_grad=True), 0)
    assert v.tensor.shape == (1, 4) and v.tensor.dtype == torch.float32
    assert not v.tensor.requires_grad and (2 * v).radius is None


@pytest.mark.parametrize(
    "tensor, site, message",
    [
        ([[0.0, float("nan")]], "resid_post", "NaN or infinite"),
        ([[float("inf")]], "resid_post", "NaN or infinite"),
        ([], "resid_post", r"shape \[1, 0\] do not fit"),
        (torch.zeros(0, 4), "resid_post", r"shape \[0, 4\]"),
        (torch.zeros(1, 1, 4), "resid_post", r"shape \[1, 1, 4\]"),
        ([[1.0]], "mlp", "site 'mlp' is unknown: use one of resid_pre"),
    ],
)
def test_bad_vectors_are_refused(tensor, site, message):
    with pytest.raises(ValueError, match=message):
        SteeringVectors(torch.as_tensor(tensor), 0, site)


def test_an_index_outside_is_refused_and_nan_cannot_be_made():
    v = SteeringVectors(torch.ones(2, 3), 0)
    with pytest.raises(IndexError, match="vector 2 is outside this set of 2"):
        v[2]
    with pytest.raises(ValueError, match="NaN"):
        v * float("nan")
    with pytest.raises(ValueError, match=r"shape \[0, 3\]"):
        v[2:]


numbers = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(max_size=5)
values = st.none() | st.booleans() | st.integers() | words | st.lists(numbers, max_size=3)
notes = st.dictionaries(words, values, max_size=3)
places = st.tuples(
    st.integers(-4, 30), st.sampled_from(SITES), st.none() | st.floats(0.1, 100), notes
)


@few
@given(n=st.integers(1, 3), d=st.integers(1, 6), place=places, seed=st.integers(0, 99))
def test_save_and_load_give_back_the_same(tmp_path_factory, n, d, place, seed):
    path = tmp_path_factory.mktemp("vectors") / "ü v.safetensors"
    tensor = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    SteeringVectors(tensor, *place).save(path)
    again = SteeringVectors.load(path)
    assert torch.equal(again.tensor, tensor)
    assert (again.source_layer, again.site, again.radius, again.provenance) == place


@pytest.mark.parametrize("content", [b"not safetensors", b"", pickle.dumps({"vectors": [1]}), None])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, content):
    path = tmp_path / "foreign.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"foreign.safetensors cannot be read .*") as caught:
        SteeringVectors.load(path)
    assert "\n" not in str(caught.value)


ABOUT = '{"source_layer": 1}'


@pytest.mark.parametrize(
    "tensors, header, field",
    [
        ({}, {}, "'format' is None"),
        ({}, {"format": "gguf"}, "'format' is 'gguf'"),
        ({"weights": torch.ones(2)}, {"format": FORMAT, "about": ABOUT}, "tensor vectors"),
        ({}, {"format": FORMAT}, "'about'"),
        ({}, {"format": FORMAT, "about": "not json"}, "'about'"),
        ({}, {"format": FORMAT, "about": "[1]"}, "'about'"),
        ({}, {"format": FORMAT, "about": "{}"}, "source_layer"),
        ({}, {"format": FORMAT, "about": '{"source_layer": 1, "colour": "red"}'}, "colour"),
        (
            {},
            {"format": FORMAT, "about": '{"source_layer": 1, "site": "attic"}'},
            "site 'attic' is",
        ),
        ({"vectors": torch.full((1, 4), torch.nan)}, {"format": FORMAT, "about": ABOUT}, "NaN"),
    ],
)
def test_a_foreign_file_is_refused_by_name_and_field(tmp_path, tensors, header, field):
    path = tmp_path / "foreign.safetensors"
    save_file(tensors or {"vectors": torch.ones(1, 4)}, path, header or None)
    with pytest.raises(ValueError, match="foreign.safetensors") as caught:
        SteeringVectors.load(path)
    assert field in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "d_model, layer, message",
    [
        (7, 1, r"d_model is 7, that of tiny-random is 32; .* another model"),
        (32, 20, r"source_layer 20 is outside the model.* 0 … 5"),
    ],
)
def test_vectors_of_another_model_are_refused(tiny, tmp_path, d_model, layer, message):
    vectors = SteeringVectors(torch.ones(1, d_model), layer)
    vectors.save(tmp_path / "v.safetensors")
    assert SteeringVectors.load(tmp_path / "v.safetensors").tensor.shape == (1, d_model)
    with pytest.raises(ValueError, match=rf"v\.safetensors: {message}"):
        SteeringVectors.load(tmp_path / "v.safetensors", tiny)
    with pytest.raises(ValueError, match=message):
        with steer(tiny, vectors):
            pass


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_negative_layers_count_from_the_end(architecture):
    lm = tiny_model(architecture)
    vector = vectors_for(lm)
    with steer(lm, vector):
        said = logits(lm)
    with steer(lm, SteeringVectors(vector.tensor, -3)):
        assert torch.equal(logits(lm), said)


# --- nothing silent, nothing raw ------------------------------------------------------------------
@pytest.mark.parametrize("tokens", ["prompt", "generated", "last", Scope("last", True)], ids=str)
def test_kind_2_scopes_without_a_cache_or_in_chunks_are_refused(tiny, tokens):
    for how in (dict(use_cache=False), dict(prefill_chunk_size=4)):
        with pytest.raises(ValueError, match="cannot tell a prompt's tokens from generated ones"):
            with steer(tiny, vectors_for(tiny), tokens=tokens):
                tiny.model.generate(**tiny.encode(PROMPTS[:1] * 2), max_new_tokens=3, **how)
    with steer(tiny, vectors_for(tiny), tokens=tokens):  # another prompt goes on with no other
        assert torch.equal(logits(tiny, PROMPTS[:1]), logits(tiny, PROMPTS[:1]))
        logits(tiny, PROMPTS[1:2])


def test_kind_2_all_tokens_are_steered_without_a_cache_and_in_chunks(tiny):
    encoded, new = tiny.encode(PROMPTS), dict(max_new_tokens=4, do_sample=False)
    with steer(tiny, vectors_for(tiny)):
        cached = tiny.model.generate(**encoded, **new)
        assert torch.equal(tiny.model.generate(**encoded, use_cache=False, **new), cached)
        assert torch.equal(tiny.model.generate(**encoded, prefill_chunk_size=4, **new), cached)


@pytest.mark.parametrize("spec", [[True, False, False], True, torch.tensor([True]), [0.5], 1.0])
def test_kind_8_truth_values_are_no_positions(tiny, spec):
    for run in (
        lambda: LayerSpan(tiny, PROMPTS, 1, 3, target_positions=spec),
        lambda: LayerSpan(tiny, PROMPTS, 1, 3, steered_positions=spec),
        lambda: Scope(spec),
    ):
        with pytest.raises(ValueError, match="is not a whole number"):
            run()


def test_kind_19_numbers_of_numpy_and_torch(tiny, tmp_path):
    notes = {"seed": np.int64(3), "share": np.float32(0.5), "rows": np.arange(2)}
    v = SteeringVectors(some_vectors(tiny), np.int64(1), radius=torch.tensor(3.0), provenance=notes)
    assert type(v.source_layer) is int and type(v.radius) is float
    assert v[np.int64(1)] == v[1] and v[torch.tensor(-1)] == v[2]
    v.save(tmp_path / "v.safetensors")
    again = SteeringVectors.load(tmp_path / "v.safetensors")
    assert again.provenance == {"seed": 3, "share": 0.5, "rows": [0, 1]}
    with pytest.raises(ValueError, match="coeff '2' does not fit"):
        coefficients("2", 1)
    with pytest.raises(ValueError, match="source_layer 1.5 is not a whole number"):
        SteeringVectors(torch.ones(1, 3), 1.5)


def test_kind_20_equal_sets_are_equal_and_hash_alike(tiny):
    one, same = vectors_for(tiny, 2), vectors_for(tiny, 2)
    assert one == same and hash(one) == hash(same) and len({one, same}) == 1
    for other in (one[0], 2 * one, vectors_for(tiny, 2, layer=2), vectors_for(tiny, 2, seed=1)):
        assert one != other
    assert one != "vectors" and -1 * (-one) == one


def test_kind_27_a_file_follows_the_umask_and_is_written_whole(tmp_path):
    v, path = SteeringVectors(torch.ones(1, 3), 0), tmp_path / "v.safetensors"
    before = os.umask(0o027)
    try:
        v.save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640 and os.listdir(tmp_path) == [path.name]
    with pytest.raises(ValueError, match="folder .*nowhere does not exist: make it first"):
        v.save(tmp_path / "nowhere" / "v.safetensors")
    for run in (v.save, SteeringVectors.load):
        with pytest.raises(ValueError, match="is a folder"):
            run(tmp_path)
    with pytest.raises(ValueError, match="cannot be saved.*of type object"):
        SteeringVectors(torch.ones(1, 3), 0, provenance={"a": object()}).save(path)
    assert SteeringVectors.load(path) == v


@pytest.mark.parametrize("radius", ["8", -1.0, float("inf"), True, [1.0]])
def test_kind_27_a_radius_that_is_no_norm_is_refused(tmp_path, radius):
    path = tmp_path / "v.safetensors"
    about = json.dumps({"source_layer": 1, "radius": radius})
    save_file({"vectors": torch.ones(1, 3)}, path, {"format": FORMAT, "about": about})
    with pytest.raises(ValueError, match="v.safetensors is broken.*radius .* is not a norm"):
        SteeringVectors.load(path)
