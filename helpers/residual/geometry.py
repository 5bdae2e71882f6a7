"""What a push of norm R does to a normalised token: angles, a norm's parts, shares of the residual stream, the first token.

A `stream` is [n_layers + 1, n_prompts, n_tokens, d_model] in fp32: entry 0 goes into block 0, entry k + 1 comes out of block k
(`resid_post[k]`). Padding is NaN throughout.
"""

from contextlib import ExitStack

import torch

from .sites import forward_decoder, hidden_of, resolve_layer
from .span import capture

PARTS = ("centres", "shift", "gain", "epsilon")


# ---------------------------------------------------------------------------------------------- angles
def normalise(x):
    """Rows of unit norm."""
    return torch.nn.functional.normalize(x, dim=-1)


def degrees(a, b) -> torch.Tensor:
    """The angle between vectors along the last dimension, 0 … 180, exact for small angles too (arccos of a cosine is not)."""
    a, b = normalise(a), normalise(b)
    return 2 * torch.rad2deg(torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)))


def push_angle(ratio, cosine=0.0) -> torch.Tensor:
    """By how many degrees v turns when u is added: ratio ρ = ‖u‖ / ‖v‖, cosine between u and v (0: at right angles, arctan ρ)."""
    ratio, cosine = (
        torch.as_tensor(ratio, dtype=torch.float64),
        torch.as_tensor(cosine, dtype=torch.float64),
    )
    return torch.rad2deg(
        torch.atan2(ratio * (1 - cosine**2).clamp(min=0).sqrt(), 1 + ratio * cosine)
    )


def worst_angle(ratio) -> torch.Tensor:
    """The largest turn that any u of this ratio can cause: arcsin ρ up to ρ = 1, half a circle beyond."""
    ratio = torch.as_tensor(ratio, dtype=torch.float64)
    return torch.where(ratio <= 1, torch.rad2deg(torch.asin(ratio.clamp(max=1))), 180.0)


def check_radii(radii) -> list[float]:
    """The radii as floats; ValueError for an empty list and for what is not a finite number above 0."""
    radii = [float(r) for r in ([radii] if isinstance(radii, (int, float)) else radii)]
    if not radii:
        raise ValueError("radii is empty: give at least one number above 0.")
    for r in radii:
        if not 0 < r < float("inf"):
            raise ValueError(f"radius {r:g} is not a norm: it must be a finite number above 0.")
    return radii


# ---------------------------------------------------------------------------------------------- the model's own norms
def input_norm(lm, layer) -> torch.nn.Module:
    """The norm through which block `layer` reads the residual stream, found by what it is given, not by its name."""
    block, found = lm.blocks[resolve_layer(lm, layer)], []
    with torch.no_grad(), ExitStack() as stack:

        def start(module, args, kwargs):
            stack.entered = hidden_of(args, kwargs)

        def look(module, args, kwargs):
            given = args[0] if args else kwargs.get("hidden_states")
            if (
                torch.is_tensor(given)
                and given is stack.entered
                and getattr(module, "weight", torch.zeros(1, 1)).ndim == 1
            ):
                found.append(module)

        stack.callback(block.register_forward_pre_hook(start, with_kwargs=True).remove)
        for child in block.children():
            stack.callback(child.register_forward_pre_hook(look, with_kwargs=True).remove)
        ids = torch.arange(4, device=lm.device)[None]
        forward_decoder(lm, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    if not found:
        raise ValueError(
            f"{type(block).__name__} puts no norm between the residual stream and itself: choose another model."
        )
    return found[0]


@torch.no_grad()
def norm_parts(norm, d_model) -> dict:
    """What a norm consists of, asked by feeding it: `centres` (bool), `shift` β and `gain` γ [d_model], `epsilon`.

    Zero gives β; all ones give β again if the mean is taken away; ±1 in turn has mean 0 and mean square 1, so it gives γ.
    """
    weight = next(norm.parameters())
    run = lambda x: norm(x.to(weight.device, weight.dtype)[None])[0].float().cpu()  # noqa: E731
    ones, signs = torch.ones(d_model), 1.0 - 2.0 * (torch.arange(d_model) % 2)
    shift = run(0 * ones)
    gain = signs * (run(signs) - shift)
    at, tiny = gain.abs().argmax(), 1e-4  # so small that ε shows: output = γ·tiny / sqrt(tiny² + ε)
    small = (signs * (run(tiny * signs) - shift))[at]
    centres = bool((run(ones) - shift).norm() < 0.01 * gain.norm())
    return dict(zip(PARTS, (centres, shift, gain, float(tiny**2 * ((gain[at] / small) ** 2 - 1)))))


# ---------------------------------------------------------------------------------------------- real residuals
def stream(lm, prompts) -> torch.Tensor:
    """The whole residual stream of `prompts` (see the top of this module)."""
    return torch.cat([capture(lm, prompts, 0, site="resid_pre"), capture(lm, prompts)])


def token_masks(lm, prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, own), bool [n_prompts, n_tokens]: each prompt's first token; and the tokens after the opening that all share.

    No token sees a later one, so in the shared opening (a chat template's system line) all prompts are the same measurement.
    """
    mask = lm.encode(prompts)["attention_mask"].bool().cpu()
    rows = [ids[real].tolist() for ids, real in zip(lm.encode(prompts)["input_ids"].cpu(), mask)]
    short = min(range(len(rows)), key=lambda i: len(rows[i]))
    if len(rows[short]) < 2:
        raise ValueError(
            f"prompt {short} has 1 token: at least 2 are needed, because the first is an outlier and left out."
        )
    shared = 1
    while (
        len(rows) > 1 and shared < len(rows[short]) - 1 and len({row[shared] for row in rows}) == 1
    ):
        shared += 1
    place = mask.cumsum(1)  # 1 at the first token
    return mask & (place == 1), mask & (place > shared)


def per_prompt(values, mask) -> torch.Tensor:
    """Median over the tokens in `mask` [n_prompts, n_tokens] of values […, n_prompts, n_tokens] → […, n_prompts]."""
    return values.masked_fill(~mask, float("nan")).nanmedian(-1).values


def block_shares(stream) -> dict:
    """How much of the stream after each block is the block's own output u, v being what it was given: [n_layers, …] each.

    "length": ‖u‖ / (‖u‖ + ‖v‖); "projection": the part of v + u, along itself, that u brings; "cos²": between u and v + u.
    """
    v, new = stream[:-1], stream[1:]
    u, n = new - v, new.norm(dim=-1)
    along = (u * new).sum(-1)
    return {
        "length": u.norm(dim=-1) / (u.norm(dim=-1) + v.norm(dim=-1)),
        "projection": along / n**2,
        "cos²": (along / n / u.norm(dim=-1).clamp(min=1e-12)) ** 2,
    }


@torch.no_grad()
def turn(norm, residuals, vectors) -> torch.Tensor:
    """Degrees between norm(x) and norm(x + θ), [n_vectors, …]: residuals x […, d_model], vectors θ [n_vectors, d_model]."""
    clean = norm(residuals)
    return torch.stack([degrees(clean, norm(residuals + theta)) for theta in vectors.to(residuals)])


def turn_grid(lm, stream, own, radii, layers, n_vectors=8, seed=0) -> torch.Tensor:
    """`turn` by the norm of the next block for random vectors: [n_radii, n_layers, n_vectors, n_prompts, n_tokens], NaN where
    not `own`. `layers` name block outputs and may not hold the last one, after which no block reads."""
    radii, layers = check_radii(radii), [resolve_layer(lm, k) for k in layers]
    if not layers or layers[-1] > lm.n_layers - 2 or layers != sorted(set(layers)):
        raise ValueError(
            f"layers {layers} do not fit: use ascending ones from 0 … {lm.n_layers - 2}; after the last, no block reads."
        )
    unit = normalise(
        torch.randn(n_vectors, lm.d_model, generator=torch.Generator().manual_seed(seed))
    )
    norms = {k: input_norm(lm, k + 1) for k in layers}
    rows = [
        torch.stack([turn(norms[k], stream[k + 1].to(lm.device), r * unit) for k in layers])
        for r in radii
    ]
    return torch.stack(rows).float().cpu().masked_fill(~own, float("nan"))


def first_share(delta) -> torch.Tensor:
    """The first token's share of Σ‖Δ‖² for delta [n_vectors, n_prompts, n_tokens, d_model]: [n_vectors, n_prompts].

    The target positions must be all tokens of one prompt, or of prompts of the same length (padding would come first).
    """
    if delta.shape[2] < 2:
        raise ValueError("delta holds 1 token: at least 2 are needed, the first and the others.")
    size = delta.pow(2).sum(-1)
    return size[..., 0] / size.sum(-1)
