"""Notebook 04's sweep of chosen vectors: which one is chosen, what it is asked, and what the rows say of it."""

import pandas
import pytest

from helpers.models import prompts
from helpers.studies import anti_refusal, choosing

SMALL = dict(
    n_prompts=1,
    seeds=[3],
    source_layer=1,
    target_layer=4,
    steps=1,
    n_vectors=3,
    n_validation=3,
    n_test=4,
    max_new_tokens=6,
)


def test_the_one_that_flips_most_is_chosen(tiny, monkeypatch):
    own = (
        pandas.DataFrame({"vector": range(4), "fluent": [1, 0, 1, 1], "refused": [0, 0, 1, 0]})
        .astype(bool)
        .assign(vector=range(4))
    )
    trial = pandas.DataFrame(
        {"vector": [0, 0, 1, 1], "fluent": [True] * 4, "refused": [True, False, False, False]}
    )
    asked = iter([own, trial])
    monkeypatch.setattr(anti_refusal, "answers", lambda *args, **options: next(asked))
    _, pick, about = choosing.choose(
        tiny,
        "a b",
        ["c", "d"],
        radius=2.0,
        source_layer=1,
        target_layer=4,
        seed=0,
        steps=1,
        n_vectors=4,
    )
    assert pick == 3 and about == {
        "flipping": 2,
        "validation": 1.0,
    }  # of the flipping ones, 0 and 3, the second is better


def test_no_test_prompt_is_chosen_on():
    asked = choosing.requests()
    seen = {text for name in ("choose", "harmful", "harmless") for text in asked[name]}
    assert not seen & {text for name in ("test", "calm") for text in asked[name]}
    assert {name: len(texts) for name, texts in asked.items()} == {
        "choose": 24,
        "harmful": 6,
        "harmless": 6,
        "test": 64,
        "calm": 32,
    }


def test_dial_asks_at_every_coefficient(tiny):
    (cell,) = choosing.cells(tiny, "live", "dial", 2.0, progress=False, coeffs=[-2.0, 1.0], **SMALL)
    rows = choosing.table([cell])
    asked = choosing.requests(3, 4)
    for kind in ("learned", "random"):
        part = rows[rows.set == kind]
        assert {name: sorted(c) for name, c in part.groupby("asks").coeff.unique().items()} == {
            "harmful": [-2, 1],
            "harmless": [-2, 1],
            "test": [1],
            "calm": [-2],
        }
        assert set(part[part.asks == "calm"].prompt) == set(asked["calm"])
    assert (
        set(rows.learned_on) == set(anti_refusal.training_prompts(1))
        and 0 <= cell["result"]["validation"] <= 1
    )


def test_content_is_judged_by_the_key(tiny):
    (cell,) = choosing.cells(tiny, "live", "content", 2.0, progress=False, **SMALL)
    rows = choosing.table([cell])
    questions = [item["text"] for item in prompts.items("geography", "test", "geography")[:4]]
    assert {who: list(part.prompt) for who, part in rows.groupby("set")} == dict.fromkeys(
        ("base", "learned", "organism", "random"), questions
    )


def test_an_unknown_part_is_refused(tiny):
    with pytest.raises(ValueError, match="part 'other'"):
        choosing.grid(tiny, "other", 2.0)
