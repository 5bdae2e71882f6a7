"""helpers.prompts: the committed sets are sound, and a set that is not is refused by name."""

import json
from collections import Counter

import pytest

from helpers.models import prompts


def test_every_committed_set_is_valid():
    assert {"everyday", "reference_texts", "distance_check"} <= set(prompts.names())
    for name in prompts.names():
        assert prompts.items(name)


def test_everyday_has_eight_per_split_and_every_category_in_each():
    everyday = prompts.items("everyday")
    assert Counter(item["split"] for item in everyday) == {"train": 8, "validation": 8, "test": 8}
    categories = {item["category"] for item in everyday}
    assert len(categories) == 6
    for split in prompts.SPLITS:
        assert {item["category"] for item in prompts.items("everyday", split=split)} == categories


def test_no_prompt_was_used_to_explore():
    assert not any("bake bread" in text.lower() for text in prompts.texts("everyday"))


def test_distance_check_differs_in_what_it_should_and_not_in_length():
    for item in prompts.items("distance_check"):
        answers = [item[field] for field in ("original", "paraphrase", "persona", "unrelated")]
        assert len(set(answers)) == 4
        assert all(25 <= len(answer.split()) <= 45 for answer in answers), item["id"]


def test_selection():
    train = prompts.texts("everyday", split="train")
    assert len(train) == 8 and prompts.texts("everyday", split="train", n=3) == train[:3]
    assert all(item["category"] == "list" for item in prompts.items("everyday", category="list"))
    assert not set(train) & set(prompts.texts("everyday", split="test"))


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda: prompts.texts("nothing"), "'nothing'.*everyday"),
        (lambda: prompts.texts("everyday", split="dev"), "'dev'.*test, train, validation"),
        (lambda: prompts.texts("everyday", category="poem"), "'poem'.*story"),
        (lambda: prompts.texts("everyday", split="test", n=9), "n is 9.*1 … 8"),
        (lambda: prompts.texts("everyday", n=0), "n is 0"),
        (lambda: prompts.texts("reference_texts", split="test"), "split 'test'"),
        (lambda: prompts.texts("distance_check"), "no single text"),
    ],
)
def test_selection_that_does_not_exist(call, expected):
    with pytest.raises(ValueError, match=expected):
        call()


def item(**changes):
    return {"id": "a", "text": "Hello?", "category": "greeting", "split": "train", **changes}


@pytest.mark.parametrize(
    "content, expected",
    [
        ("{", "not JSON"),
        ([], "'description'"),
        ({"description": "d", "items": [item()]}, "'source'"),
        ({"description": "d", "source": "s", "items": []}, "'items'"),
        ({"description": "d", "source": "s", "items": ["text"]}, "item 0.*'id'"),
        ([item(id=7)], "item 0.*'id' is 7"),
        ([item(text="  ")], "item 0.*'text'"),
        ([{"id": "a", "text": "Hello?", "split": "train"}], "item 0.*'category' is None"),
        ([item(split="dev")], "item 0.*'split' is 'dev'"),
        ([item(), item(text="Bye?")], "item 1.*'id' is the same as that of item 0"),
        (
            [item(), item(id="b", text="hello?  ", split="test")],
            "item 1.*'text' is the same as that of item 0",
        ),
    ],
)
def test_malformed_set_is_refused(tmp_path, monkeypatch, content, expected):
    monkeypatch.setattr(prompts, "FOLDER", tmp_path)
    if isinstance(content, list) and content:
        content = {"description": "d", "source": "s", "items": content}
    (tmp_path / "mine.json").write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
    )
    with pytest.raises(ValueError, match=f"mine.json.*{expected}") as caught:
        prompts.items("mine")
    assert "\n" not in str(caught.value)


def test_well_formed_set_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "FOLDER", tmp_path)
    content = {
        "description": "d",
        "source": "s",
        "items": [item(), item(id="b", text="Bye?", answer="bye")],
    }
    (tmp_path / "mine.json").write_text(json.dumps(content), encoding="utf-8")
    assert prompts.names() == ["mine"] and prompts.texts("mine") == ["Hello?", "Bye?"]
    assert prompts.items("mine")[1]["answer"] == "bye"
