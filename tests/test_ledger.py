"""Verdicts by committed thresholds, results that only default runs keep, and tables of both."""

import json
import os

import numpy as np
import pytest
from IPython.display import HTML

from helpers import UserError, ledger

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
    "claim, value, expected",
    [
        ("one", 10, "replicated"),
        ("one", 9.99, "partly"),
        ("one", 3, "partly"),
        ("one", 2, "not replicated"),
        ("pair", {"learned": 0.5, "random": 0.2}, "replicated"),
        ("pair", {"learned": 0.6, "random": 0.3}, "partly"),
        ("pair", {"learned": 0.4, "random": 0.1}, "partly"),
        ("pair", {"learned": 0.4, "random": 0.3}, "not replicated"),
    ],
)
def test_verdicts(claims, capsys, claim, value, expected):
    assert ledger.record(claim, value) is None
    assert f" → {expected} (not a default run" in capsys.readouterr().out
    assert {row["id"]: row["verdict"] for row in ledger.entries()}[claim] == expected


@pytest.mark.parametrize(
    "claim, value, message",
    [
        ("two", 1, "no claim 'two'; data/claims.json has one, pair"),
        ("one", None, "value is None"),
        ("one", [1, 2], "finite number"),
        ("pair", {"learned": 1}, "need the quantity 'random'"),
    ],
)
def test_mistakes(claims, claim, value, message):
    with pytest.raises(ValueError, match=message):
        ledger.record(claim, value)
    assert not claims.exists()


def test_what_is_no_number_fails_a_default_run_and_is_said_in_others(claims, monkeypatch, capsys):
    """Kind 16: parameters of one's own may leave nothing to measure, or a single unit."""
    ledger.record("one", float("nan"))
    ledger.record("pair", {"learned": 0.6, "random": 0.1}, {"learned": (np.nan, np.nan)})
    said = capsys.readouterr().out
    assert "one: value is nan, so there is no verdict" in said
    assert "pair: learned 0.6, random 0.1 → replicated" in said
    monkeypatch.setenv("WORKBOOK_DEFAULT_RUN", "1")
    with pytest.raises(ValueError, match="value is nan, not a finite number"):
        ledger.record("one", float("nan"))
    assert not claims.exists()


@pytest.mark.parametrize(
    "text, message",
    [
        (json.dumps([CLAIM, CLAIM]), "the key 'one' stands twice"),
        (json.dumps([CLAIM])[:-2] + ', "core": false}]', "the key 'core' stands twice"),
        ("[", "is broken"),
    ],
)
def test_a_key_that_stands_twice_in_the_claims_is_an_error(claims, text, message):
    """Kind 11: of two, the last would win."""
    ledger.CLAIMS.write_text(text)
    with pytest.raises(UserError, match=message):
        ledger.claims()


def test_the_table_names_the_file_that_was_written(claims, tmp_path):
    """Kind 31: wherever the build is."""
    rows = ledger.write()
    assert str(claims / "ledger.md") in ledger.terminal_table(rows)
    assert str(tmp_path / "ledger.md") in ledger.terminal_table(rows, tmp_path)


def test_only_a_default_run_keeps_results(claims, monkeypatch, capsys):
    ledger.record("one", 2)  # below its last verdict, and no complaint
    assert not claims.exists() and "not a default run" in capsys.readouterr().out
    monkeypatch.setenv("WORKBOOK_DEFAULT_RUN", "1")
    torch = pytest.importorskip("torch")
    interval = (torch.tensor(11.0), 14)
    ledger.record("one", torch.tensor(12.5), interval, model="tiny", seeds=range(2), prompts=["a"])
    (path,) = claims.glob("claims/02_training/*")
    saved = json.loads(path.read_text())
    assert path.name == "one.json"
    assert saved["values"] == {"value": 12.5} and saved["interval"] == [11.0, 14]
    assert saved["facts"]["model"] == "tiny" and saved["facts"]["prompts"] == ["a"]
    assert capsys.readouterr().out == "one: 12.5 [11, 14] → replicated\n"


def test_a_core_claim_may_not_fall(default):
    ledger.record("one", 4)
    was = "Core claim 'one' was partly and is now not replicated: 1."
    with pytest.raises(AssertionError, match=was):
        ledger.record("one", 1)
    (row, _) = ledger.entries(build=default)
    assert row["verdict"] == "not replicated", "the ledger still tells the truth"
    ledger.record("pair", {"learned": 0, "random": 0})  # not core


def test_check_guards_prose(claims, monkeypatch, capsys):
    ledger.check(True, "It rises.")
    ledger.check(False, "It falls.")
    assert capsys.readouterr().out == "✓ It rises.\ndiffers here: It falls.\n"
    monkeypatch.setenv("WORKBOOK_DEFAULT_RUN", "1")
    with pytest.raises(AssertionError, match="^It falls.$"):
        ledger.check(False, "It falls.")


def test_html_table_escapes_all_but_html():
    rows = [("<script>", 2), (HTML("<i>nothing</i>"), 3)]
    shown = ledger.html_table(["a & b", "n"], rows, lambda value: f"‹{value}›")
    assert shown.count("<tr>") == 3 and shown.count("text-align:left;vertical-align:top") == 6
    assert ">a &amp; b</th>" in shown and ">‹&lt;script&gt;›</td>" in shown and ">‹3›</td>" in shown
    assert "><i>nothing</i></td>" in shown and "<script>" not in shown


def test_table_of_a_notebook_in_a_run_of_ones_own(claims):
    ledger.record("one", 11, interval=(9, 12))
    table = ledger.table("02")
    assert list(table.columns) == ["claim", "published", "ours", "verdict"]
    assert list(table.ours) == ["11 [9, 12]"]
    shown = table._repr_html_()
    assert "It &lt;b&gt;works&lt;/b&gt; | always" in shown and "<b>" not in shown
    recorded_here_and_its_own = ["replicated", "not attempted"]
    assert list(ledger.table().verdict) == recorded_here_and_its_own
    assert list(ledger.table("05_chain").verdict) == recorded_here_and_its_own
    assert list(ledger.table().ours) == ["11 [9, 12]", "–"]


def test_write(default, monkeypatch):
    spans = {"learned": (0.5, 0.7)}
    ledger.record("pair", {"learned": 0.6, "random": 0.1}, spans, model="stand-in")
    rows = ledger.write()
    paths = [default / name for name in ("ledger.json", "ledger.md")]
    first = [path.read_bytes() for path in paths]
    document = json.loads(first[0])
    assert document["claims"] == rows
    assert [row["verdict"] for row in rows] == ["not attempted", "replicated"]
    needed = {"id", "claim", "source", "published", "ours", "interval", "core", "verdict", "why"}
    assert all(needed <= set(row) for row in rows)
    assert document["meta"]["counts"]["replicated"] == 1
    assert document["meta"]["models"] == ["stand-in"]
    assert rows[1]["ours"] == "learned 0.6 [0.5, 0.7], random 0.1"
    assert rows[1]["why"] == (
        "In stand-in: replicated if learned ≥ 0.5 and random ≤ 0.2; "
        "partly if learned - random ≥ 0.2. A note."
    )
    line = first[1].decode().splitlines()[-2]
    assert line.startswith("| It <b>works</b> \\| always (core) | MELBO | 7 | – | not attempted |")
    ledger.write()
    assert first == [path.read_bytes() for path in paths]
    monkeypatch.setenv("WORKBOOK_NOTEBOOK", "05_chain")  # of two notebooks, the later one counts
    ledger.record("pair", {"learned": 0.1, "random": 0.1})
    rows = ledger.write()
    assert rows[1]["verdict"] == "not replicated"
    text = ledger.terminal_table(rows)
    assert "not replicated" in text and "1 others" in text
    assert max(map(len, text.splitlines())) <= 100


def test_not_attempted_says_why(claims, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    reasons = [row["why"] for row in ledger.entries()]
    assert reasons == ["Notebook 02 is not written yet.", "Notebook 05 is not written yet. A note."]
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "02_training.ipynb").touch()
    why = "Notebook 02 has no result in this build; the last verdict was partly."
    assert ledger.entries()[0]["why"] == why


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
    claims = json.loads(ledger.CLAIMS.read_text(encoding="utf-8"))
    assert len(ledger.claims()) == len(claims), "ids are unique"
    for claim in claims:
        assert set(CLAIM) <= set(claim) and claim["last_verdict"] in [None, *ledger.VERDICTS[1:]]
        assert list(claim["thresholds"]) == ["replicated", "partly"], "the better one first"
        for limits in claim["thresholds"].values():
            assert limits and {sign for sign, _ in limits.values()} <= set(ledger.OPERATORS)
            assert all(isinstance(limit, (int, float)) for _, limit in limits.values())
    assert {claim["notebook"] for claim in claims if claim["core"]} == {"03", "04", "05", "06"}
    of_the_method = {"learned-not-absorbed", "objective-over-random", "different-starts"}
    of_the_notes = {"minus-theta-opposite", "change-is-inversion", "loss-is-not-behaviour"}
    assert of_the_method | of_the_notes | {"orthogonal-diversity"} <= set(ledger.claims())


def test_the_readme_keeps_a_row_until_there_is_a_new_result(default):
    text = "\n".join(["# Title", *ledger.MARKS, "After."])
    ledger.record("pair", {"learned": 0.6, "random": 0.1})
    first = ledger.into_readme(text)
    assert first.startswith("# Title\n") and first.endswith("\nAfter.")
    core = first.index("**It <b>works</b> \\| always**")
    assert core < first.index("learned 0.6"), "core claims come first"
    assert "| 7 | – | not attempted |" in first
    (default / "claims" / "02_training" / "pair.json").unlink()
    ledger.record("one", 12)
    second = ledger.into_readme(first)
    assert "learned 0.6" in second and "| 7 | 12 | replicated |" in second
    assert second == ledger.into_readme(second)
    with pytest.raises(ValueError, match="no table of results"):
        ledger.into_readme("# Title")
