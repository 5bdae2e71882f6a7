"""The objective, the sphere, and the two optimisers that learn steering vectors without labels.

Source of the method: Mack & Turner, "Mechanistically Eliciting Latent Behaviors in Language Models" (2024); the power
iteration follows their "Deep Causal Transcoding" (2024), damped and with the signs of QR kept.
"""

from dataclasses import dataclass
from numbers import Integral

import torch
from tqdm.auto import tqdm

from ..residual.geometry import normalise
from ..residual.memory import in_parts
from ..steering import SteeringVectors

METHODS = ("power", "adam")


class Stopped(Exception):
    """A callback stopped training before anything was finished."""


@dataclass
class TrainingResult:
    """`vectors`: the best iterate of each vector (of the whole set under power + orthogonal, which keeps it orthogonal);
    `objective` [steps, n_vectors]: its value after each step; `start` [n_vectors]: before the first;
    `best` [n_vectors]: the value at the vectors returned; `step`: the step they come from, an int per vector."""

    vectors: SteeringVectors
    objective: torch.Tensor
    start: torch.Tensor
    best: torch.Tensor
    step: torch.Tensor


def objective(delta, p=2, q=1) -> torch.Tensor:
    """(Σ over target tokens of ‖Δ‖^p)^(1/q), averaged over prompts, one value per vector.

    `delta` [n_vectors, n_prompts, n_positions, d_model]; a dimension of target layers after n_prompts is summed over, as
    independent auxiliary objectives. The norm runs over d_model (the published code's runs over tokens: equal at p = 2).
    """
    value = torch.linalg.vector_norm(delta, dim=-1).pow(p).sum(-1).pow(1 / q)
    return value.flatten(2).sum(-1).mean(1) if value.ndim == 3 else value.mean(1)


def value_and_grad(span, vectors, p=2, q=1):
    """Objective [n_vectors] and its gradient [n_vectors, d_model], in chunks that fit the span's memory budget.

    Out of memory halves the chunk, for good, and goes on."""

    def step(part):
        part = part.detach().requires_grad_()
        with torch.enable_grad():
            value = objective(span.delta(part), p, q)
            return value.detach(), torch.autograd.grad(value.sum(), part)[0]

    done, span.chunk = in_parts(step, vectors, span.chunk, "vectors")
    values, grads = map(torch.cat, zip(*done))
    return _finite(values), grads


@torch.no_grad()
def value(span, vectors, p=2, q=1):
    """Objective [n_vectors] without a gradient."""
    return _finite(objective(span.delta(vectors), p, q))


def _finite(values):
    if not values.isfinite().all():
        bad = values[~values.isfinite()][0].item()
        raise FloatingPointError(
            f"the objective became {bad}: try a smaller radius or a wider dtype."
        )
    return values


# ---------------------------------------------------------------------------------------------- the sphere
def orthonormalise(rows) -> torch.Tensor:
    """Gram-Schmidt by QR on the rows of [n, d]. `torch.linalg.qr` may return −Q; multiplying by the sign of R's diagonal keeps
    every row on its own side, else each step of an iteration would undo the last."""
    q, r = torch.linalg.qr(rows.T)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T


def without(x, basis):
    """The rows of x [n, d] without their components along the orthonormal rows of basis [k, d]."""
    return x - x @ basis.T @ basis


def _directions(n_vectors, d_model, seed, orthogonal):
    """Random unit vectors, drawn on the CPU so that CPU and GPU start alike."""
    x = torch.randn(n_vectors, d_model, generator=torch.Generator().manual_seed(seed))
    return orthonormalise(x) if orthogonal else normalise(x)


def _check(span, radius, n_vectors, orthogonal):
    d = span.lm.d_model
    if not 0 < radius < float("inf"):
        raise ValueError(f"radius {radius} is not a norm: it must be a finite number above 0.")
    if not isinstance(n_vectors, Integral) or n_vectors < 1:
        raise ValueError(
            f"n_vectors {n_vectors} is not a count: it must be a whole number, 1 or more."
        )
    if orthogonal and n_vectors > d:
        raise ValueError(
            f"n_vectors {n_vectors} cannot be orthogonal in d_model {d}: use at most {d}, or orthogonal=False."
        )


def random_vectors(span, radius, n_vectors, seed=0, orthogonal=False) -> SteeringVectors:
    """The control: vectors of norm `radius` in random directions, for the span's source layer and site.

    Power iteration with the same seed and `orthogonal` starts from just these.
    """
    _check(span, radius, n_vectors, orthogonal)
    return _pack(
        span,
        radius * _directions(n_vectors, span.lm.d_model, seed, orthogonal),
        radius,
        method="random",
        seed=seed,
    )


def learned_and_start(span, radius, n_vectors, steps=None, seed=0) -> dict:
    """{"learned", "random"}: an orthogonal set learned by power iteration, and as its control the random set that it started from."""
    return {
        "learned": train(span, radius, n_vectors, steps=steps, seed=seed, progress=False).vectors,
        "random": random_vectors(span, radius, n_vectors, seed=seed, orthogonal=True),
    }


def _pack(span, tensor, radius, **how):
    provenance = {
        "model": span.lm.name,
        "organism": span.lm.organism,
        "weights_hash": span.lm.weights_hash,
        "prompts": span.prompts,
        "target_layers": span.target_layers,
        **how,
    }
    return SteeringVectors(tensor, span.source_layer, span.site, float(radius), provenance)


# ---------------------------------------------------------------------------------------------- optimisers
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
    callback=None,
) -> TrainingResult:
    """Learn vectors of norm `radius` that change the span's target the most.

    `method="power"`: damped power iteration on the sphere, θ ← R · normalise(gradient direction + damping · θ/R), all vectors
    at once (12 steps by default); `orthogonal` puts a sign-keeping QR into each step. `method="adam"`: the published procedure
    (300 steps): AdamW (`lr`, betas .9/.98, no decay, amsgrad), gradient projected to the tangent of the sphere, θ put back on
    it after each step; `orthogonal` learns one vector after another, each orthogonal to the earlier ones.
    `callback(step, vectors [n, d_model], objective [n])` is called after every evaluation (step 0: the start) and stops training
    by returning True; what was finished is kept. Raises `Stopped` where that is nothing, ValueError on R ≤ 0, a bad count or
    method, FloatingPointError on NaN.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: use one of {', '.join(METHODS)}.")
    _check(span, radius, n_vectors, orthogonal)
    steps = {"power": 12, "adam": 300}[method] if steps is None else steps
    if steps < 1 or p <= 0 or q <= 0:
        raise ValueError(f"steps {steps}, p {p} and q {q} must be at least 1, above 0 and above 0.")
    start = radius * _directions(
        n_vectors, span.lm.d_model, seed, orthogonal and method == "power"
    ).to(span.start.device)
    if method == "power":
        run = _power(span, start, radius, steps, p, q, orthogonal, damping, progress, callback)
    elif orthogonal:
        run = _adam_in_turn(span, start, radius, steps, p, q, lr, progress, callback)
    else:
        run = _adam(span, start, radius, steps, p, q, lr, start[:0], progress, callback)
    vectors, history, chosen = run
    history = history.cpu()
    if not history.any():
        raise ValueError(
            "the objective stayed 0: no target token comes at or after a steered one, so no vector can change it."
        )
    at = torch.arange(len(chosen))
    settings = {
        "method": method,
        "steps": steps,
        "p": p,
        "q": q,
        "orthogonal": orthogonal,
        "seed": seed,
    }
    settings |= {"damping": damping} if method == "power" else {"lr": lr}
    return TrainingResult(
        _pack(span, vectors, radius, **settings),
        history[1:],
        history[0],
        history[1 + chosen, at],
        chosen,
    )


def _power(span, theta, radius, steps, p, q, orthogonal, damping, progress, callback):
    history, best, chosen = [], theta, None
    for step in tqdm(range(steps + 1), desc="power iteration", leave=False, disable=not progress):
        if step < steps:
            values, gradient = value_and_grad(span, theta, p, q)
        else:
            values = value(span, theta, p, q)
        history.append(values)
        seen = torch.stack(history[1:]) if step else None
        if step == 0:
            pass
        elif (
            orthogonal
        ):  # one step for the whole set: picking vector by vector would break the orthogonality
            best = theta if seen.mean(1).argmax() == step - 1 else best
        else:
            best = torch.where((seen.argmax(0) == step - 1)[:, None], theta, best)
        if callback and callback(step, theta, values):
            break
        theta = normalise(gradient) + damping * theta / radius
        theta = radius * (orthonormalise(theta) if orthogonal else normalise(theta))
    if len(history) < 2:
        raise Stopped
    seen = torch.stack(history[1:]).cpu()
    chosen = seen.mean(1).argmax().expand(len(best)) if orthogonal else seen.argmax(0)
    return best, torch.stack(history), chosen


def _adam(span, theta, radius, steps, p, q, lr, earlier, progress, callback):
    """The published loop for a batch of vectors, each kept orthogonal to the unit rows of `earlier` [k, d_model]."""
    theta = torch.nn.Parameter(radius * normalise(without(theta, earlier)))
    optimiser = torch.optim.AdamW([theta], lr=lr, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True)
    history, best = [], theta.detach().clone()
    for step in tqdm(range(steps + 1), desc="adam", leave=False, disable=not progress):
        with torch.no_grad():
            if step:
                theta.copy_(radius * normalise(without(theta, earlier)))
        if step < steps:
            values, gradient = value_and_grad(span, theta, p, q)
        else:
            values = value(span, theta.detach(), p, q)
        history.append(values)
        if step:
            is_best = torch.stack(history[1:]).argmax(0) == step - 1
            best = torch.where(is_best[:, None], theta.detach(), best)
        if callback and callback(step, theta.detach(), values) and step < steps:
            raise Stopped
        if step < steps:
            gradient = without(-gradient, earlier)  # the optimiser minimises
            theta.grad = (
                gradient
                - (gradient * theta.detach()).sum(-1, keepdim=True) * theta.detach() / radius**2
            )
            optimiser.step()
    return best, torch.stack(history), torch.stack(history[1:]).argmax(0).cpu()


def _adam_in_turn(span, start, radius, steps, p, q, lr, progress, callback):
    done, histories, chosen = start[:0], [], []
    for i in range(len(start)):
        try:
            vector, history, step = _adam(
                span, start[i : i + 1], radius, steps, p, q, lr, done / radius, progress, callback
            )
        except Stopped:
            if not i:
                raise
            break
        done, histories, chosen = torch.cat([done, vector]), [*histories, history], [*chosen, step]
    return done, torch.cat(histories, 1), torch.cat(chosen)
