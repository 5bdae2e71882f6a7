"""The parameters of a run: typed, from a recipe (a YAML file), or for another model by rule.

By rule, layers lie at the same fraction of the depth as in the default model, R is measured on the
model itself (Mack & Turner, Deep Causal Transcoding, 2024; a recipe may ask for it too: `RADIUS:
calibrated`, `RADII: calibrated`), and adapters and stored sweeps are left out.
"""

import ast
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import yaml

from .. import UserError
from .notebooks import parameters_of, read, resolve

DEPTH = 30  # blocks of the default model, for which the notebooks' own layers were chosen
LAYERS = ("SOURCE_LAYER", "TARGET_LAYER", "BLOCKS", "LAYERS", "SOURCES", "CONTROL_LAYER")
CALIBRATED = "calibrated"
SPREAD = (0.25, 0.5, 1, 2, 4, 8)  # RADII, as multiples of the calibrated radius


def parse_value(text: str):
    """A value as typed: a Python literal where it is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_recipe(path) -> tuple[list | None, dict]:
    """(notebooks or None, parameters) of a YAML recipe: these two keys, or parameters alone."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
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
    return names, parameters


def for_notebooks(paths, typed, recipe, model=None) -> dict:
    """{path: what this notebook gets}: by rule for `model`, then the recipe's, then those typed.

    UserError: a typed parameter that no notebook of this run has, one of the recipe that none has
    at all, a model that cannot be had or has not the layers.
    """
    from ..models import DEFAULT

    asked, model = {**recipe, **typed}, None if model == DEFAULT else model
    if not (asked or model):
        return {path: {} for path in paths}
    own = {path: _own(path) for path in paths}
    _refuse_unknown(typed, own)
    _refuse_unknown(recipe, own | {path: _own(path) for path in resolve() if recipe})
    if model or CALIBRATED in asked.values():
        # in a process, whose memory is free again when the kernels start
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                return pool.submit(for_model, own, asked, model).result()
            except ValueError as error:  # no such model, a layer that it has not
                raise UserError(str(error)) from None
    return {path: _known(asked, parameters) for path, parameters in own.items()}


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
    measured on it (and printed) replaces "calibrated". own: {path: parameters as committed}."""
    from ..models import load

    lm = load(asked.get("MODEL") or model or next(iter(own.values()))["MODEL"])
    shares, measured = {}, cache(partial(calibrated, lm))
    for path, parameters in own.items():
        rule = by_rule(parameters, model, lm.n_layers) if model else {}
        share = _known({**rule, **asked}, parameters)
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
        elif name in LAYERS and isinstance(value, list):
            found[name] = sorted({k * n_layers // DEPTH for k in value})
        elif name in LAYERS:
            found[name] = value * n_layers // DEPTH
    return found


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
