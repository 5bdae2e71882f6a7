"""What a person sees and does: the explorer in JupyterLab, and the exported page by itself."""

import json
import re
import shutil
import statistics
import subprocess
import tarfile

import pytest

from helpers import ROOT
from helpers.studies import store
from helpers.workbook import export

from .conftest import MISSING, OFF, SCREENS, SIZES, chromium

MINUTES = 60_000  # Playwright counts in milliseconds
SAID = "data-mime-type='application/vnd.jupyter"  # what a cell put out
FAILED = f"[{SAID}.error']"  # of a cell that raised

# Puts into window.times how long after a key press the watched element has its new content.
STOPWATCH = """element => {
  window.times = []; let pressed = null;
  document.addEventListener('keydown', () => { pressed = performance.now(); }, {capture: true});
  new MutationObserver(() => {
    if (pressed !== null) { window.times.push(performance.now() - pressed); pressed = null; }
  }).observe(element, {childList: true, subtree: true, characterData: true});
}"""
# A panel's name: something that only it holds.
PANELS = {
    "grid": ".widget-gridbox",
    "radius": "img[alt*='is marked']",
    "lab": "textarea",
    "tokens": ".widget-slider:has-text('after block (number)')",
}
# What in a cell is wider than its place.
CUT = """cell => [...cell.querySelectorAll(
    '.widget-html, .widget-label, .widget-readout, .jp-OutputArea-output')]
  .filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1)
  .map(e => e.className + ': ' + e.innerText.slice(0, 80))"""
PLACES = """cell => [...cell.querySelectorAll('.widget-html, .widget-slider')].map(e =>
  e.getBoundingClientRect().top - cell.getBoundingClientRect().top + ' ' + e.offsetHeight)"""
MOVING = """() => { const bar = [...document.querySelectorAll('.progress-bar')].at(-1);
  return bar && parseFloat(bar.style.width) > 0; }"""


def sized(size):
    return dict(zip(("width", "height"), SIZES[size]))


@pytest.fixture(scope="module")
def opened(lab, browser):
    """Notebook's name → its page in JupyterLab, with every cell run."""
    context = browser.new_context(viewport=sized("laptop"))

    def open_and_run(name, last):
        page = context.new_page()
        page.set_default_timeout(5 * MINUTES)
        page.goto(lab(name))
        page.locator(".jp-CodeCell").first.wait_for()
        page.get_by_text("| Idle").wait_for()  # a kernel that still starts would be asked in vain
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        try:
            page.locator(f"{last}, {FAILED}").first.wait_for(timeout=15 * MINUTES)
        finally:
            page.screenshot(path=SCREENS / f"opened-{name}.png")  # says more than a timeout
        assert page.locator(FAILED).all_inner_texts() == []
        return page

    yield open_and_run
    context.close()


@pytest.fixture(scope="module")
def page(opened):
    return opened("explorer", "button:has-text('Compare with random')")


def in_theme(page, theme):
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.get_by_text("Theme", exact=True).hover()
    page.get_by_text(f"JupyterLab {theme}", exact=True).click()
    light = "true" if theme == "Light" else "false"
    page.locator(f"body[data-jp-theme-light={light}]").wait_for(state="attached")


def photograph(page, panels, theme):
    """A picture of each panel at each size; nothing may be wider than its place."""
    in_theme(page, theme)
    for size in SIZES:
        page.set_viewport_size(sized(size))
        for name, inside in panels.items():
            cell = cell_of(page, f".jp-OutputArea-output {inside}").last
            cell.evaluate("e => e.scrollIntoView({block: 'start'})")
            page.wait_for_timeout(1000)
            page.screenshot(path=SCREENS / f"{name}-{size}-{theme.lower()}.png")
            assert cell.evaluate(CUT) == [], (name, size)
    no_error(page)


def no_error(page):
    said = page.locator(f"[{SAID}.stderr']").all_inner_texts()
    # a model of four blocks has tiny axes
    assert [text for text in said if "UserWarning: constrained_layout" not in text] == []
    assert page.locator(".workbook-panel-error").count() == 0
    assert page.get_by_text("Error displaying widget").count() == 0


def cell_of(page, inside):
    return page.locator(".jp-CodeCell").filter(has=page.locator(inside))


@pytest.fixture
def grid(page):
    return cell_of(page, ".widget-gridbox")


@pytest.fixture
def live(page):
    return cell_of(page, "textarea")


@pytest.fixture(scope="module")
def stored(grids):
    """What the explorer's panel shows."""
    return store.Grid(store.read("explorer", folder=grids))


def slider(cell, label):
    return cell.locator(".widget-slider").filter(has_text=label)


def reads(control, value):
    control.locator(".widget-readout").get_by_text(f"{value}", exact=True).wait_for()


def press_key(control, key, readout):
    control.locator(".noUi-target:not([disabled]) .noUi-handle").focus()
    control.page.keyboard.press(key)
    reads(control, readout)


def choose(grid, **state):
    """Set the drop-down lists "kind" and "prompt" (by index)."""
    for name, chosen in state.items():
        grid.locator("select").nth(["prompt", "kind"].index(name)).select_option(**chosen)


def test_a_chromium_is_found_or_its_absence_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("WORKBOOK_CHROMIUM", raising=False)
    assert chromium() == (None, MISSING) and "apt-get install chromium" in MISSING
    for name in ("google-chrome", "chromium", "of-my-own"):
        (tmp_path / name).touch(mode=0o755)
    assert chromium() == (str(tmp_path / "chromium"), None)
    mine = (str(tmp_path / "of-my-own"), None)
    for value, found in {
        "of-my-own": mine,
        "none": (None, OFF),
        "nowhere": (None, MISSING),
    }.items():
        monkeypatch.setenv("WORKBOOK_CHROMIUM", value)
        assert chromium() == found


def test_radius_and_layer_move_by_keyboard_and_nothing_jumps(grid, stored):
    layers, radii = stored.options["source_layer"], [f"{r:g}" for r in stored.options["radius"]]
    press_key(slider(grid, "source layer"), "Home", layers[0])
    press_key(slider(grid, "R (norm"), "Home", radii[0])
    gauge = grid.get_by_role("img", name="objective").get_attribute("aria-label")
    before = grid.evaluate(PLACES)
    press_key(slider(grid, "R (norm"), "ArrowRight", radii[1])
    grid.locator(f"svg[aria-label^='objective']:not([aria-label='{gauge}'])").wait_for()
    press_key(slider(grid, "source layer"), "ArrowRight", layers[1])
    here = f"[title*='block {layers[1]}, R {radii[1]}:'][title*='shown now']"
    grid.locator(f".widget-button{here}").wait_for()
    assert grid.locator(".widget-button[title*='shown now']").count() == 1
    assert grid.evaluate(PLACES) == before


def test_the_heat_map_selects_by_click_and_by_key(grid, stored):
    def selected(layer, radius):
        reads(slider(grid, "R (norm"), f"{radius:g}")
        reads(slider(grid, "source layer"), layer)

    def button(layer, radius):
        return grid.locator(f".widget-button[title*='block {layer}, R {radius:g}:']")

    layers, radii = stored.options["source_layer"], stored.options["radius"]
    button(layers[0], radii[-1]).click()
    selected(layers[0], radii[-1])
    button(layers[1], radii[-2]).focus()
    grid.page.keyboard.press("Enter")
    selected(layers[1], radii[-2])


def test_model_text_is_text(grid, stored):
    choose(grid, kind={"label": "random"})
    # the slider has this kind's vectors when that is said
    grid.get_by_text(re.compile("^steered: random")).wait_for()
    press_key(slider(grid, "vector (number)"), "End", stored.vectors["random"][-1])
    for prompt in (1, 0):
        choose(grid, prompt={"index": prompt})
        grid.get_by_text("<script>window.ran").first.wait_for()
        assert grid.get_by_text("onerror=").first.is_visible()
    choose(grid, kind={"label": "learned"})
    grid.get_by_text(re.compile("^steered: learned")).wait_for()
    assert grid.page.evaluate("window.ran") is None


def test_a_value_answers_at_once(grid):
    """From a key press to the new gauges; reported, not asserted: a busy machine is no failure."""
    radius = slider(grid, "R (norm")
    grid.locator(".widget-html:has(> .widget-html-content svg)").evaluate(STOPWATCH)
    for i, key in enumerate(["Home", *["ArrowRight", "ArrowRight", "ArrowLeft"] * 5]):
        answered = grid.page.evaluate("window.times.length")
        radius.locator(".noUi-handle").focus()
        grid.page.keyboard.press(key)
        if i:  # the first may already be at home
            grid.page.wait_for_function(f"window.times.length > {answered}")
        grid.page.wait_for_timeout(200)
    times = grid.page.evaluate("window.times")
    assert len(times) >= 10
    found = {"median_ms": round(statistics.median(times)), "worst_ms": round(max(times))}
    print(f"\na value of the grid explorer answers after {found}")
    (SCREENS / "latency.json").write_text(json.dumps(found) + "\n")


def fill(live, label, value):
    box = live.locator(".widget-inline-hbox").filter(has_text=label).locator("input").first
    box.fill(str(value))
    box.press("Tab")


def press_button(live, name, said):
    live.get_by_role("button", name=name, exact=True).click()
    live.locator(".widget-html").filter(has_text=said).first.wait_for()


def idle(live):
    live.locator("button:has-text('Train'):not([disabled])").wait_for()  # at most five minutes


def tried(live, name):
    """The cells of the table of radii that say `name`."""
    return live.locator("table").first.get_by_role("cell", name=name, exact=True)


def test_a_bad_radius_is_said_in_the_panel(live):
    fill(live, "R (norm of θ)", "-3")
    press_button(live, "Train", "radius -3 is not a norm: it must be a finite number above 0")
    idle(live)
    fill(live, "R (norm of θ)", "3")
    press_button(live, "Train", "The median residual at the source")
    idle(live)
    assert tried(live, "–").count() == 1  # no random vectors yet


def test_the_lab_stops_and_keeps_what_it_has_then_scales_and_compares(live):
    fill(live, "steps (number)", 100_000)
    fill(live, "R (norm of θ)", "5")
    live.get_by_role("button", name="Train", exact=True).click()
    live.page.wait_for_function(MOVING)
    press_button(live, "Stop", "Stopped, and kept what was finished")
    idle(live)
    fill(live, "steps (number)", 2)
    tried(live, "5").first.wait_for()
    live.locator("select").last.select_option(label="R 5, learned 0")
    live.get_by_text("learned vector 0 of R 5, × 1").wait_for()
    press_key(slider(live, "coefficient"), "Home", "-3")
    live.get_by_text("learned vector 0 of R 5, × -3").wait_for()
    idle(live)
    press_button(live, "Compare with random", "Random vectors of the same norms")
    idle(live)
    assert tried(live, "–").count() == 0


def test_the_token_slider_moves(page):
    cell = cell_of(page, PANELS["tokens"])
    press_key(slider(cell, "after block"), "Home", "0")
    cell.locator("span[title='0.00']").first.wait_for()


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_the_panels_fit_in_every_theme_and_size(page, grid, theme):
    grid.locator(".widget-button[title*='block 7, R 16:']").click()
    photograph(page, PANELS, theme)


ADDED = ".widget-slider:has-text('added after block')"
SHOWN = ".widget-button[title*='R 8:'][title*='shown now']"
OTHERS = {
    "01_layer_norm_geometry": ("geometry", ADDED, "80", "img[alt*='A push of 80']"),
    "03_goldilocks": ("grid-03", ".widget-gridbox", "8", SHOWN),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_panels_of_other_notebooks(opened, name):
    panel, inside, largest, shown = OTHERS[name]
    page = opened(name, inside)
    cell = cell_of(page, inside)
    press_key(slider(cell, "R (norm"), "End", largest)
    cell.locator(shown).wait_for()
    for theme in ("Dark", "Light"):
        photograph(page, {panel: inside}, theme)


# -- the exported page -----------------------------------------------------------------------------
SCRIPTS = {  # end of an address that the page asks for: npm package, version, file
    "require.min.js": ("requirejs", "2.3.7", "require.js"),
    "embed-amd.js": ("@jupyter-widgets/html-manager", "1.0.14", "dist/embed-amd.js"),
}


@pytest.fixture(scope="module")
def javascript():
    """{end of an address: file}, from two npm packages kept in build/npm."""
    if not shutil.which("npm"):
        pytest.skip("no npm here, which brings the page's JavaScript: apt-get install npm.")
    folder = ROOT / "build" / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    for end, (package, version, member) in SCRIPTS.items():
        archive = folder / f"{package.strip('@').replace('/', '-')}-{version}.tgz"
        if not archive.exists():
            command = ["npm", "pack", f"{package}@{version}"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                why = done.stderr.strip().splitlines()[-1]
                pytest.skip(f"npm cannot fetch {package} {version}: {why}")
        with tarfile.open(archive) as packed:
            (folder / end).write_bytes(packed.extractfile(f"package/{member}").read())
    return {end.removesuffix(".js"): folder / end for end in SCRIPTS}


@pytest.fixture(scope="module")
def exported(browser, javascript, grids, tmp_path_factory):
    """The exported explorer notebook in the browser, nothing served but the widgets' JavaScript."""
    index = export.main(tmp_path_factory.mktemp("build"), grids)
    context = browser.new_context(viewport=sized("laptop"))
    page = context.new_page()
    page.set_default_timeout(5 * MINUTES)

    def serve(route):
        end = route.request.url.split("/")[-1].split("?")[0].removesuffix(".js")
        if route.request.url.startswith("file:"):
            route.continue_()
        elif end in javascript:
            route.fulfill(path=javascript[end])
        else:
            route.abort()

    page.route("**/*", serve)
    page.goto(index.as_uri())
    yield page
    context.close()


def test_the_exported_slider_works_without_a_kernel(exported, grids):
    cells = store.read("goldilocks", folder=grids)["cells"]
    radii = sorted({cell["config"]["radius"] for cell in cells})
    exported.get_by_role("link", name=re.compile("Explorer")).click()
    radius = exported.locator(".widget-slider").filter(has_text="R (norm of θ)")
    radius.locator(".noUi-handle").wait_for()
    pictures = exported.locator("img[alt*='is marked'] >> visible=true")
    press_key(radius, "Home", f"{radii[0]:g}")
    assert f"R = {radii[0]:g} is marked" in pictures.last.get_attribute("alt")
    assert exported.get_by_text("<script>window.ran").first.is_visible()
    assert exported.evaluate("window.ran") is None
    press_key(radius, "ArrowRight", f"{radii[1]:g}")
    exported.locator(f"img[alt*='R = {radii[1]:g} is marked'] >> visible=true").wait_for()
    assert pictures.count() == 1
    for size in SIZES:
        exported.set_viewport_size(sized(size))
        radius.evaluate("e => e.scrollIntoView({block: 'start'})")
        exported.screenshot(path=SCREENS / f"exported-{size}.png")
    assert exported.locator(":root").evaluate("page => page.scrollWidth <= page.clientWidth")
