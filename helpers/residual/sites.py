"""Where a model is read and edited: layers, tokens, and the five sites of a block.

Layers are 0-based, negative ones count from the end. No architecture is special-cased: a block's
parts are found by what they compute.
"""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch

from .checks import check_length, whole

SITES = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "resid_post")
ROLES = {"all": slice(None), "all_but_first": slice(1, None), "last": [-1]}


# ---------------------------------------- layers and tokens
def resolve_layer(lm, layer, name="layer") -> int:
    """The 0-based index of a block of `lm`; a ValueError names the allowed range."""
    n = lm.n_layers
    try:
        inside = -n <= whole(layer, name) < n
    except ValueError:
        inside = False
    if not inside:
        allowed = f"it has {n} blocks, so use 0 … {n - 1} or {-n} … -1"
        raise ValueError(f"{name} {layer!r} is outside the model: {allowed}.")
    return int(layer) % n


def select_tokens(spec, attention_mask, name="positions") -> torch.Tensor:
    """Bool mask [n_prompts, n_tokens] of the tokens that `spec` names in padded prompts.

    `spec`: a role ("all", "all_but_first", "last"), a slice, or a list of ints, which count from
    each prompt's own first token, or from its end. ValueError: a token that is not there.
    """
    spec = check_positions(spec, name)
    chosen = torch.zeros_like(attention_mask, dtype=torch.bool)
    for row, mask in enumerate(attention_mask):
        tokens = mask.nonzero()[:, 0]
        length = len(tokens)
        if isinstance(spec, slice):
            picked = list(range(length)[spec])
        else:
            outside = [i for i in spec if not -length <= i < length]
            if outside:
                raise ValueError(
                    f"{name} {outside[0]} is outside prompt {row}, which has {length} tokens: "
                    f"use {-length} … {length - 1}."
                )
            picked = [i % length for i in spec]
        if not picked:
            raise ValueError(
                f"{name} {spec!r} selects no token of prompt {row}, which has {length} tokens."
            )
        chosen[row, tokens[picked]] = True
    return chosen


def check_positions(spec, name="positions") -> slice | list[int]:
    """What `select_tokens` takes, as a slice or a list; ValueError for what names no positions."""
    if isinstance(spec, str):
        if spec not in ROLES:
            raise ValueError(
                f"{name} {spec!r} is not a role: use one of {', '.join(ROLES)}, a slice or a list "
                "of positions."
            )
        return ROLES[spec]
    if isinstance(spec, slice):
        ends = [end for end in (spec.start, spec.stop, spec.step) if end is not None]
        if 0 in [whole(end, f"{name} {spec!r}:") for end in ends] and spec.step == 0:
            raise ValueError(f"{name} {spec!r} has a step of 0: use another.")
        return spec
    try:
        listed = list(spec)
    except TypeError:  # one position, or no positions at all
        listed = [spec]
    return [whole(i, f"{name} {spec!r}:") for i in listed]


def forward_decoder(lm, encoded):
    """One forward pass of the blocks (no LM head), with positions that ignore left padding."""
    check_length(lm, encoded["attention_mask"])
    positions = positions_of(encoded["attention_mask"])
    return lm.decoder(**encoded, position_ids=positions, use_cache=False)


def positions_of(attention_mask):
    """Position ids [n_prompts, n_tokens] that count from each prompt's own first token."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


# ---------------------------------------- sites
def check_site(site: str):
    if site not in SITES:
        raise ValueError(f"site {site!r} is unknown: use one of {', '.join(SITES)}.")


def hidden_of(args, kwargs) -> torch.Tensor:
    """The hidden states among the arguments of a block or of one of its parts."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def edit_at(lm, layer: int, site: str, f: Callable[[torch.Tensor], torch.Tensor]):
    """While inside, the value `hidden` [batch, n_tokens, d_model] at a site is `f(hidden)`."""
    change = {}

    def edit(hidden):
        new = f(hidden)
        if not mid:
            return new.clone() if site == "mlp_out" else new  # Falcon goes on to add in place
        change["mid"] = new - hidden
        return new

    mid = site == "resid_mid"  # it feeds the MLP's norm, which is edited, and the skip connection
    with ExitStack() as stack:
        stack.enter_context(_hooked(lm, layer, site, edit))
        if mid:
            skip = _hooked(lm, layer, "resid_post", lambda hidden: hidden + change.pop("mid"))
            stack.enter_context(skip)
        yield


def read_at(lm, layer: int, site: str, store: dict, key):
    """While inside, a forward pass leaves the value [batch, n_tokens, d_model] in `store[key]`."""

    def keep(hidden):
        store[key] = hidden.clone() if site == "mlp_out" else hidden  # Falcon adds in place

    return _hooked(lm, layer, site, keep)


@contextmanager
def _hooked(lm, layer, site, f):
    """While inside, `f` sees the value at a site; what it returns, unless None, takes its place."""
    check_site(site)
    inside, shape = site not in ("resid_pre", "resid_post"), {}

    def look(module, args, kwargs):
        shape["block"] = hidden_of(args, kwargs).shape

    def at(hidden):  # OPT flattens [batch, n_tokens, d_model] inside its block
        new = f(hidden.reshape(shape.get("block", hidden.shape)))
        return None if new is None else new.reshape(hidden.shape)

    def on_input(module, args, kwargs):
        new = at(hidden_of(args, kwargs))
        if new is None:
            return None
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": new}
        return (new, *args[1:]), kwargs

    def on_output(module, args, output):
        new = at(first_of(output))
        return (new, *output[1:]) if isinstance(output, tuple) and new is not None else new

    module = _part(lm, layer, site) if inside else lm.blocks[layer]
    with ExitStack() as stack:
        if inside:
            seen = lm.blocks[layer].register_forward_pre_hook(look, with_kwargs=True)
            stack.callback(seen.remove)
        if site in ("resid_pre", "resid_mid"):
            handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
        else:
            handle = module.register_forward_hook(on_output)
        stack.callback(handle.remove)
        yield


# ---------------------------------------- a block's parts
_found = WeakKeyDictionary()  # block → {site: name of the part, or None}: looked for once
_MISSING = {
    "resid_mid": "no part reads what attention leaves (in parallel?); use resid_pre or resid_post",
    "attn_out": "none of its parts gives what attention adds; use resid_pre or resid_post",
    "mlp_out": "none of its parts gives what an MLP adds; use resid_post",
}


def part_at(lm, layer, site) -> torch.nn.Module | None:
    """The part of a block that resid_mid goes into, or that attn_out or mlp_out comes out of; None
    where there is none."""
    block = lm.blocks[layer]
    if block not in _found:
        start, end, parts = probe(lm, block)
        mid, attention = _mid_name(start, end, parts), _attention_name(start, end, parts)
        _found[block] = {"resid_mid": mid, "attn_out": attention}
        _found[block]["mlp_out"] = _mlp_name(start, end, parts, mid)
    name = _found[block][site]
    return None if name is None else block.get_submodule(name)


def _part(lm, layer, site) -> torch.nn.Module:
    """`part_at`; ValueError where there is none."""
    part = part_at(lm, layer, site)
    if part is None:
        what = f"site {site!r} does not exist in {type(lm.blocks[layer]).__name__}"
        raise ValueError(f"{what}: {_MISSING[site]}.")
    return part


def probe(lm, block):
    """A forward pass of 8 tokens: the block's input and output, and (name, input, output) of each
    call of its parts, the parts of parts after them. In the second row all tokens but the last go
    into the block negated."""
    calls, names = [], {module: name for name, module in block.named_modules()}

    def negate(module, args, kwargs):
        hidden_of(args, kwargs)[1, :-1].neg_()

    def keep(module, args, kwargs, output):
        x, out = args[0] if args else kwargs.get("hidden_states"), first_of(output)
        if torch.is_tensor(x) and torch.is_tensor(out):
            calls.append((names[module], x.clone(), out.clone()))  # copied: Falcon adds in place

    ids = torch.arange(8, device=lm.device).repeat(2, 1)
    with without_hooks(lm.model), ExitStack() as stack, torch.no_grad():
        stack.callback(block.register_forward_pre_hook(negate, with_kwargs=True).remove)
        for module in names:
            stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        forward_decoder(lm, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    *parts, (_, start, end) = calls
    parts.sort(key=lambda part: "." in part[0])
    shaped = lambda x: x.reshape(start.shape) if x.numel() == start.numel() else x  # noqa: E731
    return start, end, [(name, shaped(x), shaped(out)) for name, x, out in parts]


def _mid_name(start, end, parts) -> str | None:
    """The first part whose input, not the block's, plus a part's output is the block's output."""
    for i, (name, x, _) in enumerate(parts):
        if x.shape == start.shape and not torch.equal(x, start):
            if any(_is_sum(end, x, out) for _, _, out in parts[i:]):
                return name
    return None


def _attention_name(start, end, parts) -> str | None:
    """The first part in which a token sees those before it and whose output, added to the block's
    input, is the input of another part or, with another part's output, the block's output."""
    for name, _, a in parts:
        if a.shape != start.shape or torch.equal(a[0, -1], a[1, -1]):
            continue
        sequential = any(_is_sum(x, start, a) for _, x, _ in parts)
        if sequential or any(_is_sum(end, start, a, out) for _, _, out in parts):
            return name
    return None


def _mlp_name(start, end, parts, mid) -> str | None:
    """The part named mlp; where there is none, or its output is already the block's, the first one
    whose output, added to resid_mid, is that."""
    named = [out for name, _, out in parts if name == "mlp"]
    if named and not torch.equal(named[0], end):
        return "mlp"
    inputs = [x for name, x, _ in parts if name == mid]
    found = [name for name, _, out in parts if inputs and _is_sum(end, inputs[0], out)]
    return found[0] if found else None


def _is_sum(total, *parts) -> bool:
    """Do the parts add up to the total, but for the rounding of their dtype?"""
    if any(part.numel() != total.numel() for part in parts):
        return False
    terms = torch.stack([part.flatten().cpu().double() for part in parts])
    allowed = 4 * torch.finfo(total.dtype).eps * terms.abs().sum(0)
    return bool(((terms.sum(0) - total.flatten().cpu()).abs() <= allowed).all())


@contextmanager
def without_hooks(model):
    """While inside, no hook that is already on the model (another steering, for one) acts."""
    with ExitStack() as stack:
        for module in model.modules():
            for name in ("_forward_hooks", "_forward_pre_hooks"):
                hooks = getattr(module, name)
                stack.callback(setattr, module, name, hooks)
                setattr(module, name, type(hooks)())
        yield
