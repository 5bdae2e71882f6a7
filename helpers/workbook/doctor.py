"""What is right or wrong with an environment, in one screen. Needs nothing but Python, so it runs right after a clone."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from .. import ROOT

CACHE = Path(
    os.environ.get("WORKBOOK_CACHE") or ROOT / "data" / "cache"
)  # as in helpers.obtain, which needs packages
INSTALL = f"{sys.executable} -m pip install -r requirements.txt"


def pins():
    """Name and version of every package pinned in requirements.txt."""
    return dict(
        re.findall(
            r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M
        )
    )


def _python():
    version = ".".join(map(str, sys.version_info[:3]))
    return (
        sys.version_info >= (3, 11),
        f"Python {version} at {sys.executable}",
        "install Python 3.11 or newer",
    )


def _packages():
    wrong = []
    for name, wanted in pins().items():
        try:
            found = importlib.metadata.version(name).split("+")[0]  # 2.13.0+cpu is 2.13.0
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != wanted:
            wrong.append(f"{name} {found} (wanted {wanted})")
    if len(wrong) > 4:
        wrong[4:] = [f"and {len(wrong) - 4} others"]
    return (
        not wrong,
        ", ".join(wrong) or f"all {len(pins())} packages as pinned in requirements.txt",
        INSTALL,
    )


def _torch():
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch that does not load
        return False, f"torch cannot be imported: {str(error).splitlines()[0]}", INSTALL
    gpu = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "no CUDA device, so the CPU works"
    )
    return (
        True,
        f"torch {torch.__version__}, {gpu}, {torch.get_num_threads()} threads on {os.cpu_count()} cores",
        "",
    )


def _memory():
    try:
        gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):  # Windows
        return True, "memory: not known here; a kernel needs up to 3 GB", ""
    return (
        gigabytes >= 3.5,
        f"memory: {gigabytes:.1f} GB",
        "a kernel needs up to 3 GB: use a larger machine",
    )


def _disk():
    free = shutil.disk_usage(ROOT).free / 2**30
    return (
        free >= 2,
        f"free disk: {free:.0f} GB",
        "free 2 GB: the model and its tokenizer take 0.3, a CPU torch 1, a CUDA one 6",
    )


def _kernel():
    try:
        from jupyter_client.kernelspec import KernelSpecManager

        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except Exception as error:  # not installed, or no kernel of that name
        return False, f"no Jupyter kernel: {str(error) or type(error).__name__}", INSTALL
    same = (
        Path(program).name == program or Path(program).absolute() == Path(sys.executable).absolute()
    )
    found = "Jupyter kernel python3: " + ("this Python" if same else program)
    return same, found, f"{sys.executable} -m ipykernel install --sys-prefix"


def _model():
    cached = [path for path in CACHE.glob("**/*") if path.suffix in (".gguf", ".safetensors")]
    return (
        True,
        "default model: "
        + (f"in {CACHE}" if cached else "not here yet; the first run fetches 98 MB"),
        "",
    )


def _pip():
    here = importlib.util.find_spec("pip") is not None
    other = shutil.which("uv") or shutil.which(
        "pip"
    )  # an environment made by uv or conda may have no pip of its own
    found = "there" if here else other or "missing; it fetches the default model"
    return bool(here or other), f"pip: {found}", "install pip or uv"


def _writable():
    folders = [ROOT / "build", CACHE]
    wrong = []
    for folder in folders:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(nearest, os.W_OK):
            wrong.append(str(folder))
    found = (
        f"cannot write to {' and '.join(wrong)}" if wrong else "build/ and the cache can be written"
    )
    return not wrong, found, "change the owner of these folders"


CHECKS = (_python, _packages, _torch, _memory, _disk, _kernel, _pip, _model, _writable)


def healthy():
    """True where every check is content."""
    return all(check()[0] for check in CHECKS)


def main():
    """Print one line for each check, "ok" or what to do. Returns 1 where something is wrong, else 0."""
    wrong = 0
    for check in CHECKS:
        good, found, remedy = check()
        wrong += not good
        print(f"{'ok  ' if good else 'FIX '} {found}" + ("" if good else f"\n     → {remedy}"))
    print("All well." if not wrong else f"{wrong} to put right.")
    return int(wrong > 0)
