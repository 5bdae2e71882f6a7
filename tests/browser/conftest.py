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

from helpers import judging, notebooks

ROOT = Path(__file__).resolve().parents[2]
SCREENS = ROOT / "build" / "screens"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
HOSTILE = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
SIZES = {"laptop": (1280, 800), "projector": (1920, 1080), "projector-150-percent": (1280, 720)}


# Asked for by name: they take minutes, and have not yet passed from start to end on a machine that does nothing else.
MISSING = "the browser tests run only where WORKBOOK_CHROMIUM names a Chromium (apt-get install chromium; its path is the value)."


def chromium():
    """The browser's path, or None."""
    return shutil.which(os.environ.get("WORKBOOK_CHROMIUM", ""))


def pytest_terminal_summary(terminalreporter):
    """Say it even where pytest shows only the letter s."""
    if not chromium():
        terminalreporter.write_line(f"Skipped: {MISSING}")


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install -r requirements.txt")
    if not chromium():
        pytest.skip(MISSING)
    SCREENS.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def grids(tmp_path_factory):
    from standin import make
    folder = make(tmp_path_factory.mktemp("grids"))
    hostile = folder / "hostile"  # the same, but that the model "said" something that must not run
    hostile.mkdir()
    for path in folder.glob("*.json"):
        sweep = json.loads(path.read_text())
        for cell in sweep["cells"]:
            for row in cell["result"]["rows"]:
                row["text"] = HOSTILE + " " + row["text"]
        judging.write(path.stem, sweep["cells"], sweep["meta"], hostile)
    return hostile


def parametrised(name, target, **parameters):
    """A copy of a committed notebook without outputs, its parameters cell followed by these values."""
    nb = notebooks.read(ROOT / "notebooks" / f"{name}.ipynb")
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (cell,) = notebooks.tagged(nb, "parameters")
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in {**cell.metadata["nbmake"]["mock"], **parameters}.items())
    nbformat.write(nb, target)


def settings(folder, theme):
    """JupyterLab's user settings: a theme, no news, no questions, every cell in the page."""
    chosen = {"apputils-extension/themes": {"theme": f"JupyterLab {theme}"},
              "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
              "notebook-extension/tracker": {"windowingMode": "none"}}
    for name, values in chosen.items():
        path = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


@pytest.fixture(scope="session", params=["Light", "Dark"])
def lab(request, tmp_path_factory, browser, grids):
    """(address, theme) of a JupyterLab whose folder holds explorer.ipynb with small parameters."""
    home = tmp_path_factory.mktemp("lab")
    (home / "notebooks").mkdir()
    parametrised("explorer", home / "notebooks" / "explorer.ipynb", GRIDS=str(grids), LAB_RADII="1, 4")
    settings(home / "settings", request.param)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    places = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = {**os.environ, **places, "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTER_TOKEN": token,
                   "JUPYTERLAB_WORKSPACES_DIR": str(home / "spaces"), "IPYTHONDIR": str(home / "ipython"),
                   "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter"), "PYDEVD_DISABLE_FILE_VALIDATION": "1",
                   "WORKBOOK_BUILD": str(home / "build")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
               f"--ServerApp.root_dir={home / 'notebooks'}"]
    with open(home / "log.txt", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=home)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (home / "log.txt").read_text()[-2000:]
                time.sleep(0.2)
        yield f"{address}/doc/tree/explorer.ipynb?token={token}", request.param.lower()
    finally:
        server.terminate()
        server.wait(20)
