"""The ledger on paper: ledger.json and ledger.md, the table in a terminal, the README's results."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from .. import ROOT
from ..ledger import VERDICTS, build_folder, entries, write_atomically

MARKS = ("<!-- results, written by python -m helpers refresh -->", "<!-- end of results -->")
STAND_IN = (
    "A 135M-parameter chat model (4-bit weights, de-quantised) and fine-tuned organisms stand in "
    "for the 1.8 to 14 B parameter models of the published work."
)
BY_LUCK = 0.025  # how often a 95 % interval lies wholly above a value that is the true one


def write(build: str | Path | None = None) -> list[dict]:
    """Write ledger.json and ledger.md (same results, same bytes); returns the rows of `entries`."""
    folder = build_folder(build)
    rows = entries(build=folder)
    verdicts = [row["verdict"] for row in rows]
    counts = {name: verdicts.count(name) for name in VERDICTS}
    models = {row["result"]["facts"].get("model", "") for row in rows if row["result"]} - {""}
    meta = {"stand_in": STAND_IN, "models": sorted(models), "counts": counts}
    document = json.dumps({"meta": meta, "claims": rows}, indent=1, ensure_ascii=False)
    write_atomically(folder / "ledger.json", document + "\n")
    tally = ", ".join(f"{n} {name}" for name, n in counts.items()) + ". " + by_luck(verdicts)
    head = ["| Claim | Source | Published | Ours | Verdict | Why |", "|---|---|---|---|---|---|"]
    lines = ["# Claims and results", "", STAND_IN, "", tally, "", *head]
    for row in rows:
        claim = row["claim"] + (" (core)" if row["core"] else "")
        others = [row[key] or "–" for key in ("source", "published", "ours", "verdict", "why")]
        lines.append(_markdown_row(claim, *others))
    write_atomically(folder / "ledger.md", "\n".join(lines) + "\n")
    return rows


def _markdown_row(*cells: str) -> str:
    escaped = [re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def by_luck(verdicts: Sequence[str]) -> str:
    """How many of so many claims would clear their bar by luck: nothing corrects across claims."""
    judged = [name for name in verdicts if name in VERDICTS[:5]]
    return (
        f"{len(judged)} claims have an interval: if every truth lay just at its bar, about "
        f"{BY_LUCK * len(judged):.1f} would clear it by luck."
    )


def into_readme(text: str, build: str | Path | None = None) -> str:
    """The README's `text` with its findings, one sentence each, and its table of results, core
    claims first. A claim with a result in the build gets a new line, any other keeps the one that
    it has. ValueError: MARKS are missing."""
    before, start, rest = text.partition(MARKS[0])
    old, end, after = rest.partition(MARKS[1])
    if not (start and end):
        raise ValueError(f"README.md has no table of results, between {' and '.join(MARKS)}.")
    kept = {}  # lines by how they begin: a row's claim, a finding's number and claim
    for line in old.splitlines():
        kept[line.split(" | " if line.startswith("|") else "**: ")[0]] = line
    rows, found, lines = entries(build=build_folder(build)), [], []
    for row in rows:
        if row["finding"]:
            head = f"{row['finding']}. **{row['claim'].rstrip('.')}"
            new = f"{head}**: {row['ours']}; {row['verdict']}."
            found.append((row["finding"], new if row["result"] else kept.get(head)))
    for row in sorted(rows, key=lambda row: not row["core"]):
        claim = f"**{row['claim']}**" if row["core"] else row["claim"]
        new = _markdown_row(claim, row["published"], row["ours"] or "–", row["verdict"])
        lines.append(new if row["result"] else kept.get(new.split(" | ")[0], new))
    verdicts = [line.rsplit(" | ", 1)[1].removesuffix(" |") for line in lines]
    head = ["| Claim | Published | Ours | Verdict |", "|---|---|---|---|"]
    first = [line for _, line in sorted(found) if line]
    first += ["", by_luck(verdicts), ""]
    return "\n".join([before + start, *first, *head, *lines, end + after])


def terminal_table(rows: list[dict], build: str | Path | None = None) -> str:
    """The rows of `entries` for a terminal of 100 columns: verdict, id, our numbers."""
    tried = [row for row in rows if row["verdict"] != "not attempted"]
    ids = max([len(row["id"]) for row in tried], default=0)
    beside = build_folder(build) / "ledger.md"
    beside = beside.relative_to(ROOT) if beside.is_relative_to(ROOT) else beside
    lines = ["", f"Claims (published ones beside them: {beside})"]
    for row in tried:
        line = f"  {row['verdict']:<15} {row['id']:<{ids}}  {row['ours']}"
        lines.append(line if len(line) <= 100 else line[:99] + "…")
    if not tried:
        lines.append("  none attempted yet")
    elif others := len(rows) - len(tried):
        lines.append(f"  not attempted   {others} others, for the reasons in the ledger")
    return "\n".join(lines)
