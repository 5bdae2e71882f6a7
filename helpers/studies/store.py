"""Judging what a steered model said, and computed sweeps as small files: what the explorer needs. Nothing here needs torch."""

import json
from pathlib import Path

import numpy as np

from .. import DATA, ledger
from ..metrics.fluency import FluentRange, variety

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
FOLDER = DATA / "explorer"


# ---------------------------------------------------------------------------------------------- sweeps: judged, written, read
def table(cells):
    """A DataFrame of all rows of `cells` ([{"config": …, "result": …}]), with the config's own values and three judgements:
    `changed` (farther from the clean answer than 95 % of the model's own samples), `fluent`, and `both`."""
    import pandas

    parts = []
    for one in cells:
        config, result = one["config"], one["result"]
        part = pandas.DataFrame(result["rows"]).rename(columns={"radius": "norm"})
        judge = FluentRange(*result["fluent"], 0)
        part["changed"] = part["distance"] > result["own_spread"]
        part["fluent"] = judge(part["surprise"].astype(float), part["text"])
        known = {k: v for k, v in config.items() if isinstance(v, (int, float, str))}
        parts.append(part.assign(both=part["changed"] & part["fluent"], **known))
    if not parts:
        raise ValueError("the sweep is empty: give at least one cell.")
    return pandas.concat(parts, ignore_index=True)


def shares(sweep, kinds=("learned", "random")) -> dict:
    """{kind: {measure: (R, mean, lower and upper quartile)}} over prompts × seeds of the share of vectors that are changed,
    fluent, both, at temperature 0 and coefficient 1."""
    rows = table(sweep["cells"])
    rows = rows[(rows["temperature"] == 0) & (rows["coeff"] == 1)]
    units = rows.groupby(["kind", "radius", "prompt", "seed", "source_layer"])[
        ["changed", "fluent", "both"]
    ].mean()
    return {
        kind: {
            measure: (part.index.tolist(), *(part[c].tolist() for c in ("mean", "low", "high")))
            for measure in units
            for part in [_spread(units.loc[kind][measure])]
        }
        for kind in kinds
        if kind in units.index.get_level_values("kind")
    }


def _spread(values):
    at = values.groupby("radius")
    return at.mean().to_frame("mean").assign(low=at.quantile(0.25), high=at.quantile(0.75))


def write(name, cells, meta, folder=None) -> Path:
    """Keep a computed sweep as data/explorer/<name>.json: provenance, and one line per cell."""
    path = Path(folder or FOLDER) / f"{name}.json"
    lines = ",\n".join(json.dumps(c, ensure_ascii=False, allow_nan=False) for c in cells)
    ledger.write_atomically(
        path, f'{{"meta": {json.dumps(meta, ensure_ascii=False)},\n"cells": [\n{lines}\n]}}\n'
    )
    return path


def read(name, lm=None, folder=None) -> dict:
    """A computed sweep, {"meta", "cells"}. ValueError in one sentence: none there, broken, or (with `lm`) made by another model."""
    folder = Path(folder or (FOLDER if lm is None else folder_of(lm.name)))
    path = folder / f"{name}.json"
    if not path.exists():
        raise ValueError(
            f"There is no sweep {name!r} in {folder.parent.name}/{folder.name}, which has "
            f"{', '.join(sorted(p.stem for p in folder.glob('*.json'))) or 'none'}: python -m helpers grid {name}"
            f"{'' if lm is None or folder_of(lm.name) == FOLDER else f' --model {lm.name}'} computes one."
        )
    try:
        sweep = json.loads(path.read_text(encoding="utf-8"))
        made_by, made_for, _ = (
            sweep["meta"]["model"],
            sweep["meta"]["model_hash"],
            sweep["cells"][0]["result"]["rows"][0],
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path.name} is not a sweep that this workbook wrote: {type(error).__name__} {error}."
        ) from None
    if lm is not None and made_for != lm.weights_hash:
        raise ValueError(
            f"The sweep {path.name} was made by {made_by} with weights {str(made_for)[:12]}, this model is {lm.name} "
            f"with {lm.weights_hash[:12]}: compute its own with python -m helpers grid {name} --model {lm.name}."
        )
    return sweep


def folder_of(model, prompt_set="everyday") -> Path:
    """Where sweeps of a model on a prompt set are kept: data/explorer for the committed defaults, else below build/."""
    from ..models.obtain import DEFAULT  # here, because that module imports torch

    if prompt_set != "everyday":
        return ledger.build_folder() / "explorer" / f"{model}--{prompt_set}".replace("/", "--")
    return (
        FOLDER
        if model == DEFAULT
        else ledger.build_folder() / "explorer" / str(model).replace("/", "--")
    )


# ---------------------------------------------------------------------------------------------- a sweep, ready to be looked up
class Grid:
    """A computed sweep: `options` {axis: values that exist}, and what `view(state)` says of one setting, a value per axis."""

    def __init__(self, sweep):
        rows = table(sweep["cells"])
        self.meta, self.rows = sweep["meta"], rows[rows["temperature"] == 0]
        if self.rows.duplicated(list(AXES)).any():
            raise ValueError(
                "this sweep has several runs at one setting (seeds, steps): use one with one, such as 'explorer'."
            )
        self.baselines = {c["config"]["prompt"]: c["result"] for c in sweep["cells"]}
        values = {axis: self.rows[axis].unique().tolist() for axis in AXES}
        self.options = {
            axis: v if isinstance(v[0], str) else sorted(v) for axis, v in values.items()
        }
        self.vectors = {
            kind: sorted(part["vector"].unique().tolist())
            for kind, part in self.rows.groupby("kind")
        }
        self._said = {tuple(r[a] for a in AXES): r for r in self.rows.to_dict("records")}
        places = self.rows.groupby(["prompt", "kind", "coeff", "source_layer", "radius"])
        self._both, self._variety = (
            places["both"].sum().to_dict(),
            places["text"].agg(variety).to_dict(),
        )
        self.scales = {name: self._scale(name, log) for name, (_, _, log) in GAUGES.items()}

    def start(self) -> dict:
        """The setting that a panel opens with: the first of everything, coefficient 1 where there is one."""
        first = {axis: values[0] for axis, values in self.options.items()}
        return first | {"coeff": 1.0 if 1.0 in self.options["coeff"] else self.options["coeff"][-1]}

    def view(self, state) -> dict:
        """Every number and text shown at `state`. ValueError, with the values that exist, for a setting that was not computed."""
        for axis, value in state.items():
            there = (
                self.vectors[state["kind"]]
                if axis == "vector" and state["kind"] in self.vectors
                else self.options[axis]
            )
            if value not in there:
                raise ValueError(
                    f"{axis} {value!r} was not computed: use one of {', '.join(map(str, there))}."
                )
        row, base = self._said[tuple(state[a] for a in AXES)], self.baselines[state["prompt"]]
        sheet = state["prompt"], state["kind"], state["coeff"]  # one heat map
        both = [
            [int(self._both[(*sheet, k, r)]) for r in self.options["radius"]]
            for k in self.options["source_layer"]
        ]
        return {
            **{
                name: row[name]
                for name in ("text", "changed", "fluent", "norm", "relative", *GAUGES)
                if name != "variety"
            },
            "variety": self._variety[(*sheet, state["source_layer"], state["radius"])],
            "both": both,
            "of": len(self.vectors[state["kind"]]),
            "clean": base["clean"],
            "own_spread": base["own_spread"],
            "fluent_range": base["fluent"],
        }

    def _scale(self, name, log):
        """(low, high, {kind: histogram [BINS]}) of one gauge over the whole sweep, low and high on the scale it is drawn in."""
        parts = (
            {kind: part[name].to_numpy(float) for kind, part in self.rows.groupby("kind")}
            if name != "variety"
            else {
                kind: np.array([v for where, v in self._variety.items() if where[1] == kind])
                for kind in self.vectors
            }
        )
        everything = np.concatenate(list(parts.values()))
        everything = everything[np.isfinite(everything) & ((everything > 0) | (not log))]
        low, high = (everything.min(), everything.max()) if len(everything) else (0.0, 1.0)
        low, high = (low, high) if high > low else (low * 0.9, low * 1.1 + 1e-9)
        counts = {
            kind: np.histogram([place(v, low, high, log) for v in part if v == v], BINS, (0, 1))[0]
            for kind, part in parts.items()
        }
        return float(low), float(high), counts


def place(value, low, high, log=False) -> float:
    """Where `value` lies between low and high, 0 … 1, and at the nearer end when beyond; on a logarithmic scale if `log`."""
    if log:
        value, low, high = np.log(max(value, low)), np.log(low), np.log(high)
    return float(np.clip((value - low) / (high - low), 0, 1))
