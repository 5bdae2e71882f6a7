"""A language model: its blocks, whatever its architecture, and prompts and tokens for it."""

import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import transformers

from .obtain import ModelError, brief


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
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        if generation is not None and generation.pad_token_id is None:
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
        """The user's `text` in the model's chat template, ready for the answer; without a
        template the plain text, after a line with the system prompt."""
        _check_text(text, "The text of a chat prompt")
        if self.tokenizer.chat_template is None:
            return text if system is None else f"{system}\n{text}"
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": text})
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # raise_exception("System role not supported") of the template
            raise ModelError(
                f"The chat template of {self.name} refuses this prompt "
                f"({'no' if system is None else 'with a'} system prompt): {brief(error)}."
            ) from None

    def encode(self, prompts: str | list[str]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` [n_prompts, n_tokens], padded on the left.

        Special tokens are added, except to a text that begins with the bos token or the opening of
        the chat template: two bos tokens would change every activation.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("There is no prompt to encode: give a string or a list of strings.")
        rows, openings = [], self._openings()
        for index, text in enumerate(prompts):
            _check_text(text, f"Prompt {index}")
            special = not text.startswith(openings)
            rows.append(self.tokenizer(text, add_special_tokens=special)["input_ids"])
            if not rows[-1]:
                raise ValueError(f"Prompt {index} has no tokens in the vocabulary of {self.name}.")
        padded = self.tokenizer.pad({"input_ids": rows})  # tensors made here: no default device
        return {name: torch.tensor(padded[name], device=self.device) for name in padded}

    def _openings(self) -> tuple[str, ...]:
        """What a text that needs no special tokens begins with."""
        openings = {self.tokenizer.bos_token}
        if self.tokenizer.chat_template is not None:
            openings.add(os.path.commonprefix([self.chat_prompt("a"), self.chat_prompt("b")]))
            try:
                with_system = [self.chat_prompt("a", "c"), self.chat_prompt("a", "d")]
                openings.add(os.path.commonprefix(with_system))
            except ModelError:  # a template without system prompts
                pass
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
                if hasattr(module, "base_weight"):
                    stack.callback(setattr, module.weight, "data", module.weight.data)
                    module.weight.data = module.base_weight
            yield self


def _check_text(text, what: str):
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what} is {text!r}: give a string that is not empty.")
