"""The ledger: what was published, what we measured, and whether the two agree.

`data/claims.json` holds the claims and the thresholds of their verdicts, committed before the run
that decides. A notebook calls `record`; a default run (every parameter as committed; the runner
sets WORKBOOK_DEFAULT_RUN=1) keeps the result under `build/claims/<notebook>/`, others only print.
"""

import html
import json
import math
import operator
import os
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import ROOT, UserError

CLAIMS = ROOT / "data" / "claims.json"
MARKS = ("<!-- results, written by python -m helpers refresh -->", "<!-- end of results -->")
STAND_IN = (
    "A 135M-parameter chat model (4-bit weights, de-quantised) and fine-tuned organisms stand in "
    "for the 1.8 to 14 B parameter models of the published work."
)
VERDICTS = ["not attempted", "not replicated", "partly", "replicated"]  # from worst to best
OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_recorded = {}  # results of this kernel, by claim id: what a notebook's closing table shows


def default_run() -> bool:
    """Whether the runner executes notebooks with every parameter as committed: only that counts."""
    return os.environ.get("WORKBOOK_DEFAULT_RUN") == "1"


def build_folder(build: str | Path | None = None) -> Path:
    """Where results go: `build`, or what the runner says, or build/ at the repository root."""
    return Path(build or os.environ.get("WORKBOOK_BUILD") or ROOT / "build")


def write_atomically(path: str | Path, text: str) -> None:
    """Write `text` so that a reader finds the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def html_table(columns: Sequence[str], rows: Iterable[Sequence], cell: Callable = str) -> str:
    """An HTML table. cell: makes of a value the text to show, which is escaped here (`<script>` is
    shown, not run); a value with `_repr_html_`, such as IPython's HTML, stands as it is."""

    def line(tag, texts):
        start = f'<{tag} style="text-align:left;vertical-align:top;padding:2px 8px">'
        return "<tr>" + "".join(f"{start}{text}</{tag}>" for text in texts) + "</tr>"

    def markup(value):
        return value._repr_html_() if hasattr(value, "_repr_html_") else html.escape(cell(value))

    head = line("th", map(html.escape, columns))
    body = "".join(line("td", map(markup, row)) for row in rows)
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def without_duplicates(pairs) -> dict:
    """An object of JSON; ValueError where a key stands in it twice (of two, the last would win)."""
    pairs = list(pairs)
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the key {name!r} stands twice")
    return dict(pairs)


def claims() -> dict[str, dict]:
    """The claims of data/claims.json, by id; a test holds the form of that file. UserError: it is
    no JSON, or a key or an id stands in it twice."""
    try:
        found = json.loads(CLAIMS.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
        return without_duplicates((claim["id"], claim) for claim in found)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{CLAIMS} is broken: {error}.") from None


def _quantity(name: str, values: dict) -> float:
    """One named quantity of a result; "a - b" is the difference of two."""
    parts = name.split(" - ")
    for part in parts:
        if part not in values:
            has = ", ".join(sorted(values))
            raise ValueError(f"The thresholds need the quantity {part!r}; the result has {has}.")
    return values[parts[0]] - sum(values[part] for part in parts[1:])


def verdict(claim: dict, values: dict[str, float]) -> str:
    """The best of replicated, partly and not replicated whose every threshold the values meet."""
    for name, limits in claim["thresholds"].items():  # the claims put the better verdict first
        if all(
            OPERATORS[sign](_quantity(quantity, values), limit)
            for quantity, (sign, limit) in limits.items()
        ):
            return name
    return "not replicated"


def _plain(value):
    """What JSON can hold: numbers of NumPy and PyTorch as Python's own, what is unknown as text."""

    def known(other):
        return other.tolist() if hasattr(other, "tolist") else str(other)

    return json.loads(json.dumps(value, default=known))


def record(claim: str, value, interval=None, **facts) -> None:
    """Judge a result against the thresholds committed for `claim`, and print one line.

    value: a number, or a dict of named ones; interval: (low, high), or a dict of such; facts: what
    else was true (model, seeds …). A default run keeps the result. AssertionError: in such a run a
    core claim falls below its last verdict. ValueError: no such claim, quantity or finite number.
    """
    known = claims()
    if claim not in known:
        raise ValueError(f"There is no claim {claim!r}; data/claims.json has {', '.join(known)}.")
    values = _plain(value if isinstance(value, dict) else {"value": value})
    for name, number in values.items():
        known_number = isinstance(number, (int, float))
        if known_number and not math.isfinite(number) and not default_run():
            print(f"{claim}: {name} is {number}, so there is no verdict (not a default run)")
            return
        if not known_number or not math.isfinite(number):
            raise ValueError(f"Claim {claim!r}: {name} is {number!r}, not a finite number.")
    now, last = verdict(known[claim], values), known[claim]["last_verdict"]
    result = {"id": claim, "values": values, "verdict": now}
    result |= {"interval": _plain(interval), "facts": _plain(facts)}
    result["notebook"] = os.environ.get("WORKBOOK_NOTEBOOK", "interactive")
    _recorded[claim] = result
    ours = _ours(result)
    aside = "" if default_run() else " (not a default run: the ledger is left as it is)"
    print(f"{claim}: {ours} → {now}{aside}")
    if default_run():
        text = json.dumps(result, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        write_atomically(build_folder() / "claims" / result["notebook"] / f"{claim}.json", text)
        if known[claim]["core"] and last and VERDICTS.index(now) < VERDICTS.index(last):
            raise AssertionError(f"Core claim {claim!r} was {last} and is now {now}: {ours}.")


def check(condition, sentence: str) -> None:
    """Guard a finding in prose: true prints it; false fails a default run, or says it differs."""
    if not condition and default_run():
        raise AssertionError(sentence)
    print(f"✓ {sentence}" if condition else f"differs here: {sentence}")


def _number(value: float, interval=None) -> str:
    """A number, and its interval where there is one (a single unit has none)."""
    if interval and all(map(math.isfinite, interval)):
        return f"{_number(value)} [{_number(interval[0])}, {_number(interval[1])}]"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _ours(result: dict) -> str:
    """A result in one line: quantities, each with its interval where there is one."""
    values, interval = result["values"], result["interval"]
    if list(values) == ["value"]:
        return _number(values["value"], interval)
    spans = interval if isinstance(interval, dict) else {}
    parts = []
    for name, value in values.items():
        parts.append(f"{name.replace('_', ' ')} {_number(value, spans.get(name))}")
    return ", ".join(parts)


def _criteria(claim: dict) -> str:
    """The thresholds in words: "replicated if learned ≥ 0.5 and random ≤ 0.2; partly if …"."""
    rules = []
    for name, limits in claim["thresholds"].items():
        conditions = [f"{quantity} {sign} {limit}" for quantity, (sign, limit) in limits.items()]
        rules.append(f"{name} if " + " and ".join(conditions).replace("_", " "))
    return "; ".join(rules).replace("value ", "").replace(">=", "≥").replace("<=", "≤")


def _why(claim: dict, result: dict | None) -> str:
    """What a verdict rests on, or why there is none."""
    notebook, last = claim["notebook"], claim["last_verdict"]
    if result:
        model = result["facts"].get("model")
        why = (f"In {model}: " if model else "") + _criteria(claim)
    elif not notebook:
        why = "No notebook attempts it"
    elif not any((ROOT / "notebooks").glob(f"{notebook}_*.ipynb")):
        why = f"Notebook {notebook} is not written yet"
    else:
        since = f"; the last verdict was {last}" if last else ""
        why = f"Notebook {notebook} has no result in this build{since}"
    return f"{why}. {claim.get('note', '')}".strip()


def entries(notebook: str | None = None, build: str | Path | None = None) -> list[dict]:
    """Claims in the order of claims.json with their results: this kernel's own, else the build's;
    the build's alone where one is named. notebook: only claims that it ("02", or its whole name)
    decides, or that were recorded here."""
    own = _recorded if build is None else {}
    paths = sorted(build_folder(build).glob("claims/*/*.json"))  # of two, the later notebook counts
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths} | own
    rows = []
    for name, claim in claims().items():
        if notebook and claim["notebook"] != notebook.split("_")[0] and name not in own:
            continue
        result = results.get(name)
        row = {key: claim[key] for key in ("id", "claim", "source", "published", "core")}
        row |= {"ours": None, "interval": None, "verdict": "not attempted"}
        if result:
            row |= {key: result[key] for key in ("interval", "verdict")}
            row["ours"] = _ours(result)
        rows.append(row | {"why": _why(claim, result), "result": result})
    return rows


def table(notebook: str | None = None):
    """Claim, published, ours, verdict: a DataFrame that Jupyter shows whole (pandas cuts cells)."""
    import pandas  # here, because the command line needs the ledger at once

    class Claims(pandas.DataFrame):
        def _repr_html_(self):
            return html_table(self.columns, self.itertuples(index=False))

    columns = ["claim", "published", "ours", "verdict"]
    return Claims(pandas.DataFrame(entries(notebook), columns=columns).fillna("–"))


def write(build: str | Path | None = None) -> list[dict]:
    """Write ledger.json and ledger.md (same results, same bytes); returns the rows of `entries`."""
    folder = build_folder(build)
    rows = entries(build=folder)
    verdicts = [row["verdict"] for row in rows]
    counts = {name: verdicts.count(name) for name in reversed(VERDICTS)}
    models = {row["result"]["facts"].get("model", "") for row in rows if row["result"]} - {""}
    meta = {"stand_in": STAND_IN, "models": sorted(models), "counts": counts}
    document = json.dumps({"meta": meta, "claims": rows}, indent=1, ensure_ascii=False)
    write_atomically(folder / "ledger.json", document + "\n")
    tally = ", ".join(f"{n} {name}" for name, n in counts.items()) + "."
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


def into_readme(text: str, build: str | Path | None = None) -> str:
    """The README's `text` with its table of results, core claims first. A claim with a result in
    the build gets a new row, any other keeps the one that it has. ValueError: MARKS are missing."""
    before, start, rest = text.partition(MARKS[0])
    old, end, after = rest.partition(MARKS[1])
    if not (start and end):
        raise ValueError(f"README.md has no table of results, between {' and '.join(MARKS)}.")
    kept = {line.split(" | ")[0]: line for line in old.splitlines()}
    lines = ["| Claim | Published | Ours | Verdict |", "|---|---|---|---|"]
    for row in sorted(entries(build=build_folder(build)), key=lambda row: not row["core"]):
        claim = f"**{row['claim']}**" if row["core"] else row["claim"]
        new = _markdown_row(claim, row["published"], row["ours"] or "–", row["verdict"])
        lines.append(new if row["result"] else kept.get(new.split(" | ")[0], new))
    return "\n".join([before + start, *lines, end + after])


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
