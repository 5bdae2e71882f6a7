"""`make html`: the committed notebooks, not executed, as web pages in build/html, with an index.

Committed notebooks hold no widgets. A cell tagged "radius-slider" gets its own back, made here from
the stored sweep and linked in the browser, so that it works without a kernel; the page then asks
for ipywidgets' public JavaScript.
"""

import html
import re
from urllib.parse import quote

import nbformat
from ipywidgets import embed
from nbconvert import HTMLExporter

from .. import ledger
from ..figures import explorer
from ..studies import store
from .notebooks import WIDGET_STATE, WIDGET_VIEW, read, resolve, tagged

TITLE = "Unsupervised steering vectors: a workbook"
HEAD = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{TITLE}</title>
<style>body{{font:17px/1.5 system-ui,sans-serif;max-width:46em;margin:2em auto}}
li{{margin:.7em 0}} small{{color:#555}}</style><h1>{TITLE}</h1>"""
FOOT = """<p><small>Exported without a kernel: all stands as committed; the slider of the radius
figure works (its page fetches the public JavaScript of ipywidgets).</small></p></html>"""


def with_widgets(nb, folder=None):
    """The notebook with the slider in its tagged cell, from the sweeps in `folder`."""
    version = {"version_major": 2, "version_minor": 0}
    for cell in tagged(nb, "radius-slider"):
        sweep = store.read(
            "goldilocks", folder=folder, parts=("A", "B")
        )  # the prompts of its radii
        slider = explorer.radius_slider(sweep)
        view = {WIDGET_VIEW: {**version, "model_id": slider.model_id}}
        cell.outputs.append(nbformat.v4.new_output("display_data", view))
        state = embed.dependency_state([slider], drop_defaults=False)
        nb.metadata["widgets"] = {WIDGET_STATE: {**version, "state": state}}
    return nb


def page(path, folder=None) -> str:
    """One notebook as HTML."""
    settings = {"template_name": "classic", "html_manager_semver_range": "^1.0.0"}
    prompts = {"exclude_input_prompt": True, "exclude_output_prompt": True}
    exporter = HTMLExporter(**settings, **prompts)  # classic keeps the pictures' alt texts
    nb = with_widgets(read(path), folder)
    return exporter.from_notebook_node(nb, {"metadata": {"name": path.stem}})[0]


def index(paths) -> str:
    """The list of notebooks: title, question, link."""
    items = []
    for path in paths:
        text = read(path).cells[0].source
        title = html.escape(text.splitlines()[0].lstrip("# "))
        question = re.search(r"\*\*Question\.\*\*\s*(.+)", text)
        asked = html.escape(re.sub(r"[*`]", "", question.group(1))) if question else ""
        link = html.escape(quote(f"{path.stem}.html"))
        items.append(f'<li><a href="{link}">{title}</a><br><small>{asked}</small></li>')
    return f"{HEAD}<ul>{''.join(items)}</ul>{FOOT}"


def main(build=None, folder=None):
    """Write build/html/index.html and a page per notebook; returns the index's path."""
    target, paths = ledger.build_folder(build) / "html", resolve()
    for path in paths:
        ledger.write_atomically(target / f"{path.stem}.html", page(path, folder))
    ledger.write_atomically(target / "index.html", index(paths))
    return target / "index.html"
