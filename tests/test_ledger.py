"""Verdicts by committed thresholds, results that only default runs keep, and tables of both."""

import json
import os

import numpy as np
import pytest
from IPython.display import HTML

from helpers import UserError, ledger
from helpers.workbook import results

CLAIM = {
    "id": "one",
    "claim": "It <b>works</b> | always",
    "source": "MELBO",
    "published": "7",
    "kind": "published",
    "notebook": "02",
    "core": True,
    "unit": "prompts",
    "quantity": "value",
    "bar": [">=", 3],
    "reason": "the source's own",
    "sentence": "it is {value}",
    "last_verdict": "undecided",
}
PAIR = {
    **CLAIM,
    "id": "pair",
    "notebook": "05",
    "core": False,
    "last_verdict": None,
    "note": "A note.",
    "quantity": "difference",
    "bar": [">=", 0.2],
    "preconditions": {"random": ["<=", 0.2]},
    "sentence": "learned {difference:%} more, random {random:%.1}, of {n:d}",
    "finding": 1,
}
OWN = {**CLAIM, "id": "own", "kind": "own", "bar": ["<=", 3], "core": False, "notebook": "03"}
SURE = {**OWN, "id": "sure", "kind": "construction"}
LATER = {**OWN, "id": "later", "kind": "published", "again": "it stopped too early"}


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
    "claim, interval, expected, why",
    [
        (CLAIM, (3, 6), "replicated", ""),
        (CLAIM, (1, 2.9), "contradicted", ""),
        (CLAIM, (2.9, 6), "undecided", "the interval spans the bar, value ≥ 3"),
        (CLAIM, None, "replicated", ""),  # exact
        (CLAIM, (np.nan, np.nan), "undecided", "a single unit has no interval"),
        (OWN, (1, 2), "supported", ""),
        (OWN, (3.1, 6), "not supported", ""),
        (OWN, (2, 4), "undecided", "the interval spans the bar, value ≤ 3"),
        (SURE, (2, 9), "by construction", "the interval spans the bar, value ≤ 3"),
        (LATER, (1, 2), "undecided", "to be measured again: it stopped too early"),
    ],
)
def test_the_interval_decides(claim, interval, expected, why):
    assert ledger.verdict(claim, {"value": 4}, {"value": interval}) == (expected, why)


def test_a_failed_precondition_leaves_it_undecided():
    values = {"difference": 0.5, "random": 0.3}
    verdict, why = ledger.verdict(PAIR, values, {"difference": (0.4, 0.6)})
    assert verdict == "undecided"
    assert why == "a precondition fails: random is 0.3, ≤ 0.2 is wanted"
    values["random"] = 0.1
    assert ledger.verdict(PAIR, values, {"difference": (0.4, 0.6)}) == ("replicated", "")
    # a precondition is judged by its interval, too
    intervals = {"difference": (0.4, 0.6), "random": (0.05, 0.25)}
    verdict, why = ledger.verdict(PAIR, values, intervals)
    assert verdict == "undecided"
    assert why == "a precondition is not settled: random is 0.1 [0.05, 0.25], ≤ 0.2 is wanted"
    intervals["random"] = (0.05, 0.15)
    assert ledger.verdict(PAIR, values, intervals) == ("replicated", "")
    values["random"], intervals["random"] = 0.3, (0.25, 0.4)
    assert "a precondition fails" in ledger.verdict(PAIR, values, intervals)[1]
    intervals["random"] = (np.nan, np.nan)
    assert ledger.verdict(PAIR, values, intervals)[0] == "undecided"


@pytest.mark.parametrize(
    "value, interval, n, minutes, said",
    [
        (4, (2, 6), 10, 6, "; about 40 units in place of 10 would decide it, about 24 minutes"),
        (4, (2, 6), 10, None, "; about 40 units in place of 10 would decide it"),
        (3, (2, 4), 10, 6, "; at 10 units, no affordable number would decide it"),
        (4, (2, 6), None, 6, ""),
        (4, (2.8, 4.4), 10, 6, "; about 20 units"),  # skewed: the nearer end has to move
    ],
)
def test_undecided_names_what_would_decide(claims, capsys, value, interval, n, minutes, said):
    ledger.record("one", value, interval, n, minutes)
    assert f"(the interval spans the bar, value ≥ 3{said}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "claim, value, message",
    [
        ("two", 1, "no claim 'two'; data/claims.json has one, pair"),
        ("one", None, "value is None"),
        ("one", [1, 2], "finite number"),
        ("pair", {"difference": 1, "n": 2}, "needs the quantity 'random', not only difference, n"),
    ],
)
def test_mistakes(claims, claim, value, message):
    with pytest.raises(ValueError, match=message):
        ledger.record(claim, value)
    assert not claims.exists()


def test_what_is_no_number_fails_a_default_run_and_is_said_in_others(claims, monkeypatch, capsys):
    """Kind 16: parameters of one's own may leave nothing to measure, or a single unit."""
    ledger.record("one", float("nan"))
    pair = {"difference": 0.6, "random": 0.1, "n": 3}
    ledger.record("pair", pair, {"difference": (np.nan, np.nan)})
    said = capsys.readouterr().out
    assert "one: value is nan, so there is no verdict" in said
    assert "learned 60 % more, random 10.0 %, of 3 → undecided (a single unit has no" in said
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
        (json.dumps([{**CLAIM, "kind": "mine"}]), "the kind 'mine': use one of published, own"),
        (json.dumps([{**CLAIM, "bar": ["=", 1]}]), "the sign '=': use one of >= <= > <"),
        (json.dumps([{**CLAIM, "quantity": "x"}]), "a bar for 'x', but its sentence shows value"),
    ],
)
def test_a_broken_file_of_claims_is_one_sentence(claims, text, message):
    """Kind 11: of two equal keys the last would win; an unseen bar decides nothing."""
    ledger.CLAIMS.write_text(text)
    with pytest.raises(UserError, match=message):
        ledger.claims()


def test_the_table_names_the_file_that_was_written(claims, tmp_path):
    """Kind 31: wherever the build is."""
    rows = results.write()
    assert str(claims / "ledger.md") in results.terminal_table(rows)
    assert str(tmp_path / "ledger.md") in results.terminal_table(rows, tmp_path)


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
    assert saved["values"] == {"value": 12.5} and saved["interval"] == {"value": [11.0, 14]}
    assert saved["facts"]["model"] == "tiny" and saved["facts"]["prompts"] == ["a"]
    assert capsys.readouterr().out == "one: it is 12.5 [11, 14] → replicated\n"


def test_a_core_claim_may_not_fall(default):
    ledger.record("one", 4)
    was = "Core claim 'one' was undecided and is now contradicted: it is 1."
    with pytest.raises(AssertionError, match=was):
        ledger.record("one", 1)
    (row, _) = ledger.entries(build=default)
    assert row["verdict"] == "contradicted", "the ledger still tells the truth"
    ledger.record("pair", {"difference": 0, "random": 0, "n": 1})  # not core


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
    assert list(table.columns) == ["claim", "published", "ours", "bar", "verdict"]
    assert list(table.ours) == ["it is 11 [9, 12]"] and list(table.bar) == ["value ≥ 3"]
    shown = table._repr_html_()
    assert "It &lt;b&gt;works&lt;/b&gt; | always" in shown and "<b>" not in shown
    recorded_here_and_its_own = ["replicated", "not attempted"]
    assert list(ledger.table().verdict) == recorded_here_and_its_own
    assert list(ledger.table("05_chain").verdict) == recorded_here_and_its_own
    assert list(ledger.table().ours) == ["it is 11 [9, 12]", "–"]


def test_write(default, monkeypatch):
    values, spans = {"difference": 0.6, "random": 0.1, "n": 9}, {"difference": (0.5, 0.7)}
    ledger.record("pair", values, spans, n=9, model="stand-in")
    rows = results.write()
    paths = [default / name for name in ("ledger.json", "ledger.md")]
    first = [path.read_bytes() for path in paths]
    document = json.loads(first[0])
    assert document["claims"] == rows
    assert [row["verdict"] for row in rows] == ["not attempted", "replicated"]
    needed = {"id", "claim", "source", "published", "ours", "interval", "core", "verdict", "why"}
    assert all(needed <= set(row) for row in rows)
    assert document["meta"]["counts"]["replicated"] == 1
    assert document["meta"]["models"] == ["stand-in"]
    ours = "learned 60 % [50, 70] more, random 10.0 %, of 9 (n = 9 prompts)"
    assert rows[1]["ours"] == ours
    assert rows[1]["why"] == "In stand-in: difference ≥ 0.2: the source's own. A note."
    assert "1 claims have an interval" in first[1].decode()
    line = first[1].decode().splitlines()[-2]
    assert line.startswith("| It <b>works</b> \\| always (core) | MELBO | 7 | – | not attempted |")
    results.write()
    assert first == [path.read_bytes() for path in paths]
    monkeypatch.setenv("WORKBOOK_NOTEBOOK", "05_chain")  # of two notebooks, the later one counts
    ledger.record("pair", {"difference": 0.1, "random": 0.1, "n": 9})
    rows = results.write()
    assert rows[1]["verdict"] == "contradicted"
    text = results.terminal_table(rows)
    assert "contradicted" in text and "1 others" in text
    assert max(map(len, text.replace(str(default), "build").splitlines())) <= 100


def test_not_attempted_says_why(claims, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    reasons = [row["why"] for row in ledger.entries()]
    assert reasons == ["Notebook 02 is not written yet.", "Notebook 05 is not written yet. A note."]
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "02_training.ipynb").touch()
    why = "Notebook 02 has no result in this build; the last verdict was undecided."
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
    fields = set(CLAIM) | {"preconditions", "again", "finding", "note"}
    for claim in claims:
        assert set(CLAIM) <= set(claim) <= fields
        assert claim["last_verdict"] in [None, *ledger.OUTCOMES[claim["kind"]]]
        assert (claim["kind"] == "own") == (claim["source"] == "this workbook")
        for sign, limit in [claim["bar"], *claim.get("preconditions", {}).values()]:
            assert sign in ledger.OPERATORS and isinstance(limit, (int, float))
    assert {claim["notebook"] for claim in claims if claim["core"]} == {"03", "04", "05", "06"}
    findings = sorted(claim["finding"] for claim in claims if "finding" in claim)
    assert findings == list(range(1, len(findings) + 1)) and 6 <= len(findings) <= 12


def test_the_readme_keeps_a_line_until_there_is_a_new_result(default):
    text = "\n".join(["# Title", *results.MARKS, "After."])
    ledger.record("pair", {"difference": 0.6, "random": 0.1, "n": 9})
    first = results.into_readme(text)
    assert first.startswith("# Title\n") and first.endswith("\nAfter.")
    finding = "1. **It <b>works</b> | always**: learned 60 % more, random 10.0 %, of 9; replicated."
    assert first.count(finding) == 1
    core = first.index("**It <b>works</b> \\| always** | 7")
    assert core < first.index("| learned 60 %"), "core claims come first"
    assert "| 7 | – | not attempted |" in first
    (default / "claims" / "02_training" / "pair.json").unlink()
    ledger.record("one", 12)
    second = results.into_readme(first)
    assert finding in second and "| 7 | it is 12 | replicated |" in second
    assert second == results.into_readme(second)
    with pytest.raises(ValueError, match="no table of results"):
        results.into_readme("# Title")
