"""How large should R be? One cell of a sweep over radius, layer, prompt and seed; what counts as changed and fluent; the controls.

A *cell* trains learned vectors at one radius on one prompt, draws controls of equal norm beside them, lets the model speak under
each, and notes what a reader needs to judge. `table` judges, `write` and `read` keep computed sweeps as small JSON files.
"""

import json
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..generation import complete
from ..metrics import measures
from ..models import prompts
from ..models.loading import load
from ..models.obtain import DEFAULT
from ..residual import check_radii, input_norm
from ..residual.sites import resolve_layer
from ..residual.span import LayerSpan, capture
from ..steering import SteeringVectors, steer
from ..training.controls import covariance_vectors
from ..training.optimisers import random_vectors, train
from . import stored, sweeps
from .store import FOLDER, folder_of, read, table, write  # noqa: F401 (they need no torch)

TARGET_TOKENS = slice(-3, None)
CALIBRATION = 24  # prompts (all of everyday.json) on which fluency is calibrated
KINDS = ("learned", "random", "covariance", "scaled")


def scaled_to_effect(span, vectors, relative, upto=32.0, n_steps=11) -> SteeringVectors:
    """Each vector made longer until its relative change at the target (`measures.change`) is `relative`, at most `upto` times.

    Tried at n_steps factors from 1 to `upto` in equal ratios; the first that reaches it is interpolated on the log scale. A vector
    that already does more is left as it is.
    """
    factors = np.geomspace(1, upto, n_steps)
    tried = np.stack(
        [measures.change(span, float(f) * vectors)[1].mean(1).numpy() for f in factors], 1
    )  # [n_vectors, n_steps]
    found = []
    for sizes in tried:
        reached = np.flatnonzero(sizes >= relative)
        if not len(reached) or reached[0] == 0:
            found.append(1.0 if len(reached) else upto)
        else:
            i = reached[0]
            share = (
                math.log(relative / sizes[i - 1]) / math.log(sizes[i] / sizes[i - 1])
                if sizes[i] > sizes[i - 1] > 0
                else 1.0
            )
            found.append(float(factors[i - 1] * (factors[i] / factors[i - 1]) ** share))
    return SteeringVectors(
        torch.tensor(found)[:, None] * vectors.tensor, vectors.source_layer, vectors.site
    )


# ---------------------------------------------------------------------------------------------- what becomes of θ on its way
@torch.no_grad()
def absorption(lm, chat, vectors, upto, tokens=TARGET_TOKENS) -> dict:
    """What each block from the one after the source to block `upto` makes of the change Δ it is handed, at the last tokens.

    Returns tensors [n_blocks, n_vectors, n_tokens]: "relative" ‖Δ‖/‖h‖ into the block; "cosine" between Δ and θ; "norm": relative
    size behind the block's first norm over that before it; "attention", "mlp": the part of their response along Δ in multiples of
    Δ (−0.1: a tenth taken away); "attention aside", "mlp aside": the part at right angles to it.
    """
    layers = range(vectors.check(lm) + 1, resolve_layer(lm, upto) + 1)
    if not layers:
        raise ValueError(
            f"upto {upto} does not come after source_layer {vectors.source_layer}: use {vectors.source_layer + 1} … {lm.n_layers - 1}."
        )

    def read(n):
        return {
            site: capture(lm, [chat] * n, layers, site)[:, :, tokens]
            for site in ("resid_pre", "resid_mid", "resid_post")
        }

    clean = read(1)
    with steer(lm, vectors):
        moved = {site: hidden - clean[site] for site, hidden in read(len(vectors)).items()}
    change, attention, mlp = (
        moved["resid_pre"],
        moved["resid_mid"] - moved["resid_pre"],
        moved["resid_post"] - moved["resid_mid"],
    )

    def split(response, along):
        share = (response * along).sum(-1) / along.pow(2).sum(-1)
        return share, (response - share[..., None] * along).norm(dim=-1) / along.norm(dim=-1)

    def relative(a, b):
        return (a - b).norm(dim=-1) / b.norm(dim=-1)

    h = clean["resid_pre"]
    normed = torch.stack(
        [
            relative(norm(h[i] + change[i]), norm(h[i]))
            for i, norm in enumerate(input_norm(lm, k) for k in layers)
        ]
    )
    before = change.norm(dim=-1) / h.norm(dim=-1)
    theta = vectors.tensor[None, :, None].to(change)
    found = {
        "relative": before,
        "cosine": torch.cosine_similarity(change, theta, dim=-1),
        "norm": normed / before,
    }
    found["attention"], found["attention aside"] = split(attention, change)
    found["mlp"], found["mlp aside"] = split(mlp, moved["resid_mid"])
    return {name: x.float().cpu() for name, x in found.items()}


# ---------------------------------------------------------------------------------------------- one cell of a sweep
@lru_cache(maxsize=None)
def _fluent(lm, max_new_tokens):
    return measures.fluent_range(
        lm,
        [lm.chat_prompt(t) for t in prompts.texts("everyday", n=CALIBRATION)],
        max_new_tokens=max_new_tokens,
    )


@lru_cache(maxsize=None)
def _own(lm, prompt, max_new_tokens):
    """The model's own answer to a prompt and the distance that 95 % of its samples stay within."""
    chat = lm.chat_prompt(prompt)
    (clean,) = complete(lm, chat, max_new_tokens=max_new_tokens)
    return clean, measures.own_spread(lm, chat, clean, max_new_tokens=max_new_tokens)


def baseline(lm, prompt, max_new_tokens=24) -> tuple:
    """(clean answer, distance that 95 % of the model's own samples stay within, FluentRange); kept, so a second call is free."""
    return *_own(lm, prompt, max_new_tokens), _fluent(lm, max_new_tokens)


def sets(span, radius, seed, steps, n_vectors) -> dict:
    """{kind: SteeringVectors}: `n_vectors` is {kind: how many}; see KINDS. Controls have the norm of the learned vectors, but for
    "scaled": random ones made longer until they cause the median learned vector's relative change at the target."""
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
            wanted = measures.change(span, found["learned"])[1].median().item()
            found[kind] = scaled_to_effect(span, found[kind], wanted)
    return found


def cell(lm, prompt, source_layer, target_layer, radius, seed, **options) -> dict:
    """Train, steer and measure at one radius on one prompt: the one result of `cells_at`, which see."""
    return cells_at(lm, prompt, source_layer, target_layer, [radius], seed, **options)[0]


def cells_at(
    lm,
    prompt,
    source_layer,
    target_layer,
    radii,
    seed,
    steps=8,
    n_vectors=None,
    coeffs=(1.0,),
    sampled=(),
    temperature=0.7,
    max_new_tokens=24,
    judged_as=None,
) -> list[dict]:
    """Train, steer and measure at each radius on one prompt (plain text, put into the chat template here); all of them speak in
    the same batches.

    Returns per radius {"clean", "own_spread", "fluent": [low, high], "rows": […]}, a row per vector and coefficient, greedy, and one
    more at `temperature` for the kinds in `sampled`: what the model said, and its distance to the clean answer, surprise (nats per
    token), objective, relative change and KL (nats) of the next token. Numbers have 4 digits. `judged_as`: the result of another cell
    of this prompt, whose clean answer and calibration are taken over. ValueError as in LayerSpan and train.
    """
    n_vectors = n_vectors or {"learned": 4, "random": 4}
    chat = lm.chat_prompt(prompt)
    if lm.encode(chat)["input_ids"].shape[1] < 2:
        raise ValueError(
            f"prompt {prompt!r} has 1 token: at least 2 are needed, because the first is the attention sink."
        )
    span = LayerSpan(lm, chat, source_layer, target_layer, TARGET_TOKENS)
    if judged_as:
        clean, spread, (low, high) = (judged_as[name] for name in ("clean", "own_spread", "fluent"))
    else:
        clean, spread, fluent = baseline(lm, prompt, max_new_tokens)
        low, high = fluent.low, fluent.high
    found = [sets(span, radius, seed, steps, n_vectors) for radius in radii]
    rows = [
        (at, kind, v, c)
        for at, there in enumerate(found)
        for kind, vectors in there.items()
        for v in range(len(vectors))
        for c in coeffs
    ]
    theta = SteeringVectors(
        torch.stack([c * found[at][kind].tensor[v] for at, kind, v, c in rows]), span.source_layer
    )
    greedy = measured(span, clean, theta, max_new_tokens)
    told = list(enumerate(greedy))
    chosen = [i for i, (_, kind, _, _) in enumerate(rows) if kind in sampled]
    if chosen:
        said, _ = spoken(lm, chat, clean, theta[chosen], temperature, max_new_tokens, seed)
        told += [(i, {**greedy[i], **one}) for i, one in zip(chosen, said)]
    results = [
        {"clean": clean, "own_spread": spread, "fluent": [low, high], "rows": []} for _ in found
    ]
    for i, one in told:
        at, kind, v, c = rows[i]
        results[at]["rows"].append({"kind": kind, "vector": v, "coeff": c, **one})
    return results


def measured(span, clean, theta, max_new_tokens=24) -> list[dict]:
    """What each vector does, for a span of one prompt: what the model says (`spoken`, greedy); its norm ("radius"), the objective,
    the relative change at the target, and the KL (nats) of the next token."""
    lm, chat = span.lm, span.prompts[0]
    said, steered = spoken(lm, chat, clean, theta, 0.0, max_new_tokens)
    with torch.no_grad():
        delta = span.delta(theta)[:, 0].norm(dim=-1)
    numbers = {
        "radius": theta.tensor.norm(dim=1),
        "objective": delta.pow(2).sum(-1),
        "relative": (delta / span.clean_target[0].norm(dim=-1)).mean(-1),
        "kl": measures.kl_from_clean(lm, chat, steered),
    }
    return [{**one, **{k: _short(x[i]) for k, x in numbers.items()}} for i, one in enumerate(said)]


def spoken(lm, chat, clean, theta, temperature=0.0, max_new_tokens=24, seed=0) -> tuple:
    """What the model says under each vector, the text's distance to the clean answer and its surprise (nats per token): a list of
    dicts; and the log-probabilities of the next token, [n_vectors, vocabulary]."""
    said, first = complete(
        lm,
        chat,
        theta,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        first=True,
    )
    texts = [x[0] for x in said]
    return [
        {"temperature": temperature, "text": text, "distance": d, "surprise": s}
        for text, d, s in zip(texts, *_judged(lm, chat, clean, texts))
    ], first


def _judged(lm, chat, clean, texts):
    """Distance to the clean answer and surprise of each text; equal texts are measured once."""
    unique = list(dict.fromkeys(texts))
    apart = dict(zip(unique, measures.distance(lm, clean, unique)[0]))
    nll = dict(zip(unique, measures.surprise(lm, chat, unique)))
    return [_short(apart[t]) for t in texts], [_short(nll[t]) for t in texts]


def _short(number):
    """4 significant digits, None for NaN: what a JSON file can hold."""
    number = float(number)
    return float(f"{number:.4g}") if math.isfinite(number) else None


# Prompts A (train) find the range, prompts B (test, no earlier notebook used them) confirm it, with other seeds.
A, B = (
    {"split": "train", "which": (0, 3, 6), "seeds": (31, 32, 33)},
    {"split": "test", "which": (3, 4, 5), "seeds": (41, 42, 43)},
)
RADII = (2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 40.0, 80.0)


def grids(model, depth=30, radii=RADII, n_prompts=3, n_seeds=3, prompt_set="everyday") -> dict:
    """{name: configs of `run_cell`}: the sweeps that are kept in data/explorer. Layers scale with the model's depth; fewer radii,
    prompts (up to 3) or seeds (up to 3) make them smaller. `prompt_set`: a set of data/prompts with a train and a test split.

    "goldilocks": radius × prompt × seed, on A with every control and with samples; "steps": radius × steps; "explorer": prompt ×
    source layer × radius with several coefficients, what the heat map and the explorer show.
    """
    at = {"model": model, "source_layer": 7 * depth // 30, "target_layer": 21 * depth // 30}

    def product(part, **axes):
        there = prompts.texts(prompt_set, split=part["split"])
        which = (
            part["which"] if max(part["which"]) < len(there) else range(len(there))
        )  # a small set: from its start
        asked = [there[i] for i in which[:n_prompts]]
        return sweeps.grid(prompt=asked, seed=list(part["seeds"])[:n_seeds], **axes)

    both = {"learned": 4, "random": 4, "covariance": 3}
    main = [
        {
            **at,
            **c,
            "part": "A",
            "n_vectors": {**both, "scaled": 3},
            "sampled": ["learned", "random"],
        }
        for c in product(A, radius=check_radii(radii))
    ]
    main += [
        {**at, **c, "part": "B", "n_vectors": both} for c in product(B, radius=check_radii(radii))
    ]
    steps = [
        {**at, **c, "n_vectors": {"learned": 4}}
        for c in product({**A, "seeds": (51, 52)}, radius=[8.0, 16.0, 32.0], steps=[2, 6, 18])
    ]
    layers = [k * depth // 30 for k in (3, 7, 11, 15)]
    explorer = [
        {**at, **c, "n_vectors": {"learned": 4, "random": 2}, "coeffs": [-1.0, 1.0, 2.0]}
        for c in product({**A, "seeds": (61,)}, source_layer=layers, radius=check_radii(radii))
    ]
    return {"goldilocks": main, "steps": steps, "explorer": explorer}


def run_cell(model, part=None, **config) -> dict:
    """`cell` for a sweep's worker: the model by name, loaded once per process; `part` only labels."""
    return cell(sweeps.model(model), **config)


def run_cells(model, radius, part=None, **config) -> dict:
    """`run_cell` for a list of radii: {"results": one per radius}."""
    return {"results": cells_at(sweeps.model(model), radii=radius, **config)}


def _together(configs) -> list[dict]:
    """Configurations that differ in the radius alone, as one with a list of radii."""
    found = {}
    for config in configs:
        rest = {k: v for k, v in config.items() if k != "radius"}
        found.setdefault(json.dumps(rest, sort_keys=True), {**rest, "radius": []})["radius"].append(
            config["radius"]
        )
    return list(found.values())


def live(configs, lm, progress=True, **options) -> list:
    """The cells of a grid, computed here and now: [{"config", "result"}]; `options` as in `cell`."""
    return [
        {
            "config": c,
            "result": cell(
                lm, **{k: v for k, v in c.items() if k not in ("model", "part")}, **options
            ),
        }
        for c in tqdm(configs, desc="cells", leave=False, disable=not progress)
    ]


def compute(name, model=None, workers=2, folder=None, store=None, prompt_set="everyday") -> Path:
    """Run the sweep `name` of `grids` and write <name>.json: into data/explorer, or for another model or prompt set into the
    folder below build/ that `judging.folder_of` says; see `stored.compute`."""
    lm = load(model or DEFAULT)
    known = grids(lm.name, lm.n_layers, prompt_set=prompt_set)
    if name not in known:
        raise ValueError(f"There is no grid {name!r}: use one of {', '.join(known)}.")

    def unpack(config, done):
        return [
            {"config": {**config, "radius": radius}, "result": one}
            for radius, one in zip(config["radius"], done["results"])
        ]

    return stored.compute(
        name,
        lambda _: [(lm, _together(known[name]))],
        run_cells,
        workers,
        folder or folder_of(lm.name, prompt_set),
        store,
        unpack,
        options=f" --prompts {prompt_set}" if prompt_set != "everyday" else "",
    )


def check_layers(lm, source_layers, target_layer) -> None:
    """ValueError for source layers that are out of range, out of order, twice there, or not before the target."""
    layers = [resolve_layer(lm, k, "source_layer") for k in source_layers]
    target = resolve_layer(lm, target_layer, "target_layer")
    if not layers or layers != sorted(set(layers)) or layers[-1] >= target:
        raise ValueError(
            f"source layers {list(source_layers)} do not fit: use ascending ones below the target layer {target}."
        )
