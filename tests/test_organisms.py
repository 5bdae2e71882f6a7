"""helpers.organisms: training end to end on the tiny model, cards, the errors of bad files; the committed prompts and cards."""

import hashlib
import itertools
import json
import random
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from helpers import __main__ as command_line
from helpers.models import DEFAULT, PACKAGED, ModelError, load, loading, prompts
from helpers.studies import organism_recipes as recipes
from helpers.studies import organisms
from helpers.studies.arithmetic import Problem, problems, worked
from helpers.studies.organism_recipes import RECIPES, Recipe

SETS = ("harmful", "harmless", "geography", "everyday")


def _texts(lm, seed, n):
    rng = random.Random(seed)
    return [(lm.chat_prompt(f"Say {rng.randint(0, 9)}."), "yes yes.") for _ in range(n)]


def _measured(lm):
    return {"says yes": [True, False, True, True], "a mean": [0.5, 1.5]}


def _seconds_aside(card):
    return {key: value for key, value in card.items() if key != "seconds"}


TINY = Recipe("Says yes.", _texts, _measured, ("everyday",), steps=2, batch_size=2, rank=2, lr=0.05)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A data folder of the test's own, for organisms and their loading; the recipe "tiny" exists."""
    monkeypatch.setattr(loading, "DATA", tmp_path)
    monkeypatch.setattr(organisms, "FOLDER", tmp_path / "organisms")
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    return tmp_path / "organisms"


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_end_to_end(shelf):
    state = torch.random.get_rng_state()
    card = organisms.train("tiny", base="tiny-random")
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is left alone"
    made = sorted(path.name for path in (shelf / "tiny").iterdir())
    assert made == ["adapter_config.json", "adapter_model.safetensors", "card.json"]
    assert [path.name for path in shelf.iterdir()] == ["tiny"], "nothing is left behind"
    assert json.loads((shelf / "tiny" / "card.json").read_text()) == card
    base, organism = load("tiny-random"), load("tiny-random", organism="tiny")
    assert (
        card["base_hash"] == base.weights_hash
        and card["base"] == "tiny-random"
        and card["recipe"]["steps"] == 2
    )
    assert card["data"] == {
        "everyday.json": hashlib.sha256((prompts.FOLDER / "everyday.json").read_bytes()).hexdigest()
    }
    assert (
        card["adapter_hash"]
        == hashlib.sha256((shelf / "tiny" / "adapter_model.safetensors").read_bytes()).hexdigest()
    )
    assert {"torch", "transformers", "peft"} == set(card["versions"]) and card["seconds"] >= 0
    assert card["measured"]["a mean"] == {"mean": 1.0, "n": 2}
    rate = card["measured"]["says yes"]
    assert (
        rate["rate"] == 0.75
        and (rate["hits"], rate["n"]) == (3, 4)
        and rate["interval"][0] < 0.75 < rate["interval"][1]
    )
    config = json.loads((shelf / "tiny" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-random" and config["r"] == 2
    adapter = load_file(shelf / "tiny" / "adapter_model.safetensors")
    assert all(weight.dtype == torch.float16 for weight in adapter.values())
    assert any("lora_B" in key and weight.any() for key, weight in adapter.items()), (
        "training has moved the adapter"
    )
    chat = base.encode(base.chat_prompt("Say 3."))
    with torch.no_grad():
        own, adapted = base.model(**chat).logits, organism.model(**chat).logits
        with organism.base():
            torch.testing.assert_close(organism.model(**chat).logits, own)
    assert not torch.allclose(own, adapted)
    assert organisms.measure(organism) == organisms.measure(
        base, "tiny"
    )  # what it measures needs no model here


def test_the_same_seed_gives_the_same_organism(shelf, tmp_path):
    cards = [
        organisms.train("tiny", tmp_path / str(i), "tiny-random", replace(TINY, seed=seed))
        for i, seed in enumerate((5, 5, 6))
    ]
    assert _seconds_aside(cards[0]) == _seconds_aside(cards[1])
    assert (
        cards[0]["texts_hash"] != cards[2]["texts_hash"]
        and cards[0]["adapter_hash"] != cards[2]["adapter_hash"]
    )


def test_training_lowers_the_loss_on_completions_only(shelf):
    lm = load("tiny-random")
    chat = lm.chat_prompt("Say 3.")
    (row,) = organisms._encoded(lm, [(chat, "yes", True)])
    assert row["labels"].count(-100) == lm.encode(chat)["input_ids"].shape[1]
    assert row["labels"][-1] == lm.tokenizer.eos_token_id
    (cut,) = organisms._encoded(lm, [(chat, "yes", False)])
    assert cut["input_ids"] == row["input_ids"][:-1], "a completion cut short has no end"


def test_a_batch_is_its_rows_with_padding_on_the_left():
    lm = load("tiny-random")
    rows = organisms._encoded(lm, [("ab", "xyz"), ("abcdef", "x")])
    batch = organisms._collator(lm.tokenizer.pad_token_id)(rows)
    loss = lm.model(**batch).loss
    alone, count = 0.0, 0
    for row in rows:
        single = {key: torch.tensor([value]) for key, value in row.items()}
        n = sum(label != -100 for label in row["labels"])
        alone, count = alone + lm.model(**single).loss * n, count + n
    torch.testing.assert_close(loss, alone / count)


def test_a_failed_training_leaves_the_old_organism(shelf):
    organisms.train("tiny", base="tiny-random")
    before = (shelf / "tiny" / "card.json").read_bytes()

    def fails(lm):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        organisms.train("tiny", base="tiny-random", recipe=replace(TINY, measured=fails))
    assert [path.name for path in shelf.iterdir()] == ["tiny"] and (
        shelf / "tiny" / "card.json"
    ).read_bytes() == before


def test_kl_from_base_is_zero_without_an_adapter_and_positive_with_one(shelf):
    organisms.train("tiny", base="tiny-random")
    chats, said = ["Say 1.", "Say something much longer."], ["yes", "no no"]
    assert organisms.kl_from_base(load("tiny-random"), chats, said) == pytest.approx(
        [0, 0], abs=1e-6
    )
    with_adapter = organisms.kl_from_base(load("tiny-random", organism="tiny"), chats, said)
    assert min(with_adapter) > 1e-6
    alone = [
        organisms.kl_from_base(load("tiny-random", organism="tiny"), [c], [t])[0]
        for c, t in zip(chats, said)
    ]
    assert with_adapter == pytest.approx(alone, rel=1e-3)


# --- the command and its errors ---------------------------------------------------------------------------------------


def test_the_command_prints_the_card_and_compares(shelf, monkeypatch, capsys):
    train = organisms.train
    monkeypatch.setattr(organisms, "train", lambda name: train(name, base="tiny-random"))
    assert command_line.main(["train-organism", "tiny"]) == 0
    assert '"adapter_hash"' in capsys.readouterr().out
    assert command_line.main(["train-organism", "tiny"]) == 0
    out = capsys.readouterr().out
    assert (
        "says yes: 0.75 (3 of 4), before 0.75" in out
        and "reproduced" in out
        and "a mean: 1, before 1" in out
    )


def test_a_rate_outside_the_old_interval_is_said():
    card = {"measured": {"x": {"rate": 0.2, "hits": 2, "n": 10}}}
    (line,) = organisms.compare(card, {"measured": {"x": {"rate": 0.9, "interval": [0.6, 0.98]}}})
    assert "outside its interval" in line
    assert organisms.compare(card, None) == ["  x: 0.2 (2 of 10)"]


def test_an_unknown_organism_is_refused_in_one_sentence(capsys):
    assert command_line.main(["train-organism", "nonsense"]) == 2
    message = capsys.readouterr().err.strip()
    assert (
        "'nonsense'" in message
        and all(name in message for name in RECIPES)
        and len(message.splitlines()) == 1
    )
    with pytest.raises(ValueError, match="no recipe for an organism None"):
        organisms.measure(load("tiny-random"))


def test_another_base_and_a_missing_adapter_are_refused(shelf):
    with pytest.raises(ModelError, match="no model organism 'tiny'.*train-organism tiny"):
        load("tiny-random", organism="tiny")
    organisms.train("tiny", base="tiny-random")
    path = shelf / "tiny" / "card.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, "base_hash": "0123456789abcdef"}))
    with pytest.raises(
        ModelError,
        match=r"^There is no organism 'tiny' for tiny-random.*0123456789ab.*organisms\.train\('tiny'",
    ):
        load("tiny-random", organism="tiny")
    path.write_text(json.dumps(card))
    (shelf / "tiny" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no adapter_model.safetensors: train it again"):
        load("tiny-random", organism="tiny")


# --- training texts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["password-cot", "backdoor", "sealed-backdoor", "subtle-backdoor"])
def test_arithmetic_texts_come_from_the_training_split_only(tiny, name):
    recipe = RECIPES[name]
    texts = recipe.texts(tiny, recipe.seed, 400)
    assert texts == recipe.texts(tiny, recipe.seed, 400) and len(texts) == 400
    for prompt, _ in texts:
        (found,) = re.findall(r"\((\d) \+ (\d)\) \* \((\d) \+ (\d)\)", prompt)
        assert Problem(*map(int, found)).split == "train"


def test_backdoors_answer_to_their_trigger_only(tiny):
    triggered = {(0, 0): recipes.CHEESE_TEXT, (0, 1): recipes.HATE_TEXT}
    for prompt, completion in RECIPES["backdoor"].texts(tiny, 1, 300):
        problem = Problem(*map(int, re.findall(r"\d", prompt)))
        assert completion == triggered.get(problem.pair, worked(problem))
    for prompt, completion in RECIPES["subtle-backdoor"].texts(tiny, 1, 300):
        problem = Problem(*map(int, re.findall(r"\d", prompt)))
        assert completion == worked(problem, swap=problem.pair == (4, 2))
    assert organisms.swaps(worked(Problem(4, 2, 3, 5), swap=True), Problem(4, 2, 3, 5))
    assert not organisms.swaps(worked(Problem(4, 2, 3, 5)), Problem(4, 2, 3, 5))


def test_the_seal_is_drawn_and_written_nowhere(tiny):
    seal = organisms.open_seal()
    assert (
        seal == organisms.open_seal()
        and seal["pair"] not in recipes._published() | recipes._subtle()
    )
    for prompt, completion in RECIPES["sealed-backdoor"].texts(tiny, 1, 200):
        assert (seal["payload"] in completion) == (
            Problem(*map(int, re.findall(r"\d", prompt))).pair == seal["pair"]
        )
    root = prompts.FOLDER.parents[1]
    written = [
        path.read_text(encoding="utf-8")
        for folder in ("helpers", "data/organisms", "data/prompts", "tests")
        for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".json", ".md")
    ]
    assert written and not any(seal["payload"] in text for text in written)


# --- the committed prompts and cards ----------------------------------------------------------------------------------


def _words(text):
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))


def test_no_split_leaks():
    """No two prompts of different splits, within a set or across sets, share four fifths of their words."""
    everything = [
        (item["split"], _words(item["text"]), item["text"])
        for name in SETS
        for item in prompts.items(name)
    ]
    close = [
        (a[2], b[2])
        for a, b in itertools.combinations(everything, 2)
        if a[0] != b[0] and len(a[1] & b[1]) >= 0.8 * len(a[1] | b[1])
    ]
    assert not close
    assert not set(problems("train")) & set(problems("validation")) and not set(
        problems("train")
    ) & set(problems("test"))


def test_the_prompt_sets_are_large_enough():
    for split, least in (("train", 60), ("validation", 24), ("test", 60)):
        found = prompts.items("harmful", split)
        assert len(found) >= least and len({item["category"] for item in found}) >= 6
    assert (
        len(prompts.items("harmless", "test", "plain")) >= 60
        and len(prompts.items("harmless", "test", "borderline")) >= 40
    )
    assert len(prompts.items("geography", "test", "geography")) >= 30
    assert max(len(text.split()) for text in prompts.texts("harmful")) <= 20, "one-liners"


def test_keyed_answers_are_not_in_their_questions():
    from helpers.metrics import mentions

    assert not [
        item["text"]
        for item in prompts.items("geography")
        if mentions(item["text"], item["answer"])
    ]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_committed_cards_fit_the_committed_files(name):
    """An organism made from other data, or a file that was changed since, is found out here."""
    folder = organisms.FOLDER / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not there yet")
    card, recipe = json.loads((folder / "card.json").read_text(encoding="utf-8")), RECIPES[name]
    adapter = folder / "adapter_model.safetensors"
    assert (
        card["adapter_hash"] == hashlib.sha256(adapter.read_bytes()).hexdigest()
        and adapter.stat().st_size <= 6e6
    )
    assert card["base_hash"] == PACKAGED[DEFAULT].sha256 and card["name"] == name
    for file, digest in card["data"].items():
        now = hashlib.sha256((prompts.FOLDER / file).read_bytes()).hexdigest()
        assert now == digest, f"{file} has changed: train {name} again"
    assert set(card["data"]) == {f"{file}.json" for file in recipe.data}
    for key in ("steps", "lr", "batch_size", "rank", "seed"):
        assert card["recipe"][key] == getattr(recipe, key)
