"""How large should R be? The sweep of notebook 03: radius, steps, prompts and seeds."""

from ..models import prompts
from ..residual import LayerSpan, check_radii
from ..training import jacobian
from . import speaking, store, sweeps
from .study import Study

# Prompts A (train) find the range, prompts B (test) confirm it; no earlier notebook used either.
# Prompts are the scarce unit: twelve of each, one set of vectors per prompt.
FRESH = range(8, 20)
PARTS = {  # {part: ((split, which of its prompts) …, seeds)}
    "A": ([("train", FRESH)], (81, 82, 83)),
    "B": ([("test", FRESH)], (91, 92, 93)),
    "minus": ([("test", FRESH)], (91, 92, 93)),
    "steps": ([("train", FRESH), ("test", FRESH)], (101, 102, 103)),
    "wide": ([], (121, 122, 123)),
    "fresh": ([], (141, 142, 143)),
    "layers": ([("train", FRESH)], (151, 152, 153)),
}
WIDE, N_WIDE = 40.0, 60  # R at which random vectors did best on A, and further plain requests
N_PLAIN = 36  # plain requests after those, beside the unseen prompts in "fresh"
OPPOSED = (8.0, 12.0, 16.0)  # the R at which vectors are also subtracted
STEPS = (2, 6, 18)
LAYERS = (1, 3, 5, 7, 9, 11, 13, 15)  # source layers on which the rule for R is tried …
N_LAYERS = 6  # … with as many prompts
NAMED = ((18, (8.0, 16.0)), (6, (16.0,)))  # steps and R that the claim about patience compares


def cell(lm, rule=False, **config) -> dict:
    """`speaking.cell`; with `rule` also, in each result, the R where the Jacobian ratio is ½
    ("calibrated"), and the median residual norm at the source ("residual_norm")."""
    found = speaking.cell(lm, **config)
    if rule:
        place = config["source_layer"], config["target_layer"]
        chat = lm.chat_prompt(config["prompt"])
        span = LayerSpan(lm, chat, *place, speaking.TARGET_TOKENS)
        radius = speaking.short(jacobian.calibrated_radius(span, seed=config["seed"]))
        (norm,) = speaking.residual_norms(lm, [chat], place[:1])
        about = {"calibrated": radius, "residual_norm": speaking.short(norm)}
        found["results"] = [{**about, **result} for result in found["results"]]
    return found


def grid(
    lm, part, radii=speaking.RADII, n_prompts=12, n_seeds=1, prompt_set="everyday"
) -> list[dict]:
    """Configurations of `speaking.cell`. "A" and "B": prompt × seed × radius with every control, on
    A with samples; "minus": B's learned vectors subtracted; "steps": prompts of both × seed ×
    radius × steps; "wide": N_WIDE other prompts × seed, random vectors of norm WIDE, since twelve
    prompts left their rate undecided; "fresh": prompts that no part before it asked, for what those
    left undecided: steps and radii NAMED, and at WIDE random vectors of both kinds; "layers": some
    of A's prompts × seed × LAYERS × radius, and the rule for R. Layers scale with depth."""
    splits, seeds = PARTS[part]
    asked = []
    for split, which in splits:
        asked += speaking.asked(prompt_set, split, which, n_prompts)
    if part == "wide":
        plain = prompts.texts("harmless", "train", "plain")
        asked = plain[: min(N_WIDE, 5 * n_prompts)]
    if part == "fresh":
        plain = prompts.texts("harmless", "train", "plain")[N_WIDE : N_WIDE + N_PLAIN]
        asked = [*prompts.texts("unseen"), *plain][: 5 * n_prompts]
    axes = {
        "prompt": asked,
        "seed": seeds[:n_seeds],
        "source_layer": 7 * lm.n_layers // 30,
        "target_layer": 21 * lm.n_layers // 30,
    }
    learned = {"learned": 8}
    if part == "layers":
        axes["prompt"] = asked[:N_LAYERS]
        axes["source_layer"] = sorted({k * lm.n_layers // 30 for k in LAYERS})
        some = [radius for radius in radii if radius > 2] or list(radii)
        return sweeps.grid(**axes, radius=check_radii(some), n_vectors={"learned": 6}, rule=True)
    if part == "steps":
        return sweeps.grid(**axes, steps=STEPS, radius=[8.0, 16.0, 32.0], n_vectors=learned)
    if part == "fresh":
        found = sweeps.grid(**axes, radius=WIDE, n_vectors={"random": 8, "covariance": 8})
        for steps, named in NAMED:
            found += sweeps.grid(**axes, steps=steps, radius=named, n_vectors=learned)
        return found
    if part == "wide":
        return sweeps.grid(**axes, radius=WIDE, n_vectors={"random": 8})
    if part == "minus":
        some = [radius for radius in OPPOSED if radius in radii] or list(radii)[:1]
        return sweeps.grid(**axes, radius=some, n_vectors=learned, coeffs=[[-1.0]])
    n_vectors = {**learned, "random": 8, "covariance": 4, "scaled": 4}
    if part == "A":
        axes["sampled"] = [["learned", "random"]]
    return sweeps.grid(**axes, radius=check_radii(radii), n_vectors=n_vectors)


STUDY = Study("goldilocks", cell, grid, dict.fromkeys(PARTS), store.table, together="radius")
cells = STUDY.cells
