"""The ledger: what was published, what we measured, and what the interval decides.

`data/claims.json` holds the claims, each with the one quantity that decides it, its unit and its
bar, committed before the run. A notebook calls `record`; a default run (every parameter as
committed; the runner sets WORKBOOK_DEFAULT_RUN=1) keeps the result under
`build/claims/<notebook>/`, others only print.

A claim is *replicated* (an own one: *supported*) if the whole 95 % interval clears the bar,
*contradicted* (*not supported*) if the whole interval falls short, else *undecided*; undecided,
too, unless the whole interval of each precondition clears its limit (a count without an interval is
taken as it is), or where the measurement has to be made again. What follows from
arithmetic or the causal mask is *by construction*, and outside the tally.
"""

import html
import json
import math
import operator
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from string import Formatter

from . import ROOT, UserError

CLAIMS = ROOT / "data" / "claims.json"
OUTCOMES = {  # of each kind of claim: interval below the bar, across it, above it
    "published": ("contradicted", "undecided", "replicated"),
    "own": ("not supported", "undecided", "supported"),
    "construction": ("by construction",) * 3,
}
VERDICTS = ["replicated", "supported", "undecided", "contradicted", "not supported"]
VERDICTS += ["by construction", "not attempted"]
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
    no JSON, a key or an id stands in it twice, or a bar is for an unknown quantity."""
    try:
        found = json.loads(CLAIMS.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
        for claim in found:
            _check_bar(claim)
        return without_duplicates((claim["id"], claim) for claim in found)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{CLAIMS} is broken: {error}.") from None


def _check_bar(claim: dict) -> None:
    """ValueError: a kind or sign that is none, or a bar for a number that nobody gets to see."""
    about = f"the claim {claim['id']!r} has"
    if claim["kind"] not in OUTCOMES:
        raise ValueError(f"{about} the kind {claim['kind']!r}: use one of {', '.join(OUTCOMES)}")
    if claim["bar"][0] not in OPERATORS:
        raise ValueError(f"{about} the sign {claim['bar'][0]!r}: use one of {' '.join(OPERATORS)}")
    shown = [name for _, name, _, _ in Formatter().parse(claim["sentence"]) if name]
    if claim["quantity"] not in shown:
        has = ", ".join(shown) or "no number"
        raise ValueError(f"{about} a bar for {claim['quantity']!r}, but its sentence shows {has}")


def _clears(value: float, bar: Sequence) -> bool:
    sign, limit = bar
    return OPERATORS[sign](value, limit)


def verdict(claim: dict, values: dict[str, float], intervals: dict) -> tuple[str, str]:
    """(verdict, why, if it is undecided) from the interval of the claim's one quantity.

    intervals: {quantity: (low, high)}; a quantity without one is taken as exact. ValueError: the
    values lack a quantity that the claim names."""
    name, bar = claim["quantity"], claim["bar"]
    for needed in (name, *claim.get("preconditions", ())):
        if needed not in values:
            has = ", ".join(sorted(values))
            raise ValueError(
                f"Claim {claim['id']!r} needs the quantity {needed!r}, not only {has}."
            )
    worse, undecided, better = OUTCOMES[claim["kind"]]
    if "again" in claim:
        return undecided, f"to be measured again: {claim['again']}"
    for needed, limit in claim.get("preconditions", {}).items():
        number = f"{_words(needed)} is {_Quantity(values[needed], intervals.get(needed))}"
        how = _against(limit, values[needed], intervals.get(needed))
        if how != "clears":
            what = "fails" if how == "falls short" else "is not settled"
            return undecided, f"a precondition {what}: {number}, {_bar(limit)} is wanted"
    how = _against(bar, values[name], intervals.get(name))
    if how == "unknown":
        return undecided, "a single unit has no interval"
    if how == "spans":
        return undecided, f"the interval spans the bar, {_words(name)} {_bar(bar)}"
    return (better if how == "clears" else worse), ""


def _against(bar: Sequence, value: float, ends) -> str:
    """How a number stands to a bar: its whole interval clears it, falls short of it or spans it;
    a number without an interval is exact; with one of a single unit, nothing is known."""
    ends = ends or (value, value)
    if not all(map(math.isfinite, ends)):
        return "unknown"
    cleared = [_clears(end, bar) for end in ends]
    if all(cleared):
        return "clears"
    return "spans" if any(cleared) else "falls short"


def _to_decide(claim: dict, values, intervals, n, minutes) -> str:
    """How many units would decide an interval that spans its bar, and what they would take."""
    name, (_, limit) = claim["quantity"], claim["bar"]
    ends = intervals.get(name)
    if not n or not ends or not all(map(math.isfinite, ends)):
        return ""
    half, off = (ends[1] - ends[0]) / 2, abs(values[name] - limit)
    if half <= off:  # a skewed interval: its nearer end is what has to move
        half = max(abs(limit - end) for end in ends)
    if off <= half / 30:
        return f"; at {n} units, no affordable number would decide it"
    wanted = math.ceil(n * (half / off) ** 2)
    cost = "" if minutes is None else f", about {math.ceil(minutes * wanted / n)} minutes"
    return f"; about {wanted:,} units in place of {n} would decide it{cost}"


def _plain(value):
    """What JSON can hold: numbers of NumPy and PyTorch as Python's own, what is unknown as text."""

    def known(other):
        return other.tolist() if hasattr(other, "tolist") else str(other)

    return json.loads(json.dumps(value, default=known))


def record(claim: str, values: dict, interval=None, n=None, minutes=None, **facts) -> None:
    """Judge a result against the bar committed for `claim`, and print it as a sentence.

    values: {quantity: number}; interval: {quantity: (low, high)}, or one pair where there is one
    value; n: the number of units; minutes: what measuring them takes; facts: what else was true
    (model, seeds …). A default run keeps the result. AssertionError: in such a run a core claim
    falls below its last verdict. ValueError: no such claim, quantity or finite number.
    """
    known = claims()
    if claim not in known:
        raise ValueError(f"There is no claim {claim!r}; data/claims.json has {', '.join(known)}.")
    values = _plain(values if isinstance(values, dict) else {"value": values})
    for name, number in values.items():
        known_number = isinstance(number, (int, float))
        if known_number and not math.isfinite(number) and not default_run():
            print(f"{claim}: {name} is {number}, so there is no verdict (not a default run)")
            return
        if not known_number or not math.isfinite(number):
            raise ValueError(f"Claim {claim!r}: {name} is {number!r}, not a finite number.")
    entry = known[claim]
    intervals = interval if isinstance(interval, dict) else {entry["quantity"]: interval}
    intervals = _plain({name: ends for name, ends in intervals.items() if ends is not None})
    now, why = verdict(entry, values, intervals)
    if why.startswith("the interval spans"):
        why += _to_decide(entry, values, intervals, n, minutes)
    result = {"id": claim, "values": values, "interval": intervals, "n": _plain(n)}
    result |= {"verdict": now, "why": why, "facts": _plain(facts)}
    result["notebook"] = os.environ.get("WORKBOOK_NOTEBOOK", "interactive")
    _recorded[claim] = result
    aside = "" if default_run() else " (not a default run: the ledger is left as it is)"
    print(f"{claim}: {_ours(entry, result)} → {now}{f' ({why})' if why else ''}{aside}")
    if default_run():
        text = json.dumps(result, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        write_atomically(build_folder() / "claims" / result["notebook"] / f"{claim}.json", text)
        last = entry["last_verdict"]
        steps = OUTCOMES[entry["kind"]]
        if entry["core"] and last in steps and steps.index(now) < steps.index(last):
            ours = _ours(entry, result)
            raise AssertionError(f"Core claim {claim!r} was {last} and is now {now}: {ours}.")


def check(condition, sentence: str) -> None:
    """Guard a finding in prose: true prints it; false fails a default run, or says it differs."""
    if not condition and default_run():
        raise AssertionError(sentence)
    print(f"✓ {sentence}" if condition else f"differs here: {sentence}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class _Quantity:
    """A number of a sentence, with its interval where it has one: {q} → 0.43 [0.32, 0.53];
    {q:%} → 43 % [32, 53], {q:%.1} with a decimal; {q:d} a count or setting, alone; and any format
    of a float."""

    def __init__(self, value, ends):
        known = ends is not None and all(map(math.isfinite, ends))
        self.value, self.ends = value, (ends if known else None)

    def __format__(self, spec):
        if spec == "d":
            return f"{self.value:g}"
        percent = spec.startswith("%")
        places = spec[2:] or "0" if percent else ""
        scale = 100 if percent else 1

        def said(value):
            if percent:
                return f"{scale * value:.{places}f}"
            return format(value, spec) if spec else _number(value)

        text = said(self.value) + (" %" if percent else "")
        if self.ends is None:
            return text
        low, high = map(said, self.ends)
        return f"{text} [{low}, {high}]"


def _ours(claim: dict, result: dict) -> str:
    """A result as the claim's sentence, with its numbers, and the number of units."""
    numbers = {}
    for name, value in result["values"].items():
        numbers[name] = _Quantity(value, result["interval"].get(name))
    n = f" (n = {result['n']} {claim['unit']})" if result["n"] else ""
    return claim["sentence"].format_map(numbers) + n


def _words(name: str) -> str:
    return name.replace("_", " ")


def _bar(bar: Sequence) -> str:
    sign, limit = bar
    return f"{sign} {limit}".replace(">=", "≥").replace("<=", "≤")


def _why(claim: dict, result: dict | None) -> str:
    """What a verdict rests on, or why there is none."""
    notebook, last = claim["notebook"], claim["last_verdict"]
    if result:
        model = result["facts"].get("model")
        bar = f"{_words(claim['quantity'])} {_bar(claim['bar'])}: {claim['reason']}"
        why = (f"In {model}: " if model else "") + bar
        why += f". Undecided: {result['why']}" if result["why"] else ""
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
        row["finding"] = claim.get("finding")
        row |= {"ours": None, "interval": None, "verdict": "not attempted"}
        row |= {"bar": f"{_words(claim['quantity'])} {_bar(claim['bar'])}"}
        if result:
            row |= {key: result[key] for key in ("interval", "verdict")}
            row["ours"] = _ours(claim, result)
        rows.append(row | {"why": _why(claim, result), "result": result})
    return rows


def table(notebook: str | None = None):
    """Claim, published, ours, bar, verdict: a DataFrame that Jupyter shows whole (pandas cuts
    cells)."""
    import pandas  # here, because the command line needs the ledger at once

    class Claims(pandas.DataFrame):
        def _repr_html_(self):
            return html_table(self.columns, self.itertuples(index=False))

    columns = ["claim", "published", "ours", "bar", "verdict"]
    return Claims(pandas.DataFrame(entries(notebook), columns=columns).fillna("–"))
