"""A real JupyterLab on loopback and Debian's Chromium, driven by Playwright; skipped, with a sentence, where there is none."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from helpers.studies import store
from helpers.workbook import notebooks

ROOT = Path(__file__).resolve().parents[2]
SCREENS = ROOT / "build" / "screens"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
SIZES = {"laptop": (1280, 800), "projector": (1920, 1080), "projector-150-percent": (1280, 720)}
MISSING = (
    "the browser tests need a Chromium: apt-get install chromium (or put chromium, chromium-browser or google-chrome on "
    "PATH, or its path into WORKBOOK_CHROMIUM)."
)
OFF = "the browser tests are switched off: WORKBOOK_CHROMIUM is none."


def chromium():
    """(the browser's path, None), or (None, why there is none). WORKBOOK_CHROMIUM wins over what is on PATH; none: off."""
    named = os.environ.get("WORKBOOK_CHROMIUM")
    if named == "none":
        return None, OFF
    found = next(
        filter(
            None,
            map(
                shutil.which,
                [named] if named else ("chromium", "chromium-browser", "google-chrome"),
            ),
        ),
        None,
    )
    return found, None if found else MISSING


def pytest_terminal_summary(terminalreporter):
    """Say it even where pytest shows only the letter s."""
    if why := chromium()[1]:
        terminalreporter.write_line(f"Skipped: {why}")


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright here: pip install -r requirements.txt"
    )
    path, why = chromium()
    if not path:
        pytest.skip(why)
    SCREENS.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def grids(tmp_path_factory):
    """A folder with the committed sweeps, in which the model "said" something that must not run: in the explorer under the last
    random vector, in the other under every first random one of the smallest R."""
    folder = tmp_path_factory.mktemp("grids")
    for name in ("explorer", "goldilocks"):
        sweep = store.read(name, parts=("A", "B", "map"))
        smallest = min(cell["config"]["radius"] for cell in sweep["cells"])
        for cell in sweep["cells"]:
            rows = [row for row in cell["result"]["rows"] if row["kind"] == "random"]
            last, is_smallest = (
                max(row["vector"] for row in rows),
                cell["config"]["radius"] == smallest,
            )
            for row in rows:
                if (
                    row["vector"] == last
                    if name == "explorer"
                    else is_smallest and row["vector"] == 0
                ):
                    row["text"] = HOSTILE + " " + row["text"]
        store.write(name, sweep["cells"], sweep["meta"], folder)
    return folder


def parametrised(name, target, **parameters):
    """A copy of a committed notebook without outputs, its parameters cell followed by these values."""
    nb = notebooks.read(ROOT / "notebooks" / f"{name}.ipynb")
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (cell,) = notebooks.tagged(nb, "parameters")
    cell.source += "".join(
        f"\n{key} = {value!r}"
        for key, value in {**cell.metadata["nbmake"]["mock"], **parameters}.items()
    )
    nbformat.write(nb, target)


def settings(folder):
    """JupyterLab's user settings: no news, no questions, every cell in the page."""
    chosen = {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "notebook-extension/tracker": {"windowingMode": "none"},
    }
    for name, values in chosen.items():
        path = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


@pytest.fixture(scope="session")
def lab(tmp_path_factory, browser, grids):
    """Notebook's name → its address in a JupyterLab that holds the notebooks with widgets, their models small."""
    home = tmp_path_factory.mktemp("lab")
    (home / "notebooks").mkdir()
    parametrised(
        "explorer", home / "notebooks" / "explorer.ipynb", GRIDS=str(grids), LAB_RADII="1, 4"
    )
    for name in ("01_layer_norm_geometry", "03_goldilocks"):
        parametrised(name, home / "notebooks" / f"{name}.ipynb")
    settings(home / "settings")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    places = {
        f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")
    }
    environment = {
        **os.environ,
        **places,
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTER_TOKEN": token,
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "spaces"),
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "WORKBOOK_BUILD": str(home / "build"),
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--allow-root",
        f"--ServerApp.root_dir={home / 'notebooks'}",
    ]
    with open(home / "log.txt", "w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=home
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (home / "log.txt").read_text()[-2000:]
                time.sleep(0.2)
        yield lambda name: f"{address}/doc/tree/{name}.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(20)
