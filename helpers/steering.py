"""A set of steering vectors as an artefact, and the context manager that applies them."""

import json
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .residual import check_site, edit_at, resolve_layer, select_tokens

FORMAT = "steering-vectors/1"


@dataclass(frozen=True)
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

    def __post_init__(self):
        tensor = torch.as_tensor(self.tensor).detach().to("cpu", torch.float32, copy=True)
        tensor = tensor[None] if tensor.ndim == 1 else tensor
        if tensor.ndim != 2 or not tensor.numel():
            what = f"vectors of shape {list(tensor.shape)} do not fit"
            raise ValueError(f"{what}: [n_vectors, d_model] is needed.")
        if not tensor.isfinite().all():
            raise ValueError("steering vectors hold NaN or infinite numbers.")
        check_site(self.site)
        object.__setattr__(self, "tensor", tensor)

    def __len__(self):
        return len(self.tensor)

    def __getitem__(self, index):
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError(f"vector {index} is outside this set of {len(self)}.")
        return replace(self, tensor=self.tensor[index].reshape(-1, self.tensor.shape[1]))

    def __mul__(self, factor):
        radius = None if self.radius is None else self.radius * abs(factor)
        return replace(self, tensor=self.tensor * factor, radius=radius)

    __rmul__ = __mul__

    def __neg__(self):
        return -1 * self

    def save(self, path) -> None:
        """Write a .safetensors file; everything but the tensor stands in its header."""
        about = {key: value for key, value in vars(self).items() if key != "tensor"}
        metadata = {"format": FORMAT, "about": json.dumps(about)}
        save_file({"vectors": self.tensor}, str(path), metadata)

    @classmethod
    def load(cls, path, lm=None) -> "SteeringVectors":
        """Read a file written by `save`, and check that the vectors fit `lm` where it is given; a
        ValueError names the file and the field that is wrong."""
        try:
            with safe_open(str(path), "pt") as f:
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


def coefficients(coeff, n_vectors) -> torch.Tensor:
    """`coeff`, one number or one per vector, as fp32 [n_vectors]; ValueError for anything else."""
    values = torch.as_tensor(coeff, dtype=torch.float32).flatten()
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
        if isinstance(self.prompt, str):  # an unknown role is said at once
            select_tokens(self.prompt, torch.ones(1, 2, dtype=torch.long), "tokens")

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
    layer, scope = vectors.check(lm), Scope.of(tokens)
    theta = vectors.tensor * coefficients(coeff, len(vectors))[:, None]
    theta = theta[:, None].to(lm.device, lm.dtype)  # [n_vectors or 1, 1, d_model]
    call = {}  # what the forward pass under way carries

    def look(module, args, kwargs):
        call.update(_contents(args, kwargs))

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
    return {"is_prompt": cache is None or cache.get_seq_length() == 0, "mask": mask}


def _steered(scope, is_prompt=None, mask=None):
    """1 where a token is steered and 0 elsewhere: [batch, n_tokens, 1], or one number for all.
    `is_prompt` is None where blocks run without a pass of the whole model."""
    if is_prompt and scope.prompt is None or is_prompt is False and not scope.generated:
        return 0
    if mask is not None:
        chosen = select_tokens(scope.prompt, mask, "tokens") if is_prompt else mask.bool()
        return chosen[:, :, None]
    if is_prompt is False or scope.prompt in ("all", None):
        return 1
    raise ValueError(
        f"tokens {scope.prompt!r} cannot be told from padding here: they need a forward pass of "
        "the whole model with a two-dimensional attention mask."
    )
