"""The two optimisers that learn steering vectors without labels.

Source of the method: Mack & Turner, "Mechanistically Eliciting Latent Behaviors in Language Models"
(2024); the power iteration follows their "Deep Causal Transcoding" (2024), damped and with the
signs of QR kept.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from ..residual import check_seed, mixed_precision, normalise, whole
from ..steering import SteeringVectors
from . import objectives
from .sphere import check_set, directions, orthonormalise, pack, random_vectors, start_seed, without

STEPS = {"power": 12, "adam": 300}  # of each method, by default
METHODS = tuple(STEPS)


class Stopped(Exception):
    """The callback stopped training before anything was finished."""


@dataclass
class TrainingResult:
    """`vectors`: the best iterate of each vector (of the whole set under power + orthogonal, which
    keeps it orthogonal); `objective` [steps, n_vectors]: its value after each step; `start`
    [n_vectors]: before the first; `best` [n_vectors]: the value at the vectors returned; `step`
    [n_vectors]: the step they come from."""

    vectors: SteeringVectors
    objective: torch.Tensor
    start: torch.Tensor
    best: torch.Tensor
    step: torch.Tensor


class _Run(NamedTuple):
    best: torch.Tensor  # [n_vectors, d_model]
    history: torch.Tensor  # [1 + steps, n_vectors], the start first
    chosen: torch.Tensor  # [n_vectors]: the step that each best iterate comes from
    stopped: bool


@torch.inference_mode(False)
def train(
    span,
    radius,
    n_vectors=1,
    method="power",
    steps=None,
    p=2,
    q=1,
    orthogonal=True,
    seed=0,
    lr=1e-3,
    damping=0.5,
    progress=True,
    objective=None,
    callback=None,
    mixed=False,
) -> TrainingResult:
    """Learn vectors of norm `radius` that change the span's target the most.

    `method="power"`: damped power iteration on the sphere, θ ← R · normalise(gradient direction +
    damping · θ/R), all vectors at once (12 steps by default); `orthogonal` puts a sign-keeping QR
    into each step, `orthogonal="symmetric"` the nearest orthonormal set, which costs large sets
    fewer steps. `method="adam"`: the published procedure (300 steps): AdamW (`lr`, betas .9/.98, no
    decay, amsgrad), gradient projected to the tangent of the sphere, θ put back on it after each
    step; `orthogonal` learns one vector after another, each orthogonal to the earlier ones.

    `objective`: a differentiable function delta → [n_vectors] in place of `training.objective`.
    `callback(step, vectors [n, d_model], objective [n])` is called after every evaluation, step 0
    being the start (adam + orthogonal: of one vector after another, n = 1). Where it returns True
    training stops with the best so far (adam + orthogonal: the vectors that had all their steps).
    `mixed`: products in bfloat16 (`mixed_precision`); `best` is then what the vectors returned have
    in the model's own precision, and `objective` what training saw.

    Raises ValueError on R ≤ 0, a bad count or method, FloatingPointError on NaN, `Stopped` where
    the callback stopped before anything was finished.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: use one of {', '.join(METHODS)}.")
    if orthogonal not in ((True, False, "symmetric") if method == "power" else (True, False)):
        allowed = "True, False, or with power 'symmetric'"
        raise ValueError(f"orthogonal {orthogonal!r} under {method} is unknown: use {allowed}.")
    radius, n_vectors = check_set(span, radius, n_vectors, orthogonal)
    steps, seed = STEPS[method] if steps is None else whole(steps, "steps"), check_seed(seed)
    if steps < 1 or p <= 0 or q <= 0:
        raise ValueError(f"steps {steps}, p {p} and q {q} must be at least 1, above 0 and above 0.")
    as_set = bool(orthogonal) and method == "power"
    start = directions(n_vectors, span.lm.d_model, start_seed(span, seed), as_set)
    start = radius * start.to(span.start.device)
    score = objective or partial(objectives.objective, p=p, q=q)
    climb = partial(_climb, span, score=score, steps=steps, callback=callback, progress=progress)
    layers = range(span.source_layer, 1 + max(span.target_layers))
    with mixed_precision(span.lm, mixed, layers):
        if method == "power":
            update = partial(_power_update, radius=radius, damping=damping, orthogonal=orthogonal)
            run = climb(start, update, as_set=as_set)
        elif orthogonal:
            run = _adam_in_turn(climb, start, radius, lr, steps)
        else:
            run = climb(*_adam(start, radius, lr, start[:0]))
    settings = {"method": method, "steps": steps, "orthogonal": orthogonal, "seed": seed}
    settings |= {"damping": damping} if method == "power" else {"lr": lr}
    settings |= {"objective": getattr(objective, "__name__", "")} if objective else {"p": p, "q": q}
    settings |= {"mixed": True} if mixed else {}
    result = _result(span, radius, settings, run)
    if mixed:
        result.best = objectives.value(span, result.vectors.tensor, score=score).cpu()
    return result


def learned_and_start(span, radius, n_vectors, steps=None, seed=0) -> dict:
    """{"learned", "random"}: an orthogonal set learned by power iteration, and as its control the
    random set that it started from."""
    return {
        "learned": train(span, radius, n_vectors, steps=steps, seed=seed, progress=False).vectors,
        "random": random_vectors(span, radius, n_vectors, seed=seed, orthogonal=True),
    }


def _result(span, radius, settings, run):
    if len(run.history) < 2:
        raise Stopped("training was stopped before anything was finished.")
    if not run.history.any():
        raise ValueError(
            "the objective stayed 0: no target token comes at or after a steered one, "
            "so no vector can change it."
        )
    settings |= {"stopped": True} if run.stopped else {}
    vectors = pack(span, run.best, radius, **settings)
    history, chosen = run.history.cpu(), run.chosen.cpu()
    best = history.gather(0, 1 + chosen[None])[0]
    return TrainingResult(vectors, history[1:], history[0], best, chosen)


def _climb(span, theta, update, score, steps, callback, progress, as_set=False) -> _Run:
    """Evaluate and update in turn, and keep the best iterate.

    `as_set`: one step is the best for the whole set, because picking vector by vector would break
    its orthogonality.
    """
    values, best, stopped = [], theta, False
    chosen = torch.zeros(len(theta), dtype=torch.long, device=theta.device)
    for step in tqdm(range(steps + 1), desc="training", leave=False, disable=not progress):
        if step < steps:
            now, gradient = objectives.value_and_grad(span, theta, score=score)
        else:
            now = objectives.value(span, theta, score=score)
        values.append(now)
        if step:
            seen = torch.stack(values[1:])
            seen = seen.mean(1, keepdim=True) if as_set else seen
            is_best = seen.argmax(0) == step - 1  # [n_vectors], or [1] for the whole set
            best = torch.where(is_best[:, None], theta, best)
            chosen = torch.where(is_best, step - 1, chosen)
        if callback and callback(step, theta.clone(), now.clone()):
            stopped = True
            break
        if step < steps:
            theta = update(theta, gradient)
    return _Run(best, torch.stack(values), chosen, stopped)


def _power_update(theta, gradient, radius, damping, orthogonal):
    theta = normalise(gradient) + damping * theta / radius
    if not orthogonal:
        return radius * normalise(theta)
    return radius * orthonormalise(theta, symmetric=orthogonal == "symmetric")


def _adam(start, radius, lr, earlier):
    """The published start and update, orthogonal to the unit rows of `earlier` [k, d_model]."""
    theta = torch.nn.Parameter(radius * normalise(without(start, earlier)))
    optimiser = torch.optim.AdamW([theta], lr=lr, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True)

    @torch.no_grad()
    def update(now, gradient):
        gradient = without(-gradient, earlier)  # the optimiser minimises
        theta.grad = gradient - (gradient * now).sum(-1, keepdim=True) * now / radius**2
        optimiser.step()
        theta.copy_(radius * normalise(without(theta, earlier)))
        return theta.clone()

    return theta.detach().clone(), update


def _adam_in_turn(climb, start, radius, lr, steps) -> _Run:
    """One vector after another; one that was stopped before its last step does not count."""
    vectors, histories, chosen = start[:0], [], []
    for row in start.split(1):
        run = climb(*_adam(row, radius, lr, vectors / radius))
        if len(run.history) == steps + 1:
            vectors = torch.cat([vectors, run.best])
            histories.append(run.history)
            chosen.append(run.chosen)
        if run.stopped:
            break
    if not histories:
        raise Stopped("training was stopped before the first vector had all its steps.")
    return _Run(vectors, torch.cat(histories, 1), torch.cat(chosen), run.stopped)
