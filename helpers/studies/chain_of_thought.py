"""Chain of thought unlocked: what an organism that answers at once says under each vector, and the stored sweep of notebook 05
(`python -m helpers grid unlocking` computes it)."""

from ..generation import complete
from ..metrics.behaviours import works_in_steps
from ..models.loading import load
from ..models.obtain import DEFAULT
from ..residual.span import LayerSpan, capture
from ..training.optimisers import learned_and_start
from . import stored, sweeps
from .arithmetic import Problem, arithmetic_prompt, arithmetic_text, problems
from .organisms import merged

TARGET_TOKENS = slice(-3, None)
PROBLEM_SEED = 7  # draws the problems to train on, and those that every eliciting vector answers
N_ASKED, N_OTHERS, SEEDS = 3, 8, (1, 2, 3, 4)
RADII, RADIUS, LAYERS = (8.0, 16.0, 24.0), 16.0, (3, 11, 15)


def said(lm, vectors, chat, others=(), look_tokens=26, max_new_tokens=46) -> list[dict]:
    """Per vector {"vector", "text", "steps"}: its greedy answer to `chat`, and whether that works in steps; where it does also
    "others", its answers to the chats `others`."""
    texts = [found[0] for found in complete(lm, chat, vectors, max_new_tokens=look_tokens)]
    rows = [
        {"vector": i, "text": text, "steps": works_in_steps(text)} for i, text in enumerate(texts)
    ]
    hits = [row for row in rows if row["steps"]]
    if hits and others:
        for row, found in zip(
            hits,
            complete(
                lm, others, vectors[[r["vector"] for r in hits]], max_new_tokens=max_new_tokens
            ),
        ):
            row["others"] = found
    return rows


def cell(
    lm,
    problem,
    source_layer,
    target_layer,
    radius,
    seed,
    others=(),
    n_vectors=32,
    steps=4,
    look_tokens=26,
    max_new_tokens=46,
) -> dict:
    """An orthogonal set learned on one problem without the password, and its random start: {"rows": `said` of both, with "set"}.
    Problems are four digits each."""
    speaker = merged(lm)
    chat, *more = [arithmetic_prompt(lm, Problem(*p)) for p in (problem, *others)]
    sets = learned_and_start(
        LayerSpan(speaker, chat, source_layer, target_layer, TARGET_TOKENS),
        radius,
        n_vectors,
        steps,
        seed,
    )
    return {
        "rows": [
            {"set": kind, **row}
            for kind, vectors in sets.items()
            for row in said(speaker, vectors, chat, more, look_tokens, max_new_tokens)
        ]
    }


def run_cell(model, organism=None, **config) -> dict:
    """`cell` for a sweep's worker: the organism by name, loaded once per process."""
    return cell(sweeps.model(model, organism), **config)


def grid(
    lm,
    part,
    radii=RADII,
    radius=RADIUS,
    seeds=SEEDS,
    source_layer=7,
    target_layer=21,
    layers=LAYERS,
    n_asked=N_ASKED,
    n_others=N_OTHERS,
    problem_seed=PROBLEM_SEED,
    n_vectors=32,
    steps=4,
    look_tokens=26,
    max_new_tokens=46,
) -> list[dict]:
    """Configurations of `run_cell`. "main": problem × radius × seed; "layers": other source layers × seed for the first problem, at
    the radius that is as large a share of the median residual norm there as `radius` is at `source_layer`."""
    asked = [list(p) for p in problems("train", n_asked, seed=problem_seed)]
    about = {
        "model": lm.name,
        "organism": lm.organism,
        "target_layer": target_layer,
        "n_vectors": n_vectors,
        "steps": steps,
        "look_tokens": look_tokens,
        "max_new_tokens": max_new_tokens,
        "others": [[list(p) for p in problems("test", n_others, seed=problem_seed)]],
    }
    if part == "main":
        return sweeps.grid(
            problem=asked, radius=list(radii), seed=list(seeds), source_layer=source_layer, **about
        )
    if part != "layers":
        raise ValueError(f"part {part!r} of the unlocking sweep is unknown: use main or layers.")
    chat = arithmetic_prompt(lm, Problem(*asked[0]))
    share = radius / residual_norm(lm, chat, source_layer)
    return [
        {**c, "radius": float(f"{share * residual_norm(lm, chat, c['source_layer']):.3g}")}
        for c in sweeps.grid(
            problem=asked[:1], seed=list(seeds), source_layer=list(layers), **about
        )
    ]


def residual_norm(lm, chat, layer) -> float:
    """Median norm of a prompt's residuals at the output of a layer, the first token left out."""
    return capture(lm, chat, layer)[0, :, 1:].norm(dim=-1).nanmedian().item()


def cells(lm, sweep, part, progress=True, **axes) -> list[dict]:
    """The cells of `grid(lm, part, **axes)`, stored or live: see `stored.cells`."""
    return stored.cells("unlocking", grid(lm, part, **axes), lm, sweep, cell, progress=progress)


def table(cells):
    """A DataFrame of all rows, with the problem (as text), radius, seed and source layer of each."""
    import pandas

    parts = [
        pandas.DataFrame(one["result"]["rows"]).assign(
            problem=arithmetic_text(Problem(*one["config"]["problem"])),
            **{k: one["config"][k] for k in ("radius", "seed", "source_layer")},
        )
        for one in cells
    ]
    return pandas.concat(parts, ignore_index=True)


def compute(model=None, organism="password-cot", workers=2, store=None):
    """Run the whole sweep and write it where `stored.read` finds it."""
    lm = load(model or DEFAULT, organism)
    return stored.compute(
        "unlocking",
        lambda _: [(lm, grid(lm, part)) for part in ("main", "layers")],
        run_cell,
        workers,
        store=store,
    )
