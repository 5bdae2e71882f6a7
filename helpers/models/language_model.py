"""A language model: its blocks, whatever its architecture, and prompts and tokens for it."""

import re
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
import transformers

from . import chat
from .obtain import ModelError


@dataclass(eq=False)  # a model is itself: usable as a key
class LanguageModel:
    """A frozen decoder-only model in eval mode, with its tokenizer (left padding) and the SHA-256
    of its weight files, or their commit on the hub."""

    name: str
    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    weights_hash: str
    organism: str | None = None

    def __post_init__(self):
        tokenizer, generation = self.tokenizer, getattr(self.model, "generation_config", None)
        tokenizer.padding_side = "left"
        for token in (tokenizer.eos_token, tokenizer.convert_ids_to_tokens(0)):
            if token is not None and not self._embeds(tokenizer.pad_token_id):
                tokenizer.pad_token = token  # any will do: padding is masked
        if generation is not None and not self._embeds(generation.pad_token_id):
            generation.pad_token_id = tokenizer.pad_token_id
        self.model.eval().requires_grad_(False)
        self.model.config.return_dict = self._config.return_dict = True  # not tuples

    @property
    def decoder(self) -> torch.nn.Module:
        """The module that directly holds the list of blocks (LlamaModel, GPT2Model…)."""
        return self._decoder_and_blocks()[0]

    @property
    def blocks(self) -> torch.nn.ModuleList:
        """The decoder blocks, in order; block k's output is `resid_post[k]`."""
        return self._decoder_and_blocks()[1]

    def _decoder_and_blocks(self):
        # get_decoder() passes by the vision tower of a multimodal model, whose block list may be
        # just as long. The outermost list wins: lists of experts lie inside the blocks.
        inner = self.model
        if hasattr(inner, "get_base_model"):  # a PEFT wrapper: an organism in training
            inner = inner.get_base_model()
        n_layers = self._config.num_hidden_layers
        for root in (inner.get_decoder() if hasattr(inner, "get_decoder") else inner, inner):
            for module in root.modules() if root is not None else ():
                for child in module.children():
                    if isinstance(child, torch.nn.ModuleList) and len(child) == n_layers > 0:
                        return module, child
        raise ModelError(
            f"{self.name} ({type(inner).__name__}) has no list of {n_layers} decoder blocks; "
            "use a decoder-only model of transformers."
        )

    @property
    def _config(self):
        return self.model.config.get_text_config()

    def _embeds(self, token_id: int | None) -> bool:
        return token_id is not None and 0 <= token_id < self._config.vocab_size

    @property
    def context_length(self) -> int | None:
        """The number of tokens that the model was made for; None where its config has none."""
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            length = getattr(self._config, name, None)
            if isinstance(length, int) and length > 0:
                return length
        return None

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
        """The user's `text` in the model's chat template, ready for the answer; without a
        template the plain text, after a line with the system prompt.

        Without a system role the system text opens the user's turn. A template that writes the
        date writes 26 July 2024. ModelError where the texts do not come out as they were given
        (white space around them apart), once and before the cue to answer."""
        _check_text(text, "The text of a chat prompt")
        if system is not None:
            _check_text(system, "The system text", empty=True)
        if not self.tokenizer.chat_template:
            return text if system is None else f"{system}\n{text}"
        return chat.filled(self.tokenizer, self.name, text, system)

    def encode(self, prompts: str | list[str]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` [n_prompts, n_tokens], padded on the left.

        Special tokens are added, except to a text that begins with the bos token or the opening of
        the chat template: two bos tokens would change every activation. No end token is added
        either, nor anything else after the text.
        """
        one = isinstance(prompts, str) or not isinstance(prompts, Iterable)
        prompts = [prompts] if one else list(prompts)
        if not prompts:
            raise ValueError("There is no prompt to encode: give a string or a list of strings.")
        rows, openings = [], self._openings()
        for index, text in enumerate(prompts):
            _check_text(text, f"Prompt {index}")
            ids = self._ids(text, special=not text.startswith(openings))
            if not ids:
                raise ValueError(f"Prompt {index} has no tokens in the vocabulary of {self.name}.")
            if not self._embeds(max(ids)):
                raise ValueError(
                    f"Prompt {index} has token {max(ids)}, {self.tokenizer.decode(max(ids))!r}: "
                    f"{self.name} has an embedding for 0 … {self._config.vocab_size - 1}."
                )
            rows.append(ids)
        padded = self.tokenizer.pad({"input_ids": rows})  # tensors made here: no default device
        return {name: torch.tensor(padded[name], device=self.device) for name in padded}

    def _ids(self, text: str, special: bool) -> list[int]:
        """The tokens of a text, with the special ones before it but not those after it."""
        plain = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not special:
            return plain
        ids = self.tokenizer(text)["input_ids"]
        for end in range(len(ids), len(plain) - 1, -1):
            if ids[end - len(plain) : end] == plain:
                return ids[:end]
        return ids

    def _openings(self) -> tuple[str, ...]:
        """What a text that needs no special tokens begins with."""
        openings = {self.tokenizer.bos_token}
        for with_system in (False, True) if self.tokenizer.chat_template else ():
            with suppress(ModelError):  # a template that cannot be used: the text is plain
                openings.add(chat.opening(self.tokenizer, self.name, with_system))
        return tuple(opening for opening in openings if opening)

    @contextmanager
    def base(self):
        """Within it the model runs without its organism's adapter; without one it is what it was.

        The weights of the base lie beside the adapted ones (`base_weight`): only pointers change.
        """
        with ExitStack() as stack:
            if hasattr(self.model, "disable_adapter"):  # a PEFT wrapper: an organism in training
                stack.callback(self.model.requires_grad_, False)  # PEFT switches gradients on again
                stack.enter_context(self.model.disable_adapter())
            for module in self.model.modules():
                if getattr(module, "disable_adapters", None) is False:  # by model.add_adapter
                    stack.callback(module.requires_grad_, False)
                    stack.callback(module.enable_adapters, True)
                    module.enable_adapters(False)
                if hasattr(module, "base_weight"):
                    stack.callback(setattr, module.weight, "data", module.weight.data)
                    module.weight.data = module.base_weight
            yield self


def _check_text(text, what: str, empty: bool = False):
    if not isinstance(text, str) or not (empty or text.strip()):
        raise ValueError(f"{what} is {text!r}: give a string that is not empty.")
    lone = re.search("[\ud800-\udfff]", text)
    if lone:
        raise ValueError(
            f"{what} has {lone[0]!r} at {lone.start()}, half of a character (a lone surrogate): "
            "give text that UTF-8 can hold."
        )
