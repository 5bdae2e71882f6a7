"""Where a model is read and added to: layers, tokens, and the four sites of a block.

Layers are 0-based, negative ones count from the end. No architecture is special-cased: a block's parts are found by what they compute.
"""

from contextlib import ExitStack, contextmanager
from numbers import Integral
from weakref import WeakKeyDictionary

import torch

SITES = ("resid_pre", "resid_mid", "mlp_out", "resid_post")
ROLES = ("all", "all_but_first", "last")


# ---------------------------------------------------------------------------------------------- layers and tokens
def resolve_layer(lm, layer, name="layer") -> int:
    """The 0-based index of a block of `lm`; a ValueError names the allowed range."""
    n = lm.n_layers
    if isinstance(layer, bool) or not isinstance(layer, Integral) or not -n <= layer < n:
        raise ValueError(
            f"{name} {layer!r} is outside the model: it has {n} blocks, so use 0 … {n - 1} or {-n} … -1."
        )
    return int(layer) % n


def select_tokens(spec, attention_mask, name="positions") -> torch.Tensor:
    """Bool mask [n_prompts, n_tokens] of the tokens that `spec` names in padded prompts.

    `spec` is a role ("all", "all_but_first", "last"), a slice, or a list of ints. Positions count from each prompt's own
    first token, negative ones from its end; padding is never selected. Naming a token that is not there is a ValueError.
    """
    if isinstance(spec, str):
        if spec not in ROLES:
            raise ValueError(
                f"{name} {spec!r} is not a role: use one of {', '.join(ROLES)}, a slice or a list of positions."
            )
        spec = {"all": slice(None), "all_but_first": slice(1, None), "last": [-1]}[spec]
    elif isinstance(spec, int):
        spec = [spec]
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


def forward_decoder(lm, encoded):
    """One forward pass of the blocks (no LM head), with positions that ignore left padding."""
    return lm.decoder(
        **encoded, position_ids=positions_of(encoded["attention_mask"]), use_cache=False
    )


def positions_of(attention_mask):
    """Position ids [n_prompts, n_tokens] that count from each prompt's own first token."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


# ---------------------------------------------------------------------------------------------- sites
def hidden_of(args, kwargs):
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _replace_hidden(args, kwargs, hidden):
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": hidden}
    return (hidden, *args[1:]), kwargs


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


def _mlp(lm, layer):
    mlp = getattr(lm.blocks[layer], "mlp", None)
    if mlp is None:
        raise ValueError(
            f"site 'mlp_out' does not exist in {type(lm.blocks[layer]).__name__}: it has no module named mlp."
        )
    return mlp


@contextmanager
def _without_hooks(model):
    """While inside, no hook that is already on the model (another steering, for one) acts."""
    kept = [(m, m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    for module, hooks, pre_hooks in kept:
        module._forward_hooks, module._forward_pre_hooks = type(hooks)(), type(pre_hooks)()
    try:
        yield
    finally:
        for module, hooks, pre_hooks in kept:
            module._forward_hooks, module._forward_pre_hooks = hooks, pre_hooks


_mid_names = WeakKeyDictionary()  # block → the child's name: looked for once, by a forward pass


def _mid_module(lm, layer):
    """The module of a block whose input is the residual between attention and MLP."""
    block = lm.blocks[layer]
    if block not in _mid_names:
        _mid_names[block] = _find_mid(lm, block)
    return block.get_submodule(_mid_names[block])


def _find_mid(lm, block):
    """Found by arithmetic, not by name: the first child whose input x is not the block's input and for which
    x + (a later child's output) = the block's output."""
    calls, ends = [], {}
    with _without_hooks(lm.model), ExitStack() as stack:

        def keep(module, args, kwargs, output):
            if torch.is_tensor(args[0] if args else kwargs.get("hidden_states")):
                calls.append((names[module], hidden_of(args, kwargs), first_of(output)))

        def keep_block(module, args, kwargs, output):
            ends["in"], ends["out"] = hidden_of(args, kwargs), first_of(output)

        names = {child: name for name, child in block.named_children()}
        for child in names:
            stack.callback(child.register_forward_hook(keep, with_kwargs=True).remove)
        stack.callback(block.register_forward_hook(keep_block, with_kwargs=True).remove)
        ids = torch.arange(8, device=lm.device)[None]
        with torch.no_grad():
            forward_decoder(lm, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    near = lambda a, b: torch.allclose(
        a.float(), b.float(), rtol=1e-2, atol=1e-3 * b.float().abs().mean().item()
    )  # noqa: E731
    for i, (name, x, _) in enumerate(calls):
        if x.shape == ends["in"].shape and not torch.equal(x, ends["in"]):
            if any(out.shape == x.shape and near(x + out, ends["out"]) for _, _, out in calls[i:]):
                return name
    raise ValueError(
        f"site 'resid_mid' does not exist in {type(block).__name__}: its attention and MLP read the residual in "
        "parallel, so there is nothing between them; use resid_pre, mlp_out or resid_post."
    )


def check_site(site):
    if site not in SITES:
        raise ValueError(f"site {site!r} is unknown: use one of {', '.join(SITES)}.")


@contextmanager
def add_at(lm, layer, site, offset):
    """While inside, `offset(hidden)` (a tensor that broadcasts to hidden [batch, tokens, d_model]) is added at one site."""
    check_site(site)

    def add_in(module, args, kwargs):
        hidden = hidden_of(args, kwargs)
        return _replace_hidden(args, kwargs, hidden + offset(hidden))

    def add_out(module, args, output):
        hidden = first_of(output)
        new = hidden + offset(hidden)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    block = lm.blocks[layer]
    with ExitStack() as stack:
        if site == "resid_pre":
            stack.callback(block.register_forward_pre_hook(add_in, with_kwargs=True).remove)
        elif site == "mlp_out":
            stack.callback(_mlp(lm, layer).register_forward_hook(add_out).remove)
        else:
            # resid_mid feeds both the MLP's norm and the skip connection: add to the norm's input and to the block's output
            if site == "resid_mid":
                stack.callback(
                    _mid_module(lm, layer)
                    .register_forward_pre_hook(add_in, with_kwargs=True)
                    .remove
                )
            stack.callback(block.register_forward_hook(add_out).remove)
        yield


@contextmanager
def edit_at(lm, layer, site, f):
    """While inside, `f(hidden)` [batch, tokens, d_model] takes the place of the value at one site."""
    made = {}

    def offset(hidden):
        if site == "resid_mid" and "mid" in made:  # the skip connection gets the same change
            return made.pop("mid")
        change = f(hidden) - hidden
        if site == "resid_mid":
            made["mid"] = change
        return change

    with add_at(lm, layer, site, offset):
        yield


@contextmanager
def read_at(lm, layer, site, store, key):
    """While inside, every forward pass leaves the site's value [batch, tokens, d_model] in `store[key]`."""
    check_site(site)

    def keep_in(module, args, kwargs):
        store[key] = hidden_of(args, kwargs)

    def keep_out(module, args, output):
        store[key] = first_of(output)

    if site in ("resid_pre", "resid_mid"):
        module = lm.blocks[layer] if site == "resid_pre" else _mid_module(lm, layer)
        handle = module.register_forward_pre_hook(keep_in, with_kwargs=True)
    else:
        handle = (_mlp(lm, layer) if site == "mlp_out" else lm.blocks[layer]).register_forward_hook(
            keep_out
        )
    try:
        yield
    finally:
        handle.remove()
