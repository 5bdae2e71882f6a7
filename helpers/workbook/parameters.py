"""The parameters of a run: typed, from a recipe (a YAML file), or for another model by rule.

By rule, layers lie at the same fraction of the depth as in the default model, R is measured on the
model itself (Mack & Turner, Deep Causal Transcoding, 2024; a recipe may ask for it too: `RADIUS:
calibrated`, `RADII: calibrated`), and adapters and stored sweeps are left out.
"""

import ast
import math
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import yaml

from .. import UserError
from ..models.packaged import DEFAULT, PACKAGED
from .notebooks import parameters_of, read, resolve

DEPTH = 30  # blocks of the default model, for which the notebooks' own layers were chosen
LAYERS = ("SOURCE_LAYER", "TARGET_LAYER", "BLOCKS", "LAYERS", "SOURCES", "CONTROL_LAYER")
CALIBRATED = "calibrated"
PLACES = ("MODEL", "GRIDS")  # these may be folders
KINDS = {int: "a whole number", float: "a number", str: "text", list: "a list"}
KINDS[type(None)] = "text, or None"
SPREAD = (0.25, 0.5, 1, 2, 4, 8)  # RADII, as multiples of the calibrated radius


def _whole(least):
    return lambda value: isinstance(value, int) and value is not True and value >= least


def _finite(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def _one_of(*words):
    return lambda value: value in words, "one of " + ", ".join(map(repr, words))


LISTS = r"RADII|COEFFS|BLOCKS|LAYERS|SOURCES|(SWEEP_)?SEEDS"
RULES = {  # name: which values are right, and in words
    r"N_\w+|(\w+_)?STEPS|\w+_TOKENS|BASE_VECTORS": (_whole(1), "a whole number, 1 or more"),
    r"(\w+_)?SEEDS?|" + "|".join(LAYERS): (_whole(0), "a whole number, 0 or more"),
    r"(\w+_)?RADIUS|RADII": (lambda value: _finite(value) and value > 0, "a number above 0"),
    "COEFFS": (_finite, "a number"),
    "SPLIT": _one_of("train", "validation", "test"),
    "SWEEP": _one_of("stored", "live"),
    "PLACE": _one_of("source", "target"),
}


class UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that stands twice: of two, the last would win."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"the key {name!r} stands twice, again in line {line}")
            seen.add(name)
        return super().construct_mapping(node, deep)


def parse_value(text: str):
    """A value as typed: a Python literal where it is one, else the text itself."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def fitted(name: str, value, default):
    """A value typed or from a recipe, as the type of the notebook's own; UserError where it is none
    of that type. Text is kept as it stands where the default is text; elsewhere it is parsed."""
    parsed = parse_value(value) if isinstance(value, str) else value
    whole = isinstance(parsed, (int, float)) and not isinstance(parsed, bool) and parsed % 1 == 0
    if parsed == CALIBRATED and name in ("RADIUS", "RADII"):
        return parsed
    if parsed is None and (default is None or name.endswith("ORGANISM")):
        return None
    if isinstance(default, str | None) and isinstance(value, (str, int, float)):
        text = parsed if isinstance(parsed, str) else str(value)
        return _found(text) if name in PLACES or name.endswith("ORGANISM") else text
    if isinstance(default, list) and isinstance(parsed, list | tuple):
        return [fitted(name, item, default[0]) for item in parsed]
    if isinstance(default, int) and whole:
        return int(parsed)
    if isinstance(default, float) and isinstance(parsed, (int, float)) and parsed is not True:
        return float(parsed)
    kind = KINDS[type(default)]
    raise UserError(f"{name} is {value!r}: it has to be {kind}, such as {default!r}.")


def _found(text):
    """A folder that lies beside the person who typed it, for notebooks that run elsewhere."""
    path = Path(text).expanduser()
    known = text in PACKAGED or not (path.is_dir() or text.startswith("~"))
    return text if known else str(path.resolve())


def read_recipe(path) -> tuple[list | None, dict]:
    """(notebooks or None, parameters) of a YAML recipe: these two keys, or parameters alone."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        recipe = yaml.load(text, UniqueKeys)
    except OSError as error:
        raise UserError(f"Recipe {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"Recipe {path} is not valid YAML: {said}") from None
    if not isinstance(recipe, dict) or not all(isinstance(name, str) for name in recipe):
        raise UserError(f"Recipe {path} must be a mapping of parameter names to values.")
    if not {"notebooks", "parameters"} & set(recipe):
        return None, recipe
    names, parameters = recipe.pop("notebooks", None), recipe.pop("parameters", None) or {}
    if recipe or not isinstance(parameters, dict) or not isinstance(names, list | None):
        allowed = "a list 'notebooks' and a mapping 'parameters', and nothing beside them"
        raise UserError(f"Recipe {path} may hold {allowed}.")
    if names == []:
        raise UserError(f"Recipe {path}: its list 'notebooks' is empty; leave it out for all.")
    if names:  # as they stand there: to YAML, 00 is the number 0
        names = yaml.load(text, yaml.BaseLoader)["notebooks"]
    return names, parameters


def for_notebooks(paths, typed, recipe, model=None) -> dict:
    """{path: what this notebook gets}: by rule for `model`, then the recipe's, then those typed.

    UserError: a typed parameter that no notebook of this run has, one of the recipe that none has
    at all, a model that cannot be had or has not the layers.
    """
    asked, model = {**recipe, **typed}, None if model == DEFAULT else model and _found(model)
    if not (asked or model):
        return {path: {} for path in paths}
    own = {path: _own(path) for path in paths}
    _refuse_unknown(typed, own)
    _refuse_unknown(recipe, own | {path: _own(path) for path in resolve() if recipe})
    shares = {path: _known(asked, parameters) for path, parameters in own.items()}
    for path, share in shares.items():
        for name, value in share.items():
            share[name] = fitted(name, value, own[path][name])
    if model or CALIBRATED in asked.values():
        # in a process, whose memory is free again when the kernels start
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                return pool.submit(for_model, own, shares, model).result()
            except ValueError as error:  # no such model, a layer that it has not
                raise UserError(str(error)) from None
    return shares


def _own(path):
    try:
        return parameters_of(read(path))
    except (UserError, SyntaxError) as error:
        raise UserError(f"{path.stem} takes no parameters: {error}.") from None


def _refuse_unknown(values, notebooks):
    allowed = sorted(set().union(*notebooks.values()))
    for name in values:
        if name not in allowed:
            known = ", ".join(allowed) or "none"
            raise UserError(f"No notebook of this run has a parameter {name!r}; they have {known}.")


def _known(values, parameters):
    return {name: value for name, value in values.items() if name in parameters}


def for_model(own: dict, asked: dict, model: str | None) -> dict:
    """`for_notebooks` where a model has to be loaded: its depth moves the layers, and a radius
    measured on it (and printed) replaces "calibrated". own: {path: parameters as committed};
    asked: {path: those that replace them}."""
    from ..models import load

    first = next(path for path in own)
    lm = load(asked[first].get("MODEL") or model or own[first]["MODEL"])
    shares, measured = {}, cache(partial(calibrated, lm))
    for path, parameters in own.items():
        rule = by_rule(parameters, model, lm.n_layers) if model else {}
        share = _known({**rule, **asked[path]}, parameters)
        if CALIBRATED in share.values():
            values = {**parameters, **share}
            radii = measured(values["SOURCE_LAYER"], values["TARGET_LAYER"])
            share |= {k: v for k, v in radii.items() if share.get(k) == CALIBRATED}
        shares[path] = share
    return shares


def by_rule(parameters: dict, model: str, n_layers: int) -> dict:
    """What a notebook with these parameters is to run with on another model of n_layers blocks."""
    found = {"MODEL": model, "RADIUS": CALIBRATED, "RADII": CALIBRATED, "SWEEP": "live"}
    for name, value in parameters.items():
        if name.endswith("ORGANISM"):
            found[name] = None
        elif name in LAYERS:
            found[name] = scaled(value, n_layers)
    return found


def scaled(layers, n_layers: int):
    """A layer of the default model, or a list of them, at the same depth of n_layers blocks."""
    if isinstance(layers, list):
        return sorted({scaled(layer, n_layers) for layer in layers})
    return layers * n_layers // DEPTH


def calibrated(lm, source: int, target: int) -> dict:
    """RADIUS and RADII (2 digits) by the radius that the rule calibrates on three prompts."""
    from ..models import prompts
    from ..residual import LayerSpan
    from ..training import calibrated_radius

    chats = [lm.chat_prompt(text) for text in prompts.texts("everyday", split="train", n=3)]
    span = LayerSpan(lm, chats, source, target, target_positions=slice(-3, None))
    radius = calibrated_radius(span, n_directions=30)
    numbers = [float(f"{share * radius:.2g}") for share in (1, *SPREAD)]
    found = f"block {source} to {target}: the calibrated radius is {numbers[0]:g}"
    print(f"{lm.name}, {found}.", flush=True)
    return {"RADIUS": numbers[0], "RADII": numbers[1:]}


# What a notebook says first: which values it cannot run with, and layers for another depth.


def check(values: dict, lm=None, **least: int) -> None:
    """Refuse in one sentence, before anything is computed, a parameter that cannot be. values: the
    names of a notebook, globals(); lm: its model, which bounds layers and sets of vectors; least:
    smallest values of a notebook's own (fluency is read from the fifth token on), or how many a
    list has to hold."""
    for name, value in values.items():
        rule = next((rule for pattern, rule in RULES.items() if re.fullmatch(pattern, name)), None)
        if rule:
            _check_one(name, value, *rule)
    for name, number in least.items():
        value = values[name]
        if (len(value) if isinstance(value, list) else value) < number:
            raise UserError(f"{name} is {value!r}: here it has to be {number} or more.")
    if lm is None:
        return
    depth = f"the model has {lm.n_layers} blocks, 0 … {lm.n_layers - 1}"
    source, target = values["SOURCE_LAYER"], values["TARGET_LAYER"]
    if not source < target < lm.n_layers:
        layers = f"SOURCE_LAYER {source} and TARGET_LAYER {target}"
        raise UserError(f"{layers} do not fit: {depth}, and the source comes before the target.")
    if values.get("N_VECTORS", 1) > lm.d_model:
        most = f"{lm.d_model} orthogonal ones at most, one for each dimension"
        raise UserError(f"N_VECTORS is {values['N_VECTORS']}: there are {most}.")


def _check_one(name, value, good, words):
    if not re.fullmatch(LISTS, name):
        right, words = good(value), f"it has to be {words}"
    else:
        right = isinstance(value, list) and len(value) > 0 and all(map(good, value))
        words = f"it has to be a list of one or more, each {words}"
        if right and len(set(value)) < len(value):
            right, words = False, "each value may stand in it once"
    if not right:
        raise UserError(f"{name} is {value!r}: {words}.")


def at_depth(layers: list[int], lm, below: int | None = None) -> list[int]:
    """`layers`, or where the model has not all of them (below `below`), those at the same depth
    as in the default model; a line says so."""
    below = lm.n_layers if below is None else below
    if max(layers) < below:
        return layers
    found = [k for k in scaled(layers, lm.n_layers) if k < below]
    if not found:
        raise UserError(f"Layers {layers}: none lies below {below}, at any depth of the model.")
    print(f"Layers {layers} do not all lie below {below}; taken at the same depth: {found}.")
    return found
