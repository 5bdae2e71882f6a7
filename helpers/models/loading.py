"""Load a language model: a packaged one, a tiny random one, a folder, or one on the hub."""

import hashlib
import inspect
import json
import os
import re
from pathlib import Path

import torch
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .. import DATA
from .language_model import LanguageModel
from .obtain import ModelError, brief, in_one_sentence, packaged_folder, quiet
from .packaged import DEFAULT, PACKAGED

TINY = "tiny-random"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name: str = DEFAULT, organism: str | None = None, *, device=None, dtype=None
) -> LanguageModel:
    """A model ready to run: a packaged one, "tiny-random", a folder, or "owner/name" on the hub.

    organism: name of a LoRA adapter in data/organisms/, or the folder of one trained for another
    model; it is folded into the weights, and within `lm.base()` the model runs without it.
    device: default CUDA if there is one. dtype: "float32",
    "bfloat16", "float16" or the torch dtype; default float32, but bfloat16 on CUDA from 1e9
    parameters on. Raises ModelError, in one sentence, for whatever cannot be had.
    """
    name, device, dtype = str(name), _device(device), _dtype(dtype)
    folder = Path(os.path.expanduser(name))
    if name == TINY:
        lm = _tiny(dtype or torch.float32)
    elif name in PACKAGED:
        lm = _pretrained(packaged_folder(name), name, device, dtype)
        lm.weights_hash = PACKAGED[name].sha256  # as published: the converted copy follows from it
    elif name and os.path.isdir(folder):  # Path("") would be the working folder
        lm = _pretrained(folder, name, device, dtype)
        lm.weights_hash = _hash_files(_weight_files(folder))
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        lm = _pretrained(name, name, device, dtype)
    else:
        raise ModelError(
            f"There is no model {name!r}: use {', '.join([*PACKAGED, TINY])}, an existing folder "
            f'(seen from {os.getcwd()}), or "owner/name" on the hub.'
        )
    if organism is not None:
        with in_one_sentence(f"the organism {organism}", DATA / "organisms", own=True):
            with_adapter(lm, _adapter_folder(lm, organism), organism)
    with in_one_sentence(name, folder, own=True):  # no memory, or a kind that nobody thought of
        lm.model.to(device).eval().requires_grad_(False)
        _check_numbers(lm)
        _check_causal(lm)
    return lm


def random_weights_(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill `model` in place with seeded random weights that keep activations of order 1; the global
    generator is left alone. Biases and norms vary too, so that nothing is trivially symmetric."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                mean, spread = 0.0 if name.endswith("bias") else 1.0, 0.1
            else:  # a variance of 1 in gives about 1 out
                mean, spread = 0.0, 1.0 if id(weight) in embeddings else weight.shape[-1] ** -0.5
            weight.normal_(mean, spread, generator=generator)
    return model


def _tiny(dtype) -> LanguageModel:
    """A 6-block Llama of width 32 that reads bytes: random, always the same, without a network."""
    tokenizer = byte_tokenizer()
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=6)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    settings = dict(vocab_size=len(tokenizer), **sizes, **heads)
    for kind in ("bos", "eos", "pad"):
        settings[f"{kind}_token_id"] = getattr(tokenizer, f"{kind}_token_id")
    with torch.random.fork_rng(devices=[]):  # building the layers draws from the global generator
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    random_weights_(model, seed=0).to(dtype)
    made_of = json.dumps(["llama", settings, "seed 0"])
    return LanguageModel(TINY, model, tokenizer, hashlib.sha256(made_of.encode()).hexdigest())


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes and three special tokens, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    message = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    answer = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + message + "{% endfor %}" + answer
    return tokenizer


def _pretrained(source, name: str, device, dtype) -> LanguageModel:
    """Load a folder or a hub name: safetensors only, no code from there, no weight left random."""
    local = isinstance(source, Path)
    place = source if local else Path(HF_HUB_CACHE, "models--" + name.replace("/", "--"))
    options = dict(trust_remote_code=False, local_files_only=local)
    with in_one_sentence(name, place, own=local and name not in PACKAGED), quiet():
        if local:
            _check_folder(source)
        config = transformers.AutoConfig.from_pretrained(source, **options)
        _check_config(config, name)  # before its weights are fetched
        if dtype is None:
            dtype = _default_dtype(config, device)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    missing = sorted(map(str, info["missing_keys"] or info["mismatched_keys"]))
    if missing:  # transformers would fill them with random numbers
        raise ModelError(
            f"{name} lacks {len(missing)} of its weights ({missing[0]}…): "
            "it is not a whole causal language model."
        )
    commit = getattr(model.config, "_commit_hash", None)
    return LanguageModel(name, model, tokenizer, commit or "unknown")


def _check_folder(folder: Path):
    """Refuse pointers of Git LFS, and an adapter, which transformers would load onto its base."""
    read = [p for p in folder.iterdir() if p.suffix in (".json", ".model", ".jinja", ".txt")]
    for path in [*read, *_weight_files(folder)]:
        _check_whole(path)
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json): give the folder of a whole model."
        )


def _check_whole(path: Path):
    start = b"version https://git-lfs.github.com"
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(start)) == start:
                raise ModelError(
                    f"{path} is a pointer of Git LFS, not the file itself: "
                    f"run `git lfs pull` in {path.parent}."
                )


def _weight_files(folder: Path) -> list[Path]:
    """The model's own weights, as transformers finds them: vectors may lie beside them."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        _check_whole(index)
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / file for file in sorted(files)]
    return sorted(folder.glob("*.safetensors"))  # under a name that its config gives


def _check_config(config, name: str):
    """Refuse what cannot work by its config; other models are asked themselves: `_check_causal`."""
    kind = config.model_type
    if config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder model ({kind}): use a decoder-only model.")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise ModelError(
            f"{name} ({kind}) is not a decoder-only language model that transformers knows."
        )
    if "past_key_values" not in inspect.signature(model_class.forward).parameters:
        raise ModelError(
            f"{name} has no key-value cache, it is a state space model or another kind without "
            f"attention over one ({kind}): use a decoder-only transformer."
        )


def _default_dtype(config, device):
    if device.type != "cuda":
        return torch.float32
    with torch.device("meta"):  # counts parameters without making them
        n_parameters = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
    return torch.float32 if n_parameters < 1e9 else torch.bfloat16


@torch.no_grad()
def _check_numbers(lm: LanguageModel):
    """Refuse weights that are not finite numbers, which every result would inherit."""
    for name, weight in lm.model.named_parameters():
        if weight.dtype in DTYPES.values() and weight.numel():
            if not torch.stack(weight.aminmax()).isfinite().all():
                raise ModelError(
                    f"{lm.name} has weights that are NaN or infinite ({name}, as {weight.dtype}): "
                    "take whole files, or load it with dtype float32."
                )


@torch.no_grad()
def _check_causal(lm: LanguageModel):
    """Refuse a model whose earlier tokens see later ones, or padding.

    Asked of the model itself, because its config does not tell: BERT loads as a "causal" model,
    GPT-NeoX says is_decoder=False, hybrids with recurrence heed the mask or not.
    """
    ids, states = torch.tensor([[5, 6, 7], [5, 6, 8]], device=lm.device), []
    with lm.blocks[0].register_forward_hook(lambda *call: states.append(call[-1])):
        one, other = lm.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    shape = tuple((states[0] if torch.is_tensor(states[0]) else states[0][0]).shape)
    if shape != (*ids.shape, lm.d_model):
        raise ModelError(
            f"The blocks of {lm.name} hand on a stack of streams, shape {shape} for two prompts "
            "of three tokens: use a decoder-only model with one residual stream."
        )
    if not (one.isfinite().all() and other.isfinite().all()):
        raise ModelError(f"{lm.name} gives NaN in {lm.dtype}: load it with dtype float32.")
    if (one - other).abs().max() > 1e-4 * one.abs().max():
        raise ModelError(
            f"{lm.name} is an encoder, its earlier tokens see the later ones: "
            "use a decoder-only model."
        )
    if "input_ids" not in inspect.signature(lm.decoder.forward).parameters:
        raise ModelError(
            f"{lm.name} is an encoder set up as a decoder ({type(lm.decoder).__name__}): "
            "use a decoder-only model."
        )
    pad = lm.tokenizer.pad_token_id
    padded_too = {
        "input_ids": torch.tensor([[5, 6, 7], [pad, 5, 6]], device=lm.device),
        "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]], device=lm.device),
        "position_ids": torch.tensor([[0, 1, 2], [0, 0, 1]], device=lm.device),
    }
    alone, padded = lm.decoder(**padded_too, use_cache=False)[0].float()
    allowed = 1e-2 if lm.dtype is torch.float32 else 0.1
    if (alone[:2] - padded[1:]).abs().max() > allowed * alone.abs().max():
        raise ModelError(
            f"{lm.name} is changed by left padding, which batches of prompts need (a recurrent "
            "state that heeds no mask, for one): use a decoder-only transformer."
        )


def with_adapter(lm: LanguageModel, folder: Path, organism: str) -> LanguageModel:
    """`lm` itself, the LoRA adapter in `folder` added to its weights bit for bit as PEFT does it.
    An adapted layer keeps the weight that it had as `base_weight`: a buffer moves with the model,
    and this one is not saved."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    with quiet(), torch.random.fork_rng(devices=[]):  # PEFT draws weights that it then overwrites
        wrapped = PeftModel.from_pretrained(lm.model, str(folder))
    for module in wrapped.modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            layer.register_buffer("base_weight", layer.weight.detach().clone(), persistent=False)
    lm.model, lm.organism = wrapped.merge_and_unload(), organism
    return lm


def _adapter_folder(lm: LanguageModel, organism: str) -> Path:
    """Where the adapter lies, checked to be made for exactly these weights."""
    there = sorted(card.parent.name for card in (DATA / "organisms").glob("*/card.json"))
    folder = DATA / "organisms" / organism
    if Path(organism, "card.json").is_file():
        folder = Path(organism)
    elif organism not in there:
        raise ModelError(
            f"There is no model organism {organism!r}: data/organisms has "
            f"{', '.join(there) or 'none yet'}; python -m helpers train-organism {organism} makes "
            "one that has a recipe."
        )
    made_for = json.loads((folder / "card.json").read_text(encoding="utf-8")).get("base_hash")
    if made_for != lm.weights_hash:
        raise ModelError(
            f"There is no organism {organism!r} for {lm.name} (hash {lm.weights_hash[:12]}): "
            f"the one in data/organisms was trained on a base with hash {str(made_for)[:12]}; "
            f"python -m helpers train-organism {organism} --model {lm.name} trains one."
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"Organism {organism!r} has no adapter_model.safetensors: train it again.")
    _check_whole(folder / "adapter_model.safetensors")
    return folder


def _hash_files(paths) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)  # goes on with the same digest
    return digest.hexdigest()


def _device(device) -> torch.device:
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ModelError(
            f'The device {device!r} cannot be used here ({brief(error)}): use "cpu" or "cuda".'
        ) from None
    return device


def _dtype(dtype):
    known = DTYPES.get(dtype, dtype)
    if known is not None and known not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}, or None.")
    return known
