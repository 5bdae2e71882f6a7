"""How large a change is, whether a text is fluent, how far apart two texts are, and intervals for all of it."""

import numpy as np
import torch

from ..generation import complete, pairs
from ..models import prompts as prompt_data
from ..residual.sites import positions_of
from ..residual.span import capture
from ..steering import SteeringVectors, coefficients, steer
from .fluency import FluentRange, distinct2  # noqa: F401 (they need no torch, and are part of this module's meaning)

FIRST_SCORED = 4  # fluency counts from the 5th token on: a new opening may surprise, what follows has to fit it


# ---------------------------------------------------------------------------------------------- change inside the model
def change(span, vectors) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over target tokens of ‖Δ‖, and of ‖Δ‖ / ‖clean‖: two tensors [n_vectors, n_prompts] (a single target layer)."""
    if not span.single:
        raise ValueError(
            f"change needs a span with one target layer, this one has {span.target_layers}."
        )
    with torch.no_grad():
        size = span.delta(vectors).norm(dim=-1)
    clean = span.clean_target.norm(dim=-1).clamp(min=1e-12)
    count = span.target_mask.sum(-1)
    return size.sum(-1) / count, (size / clean * span.target_mask).sum(-1) / count


def log_probabilities(lm, encoded, keep):
    """Log-probabilities [n, keep, vocabulary] in fp32 at the last `keep` tokens."""
    out = lm.model(
        **encoded,
        position_ids=positions_of(encoded["attention_mask"]),
        use_cache=False,
        logits_to_keep=keep,
    )
    return out.logits[:, -keep:].float().log_softmax(-1)


def scaled_to_effect(span, vectors, relative, upto=32.0, n_steps=11) -> SteeringVectors:
    """Each vector made longer until its relative change at the target (`metrics.change`) is
    `relative`, at most `upto` times.

    Tried at n_steps factors from 1 to `upto` in equal ratios; the first that reaches it is
    interpolated on the log scale. A vector that already does more is left as it is."""
    factors, found = np.geomspace(1, upto, n_steps), []
    tried = [change(span, float(f) * vectors)[1].mean(1).numpy() for f in factors]
    for sizes in np.stack(tried, 1):  # of one vector, [n_steps]
        reached = np.flatnonzero(sizes >= relative)
        i = reached[0] if len(reached) else n_steps - 1
        near = slice(max(0, i - 1), i + 1)
        log = np.interp(np.log(relative), np.log(sizes[near]), np.log(factors[near]))
        found.append(float(np.exp(log)))
    longer = torch.tensor(found)[:, None] * vectors.tensor
    return SteeringVectors(longer, vectors.source_layer, vectors.site)


def kl(clean_logp, other_logp) -> torch.Tensor:
    """KL(clean ‖ other) in nats over the last dimension of two tensors of log-probabilities."""
    return (clean_logp.exp() * (clean_logp - other_logp)).sum(-1)


@torch.no_grad()
def kl_next_token(lm, prompts, vectors, coeff=1.0, batch_size=32) -> torch.Tensor:
    """KL(unsteered ‖ steered) in nats of the next token at the last prompt token, [n_vectors, n_prompts]."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    coeffs, rows, values = coefficients(coeff, len(vectors)), pairs(prompts, vectors), []
    clean = torch.cat(
        [
            log_probabilities(lm, lm.encode(prompts[i : i + batch_size]), 1)[:, 0]
            for i in range(0, len(prompts), batch_size)
        ]
    )
    for start in range(0, len(rows), batch_size):
        which, where = zip(*rows[start : start + batch_size])
        with steer(lm, vectors[list(which)], coeffs[list(which)]):
            steered = log_probabilities(lm, lm.encode([prompts[i] for i in where]), 1)[:, 0]
        base = clean[list(where)]
        values.append((base.exp() * (base - steered)).sum(-1))
    return torch.cat(values).view(len(vectors), len(prompts)).cpu()


@torch.no_grad()
def kl_from_clean(lm, prompt, steered) -> torch.Tensor:
    """`kl_next_token` of one prompt where the steered log-probabilities, [n_vectors, vocabulary], are known already: [n_vectors]."""
    clean = log_probabilities(lm, lm.encode([prompt]), 1)[0, 0]
    return (clean.exp() * (clean - steered)).sum(-1).cpu()


@torch.no_grad()
def kl_along(lm, prompt, text, vectors, coeff=1.0) -> torch.Tensor:
    """KL(unsteered ‖ steered) in nats averaged over the tokens of a fixed continuation `text`, [n_vectors]."""
    encoded, n = joined(lm, [(prompt, text)])
    coeffs = coefficients(coeff, len(vectors))
    clean = log_probabilities(lm, encoded, n[0] + 1)[0, :-1]
    values = []
    for i in range(len(vectors)):
        with steer(lm, vectors[i], coeffs[i]):
            steered = log_probabilities(lm, encoded, n[0] + 1)[0, :-1]
        values.append((clean.exp() * (clean - steered)).sum(-1).mean())
    return torch.stack(values).cpu()


# ---------------------------------------------------------------------------------------------- fluency
def joined(lm, texts):
    """prompt + completion token ids, left-padded, and the number of completion tokens of each row."""
    rows = [
        (
            lm.encode(p)["input_ids"][0].tolist(),
            lm.tokenizer(c, add_special_tokens=False)["input_ids"],
        )
        for p, c in texts
    ]
    longest = max(len(p) + len(c) for p, c in rows)
    ids = torch.full((len(rows), longest), lm.tokenizer.pad_token_id, device=lm.device)
    mask = torch.zeros_like(ids)
    for row, (p, c) in enumerate(rows):
        ids[row, longest - len(p) - len(c) :] = torch.tensor(p + c, device=lm.device)
        mask[row, longest - len(p) - len(c) :] = 1
    return {"input_ids": ids, "attention_mask": mask}, [len(c) for _, c in rows]


@torch.no_grad()
def token_nll(lm, prompts, completions, batch_size=16) -> list[np.ndarray]:
    """The surprise in nats of each token of each completion after its prompt, under the base model without adapter: an array
    [n_tokens] per completion. `prompts`: one for all, or one per completion; the model reads each once, whatever follows it."""
    completions = list(completions)
    prompts = [prompts] * len(completions) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(completions):
        raise ValueError(
            f"{len(prompts)} prompts do not fit {len(completions)} completions: give one for all, or one for each."
        )
    tokens = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    rows = sorted((i for i, row in enumerate(tokens) if row), key=lambda i: place[prompts[i]])
    values = [np.zeros(0)] * len(tokens)
    with lm.base():
        for part in (rows[start : start + batch_size] for start in range(0, len(rows), batch_size)):
            asked, width = (
                list(dict.fromkeys(prompts[i] for i in part)),
                max(len(tokens[i]) for i in part),
            )
            which = torch.tensor([asked.index(prompts[i]) for i in part], device=lm.device)
            ids = torch.tensor(
                [tokens[i] + [lm.tokenizer.pad_token_id] * (width - len(tokens[i])) for i in part],
                device=lm.device,
            )
            encoded = lm.encode(asked)
            before = lm.model(
                **encoded,
                position_ids=positions_of(encoded["attention_mask"]),
                use_cache=True,
                logits_to_keep=1,
            )
            before.past_key_values.reorder_cache(which)
            mask = torch.cat(
                [encoded["attention_mask"][which], torch.ones_like(ids)], 1
            )  # what follows a text's end is not read
            after = lm.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions_of(mask)[:, -width:],
                past_key_values=before.past_key_values,
            )
            logp = (
                torch.cat([before.logits[which, -1:], after.logits[:, :-1]], 1)
                .float()
                .log_softmax(-1)
            )
            nll = -logp.gather(-1, ids[..., None])[..., 0].cpu().numpy()
            for i, row in zip(part, nll):
                values[i] = row[: len(tokens[i])]
    return values


def surprise(lm, prompts, completions, batch_size=16) -> np.ndarray:
    """Mean surprise (`token_nll`, nats per token) of each completion from its 5th token on; NaN where there are fewer than 5."""
    nll = token_nll(lm, prompts, completions, batch_size)
    return np.array(
        [row[FIRST_SCORED:].mean(dtype=float) if len(row) > FIRST_SCORED else np.nan for row in nll]
    )


def fluent_range(
    lm, prompts, temperatures=(0.0, 1.0), max_new_tokens=48, seed=0, progress=False
) -> FluentRange:
    """Calibrate fluency on the base model's own completions of `prompts`, one per prompt and temperature.

    Greedy text is far less surprising than text sampled at temperature 1, and both are the model's own: the range runs from the
    1st percentile at one temperature to the 99th at the other, whichever are the widest. Use 20 prompts or more.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    with lm.base():
        said = [
            complete(
                lm,
                prompts,
                temperature=t,
                max_new_tokens=max_new_tokens,
                seed=seed,
                progress=progress,
            )
            for t in temperatures
        ]
    nll = surprise(lm, prompts * len(said), sum(said, []))
    seen = [row[~np.isnan(row)] for row in nll.reshape(len(said), -1)]
    if min(map(len, seen)) < 2:
        raise ValueError(
            "fluent_range: the model's own completions are too few or too short to calibrate on; "
            "use more prompts or tokens."
        )
    low, high = min(np.percentile(x, 1) for x in seen), max(np.percentile(x, 99) for x in seen)
    return FluentRange(float(low), float(high), sum(map(len, seen)))


# ---------------------------------------------------------------------------------------------- distance and diversity
@torch.no_grad()
def _means(lm, texts, batch_size=16):
    """Mean mid-depth residual [n, d_model] of each text read alone by the base model. The first token is left out and every other
    one scaled to norm 1: attention sinks, the first token and now and then a second, are 100 times as long as the rest."""
    layer, out = lm.n_layers // 2, []
    with lm.base():
        for start in range(0, len(texts), batch_size):
            part = [t if t.strip() else "." for t in texts[start : start + batch_size]]
            hidden = torch.nn.functional.normalize(capture(lm, part, layer)[0], dim=-1)
            real = ~hidden.isnan().any(-1)
            keep = real & ((real.cumsum(1) > 1) | (real.sum(1, keepdim=True) == 1))
            out.append((hidden.nan_to_num() * keep[..., None]).sum(1) / keep.sum(1, keepdim=True))
    return torch.cat(out)


def embed(lm, texts) -> torch.Tensor:
    """Unit vectors [n, d_model]: mid-depth residuals averaged over each text, centred on the reference texts."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("texts is empty: give at least one.")
    centre = getattr(lm, "_text_centre", None)
    if centre is None:
        centre = _means(lm, prompt_data.texts("reference_texts")).mean(0)
        lm._text_centre = centre  # a few kilobytes, the same for every call
    return torch.nn.functional.normalize(_means(lm, texts) - centre, dim=-1).cpu()


def distance(lm, texts, others) -> torch.Tensor:
    """1 − cosine of the texts' centred embeddings, [n_texts, n_others]: 0 the same, about 1 unrelated, at most 2."""
    return 1 - embed(lm, texts) @ embed(lm, others).T


def own_spread(
    lm, prompt, clean, n_samples=24, temperature=0.7, quantile=0.95, max_new_tokens=48, seed=0
) -> float:
    """How far the unsteered model's own samples lie from its answer `clean`: the given quantile of their distances.

    A steered answer farther away than this counts as changed. At temperature 0.7 a small model still answers the question.
    """
    samples = complete(
        lm, [prompt] * n_samples, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed
    )
    return float(torch.quantile(distance(lm, clean, samples)[0], quantile))


def diversity(lm, texts) -> float:
    """Mean pairwise distance; NaN for fewer than two texts."""
    if len(texts) < 2:
        return float("nan")
    d = distance(lm, texts, texts)
    return float(d.sum() / (len(texts) * (len(texts) - 1)))


# ---------------------------------------------------------------------------------------------- rates and intervals
def wilson(hits, n, z=1.96) -> tuple[float, float]:
    """The Wilson interval of a rate (95 % at the default z); (0, 1) when there is nothing to count."""
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n} is not a rate: hits must lie in 0 … {n}.")
    if n == 0:
        return 0.0, 1.0
    rate, z2 = hits / n, z * z
    middle, half = rate + z2 / (2 * n), z * np.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def bootstrap(
    values, statistic=np.mean, level=0.95, n_resamples=2000, seed=0
) -> tuple[float, float]:
    """Interval of a statistic over independent units (prompts × seeds): one value, or one row of values, per unit.

    Vectors of one orthogonal set are not independent: average over them first, and resample what is left.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim == 0 or len(values) < 2:
        raise ValueError("bootstrap needs at least two units.")
    draws = np.random.default_rng(seed).integers(0, len(values), (n_resamples, len(values)))
    found = [statistic(values[d]) for d in draws]
    return tuple(float(x) for x in np.percentile(found, [50 - 50 * level, 50 + 50 * level]))
