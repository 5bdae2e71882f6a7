"""`make html`: the committed notebooks as web pages in build/html, with an index. Nothing is executed, no model is needed.

Committed notebooks hold no widgets. A cell tagged with a name of WIDGETS gets its own back, made here from the computed sweep and
linked in the browser, so that it works without a kernel; the page then asks for ipywidgets' public JavaScript.
"""

import html
import re

import nbformat
from ipywidgets import embed
from nbconvert import HTMLExporter

from .. import ledger
from ..figures import explorer
from ..studies import store
from .notebooks import WIDGET_STATE, WIDGET_VIEW, read, resolve, tagged

WIDGETS = {
    "radius-slider": lambda folder=None: explorer.radius_slider(
        store.read("goldilocks", folder=folder, parts=("A", "B"))
    )
}
TITLE = "Unsupervised steering vectors: a workbook"
STYLE = "body{font:17px/1.5 system-ui,sans-serif;max-width:46em;margin:2em auto} li{margin:.7em 0} small{color:#555}"


def with_widgets(nb, folder=None):
    """The notebook with the widgets of its tagged cells as outputs, and their state in its metadata. `folder`: of the sweeps."""
    state = {}
    for tag, make in WIDGETS.items():
        for cell in tagged(nb, tag):
            widget = make(folder)
            state |= embed.dependency_state([widget], drop_defaults=False)
            view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
            cell.outputs.append(nbformat.v4.new_output("display_data", {WIDGET_VIEW: view}))
    if state:
        nb.metadata["widgets"] = {
            WIDGET_STATE: {"version_major": 2, "version_minor": 0, "state": state}
        }
    return nb


def with_alt_texts(nb):
    """The notebook with its pictures as HTML, which keeps the alt texts that nbconvert's own template drops."""
    for output in (output for cell in nb.cells for output in cell.get("outputs", [])):
        about = output.get("metadata", {}).get("image/png", {})
        if "alt" in about:
            output["data"] = {
                "text/html": f'<img alt="{html.escape(about["alt"])}" width="{about.get("width", "")}" '
                f'src="data:image/png;base64,{output["data"]["image/png"]}">'
            }
    return nb


def page(path, folder=None) -> str:
    """One notebook as HTML."""
    exporter = HTMLExporter(
        html_manager_semver_range="^1.0.0", exclude_input_prompt=True, exclude_output_prompt=True
    )
    return exporter.from_notebook_node(
        with_alt_texts(with_widgets(read(path), folder)), {"metadata": {"name": path.stem}}
    )[0]


def index(paths) -> str:
    """The list of notebooks: title, question, link."""
    items = []
    for path in paths:
        text = read(path).cells[0].source
        question = re.search(r"\*\*Question\.\*\*\s*(.+)", text)
        question = re.sub(r"[*`]", "", question.group(1)) if question else ""
        title = html.escape(text.splitlines()[0].lstrip("# "))
        items.append(
            f'<li><a href="{path.stem}.html">{title}</a><br><small>{html.escape(question)}</small></li>'
        )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{TITLE}</title><style>{STYLE}</style>'
        f"<h1>{TITLE}</h1><ul>{''.join(items)}</ul><p><small>Exported without a kernel: all stands as committed; "
        "the slider of the radius figure works (its page fetches the public JavaScript of ipywidgets).</small></p></html>\n"
    )


def main(build=None, folder=None):
    """Write build/html/index.html and a page per notebook; returns the index's path."""
    target, paths = ledger.build_folder(build) / "html", resolve()
    for path in paths:
        ledger.write_atomically(target / f"{path.stem}.html", page(path, folder))
    ledger.write_atomically(target / "index.html", index(paths))
    return target / "index.html"


if __name__ == "__main__":
    print(f"wrote {main()}")
