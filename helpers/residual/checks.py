"""What is asked of values that come from outside: each refusal is one sentence."""

import operator

import torch


def whole(value, name: str, least: int | None = None) -> int:
    """A whole number (Python's, NumPy's or torch's) as an int; ValueError for anything else."""
    try:
        number = None if getattr(value, "dtype", type(value)) in (bool, torch.bool) else value
        number = operator.index(number)
    except TypeError:
        raise ValueError(f"{name} {value!r} is not a whole number.") from None
    if least is not None and number < least:
        raise ValueError(f"{name} {number} is too small: it must be {least} or more (≥ {least}).")
    return number


def check_seed(value) -> int:
    """A seed as an int that a generator takes."""
    seed = whole(value, "seed")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed {seed} is outside 64 bits: use a number near 0.")
    return seed


def check_kind(value, wanted, name: str, hint: str):
    """ValueError where a value is not of the class that is wanted."""
    if not isinstance(value, wanted):
        raise ValueError(f"{name} is of type {type(value).__name__}: {hint}.")


def check_finite(values: torch.Tensor, what: str):
    """FloatingPointError where a number of a forward pass is NaN or infinite."""
    bad = ~values.isfinite()
    if bad.any():
        raise FloatingPointError(
            f"{what} became {values[bad][0].item()}: use a smaller coefficient or radius, a wider "
            "dtype, or a model whose weights are finite."
        )


def check_length(lm, attention_mask, more: int = 0):
    """ValueError where a prompt, with `more` tokens after it, is longer than the positions that
    the model has. Rotary positions have no end; learned ones and other tables do."""
    lengths = attention_mask.sum(1) + more
    config = lm.model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if limit is None or lengths.max() <= limit or not _ends(lm, config, limit):
        return
    row = int(lengths.argmax())
    new = f", with {more} new ones {int(lengths[row])}" if more else ""
    raise ValueError(
        f"Prompt {row} has {int(lengths[row]) - more} tokens{new}, and {lm.name} reads at most "
        f"{limit}: shorten it."
    )


def _ends(lm, config, limit) -> bool:
    """Does the model look its positions up in a table of that length?"""
    if hasattr(config, "max_seq_len"):  # MPT's ALiBi
        return True
    embedded, decoder = lm.model.get_input_embeddings(), lm.decoder
    tables = [m.weight for m in decoder.modules() if isinstance(m, torch.nn.Embedding)]
    tables = [table for table in tables if table is not embedded.weight]
    tables += [buffer for name, buffer in decoder.named_buffers() if "position" in name]
    return any(limit <= len(table) <= limit + 2 for table in tables if table.ndim == 2)
