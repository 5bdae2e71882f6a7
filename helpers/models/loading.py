"""Obtain and load a language model, find its blocks whatever its architecture, and write prompts for it.

lm = load()                          # SmolLM2-135M-Instruct: fetched once, then read from data/cache/
batch = lm.encode(lm.chat_prompt("How do I mend a puncture?"))
"""

import hashlib
import inspect
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from .. import DATA
from .obtain import DEFAULT, SHA256, ModelError, brief, default_folder, quiet, why

TINY = "tiny-random"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(eq=False)  # a model is itself: usable as a key
class LanguageModel:
    """A frozen decoder-only model in eval mode, with its tokenizer (left padding).

    `weights_hash` says which weights these are: the SHA-256 of the weight files, or the commit on the hub.
    """

    name: str
    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    weights_hash: str
    organism: str | None = None

    def __post_init__(self):
        tokenizer, generation = self.tokenizer, getattr(self.model, "generation_config", None)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        if generation is not None and generation.pad_token_id is None:
            generation.pad_token_id = tokenizer.pad_token_id
        self.model.eval().requires_grad_(False)

    @property
    def decoder(self) -> torch.nn.Module:
        """The module that directly holds the list of blocks (LlamaModel, GPT2Model…)."""
        return self._decoder_and_blocks()[0]

    @property
    def blocks(self) -> torch.nn.ModuleList:
        """The decoder blocks, in order; block k's output is `resid_post[k]`."""
        return self._decoder_and_blocks()[1]

    def _decoder_and_blocks(self):
        # A PEFT wrapper is looked through; get_decoder() passes by the vision tower of a multimodal model, whose
        # block list may be just as long. The outermost list wins: lists of experts lie inside the blocks.
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        n_layers = self._config.num_hidden_layers
        for root in (inner.get_decoder() if hasattr(inner, "get_decoder") else inner, inner):
            for module in root.modules() if root is not None else ():
                for child in module.children():
                    if isinstance(child, torch.nn.ModuleList) and len(child) == n_layers:
                        return module, child
        raise ModelError(
            f"{self.name} ({type(inner).__name__}) has no list of {n_layers} decoder blocks; "
            "use a decoder-only model of transformers."
        )

    @property
    def _config(self):
        return self.model.config.get_text_config()

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return self._config.hidden_size

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def chat_prompt(self, text: str, system: str | None = None) -> str:
        """The user's `text` in the model's chat template, ready for the answer.

        A model without a template gets the plain text, the system prompt on a line of its own before it.
        """
        _check_text(text, "The text of a chat prompt")
        if self.tokenizer.chat_template is None:
            return text if system is None else f"{system}\n{text}"
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": text})
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except (
            Exception
        ) as error:  # the template's own raise_exception("System role not supported"), for one
            raise ModelError(
                f"The chat template of {self.name} refuses this prompt "
                f"({'no' if system is None else 'with a'} system prompt): {brief(error)}."
            ) from None

    def encode(self, prompts: str | list[str]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` [n_prompts, n_tokens], padded on the left, on the model's device.

        The tokenizer's special tokens are added, except to a text that already has them: one that begins with the
        bos token or with the opening of the chat template (two bos tokens would change every activation).
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError(
                "There is no prompt to encode: give a string or a non-empty list of strings."
            )
        for index, text in enumerate(prompts):
            _check_text(text, f"Prompt {index}")
        openings = self._openings()
        rows = [
            self.tokenizer(text, add_special_tokens=not text.startswith(openings))["input_ids"]
            for text in prompts
        ]
        if not all(rows):
            raise ValueError(
                f"Prompt {rows.index([])} has no tokens in the vocabulary of {self.name}."
            )
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        ids = [[pad] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return {
            "input_ids": torch.tensor(ids, device=self.device),
            "attention_mask": torch.tensor(mask, device=self.device),
        }

    def _openings(self) -> tuple[str, ...]:
        """What a text that needs no special tokens begins with."""
        openings = {self.tokenizer.bos_token}
        if self.tokenizer.chat_template is not None:
            openings.add(os.path.commonprefix([self.chat_prompt("a"), self.chat_prompt("b")]))
            try:
                openings.add(
                    os.path.commonprefix([self.chat_prompt("a", "c"), self.chat_prompt("a", "d")])
                )
            except ModelError:  # a template without system prompts
                pass
        return tuple(opening for opening in openings if opening)

    @contextmanager
    def base(self):
        """Within it the model runs without its adapter; without an adapter it changes nothing."""
        if not hasattr(self.model, "disable_adapter"):
            yield self
            return
        try:
            with self.model.disable_adapter():
                yield self
        finally:
            self.model.requires_grad_(
                False
            )  # PEFT switches the adapter's gradients on when it enables it again


def load(
    name: str = DEFAULT, organism: str | None = None, *, device=None, dtype=None
) -> LanguageModel:
    """A model ready to run: the default one, "tiny-random" (no network), a local folder, or "owner/name" on the hub.

    organism: name of a LoRA adapter in data/organisms/. device: default CUDA if there is one. dtype: "float32",
    "bfloat16", "float16" or the torch dtype; default float32, but bfloat16 on CUDA from 1e9 parameters on.
    Raises ModelError, in one sentence, for whatever cannot be had.
    """
    name, device, dtype = str(name), _device(device), _dtype(dtype)
    if name == TINY:
        lm = _tiny(dtype or torch.float32)
    elif name == DEFAULT:
        lm = _pretrained(default_folder(), name, device, dtype)
        lm.weights_hash = SHA256  # of the file as published: the de-quantised copy follows from it
    elif name and Path(name).is_dir():  # Path("") would be the working folder
        lm = _pretrained(Path(name), name, device, dtype)
        lm.weights_hash = _hash_files(sorted(Path(name).glob("*.safetensors")))
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        lm = _pretrained(name, name, device, dtype)
    else:
        raise ModelError(
            f'There is no model {name!r}: use "{DEFAULT}", "{TINY}", an existing folder or "owner/name" on the hub.'
        )
    if organism is not None:
        lm.model, lm.organism = _adapted(lm, organism), organism
    lm.model.to(device).eval().requires_grad_(False)
    _check_causal(lm)
    return lm


def random_weights_(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill `model` in place with seeded random weights that keep activations of order 1; the global RNG is left alone.

    Biases and norm weights are random too, so that a test on such a model is not trivially symmetric.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_(0.0 if name.endswith("bias") else 1.0, 0.1, generator=generator)
            else:  # a variance of 1 in gives about 1 out
                weight.normal_(
                    0.0,
                    1.0 if id(weight) in embeddings else weight.shape[-1] ** -0.5,
                    generator=generator,
                )
    return model


def _tiny(dtype) -> LanguageModel:
    """A 6-block Llama of width 32 that reads bytes: random, always the same, and there without a network."""
    tokenizer = byte_tokenizer()
    settings = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # building the layers draws from the global generator
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    random_weights_(model, seed=0).to(dtype)
    return LanguageModel(
        TINY,
        model,
        tokenizer,
        hashlib.sha256(json.dumps(["llama", settings, "seed 0"]).encode()).hexdigest(),
    )


def byte_tokenizer():
    """A tokenizer of the 256 bytes and three special tokens, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _pretrained(source, name: str, device, dtype) -> LanguageModel:
    """Load a folder or a hub name: safetensors only, no code from the repository, no weight left at random."""
    options = dict(trust_remote_code=False, local_files_only=isinstance(source, Path))
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(source, **options)
            _check_config(config, name)  # before its weights are fetched
            if dtype is None:
                dtype = _default_dtype(config, device)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(why(error, name, source)) from None
    if (
        info["missing_keys"] or info["mismatched_keys"]
    ):  # transformers would fill them with random numbers
        missing = sorted(map(str, info["missing_keys"] or info["mismatched_keys"]))
        raise ModelError(
            f"{name} lacks {len(missing)} of its weights ({missing[0]}…): it is not a whole causal language model."
        )
    return LanguageModel(
        name, model, tokenizer, getattr(model.config, "_commit_hash", None) or "unknown"
    )


def _check_config(config, name: str):
    """Refuse what cannot work by what its config says; other models are asked themselves, by `_check_causal`."""
    kind, classes = (
        config.model_type,
        getattr(transformers.AutoModelForCausalLM, "_model_mapping", {}),
    )
    if config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder model ({kind}): use a decoder-only model.")
    if any(
        architecture.endswith("ForMaskedLM")
        for architecture in getattr(config, "architectures", None) or ()
    ):
        raise ModelError(
            f"{name} is an encoder ({kind}), its earlier tokens see the later ones: use a decoder-only model."
        )
    if (
        type(config) in classes
        and "past_key_values" not in inspect.signature(classes[type(config)].forward).parameters
    ):
        raise ModelError(
            f"{name} has no key-value cache, it is a state space model or another kind without attention over one "
            f"({kind}): use a decoder-only transformer."
        )


def _default_dtype(config, device):
    if device.type != "cuda":
        return torch.float32
    with torch.device("meta"):  # counts parameters without making them
        n_parameters = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
    return torch.float32 if n_parameters < 1e9 else torch.bfloat16


def _check_causal(lm: LanguageModel):
    """Refuse a model whose earlier tokens see later ones (BERT loads as a "causal" model without a complaint), or padding.

    Asked of the model itself: its config does not tell (GPT-NeoX says is_decoder=False, hybrids of attention and recurrence heed
    the mask or not).
    """
    _ = lm.blocks
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]], device=lm.device)
    with torch.no_grad():
        one, other = lm.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    if (one - other).abs().max() > 1e-4 * one.abs().max():
        raise ModelError(
            f"{lm.name} is an encoder, its earlier tokens see the later ones: use a decoder-only model."
        )
    ids = torch.tensor([[5, 6, 7], [lm.tokenizer.pad_token_id, 5, 6]], device=lm.device)
    mask, positions = (
        torch.tensor(rows, device=lm.device)
        for rows in ([[1, 1, 1], [0, 1, 1]], [[0, 1, 2], [0, 0, 1]])
    )
    with torch.no_grad():
        alone, padded = lm.decoder(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        )[0].float()
    if (alone[:2] - padded[1:]).abs().max() > (
        1e-2 if lm.dtype is torch.float32 else 0.1
    ) * alone.abs().max():
        raise ModelError(
            f"{lm.name} is changed by left padding, which batches of prompts need (a recurrent state that heeds no "
            "mask, for one): use a decoder-only transformer."
        )


def _adapted(lm: LanguageModel, organism: str):
    """`lm.model` with the LoRA adapter data/organisms/<organism>, made for exactly these weights."""
    there = sorted(card.parent.name for card in (DATA / "organisms").glob("*/card.json"))
    if organism not in there:
        raise ModelError(
            f"There is no model organism {organism!r}: data/organisms has {', '.join(there) or 'none yet'}; "
            f"python -m helpers train-organism {organism} makes one that has a recipe."
        )
    folder = DATA / "organisms" / organism
    made_for = json.loads((folder / "card.json").read_text(encoding="utf-8")).get("base_hash")
    if made_for != lm.weights_hash:
        raise ModelError(
            f"There is no organism {organism!r} for {lm.name}: the one in data/organisms was trained on a base with "
            f"hash {str(made_for)[:12]}, this one has {lm.weights_hash[:12]}; "
            f"helpers.organisms.train({organism!r}, base={lm.name!r}) trains one."
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"The organism {organism!r} has no adapter_model.safetensors: train it again."
        )
    from peft import PeftModel

    with quiet():
        return PeftModel.from_pretrained(lm.model, str(folder), is_trainable=False)


def with_adapter(lm: LanguageModel, folder: Path, organism: str) -> LanguageModel:
    """`lm` with the saved adapter of `folder`, as the organism of that name."""
    from peft import PeftModel

    # low_cpu_mem_usage: PEFT then draws no weights that are overwritten at once
    adapted = PeftModel.from_pretrained(lm.model, str(folder), low_cpu_mem_usage=True)
    return LanguageModel(lm.name, adapted, lm.tokenizer, lm.weights_hash, organism)


def _hash_files(paths) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _check_text(text, what: str):
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what} is {text!r}: give a string that is not empty.")


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
    known = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if known is not None and known not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}, or None.")
    return known
