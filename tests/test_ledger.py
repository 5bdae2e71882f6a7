"""Verdicts by committed thresholds, results kept only by default runs, and a table that is the same for the same results."""

import json
import os

import pytest

from helpers import ledger

CLAIM = {
    "id": "one",
    "claim": "It <b>works</b> | always",
    "source": "MELBO",
    "published": "7",
    "notebook": "02",
    "core": True,
    "thresholds": {"replicated": {"value": [">=", 10]}, "partly": {"value": [">=", 3]}},
    "last_verdict": "partly",
}
PAIR = {
    **CLAIM,
    "id": "pair",
    "notebook": "05",
    "core": False,
    "last_verdict": None,
    "note": "A note.",
    "thresholds": {
        "replicated": {"learned": [">=", 0.5], "random": ["<=", 0.2]},
        "partly": {"learned - random": [">=", 0.2]},
    },
}


@pytest.fixture
def claims(tmp_path, monkeypatch):
    """Two claims in a file of their own, results in tmp_path, and nothing recorded yet."""
    monkeypatch.setattr(ledger, "CLAIMS", tmp_path / "claims.json")
    monkeypatch.setattr(ledger, "_recorded", {})
    monkeypatch.setenv("WORKBOOK_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("WORKBOOK_NOTEBOOK", "02_training")
    monkeypatch.delenv("WORKBOOK_DEFAULT_RUN", raising=False)
    ledger.CLAIMS.write_text(json.dumps([CLAIM, PAIR]))
    return tmp_path / "build"


@pytest.fixture
def default(claims, monkeypatch):
    monkeypatch.setenv("WORKBOOK_DEFAULT_RUN", "1")
    return claims


@pytest.mark.parametrize(
    "value, expected", [(10, "replicated"), (9.99, "partly"), (3, "partly"), (2, "not replicated")]
)
def test_verdict_of_a_number(claims, value, expected):
    assert ledger.record("one", value) == expected


@pytest.mark.parametrize(
    "learned, random, expected",
    [
        (0.5, 0.2, "replicated"),
        (0.6, 0.3, "partly"),
        (0.4, 0.1, "partly"),
        (0.4, 0.3, "not replicated"),
    ],
)
def test_verdict_of_named_quantities(claims, learned, random, expected):
    assert ledger.record("pair", {"learned": learned, "random": random}) == expected


@pytest.mark.parametrize(
    "claim, value, message",
    [
        ("two", 1, "no claim 'two'; data/claims.json has one, pair"),
        ("one", float("nan"), "value is nan"),
        ("one", None, "value is None"),
        ("one", [1, 2], "finite number"),
        ("pair", {"learned": 1}, "need the quantity 'random'"),
    ],
)
def test_mistakes(claims, claim, value, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        ledger.record(claim, value)
    assert not claims.exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"core": None}, None),
        ({"last_verdict": "great"}, "unknown last_verdict, 'great'"),
        ({"id": "pair"}, "two claims"),
    ],
)
def test_a_bad_claims_file(claims, change, message):
    entry = {**CLAIM, **change}
    if message is None:
        del entry["core"]
        message = "claim 'one' lacks core"
    ledger.CLAIMS.write_text(json.dumps([entry, PAIR]))
    with pytest.raises(ValueError, match=message):
        ledger.claims()


def test_only_a_default_run_keeps_results(claims, monkeypatch, capsys):
    ledger.record("one", 2)  # below its last verdict, and no complaint
    assert not claims.exists() and "not a default run" in capsys.readouterr().out
    monkeypatch.setenv("WORKBOOK_DEFAULT_RUN", "1")
    torch = pytest.importorskip("torch")
    ledger.record(
        "one",
        torch.tensor(12.5),
        interval=(torch.tensor(11.0), 14),
        model="tiny",
        seeds=range(2),
        prompts=["a"],
    )
    (path,) = claims.glob("claims/02_training/*")
    saved = json.loads(path.read_text())
    assert (
        path.name == "one.json"
        and saved["values"] == {"value": 12.5}
        and saved["interval"] == [11.0, 14]
    )
    assert saved["facts"]["model"] == "tiny" and saved["facts"]["prompts"] == ["a"]
    assert capsys.readouterr().out == "one: 12.5 [11, 14] → replicated\n"


def test_a_core_claim_may_not_fall(default):
    ledger.record("one", 4)
    with pytest.raises(
        AssertionError, match="Core claim 'one' was partly and is now not replicated: 1."
    ):
        ledger.record("one", 1)
    assert (
        ledger.entries(build=default)[0]["verdict"] == "not replicated"
    )  # the ledger still tells the truth
    ledger.record("pair", {"learned": 0, "random": 0})  # not core


def test_check_guards_prose(claims, monkeypatch, capsys):
    ledger.check(True, "It rises.")
    ledger.check(False, "It falls.")
    assert capsys.readouterr().out == "✓ It rises.\ndiffers here: It falls.\n"
    monkeypatch.setenv("WORKBOOK_DEFAULT_RUN", "1")
    with pytest.raises(AssertionError, match="^It falls.$"):
        ledger.check(False, "It falls.")


def test_table_of_a_notebook_in_a_run_of_ones_own(claims):
    ledger.record("one", 11, interval=(9, 12))
    table = ledger.table("02")
    assert list(table.columns) == ["claim", "published", "ours", "verdict"] and list(
        table.ours
    ) == ["11 [9, 12]"]
    shown = table._repr_html_()
    assert "It &lt;b&gt;works&lt;/b&gt; | always" in shown and "<b>" not in shown
    assert list(ledger.table().verdict) == ["replicated", "not attempted"]
    assert list(ledger.table("05_chain").verdict) == [
        "replicated",
        "not attempted",
    ]  # recorded here, and its own


def test_write(default, monkeypatch):
    ledger.record(
        "pair", {"learned": 0.6, "random": 0.1}, {"learned": (0.5, 0.7)}, model="stand-in"
    )
    rows = ledger.write()
    first = [(default / name).read_bytes() for name in ("ledger.json", "ledger.md")]
    document = json.loads(first[0])
    assert (
        [row["verdict"] for row in document["claims"]]
        == ["not attempted", "replicated"]
        == [row["verdict"] for row in rows]
    )
    needed = {"id", "claim", "source", "published", "ours", "interval", "core", "verdict", "why"}
    assert all(needed <= set(row) for row in document["claims"])
    assert document["meta"]["counts"]["replicated"] == 1 and document["meta"]["models"] == [
        "stand-in"
    ]
    assert document["claims"][1]["ours"] == "learned 0.6 [0.5, 0.7], random 0.1"
    assert document["claims"][1]["why"].startswith(
        "In stand-in: replicated if learned ≥ 0.5 and random ≤ 0.2; partly if"
    )
    line = first[1].decode().splitlines()[-2]
    assert line.startswith("| It <b>works</b> \\| always (core) | MELBO | 7 | – | not attempted |")
    ledger.write()
    assert first == [(default / name).read_bytes() for name in ("ledger.json", "ledger.md")]
    monkeypatch.setenv(
        "WORKBOOK_NOTEBOOK", "05_chain"
    )  # the same claim in a later notebook: that one counts
    ledger.record("pair", {"learned": 0.1, "random": 0.1})
    assert ledger.write()[1]["verdict"] == "not replicated"
    text = ledger.terminal_table(ledger.write())
    assert (
        "not replicated" in text and "1 others" in text and max(map(len, text.splitlines())) <= 100
    )


def test_not_attempted_says_why(claims, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    reasons = [row["why"] for row in ledger.entries()]
    assert reasons == ["Notebook 02 is not written yet.", "Notebook 05 is not written yet. A note."]
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "02_training.ipynb").touch()
    assert (
        ledger.entries()[0]["why"]
        == "Notebook 02 has no result in this build; the last verdict was partly."
    )


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    ledger.write_atomically(path, "old")

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        ledger.write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_committed_claims():
    claims = ledger.claims()
    assert {
        "learned-not-absorbed",
        "objective-over-random",
        "different-starts",
        "orthogonal-diversity",
        "minus-theta-opposite",
        "change-is-inversion",
        "loss-is-not-behaviour",
    } <= set(claims)
    assert {claim["notebook"] for claim in claims.values() if claim["core"]} == {
        "03",
        "04",
        "05",
        "06",
    }
    for claim in claims.values():
        assert set(claim["thresholds"]) == {"replicated", "partly"}
        for limits in claim["thresholds"].values():
            assert limits and all(
                sign in ledger.OPERATORS and isinstance(limit, (int, float))
                for sign, limit in limits.values()
            )


def test_the_readme_keeps_a_row_until_there_is_a_new_result(default):
    text = "\n".join(["# Title", *ledger.MARKS, "After."])
    ledger.record("pair", {"learned": 0.6, "random": 0.1})
    first = ledger.into_readme(text)
    assert first.startswith("# Title\n") and first.endswith("\nAfter.") and "learned 0.6" in first
    assert first.index("**It <b>works</b> \\| always**") < first.index("learned 0.6"), (
        "core claims come first"
    )
    assert "| 7 | – | not attempted |" in first
    (default / "claims" / "02_training" / "pair.json").unlink()
    ledger.record("one", 12)
    second = ledger.into_readme(first)
    assert (
        "learned 0.6" in second
        and "| 7 | 12 | replicated |" in second
        and second == ledger.into_readme(second)
    )
    with pytest.raises(ValueError, match="no table of results"):
        ledger.into_readme("# Title")
