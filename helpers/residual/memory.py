"""Memory: how much is free, and work done in parts that halve when memory runs out."""

import gc
import re

import psutil
import torch
from tqdm.auto import tqdm

# What PyTorch's allocators say in a plain RuntimeError: the CPU's, MPS's, cuBLAS' workspace
_OUT = re.compile(
    r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.I
)


def free_memory(device) -> int:
    """Bytes that can still be had on a torch device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def is_out_of_memory(error: BaseException) -> bool:
    """Is this a lack of memory, on whatever device? (PyTorch has an own type for CUDA alone.)"""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT.search(str(error)))


def in_parts(run, rows, size: int, what: str = "rows") -> tuple[list, int]:
    """`run(part)` for consecutive parts of `rows` (a tensor or a list) of at most `size`: the
    results, and the size that fitted.

    Where memory runs out the size is halved, which is said, and the part is done again; what was
    done is kept. `run` must not have changed anything when it fails. Raises MemoryError where not
    even a part of 1 fits.
    """
    done, start = [], 0
    while start < len(rows):
        short = None
        try:
            done.append(run(rows[start : start + size]))
            start += size
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            short = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        if short is not None:  # here, because `error` held the tensors of the failed part
            size = min(size, len(rows) - start)
            if size == 1:
                raise MemoryError(
                    f"Out of memory with 1 of the {what} at a time ({short}): use shorter or fewer "
                    "prompts, layers closer together, or a smaller dtype."
                )
            size //= 2
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            tqdm.write(f"Out of memory: going on with {size} {what} at a time.")
    return done, size
