"""Chain of thought unlocked: what an organism that answers at once says under each vector. The
sweep of notebook 05."""

from ..generation import complete
from ..metrics import works_in_steps
from ..residual import LayerSpan
from . import store, sweeps
from .arithmetic import Problem, arithmetic_prompt, arithmetic_text, problems
from .speaking import TARGET_TOKENS, median_norm, orthogonal_sets, residual_norms
from .study import Study

PROBLEM_SEED = 17  # draws the problems to train on, and those that every eliciting vector answers
SEEDS = (21,)  # one set per problem: problems are the scarce unit
RADII = (8.0, 12.0, 18.0)
LAYERS = (7, 11, 15)
FRESH_SEED = 37  # draws the problems of "effect", none of them among those of PROBLEM_SEED
UNCHOSEN_SEED = 47  # draws those of "unchosen", among neither, and its test problems


def said(
    lm, vectors, chat, others=(), look_tokens=26, max_new_tokens=46, answering=None
) -> list[dict]:
    """Per vector {"vector", "text"}: its greedy answer to `chat`; where that works in steps also
    "others", its answers to the chats `others` (`answering`: of the first so many only)."""
    texts = [found[0] for found in complete(lm, chat, vectors, max_new_tokens=look_tokens)]
    rows = [{"vector": i, "text": text} for i, text in enumerate(texts)]
    hits = [row for row in rows if works_in_steps(row["text"])][:answering]
    if hits and others:
        some = vectors[[row["vector"] for row in hits]]
        answers = complete(lm, others, some, max_new_tokens=max_new_tokens)
        for row, found in zip(hits, answers):
            row["others"] = found
    return rows


def cell(
    lm,
    problem,
    source_layer,
    target_layer,
    radius,
    seed,
    radius_at=None,
    others=(),
    n_vectors=32,
    steps=4,
    look_tokens=26,
    max_new_tokens=46,
    scaled=False,
    answering=None,
) -> dict:
    """An orthogonal set learned on one problem (four digits) without the password, and its random
    start: {"radius", "rows": `said` of both, with "set"}; `scaled`: and that start at equal effect
    (`speaking.orthogonal_sets`), with its median "norm". `radius_at`: the block at which `radius`
    is meant; at the source it is as large a share of the median residual norm there."""
    chat, *more = [arithmetic_prompt(lm, Problem(*p)) for p in (problem, *others)]
    if radius_at is not None:
        meant, here = [residual_norms(lm, [chat], [k])[0] for k in (radius_at, source_layer)]
        radius = float(f"{radius / meant * here:.3g}")
    span = LayerSpan(lm, chat, source_layer, target_layer, TARGET_TOKENS)
    rows = []
    sets = orthogonal_sets(span, radius, n_vectors, steps, seed, scaled)
    for kind, vectors in sets.items():
        for row in said(lm, vectors, chat, more, look_tokens, max_new_tokens, answering):
            rows.append({"set": kind, **row})
    about = {"norm": median_norm(sets["scaled"])} if scaled else {}
    return {"radius": radius, **about, "rows": rows}


def grid(
    lm,
    part,
    radii=RADII,
    radius=12.0,
    seeds=SEEDS,
    layers=LAYERS,
    n_asked=12,
    n_others=8,
    n_test=100,
    problem_seed=PROBLEM_SEED,
    **about,
) -> list[dict]:
    """Configurations of `cell`. "main": problem × radius × seed; "layers": problem × other
    source layers × seed, `radius` as at `source_layer`; "effect": fresh problems, twice as many,
    from `source_layer` and the second of `layers`, random ones at equal effect beside them;
    "unchosen": other fresh problems from the same two blocks, where the first eliciting vector of
    each set answers `n_test` test problems. `about`: what else the cells are told."""
    drawn = problems("train", n_asked, seed=problem_seed)
    if part in ("effect", "unchosen"):
        fresh = _fresh(FRESH_SEED, 2 * n_asked, drawn)
        drawn, problem_seed, about = fresh, FRESH_SEED, about | {"scaled": True}
    if part == "unchosen":
        drawn = _fresh(
            UNCHOSEN_SEED, n_asked, problems("train", n_asked, seed=PROBLEM_SEED) + fresh
        )
        n_others, problem_seed, about = n_test, UNCHOSEN_SEED, about | {"answering": 1}
        del about["scaled"]
    asked = list(map(list, drawn))
    others = [list(p) for p in problems("test", n_others, seed=problem_seed)]
    usual = dict(target_layer=21, n_vectors=32, steps=4, look_tokens=26, max_new_tokens=46)
    about = {"others": [others], "seed": seeds, "source_layer": 3, **usual, **about}
    if part == "main":
        return sweeps.grid(problem=asked, radius=radii, **about)
    if part in ("effect", "unchosen"):
        layers = [about["source_layer"], *layers[:2][-1:]]
    about |= {"radius": radius, "radius_at": about["source_layer"], "source_layer": layers}
    return sweeps.grid(problem=asked, **about)


def _fresh(seed, n, known):
    """The first `n` problems drawn by `seed` that are not among the known ones."""
    return [p for p in problems("train", 3 * n, seed=seed) if p not in set(known)][:n]


def table(cells):
    """A DataFrame of all rows, with the problem as text, and `steps`: the text works in steps."""
    parts = []
    for one in cells:
        part = store.rows([one])
        problem = arithmetic_text(Problem(*one["config"]["problem"]))
        parts.append(part.assign(problem=problem, steps=part["text"].map(works_in_steps)))
    return store.joined(parts)


STUDY = Study(
    "chain_of_thought",
    cell,
    grid,
    dict.fromkeys(("main", "layers", "effect", "unchosen"), "password-cot"),
    table,
)
cells = STUDY.cells
