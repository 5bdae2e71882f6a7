"""A real JupyterLab and Debian's Chromium, driven by Playwright; skipped where there is none."""

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

from helpers import ROOT
from helpers.studies import store
from helpers.workbook import notebooks

SCREENS = ROOT / "build" / "screens"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
HOSTILE = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
SIZES = {"laptop": (1280, 800), "projector": (1920, 1080), "projector-150-percent": (1280, 720)}
MISSING = (
    "the browser tests need a Chromium: apt-get install chromium (or put chromium, "
    "chromium-browser or google-chrome on PATH, or its path into WORKBOOK_CHROMIUM)."
)
OFF = "the browser tests are switched off: WORKBOOK_CHROMIUM is none."


def chromium():
    """(path, None), or (None, why there is none); WORKBOOK_CHROMIUM wins over what is on PATH."""
    named = os.environ.get("WORKBOOK_CHROMIUM")
    if named == "none":
        return None, OFF
    for name in [named] if named else ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found, None
    return None, MISSING


def pytest_terminal_summary(terminalreporter):
    """Say it even where pytest shows only the letter s."""
    if why := chromium()[1]:
        terminalreporter.write_line(f"Skipped: {why}")


@pytest.fixture(scope="session")
def browser():
    missing = "no playwright here: pip install -r requirements.txt"
    playwright = pytest.importorskip("playwright.sync_api", reason=missing)
    path, why = chromium()
    if not path:
        pytest.skip(why)
    SCREENS.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as driver:
        with driver.chromium.launch(executable_path=path, args=FLAGS) as running:
            yield running


@pytest.fixture(scope="session")
def grids(tmp_path_factory):
    """The committed sweeps, in which a random vector "said" something that must not run."""
    folder = tmp_path_factory.mktemp("grids")
    for name in ("explorer", "goldilocks"):
        sweep = store.read(name, parts=("A", "B", "map"))  # all have random vectors
        smallest = min(cell["config"]["radius"] for cell in sweep["cells"])
        for cell in sweep["cells"]:
            rows = [row for row in cell["result"]["rows"] if row["kind"] == "random"]
            hostile = max(row["vector"] for row in rows) if name == "explorer" else 0
            if name == "explorer" or cell["config"]["radius"] == smallest:
                for row in rows:
                    if row["vector"] == hostile:
                        row["text"] = f"{HOSTILE} {row['text']}"
        store.write(name, sweep["cells"], sweep["meta"], folder)
    return folder


def parametrised(name, folder, **parameters):
    """A copy of a committed notebook without outputs, with these parameters."""
    nb = notebooks.read(ROOT / "notebooks" / f"{name}.ipynb")
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (cell,) = notebooks.tagged(nb, "parameters")
    for key, value in {**cell.metadata["nbmake"]["mock"], **parameters}.items():
        cell.source += f"\n{key} = {value!r}"
    nbformat.write(nb, folder / f"{name}.ipynb")


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


def environment(home, token):
    """Everything that JupyterLab reads and writes is in `home`."""
    places = {
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "spaces",
        "IPYTHONDIR": home / "ipython",
        "JUPYTER_PATH": Path(sys.prefix) / "share" / "jupyter",
        "WORKBOOK_BUILD": home / "build",
    }
    there = {name: str(path) for name, path in places.items()}
    return {**os.environ, **there, "JUPYTER_TOKEN": token, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


@pytest.fixture(scope="session")
def lab(tmp_path_factory, browser, grids):
    """Notebook's name → its address in a JupyterLab with the notebooks that have widgets."""
    home = tmp_path_factory.mktemp("lab")
    folder, log = home / "notebooks", home / "log.txt"
    folder.mkdir()
    parametrised("explorer", folder, GRIDS=str(grids), LAB_RADII="1, 4")
    for name in ("01_layer_norm_geometry", "03_goldilocks"):
        parametrised(name, folder)
    settings(home / "settings")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address, token = f"http://127.0.0.1:{port}", secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--allow-root", f"--ServerApp.root_dir={folder}"]
    at = {"env": environment(home, token), "cwd": home, "stderr": subprocess.STDOUT}
    server = subprocess.Popen(command, stdout=log.open("w"), **at)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5)
                break
            except OSError:
                assert server.poll() is None, log.read_text()[-2000:]
                time.sleep(0.2)
        yield lambda name: f"{address}/doc/tree/{name}.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(20)
