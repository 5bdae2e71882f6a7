"""helpers.generation: a row's text depends on its prompt, vector and seed alone, never on the batch
it is in."""

import numpy as np
import pytest
import torch
from conftest import ALL_ARCHITECTURES, tiny_model
from reference import PROMPTS, ids_of, one_thread, run_plain, some_vectors  # noqa: F401

from helpers import generation
from helpers.generation import complete, pairs
from helpers.metrics import kl_from_clean, surprise
from helpers.models import LanguageModel
from helpers.residual import LayerSpan, capture, mixed_precision
from helpers.residual.sites import hidden_of
from helpers.steering import Scope, SteeringVectors, steer


def vectors_for(lm, n=3, norm=4.0):
    return SteeringVectors(some_vectors(lm, n, norm), 1, radius=norm)


def hooks(lm):
    return [m for m in lm.model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_greedy_is_the_uncached_argmax(architectures):
    lm = architectures
    for prompt, text in zip(PROMPTS, complete(lm, PROMPTS, max_new_tokens=6)):
        ids = ids_of(lm, prompt)
        n = len(ids)
        while len(ids) < n + 6 and ids[-1] != lm.tokenizer.eos_token_id:
            ids.append(run_plain(lm, ids)[0][-1].argmax().item())
        assert text == lm.tokenizer.decode(ids[n:], skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tokens", ["all", "generated", "last", Scope()], ids=str)
def test_batch_is_one_at_a_time(architectures, temperature, tokens):
    lm, vectors = architectures, vectors_for(architectures)
    options = dict(tokens=tokens, max_new_tokens=8, temperature=temperature, seed=3)
    coeffs = [1.0, -1.0, 2.0]
    together = complete(lm, PROMPTS, vectors, coeffs, batch_size=32, **options)
    for batch_size in (1, 4):
        assert complete(lm, PROMPTS, vectors, coeffs, batch_size=batch_size, **options) == together
    with steer(lm, 2.0 * vectors[2], tokens=tokens):
        assert complete(lm, PROMPTS, **options) == together[2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_first_tokens_probabilities_come_along(architectures, temperature):
    lm, vectors = architectures, vectors_for(architectures)
    options = dict(max_new_tokens=3, temperature=temperature, seed=3, batch_size=4)
    texts, first = complete(lm, PROMPTS, vectors, first=True, **options)
    assert texts == complete(lm, PROMPTS, vectors, **options)
    assert first.shape[0] == len(vectors) * len(PROMPTS) and first.dtype == torch.float32
    with steer(lm, vectors[1]):
        by_hand = run_plain(lm, ids_of(lm, PROMPTS[2]))[0][-1].float().log_softmax(-1)
    torch.testing.assert_close(first[len(PROMPTS) + 2], by_hand, atol=1e-3, rtol=1e-3)


KIND = "You are kind. "
ALIKE = [KIND + rest for rest in ("Hi!", "What is tea, and what is it not?", "Why?", "Hi! Ho!")]
WINDOWS = ("mistral", "gemma3", "gemma2", "cohere2", "starcoder2", "gpt_oss")
STATES = ("lfm2", "falcon_h1", "qwen3_5")


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_a_beginning_read_once_changes_nothing(architecture, monkeypatch):
    lm, honest, asked = tiny_model(architecture), generation._read_once, []
    vectors = vectors_for(lm, 2)

    def watched(*args):
        asked.append(honest(*args))
        return asked[-1]

    monkeypatch.setattr(generation, "_read_once", watched)
    plain = complete(lm, ALIKE, max_new_tokens=6)
    steered = complete(lm, ALIKE, vectors, max_new_tokens=6)
    shared = [one for one in asked if "past_key_values" in one]
    assert len(shared) == (0 if architecture in WINDOWS + STATES else 2)
    lengths = [len(ids_of(lm, prompt)) for prompt in ALIKE]
    for one in shared:
        assert one["attention_mask"].sum(1).tolist() == lengths * (len(one["input_ids"]) // 4)
    assert plain == [complete(lm, prompt, max_new_tokens=6)[0] for prompt in ALIKE]
    alone = [complete(lm, prompt, vectors, max_new_tokens=6) for prompt in ALIKE]
    assert steered == [[said[v][0] for said in alone] for v in (0, 1)]


LONG = "Would you say that tea is better than coffee?"


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_one_prompt_is_read_once_below_the_source_block(architecture, monkeypatch):
    """Many vectors say what each says alone, and the first block reads one row."""
    lm, seen = tiny_model(architecture), []
    vectors = vectors_for(lm, 5)
    alone = [complete(lm, LONG, vectors[k], max_new_tokens=6)[0] for k in range(5)]
    replays = generation._can_replay(lm, 1)  # asked first: its own passes are not counted
    own = lm.blocks[0].forward

    def watched(*args, **kwargs):
        seen.append(tuple(hidden_of(args, kwargs).shape[:2]))
        return own(*args, **kwargs)

    monkeypatch.setattr(lm.blocks[0], "forward", watched)
    assert complete(lm, LONG, vectors, max_new_tokens=6) == alone
    if replays and architecture not in WINDOWS + STATES:
        long = len(ids_of(lm, LONG)) - 1
        assert [shape for shape in seen if shape[1] > 1] == [(1, long)]


def test_an_outer_steering_acts_once_in_blocks_that_are_replayed(tiny):
    """The replayed blocks' hooks act on what they gave without them."""
    inner = SteeringVectors(some_vectors(tiny, 3, 4.0), 2)
    outer = SteeringVectors(some_vectors(tiny, 1, 6.0), 0)
    with steer(tiny, outer):
        together = complete(tiny, LONG, inner, max_new_tokens=6)
        alone = [complete(tiny, LONG, inner[k], max_new_tokens=6)[0] for k in range(3)]
    assert together == alone
    assert together != complete(tiny, LONG, inner, max_new_tokens=6)


def test_keys_are_written_in_place(tiny):
    ids = tiny.encode(LONG)["input_ids"]
    plain, _ = generation._read(tiny, ids[:, :-4])
    rows = torch.tensor([0, 0, 0])
    room = [generation._InPlace(layer, rows, ids.shape[1]) for layer in plain.layers]
    at = [layer.keys.data_ptr() for layer in room]
    plain.reorder_cache(rows)
    new = torch.randn(3, *room[0].keys.shape[1:2], 4, room[0].keys.shape[3])
    for layer, other in zip(plain.layers, room):
        wanted, found = layer.update(new, 2 * new), other.update(new, 2 * new)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found))
        assert other.get_seq_length() == ids.shape[1]
    assert at == [layer.keys.data_ptr() for layer in room]


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_mixed_precision_is_near_and_leaves_no_trace(architecture):
    lm = tiny_model(architecture)
    encoded = lm.encode(LONG)
    before = lm.model(**encoded).logits
    with mixed_precision(lm):
        within = lm.model(**encoded).logits
    assert torch.equal(lm.model(**encoded).logits, before)
    assert within.dtype == before.dtype
    if any(type(m) is torch.nn.Linear for m in lm.blocks.modules()):
        assert not torch.equal(within, before)
    spread = before.std()
    assert (within - before).abs().mean() < 0.05 * spread
    texts = complete(lm, LONG, vectors_for(lm), max_new_tokens=4, mixed=True)
    assert np.shape(texts) == (3, 1)


def test_shape_and_order_of_the_result(tiny):
    vectors, new = vectors_for(tiny), dict(max_new_tokens=3)
    plain, steered = complete(tiny, PROMPTS, **new), complete(tiny, PROMPTS, vectors, **new)
    assert np.shape(plain) == (3,) and np.shape(steered) == (3, 3)
    assert all(isinstance(text, str) for text in sum(steered, plain))
    assert complete(tiny, PROMPTS[0], **new) == plain[:1]
    assert complete(tiny, PROMPTS[0], vectors[1], **new) == [[steered[1][0]]]
    assert complete(tiny, PROMPTS, 0 * vectors, **new) == [plain] * 3
    assert complete(tiny, PROMPTS, vectors, coeff=0, **new) == [plain] * 3
    assert pairs(PROMPTS, vectors) == [(v, i) for v in range(3) for i in range(3)]
    assert pairs("ab", None) == [(0, 0), (0, 1)]


def test_sampled_text_is_a_function_of_seed_and_place(tiny):
    options = dict(temperature=1.0, max_new_tokens=8)
    asked = PROMPTS[:1] * 6
    said = complete(tiny, asked, **options)
    assert complete(tiny, asked, **options) == said
    assert complete(tiny, asked[:2], **options) == said[:2]
    assert len(set(said)) == 6  # a repeated prompt gives several samples
    assert not set(complete(tiny, asked, seed=1, **options)) & set(said)
    # all vectors share their noise
    assert complete(tiny, asked, vectors_for(tiny), coeff=0, **options) == [said] * 3
    torch.manual_seed(5)
    assert complete(tiny, asked, **options) == said  # whatever the global generator


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_samples_follow_the_softmax(tiny, temperature):
    """The first token of 600 samples against the model's own probabilities."""
    n = 600
    p = (run_plain(tiny, ids_of(tiny, "Hm."))[0][-1] / temperature).softmax(-1)
    names = [tiny.tokenizer.decode([i]) for i in range(len(p))]
    texts = complete(tiny, ["Hm."] * n, temperature=temperature, max_new_tokens=1, batch_size=n)
    likely = {names[i] for i in p.topk(5).indices.tolist()}
    assert len(likely) == 5 or "\ufffd" in likely  # bytes that are no text look alike
    for name in likely - {"\ufffd", ""}:
        expected = sum(p[i].item() for i in range(len(p)) if names[i] == name)
        sigma = np.sqrt(expected * (1 - expected) / n)
        assert abs(texts.count(name) / n - expected) < 4 * sigma
    assert max(p) - min(p) > 0.01  # not uniform: the check means something


def test_low_temperature_is_greedy(tiny):
    cold = complete(tiny, PROMPTS, temperature=1e-4, max_new_tokens=8)
    assert cold == complete(tiny, PROMPTS, max_new_tokens=8)


def test_text_ends_at_the_models_end_token_and_has_no_prompt():
    lm = tiny_model("llama")
    out = lm.model.generate(**lm.encode(PROMPTS[1]), max_new_tokens=8, do_sample=False)
    ids = out[0, len(ids_of(lm, PROMPTS[1])) :].tolist()
    stop = next(k for k in range(1, 8) if ids[k] not in ids[:k])
    lm.model.generation_config.eos_token_id = [ids[stop], lm.tokenizer.eos_token_id]
    text = complete(lm, PROMPTS[1], max_new_tokens=8)[0]
    assert text == lm.tokenizer.decode(ids[: stop + 1], skip_special_tokens=True)
    # a row that has ended waits for the others, and adds nothing
    together = complete(lm, PROMPTS, max_new_tokens=8)
    assert together[1] == text and lm.tokenizer.pad_token not in "".join(together)


def test_the_models_own_sampling_settings_play_no_part():
    lm = tiny_model("gpt2")
    said = [complete(lm, PROMPTS, temperature=t, max_new_tokens=8) for t in (0.0, 1.0)]
    lm.model.generation_config.update(
        repetition_penalty=9.0, temperature=0.1, top_k=1, do_sample=True
    )
    assert said == [complete(lm, PROMPTS, temperature=t, max_new_tokens=8) for t in (0.0, 1.0)]


def test_the_model_is_left_as_it_was(tiny):
    before = {k: v.clone() for k, v in tiny.model.state_dict().items()}
    config, rng = tiny.model.generation_config.to_dict(), torch.get_rng_state()
    plain = complete(tiny, PROMPTS, max_new_tokens=4)
    complete(tiny, PROMPTS, vectors_for(tiny), temperature=1.0, max_new_tokens=4)
    with pytest.raises(ValueError, match="d_model is 5"):
        complete(tiny, PROMPTS, SteeringVectors(torch.ones(1, 5), 1))
    assert complete(tiny, PROMPTS, max_new_tokens=4) == plain and hooks(tiny) == []
    assert all(torch.equal(v, before[k]) for k, v in tiny.model.state_dict().items())
    assert tiny.model.generation_config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompts=[]), "prompts is empty: give at least one"),
        (dict(prompts=["a", ""]), "Prompt 1 is ''"),
        (dict(temperature=-1), "temperature -1, .* must be ≥ 0"),
        (dict(max_new_tokens=0), "max_new_tokens 0 .* ≥ 1"),
        (dict(batch_size=0), "batch_size 0 must be"),
        (dict(coeff=[1.0, 2.0]), "one for each of the 3 vectors"),
        (dict(coeff=float("nan")), "one finite number"),
        (dict(tokens="later"), "tokens 'later' is not a role"),
        (dict(tokens=[3]), "tokens 3 is outside prompt 2, which has 3 tokens"),
    ],
)
def test_bad_arguments_are_refused(tiny, change, message):
    arguments = dict(prompts=PROMPTS, vectors=vectors_for(tiny), max_new_tokens=2) | change
    with pytest.raises(ValueError, match=message):
        complete(tiny, **arguments)
    assert hooks(tiny) == []


# --- nothing of the model's own settings, nothing raw ---------------------------------------------
OWN_SETTINGS = dict(
    use_cache=False,
    cache_implementation="static",
    no_repeat_ngram_size=2,
    repetition_penalty=3.0,
    encoder_repetition_penalty=2.0,
    min_length=40,
    min_new_tokens=5,
    max_length=7,
    max_time=1e-6,
    forced_bos_token_id=3,
    forced_eos_token_id=4,
    suppress_tokens=list(range(40, 110)),
    begin_suppress_tokens=list(range(60)),
    bad_words_ids=[[i] for i in range(60, 200)],
    sequence_bias=[[[50], 30.0]],
    exponential_decay_length_penalty=[1, 2.0],
    stop_strings=["a", "e"],
    do_sample=True,
    temperature=0.1,
    top_k=1,
    top_p=0.1,
    num_beams=3,
    num_return_sequences=2,
    guidance_scale=3.0,
    prompt_lookup_num_tokens=3,
    prefill_chunk_size=3,
    return_dict_in_generate=True,
    output_scores=True,
    output_hidden_states=True,
)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "bloom", "gpt_neox"])
def test_kind_1_nothing_of_the_models_own_settings_counts(architecture):
    lm = tiny_model(architecture)
    vectors = vectors_for(lm, 2)
    ask = lambda asked, t: complete(lm, asked, vectors, temperature=t, max_new_tokens=6)  # noqa: E731
    expected = [ask(asked, t) for asked in (PROMPTS, ALIKE) for t in (0.0, 1.0)]
    own = lm.model.generation_config
    for name, value in OWN_SETTINGS.items():
        setattr(own, name, value)
    lm.model.config.use_cache = False
    lm.model.config.return_dict = False
    lm = LanguageModel(lm.name, lm.model, lm.tokenizer, "0")
    assert [ask(asked, t) for asked in (PROMPTS, ALIKE) for t in (0.0, 1.0)] == expected
    assert lm.model.generation_config is own and own.num_beams == 3


def test_kind_7_logits_that_are_no_numbers_are_an_error():
    lm = tiny_model("llama")
    lm.model.half()
    with pytest.raises(FloatingPointError, match="the logits became (nan|inf).*wider dtype"):
        complete(lm, PROMPTS, vectors_for(lm), coeff=1e5, max_new_tokens=2)
    with (
        pytest.raises(FloatingPointError, match="residual stream"),
        steer(lm, vectors_for(lm, 1), coeff=1e5),
    ):
        capture(lm, PROMPTS)
    lm = tiny_model("gpt2")
    lm.blocks[2].mlp.c_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="the logits became nan"):
        complete(lm, PROMPTS, max_new_tokens=2)
    with pytest.raises(FloatingPointError, match="residual stream of tiny-gpt2 became nan"):
        LayerSpan(lm, PROMPTS, 1, 3)
    with pytest.raises(FloatingPointError, match="the logits became nan"):
        surprise(lm, PROMPTS, PROMPTS)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt_bigcode", "gptj", "mpt"])
def test_kind_18_beyond_the_context_is_one_sentence(architecture):
    lm, long = tiny_model(architecture), "x" * 600
    runs = [
        lambda: complete(lm, long),
        lambda: complete(lm, ["a", "x" * 500]),
        lambda: capture(lm, ["a", long]),
        lambda: LayerSpan(lm, long, 1, 3),
        lambda: surprise(lm, "a", [long]),
        lambda: kl_from_clean(lm, long, None),
    ]
    for run in runs:
        with pytest.raises(ValueError, match=f"tiny-{architecture} reads at most 512: shorten it"):
            run()
    assert complete(lm, "x" * 505, max_new_tokens=8)  # the last one is not read


@pytest.mark.parametrize("architecture", ["llama", "bloom", "gpt_neox"])
def test_kind_18_positions_without_an_end_go_on(architecture):
    assert capture(tiny_model(architecture), "x" * 600, 0).shape[2] >= 600


def test_kind_19_numbers_of_numpy_and_torch(tiny):
    vectors = vectors_for(tiny)
    options = dict(temperature=1.0, max_new_tokens=4)
    expected = complete(tiny, PROMPTS, vectors, 2.0, seed=3, **options)
    for whole in (np.int64, torch.tensor):
        new = dict(max_new_tokens=whole(4), temperature=1.0, batch_size=whole(2))
        assert complete(tiny, PROMPTS, vectors, np.float32(2), seed=whole(3), **new) == expected
    with pytest.raises(ValueError, match="seed 1.5 is not a whole number"):
        complete(tiny, PROMPTS, seed=1.5)
    assert complete(tiny, PROMPTS, seed=2**62, **options)


@pytest.mark.parametrize("wrong", [torch.ones(32), {"a": 1}, "vectors", 3])
def test_kind_20_something_else_than_vectors_is_refused(tiny, wrong):
    with pytest.raises(ValueError, match="vectors is of type .*: give SteeringVectors"):
        complete(tiny, PROMPTS, wrong)
    with pytest.raises(ValueError, match="vectors is of type"), steer(tiny, wrong):
        pass
    for run in (lambda: complete(wrong, PROMPTS), lambda: capture(wrong, PROMPTS)):
        with pytest.raises(ValueError, match="lm is of type .*: give what helpers.models.load"):
            run()
