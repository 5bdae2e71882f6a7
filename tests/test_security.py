"""What a model says, and names of files and models, never become markup or code; no pickles."""

import ast
import html
import json
import re
from html.parser import HTMLParser

import pytest
from standin import PROMPTS, make

from helpers import ROOT, figures, ledger
from helpers.figures import canvas, explorer, live, render
from helpers.steering import SteeringVectors
from helpers.studies import store
from helpers.workbook import export, notebooks

EVIL = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"><svg onload='alert(1)'>",
    "</textarea></script><b onclick=alert(1)>",
    "[a](javascript:alert(1)) ![b](http://x/y)",
    "$\\frac{$ and $x_{$",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07",
]


class Tags(HTMLParser):
    """The tags of a page and their attributes' names."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, attributes))


def harmless(page):
    """No script, nothing that runs, no link and no address but our own pictures."""
    for tag, attributes in Tags(page).found:
        assert tag not in ("script", "a", "iframe", "textarea", "object"), (tag, page[:300])
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "href") or value.startswith("data:image/png"), (tag, value)
    return page


def evil_sweep(folder, name, text):
    """A sweep of a model that says nothing but `text`, of prompts, kinds and names like it."""
    sweep = json.loads(json.dumps(store.read(name, folder=folder)))
    for cell in sweep["cells"]:
        cell["config"]["prompt"] = text + cell["config"]["prompt"]
        cell["result"]["clean"] = text
        for row in cell["result"]["rows"]:
            row["text"] = text
    sweep["meta"] |= {"model": text, "command": text}
    return sweep


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("grids"))


@pytest.mark.parametrize("text", EVIL)
def test_what_a_model_says_is_never_markup(text):
    row = {name: text for name in render.COLUMNS}
    for page in (
        ledger.html_table([text], [[text]]),
        figures.text_table([(text, 1.0)], [text, "x"]).data,
        render.render_texts(text, f"x {text}", text),
        render.render_tokens([text], [0.5]),
        render.render_error(ValueError(text)),
        render.render_error(RuntimeError(text)),
        render.render_table([row | {"radius": 1.0}]),
        canvas.block(html.escape(text)),
        explorer._label(text, 20).value,
    ):
        harmless(page)
        assert any(html.escape(word) in page for word in text.split())


@pytest.mark.parametrize("text", EVIL)
def test_the_explorer_shows_an_evil_model_and_its_names(text, folder):
    sweep = evil_sweep(folder, "explorer", text)
    for cell in sweep["cells"]:  # a file of somebody else's: kinds are words of it
        for row in cell["result"]["rows"]:
            row["kind"] = {"learned": text, "random": "random"}[row["kind"]]
    panel = explorer.GridPanel(sweep)
    panel.controls["coeff"].value = 2.0
    pages = [panel.said, panel.texts, panel.gauges, panel.heat_title, panel.children[-1]]
    for box in pages:
        harmless(box.value)
    for control in panel.controls.values():
        assert not getattr(control, "description_allow_html", False)


@pytest.mark.parametrize("text", [EVIL[3], EVIL[5]])
def test_the_exported_page_holds_an_evil_model_as_text(text, folder, tmp_path):
    sweep = evil_sweep(folder, "goldilocks", text)
    store.write("goldilocks", sweep["cells"], sweep["meta"], tmp_path)
    page = export.page(notebooks.ROOT / "notebooks" / "explorer.ipynb", tmp_path)
    (state,) = re.findall(
        r'<script type="application/vnd.jupyter.widget-state\+json">(.*?)</script>', page, re.S
    )
    models = json.loads(state)["state"].values()
    values = [model["state"]["value"] for model in models if model["model_name"] == "HTMLModel"]
    assert values and all(harmless(value) for value in values)
    assert "onclick=alert" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)


def test_a_notebooks_file_name_is_no_markup(tmp_path):
    for name in ("""07_"'<b>&.ipynb""", "08_a b#c?.ipynb"):
        path = tmp_path / name
        path.write_bytes((ROOT / "notebooks" / "explorer.ipynb").read_bytes())
        listed = export.index([path])
        ((_, ((_, link),)),) = [found for found in Tags(listed).found if found[0] == "a"]
        assert not set(link) & set("\"'<>#? ") and "<b>&.ipynb" not in listed


@pytest.mark.parametrize("text", EVIL)
def test_dollar_signs_and_ends_of_lines_are_drawn_as_they_are(text):
    figure = render.render_turn([10.0, 20.0], 50.0, 5.0, 1, text)
    figure.canvas.draw()
    harmless(render.as_img(figure, text))


def test_the_live_lab_shows_names_and_what_the_model_says_as_text(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBOOK_BUILD", str(tmp_path))
    monkeypatch.setattr(tiny.tokenizer, "decode", lambda *_, **__: EVIL[1], raising=False)
    lab = live.LiveLab(tiny, PROMPTS[1], 1, 4, "1", 1, steps=1, max_new_tokens=4)
    for name in EVIL:
        lab.fields["file"].value = name
        for button in ("Load", "Save", "Compare with random"):
            lab.buttons[button].click()
            lab.wait(60)
            harmless(lab.status.value)
    lab.note(EVIL[0])
    for box in (lab.status, lab.tried, lab.table, lab.texts, lab.said):
        harmless(box.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_file_name_with_quotes_is_named_as_it_is(tmp_path):
    path = tmp_path / """it's "mine" & <b>.safetensors"""
    path.write_bytes(b"no vectors")
    with pytest.raises(ValueError) as caught:
        SteeringVectors.load(path)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    harmless(render.render_error(caught.value))


# -- nothing that runs code where it is read -------------------------------------------------------
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.save",
    "os.system",
    "os.popen",
}
CALLS |= {"yaml.unsafe_load", "pandas.read_pickle", "numpy.load", "np.load", "yaml.full_load"}
SOURCES = [*(ROOT / "helpers").rglob("*.py"), *(ROOT / "data").rglob("*.py")]
FUNCTIONS_BY_NAME = {"helpers/studies/study.py"}  # a cell's name, which our own grids give


def dangers(tree):
    """What in a source would run code from a file or a text, or hand a line to a shell."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            yield from (name for name in names if name.split(".")[0] in MODULES)
            yield from (name for name in names if name == "resolve_name")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS or (called == "yaml.load" and len(node.args) < 2):
                yield called
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if (
                    keyword.arg in ("shell", "trust_remote_code", "allow_pickle")
                    and value is not False
                ):
                    yield keyword.arg


def test_nothing_unpickles_or_runs_a_text():
    found = {}
    for path in SOURCES:
        here = set(dangers(ast.parse(path.read_text(encoding="utf-8"))))
        if here:
            found[path.relative_to(ROOT).as_posix()] = here
    assert found == dict.fromkeys(FUNCTIONS_BY_NAME, {"resolve_name"})
    bad = "import pickle\neval('1')\nf(shell=True)\ntorch.load(p)\nfrom joblib import dump\n"
    assert set(dangers(ast.parse(bad))) == {"pickle", "eval", "shell", "torch.load", "joblib"}


def test_what_is_committed_and_kept_is_text_and_safetensors():
    kinds = {
        path.suffix
        for path in (ROOT / "data").rglob("*")
        if path.is_file() and "cache" not in path.parts and "__pycache__" not in path.parts
    }
    assert kinds <= {".json", ".safetensors", ".py", ".md"}, kinds


def test_the_local_cluster_listens_on_this_machine_alone():
    source = (ROOT / "data" / "recipes" / "slurm_sweep.py").read_text(encoding="utf-8")
    assert 'host="127.0.0.1", dashboard_address="127.0.0.1:0"' in source
    assert "pickles" in source.split('"""')[1], "it says what Dask needs"


# -- other systems ---------------------------------------------------------------------------------
POSIX = {"fcntl", "resource", "pwd", "grp", "termios"}
POSIX_CALLS = {
    "os.fork",
    "os.kill",
    "os.killpg",
    "os.getuid",
    "os.setsid",
    "signal.SIGKILL",
    "signal.SIGHUP",
    "signal.alarm",
    "os.chown",
    "os.symlink",
    "os.sched_getaffinity",
}


@pytest.mark.parametrize("room", ["studies", "figures"])
def test_no_call_of_one_system_and_no_encoding_left_open(room):
    for path in (ROOT / "helpers" / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not POSIX & {alias.name for alias in node.names}, path
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in POSIX_CALLS, (path, ast.unparse(node))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named = {keyword.arg for keyword in node.keywords}
                if node.func.attr in ("read_text", "write_text"):
                    assert "encoding" in named, (path, ast.unparse(node))
                if node.func.attr == "get_context":
                    assert ast.literal_eval(node.args[0]) == "spawn", path
