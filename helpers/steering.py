"""A set of steering vectors as an artefact, and the context manager that applies them."""

import json
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .residual.sites import add_at, check_site, resolve_layer, select_tokens

FORMAT = "steering-vectors/1"


@dataclass(frozen=True)
class SteeringVectors:
    """Vectors [n_vectors, d_model] (fp32, CPU) with the place they belong to: block `source_layer`, `site`, norm `radius`.

    `2 * v`, `-v`, `v[3]`, `v[:8]` and `v[[1, 5]]` give new sets; the tensor handed in is copied, never changed.
    """

    tensor: torch.Tensor
    source_layer: int
    site: str = "resid_post"
    radius: float | None = None
    provenance: dict = field(default_factory=dict)

    def __post_init__(self):
        tensor = torch.as_tensor(self.tensor).detach().to("cpu", torch.float32, copy=True)
        if tensor.ndim == 1:
            tensor = tensor[None]
        if tensor.ndim != 2 or not tensor.numel():
            raise ValueError(
                f"steering vectors of shape {list(tensor.shape)} do not fit: [n_vectors, d_model] is needed."
            )
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
        return replace(
            self,
            tensor=self.tensor * factor,
            radius=None if self.radius is None else self.radius * abs(factor),
        )

    __rmul__ = __mul__

    def __neg__(self):
        return replace(self, tensor=-self.tensor)

    def save(self, path) -> None:
        """Write a .safetensors file; everything but the tensor stands in its header."""
        about = {
            "source_layer": self.source_layer,
            "site": self.site,
            "radius": self.radius,
            "provenance": self.provenance,
        }
        save_file(
            {"vectors": self.tensor},
            str(path),
            metadata={"format": FORMAT, "about": json.dumps(about)},
        )

    @classmethod
    def load(cls, path, lm=None) -> "SteeringVectors":
        """Read a file written by `save`; with `lm` also check that the vectors fit that model (ValueError names the field)."""
        try:
            with safe_open(str(path), "pt") as f:
                header, tensor = f.metadata() or {}, f.get_tensor("vectors")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} cannot be read as steering vectors: {str(error).splitlines()[0]}."
            ) from None
        if header.get("format") != FORMAT:
            raise ValueError(
                f"{path} holds no steering vectors: its field 'format' is {header.get('format')!r}, not {FORMAT!r}."
            )
        try:
            vectors = cls(tensor, **json.loads(header.get("about", "")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is broken, its fields 'vectors' and 'about' make no steering vectors: {error}"
            ) from None
        if lm is not None:
            vectors.check(lm, str(path))
        return vectors

    def check(self, lm, name="these vectors") -> int:
        """The source layer as an index into `lm`'s blocks; a ValueError says what does not fit."""
        if self.tensor.shape[1] != lm.d_model:
            raise ValueError(
                f"{name}: d_model is {self.tensor.shape[1]}, that of {lm.name} is {lm.d_model}; "
                "they were made for another model."
            )
        return resolve_layer(lm, self.source_layer, f"{name}: source_layer")


def coefficients(coeff, n_vectors) -> torch.Tensor:
    """`coeff`, one number or one per vector, as fp32 [n_vectors]; a ValueError says what does not fit."""
    values = torch.as_tensor(coeff, dtype=torch.float32).flatten()
    if len(values) not in (1, n_vectors) or not values.isfinite().all():
        raise ValueError(
            f"coeff {coeff!r} does not fit: give one finite number, or one for each of the {n_vectors} vectors."
        )
    return values.expand(n_vectors)


@contextmanager
def steer(lm, vectors, coeff=1.0, tokens="all"):
    """While inside, `coeff * θ` is added to the residual stream of `lm`; afterwards the model is what it was before.

    `vectors`: a SteeringVectors with one vector (added to every row of the batch) or one vector per row. `coeff`: a number,
    or one per vector. `tokens`: "all", "prompt" (those of the forward pass that fills an empty KV cache), "generated" (those
    after it), or a role, slice or list of prompt positions as in `select_tokens`. Left padding is never steered.

    >>> with steer(lm, result.vectors[0], coeff=1.0):
    ...     lm.model.generate(**lm.encode(prompt))
    """
    layer = vectors.check(lm)
    theta = vectors.tensor * coefficients(coeff, len(vectors))[:, None]
    theta = theta[:, None].to(lm.device, lm.dtype)  # [n_vectors or 1, 1, d_model]
    if isinstance(tokens, str) and tokens in ("all", "prompt", "generated"):
        role, positions = tokens, "all"
    else:
        role, positions = "prompt", tokens
        if isinstance(tokens, str):
            select_tokens(
                tokens, torch.ones(1, 2, dtype=torch.long), "tokens"
            )  # an unknown role is said at once
    call = {}

    def look(module, args, kwargs):
        """What this forward pass carries: prompt or generated tokens, and which of them are padding."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        call["prompt"] = cache is None or cache.get_seq_length() == 0
        if mask is None:
            mask = torch.ones(ids.shape[:2], dtype=torch.long, device=ids.device)
        call["mask"] = (
            mask[:, -ids.shape[1] :] if torch.is_tensor(mask) and mask.ndim == 2 else None
        )

    def offset(hidden):
        batch = hidden.shape[0]
        if len(theta) not in (1, batch):
            raise ValueError(
                f"{len(theta)} vectors do not fit a batch of {batch} rows: give one vector, or one per row."
            )
        if call and role != "all" and call["prompt"] != (role == "prompt"):
            return torch.zeros_like(theta)
        if not call or call["mask"] is None:
            if positions != "all":
                raise ValueError(
                    f"tokens {positions!r} cannot be told from padding here: they need a forward pass of the whole "
                    "model with a two-dimensional attention mask."
                )
            return theta
        chosen = (
            select_tokens(positions, call["mask"], "tokens")
            if call["prompt"]
            else call["mask"].bool()
        )
        return theta * chosen[:, :, None]

    handle = lm.decoder.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with add_at(lm, layer, vectors.site, offset):
            yield
    finally:
        handle.remove()
