"""Is a text fluent to the base model, and how far apart are two texts?"""

import numpy as np
import torch

from ..generation import complete
from ..models import prompts as prompt_sets
from ..models import remembered
from ..residual import capture, check_finite, check_length, normalise, positions_of
from .judges import FluentRange

FIRST_SCORED = 4  # from the 5th token on: a new opening may surprise, what follows has to fit it


def joined(lm, pairs) -> tuple[dict, list[int]]:
    """(prompt, completion) pairs as token ids, left-padded, and the completions' token counts."""
    rows, counts = [], []
    for prompt, text in pairs:
        after = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append(lm.encode(prompt)["input_ids"][0].tolist() + after)
        counts.append(len(after))
    padded = lm.tokenizer.pad({"input_ids": rows})
    return {name: torch.tensor(padded[name], device=lm.device) for name in padded}, counts


@torch.no_grad()
def token_nll(lm, prompts, completions, batch_size=16) -> list[np.ndarray]:
    """The surprise in nats of each token under the base model without adapter: an array [n_tokens]
    per completion. `prompts`: one for all, or one per completion; each is read once."""
    completions = list(completions)
    prompts = [prompts] * len(completions) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(completions):
        raise ValueError(
            f"{len(prompts)} prompts do not fit {len(completions)} completions: "
            "give one for all, or one for each."
        )
    tokens = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    rows = sorted((i for i, row in enumerate(tokens) if row), key=lambda i: place[prompts[i]])
    values = [np.zeros(0)] * len(tokens)
    with lm.base():
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            nll = _batch_nll(lm, [prompts[i] for i in part], [tokens[i] for i in part])
            for i, row in zip(part, nll):
                values[i] = row[: len(tokens[i])]
    return values


def _batch_nll(lm, prompts, tokens):
    """The surprise [n, longest] of token ids after their prompts; past a text's end, noise."""
    unique = list(dict.fromkeys(prompts))
    which = torch.tensor([unique.index(prompt) for prompt in prompts], device=lm.device)
    encoded = lm.encode(unique)
    mask = encoded["attention_mask"]
    width, pad = max(map(len, tokens)), lm.tokenizer.pad_token_id
    check_length(lm, mask, width)
    options = dict(use_cache=True, return_dict=True)
    before = lm.model(**encoded, position_ids=positions_of(mask), logits_to_keep=1, **options)
    before.past_key_values.reorder_cache(which)
    ids = [row + [pad] * (width - len(row)) for row in tokens]
    ids = torch.tensor(ids, device=lm.device)
    mask = torch.cat([mask[which], torch.ones_like(ids)], 1)
    after = lm.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions_of(mask)[:, -width:],
        past_key_values=before.past_key_values,
        **options,
    )
    logits = torch.cat([before.logits[which, -1:], after.logits[:, :-1]], 1)
    check_finite(logits, "the logits")
    return -logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0].cpu().numpy()


def surprise(lm, prompts, completions, batch_size=16) -> np.ndarray:
    """Mean surprise (`token_nll`, nats per token) of each completion from its 5th token on; NaN
    where there are fewer than 5."""
    rows = [row[FIRST_SCORED:] for row in token_nll(lm, prompts, completions, batch_size)]
    return np.array([row.mean(dtype=float) if len(row) else np.nan for row in rows])


def fluent_range(lm, prompts, temperatures=(0.0, 1.0), max_new_tokens=48) -> FluentRange:
    """Calibrate fluency on the base model's own completions, one per prompt and temperature.

    Greedy text is far less surprising than text sampled at temperature 1, and both are the model's
    own: the range runs from the 1st percentile at one temperature to the 99th at the other,
    whichever are the widest. Use 20 prompts or more.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    options = {"max_new_tokens": max_new_tokens}
    with lm.base():
        said = [complete(lm, prompts, temperature=t, **options) for t in temperatures]
    found = surprise(lm, prompts * len(said), sum(said, [])).reshape(len(said), -1)
    seen = [nll[~np.isnan(nll)] for nll in found]
    if min(map(len, seen)) < 2:
        raise ValueError(
            "fluent_range: the model's own completions are too few or too short to calibrate on; "
            "use more prompts or tokens."
        )
    low = min(np.percentile(nll, 1) for nll in seen)
    high = max(np.percentile(nll, 99) for nll in seen)
    return FluentRange(float(low), float(high), sum(map(len, seen)))


@torch.no_grad()
def _means(lm, texts, batch_size=16):
    """Mean mid-depth residual [n, d_model] of each text read alone by the base model.

    The first token is left out and every other one scaled to norm 1: attention sinks, the first
    token and now and then a second, are 100 times as long as the rest.
    """
    texts = [text if text.strip() else "." for text in texts]
    out = []
    with lm.base():
        for start in range(0, len(texts), batch_size):
            part = texts[start : start + batch_size]
            hidden = normalise(capture(lm, part, lm.n_layers // 2)[0])
            real = ~hidden.isnan().any(-1)  # [n, n_tokens]
            keep = real & ((real.cumsum(1) > 1) | (real.sum(1, keepdim=True) == 1))
            out.append((hidden.nan_to_num() * keep[..., None]).sum(1) / keep.sum(1, keepdim=True))
    return torch.cat(out)


@remembered
def _centre(lm):
    return _means(lm, prompt_sets.texts("reference_texts")).mean(0)


def embed(lm, texts) -> torch.Tensor:
    """Unit vectors [n, d_model]: mid-depth residuals averaged over each text, centred on the
    reference texts."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("texts is empty: give at least one.")
    return normalise(_means(lm, texts) - _centre(lm)).cpu()


def distance(lm, texts, others) -> torch.Tensor:
    """1 − cosine of the embeddings, [n_texts, n_others]: 0 the same, 1 unrelated, at most 2."""
    return 1 - embed(lm, texts) @ embed(lm, others).T


def own_spread(lm, prompt, clean, n_samples=24, quantile=0.95, max_new_tokens=48, seed=0) -> float:
    """The given quantile of the distances of the unsteered model's own samples from its answer
    `clean`: a steered answer farther away than this counts as changed. The samples are drawn at
    temperature 0.7, where a small model still answers the question."""
    asked = [prompt] * n_samples
    samples = complete(lm, asked, temperature=0.7, max_new_tokens=max_new_tokens, seed=seed)
    return float(torch.quantile(distance(lm, clean, samples)[0], quantile))
