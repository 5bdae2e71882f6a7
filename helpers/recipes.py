"""Recipes: the notebooks' parameters for other models (data/recipes/*.yaml), and the memory that a model will need.

    python -m helpers run -f data/recipes/qwen2.5-0.5b-instruct.yaml

Layers lie at the same fraction of the depth as in the default model. `RADIUS: calibrated` and `RADII: calibrated` are filled in
by the rule of Deep Causal Transcoding (Mack & Turner 2024), measured on the model itself: a radius belongs to a model.
"""
import json
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "data" / "recipes"
DEPTH = 30  # blocks of the default model, for which the notebooks' own layers were chosen
CALIBRATED = "calibrated"
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
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
        weights = {id(p): p for p in model.parameters()}

        def pack(x):
            nonlocal kept
            base = x if x._base is None else x._base
            kept += 0 if id(base) in weights else x.numel() * x.element_size()
            return x

        config = config.get_text_config()
        hidden = torch.zeros(1, n_tokens, config.hidden_size, dtype=getattr(torch, dtype), requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.get_decoder()(inputs_embeds=hidden, use_cache=False)
    depth = config.num_hidden_layers
    first, last = (layer(k, depth) if given is None else given for k, given in ((7, source_layer), (21, target_layer)))
    return {"parameters": sum(p.numel() for p in weights.values()), "vector": kept * (last - first) // depth,
            "weights": sum(p.numel() * p.element_size() for p in weights.values())}


@lru_cache
def expected(model, n_tokens=40) -> str:
    """What a recipe says about the memory of its model, by `memory`: two lines."""
    wide, half = (memory(config_of(model), dtype, n_tokens=n_tokens) for dtype in ("float32", "bfloat16"))
    lines = {f"{wide['parameters']:,} parameters": ("weights", 1e9, ".1f", "GB"),
             f"A vector in training, {n_tokens} tokens": ("vector", 1e6, ".0f", "MB")}
    return "\n".join(f"# {what}: {wide[key] / unit:{form}} {name} in float32, {half[key] / unit:{form}} {name} in bfloat16."
                     for what, (key, unit, form, name) in lines.items())


def fits(model, budget=24e9, dtype="bfloat16", n_tokens=40) -> int:
    """How many vectors go into one chunk on a card of `budget` bytes: half of what the weights leave free, as in LayerSpan."""
    need = memory(config_of(model), dtype, n_tokens=n_tokens)
    return min(512, max(0, int((budget - need["weights"]) // 2 // need["vector"])))


def resolve(parameters, n_directions=30) -> dict:
    """The parameters with "calibrated" replaced by numbers (2 digits), measured on the model they name; says which they are."""
    wanted = [name for name in ("RADIUS", "RADII") if parameters.get(name) == CALIBRATED]
    if not wanted:
        return parameters
    from . import goldilocks, prompts
    from .models import DEFAULT, ModelError, load
    from .notebooks import UserError
    from .residual import LayerSpan
    try:
        lm = load(parameters.get("MODEL", DEFAULT))
        layers = [parameters.get(name, layer(k, lm.n_layers)) for name, k in (("SOURCE_LAYER", 7), ("TARGET_LAYER", 21))]
        chats = [lm.chat_prompt(text) for text in prompts.texts("everyday", split="train", n=3)]
        span = LayerSpan(lm, chats, *layers, target_positions=slice(-3, None))
        radius = goldilocks.calibrated_radius(span, n_directions=n_directions)
    except (ModelError, ValueError) as error:  # no such model, a layer that it has not
        raise UserError(str(error)) from None
    found = {"RADIUS": float(f"{radius:.2g}"), "RADII": [float(f"{share * radius:.2g}") for share in SPREAD]}
    print(f"{lm.name}, block {layers[0]} to {layers[1]}: the calibrated radius is {found['RADIUS']:g}.")
    return {**parameters, **{name: found[name] for name in wanted}}
