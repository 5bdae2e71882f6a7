"""Notebook files: find, read, clean and check them."""

import ast
import base64
import hashlib
import json
import re
from pathlib import Path

import nbformat

from .. import ROOT, UserError
from ..figures.render import PANEL_ERROR
from ..ledger import write_atomically

WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
MACHINE_PATH = r"(?:/home/\w|/Users/\w|/root/|/tmp/\w|[A-Za-z]:\\Users\\)"
PICTURES = {
    "readme-figure": "first_look.png",
    "readme-drawing": "the_idea.png",
}  # the README's, of cells so tagged
MAX_BYTES = 1_000_000
MAX_LINES = 25


def resolve(names=None) -> list[Path]:
    """Paths of notebooks given as "02", "02_training_one_vector" or a path; by default all."""
    folder = ROOT / "notebooks"
    everything = [*sorted(folder.glob("[0-9]*_*.ipynb")), *folder.glob("explorer.ipynb")]
    if not names and not everything:
        raise UserError(f"There are no notebooks in {folder}.")
    paths = []
    for name in map(str, names or everything):
        matches = [path for path in everything if name in (path.stem, path.stem.split("_")[0])]
        if not matches and name.endswith(".ipynb") and Path(name).is_file():
            matches = [Path(name).resolve()]
        if not matches:
            known = ", ".join(path.stem for path in everything)
            raise UserError(f"There is no notebook {name!r}; there are {known}.")
        paths += matches
    paths = list(dict.fromkeys(paths))
    stems = [path.stem for path in paths]
    for path in paths:
        if stems.count(path.stem) > 1:
            raise UserError(f"Two notebooks are called {path.stem}: run one, then the other.")
    return paths


def committed(path) -> bool:
    """Whether it is a notebook of notebooks/, which counts for the ledger and the README."""
    return path.parent == ROOT / "notebooks"


def read(path):
    """A notebook, with the metadata that papermill insists on; UserError where it is none."""
    try:
        nb = nbformat.read(path, as_version=4)
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        nb.metadata.update(kernelspec=kernel, language_info={"name": "python"})
        _ = [(cell.cell_type, cell.source, cell.metadata.items()) for cell in nb.cells]
    except Exception as error:  # nbformat raises whatever a file of another form leads to
        why = f"{str(error) or type(error).__name__}".splitlines()[0]
        raise UserError(f"{path} is not a notebook: {why}") from None
    return nb


def tagged(nb, tag) -> list:
    """The cells that carry `tag`, in order."""
    return [cell for cell in nb.cells if tag in cell.metadata.get("tags", [])]


def parameters_of(nb) -> dict:
    """Names and values of the parameters cell; UserError unless it is one cell of literals."""
    cells = tagged(nb, "parameters")
    if len(cells) != 1:
        raise UserError(f"it has {len(cells)} cells tagged 'parameters', where one is needed")
    found = {}
    for node in ast.parse(cells[0].source).body:
        try:
            (target,) = node.targets
            found[target.id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            wrong = f"{ast.unparse(node)!r}, which is not NAME = literal"
            raise UserError(f"its parameters cell holds {wrong}") from None
    return found


def source_hash(nb, kinds=("code",)) -> str:
    """A hash of sources and tags. Of code alone by default: mending prose makes no output stale."""
    found = []
    for cell in nb.cells:
        if cell.cell_type in kinds:
            tags = sorted(cell.metadata.get("tags", []))
            found.append((cell.cell_type, cell.source, tags))
    return hash_of(found)


def hash_of(value) -> str:
    """A hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def widget_errors(nb) -> list[str]:
    """Errors of ipywidgets' callbacks: they show in an Output or a panel, and no tool fails."""
    found = []
    for model in nb.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {}).values():
        state = model.get("state", {})
        for output in state.get("outputs", ()):
            if output.get("output_type") == "error":
                found.append(f"{output['ename']}: {output['evalue']}")
        if PANEL_ERROR in str(state.get("value", "")):
            found.append(re.sub(r"<[^>]*>", "", state["value"]))
    return found


def _without_paths(text):
    for path, short in ((str(ROOT), "."), (str(Path.home()), "~")):
        text = re.sub(re.escape(path) + r"(?=[/\\])", short, text) if len(path) > 1 else text
    return text


def _clean(output):
    """An output without machine paths and widget views; None where a view's text would be left."""
    if "text" in output:
        output["text"] = _without_paths(output["text"])
    data = output.get("data", {})
    if data.pop(WIDGET_VIEW, None) is not None and set(data) <= {"text/plain"}:
        return None
    for kind, value in data.items():
        if isinstance(value, str) and kind.startswith("text/"):
            data[kind] = _without_paths(value)
    return output


def put_outputs(path, executed) -> list[str]:
    """Write the outputs of its execution into a notebook, without widget state, times or machine
    paths, and the README's picture where it shows it; what `check` then says."""
    nb = read(path)
    for cell, done in zip(nb.cells, executed.cells, strict=True):
        for name in ("papermill", "execution", "ExecuteTime"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            cell.outputs = [kept for output in done.outputs if (kept := _clean(output))]
            cell.execution_count = done.execution_count
    kept = {name: nb.metadata[name] for name in ("kernelspec", "language_info")}
    nb.metadata = nbformat.from_dict({**kept, "workbook": {"source_hash": source_hash(nb)}})
    write_atomically(path, nbformat.writes(nb) + "\n")
    for place, shown in pictures(nb).items():
        place.write_bytes(shown)
    return check([path])


def pictures(nb) -> dict:
    """{where the README looks for it: PNG} of what the cells tagged for it show."""
    found = {}
    for tag, name in PICTURES.items():
        for output in [output for cell in tagged(nb, tag) for output in cell.outputs]:
            if "image/png" in output.get("data", {}):
                place = ROOT / "notebooks" / name
                found.setdefault(place, base64.b64decode(output["data"]["image/png"]))
    return found


def check(notebooks=None) -> list[str]:
    """Problems, one sentence each: are committed notebooks current, executed in order and clean?"""
    return [f"{path.name}: {problem}" for path in resolve(notebooks) for problem in _problems(path)]


def _problems(path):
    nb = read(path)
    again = "python -m helpers refresh"
    if nb.metadata.get("workbook", {}).get("source_hash") != source_hash(nb):
        yield f"its outputs are not those of its present source; {again} brings them up to date."
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "its cells were not executed once each from top to bottom."
    traces = set().union(*(cell.metadata for cell in nb.cells)) & {"papermill", "execution"}
    if traces or {"widgets", "papermill"} & set(nb.metadata):
        yield "its metadata holds widget state or traces of an execution."
    for place, shown in pictures(nb).items():
        if not (place.exists() and place.read_bytes() == shown):
            yield f"its figure is not the README's, {place.name}; {again} writes it."
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
        texts.append(output.get("text", ""))
        texts += [str(value) for kind, value in data.items() if not kind.startswith("image/p")]
        if output.output_type == "error":
            yield f"shows an error: {output.ename}."
        if output.get("name") == "stderr":
            yield f"writes to stderr: {output.text.strip()[:80]!r}."
        if WIDGET_VIEW in data:
            yield "shows a widget whose state is not committed."
    machine = rf"(?:{re.escape(str(ROOT))}|{MACHINE_PATH})[^\s\"'<]*"
    if found := re.search(machine, "\n".join(texts)):
        yield f"names a path of this machine: {found.group()!r}."
