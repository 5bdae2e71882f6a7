"""Execute the notebooks into build/, going on where an interrupted run stopped; refresh and check the committed ones."""
import ast
import hashlib
import json
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill
import yaml
from filelock import FileLock, Timeout
from papermill.cli import _resolve_type as parse_value  # "3" → 3, "0.5" → 0.5, "True" → True, anything else stays text
from papermill.exceptions import PapermillExecutionError

from helpers import ledger

ROOT = Path(__file__).resolve().parents[1]
WIDGET_STATE, WIDGET_VIEW = "application/vnd.jupyter.widget-state+json", "application/vnd.jupyter.widget-view+json"
MACHINE_PATH = r"(?:/home/\w|/Users/\w|/root/|/tmp/\w|[A-Za-z]:\\Users\\)"
MAX_BYTES, MAX_LINES = 1_000_000, 25


class UserError(ValueError):
    """Something the person at the keyboard can put right, said in one sentence."""


# -- notebooks and their parameters ------------------------------------------------------------------------------------

def resolve(names=None):
    """Paths of notebooks given as "02", "02_training_one_vector" or a path; all of notebooks/ in reading order by default."""
    everything = sorted((ROOT / "notebooks").glob("[0-9]*_*.ipynb"))
    if not names and not everything:
        raise UserError(f"There are no notebooks in {ROOT / 'notebooks'}.")
    paths = []
    for name in map(str, names or everything):
        matches = [path for path in everything if name in (path.stem, path.stem.split("_")[0])]
        if not matches and name.endswith(".ipynb") and Path(name).is_file():
            matches = [Path(name).resolve()]
        if not matches:
            raise UserError(f"There is no notebook {name!r}; there are {', '.join(path.stem for path in everything)}.")
        paths += [path for path in matches if path not in paths]
    return paths


def read(path):
    """A notebook as nbformat reads it, with the metadata that papermill insists on. UserError where it is not a notebook."""
    try:
        nb = nbformat.read(path, as_version=4)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a notebook: {str(error).splitlines()[0]}") from None
    nb.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nb.metadata["language_info"] = {"name": "python"}
    return nb


def tagged(nb, tag):
    """The cells that carry `tag`, in order."""
    return [cell for cell in nb.cells if tag in cell.metadata.get("tags", [])]


def parameters_of(nb):
    """Names and values of the parameters cell. UserError unless there is one such cell, of nothing but NAME = literal."""
    cells = tagged(nb, "parameters")
    if len(cells) != 1:
        raise UserError(f"it has {len(cells)} cells tagged 'parameters', where one is needed")
    found = {}
    for node in ast.parse(cells[0].source).body:
        try:
            (target,) = node.targets
            found[target.id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            raise UserError(f"its parameters cell holds {ast.unparse(node)!r}, which is not NAME = literal") from None
    return found


def read_recipe(path):
    """(notebooks or None, parameters) of a YAML recipe: NAME: value lines, or the two keys notebooks and parameters."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Recipe {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"Recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict) or not all(isinstance(name, str) for name in recipe):
        raise UserError(f"Recipe {path} must be a mapping of parameter names to values.")
    if not {"notebooks", "parameters"} & set(recipe):
        return None, recipe
    names, parameters = recipe.get("notebooks"), recipe.get("parameters") or {}
    extra = set(recipe) - {"notebooks", "parameters"}
    if extra or not isinstance(parameters, dict) or not isinstance(names, (list, type(None))):
        raise UserError(f"Recipe {path} may hold a list 'notebooks' and a mapping 'parameters', and nothing beside them.")
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
            raise UserError(f"No notebook of this run has a parameter {name!r}; they have {', '.join(allowed) or 'none'}.")
    return {path: {name: value for name, value in parameters.items() if name in known[path]} if parameters else {}
            for path in paths}


# -- what a run depends on ---------------------------------------------------------------------------------------------

def source_hash(nb, kinds=("code",)):
    """A hash of the cells' sources and tags, outputs aside."""
    cells = [(cell.cell_type, cell.source, sorted(cell.metadata.get("tags", []))) for cell in nb.cells if cell.cell_type in kinds]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def _surroundings_hash():
    """A hash of what every notebook depends on: the helpers' sources, and data/ except its cache."""
    files = [*(ROOT / "helpers").glob("**/*.py"), *(ROOT / "data").glob("**/*")]
    digest = hashlib.sha256()
    for path in sorted(file for file in files if file.is_file() and ROOT / "data" / "cache" not in file.parents):
        if not path.name.startswith("."):
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def _key(nb, parameters, surroundings):
    parts = [source_hash(nb, ("code", "markdown", "raw")), surroundings, json.dumps(parameters, sort_keys=True, default=str)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# -- executing ---------------------------------------------------------------------------------------------------------

@contextmanager
def _kernel_environment(build, name, default):
    """The environment that kernels inherit: this interpreter's own kernel first, and whether the run counts for the ledger."""
    kernels = [str(Path(sys.prefix) / "share" / "jupyter")] + [os.environ[key] for key in ["JUPYTER_PATH"] if key in os.environ]
    values = {"JUPYTER_PATH": os.pathsep.join(kernels), "WORKBOOK_BUILD": str(build), "WORKBOOK_NOTEBOOK": name,
              "WORKBOOK_DEFAULT_RUN": "1" if default else None, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    before = {key: os.environ.get(key) for key in values}

    def put(settings):
        for key, value in settings.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
    put(values)
    try:
        yield
    finally:
        put(before)


def widget_errors(nb):
    """Errors that ipywidgets callbacks swallowed: they show only in the state of Output widgets, and no tool fails on them."""
    state = nb.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    outputs = [output for model in state.values() for output in model.get("state", {}).get("outputs", ())]
    return [f"{output['ename']}: {output['evalue']}" for output in outputs if output.get("output_type") == "error"]


def execute(nb, output, parameters=None, build=None, name="notebook", default=False):
    """Execute `nb` with papermill from the repository root into the file `output`, and return it. Returns (notebook, None) or,
    where a cell or a widget's callback raised or the kernel died, (None, one or two lines that say where and why)."""
    bar = {"desc": name, "file": sys.stdout, "disable": not sys.stdout.isatty(), "leave": False,
           "bar_format": "{desc}: cell {n_fmt} of {total_fmt}, {elapsed_s:.0f} s"}
    target = str(output).replace("{", "{{").replace("}", "}}")  # papermill formats its paths
    try:
        with _kernel_environment(build or ledger.build_folder(), name, default):
            done = papermill.execute_notebook(nb, target, parameters or {}, kernel_name="python3", language="python",
                                              progress_bar=bar, cwd=ROOT, coalesce_streams=True,
                                              extra_arguments=["--log-level=CRITICAL"])  # its own chatter
    except PapermillExecutionError as error:
        index = error.cell_index + (0 if not parameters else -1)  # papermill put a cell of parameters in front
        first = next((line for line in error.source.splitlines() if line.strip()), "")
        return None, f"cell {index + 1} of {len(nb.cells)}: {first.strip()}\n  {error.ename}: {str(error.evalue).strip()[:300]}"
    except Exception as error:  # a dead kernel, no kernel, a full disk: the other notebooks still run
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    errors = widget_errors(done)
    return (None, f"a widget's callback raised\n  {errors[0]}") if errors else (done, None)


def _run_one(path, parameters, build, key, default):
    """Execute one notebook, report in one line, and move what came of it into place. True if it succeeded."""
    output, failed, stamp = (build / f"{path.stem}{end}" for end in (".ipynb", ".failed.ipynb", ".key"))
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
            print(f"FAILED {path.stem} after {seconds}, {problem}\n  as far as it came: {failed}", flush=True)
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
    values = {**values, **(parameters or {})}
    shares = _share_out(resolve(notebooks or named), values)
    default, build = not values, ledger.build_folder(build).resolve()
    folder = build
    if not default:
        folder = build / "runs" / hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:8]
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

def _without_paths(text):
    for path, short in ((str(ROOT), "."), (str(Path.home()), "~")):
        text = re.sub(re.escape(path) + r"(?=[/\\])", short, text) if len(path) > 1 else text
    return text


def _clean_output(output):
    """An output as it is committed: without widget views (their state is not committed) and machine paths; None to drop it."""
    if "text" in output:
        output["text"] = _without_paths(output["text"])
    data = output.get("data", {})
    if data.pop(WIDGET_VIEW, None) is not None and set(data) <= {"text/plain"}:
        return None  # only "VBox(children=…" would be left
    for kind, value in data.items():
        if isinstance(value, str) and kind.startswith("text/"):
            data[kind] = _without_paths(value)
    return output


def refresh(notebooks=None, build=None):
    """Bring committed notebooks up to date: a default run, whose outputs are cleaned and put into the sources, cell by cell.

    What a run would skip is not executed again. A notebook that failed is left as it was. Returns the names that failed.
    """
    build, paths = ledger.build_folder(build).resolve(), resolve(notebooks)
    failed = run(paths, build=build)
    for path in (path for path in paths if path.stem not in failed):
        nb, done = read(path), nbformat.read(build / f"{path.stem}.ipynb", as_version=4)
        for cell, executed in zip(nb.cells, done.cells, strict=True):
            for name in ("papermill", "execution", "ExecuteTime"):
                cell.metadata.pop(name, None)
            if cell.cell_type == "code":
                cell.outputs = [kept for output in executed.outputs if (kept := _clean_output(output))]
                cell.execution_count = executed.execution_count
        nb.metadata = nbformat.from_dict({"kernelspec": nb.metadata["kernelspec"], "language_info": nb.metadata["language_info"],
                                          "workbook": {"source_hash": source_hash(nb)}})
        ledger.write_atomically(path, nbformat.writes(nb) + "\n")
        print("\n".join([f"refreshed {path.stem}", *check([path])]))
    return failed


def check(notebooks=None):
    """Problems of the committed notebooks, one sentence each: are they current, executed in order, and clean?"""
    return [f"{path.name}: {problem}" for path in resolve(notebooks) for problem in _problems(path)]


def _problems(path):
    nb, code = read(path), []
    if nb.metadata.get("workbook", {}).get("source_hash") != source_hash(nb):
        yield "its outputs are not those of its present source; python -m helpers refresh brings them up to date."
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "its cells were not executed once each from top to bottom."
    if {"widgets", "papermill"} & set(nb.metadata) or any({"papermill", "execution"} & set(cell.metadata) for cell in nb.cells):
        yield "its metadata holds widget state or traces of an execution."
    if path.stat().st_size > MAX_BYTES:
        yield f"it has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}."
    try:
        parameters_of(nb)
    except (UserError, SyntaxError) as error:
        yield f"{error}."
    for number, cell in enumerate(nb.cells, 1):
        yield from (f"cell {number} {problem}" for problem in _cell_problems(cell))


def _cell_problems(cell):
    lines = len(cell.source.splitlines())
    if cell.cell_type == "code" and lines > MAX_LINES:
        yield f"has {lines} lines, more than {MAX_LINES}."
    texts = [cell.source]
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        texts += [output.get("text", "")] + [str(value) for kind, value in data.items() if not kind.startswith("image/p")]
        if output.output_type == "error":
            yield f"shows an error: {output.ename}."
        if output.get("name") == "stderr":
            yield f"writes to stderr: {output.text.strip()[:80]!r}."
        if WIDGET_VIEW in data:
            yield "shows a widget whose state is not committed."
    found = re.search(f"(?:{re.escape(str(ROOT))}|{MACHINE_PATH})[^\\s\"'<]*", "\n".join(texts))
    if found:
        yield f"names a path of this machine: {found.group()!r}."
