"""The store of sweeps: read, written, judged, and looked up by the explorer. Needs no torch."""

import hashlib
import json
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas

from .. import DATA, UserError, ledger
from ..metrics.fluency import variety
from ..metrics.judges import FluentRange, is_changed
from ..models.packaged import DEFAULT, PACKAGED

AXES = {
    "prompt": "prompt",
    "source_layer": "source layer (block)",
    "radius": "R (norm of θ)",
    "kind": "vector is",
    "vector": "vector (number)",
    "coeff": "coefficient (times θ)",
}
GAUGES = {
    "objective": ("objective ‖Δ‖²", "", True),
    "kl": ("KL of the next token", "nats", True),
    "surprise": ("surprise (fluency)", "nats per token", False),
    "distance": ("distance to the unsteered answer", "", False),
    "variety": ("diversity (share of words not shared)", "", False),
}
BINS = 40  # of a gauge's histogram
FOLDER = DATA / "sweeps"
# what reading a file or a table of another form may raise
FOREIGN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


# -- files -----------------------------------------------------------------------------------------
def folder_of(model, prompt_set="everyday") -> Path:
    """Where sweeps are kept: data/sweeps for the default model, a folder in it for each other
    packaged one, and below build/ for models and prompt sets of a reader's own."""
    if model in PACKAGED and prompt_set == "everyday":
        return FOLDER if model == DEFAULT else FOLDER / as_file_name(model)
    name = model if prompt_set == "everyday" else f"{model}--{prompt_set}"
    return ledger.build_folder() / "sweeps" / as_file_name(name)


def as_file_name(model) -> str:
    """A model's name, which may be a path, as the name of one folder on any system."""
    return re.sub(r"[^\w.-]+", "--", str(model)).strip(".") or "model"


@contextmanager
def usable(what, rest):
    """Whatever cannot be read or written becomes one sentence: `what` cannot be used, `rest`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be used ({error.strerror or error}): {rest}.") from None


def try_to_write(folder) -> None:
    """OSError where nothing can be written into `folder`: said now, not in an hour."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def adapter_hash(organism) -> str:
    """sha256 of the adapter of an organism: its name, or the folder where it lies."""
    folder = DATA / "organisms" / organism
    folder = Path(organism) if Path(organism, "card.json").is_file() else folder
    with usable(f"The adapter of the organism {organism!r}", f"{folder} has none, train it again"):
        content = (folder / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()


def write(name, cells, meta, folder=FOLDER) -> Path:
    """Keep a computed sweep as <folder>/<name>.json: how it was made, and one line per cell."""
    path = Path(folder) / f"{name}.json"
    lines = ",\n".join(json.dumps(c, ensure_ascii=False, allow_nan=False) for c in cells)
    about = json.dumps(meta, ensure_ascii=False)
    with usable(f"The folder {path.parent}", "free space or make it writable, and run it again"):
        ledger.write_atomically(path, f'{{"meta": {about},\n"cells": [\n{lines}\n]}}\n')
    return path


def read(name, lm=None, folder=None, parts=None) -> dict:
    """A computed sweep, {"meta", "cells": [{"config", "result"}, …]}, of some `parts` if given.

    UserError in one sentence: none there, broken, or (with `lm`) made by another model or adapter.
    """
    folder = Path(folder or (FOLDER if lm is None else folder_of(lm.name)))
    path, command = folder / f"{name}.json", f"python -m helpers sweep {name}"
    if lm is not None and lm.name != DEFAULT:
        command += f" --model {lm.name}"
    if not path.exists():
        there = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "none"
        where = f"{folder.parent.name}/{folder.name}, which has {there}"
        raise UserError(f"There is no sweep {name!r} in {where}: {command} computes one.")
    try:
        sweep = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=ledger.without_duplicates
        )
        meta, cells = sweep["meta"], sweep["cells"]
        made_by, made_for = meta["model"], str(meta["model_hash"])
        adapters = meta.get("organisms", {}).items()
        kinds = {(type(cell["config"]), type(cell["result"])) for cell in cells}
        if kinds != {(dict, dict)}:
            raise TypeError("its cells are not pairs of a config and a result")
        cells[0]["config"]["part"], cells[0]["result"]["rows"][0]
    except (OSError, *FOREIGN) as error:
        problem = f"{path.name} is not a sweep that this workbook wrote"
        raise UserError(f"{problem}: {type(error).__name__} {error}.") from None
    if lm is not None and made_for != lm.weights_hash:
        raise UserError(
            f"The sweep {path.name} was made by {made_by} with weights {made_for[:12]}, this model "
            f"is {lm.name} with {lm.weights_hash[:12]}: compute its own with {command}."
        )
    for organism, digest in adapters if lm is not None else ():
        if digest != adapter_hash(organism):
            raise UserError(
                f"The sweep {path.name} was made with another adapter than data/organisms/"
                f"{organism}: compute it again with {command}."
            )
    if parts is not None:
        parts = (parts,) if isinstance(parts, str) else parts
        cells = [cell for cell in cells if cell["config"].get("part") in parts]
    return {"meta": meta, "cells": cells}


# -- tables ----------------------------------------------------------------------------------------
def rows(cells):
    """A DataFrame of all rows of `cells`, and beside each the numbers and words of its result and
    of its configuration (of two with one name the row's comes first, then the result's)."""
    parts = []
    for cell in cells:
        part = pandas.DataFrame(cell["result"]["rows"])
        about = {**cell["config"], **cell["result"]}
        plain = {k: v for k, v in about.items() if isinstance(v, (int, float, str))}
        parts.append(part.assign(**{k: v for k, v in plain.items() if k not in part}))
    return joined(parts)


def joined(parts):
    """One DataFrame of the tables of several cells."""
    if not parts:
        raise UserError("the sweep is empty: give at least one cell.")
    return pandas.concat(parts, ignore_index=True)


def table(cells):
    """`rows` with three judgements, by the rules of today: `changed`, `fluent`, and `both`."""
    parts = []
    for cell in cells:
        part, about = rows([cell]), cell["result"]
        asked = about["clean"], cell["config"]["prompt"]
        part["changed"] = is_changed(part["text"], *asked, part["distance"])
        judge = FluentRange(*about["fluent"], 0)
        part["fluent"] = judge(part["surprise"].astype(float), part["text"])
        parts.append(part.assign(both=part["changed"] & part["fluent"]))
    return joined(parts)


def shares(sweep) -> dict:
    """{kind: {measure: (R, mean, lower and upper quartile)}} over prompts × seeds of the share of
    vectors that are changed, fluent, both, at temperature 0 and coefficient 1."""
    said = table(sweep["cells"])
    said = said[(said["temperature"] == 0) & (said["coeff"] == 1)]
    units = said.groupby(["kind", "radius", "prompt", "seed", "source_layer"])
    units = units[["changed", "fluent", "both"]].mean()
    found = {}
    for kind in ("learned", "random"):
        if kind in units.index.get_level_values("kind"):
            at, found[kind] = units.loc[kind].groupby("radius"), {}
            for measure in units:
                over = at[measure].describe()[["mean", "25%", "75%"]]
                found[kind][measure] = over.index.tolist(), *over.T.to_numpy().tolist()
    return found


# -- a sweep, ready to be looked up ----------------------------------------------------------------
class Grid:
    """A computed sweep: `options` {axis: values that exist}, and what it says at one setting."""

    def __init__(self, sweep):
        try:
            self._look_up(sweep)
        except UserError:
            raise
        except FOREIGN as error:
            why = " ".join(f"{type(error).__name__} {error}".split())
            raise UserError(f"This sweep is none that the explorer can show: {why}.") from None

    def _look_up(self, sweep):
        said = table(sweep["cells"])
        self.meta, self.rows = sweep["meta"], said[said["temperature"] == 0]
        if self.rows.duplicated(list(AXES)).any():
            raise UserError("this sweep has several runs at one setting: use 'explorer', with one.")
        self.baselines = {c["config"]["prompt"]: c["result"] for c in sweep["cells"]}
        if any("own_spread" not in result for result in self.baselines.values()):
            raise KeyError("own_spread")
        self.options = {}
        for axis in AXES:
            values = self.rows[axis].unique().tolist()
            self.options[axis] = values if isinstance(values[0], str) else sorted(values)
        kinds = self.rows.groupby("kind")
        self.vectors = {kind: sorted(part["vector"].unique().tolist()) for kind, part in kinds}
        self._said = {tuple(r[a] for a in AXES): r for r in self.rows.to_dict("records")}
        places = self.rows.groupby(["prompt", "kind", "coeff", "source_layer", "radius"])
        self._both = places["both"].sum().to_dict()
        self._variety = places["text"].agg(variety).to_dict()
        self.scales = {name: self._scale(name, log) for name, (_, _, log) in GAUGES.items()}

    def start(self) -> dict:
        """The setting that a panel opens with: the first of everything, coefficient 1 if it can."""
        first = {axis: values[0] for axis, values in self.options.items()}
        coeffs = self.options["coeff"]
        return first | {"coeff": 1.0 if 1.0 in coeffs else coeffs[-1]}

    def view(self, state) -> dict:
        """Every number and text shown at `state`, {axis: value}; UserError where there is none."""
        options = self.options | {"vector": self.vectors.get(state["kind"], self.options["vector"])}
        for axis, value in state.items():
            if value not in options[axis]:
                there = ", ".join(map(str, options[axis]))
                raise UserError(f"{axis} {value!r} was not computed: use one of {there}.")
        row, base = self._said[tuple(state[a] for a in AXES)], self.baselines[state["prompt"]]
        sheet = state["prompt"], state["kind"], state["coeff"]  # one heat map
        shown = ["text", "changed", "fluent", "norm", "relative", *GAUGES]
        both = []
        for k in self.options["source_layer"]:
            both.append([int(self._both[*sheet, k, r]) for r in self.options["radius"]])
        return {
            **{name: row[name] for name in shown if name != "variety"},
            "variety": self._variety[*sheet, state["source_layer"], state["radius"]],
            "both": both,
            "of": len(self.vectors[state["kind"]]),
            "clean": base["clean"],
            "own_spread": base["own_spread"],
            "fluent_range": base["fluent"],
        }

    def _scale(self, name, log):
        """(low, high, {kind: histogram [BINS]}) of one gauge over the whole sweep."""
        parts = {}
        for kind, part in self.rows.groupby("kind"):
            parts[kind] = part[name].to_numpy(float) if name in part else []
        if name == "variety":
            for where, value in self._variety.items():
                parts[where[1]].append(value)
        everything = np.concatenate(list(parts.values()))
        everything = everything[np.isfinite(everything) & ((everything > 0) | (not log))]
        low, high = (everything.min(), everything.max()) if len(everything) else (0.0, 1.0)
        if high <= low:
            low, high = low * 0.9, low * 1.1 + 1e-9
        counts = {}
        for kind, part in parts.items():
            places = [place(v, low, high, log) for v in part if v == v]
            counts[kind] = np.histogram(places, BINS, (0, 1))[0]
        return float(low), float(high), counts


def place(value, low, high, log=False) -> float:
    """Where `value` lies between low and high, 0 … 1 (at an end when beyond), or their logs."""
    if log:
        value, low, high = np.log(max(value, low)), np.log(low), np.log(high)
    return float(np.clip((value - low) / (high - low), 0, 1))
