"""Execute the notebooks into build/, going on where a run stopped; refresh the committed ones."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from .. import ROOT, UserError, ledger
from . import results
from .notebooks import committed, hash_of, put_outputs, read, resolve, source_hash, tagged
from .parameters import for_notebooks, read_recipe

PACKAGE = Path(__file__).resolve().parents[2]  # where a notebook's process finds the helpers
CELL_SECONDS = 3600  # a kernel that fell silent must not hold up a run for good
STOP_SECONDS = 10  # what a kernel gets to end in
TWO_KERNELS = 6.5e9  # bytes of memory: a kernel takes up to 3 GB
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def usual_workers() -> int:
    """How many notebooks run at a time where nobody says: two, if the machine has the room."""
    room = psutil.virtual_memory().total > TWO_KERNELS
    return 2 if room and (os.cpu_count() or 1) >= 2 else 1


def surroundings_hash() -> str:
    """A hash of what every notebook depends on: helpers' sources, and data/ but for its cache."""
    found, cache = {}, ROOT / "data" / "cache"
    for path in [*(ROOT / "helpers").glob("**/*.py"), *(ROOT / "data").glob("**/*")]:
        if path.is_file() and cache not in path.parents and not path.name.startswith("."):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[path.relative_to(ROOT).as_posix()] = content
    return hash_of(found)


class Job:
    """A notebook of a run: the files that come of it, and the process that executes it."""

    def __init__(self, path, parameters, folder, default, surroundings):
        nb = read(path)
        self.path, self.name, self.n_cells = path, path.stem, len(nb.cells)
        self.parameters, self.folder, self.default = parameters, folder, default
        self.alone = bool(tagged(nb, "times"))  # it times something: nothing else may run
        self.key = hash_of([source_hash(nb, ("code", "markdown", "raw")), surroundings, parameters])
        self.output, self.failed = folder / path.name, folder / f"{self.name}.failed.ipynb"
        self.stamp = folder / f"{self.name}.key"  # says of what source the output is
        self.partial = folder / f".{self.name}.partial.ipynb"

    def done(self) -> bool:
        """True where it succeeded before and nothing has changed since."""
        there = self.output.exists() and self.stamp.exists()
        return there and self.stamp.read_text(encoding="utf-8") == self.key

    def environment(self, one_thread) -> dict:
        """What its kernel inherits; this Python's own kernel is found first."""
        kernels = [f"{sys.prefix}/share/jupyter", os.environ.get("JUPYTER_PATH", "")]
        return {
            **os.environ,
            **(ONE_THREAD if one_thread else {}),
            "JUPYTER_PATH": os.pathsep.join(filter(None, kernels)),
            "WORKBOOK_BUILD": str(self.folder),
            "WORKBOOK_NOTEBOOK": self.name,
            "WORKBOOK_DEFAULT_RUN": "1" if self.default else "",
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            "PYTHONUTF8": "1",  # whatever the locale: what went wrong is read as that
        }

    def start(self, one_thread) -> None:
        if not sys.stdout.isatty():
            print(f"running {self.name}: {self.n_cells} cells", flush=True)
        for stale in (self.stamp, self.partial, self.failed):  # of an earlier run
            stale.unlink(missing_ok=True)
        if self.default:  # results that this run will not record again must not outlive it
            shutil.rmtree(self.folder / "claims" / self.name, ignore_errors=True)
        self.began, self.log = time.monotonic(), tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.workbook.executing"],
            cwd=PACKAGE,
            env=self.environment(one_thread),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.log,
            start_new_session=True,  # Ctrl-C reaches the runner alone, which stops the others
        )
        job = {"path": self.path, "output": self.partial, "parameters": self.parameters}
        job |= {"cwd": ROOT, "cell_seconds": CELL_SECONDS}
        with suppress(OSError):  # it ended at once: `finish` says so
            self.process.stdin.write(json.dumps(job, default=str).encode() + b"\n")
            self.process.stdin.flush()

    def finish(self) -> bool:
        """Move what came of it into place and say so in one line. True if it succeeded."""
        good, seconds = self.process.returncode == 0, f"{time.monotonic() - self.began:.0f} s"
        if good:
            os.replace(self.partial, self.output)
            self.failed.unlink(missing_ok=True)
            ledger.write_atomically(self.stamp, self.key)
            print(f"finished {self.name}: {self.n_cells} cells, {seconds}", flush=True)
        else:
            self.log.seek(0)
            said = self.log.read().decode(errors="replace").strip().splitlines()[-2:]
            problem = "\n".join(said) or f"its process ended with {self.process.returncode}"
            try:
                read(self.partial)
                os.replace(self.partial, self.failed)
                problem += f"\n  as far as it came: {self.failed}"
            except UserError:  # none, or a part of one, as a full disk leaves it
                self.partial.unlink(missing_ok=True)
            print(f"FAILED {self.name} after {seconds}, {problem}", flush=True)
        self.close()
        self.log.close()
        return good

    def close(self) -> None:
        """Its input: a process that still runs then stops."""
        with suppress(OSError):
            self.process.stdin.close()

    def stop(self) -> None:
        """Wait for a process whose input was closed; leave nothing half written."""
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.partial.unlink(missing_ok=True)


def run_jobs(jobs, workers) -> list[str]:
    """Execute the jobs; the names of those that failed. Several at a time have one thread each;
    those that time something come last, one by one, on all. Interrupted, it stops every kernel."""
    waiting = sorted(jobs, key=lambda job: job.alone) if workers > 1 else list(jobs)
    running, failed, began = [], [], time.monotonic()
    try:
        while waiting or running:
            if waiting and len(running) < (1 if waiting[0].alone else workers):
                job = waiting.pop(0)
                job.start(one_thread=workers > 1 and not job.alone)
                running.append(job)
                continue
            names = ", ".join(job.name.split("_")[0] for job in running)
            done = f"{len(jobs) - len(waiting) - len(running)} of {len(jobs)} finished"
            _line(f"running {names} · {done} · {time.monotonic() - began:.0f} s")
            time.sleep(0.2)
            for job in [job for job in running if job.process.poll() is not None]:
                _line()
                running.remove(job)
                failed += [] if job.finish() else [job.name]
    finally:
        for job in running:
            job.close()
        for job in running:
            job.stop()
    return failed


def _line(text=""):
    if sys.stdout.isatty():  # one line that is written over again and again
        print(f"\r\033[K{text}", end="", flush=True)


def run(notebooks=None, parameters=None, recipe=None, model=None, build=None, workers=None):
    """Execute notebooks into `build` (default: build/) and return the names of those that failed.

    What succeeded before is skipped while source, helpers, data and parameters stay the same. With
    parameters, a recipe, a model or notebooks of one's own, outputs go to build/runs/<hash>/, the
    ledger stays as it is. UserError, before anything runs: a mistake in these, another run in the
    same folder.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: one or more notebooks run at a time.")
    named, values = read_recipe(recipe) if recipe else (None, {})
    shares = for_notebooks(resolve(notebooks or named), parameters or {}, values, model)
    own, build = all(map(committed, shares)), ledger.build_folder(build).resolve()
    default = own and not any(shares.values())
    of_run = hash_of({path.stem if own else str(path): share for path, share in shares.items()})[:8]
    folder = build if default else build / "runs" / of_run
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            failed = _run_all(shares, folder, default, workers or usual_workers())
            if default:
                print(results.terminal_table(results.write(build), build))
            else:
                what = "parameters" if own else "notebooks"
                print(f"With {what} of your own: outputs in {folder}, the ledger as it was.")
            return failed
    except Timeout:
        raise UserError(f"Another run is at work in {folder}; wait for it, or stop it.") from None


def _run_all(shares, folder, default, workers):
    surroundings = surroundings_hash()
    jobs = [Job(path, share, folder, default, surroundings) for path, share in shares.items()]
    done = [job for job in jobs if job.done()]
    for job in done:
        print(f"skipped {job.name}: unchanged since its last run", flush=True)
    failed = run_jobs([job for job in jobs if job not in done], workers)
    return [job.name for job in jobs if job.name in failed]  # in reading order


def refresh(notebooks=None, build=None, workers=None):
    """A default run, its outputs put into the sources; returns what failed, and stays as it was."""
    build, paths = ledger.build_folder(build).resolve(), resolve(notebooks)
    for path in paths:
        if not committed(path):
            raise UserError(f"{path} is not a notebook of {ROOT / 'notebooks'}: only those count.")
    failed = run(paths, build=build, workers=workers)
    for path in paths:
        if path.stem not in failed:
            problems = put_outputs(path, read(build / f"{path.stem}.ipynb"))
            print("\n".join([f"refreshed {path.stem}", *problems]))
    readme = ROOT / "README.md"
    ledger.write_atomically(readme, results.into_readme(readme.read_text(encoding="utf-8"), build))
    return failed
