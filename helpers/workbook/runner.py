"""Execute the notebooks into build/, going on where an interrupted run stopped; bring the committed ones up to date."""

import hashlib
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import papermill
import yaml
from filelock import FileLock, Timeout
from nbclient.output_widget import OutputWidget
from papermill.exceptions import PapermillExecutionError

from .. import ROOT, UserError, ledger
from . import recipes
from .notebooks import (
    PICTURE,
    check,
    committed,
    parameters_of,
    picture,
    read,
    resolve,
    source_hash,
    widget_errors,
)

CELL_SECONDS = (
    3600  # no cell takes an hour: a kernel that fell silent must not hold up a run for good
)

# While it waits for a cell's reply, nbclient sends an Output widget's content back to the kernel on the same socket, and may then
# never notice the reply (nbclient issue 312; about one such cell in twenty on a busy machine). It keeps the outputs without this.
OutputWidget.sync_state = lambda self: None


def read_recipe(path):
    """(notebooks or None, parameters) of a YAML recipe: NAME: value lines, or the two keys notebooks and parameters."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Recipe {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"Recipe {path} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(recipe, dict) or not all(isinstance(name, str) for name in recipe):
        raise UserError(f"Recipe {path} must be a mapping of parameter names to values.")
    if not {"notebooks", "parameters"} & set(recipe):
        return None, recipe
    names, parameters = recipe.get("notebooks"), recipe.get("parameters") or {}
    extra = set(recipe) - {"notebooks", "parameters"}
    if extra or not isinstance(parameters, dict) or not isinstance(names, (list, type(None))):
        raise UserError(
            f"Recipe {path} may hold a list 'notebooks' and a mapping 'parameters', and nothing beside them."
        )
    return names, parameters


def _share_out(paths, parameters):
    """For each notebook the parameters that it knows. UserError where one is known to none of them."""
    known = {}
    for path in paths if parameters else []:
        try:
            known[path] = set(parameters_of(read(path)))
        except (UserError, SyntaxError) as error:
            raise UserError(f"{path.stem} takes no parameters: {error}.") from None
    allowed = sorted(set().union(*known.values()))
    for name in parameters:
        if name not in allowed:
            raise UserError(
                f"No notebook of this run has a parameter {name!r}; they have {', '.join(allowed) or 'none'}."
            )
    return {
        path: {name: value for name, value in parameters.items() if name in known[path]}
        if parameters
        else {}
        for path in paths
    }


def _of_these(paths, values):
    """A recipe's parameters without those that only other notebooks have: one may run a part of what it was written for."""

    def known(paths):
        for path in paths:
            with suppress(UserError, SyntaxError):
                yield from parameters_of(read(path))

    others = set(known(resolve())) - set(known(paths)) if values else set()
    return {name: value for name, value in values.items() if name not in others}


# -- what a run depends on ---------------------------------------------------------------------------------------------


def _surroundings_hash():
    """A hash of what every notebook depends on: the helpers' sources, and data/ except its cache."""
    files = [*(ROOT / "helpers").glob("**/*.py"), *(ROOT / "data").glob("**/*")]
    digest = hashlib.sha256()
    for path in sorted(
        file for file in files if file.is_file() and ROOT / "data" / "cache" not in file.parents
    ):
        if not path.name.startswith("."):
            digest.update(
                f"{path.relative_to(ROOT).as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode()
            )
    return digest.hexdigest()


def _key(nb, parameters, surroundings):
    parts = [
        source_hash(nb, ("code", "markdown", "raw")),
        surroundings,
        json.dumps(parameters, sort_keys=True, default=str),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# -- executing ---------------------------------------------------------------------------------------------------------


@contextmanager
def _kernel_environment(build, name, default):
    """The environment that kernels inherit: this interpreter's own kernel first, and whether the run counts for the ledger."""
    kernels = [str(Path(sys.prefix) / "share" / "jupyter"), os.environ.get("JUPYTER_PATH", "")]
    values = {
        "JUPYTER_PATH": os.pathsep.join(filter(None, kernels)),
        "WORKBOOK_BUILD": str(build),
        "WORKBOOK_NOTEBOOK": name,
        "WORKBOOK_DEFAULT_RUN": "1" if default else None,
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    before = {key: os.environ.get(key) for key in values}

    def put(settings):
        for key, value in settings.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})

    put(values)
    try:
        yield
    finally:
        put(before)


def execute(nb, output, parameters=None, build=None, name="notebook", default=False):
    """Execute `nb` with papermill, from the repository root, into the file `output`.

    Returns (notebook, None), or (None, where and why) where a cell or a widget's callback raised or the kernel died.
    """
    bar = {
        "desc": name,
        "file": sys.stdout,
        "disable": not sys.stdout.isatty(),
        "leave": False,
        "bar_format": "{desc}: cell {n_fmt} of {total_fmt}, {elapsed_s:.0f} s",
    }
    target = str(output).replace("{", "{{").replace("}", "}}")  # papermill formats its paths
    try:
        with _kernel_environment(build or ledger.build_folder(), name, default):
            done = papermill.execute_notebook(
                nb,
                target,
                parameters or {},
                kernel_name="python3",
                language="python",
                progress_bar=bar,
                cwd=ROOT,
                coalesce_streams=True,
                execution_timeout=CELL_SECONDS,
                extra_arguments=["--log-level=CRITICAL"],
            )  # the kernel's own chatter
    except PapermillExecutionError as error:
        index = error.cell_index - bool(parameters)  # papermill put a cell of parameters in front
        first = next((line for line in error.source.splitlines() if line.strip()), "")
        where = f"cell {index + 1} of {len(nb.cells)}: {first.strip()}"
        return None, f"{where}\n  {error.ename}: {str(error.evalue).strip()[:300]}"
    except (
        Exception
    ) as error:  # a dead kernel, no kernel, a full disk: the other notebooks still run
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    errors = widget_errors(done)
    return (None, f"a widget's callback raised\n  {errors[0]}") if errors else (done, None)


def _run_one(path, parameters, build, key, default):
    """Execute one notebook, report in one line, and move what came of it into place. True if it succeeded."""
    output, failed, stamp = (
        build / f"{path.stem}{end}" for end in (".ipynb", ".failed.ipynb", ".key")
    )
    nb, partial = read(path), build / f".{path.stem}.partial.ipynb"
    if not sys.stdout.isatty():
        print(f"running {path.stem}: {len(nb.cells)} cells", flush=True)
    stamp.unlink(missing_ok=True)
    if default:  # results that this run will not record again must not outlive it
        shutil.rmtree(build / "claims" / path.stem, ignore_errors=True)
    start = time.monotonic()
    try:
        done, problem = execute(nb, partial, parameters, build, path.stem, default)
        seconds = f"{time.monotonic() - start:.0f} s"
        if done is not None:
            os.replace(partial, output)
            failed.unlink(missing_ok=True)
            ledger.write_atomically(stamp, key)
            print(f"finished {path.stem}: {len(nb.cells)} cells, {seconds}", flush=True)
        else:
            print(
                f"FAILED {path.stem} after {seconds}, {problem}\n  as far as it came: {failed}",
                flush=True,
            )
            if partial.exists():
                os.replace(partial, failed)
        return done is not None
    finally:
        partial.unlink(missing_ok=True)


def run(notebooks=None, parameters=None, recipe=None, build=None):
    """Execute notebooks into `build` (default: build/) and return the names of those that failed.

    A notebook that succeeded before is skipped while its source, the helpers, the data and the parameters stay the same. With
    parameters or a recipe (those of `parameters` win), outputs go to build/runs/<hash>/ and the ledger is left alone.
    UserError, before anything runs: an unknown notebook or parameter, a bad recipe, another run in the same folder.
    """
    named, values = read_recipe(recipe) if recipe else (None, {})
    paths = resolve(notebooks or named)
    values = {**_of_these(paths, values), **(parameters or {})}
    _share_out(paths, values)  # an unknown parameter is said before a model is loaded
    values = recipes.resolve(values)
    shares = _share_out(paths, values)
    default, build = not values, ledger.build_folder(build).resolve()
    folder = build
    if not default:
        folder = (
            build
            / "runs"
            / hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[
                :8
            ]
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            failed = _run_all(shares, folder, default)
            if default:
                print(ledger.terminal_table(ledger.write(build)))
            else:
                print(f"With parameters of your own: outputs in {folder}, the ledger as it was.")
            return failed
    except Timeout:
        raise UserError(f"Another run is at work in {folder}; wait for it, or stop it.") from None


def _run_all(shares, folder, default):
    surroundings, failed = _surroundings_hash(), []
    for path, share in shares.items():
        key, stamp = _key(read(path), share, surroundings), folder / f"{path.stem}.key"
        if (folder / f"{path.stem}.ipynb").exists() and stamp.exists() and stamp.read_text() == key:
            print(f"skipped {path.stem}: unchanged since its last run", flush=True)
        elif not _run_one(path, share, folder, key, default):
            failed.append(path.stem)
    return failed


# -- the committed notebooks -------------------------------------------------------------------------------------------


def refresh(notebooks=None, build=None):
    """Bring committed notebooks up to date: a default run, whose outputs are cleaned and put into the sources, cell by cell.

    What a run would skip is not executed again. A notebook that failed is left as it was. Returns the names that failed.
    """
    build, paths = ledger.build_folder(build).resolve(), resolve(notebooks)
    failed = run(paths, build=build)
    for path in (path for path in paths if path.stem not in failed):
        nb = committed(read(path), nbformat.read(build / f"{path.stem}.ipynb", as_version=4))
        ledger.write_atomically(path, nbformat.writes(nb) + "\n")
        if shown := picture(nb):
            PICTURE.write_bytes(shown)
        print("\n".join([f"refreshed {path.stem}", *check([path])]))
    readme = ROOT / "README.md"
    ledger.write_atomically(readme, ledger.into_readme(readme.read_text(encoding="utf-8"), build))
    return failed
