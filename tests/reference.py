"""Plain and slow versions to compare the helpers with: one prompt at a time, the whole model, the
simplest hooks there are; written without helpers.residual."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import settings

PROMPTS = ["A cat sat.", "How do I bake bread at home?", "Hm."]  # three lengths: padding matters
PARALLEL = ("tiny-gpt_neox", "tiny-phi")  # attention and MLP side by side: nothing between them
# Where attention's contribution leaves it, by name: with blocks in sequence, adding there is adding
# to resid_mid.
ATTENTION_OUT = {
    "tiny-random": "self_attn.o_proj",
    "tiny-llama": "self_attn.o_proj",
    "tiny-qwen2": "self_attn.o_proj",
    "tiny-mistral": "self_attn.o_proj",
    "tiny-gemma3": "post_attention_layernorm",
    "tiny-gpt2": "attn.c_proj",
    "tiny-gpt_neox": "attention.dense",
    "tiny-phi": "self_attn.dense",
    "sequential": "attention.dense",
}
ROLES = {"all": slice(None), "all_but_first": slice(1, None), "last": slice(-1, None)}
few = settings(max_examples=20, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """With models this small a second thread only waits, ten times as long on a busy machine."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def some_vectors(lm, n=3, norm=3.0, seed=0):
    random = torch.randn(n, lm.d_model, generator=torch.Generator().manual_seed(seed))
    return norm * torch.nn.functional.normalize(random, dim=-1)


def ids_of(lm, prompt):
    return lm.encode(prompt)["input_ids"][0].tolist()


def picked(spec, length):
    """The positions that a spec names in a prompt of this length, in the plainest way."""
    everything, spec = list(range(length)), ROLES[spec] if isinstance(spec, str) else spec
    if isinstance(spec, slice):
        return everything[spec]
    return sorted({everything[i] for i in ([spec] if isinstance(spec, int) else spec)})


@contextmanager
def plain_add(lm, layer, site, addend):
    """Add `addend` [n_tokens, d_model] at a site."""

    def pre(module, args, kwargs):
        if args:
            return (args[0] + addend, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + addend}

    def post(module, args, output):
        if isinstance(output, tuple):
            return (output[0] + addend, *output[1:])
        return output + addend

    block = lm.blocks[layer]
    if site == "resid_pre":
        handle = block.register_forward_pre_hook(pre, with_kwargs=True)
    elif site == "resid_post":
        handle = block.register_forward_hook(post)
    else:
        name = "mlp" if site == "mlp_out" else ATTENTION_OUT[lm.name]
        handle = block.get_submodule(name).register_forward_hook(post)
    try:
        yield
    finally:
        handle.remove()


def run_plain(lm, ids):
    """Logits [n_tokens, vocabulary] and every block's output [n_layers, n_tokens, d_model] for one
    unpadded prompt."""
    outputs, handles = [], []
    whole = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    for block in lm.blocks:
        keep = lambda module, args, out: outputs.append(whole(out)[0].clone())  # noqa: E731
        handles.append(block.register_forward_hook(keep))
    try:
        with torch.no_grad():
            logits = lm.model(input_ids=torch.as_tensor(ids)[None], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits, torch.stack(outputs)


def reference_delta(
    lm, prompt, source, target, vector, site="resid_post", steered="all", positions="all"
):
    """Steered − clean [n_positions, d_model] at block `target`'s output, from two full forward
    passes of this prompt alone."""
    ids = ids_of(lm, prompt)
    addend = torch.zeros(len(ids), lm.d_model)
    addend[picked(steered, len(ids))] = vector
    clean = run_plain(lm, ids)[1][target]
    with plain_add(lm, source, site, addend.to(clean.dtype)):
        changed = run_plain(lm, ids)[1][target]
    return (changed.float() - clean.float())[picked(positions, len(ids))]


def no_hooks(lm) -> bool:
    """Is there no hook on the model?"""
    return not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
