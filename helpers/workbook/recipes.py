"""Recipes: the notebooks' parameters for other models (data/recipes/*.yaml), and the memory that a model will need.

    python -m helpers run -f data/recipes/qwen2.5-0.5b-instruct.yaml
    python -m helpers.recipes                  # a table: what each model needs, and how many vectors fit on a card of 24 GB
    python -m helpers.recipes --write          # after a notebook got new parameters: the recipes again, by the same rules

Layers lie at the same fraction of the depth as in the default model. `RADIUS: calibrated` and `RADII: calibrated` are filled in
by the rule of Deep Causal Transcoding (Mack & Turner 2024), measured on the model itself: a radius belongs to a model.
`ORGANISM: null` is the model as it is: adapters are made for the default model alone.
"""

import argparse
import json
import sys
from functools import lru_cache

from .. import DATA

FOLDER = DATA / "recipes"
DEPTH = 30  # blocks of the default model, for which the notebooks' own layers were chosen
CALIBRATED = "calibrated"
LAYERS = (
    "SOURCE_LAYER",
    "TARGET_LAYER",
    "BLOCKS",
    "LAYERS",
    "SOURCES",
    "CONTROL_LAYER",
)  # parameters that are blocks
WHY = {
    "SOURCE_LAYER": "of {n} blocks: the depth of 7 and 21 of 30",
    "ORGANISM": "the model as it is, without an adapter",
    "RADIUS": "measured on this model before the notebooks run; a number of your own wins",
    "RADII": "multiples of it",
    "SWEEP": "the stored sweeps are the default model's",
}
SPREAD = (0.25, 0.5, 1, 2, 4, 8)  # RADII as multiples of the calibrated radius


def layer(k, n_layers) -> int:
    """The block that lies as deep in a model of n_layers as block k in the default one."""
    return k * n_layers // DEPTH


def shapes() -> dict:
    """{model: the part of its published config that says how large it is}, of data/recipes/shapes.json."""
    return json.loads((FOLDER / "shapes.json").read_text(encoding="utf-8"))


def config_of(model):
    """The transformers config of a model in shapes.json."""
    import transformers

    shape = dict(shapes()[model])
    return transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)


def memory(config, dtype="float32", source_layer=None, target_layer=None, n_tokens=40) -> dict:
    """What a model of this transformers config takes, in bytes, counted on tensors without storage (nothing is loaded).

    Returns {"parameters" (a count), "weights", "vector": activations kept for the gradient of one vector over one prompt of
    n_tokens, from source to target}. Gradients of other things are not taken; a step holds `vector` for each vector of a chunk.
    """
    import torch
    import transformers
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept = 0
    with FakeTensorMode():
        model = (
            transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            .eval()
            .requires_grad_(False)
        )
        weights = {id(p): p for p in model.parameters()}

        def pack(x):
            nonlocal kept
            base = x if x._base is None else x._base
            kept += 0 if id(base) in weights else x.numel() * x.element_size()
            return x

        config = config.get_text_config()
        hidden = torch.zeros(
            1, n_tokens, config.hidden_size, dtype=getattr(torch, dtype), requires_grad=True
        )
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.get_decoder()(inputs_embeds=hidden, use_cache=False)
    depth = config.num_hidden_layers
    first, last = (
        layer(k, depth) if given is None else given
        for k, given in ((7, source_layer), (21, target_layer))
    )
    return {
        "parameters": sum(p.numel() for p in weights.values()),
        "vector": kept * (last - first) // depth,
        "weights": sum(p.numel() * p.element_size() for p in weights.values()),
    }


@lru_cache
def expected(model, n_tokens=40) -> str:
    """What a recipe says about the memory of its model, by `memory`: two lines."""
    wide, half = (
        memory(config_of(model), dtype, n_tokens=n_tokens) for dtype in ("float32", "bfloat16")
    )
    lines = {
        f"{wide['parameters']:,} parameters": ("weights", 1e9, ".1f", "GB"),
        f"A vector in training, {n_tokens} tokens": ("vector", 1e6, ".0f", "MB"),
    }
    return "\n".join(
        f"# {what}: {wide[key] / unit:{form}} {name} in float32, {half[key] / unit:{form}} {name} in bfloat16."
        for what, (key, unit, form, name) in lines.items()
    )


def fits(model, budget=24e9, dtype="bfloat16", n_tokens=40) -> int:
    """How many vectors go into one chunk on a card of `budget` bytes: half of what the weights leave free, as in LayerSpan."""
    need = memory(config_of(model), dtype, n_tokens=n_tokens)
    return min(512, max(0, int((budget - need["weights"]) // 2 // need["vector"])))


def table(budget=24e9, n_vectors=512, n_tokens=40, models=None) -> str:
    """What each recipe's model needs in bfloat16, and in how many chunks `n_vectors` train on a card of `budget` bytes: text."""
    lines = [
        f"bfloat16, prompts of {n_tokens} tokens, a card of {budget / 1e9:g} GB (counted from configs; times: not measured)",
        f"{'model':36s}{'parameters':>15s}{'weights':>10s}{'a vector':>10s}{'at once':>9s}{f'{n_vectors} vectors':>16s}",
    ]
    for model in models or shapes():
        need, chunk = (
            memory(config_of(model), "bfloat16", n_tokens=n_tokens),
            fits(model, budget, n_tokens=n_tokens),
        )
        chunks = f"{-(-n_vectors // chunk)} chunks" if chunk else "do not fit"
        lines.append(
            f"{model:36s}{need['parameters']:15,}{need['weights'] / 1e9:7.1f} GB{need['vector'] / 1e6:7.0f} MB{chunk:9d}"
            f"{chunks:>16s}"
        )
    return "\n".join(lines)


def parameters_for(model) -> dict:
    """A recipe's parameters, from those that the notebooks have: their blocks moved to the same depth, R to be measured, no
    adapter, no stored sweep."""
    from . import notebooks

    depth, found = config_of(model).get_text_config().num_hidden_layers, {"MODEL": model}
    known = {}
    for path in notebooks.resolve():
        known = {
            **notebooks.parameters_of(notebooks.read(path)),
            **known,
        }  # the first notebook that has one decides
    for name in LAYERS:
        if isinstance(known.get(name), list):
            found[name] = sorted({layer(k, depth) for k in known[name]})
        elif name in known:
            found[name] = layer(known[name], depth)
    found |= {name: None for name in known if name.endswith("ORGANISM")}
    found |= {name: CALIBRATED for name in ("RADIUS", "RADII") if name in known}
    return found | {name: "live" for name in ("SWEEP",) if name in known}


def text(path, model) -> str:
    """The text of a recipe: what its file says before the parameters, then the parameters by rule."""
    depth, lines = config_of(model).get_text_config().num_hidden_layers, []
    for name, value in parameters_for(model).items():
        shown = value if isinstance(value, str) else json.dumps(value)
        why = f"# {WHY[name].format(n=depth)}" if name in WHY else ""
        lines.append(f"  {name}: {shown}".ljust(23 * bool(why)) + why)
    return (
        path.read_text(encoding="utf-8").split("parameters:\n")[0]
        + "\n".join(["parameters:", *lines])
        + "\n"
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.recipes", description=__doc__.split(":")[0] + "."
    )
    parser.add_argument(
        "--card", type=float, default=24, metavar="GB", help="memory of the card (default: 24)"
    )
    parser.add_argument("--vectors", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the recipes' parameters again, from the notebooks'",
    )
    options = parser.parse_args(argv)
    if options.write:
        from ..ledger import write_atomically
        from .runner import read_recipe

        for path in sorted(FOLDER.glob("*.yaml")):
            write_atomically(path, text(path, read_recipe(path)[1]["MODEL"]))
            print(f"wrote {path.name}")
    else:
        print(table(options.card * 1e9, options.vectors, options.tokens))
    return 0


def resolve(parameters, n_directions=30) -> dict:
    """The parameters with "calibrated" replaced by numbers (2 digits), measured on the model they name; says which they are."""
    wanted = [name for name in ("RADIUS", "RADII") if parameters.get(name) == CALIBRATED]
    if not wanted:
        return parameters
    from .. import UserError
    from ..models import prompts
    from ..models.loading import load
    from ..models.obtain import DEFAULT, ModelError
    from ..residual.span import LayerSpan
    from ..training import jacobian

    try:
        lm = load(parameters.get("MODEL", DEFAULT))
        layers = [
            parameters.get(name, layer(k, lm.n_layers))
            for name, k in (("SOURCE_LAYER", 7), ("TARGET_LAYER", 21))
        ]
        chats = [lm.chat_prompt(text) for text in prompts.texts("everyday", split="train", n=3)]
        span = LayerSpan(lm, chats, *layers, target_positions=slice(-3, None))
        radius = jacobian.calibrated_radius(span, n_directions=n_directions)
    except (ModelError, ValueError) as error:  # no such model, a layer that it has not
        raise UserError(str(error)) from None
    found = {
        "RADIUS": float(f"{radius:.2g}"),
        "RADII": [float(f"{share * radius:.2g}") for share in SPREAD],
    }
    print(
        f"{lm.name}, block {layers[0]} to {layers[1]}: the calibrated radius is {found['RADIUS']:g}."
    )
    return {**parameters, **{name: found[name] for name in wanted}}


if __name__ == "__main__":
    sys.exit(main())
