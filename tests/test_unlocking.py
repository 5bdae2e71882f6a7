"""Notebook 05's sweep: its grid, its cells, and the table of what each vector said."""

import pytest

from helpers.generation import complete
from helpers.residual import LayerSpan
from helpers.studies import chain_of_thought
from helpers.studies.arithmetic import Problem, arithmetic_prompt, arithmetic_text, problems
from helpers.training import learned_and_start

SMALL = dict(
    seeds=[1, 2],
    source_layer=1,
    target_layer=4,
    n_vectors=3,
    steps=1,
    n_others=2,
    look_tokens=6,
    max_new_tokens=6,
)
STEPS = "First, 3 + 4 = 7. Then 1 + 1 = 2."


def test_the_grid_crosses_problems_radii_and_seeds(tiny):
    found = chain_of_thought.grid(tiny, "main", radii=[2.0, 4.0], n_asked=2, **SMALL)
    assert len(found) == 2 * 2 * 2 and len({str(c) for c in found}) == 8
    asked = {tuple(c["problem"]) for c in found}
    others = {tuple(p) for c in found for p in c["others"]}
    assert (
        asked == set(problems("train", 2, seed=chain_of_thought.PROBLEM_SEED))
        and not asked & others
    )
    with pytest.raises(ValueError, match="part 'other'"):
        chain_of_thought.grid(tiny, "other")


def test_other_layers_get_as_large_a_share_of_their_residual(tiny):
    found = chain_of_thought.grid(tiny, "layers", radius=2.0, layers=[0, 2], **SMALL)
    chat = arithmetic_prompt(tiny, Problem(*found[0]["problem"]))
    share = 2.0 / chain_of_thought.residual_norm(tiny, chat, 1)
    assert [c["source_layer"] for c in found] == [0, 2, 0, 2]
    for c in found:
        assert c["radius"] == pytest.approx(
            share * chain_of_thought.residual_norm(tiny, chat, c["source_layer"]), rel=0.01
        )


def test_a_cell_says_what_its_vectors_say(tiny):
    (config, *_) = chain_of_thought.grid(tiny, "main", radii=[2.0], n_asked=1, **SMALL)
    (one, *_) = chain_of_thought.cells(
        tiny, "live", "main", progress=False, radii=[2.0], n_asked=1, **SMALL
    )
    assert one["config"] == config
    chat = arithmetic_prompt(tiny, Problem(*config["problem"]))
    sets = learned_and_start(
        LayerSpan(tiny, chat, 1, 4, chain_of_thought.TARGET_TOKENS), 2.0, 3, 1, 1
    )
    for kind, vectors in sets.items():
        said = [t[0] for t in complete(tiny, chat, vectors, max_new_tokens=6)]
        assert [r["text"] for r in one["result"]["rows"] if r["set"] == kind] == said
    table = chain_of_thought.table([one])
    assert (
        len(table) == 6
        and table.problem.iloc[0] == arithmetic_text(Problem(*config["problem"]))
        and set(table.radius) == {2.0}
    )


def test_only_vectors_that_elicit_answer_the_other_problems(tiny, monkeypatch):
    said = iter([[[STEPS], ["The answer is 14."]], [["a", "b"]]])
    asked = []
    monkeypatch.setattr(
        chain_of_thought,
        "complete",
        lambda lm, chats, vectors, **options: asked.append(len(vectors)) or next(said),
    )
    vectors = learned_and_start(LayerSpan(tiny, "1 + 1", 1, 4), 2.0, 2, 1)["random"]
    found = chain_of_thought.said(tiny, vectors, "x", ["y", "z"])
    assert asked == [2, 1] and [r["steps"] for r in found] == [True, False]
    assert found[0]["others"] == ["a", "b"] and "others" not in found[1]
