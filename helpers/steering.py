"""A set of steering vectors as an artefact, and the context manager that applies them."""

import json
import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .models import LanguageModel
from .residual import (
    check_kind,
    check_positions,
    check_radius,
    check_site,
    edit_at,
    resolve_layer,
    select_tokens,
    whole,
)

FORMAT = "steering-vectors/1"


@dataclass(frozen=True, eq=False)
class SteeringVectors:
    """Vectors [n_vectors, d_model] (fp32, CPU) with the place they belong to: block `source_layer`,
    `site`, norm `radius`.

    `2 * v`, `-v`, `v[3]`, `v[:8]` and `v[[1, 5]]` give new sets; the tensor handed in is copied,
    never changed. ValueError for another shape, an unknown site, and what is not finite.
    """

    tensor: torch.Tensor
    source_layer: int
    site: str = "resid_post"
    radius: float | None = None
    provenance: dict = field(default_factory=dict)

    @torch.inference_mode(False)
    def __post_init__(self):
        tensor = _as_tensor(self.tensor)
        tensor = tensor.detach().to("cpu", torch.float32, copy=True).clone()
        tensor = tensor[None] if tensor.ndim == 1 else tensor
        if tensor.ndim != 2 or not tensor.numel():
            what = f"vectors of shape {list(tensor.shape)} do not fit"
            raise ValueError(f"{what}: [n_vectors, d_model] is needed.")
        if not tensor.isfinite().all():
            raise ValueError("steering vectors hold NaN or infinite numbers.")
        check_site(self.site)
        check_kind(self.provenance, dict, "provenance", "give a dictionary")
        radius = self.radius
        if radius is not None:  # 0 * vectors has a norm of 0
            zero = not isinstance(radius, bool) and radius == 0
            radius = 0.0 if zero else check_radius(radius)
        object.__setattr__(self, "tensor", tensor)
        object.__setattr__(self, "source_layer", whole(self.source_layer, "source_layer"))
        object.__setattr__(self, "radius", radius)

    def __eq__(self, other):
        if not isinstance(other, SteeringVectors):
            return NotImplemented
        return self._about() == other._about() and torch.equal(self.tensor, other.tensor)

    def __hash__(self):
        return hash((self.source_layer, self.site, self.radius, *self.tensor[0].tolist()))

    def _about(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "tensor"}

    def __len__(self):
        return len(self.tensor)

    def __getitem__(self, index):
        if isinstance(index, int) or getattr(index, "ndim", 1) == 0:
            index = whole(index, "vector")
            if not -len(self) <= index < len(self):
                raise IndexError(f"vector {index} is outside this set of {len(self)}.")
        return replace(self, tensor=self.tensor[index].reshape(-1, self.tensor.shape[1]))

    def __mul__(self, factor):
        radius = None if self.radius is None else self.radius * abs(factor)
        return replace(self, tensor=self.tensor * factor, radius=radius)

    __rmul__ = __mul__

    def __neg__(self):
        return -1 * self

    def save(self, path) -> None:
        """Write a .safetensors file, whole or not at all; everything but the tensor stands in its
        header."""
        path = Path(path).expanduser()
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give the name of a file in it.")
        if not path.parent.is_dir():
            raise ValueError(f"The folder {path.parent} does not exist: make it first.")
        try:
            about = json.dumps(self._about(), default=_plain)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the provenance of these vectors cannot be saved: {error}.") from None
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            part.write_bytes(save({"vectors": self.tensor}, {"format": FORMAT, "about": about}))
            part.replace(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}.") from None
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path, lm=None) -> "SteeringVectors":
        """Read a file written by `save`, and check that the vectors fit `lm` where it is given; a
        ValueError names the file and the field that is wrong."""
        path = Path(path).expanduser()
        if path.is_dir():
            raise ValueError(f"{path} cannot be read as steering vectors: it is a folder.")
        try:
            with safe_open(str(path), "pt", device="cpu") as f:
                header, tensor = f.metadata() or {}, f.get_tensor("vectors")
        except (OSError, SafetensorError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"{path} cannot be read as steering vectors: {why}.") from None
        if header.get("format") != FORMAT:
            wrong = f"its field 'format' is {header.get('format')!r}, not {FORMAT!r}"
            raise ValueError(f"{path} holds no steering vectors: {wrong}.")
        try:
            vectors = cls(tensor, **json.loads(header.get("about", "")))
        except (TypeError, ValueError, RecursionError) as error:
            broken = f"{path} is broken, its fields 'vectors' and 'about' make no steering vectors"
            raise ValueError(f"{broken}: {error}") from None
        if lm is not None:
            vectors.check(lm, str(path))
        return vectors

    def check(self, lm, name="these vectors") -> int:
        """The source layer as an index into `lm`'s blocks; a ValueError says what does not fit."""
        if self.tensor.shape[1] != lm.d_model:
            sizes = f"d_model is {self.tensor.shape[1]}, that of {lm.name} is {lm.d_model}"
            raise ValueError(f"{name}: {sizes}; they were made for another model.")
        return resolve_layer(lm, self.source_layer, f"{name}: source_layer")


def _as_tensor(value) -> torch.Tensor:
    """A tensor as it is, numbers on the CPU, whatever torch's default device."""
    return value if torch.is_tensor(value) else torch.as_tensor(value, device="cpu")


def _plain(value):
    """NumPy's and torch's numbers as Python's, for JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r} is of type {type(value).__name__}")


def check_vectors(vectors):
    """ValueError where something else than steering vectors is handed in."""
    hint = "give SteeringVectors (a result's .vectors, or SteeringVectors(tensor, source_layer))"
    check_kind(vectors, SteeringVectors, "vectors", hint)


def coefficients(coeff, n_vectors) -> torch.Tensor:
    """`coeff`, one number or one per vector, as fp32 [n_vectors]; ValueError for anything else."""
    try:
        values = _as_tensor(coeff)
        values = values.detach().to("cpu", torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError):
        values = torch.zeros(0)
    if len(values) not in (1, n_vectors) or not values.isfinite().all():
        raise ValueError(
            f"coeff {coeff!r} does not fit: give one finite number, "
            f"or one for each of the {n_vectors} vectors."
        )
    return values.expand(n_vectors)


@dataclass(frozen=True)
class Scope:
    """Which tokens are steered: `prompt`, a role, slice or list of positions as in `select_tokens`
    among those of the forward pass that fills an empty KV cache, or None for none of them;
    `generated`, whether all those after it are."""

    prompt: str | slice | list | int | None = "all"
    generated: bool = True

    def __post_init__(self):
        if self.prompt is not None:  # an unknown role is said at once
            positions = check_positions(self.prompt, "tokens")
            if not isinstance(self.prompt, (str, slice, int)):  # NumPy's and torch's too
                object.__setattr__(self, "prompt", positions)

    @property
    def tells_apart(self) -> bool:
        """Does it hang on which tokens are a prompt's?"""
        return self not in (Scope(), Scope(None, False))

    @classmethod
    def of(cls, tokens) -> "Scope":
        """What `steer` takes as `tokens`, as a Scope."""
        if isinstance(tokens, cls):
            return tokens
        words = {"all": cls(), "prompt": cls(generated=False), "generated": cls(prompt=None)}
        named = isinstance(tokens, str) and tokens in words
        return words[tokens] if named else cls(tokens, generated=False)


@contextmanager
def steer(lm, vectors, coeff=1.0, tokens="all"):
    """While inside, `coeff * θ` is added to the residual stream of `lm`; afterwards the model is
    what it was before.

    `vectors`: a SteeringVectors with one vector (added to every row of the batch) or one vector per
    row. `coeff`: a number, or one per vector. `tokens`: a Scope, "all", "prompt", "generated", or a
    role, slice or list of prompt positions. Left padding is never steered. ValueError for what does
    not fit the model, the batch or the prompts.

    >>> with steer(lm, result.vectors[0], coeff=1.0):
    ...     lm.model.generate(**lm.encode(prompt))
    """
    check_kind(lm, LanguageModel, "lm", "give what helpers.models.load returns")
    check_vectors(vectors)
    layer, scope = vectors.check(lm), Scope.of(tokens)
    theta = vectors.tensor * coefficients(coeff, len(vectors))[:, None]
    theta = theta[:, None].to(lm.device, lm.dtype)  # [n_vectors or 1, 1, d_model]
    call = {}  # what the forward pass under way carries
    uncached = None  # the tokens of the last pass that had no cache

    def look(module, args, kwargs):
        nonlocal uncached
        found = _contents(args, kwargs)
        if scope.tells_apart:
            uncached = _check_prompt_told(scope, found, uncached)
        call.update(is_prompt=found["is_prompt"], mask=found["mask"])

    def add(hidden):
        if len(theta) not in (1, len(hidden)):
            raise ValueError(
                f"{len(theta)} vectors do not fit a batch of {len(hidden)} rows: "
                "give one vector, or one per row."
            )
        return hidden + theta * _steered(scope, **call)

    with ExitStack() as stack:
        stack.callback(lm.decoder.register_forward_pre_hook(look, with_kwargs=True).remove)
        stack.enter_context(edit_at(lm, layer, vectors.site, add))
        yield


def _contents(args, kwargs) -> dict:
    """Does a forward pass of the decoder carry a prompt or generated tokens, and which are padding?

    `mask` [batch, n_tokens] is None where that cannot be told.
    """
    ids = kwargs.get("input_ids", args[0] if args else None)
    ids = kwargs.get("inputs_embeds") if ids is None else ids
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones(ids.shape[:2], dtype=torch.long, device=ids.device)
    readable = torch.is_tensor(mask) and mask.ndim == 2
    mask = mask[:, -ids.shape[1] :] if readable else None
    is_prompt = cache is None or cache.get_seq_length() == 0
    return {"is_prompt": is_prompt, "mask": mask, "tokens": ids, "cached": cache is not None}


def _check_prompt_told(scope, found: dict[str, Any], uncached):
    """ValueError where a pass may mix a prompt's tokens with generated ones: it goes on with the
    last pass without a KV cache (`uncached`), or a prompt is read in chunks. Returns the tokens to
    compare the next pass with."""
    tokens = found["tokens"]
    goes_on = uncached is not None and not found["cached"] and len(tokens) == len(uncached)
    if goes_on and 0 < uncached.shape[1] < tokens.shape[1]:
        goes_on = torch.equal(tokens[:, : uncached.shape[1]], uncached)
    else:
        goes_on = False
    in_chunks = not found["is_prompt"] and tokens.shape[1] > 1
    if goes_on or in_chunks:
        raise ValueError(
            f"{scope} cannot tell a prompt's tokens from generated ones here: generate with "
            "use_cache=True and without prefill_chunk_size, or steer tokens='all'."
        )
    return None if found["cached"] else tokens.clone()


def _steered(scope, is_prompt=None, mask=None):
    """1 where a token is steered and 0 elsewhere: [batch, n_tokens, 1], or one number for all.
    `is_prompt` is None where blocks run without a pass of the whole model."""
    if is_prompt and scope.prompt is None or is_prompt is False and not scope.generated:
        return 0
    if mask is not None:
        every = not is_prompt or scope.prompt == "all"  # also where a row is padding alone
        chosen = mask.bool() if every else select_tokens(scope.prompt, mask, "tokens")
        return chosen[:, :, None]
    if is_prompt is False or scope.prompt in ("all", None):
        return 1
    raise ValueError(
        f"tokens {scope.prompt!r} cannot be told from padding here: they need a forward pass of "
        "the whole model with a two-dimensional attention mask."
    )
