"""The ledger: what was published, what we measured, and whether the two agree.

`data/claims.json` holds the claims and the thresholds of their verdicts, committed before the run that decides. A notebook
calls `record`; in a default run (every parameter as committed; the runner sets WORKBOOK_DEFAULT_RUN=1) the result is kept under
`build/claims/<notebook>/`, and `write` puts claims and results side by side. Other runs print, and keep nothing.
"""

import html
import json
import math
import operator
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import ROOT  # noqa: E402

CLAIMS = ROOT / "data" / "claims.json"
MARKS = ("<!-- results, written by python -m helpers refresh -->", "<!-- end of results -->")
STAND_IN = (
    "A 135M-parameter chat model (4-bit weights, de-quantised) and fine-tuned organisms stand in for the 1.8 to 14 B "
    "parameter models of the published work."
)
VERDICTS = ["not attempted", "not replicated", "partly", "replicated"]  # from worst to best
OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_recorded = {}  # results of this kernel, by claim id: what a notebook's closing table shows


def default_run():
    """True where the runner executes notebooks with every parameter as committed: only such runs count for the ledger."""
    return os.environ.get("WORKBOOK_DEFAULT_RUN") == "1"


def build_folder(build=None):
    """The folder for results: `build`, or what the runner says, or build/ at the repository root."""
    return Path(build or os.environ.get("WORKBOOK_BUILD") or ROOT / "build")


def write_atomically(path, text):
    """Write `text` so that a reader finds the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def claims():
    """The claims of data/claims.json, by id. ValueError names the claim and the field where the file is wrong."""
    found = {}
    for claim in json.loads(CLAIMS.read_text(encoding="utf-8")):
        missing = {
            "id",
            "claim",
            "source",
            "published",
            "notebook",
            "core",
            "thresholds",
            "last_verdict",
        } - set(claim)
        if missing:
            raise ValueError(
                f"{CLAIMS.name}: claim {claim.get('id', '?')!r} lacks {', '.join(sorted(missing))}."
            )
        if claim["id"] in found:
            raise ValueError(f"{CLAIMS.name}: two claims are called {claim['id']!r}.")
        if claim["last_verdict"] not in [None, *VERDICTS[1:]]:
            raise ValueError(
                f"{CLAIMS.name}: claim {claim['id']!r} has an unknown last_verdict, {claim['last_verdict']!r}."
            )
        found[claim["id"]] = claim
    return found


def _quantity(name, values):
    """One named quantity of a result; "a - b" is the difference of two."""
    parts = name.split(" - ")
    for part in parts:
        if part not in values:
            raise ValueError(
                f"The thresholds need the quantity {part!r}; the result has only {', '.join(sorted(values))}."
            )
    return values[parts[0]] - sum(values[part] for part in parts[1:])


def verdict(claim, values):
    """ "replicated", "partly" or "not replicated": the best whose every threshold the values meet."""
    for name in ("replicated", "partly"):
        limits = claim["thresholds"].get(name)
        if limits and all(
            OPERATORS[sign](_quantity(quantity, values), limit)
            for quantity, (sign, limit) in limits.items()
        ):
            return name
    return "not replicated"


def _plain(value):
    """Numbers of NumPy and PyTorch as Python's own, paths and the like as text, so that JSON can hold a result."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def record(claim, value, interval=None, **facts):
    """Judge a result against the thresholds committed for `claim`, print one line, and return the verdict.

    value: a number, or a dict of named numbers; interval: (low, high), or a dict of such; facts: what else was true (prompts,
    seeds, model, parameters, seconds). A default run keeps the result, and raises AssertionError where a core claim falls below
    the verdict it last had. ValueError: an unknown claim, a value that is not a finite number, a quantity missing.
    """
    known = claims()
    if claim not in known:
        raise ValueError(
            f"There is no claim {claim!r}; data/claims.json has {', '.join(sorted(known))}."
        )
    values = _plain(value if isinstance(value, dict) else {"value": value})
    for name, number in values.items():
        if (
            isinstance(number, str)
            or not isinstance(number, (int, float))
            or not math.isfinite(number)
        ):
            raise ValueError(
                f"Claim {claim!r}: {name} is {number!r}, where a finite number is needed."
            )
    entry = known[claim]
    ours = verdict(entry, values)
    result = {
        "id": claim,
        "values": values,
        "interval": _plain(interval),
        "verdict": ours,
        "facts": _plain(facts),
        "notebook": os.environ.get("WORKBOOK_NOTEBOOK", "interactive"),
    }
    _recorded[claim] = result
    print(
        f"{claim}: {_ours(result)} → {ours}"
        + ("" if default_run() else " (not a default run: the ledger is left as it is)")
    )
    if default_run():
        text = json.dumps(result, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        write_atomically(build_folder() / "claims" / result["notebook"] / f"{claim}.json", text)
        if (
            entry["core"]
            and entry["last_verdict"]
            and VERDICTS.index(ours) < VERDICTS.index(entry["last_verdict"])
        ):
            raise AssertionError(
                f"Core claim {claim!r} was {entry['last_verdict']} and is now {ours}: {_ours(result)}."
            )
    return ours


def check(condition, sentence):
    """Guard a finding in prose: true prints it; false fails a default run and elsewhere says that things differ here."""
    if condition:
        print(f"✓ {sentence}")
    elif default_run():
        raise AssertionError(sentence)
    else:
        print(f"differs here: {sentence}")


def _number(value):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _span(interval):
    return f" [{_number(interval[0])}, {_number(interval[1])}]" if interval else ""


def _ours(result):
    """A result in one line: quantities, each with its interval where there is one."""
    values, interval = result["values"], result["interval"]
    if list(values) == ["value"]:
        return _number(values["value"]) + _span(interval)
    spans = interval if isinstance(interval, dict) else {}
    return ", ".join(
        f"{name.replace('_', ' ')} {_number(value)}{_span(spans.get(name))}"
        for name, value in values.items()
    )


def _criteria(claim):
    rules = {
        "replicated": claim["thresholds"].get("replicated") or {},
        "partly": claim["thresholds"].get("partly") or {},
    }
    return (
        "; ".join(
            f"{name} if "
            + " and ".join(
                f"{quantity.replace('_', ' ')} {sign} {limit}"
                for quantity, (sign, limit) in limits.items()
            )
            for name, limits in rules.items()
            if limits
        )
        .replace(">=", "≥")
        .replace("<=", "≤")
        .replace("value ", "")
    )


def _why(claim, result):
    """What a verdict rests on, or why there is none."""
    note = f" {claim['note']}" if claim.get("note") else ""
    if result:
        model = result["facts"].get("model")
        return (f"In {model}: " if model else "") + _criteria(claim) + "." + note
    if not claim["notebook"]:
        return "No notebook attempts it." + note
    if not sorted((ROOT / "notebooks").glob(f"{claim['notebook']}_*.ipynb")):
        return f"Notebook {claim['notebook']} is not written yet." + note
    last = f"; the last verdict was {claim['last_verdict']}" if claim["last_verdict"] else ""
    return f"Notebook {claim['notebook']} has no result in this build{last}." + note


def entries(notebook=None, build=None):
    """Claims joined with their results (this kernel's own first, then the build's), in the order of claims.json.

    notebook: only the claims that this notebook ("02", or its whole name) decides or has recorded.
    """
    results = {}
    for path in sorted(
        build_folder(build).glob("claims/*/*.json")
    ):  # of two notebooks, the later one counts
        results[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    if build is None:
        results.update(_recorded)
    rows = []
    for claim in claims().values():
        result = results.get(claim["id"])
        here = build is None and claim["id"] in _recorded
        if notebook and claim["notebook"] != notebook.split("_")[0] and not here:
            continue
        rows.append(
            {
                **{key: claim[key] for key in ("id", "claim", "source", "published")},
                "ours": _ours(result) if result else None,
                "interval": result["interval"] if result else None,
                "core": claim["core"],
                "verdict": result["verdict"] if result else "not attempted",
                "why": _why(claim, result),
                "result": result,
            }
        )
    return rows


def html_table(columns: Sequence[str], rows: Iterable[Sequence], cell: Callable = str) -> str:
    """An HTML table, its cells aligned left and at the top.

    cell: makes of a value the text to show, which is escaped here (a completion of `<script>` is
    shown, not run). A value with `_repr_html_`, such as IPython's HTML, stands as it is.
    """

    def line(tag, texts):
        start = f'<{tag} style="text-align:left;vertical-align:top;padding:2px 8px">'
        return "<tr>" + "".join(f"{start}{text}</{tag}>" for text in texts) + "</tr>"

    def markup(value):
        return value._repr_html_() if hasattr(value, "_repr_html_") else html.escape(cell(value))

    head = line("th", map(html.escape, columns))
    body = "".join(line("td", map(markup, row)) for row in rows)
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def table(notebook=None, build=None):
    """The claims table (claim, published, ours, verdict), of one notebook or of all; in Jupyter it shows as wrapped HTML text."""
    import pandas

    class Claims(pandas.DataFrame):
        def _repr_html_(
            self,
        ):  # pandas cuts cells at 50 characters; here every word is wanted, escaped
            cells = {name: [html.escape(str(cell)) for cell in self[name]] for name in self.columns}
            style = "text-align:left;vertical-align:top"
            head = "".join(f'<th style="{style}">{name}</th>' for name in cells)
            body = "".join(
                "<tr>" + "".join(f'<td style="{style}">{cell}</td>' for cell in row) + "</tr>"
                for row in zip(*cells.values())
            )
            return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    rows = [
        (row["claim"], row["published"], row["ours"] or "–", row["verdict"])
        for row in entries(notebook, build)
    ]
    return Claims(rows, columns=["claim", "published", "ours", "verdict"])


def write(build=None):
    """Write ledger.json and ledger.md into the build folder: the same bytes for the same results. Returns the rows."""
    folder = build_folder(build)
    rows = entries(build=folder)
    counts = {name: sum(row["verdict"] == name for row in rows) for name in reversed(VERDICTS)}
    models = sorted(
        {row["result"]["facts"].get("model", "") for row in rows if row["result"]} - {""}
    )
    document = {"meta": {"stand_in": STAND_IN, "models": models, "counts": counts}, "claims": rows}
    write_atomically(
        folder / "ledger.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    )
    lines = [
        "# Claims and results",
        "",
        STAND_IN,
        "",
        ", ".join(f"{n} {name}" for name, n in counts.items()) + ".",
        "",
        "| Claim | Source | Published | Ours | Verdict | Why |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        _markdown(
            row["claim"] + (" (core)" if row["core"] else ""),
            row["source"],
            row["published"],
            row["ours"] or "–",
            row["verdict"],
            row["why"],
        )
        for row in rows
    ]
    write_atomically(folder / "ledger.md", "\n".join(lines) + "\n")
    return rows


def _markdown(*cells):
    """A row of a Markdown table."""
    return (
        "| "
        + " | ".join(re.sub(r"\s+", " ", str(cell)).replace("|", "\\|") for cell in cells)
        + " |"
    )


def into_readme(text, build=None):
    """The README's `text` with its table of results (between MARKS) brought up to date, core claims first: a claim with a result
    in the build gets a new row, any other keeps the row that it has. ValueError where the marks are missing."""
    before, start, rest = text.partition(MARKS[0])
    old, end, after = rest.partition(MARKS[1])
    if not (start and end):
        raise ValueError(
            f"README.md has no table of results: it belongs between {MARKS[0]} and {MARKS[1]}."
        )
    kept = {line.split(" | ")[0]: line for line in old.splitlines()}
    lines = ["| Claim | Published | Ours | Verdict |", "|---|---|---|---|"]
    for row in sorted(entries(build=build_folder(build)), key=lambda row: not row["core"]):
        claim = f"**{row['claim']}**" if row["core"] else row["claim"]
        new = _markdown(claim, row["published"], row["ours"] or "–", row["verdict"])
        lines.append(new if row["result"] else kept.get(new.split(" | ")[0], new))
    return "\n".join([before + start, *lines, end + after])


def terminal_table(rows, width=100):
    """The claims as plain text for a terminal: verdict, id, our numbers; what was not attempted in one closing line."""
    tried = [row for row in rows if row["verdict"] != "not attempted"]
    ids = max([len(row["id"]) for row in tried], default=0)
    lines = ["", "Claims (published ones beside them: build/ledger.md)"]
    for row in tried:
        line = f"  {row['verdict']:<15} {row['id']:<{ids}}  {row['ours']}"
        lines.append(line if len(line) <= width else line[: width - 1] + "…")
    if not tried:
        lines.append("  none attempted yet")
    elif len(tried) < len(rows):
        lines.append(
            f"  not attempted   {len(rows) - len(tried)} others, for the reasons in the ledger"
        )
    return "\n".join(lines)
