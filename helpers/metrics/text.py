"""Is a text fluent to the base model, and how far apart are two texts?"""

import numpy as np
import torch

from ..generation import complete
from ..residual import check_finite, check_length, normalise, positions_of, read_at
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
def _read(lm, prompts, completions, batch_size=16) -> tuple[list[np.ndarray], torch.Tensor]:
    """The surprise in nats of each token of each completion, [n_tokens], and its mean residual late
    in the model, [n, d_model], every token scaled to norm 1: read after its prompt by the base
    model without adapter. `prompts`: one for all, or one per completion; each is read once."""
    completions = [completions] if isinstance(completions, str) else list(completions)
    prompts = [prompts] * len(completions) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(completions):
        raise ValueError(
            f"{len(prompts)} prompts do not fit {len(completions)} completions: "
            "give one for all, or one for each."
        )
    tokens = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    order = sorted(range(len(tokens)), key=lambda i: place[prompts[i]])
    values = [np.zeros(0)] * len(tokens)
    means = torch.zeros(len(tokens), lm.d_model)
    with lm.base():
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            # an empty text is read as one padding token, so that it has a place, too
            rows = [tokens[i] or [lm.tokenizer.pad_token_id] for i in part]
            nll, hidden = _read_batch(lm, [prompts[i] for i in part], rows)
            for i, row, numbers, vectors in zip(part, rows, nll, hidden):
                values[i] = numbers[: len(tokens[i])]
                means[i] = vectors[: len(row)].mean(0)
    return values, means


def _read_batch(lm, prompts, tokens):
    """The surprise [n, longest] of token ids after their prompts, and their residuals at
    `_late(lm)`, [n, longest, d_model], of norm 1; past a text's end, noise."""
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
    ids, seen = torch.tensor(ids, device=lm.device), {}
    mask = torch.cat([mask[which], torch.ones_like(ids)], 1)
    with read_at(lm, _late(lm), "resid_post", seen, "hidden"):
        after = lm.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions_of(mask)[:, -width:],
            past_key_values=before.past_key_values,
            **options,
        )
    logits = torch.cat([before.logits[which, -1:], after.logits[:, :-1]], 1)
    check_finite(logits, "the logits")
    nll = -logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return nll.cpu().numpy(), normalise(seen["hidden"].float()).cpu()


def _late(lm) -> int:
    """The layer at which texts are compared: three quarters of the way. By then a token stands for
    what the answer is about to do; see data/labels/README.md for other depths."""
    return max(3 * lm.n_layers // 4 - 1, 0)


def token_nll(lm, prompts, completions, batch_size=16) -> list[np.ndarray]:
    """The surprise in nats of each token under the base model without adapter: an array [n_tokens]
    per completion. `prompts`: one for all, or one per completion; each is read once."""
    return _read(lm, prompts, completions, batch_size)[0]


def read(lm, prompts, completions, batch_size=16) -> tuple[np.ndarray, torch.Tensor]:
    """`surprise` [n] and `embed` [n, d_model] of completions, from one pass."""
    values, means = _read(lm, prompts, completions, batch_size)
    return _mean_surprise(values), normalise(means)


def surprise(lm, prompts, completions, batch_size=16) -> np.ndarray:
    """Mean surprise (`token_nll`, nats per token) of each completion from its 5th token on; NaN
    where there are fewer than 5."""
    return _mean_surprise(token_nll(lm, prompts, completions, batch_size))


def _mean_surprise(values) -> np.ndarray:
    rows = [row[FIRST_SCORED:] for row in values]
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


def embed(lm, prompts, texts) -> torch.Tensor:
    """Unit vectors [n, d_model]: where the residual stream of the base model is, on average over a
    text read after its prompt, three quarters of the way through the blocks. `prompts`: one for
    all, or one per text."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("texts is empty: give at least one.")
    return read(lm, prompts, texts)[1]


def distance(lm, prompt, texts, others) -> torch.Tensor:
    """1 − cosine of the embeddings of texts that answer one prompt, [n_texts, n_others]: 0 the
    same, at most 2. Answers to one prompt share much: they lie near each other on this scale."""
    return 1 - embed(lm, prompt, texts) @ embed(lm, prompt, others).T


def own_spread(lm, prompt, clean, n_samples=24, quantile=0.95, max_new_tokens=48, seed=0) -> float:
    """The given quantile of the distances of the unsteered model's own samples from its answer
    `clean`: a steered answer farther away than this counts as changed. The samples are drawn at
    temperature 0.7, where a small model still answers the question."""
    asked = [prompt] * n_samples
    samples = complete(lm, asked, temperature=0.7, max_new_tokens=max_new_tokens, seed=seed)
    return float(torch.quantile(distance(lm, prompt, clean, samples)[0], quantile))
