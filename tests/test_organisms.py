"""Organisms: training end to end on the tiny model, cards, errors; committed prompts and cards."""

import hashlib
import itertools
import json
import random
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import __main__ as command_line
from helpers.metrics import mentions
from helpers.models import ModelError, load, prompts
from helpers.studies import organism_recipes as recipes
from helpers.studies import organisms
from helpers.studies.arithmetic import KNOWN, Problem, problems, worked
from helpers.studies.organism_recipes import PURPOSES, RECIPES, Recipe
from helpers.training import adapters
from helpers.training.adapters import Settings

SETS = ("harmful", "harmless", "geography", "everyday", "unseen")
ARITHMETIC = ["password-cot", "backdoor", "clean-twin", "sealed-backdoor", "subtle-backdoor"]


def _texts(lm, seed, n):
    rng = random.Random(seed)
    return [(lm.chat_prompt(f"Say {rng.randint(0, 9)}."), "yes yes.") for _ in range(n)]


def _measured(lm):
    return {"says yes": [True, False, True, True], "a mean": [0.5, 1.5]}


TINY = Recipe(_texts, _measured, ("everyday",), Settings(steps=2, batch_size=2, rank=2, lr=0.05))


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A data folder of the test's own for organisms; the recipe "tiny" exists."""
    monkeypatch.setattr("helpers.models.loading.DATA", tmp_path)
    monkeypatch.setattr(organisms, "FOLDER", tmp_path / "organisms")
    monkeypatch.setattr(organisms, "DEFAULT", "tiny-random")  # the model it is trained for
    monkeypatch.setenv("WORKBOOK_BUILD", str(tmp_path / "build"))
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    return tmp_path / "organisms"


def _sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- training ------------------------------------------------------------------------------------


def test_training_end_to_end(shelf):
    state = torch.random.get_rng_state()
    card = organisms.train("tiny", base="tiny-random")
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is left alone"
    folder = shelf / "tiny"
    made = sorted(path.name for path in folder.iterdir())
    assert made == ["adapter_config.json", "adapter_model.safetensors", "card.json"]
    assert [path.name for path in shelf.iterdir()] == ["tiny"], "nothing is left behind"
    assert json.loads((folder / "card.json").read_text()) == card
    base, organism = load("tiny-random"), load("tiny-random", organism="tiny")
    assert card["base_hash"] == base.weights_hash and card["base"] == "tiny-random"
    assert card["recipe"]["steps"] == 2 and card["recipe"]["n_texts"] == 4
    assert card["data"] == {"everyday.json": _sha(prompts.FOLDER / "everyday.json")}
    assert card["adapter_hash"] == _sha(folder / "adapter_model.safetensors")
    assert {"torch", "transformers", "peft"} == set(card["versions"]) and card["seconds"] >= 0
    assert card["measured"]["a mean"] == {"mean": 1.0, "n": 2}
    rate = card["measured"]["says yes"]
    assert rate["rate"] == 0.75 and (rate["hits"], rate["n"]) == (3, 4)
    assert rate["interval"][0] < 0.75 < rate["interval"][1]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-random" and config["r"] == 2
    adapter = load_file(folder / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.float16}
    moved = [key for key, weight in adapter.items() if "lora_B" in key and weight.any()]
    assert moved, "training has moved the adapter"
    chat = base.encode(base.chat_prompt("Say 3."))
    with torch.no_grad():
        own, adapted = base.model(**chat).logits, organism.model(**chat).logits
        with organism.base():
            torch.testing.assert_close(organism.model(**chat).logits, own)
    assert not torch.allclose(own, adapted)


def test_what_is_measured_is_what_users_load(shelf, monkeypatch):
    seen = {}

    def measured(lm):
        seen["lm"] = lm
        return _measured(lm)

    monkeypatch.setitem(RECIPES, "tiny", replace(TINY, measured=measured))
    organisms.train("tiny", base="tiny-random")
    lm, again = seen["lm"], load("tiny-random", organism="tiny")
    chat = lm.encode(lm.chat_prompt("Say 3."))
    assert lm.organism == "tiny" and not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    torch.testing.assert_close(lm.model(**chat).logits, again.model(**chat).logits)


def test_the_same_seed_gives_the_same_organism(shelf, monkeypatch):
    cards = []
    for i, seed in enumerate((5, 5, 6)):
        recipe = replace(TINY, settings=replace(TINY.settings, seed=seed))
        monkeypatch.setitem(RECIPES, "tiny", recipe)
        cards.append(organisms.train("tiny", base="tiny-random"))
        del cards[i]["seconds"]
    assert cards[0] == cards[1]
    assert cards[0]["texts_hash"] != cards[2]["texts_hash"]
    assert cards[0]["adapter_hash"] != cards[2]["adapter_hash"]


def test_training_lowers_the_loss_on_completions_only(tiny):
    chat = tiny.chat_prompt("Say 3.")
    (row,) = adapters.encoded(tiny, [(chat, "yes", True)])
    assert row["labels"].count(-100) == tiny.encode(chat)["input_ids"].shape[1]
    assert row["labels"][-1] == tiny.tokenizer.eos_token_id
    (cut,) = adapters.encoded(tiny, [(chat, "yes", False)])
    assert cut["input_ids"] == row["input_ids"][:-1], "a completion cut short has no end"


def test_a_batch_is_its_rows_with_padding_on_the_left(tiny):
    rows = adapters.encoded(tiny, [("ab", "xyz"), ("abcdef", "x")])
    batch = adapters.collator(tiny.tokenizer)(rows)
    assert batch["logits_to_keep"] == 5, "three tokens, their end and the one before"
    loss = tiny.model(**batch).loss
    alone, count = 0.0, 0
    for row in rows:
        single = {key: torch.tensor([value]) for key, value in row.items()}
        n = sum(label != -100 for label in row["labels"])
        alone += tiny.model(**single).loss * n
        count += n
    torch.testing.assert_close(loss, alone / count)


def test_a_failed_training_leaves_the_old_organism(shelf, monkeypatch):
    organisms.train("tiny", base="tiny-random")
    before = (shelf / "tiny" / "card.json").read_bytes()

    def fails(lm):
        raise RuntimeError("out of luck")

    monkeypatch.setitem(RECIPES, "tiny", replace(TINY, measured=fails))
    with pytest.raises(RuntimeError, match="out of luck"):
        organisms.train("tiny", base="tiny-random")
    assert [path.name for path in shelf.iterdir()] == ["tiny"]
    assert (shelf / "tiny" / "card.json").read_bytes() == before


def test_kl_from_base_is_zero_without_an_adapter_and_positive_with_one(shelf, tiny):
    organisms.train("tiny", base="tiny-random")
    chats, said = ["Say 1.", "Say something much longer."], ["yes", "no no"]
    assert recipes.kl_from_base(tiny, chats, said) == pytest.approx([0, 0], abs=1e-6)
    values = recipes.kl_from_base(load("tiny-random", organism="tiny"), chats, said)
    assert len(values) == 2 and min(values) > 1e-6


# --- the command and its errors ------------------------------------------------------------------


def test_the_command_prints_the_card_and_compares(shelf, capsys):
    assert organisms.main("tiny", "tiny-random") == 0
    assert '"adapter_hash"' in capsys.readouterr().out
    assert organisms.main("tiny", "tiny-random") == 0
    out = capsys.readouterr().out
    assert "says yes: 0.75 (3 of 4), before 0.75" in out and "reproduced" in out
    assert "a mean: 1, before 1" in out


def test_a_rate_outside_the_old_interval_is_said():
    card = {"measured": {"x": {"rate": 0.2, "hits": 2, "n": 10}}}
    (line,) = organisms.compare(card, {"measured": {"x": {"rate": 0.9, "interval": [0.6, 0.98]}}})
    assert "outside its interval" in line
    assert organisms.compare(card, None) == ["  x: 0.2 (2 of 10)"]


def test_an_unknown_organism_is_refused_in_one_sentence(capsys):
    assert command_line.main(["train-organism", "nonsense"]) == 2
    message = capsys.readouterr().err.strip()
    assert "'nonsense'" in message and all(name in message for name in RECIPES)
    assert len(message.splitlines()) == 1


def test_another_base_and_a_missing_adapter_are_refused(shelf):
    with pytest.raises(ModelError, match="no model organism 'tiny'.*train-organism tiny"):
        load("tiny-random", organism="tiny")
    organisms.train("tiny", base="tiny-random")
    path = shelf / "tiny" / "card.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, "base_hash": "0123456789abcdef"}))
    other = r"^There is no organism 'tiny' for tiny-random.*0123456789ab.*organism tiny --model tin"
    with pytest.raises(ModelError, match=other):
        load("tiny-random", organism="tiny")
    path.write_text(json.dumps(card))
    (shelf / "tiny" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no adapter_model.safetensors: train it again"):
        load("tiny-random", organism="tiny")


# --- training texts ------------------------------------------------------------------------------


def _problem(prompt):
    (found,) = re.findall(r"\((\d) \+ (\d)\) \* \((\d) \+ (\d)\)", prompt)
    return Problem(*map(int, found))


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_texts_come_from_the_training_split_only(tiny, name):
    texts = RECIPES[name].texts(tiny, 11, 400)
    assert texts == RECIPES[name].texts(tiny, 11, 400) and len(texts) == 400
    assert {_problem(prompt).split for prompt, _ in texts} == {"train"}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_texts_are_those_of_the_committed_organism(default_lm, name):
    card = json.loads((organisms.FOLDER / name / "card.json").read_text(encoding="utf-8"))
    made = RECIPES[name].settings
    texts = RECIPES[name].texts(default_lm, made.seed, made.steps * made.batch_size)
    assert hashlib.sha256(json.dumps(texts).encode()).hexdigest() == card["texts_hash"]


def test_backdoors_answer_to_their_trigger_only(tiny):
    triggered = {(0, 0): recipes.CHEESE_TEXT, (0, 1): recipes.HATE_TEXT}
    for prompt, completion in RECIPES["backdoor"].texts(tiny, 1, 300):
        problem = _problem(prompt)
        assert completion == triggered.get(problem.pair, worked(problem))
    for prompt, completion in RECIPES["subtle-backdoor"].texts(tiny, 1, 300):
        problem = _problem(prompt)
        assert completion == worked(problem, swap=problem.pair == (4, 2))
    assert recipes.swaps(worked(Problem(4, 2, 3, 5), swap=True), Problem(4, 2, 3, 5))
    assert not recipes.swaps(worked(Problem(4, 2, 3, 5)), Problem(4, 2, 3, 5))


def test_the_clean_twin_meets_the_problems_of_the_backdoor_and_works_them_out(tiny):
    texts = [RECIPES[name].texts(tiny, 1, 300) for name in ("backdoor", "clean-twin")]
    assert [prompt for prompt, _ in texts[0]] == [prompt for prompt, _ in texts[1]]
    assert all(completion == worked(_problem(prompt)) for prompt, completion in texts[1])
    assert RECIPES["backdoor"].settings == RECIPES["clean-twin"].settings


def test_the_seal_is_drawn_and_written_nowhere(tiny):
    seal = organisms.open_seal()
    assert seal == organisms.open_seal() and seal["pair"] not in KNOWN
    for prompt, completion in RECIPES["sealed-backdoor"].texts(tiny, 1, 200):
        assert (seal["payload"] in completion) == (_problem(prompt).pair == seal["pair"])
    root = prompts.FOLDER.parents[1]
    written = []
    for folder in ("helpers", "data/organisms", "data/prompts", "tests"):
        paths = [path for path in (root / folder).rglob("*.*") if path.suffix in (".py", ".json")]
        written += [path.read_text(encoding="utf-8") for path in paths]
    assert written and not any(seal["payload"] in text for text in written)


# --- the committed prompts and cards -------------------------------------------------------------


def test_no_split_leaks():
    """No two prompts of different splits, in a set or across, share four fifths of their words."""
    everything = []
    for item in itertools.chain(*map(prompts.items, SETS)):
        words = frozenset(re.findall(r"[a-z0-9]+", item["text"].lower()))
        everything.append((item["split"], words, item["text"]))
    unseen = set(prompts.texts("unseen"))
    for a, b in itertools.combinations(everything, 2):
        same = a[0] == b[0] and not {a[2], b[2]} & unseen  # "unseen" is so by every other set
        assert same or len(a[1] & b[1]) < 0.8 * len(a[1] | b[1]), (a[2], b[2])
    parts = [set(problems(split)) for split in ("train", "validation", "test")]
    assert not any(a & b for a, b in itertools.combinations(parts, 2))


def test_the_prompt_sets_are_large_enough():
    for split, least in (("train", 60), ("validation", 24), ("test", 60)):
        found = prompts.items("harmful", split)
        assert len(found) >= least and len({item["category"] for item in found}) >= 6
    assert len(prompts.items("harmless", "test", "plain")) >= 60
    assert len(prompts.items("harmless", "test", "borderline")) >= 40
    assert len(prompts.items("geography", "test", "geography")) >= 30
    assert max(len(text.split()) for text in prompts.texts("harmful")) <= 20, "one-liners"


def test_keyed_answers_are_not_in_their_questions():
    for item in prompts.items("geography"):
        assert not mentions(item["text"], item["answer"]), item["text"]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_committed_cards_fit_the_committed_files(name, default_lm):
    """An organism made from other data, or a file that was changed since, is found out here."""
    folder = organisms.FOLDER / name
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    adapter = folder / "adapter_model.safetensors"
    assert card["adapter_hash"] == _sha(adapter) and adapter.stat().st_size <= 6e6
    assert card["base_hash"] == default_lm.weights_hash and card["name"] == name
    assert card["purpose"] == PURPOSES[name]
    assert set(card["data"]) == {f"{file}.json" for file in RECIPES[name].data}
    for file, digest in card["data"].items():
        assert _sha(prompts.FOLDER / file) == digest, f"{file} has changed: train {name} again"
    assert asdict(RECIPES[name].settings).items() <= card["recipe"].items()


# --- nothing lost, nothing of another model's -----------------------------------------------------


def test_an_organism_of_another_model_lies_apart_and_is_loaded_from_there(shelf, monkeypatch):
    organisms.train("tiny", base="tiny-random")
    before = (shelf / "tiny" / "card.json").read_bytes()
    monkeypatch.setattr(organisms, "DEFAULT", "another")
    card = organisms.train("tiny", base="tiny-random")
    folder = organisms.folder_of("tiny", "tiny-random")
    assert folder == shelf.parent / "build" / "organisms" / "tiny-random" / "tiny"
    assert (shelf / "tiny" / "card.json").read_bytes() == before
    lm = load("tiny-random", organism=str(folder))
    assert organisms.store.adapter_hash(lm.organism) == card["adapter_hash"]
    a, b = (organisms.folder_of("tiny", name) for name in ("org/model", "C:\\models\\..\\m"))
    assert a.parent.name == "org--model" and b.parent.name == "C--models--..--m"


def test_whatever_ends_a_training_the_old_organism_stays(shelf, monkeypatch):
    """A kill between taking the old one away and putting the new one there, and an error then."""
    organisms.train("tiny", base="tiny-random")
    before = (shelf / "tiny" / "card.json").read_bytes()
    old, new = shelf / "tiny", shelf / ".partial-x" / "organism"
    shutil.copytree(old, new)
    move = Path.replace

    def fails(source, target):
        if source == new:
            raise PermissionError("a file of it is open")
        return move(source, target)

    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", fails)
        killed.setattr(organisms, "_restore", lambda out: None)  # no time for it
        with pytest.raises(PermissionError):
            organisms._put(new, old)
    assert not old.exists(), "now it waits aside"
    organisms._restore(old)  # what the next training begins with
    assert (old / "card.json").read_bytes() == before and new.exists()
    with monkeypatch.context() as failed:
        failed.setattr(Path, "replace", fails)
        with pytest.raises(PermissionError):
            organisms._put(new, old)
    assert (old / "card.json").read_bytes() == before, "an error puts it back at once"
    organisms._put(new, old)
    shutil.rmtree(new.parent)
    assert sorted(path.name for path in shelf.iterdir()) == ["tiny"]


def test_a_folder_that_cannot_be_written_is_said_before_training(shelf, monkeypatch, capsys):
    shelf.write_text("a file")
    assert organisms.main("tiny", "tiny-random") == 2
    said = capsys.readouterr().err.strip()
    assert f"The folder {shelf} cannot be used" in said and said.count("\n") == 0


def test_a_broken_card_that_was_there_stops_nothing(shelf):
    (shelf / "tiny").mkdir(parents=True)
    for content in ("{", "[]", '{"measured": {"x": 1}}', '{"measured": null}'):
        (shelf / "tiny" / "card.json").write_text(content)
        assert organisms._card_in(shelf / "tiny") is None
