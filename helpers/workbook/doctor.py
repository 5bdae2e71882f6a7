"""What is right or wrong with an environment, on one screen. Needs only Python and a clone."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from .. import ROOT

CACHE = Path(os.environ.get("WORKBOOK_CACHE") or ROOT / "data" / "cache")  # as in helpers.models
INSTALL = f"in {ROOT}: {sys.executable} -m pip install -r requirements.txt"


def pins() -> dict[str, str]:
    """Name and version of every package pinned in requirements.txt."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.M))


# Each check returns whether all is well, and what it found.


def _python():
    version = ".".join(map(str, sys.version_info[:3]))
    return sys.version_info >= (3, 11), f"Python {version} at {sys.executable}"


def _packages():
    wrong = []
    for name, wanted in pins().items():
        try:
            found = metadata.version(name).split("+")[0]  # 2.13.0+cpu is 2.13.0
        except metadata.PackageNotFoundError:
            found = "missing"
        if found != wanted:
            wrong.append(f"{name} {found} (wanted {wanted})")
    if len(wrong) > 4:
        wrong[4:] = [f"and {len(wrong) - 4} others"]
    return not wrong, ", ".join(wrong) or f"all {len(pins())} packages as pinned"


def other_clone(folder: Path) -> Path | None:
    """The clone that `folder` lies in, where it is another one than that of these helpers."""
    for clone in (folder, *folder.parents):
        if (clone / "helpers" / "__main__.py").is_file() and (clone / "notebooks").is_dir():
            return None if clone.samefile(ROOT) else clone
    return None


def _clone():
    command = [sys.executable, "-c", "import helpers; print(helpers.ROOT)"]
    asked = {"cwd": ROOT / "notebooks", "capture_output": True, "text": True, "encoding": "utf-8"}
    done = subprocess.run(command, **asked, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    found = done.stdout.strip() or "none"
    if other := other_clone(Path.cwd()):
        return False, f"this folder lies in {other}, but these are the helpers of {ROOT}"
    right = found != "none" and Path(found).samefile(ROOT)
    where = f"of this clone, {ROOT}" if right else f"{found}, not those of {ROOT}"
    return right, f"helpers that a notebook imports: {where}"


def _torch():
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch that does not load
        return False, f"torch cannot be imported: {str(error).splitlines()[0]}"
    card = torch.cuda.is_available() and torch.cuda.get_device_name()
    gpu = card or "no CUDA device, so the CPU works"
    return True, f"torch {torch.__version__}, {gpu}, {torch.get_num_threads()} threads"


def _memory():
    try:
        gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):  # Windows
        return True, "memory: not known here; a kernel needs up to 3 GB"
    return gigabytes >= 3.5, f"memory: {gigabytes:.1f} GB"


def _disk():
    free = shutil.disk_usage(ROOT).free / 2**30
    return free >= 2, f"free disk: {free:.0f} GB"


def _kernel():
    try:
        from jupyter_client.kernelspec import KernelSpecManager

        program = Path(KernelSpecManager().get_kernel_spec("python3").argv[0])
    except Exception as error:  # not installed, or no kernel of that name
        return False, f"no Jupyter kernel: {str(error) or type(error).__name__}"
    same = program.name == str(program) or program.absolute() == Path(sys.executable).absolute()
    return same, f"Jupyter kernel python3: {'this Python' if same else program}"


def _model():
    cached = any(path.suffix in (".gguf", ".safetensors") for path in CACHE.glob("**/*"))
    return True, f"default model: {f'in {CACHE}' if cached else 'the first run fetches 98 MB'}"


def _writable():
    for folder in (ROOT / "build", CACHE):
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(nearest, os.W_OK):
            return False, f"cannot write to {folder}"
    return True, "build/ and the cache can be written"


CHECKS = {  # and what to do where one is not content
    _python: "install Python 3.11 or newer",
    _packages: INSTALL,
    _clone: f"{INSTALL} (each clone needs an environment of its own)",
    _torch: INSTALL,
    _memory: "a kernel needs up to 3 GB: use a larger machine",
    _disk: "free 2 GB: model and tokenizer take 0.3, a CPU torch 1, a CUDA one 6",
    _kernel: f"{sys.executable} -m ipykernel install --sys-prefix",
    _model: "",
    _writable: "change the owner of these folders",
}


def healthy() -> bool:
    return all(check()[0] for check in CHECKS)


def main() -> int:
    """Print one line for each check, "ok" or what to do. Returns 1 where something is wrong."""
    wrong = 0
    for check, remedy in CHECKS.items():
        good, found = check()
        wrong += not good
        print(f"ok   {found}" if good else f"FIX  {found}\n     → {remedy}")
    print(f"{wrong} to put right." if wrong else "All well.")
    return int(wrong > 0)
