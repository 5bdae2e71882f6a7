"""What vectors do and what the model then says: what studies and the live lab measure alike."""

import math

import torch

from .. import metrics
from ..generation import complete
from ..models import prompts, remembered
from ..residual import LayerSpan, capture
from ..steering import SteeringVectors
from ..training import covariance_vectors, learned_and_start, random_vectors, train

TARGET_TOKENS = slice(-3, None)  # where vectors are trained to change the target layer
CALIBRATION = 24  # prompts (all of everyday.json) on which fluency is calibrated
RADII = (2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 40.0, 80.0)
KINDS = ("learned", "random", "covariance", "scaled")


def asked(prompt_set, split, which, n) -> list[str]:
    """The first `n` of the prompts `which` (numbers) of a split; a small set from its start."""
    there = prompts.texts(prompt_set, split=split)
    if max(which) >= len(there):
        which = range(len(there))
    return [there[i] for i in which[:n]]


def residual_norms(lm, chats, layers) -> list[float]:
    """Median norm of the residual at each layer's output over all tokens but the prompts' first."""
    hidden = capture(lm, chats, layers)  # [n_layers, n_prompts, n_tokens, d_model], NaN padded
    real = ~hidden[0].isnan().any(-1)
    real &= real.cumsum(1) > 1
    return [h[real].norm(dim=-1).median().item() for h in hidden]


# -- sets of vectors -------------------------------------------------------------------------------
def sets(span, radius, seed, steps, n_vectors) -> dict:
    """{kind: SteeringVectors}, as many of each of KINDS as `n_vectors` says, of norm `radius`; but
    "scaled" ones are random, made longer to the median learned vector's relative change."""
    unknown = [kind for kind in n_vectors if kind not in KINDS]
    if unknown:
        raise ValueError(f"kind {unknown[0]!r} is unknown: use some of {', '.join(KINDS)}.")
    found = {}
    for kind, n in n_vectors.items():
        if kind == "learned":
            found[kind] = train(span, radius, n, steps=steps, seed=seed, progress=False).vectors
        elif kind == "covariance":
            found[kind] = covariance_vectors(span, radius, n, seed)
        else:
            found[kind] = random_vectors(span, radius, n, seed=seed)
        if kind == "scaled":
            found[kind] = at_equal_effect(span, found[kind], found["learned"])
    return found


def orthogonal_sets(span, radius, n_vectors, steps, seed, scaled=False) -> dict:
    """{"learned", "random"}: an orthogonal learned set and what it began as; with `scaled` also
    "scaled", that start made longer to the median learned vector's relative change: the control of
    equal effect."""
    found = learned_and_start(span, radius, n_vectors, steps, seed)
    if scaled:
        found["scaled"] = at_equal_effect(span, found["random"], found["learned"])
    return found


def median_norm(vectors) -> float:
    return short(vectors.tensor.norm(dim=1).median())


def at_equal_effect(span, vectors, learned):
    """The vectors made longer, to the median learned vector's relative change at the target."""
    wanted = metrics.change(span, learned)[1].median().item()
    return metrics.scaled_to_effect(span, vectors, wanted)


# -- what is said ----------------------------------------------------------------------------------
@remembered
def fluent_range(lm, max_new_tokens=24) -> metrics.FluentRange:
    """How surprising the base's own answers to everyday prompts are: the scale of "fluent"."""
    chats = [lm.chat_prompt(text) for text in prompts.texts("everyday", n=CALIBRATION)]
    return metrics.fluent_range(lm, chats, max_new_tokens=max_new_tokens)


@remembered
def baseline(lm, prompt, max_new_tokens=24) -> tuple:
    """(clean answer, distance that 95 % of the model's own samples stay within, FluentRange)."""
    chat = lm.chat_prompt(prompt)
    (clean,) = complete(lm, chat, max_new_tokens=max_new_tokens)
    spread = metrics.own_spread(lm, chat, clean, max_new_tokens=max_new_tokens)
    return clean, spread, fluent_range(lm, max_new_tokens)


def spoken(lm, chat, clean, theta, temperature=0.0, max_new_tokens=24, seed=0) -> tuple:
    """What the model says under each vector, how far that is from the clean answer, and its
    surprise (nats per token): dicts; and the next token's log-probabilities, [n_vectors, vocab]."""
    how = dict(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    said, first = complete(lm, chat, theta, first=True, **how)
    texts = [found[0] for found in said]
    unique = list(dict.fromkeys(texts))  # equal texts are measured once
    nll, embedded = metrics.read(lm, chat, [clean, *unique])
    apart = dict(zip(unique, 1 - embedded[1:] @ embedded[0]))
    nll = dict(zip(unique, nll[1:]))
    rows = []
    for text in texts:
        numbers = {"distance": short(apart[text]), "surprise": short(nll[text])}
        rows.append({"temperature": temperature, "text": text, **numbers})
    return rows, first


@torch.no_grad()
def measured(span, clean, theta, max_new_tokens=24) -> list[dict]:
    """What each vector does, for a span of one prompt: what the model says (`spoken`, greedy); its
    norm, the objective, the relative change at the target, and the KL (nats) of the next token."""
    lm, chat = span.lm, span.prompts[0]
    rows, steered = spoken(lm, chat, clean, theta, 0.0, max_new_tokens)
    delta = span.delta(theta)[:, 0].norm(dim=-1)  # [n_vectors, n_tokens]
    numbers = {
        "norm": theta.tensor.norm(dim=1),
        "objective": delta.pow(2).sum(-1),
        "relative": (delta / span.clean_target[0].norm(dim=-1)).mean(-1),
        "kl": metrics.kl_from_clean(lm, chat, steered),
    }
    for name, values in numbers.items():
        for row, value in zip(rows, values):
            row[name] = short(value)
    return rows


def short(number):
    """4 significant digits, None for NaN: what a JSON file can hold."""
    number = float(number)
    return float(f"{number:.4g}") if math.isfinite(number) else None


def cell(
    lm,
    prompt,
    source_layer,
    target_layer,
    radius,
    seed,
    n_vectors,
    steps=8,
    coeffs=(1.0,),
    sampled=(),
    max_new_tokens=24,
    judged_as=None,
) -> dict:
    """Train, steer and measure at each of the radii (a list) on one prompt (plain text); all of
    them speak in the same batches: {"results": one per radius}.

    A result is {"clean", "own_spread", "fluent": [low, high], "rows": […]}, a row per vector and
    coefficient, greedy, and one more at temperature 0.7 for the kinds in `sampled`: see `measured`;
    numbers have 4 digits. `judged_as`: the result of another cell of this prompt, whose clean
    answer and calibration are taken over. ValueError as in LayerSpan and train."""
    chat = lm.chat_prompt(prompt)
    if lm.encode(chat)["input_ids"].shape[1] < 2:
        raise ValueError(f"prompt {prompt!r} has 1 token, the attention sink: give 2 or more.")
    span = LayerSpan(lm, chat, source_layer, target_layer, TARGET_TOKENS)
    if judged_as:
        about = {name: judged_as[name] for name in ("clean", "own_spread", "fluent")}
    else:
        clean, spread, fluent = baseline(lm, prompt, max_new_tokens)
        about = {"clean": clean, "own_spread": spread, "fluent": [fluent.low, fluent.high]}
    places, tensors = [], []  # of each row: which radius, kind, vector, coefficient; and its θ
    for at, r in enumerate(radius):
        for kind, vectors in sets(span, r, seed, steps, n_vectors).items():
            for v, theta in enumerate(vectors.tensor):
                places += [(at, {"kind": kind, "vector": v, "coeff": c}) for c in coeffs]
                tensors += [c * theta for c in coeffs]
    pushes = SteeringVectors(torch.stack(tensors), span.source_layer)
    greedy = measured(span, about["clean"], pushes, max_new_tokens)
    results = [{**about, "rows": []} for _ in radius]
    for (at, place), row in zip(places, greedy):
        results[at]["rows"].append({**place, **row})
    again = [i for i, (_, place) in enumerate(places) if place["kind"] in sampled]
    if again:
        said, _ = spoken(lm, chat, about["clean"], pushes[again], 0.7, max_new_tokens, seed)
        for i, row in zip(again, said):
            at, place = places[i]
            results[at]["rows"].append({**place, **greedy[i], **row})
    return {"results": results}
