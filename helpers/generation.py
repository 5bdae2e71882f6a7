"""What the model then says: prompts × vectors completions, in batches."""

from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from .models import LanguageModel, remembered
from .residual import (
    check_finite,
    check_kind,
    check_length,
    check_seed,
    in_parts,
    instead,
    mixed_precision,
    whole,
    without_hooks,
)
from .steering import Scope, check_vectors, coefficients, steer

SHARED = 8  # as many tokens in common at the beginning are worth the bookkeeping of `_read_once`


class _InPlace(DynamicLayer):
    """The keys and values of one block, written where there is room for them: a DynamicLayer copies
    all of them for each new token."""

    def __init__(self, filled, rows, length):
        """`filled`: a layer that holds the beginning; `rows`: which of its rows each row continues;
        `length`: of prompt and completion."""
        super().__init__()
        self.lazy_initialization(filled.keys, filled.values)
        self.room = [self._roomy(held, rows, length) for held in (filled.keys, filled.values)]
        self._show(filled.keys.shape[2])

    @staticmethod
    def _roomy(held, rows, length):
        _, heads, n, size = held.shape
        room = held.new_empty(len(rows), heads, max(n, length), size)
        room[:, :, :n] = held[rows]
        return room

    def _show(self, n):
        self.keys, self.values = (room[:, :, :n] for room in self.room)

    def update(self, key_states, value_states, *args, **kwargs):
        n = self.keys.shape[2]
        end = n + key_states.shape[2]
        for room, states in zip(self.room, (key_states, value_states)):
            room[:, :, n:end] = states
        self._show(end)
        return self.keys, self.values


class _Sampling(LogitsProcessor):
    """Temperature sampling as argmax of logits/T + Gumbel noise, each row with a generator of its
    own: a row's text depends on its seed alone, not on the batch it happens to be in."""

    def __init__(self, temperature, seeds):
        self.temperature = temperature
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids, scores):
        size = scores.shape[-1]
        plain = dict(dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        uniform = torch.stack([torch.rand(size, generator=g, **plain) for g in self.generators])
        uniform = uniform.clamp_(1e-20, 1 - 1e-7)
        return scores.float() / self.temperature - uniform.log().neg().log().to(scores.device)


class _First(LogitsProcessor):
    """Keeps the log-probabilities of the first new token, as the model has them; none of any token
    may be NaN, which argmax would take for a word."""

    def __init__(self, wanted: bool):
        self.wanted, self.logp = wanted, None

    def __call__(self, input_ids, scores):
        check_finite(scores.amax(-1), "the logits")  # NaN wins; a suppressed word is -inf
        if self.wanted and self.logp is None:
            self.logp = scores.float().log_softmax(-1)
        return scores


def _within(seed: int) -> int:
    """A seed of 64 bits; one that has them is itself."""
    return (seed + 2**63) % 2**64 - 2**63


def pairs(prompts, vectors) -> list[tuple[int, int]]:
    """The rows (vector index, prompt index) of prompts × vectors, one vector after another."""
    n_vectors = 1 if vectors is None else len(vectors)
    return [(v, i) for v in range(n_vectors) for i in range(len(prompts))]


@torch.no_grad()
def complete(
    lm,
    prompts,
    vectors=None,
    coeff=1.0,
    tokens="all",
    max_new_tokens=48,
    temperature=0.0,
    seed=0,
    batch_size=64,
    progress=False,
    first=False,
    mixed=False,
):
    """Completions, without special tokens: a list over prompts, or with `vectors` a list over
    vectors of such lists.

    `temperature` 0 is greedy. Sampled text is a function of (seed, place in `prompts`), so all
    vectors share their noise and a repeated prompt gives several samples. `tokens` as in `steer`;
    `coeff` a number or one per vector. Out of memory halves the batch and goes on. With `first`
    also the log-probabilities of the first new token: (texts, [rows, vocabulary] in fp32), the rows
    as in `pairs`. With `mixed` products are taken in bfloat16 (see `mixed_precision`), faster where
    the processor has them and not letter for letter the same. The model's own settings for
    generation play no part, but for its end tokens.

    ValueError for an empty list, for what is out of range, and for a text longer than the model
    reads; FloatingPointError where the logits become NaN.
    """
    check_kind(lm, LanguageModel, "lm", "give what helpers.models.load returns")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("prompts is empty: give at least one.")
    max_new_tokens = whole(max_new_tokens, "max_new_tokens")
    batch_size = whole(batch_size, "batch_size")
    if not 0 <= temperature < float("inf") or max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            f"temperature {temperature}, max_new_tokens {max_new_tokens} and batch_size "
            f"{batch_size} must be ≥ 0, ≥ 1 and ≥ 1."
        )
    seed = check_seed(seed)
    if vectors is not None:
        check_vectors(vectors)
    coeffs = None if vectors is None else coefficients(coeff, len(vectors))
    check_length(lm, lm.encode(prompts)["attention_mask"], max_new_tokens - 1)
    rows = pairs(prompts, vectors)
    config = _config(lm, max_new_tokens)
    bar = tqdm(total=len(rows), desc="completions", leave=False, disable=not progress)

    def steered(which):
        return nullcontext() if coeffs is None else steer(lm, vectors[which], coeffs[which], tokens)

    def say(part):
        which = [v for v, _ in part]
        encoded = lm.encode([prompts[i] for _, i in part])
        asked = encoded
        if Scope.of(tokens) == Scope():
            below = 0 if vectors is None else vectors.check(lm)
            asked = _read_once(lm, encoded, which, steered, below, max_new_tokens)
        opening = _First(first)
        processors = [opening]
        if temperature:
            processors.append(
                _Sampling(temperature, [_within(seed * 1_000_003 + i) for _, i in part])
            )
        with steered(which):
            out = lm.model.generate(
                **asked, generation_config=config, logits_processor=LogitsProcessorList(processors)
            )
        bar.update(len(part))
        new = out[:, encoded["input_ids"].shape[1] :]
        return lm.tokenizer.batch_decode(new, skip_special_tokens=True), opening.logp

    with ExitStack() as stack:
        inside = bar, _no_settings(lm.model), _contiguous_head(lm.model), mixed_precision(lm, mixed)
        for one in inside:
            stack.enter_context(one)
        done, _ = in_parts(say, rows, batch_size, "completions")
    texts = sum([part for part, _ in done], [])
    if vectors is not None:
        texts = [texts[i : i + len(prompts)] for i in range(0, len(texts), len(prompts))]
    return (texts, torch.cat([logp for _, logp in done])) if first else texts


def _config(lm, max_new_tokens) -> GenerationConfig:
    """Greedy, with the end tokens of the model."""
    ends = lm.model.generation_config.eos_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=lm.tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=lm.tokenizer.pad_token_id,
    )


@contextmanager
def _no_settings(model):
    """While inside, the model has no settings of its own for generation: `generate` would take
    from them whatever ours do not name (penalties, suppressed words, the kind of cache…)."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _contiguous_head(model):
    """While inside, the head is given a contiguous tensor: transformers hands it one token's slice
    of the hidden states, for which a product would copy the head once per row."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def _read_once(lm, encoded, which, steered, below, max_new_tokens) -> dict:
    """What `generate` gets: the prompts, and the cache of the beginning that all of them share (of
    one prompt: all but its last token), read once per vector instead of once per row, and in the
    blocks before `below`, which no vector changes, once for all of them.

    `which`: the vector of each row; `steered(vectors)`: a context that steers by them. A row is
    then [beginning, padding, rest]. That is the same to plain attention only, so other caches are
    left alone.
    """
    vectors = list(dict.fromkeys(which))
    n = _n_alike(encoded)
    if n < SHARED or not _has_plain_cache(lm):
        return encoded
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    beginning = ids[0][mask[0].bool()][:n]
    shared = below if below and len(vectors) > 1 and _can_replay(lm, below) else 0  # blocks
    clean, outputs = _read(lm, beginning[None], shared) if shared else (None, [])
    with steered(vectors), _replayed(lm, outputs, len(vectors)):
        cache, _ = _read(lm, beginning.expand(len(vectors), n))
    rows = torch.tensor([vectors.index(v) for v in which], device=lm.device)
    length = ids.shape[1] + max_new_tokens
    for k, layer in enumerate(cache.layers):
        filled, of = (clean.layers[k], 0 * rows) if k < shared else (layer, rows)
        cache.layers[k] = _InPlace(filled, of, length)
    starts = ids.shape[1] - mask.sum(1) + n  # of what follows the beginning
    rest = torch.arange(n, ids.shape[1], device=lm.device) >= starts[:, None]  # [n_rows, …]
    begin = beginning.expand(len(which), n)
    padded = ids[:, n:].where(rest, lm.tokenizer.pad_token_id)
    return {
        "input_ids": torch.cat([begin, padded], 1),
        "attention_mask": torch.cat([torch.ones_like(begin), rest.to(mask.dtype)], 1),
        "past_key_values": cache,
    }


@remembered
@torch.no_grad()
def _has_plain_cache(lm) -> bool:
    """Does the model keep all keys and values of all blocks, and nothing else?"""
    with without_hooks(lm.model):
        cache, _ = _read(lm, torch.arange(SHARED, device=lm.device)[None])
    return type(cache) is DynamicCache and {type(layer) for layer in cache.layers} == {DynamicLayer}


def _read(lm, ids, recorded=0):
    """One pass over tokens [n, n_tokens] without padding: the cache it leaves, and what the first
    `recorded` blocks gave, before any hook."""
    outputs = [None] * recorded

    def keep(k, forward, *args, **kwargs):
        outputs[k] = forward(*args, **kwargs)
        return outputs[k]

    with ExitStack() as stack:
        for k in range(recorded):
            block = lm.blocks[k]
            stack.enter_context(instead(block, partial(keep, k, block.forward)))
        options = dict(use_cache=True, return_dict=True, logits_to_keep=1)
        out = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return out.past_key_values, outputs


@contextmanager
def _replayed(lm, outputs, n):
    """While inside, the first blocks give what they gave before, to `n` rows."""
    with ExitStack() as stack:
        for block, output in zip(lm.blocks, outputs):
            wide = _expand(output, n)
            stack.enter_context(instead(block, lambda *args, wide=wide, **kwargs: wide))
        yield


def _expand(output, n):
    if isinstance(output, tuple):
        return tuple(_expand(one, n) for one in output)
    return output.expand(n, *output.shape[1:]) if torch.is_tensor(output) else output


@remembered
@torch.no_grad()
def _can_replay(lm, below) -> bool:
    """Do the blocks from `below` on keep the same keys and values where those before are replayed?
    Not in a model whose blocks hand on more than the hidden states, or which share them."""
    ids = torch.arange(SHARED, device=lm.device)[None]
    with without_hooks(lm.model):
        try:
            plain, outputs = _read(lm, ids, below)
            with _replayed(lm, outputs, 2):
                found, _ = _read(lm, ids.expand(2, -1))
            pairs = [(a.values, b.values) for a, b in zip(plain.layers, found.layers)][below:]
            return all(torch.allclose(b, a.expand_as(b), 1e-3, 1e-4) for a, b in pairs)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False  # it fails in some way of its own, and takes the long way


def _n_alike(encoded) -> int:
    """How many leading tokens all prompts have in common, the last one of each left out."""
    rows = [ids[mask.bool()] for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"])]
    shortest = min(map(len, rows)) - 1
    same = torch.stack([row[:shortest] == rows[0][:shortest] for row in rows]).all(0)
    return int(same.long().cumprod(0).sum())
