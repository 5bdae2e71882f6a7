"""Read the residual stream, and run only the blocks between two layers.

No architecture is special-cased: the arguments each block needs (masks, rotary embeddings,
positions) are recorded from one real forward pass and replayed.
"""

from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch

from ..models import LanguageModel, ModelError
from .checks import check_finite, check_kind
from .memory import free_memory, in_parts
from .sites import edit_at, first_of, forward_decoder, read_at, resolve_layer, select_tokens


class _Enough(Exception):
    """Ends a forward pass whose rest nobody reads."""


@torch.no_grad()
def capture(lm, prompts, layers=None, site: str = "resid_post") -> torch.Tensor:
    """The residual stream [n_layers, n_prompts, n_tokens, d_model] in fp32 at `site` of `layers`
    (default: all). Padding, on the left, is NaN: a mean over it cannot pass unnoticed."""
    check_kind(lm, LanguageModel, "lm", "give what helpers.models.load returns")
    layers = _listed(range(lm.n_layers) if layers is None else layers)
    layers = [resolve_layer(lm, k) for k in layers]
    if not layers:
        raise ValueError("layers is empty: give at least one, or None for all.")
    encoded, store = lm.encode(prompts), {}

    def stop(module, args, output):
        raise _Enough

    with ExitStack() as stack:
        for k in layers:
            stack.enter_context(read_at(lm, k, site, store, k))
        stack.enter_context(suppress(_Enough))  # the blocks after the last one are not needed
        stack.callback(lm.blocks[max(layers)].register_forward_hook(stop).remove)
        forward_decoder(lm, encoded)
    out = torch.stack([store[k].float() for k in layers])
    real = encoded["attention_mask"].bool()
    check_finite(out[:, real], f"the residual stream of {lm.name}")
    return out.masked_fill(~real[None, :, :, None], float("nan"))


def _listed(layers) -> list:
    """One layer or several, as a list."""
    try:
        return list(layers)
    except TypeError:  # also of NumPy and torch
        return [layers]


class _PerPrompt(NamedTuple):
    """A recorded argument, and which of its dimensions grows with the number of prompts."""

    value: torch.Tensor
    dim: int


def _mark(value, doubled):
    """A recorded argument, its tensors as `_PerPrompt` where they grew when each prompt was given
    twice (`doubled`): measured, because sizes that happen to be equal tell nothing."""
    if torch.is_tensor(value) and torch.is_tensor(doubled):
        sizes = zip(value.shape, doubled.shape)
        grown = [dim for dim, (once, twice) in enumerate(sizes) if once != twice]
        return _PerPrompt(value, grown[0]) if grown else value
    if isinstance(value, (tuple, list)):
        return type(value)(_mark(*both) for both in zip(value, doubled))
    if isinstance(value, dict):
        return {name: _mark(value[name], doubled[name]) for name in value}
    return value


def _repeat(value, n):
    """A recorded argument for n copies of the prompts."""
    if isinstance(value, _PerPrompt):
        value, dim = value
        sizes = [1] * value.ndim
        sizes[dim] = n
        if value.shape[dim] > 1:
            return value.repeat(sizes)
        return value.expand([n if k == dim else -1 for k in range(value.ndim)])  # no memory
    if isinstance(value, (tuple, list)):
        return type(value)(_repeat(v, n) for v in value)
    if isinstance(value, dict):
        return {name: _repeat(v, n) for name, v in value.items()}
    return value


def _fingerprint(lm) -> dict[str, Any]:
    """What a span relies on: cheap enough to be looked at whenever it is used."""
    weights = list(lm.model.parameters())
    versions = [0 if w.is_inference() else w._version for w in weights]
    return {
        "attention implementation": lm.model.config.get_text_config()._attn_implementation,
        "dtype": lm.dtype,
        "device": lm.device,
        "weights": [(w.data_ptr(), version) for w, version in zip(weights, versions)],
    }


class LayerSpan:
    """The blocks between a source and one or several target layers, to be run for many vectors.

    The clean residuals at both ends are computed once; each call of `delta` runs only the blocks in
    between, from the cached source residual plus θ, for all vectors in one batch. `target_layers`:
    an int or a list. `target_positions`, `steered_positions`: a role, a slice or a list (see
    `select_tokens`). `site`: where θ is added, one of SITES. `memory_budget` bytes bound the
    activations kept for the gradient (None: half of what is free, on a CPU at most 1 GB); they set
    `chunk`, the vectors in one gradient step, which is halved where memory runs out nevertheless.
    """

    @torch.inference_mode(False)  # what is recorded is kept for gradients
    def __init__(
        self,
        lm,
        prompts,
        source_layer,
        target_layers,
        target_positions=slice(None),
        steered_positions="all",
        site="resid_post",
        memory_budget=None,
    ):
        check_kind(lm, LanguageModel, "lm", "give what helpers.models.load returns")
        if any(weight.is_inference() for weight in lm.model.parameters()):
            raise ModelError(
                f"{lm.name} was loaded within torch.inference_mode(), and has no gradients: "
                "load it outside."
            )
        self.lm, self.site, self.fingerprint = lm, site, _fingerprint(lm)
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.source_layer = resolve_layer(lm, source_layer, "source_layer")
        self._set_target_layers(target_layers)
        encoded = lm.encode(self.prompts)
        mask = encoded["attention_mask"]
        self.n_prompts, self.n_tokens = mask.shape
        self.steered = select_tokens(steered_positions, mask, "steered_positions")
        self._set_targets(select_tokens(target_positions, mask, "target_positions"))
        self.first = self.source_layer + (site == "resid_post")  # the first block that is run again
        self._record(encoded)
        self.chunk = 2  # until the self-check has measured what one vector keeps
        self.bytes_per_vector = self._self_check()
        self.chunk = self._chunk(memory_budget)

    def _set_target_layers(self, asked):
        targets = _listed(asked)
        self.single = not isinstance(asked, (list, tuple, range)) and getattr(asked, "ndim", 0) == 0
        self.target_layers = [resolve_layer(self.lm, t, "target_layer") for t in targets]
        source, last = self.source_layer, self.lm.n_layers - 1
        if not targets or min(self.target_layers) <= source:
            allowed = f": use {source + 1} … {last}."
            if source == last:
                allowed = f": that is the last block, so use a source_layer of 0 … {last - 1}."
            raise ValueError(
                f"target_layers {asked!r} must come after source_layer {source}{allowed}"
            )

    def _set_targets(self, chosen):
        """Token indices and mask [n_prompts, n_positions]; fewer tokens are filled up in front."""
        place = chosen * torch.arange(1, chosen.shape[1] + 1, device=chosen.device)  # 0: not chosen
        place = place.sort(1).values[:, -int(chosen.sum(1).max()) :]
        self.target_index, self.target_mask = (place - 1).clamp(min=0), place > 0

    @torch.no_grad()
    def _record(self, encoded):
        store, blocks = {}, self._blocks()
        with ExitStack() as stack:
            stack.enter_context(read_at(self.lm, self.first, "resid_pre", store, "start"))
            stack.enter_context(read_at(self.lm, self.source_layer, self.site, store, "source"))
            for t in self.target_layers:
                stack.enter_context(read_at(self.lm, t, "resid_post", store, t))
            calls = self._arguments(encoded)
        twice = {name: value.repeat(2, 1) for name, value in encoded.items()}
        doubled = self._arguments(twice, enough=True)
        self.calls = {block: _mark(calls[block], doubled[block]) for block in blocks}
        self.start = store["start"]  # [n_prompts, n_tokens, d_model]
        self.clean_source = store["source"].float()
        target = torch.stack([store[t] for t in self.target_layers], 1)
        target = self._pick(target[None])[0].float()
        check_finite(target, f"the residual stream of {self.lm.name}")
        self.clean_target = target[:, 0] if self.single else target

    def _arguments(self, encoded, enough=False) -> dict:
        """What each block of the span is given beside the hidden states; `enough`: run no more."""
        calls, blocks = {}, self._blocks()

        def keep(module, args, kwargs):
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            calls[module] = args[1:], others
            if enough and module is blocks[-1]:
                raise _Enough

        with ExitStack() as stack:
            for block in blocks:
                stack.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
            stack.enter_context(suppress(_Enough))
            forward_decoder(self.lm, encoded)
        return calls

    def _blocks(self):
        return [self.lm.blocks[k] for k in range(self.first, max(self.target_layers) + 1)]

    def _pick(self, hidden):
        """The target positions of hidden, zero where a prompt has no such position."""
        n, _, n_layers, _, d = hidden.shape  # n, n_prompts, n_layers, n_tokens, d_model
        index = self.target_index[None, :, None, :, None].expand(n, -1, n_layers, -1, d)
        return hidden.gather(3, index).masked_fill(~self.target_mask[None, :, None, :, None], 0)

    def _run(self, vectors):
        """Target residuals [n, n_prompts, n_target_layers, n_positions, d_model] in fp32."""
        n, d = vectors.shape
        hidden = self.start.repeat(n, 1, 1)
        theta = vectors[:, None, None] * self.steered[None, :, :, None]
        theta = theta.reshape(-1, self.n_tokens, d).to(hidden.dtype)
        outputs = {}
        with ExitStack() as stack:
            if self.site in ("resid_post", "resid_pre"):
                hidden = hidden + theta
            else:
                add = edit_at(self.lm, self.source_layer, self.site, lambda value: value + theta)
                stack.enter_context(add)
            for k, block in enumerate(self._blocks(), self.first):
                args, kwargs = self.calls[block]
                hidden = first_of(block(hidden, *_repeat(args, n), **_repeat(kwargs, n)))
                if k in self.target_layers:
                    outputs[k] = hidden.view(n, self.n_prompts, self.n_tokens, d)
        return self._pick(torch.stack([outputs[t] for t in self.target_layers], 2)).float()

    def delta(self, vectors) -> torch.Tensor:
        """The change at the target, steered − clean, for vectors [n_vectors, d_model], a tensor or
        a SteeringVectors: [n_vectors, n_prompts, n_positions, d_model] in fp32, differentiable.

        Several target layers add a dimension after n_prompts. Prompts with fewer target tokens than
        others have zeros in front (see `target_mask`).
        """
        self._check_model()
        vectors = getattr(vectors, "tensor", vectors)
        check_kind(vectors, torch.Tensor, "vectors", "give SteeringVectors (a result's .vectors)")
        if vectors.ndim != 2 or vectors.shape[1] != self.lm.d_model or not len(vectors):
            what = f"vectors of shape {list(vectors.shape)} do not fit"
            raise ValueError(f"{what}: [n_vectors, {self.lm.d_model}] is needed.")
        vectors = vectors.to(self.start.device, torch.float32)
        if vectors.requires_grad:
            out = self._run(vectors)
        else:  # without a graph far less is kept
            done, size = in_parts(self._run, vectors, 4 * self.chunk, "vectors")
            out, self.chunk = torch.cat(done), max(1, size // 4)
        return (out[:, :, 0] if self.single else out) - self.clean_target

    def _check_model(self):
        now = _fingerprint(self.lm)
        changed = [name for name, before in self.fingerprint.items() if now[name] != before]
        if changed:
            raise ModelError(
                f"The {changed[0]} of {self.lm.name} changed after this layer span was made, which "
                "still holds the residuals of before: make it again."
            )

    def _self_check(self):
        """θ = 0 must give the clean target back; returns the bytes kept per vector."""
        kept, weights = 0, {p.data_ptr() for p in self.lm.model.parameters()}

        def count(x):  # counted, not kept: no backward follows
            nonlocal kept
            kept += 0 if x.data_ptr() in weights else x.numel() * x.element_size()

        saved = torch.autograd.graph.saved_tensors_hooks(count, lambda packed: packed)
        with torch.enable_grad(), saved:
            zero = self.start.new_zeros(2, self.lm.d_model, dtype=torch.float32).requires_grad_()
            off = self.delta(zero).detach().abs().max().item()
        share = 0.1 if self.start.dtype.itemsize < 4 else 1e-3
        allowed = share * (1 + self.clean_target.abs().max().item())
        if not off <= allowed:
            raise RuntimeError(
                f"the layer span of {self.lm.name} does not reproduce its own forward pass (off by "
                f"{off:.3g} with θ = 0): this architecture needs block arguments that cannot be "
                "replayed."
            )
        return max(kept // 2, 1)

    def _chunk(self, budget):
        cuda = self.start.device.type == "cuda"
        if budget is None:
            budget = max(1, free_memory(self.start.device) // 2)
            budget = budget if cuda else min(budget, 10**9)
        if budget <= 0:
            raise ValueError(f"memory_budget {budget} is not a number of bytes above 0.")
        most = 512 if cuda else max(1, 16 * 40 // (self.n_prompts * self.n_tokens))
        return max(1, min(int(budget // self.bytes_per_vector), most))
