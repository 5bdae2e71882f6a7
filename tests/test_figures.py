"""helpers.figures: pure renders, panels driven by setting values, the lab, the exported page."""

import html
import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ipywidgets import embed
from nbformat.v4 import new_notebook
from standin import PROMPTS, make

from helpers import figures, training
from helpers.figures import drawings, explorer, live, render
from helpers.metrics import judges
from helpers.steering import SteeringVectors
from helpers.studies import store
from helpers.workbook import export, notebooks

NASTY = '<script>alert(1)</script> <img src=x onerror=alert(1)> & "quoted"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("grids"))


@pytest.fixture(scope="module")
def sweep(folder):
    return store.read("explorer", folder=folder)


@pytest.fixture(scope="module")
def grid(sweep):
    return store.Grid(sweep)


@pytest.fixture
def panel(grid):
    return explorer.GridPanel(grid)


@pytest.fixture
def lab(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBOOK_BUILD", str(tmp_path))
    panel = live.LiveLab(tiny, "What is tea?", 1, 4, "1, 4", 2, steps=2, max_new_tokens=8)
    yield panel
    panel.stop.set()
    panel.wait(60)


def plain(text):
    return html.unescape(re.sub(r"<[^>]*>", " ", text))


def press(lab, *names):
    for name in names:
        lab.buttons[name].click()
        lab.wait(120)
        assert notebooks.PANEL_ERROR not in lab.status.value, plain(lab.status.value)
    return plain(lab.status.value)


# -- pure renders ----------------------------------------------------------------------------------
def test_model_text_is_shown_not_run(sweep):
    cell = json.loads(json.dumps(sweep["cells"][0]))
    cell["config"]["prompt"] = cell["result"]["clean"] = NASTY
    for row in cell["result"]["rows"]:
        row["text"] = NASTY
    for shown in (
        render.render_texts(NASTY, "x " + NASTY, NASTY),
        render.render_tokens([NASTY], [0.5]),
        render.render_error(ValueError(NASTY)),
        render.render_table([{name: NASTY for name in render.COLUMNS}]),
        render.render_said({"cells": [cell]}, cell["config"]["radius"]),
        figures.text_table([(NASTY, 1.0)], [NASTY, "x"]).data,
    ):
        assert "<script" not in shown and "<img" not in shown and "&lt;script&gt;" in shown


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text())
def test_marking_keeps_every_word(clean, said):
    for text, shown in zip((clean, said), render.marked(clean, said)):
        assert plain(shown).split() == (text.split() or ["(nothing)"])


def test_exactly_the_other_words_are_marked():
    sides = render.marked("bread needs flour and time", "bread needs a pirate and time")
    found = [re.findall(r"<mark[^>]*>(.*?)</mark>", side) for side in sides]
    assert found == [["flour"], ["a pirate"]]


def test_place():
    for value, at in {1: 0, 3: 1, 2: 0.5, 99: 1, -9: 0}.items():
        assert store.place(value, 1, 3) == pytest.approx(at)
    for value, at in {3**0.5: 0.5, 0: 0}.items():
        assert store.place(value, 1, 3, log=True) == pytest.approx(at)


def test_number():
    wanted = {None: "–", float("nan"): "–", 0: "0", -1e-7: "0", 0.12345: "0.123"}
    for value, text in {**wanted, 12345: "12,300", 1.99e9: "2.0·10⁹"}.items():
        assert figures.number(value) == text


def test_a_table_shows_numbers_words_and_long_texts_for_people():
    row = (True, np.float64(0.25), 12345, None, "", "two words " * 9, "x" * 40)
    shown = plain(figures.text_table([row], ["c"] * 7, n=20).data).split("  ")
    found = [text.strip() for text in shown if text.strip()][7:]
    words, letters = "two words two …", "x" * 19 + " …"
    assert found == ["yes", "0.25", "12345", "–", "(nothing)", words, letters]


def test_view_says_what_the_file_says(sweep, grid):
    at = {"prompt": PROMPTS[1], "source_layer": 2, "radius": 4.0}
    which = {"kind": "learned", "vector": 1, "coeff": -1.0}
    (cell,) = (c for c in sweep["cells"] if at.items() <= c["config"].items())
    (row,) = (r for r in cell["result"]["rows"] if which.items() <= r.items())
    view = grid.view(at | which)
    for name in ("text", "objective", "kl", "distance", "relative"):
        assert view[name] == row[name]
    assert view["clean"] == cell["result"]["clean"]
    asked = [row["text"]], view["clean"], at["prompt"], [row["distance"]]
    assert view["changed"] == judges.is_changed(*asked)[0]
    assert np.shape(view["both"]) == (2, 4) and view["of"] == 2


def test_what_was_not_computed_is_named_and_several_seeds_are_refused(grid, folder):
    with pytest.raises(ValueError, match=r"radius 3.0 was not computed: use one of 1.0, 2.0, 4.0"):
        grid.view(grid.start() | {"radius": 3.0})
    with pytest.raises(ValueError, match="vector 1 was not computed: use one of 0"):
        grid.view(grid.start() | {"kind": "random", "vector": 1})
    with pytest.raises(ValueError, match="kind 'rnd' was not computed"):
        explorer.GridPanel(grid, {"kind": "rnd"})
    with pytest.raises(ValueError, match="several runs"):
        store.Grid(store.read("goldilocks", folder=folder))


def test_the_still_figure_shows_the_numbers_of_the_widgets(grid):
    for changed in ({}, {"radius": 16.0, "kind": "random"}, {"source_layer": 2, "coeff": 2.0}):
        state = grid.start() | changed
        view, figure = grid.view(state), render.render_still(grid, state)
        left, right = figure.subfigs
        titles = [ax.get_title(loc="left") for ax in right.axes]
        shown = render.render_gauges(grid, view)
        for name, (label, unit, _) in store.GAUGES.items():
            said = f"{label}: {figures.number(view[name], unit)}"
            assert said in titles and html.escape(said) in shown
        counts = [str(n) for row in view["both"] for n in row]
        assert [text.get_text() for text in left.axes[0].texts] == counts
        render.plt.close(figure)


def test_shares_are_means_over_prompts_and_seeds(folder):
    sweep = store.read("goldilocks", folder=folder)
    rows = store.table(sweep["cells"])
    for kind, measures in store.shares(sweep).items():
        of_kind = rows[rows["kind"] == kind]
        for measure, (radii, mean, low, high) in measures.items():
            wanted = of_kind.groupby("radius")[measure].mean()
            assert mean == pytest.approx(wanted[radii].tolist())
            assert all(a <= b for a, b in zip(low, high))


def test_the_committed_sweeps_are_small_and_say_how_they_were_made():
    files = list(store.FOLDER.glob("*.json"))
    assert sum(path.stat().st_size for path in files) < 10e6
    meta = store.read("explorer")["meta"]
    assert {"command", "model", "model_hash", "dtype", "versions"} <= set(meta)


def test_charts_draw_what_they_are_given():
    (text,) = figures.bars({"learned": 2.0}, "T", "x", formatted="{:.1f}°").axes[0].texts
    assert text.get_text() == "2.0°"
    figure = figures.said([("learned", 2.0, "costs $5 or $6"), ("random", 1.0, "")], "T", "x")
    assert figure.axes[0].texts[0].get_text() == "costs $5 or $6"
    figure.canvas.draw()  # dollar signs are no mathematics
    left, right = figures.panels(2)[1]
    sets = {"learned": ([1, 2, 3], np.arange(6).reshape(3, 2)), "random": ([1, 2, 3], [0, 1, 2])}
    assert figures.lines(sets, "T", "x", "y", ax=left, marks=[(1, "here")]) is left.figure
    assert left.lines[0].get_ydata().tolist() == [0.5, 2.5, 4.5]  # a matrix shows its median
    figures.rates({"c": {"learned": (1.0, 0.5, 0.99)}}, "T", "x")  # an interval missed by rounding
    render.plt.close("all")


@pytest.mark.parametrize("ratio, upto", [(0.2, 15), (3.0, 90)])
def test_a_push_turns_a_token_by_the_angle_that_is_written(ratio, upto):
    left, right = figures.push_picture(ratio, [1.0, 9.0, np.nan], "$5", upto).axes
    turned = f"{np.degrees(np.arctan(ratio)):.1f}°"
    assert turned in [text.get_text() for text in left.texts]
    assert [text.get_text() for text in right.texts] == [f"drawn: {turned}"]
    assert sum(bar.get_height() for bar in right.patches) == 2  # NaN is no angle
    left.figure.canvas.draw()
    render.plt.close(left.figure)


@pytest.mark.filterwarnings("error:Glyph")
def test_an_answer_with_an_emoji_is_drawn_without_it():
    figure = figures.said([("learned", 0.3, "Hello \N{SEEDLING} there")], "title", "x")
    figure.canvas.draw()
    assert "Hello  there" in [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("name", sorted(set(dir(drawings)) & set(figures.__all__) - {"panels"}))
def test_a_drawing_has_a_name_for_everything_and_keeps_its_words_on_the_sheet(name):
    depth = {"span_picture": (2, 4, 6)}.get(name, ())
    figure = getattr(figures, name)(*depth)
    figure.canvas.draw()
    sheet = figure.bbox.padded(2)
    texts = [text for ax in figure.axes for text in ax.texts if text.get_text().strip()]
    assert len(texts) >= 3
    for text in texts:
        box = text.get_window_extent()
        assert sheet.contains(box.x0, box.y0) and sheet.contains(box.x1, box.y1), text.get_text()


@pytest.mark.parametrize("absent", [False, True])
def test_clouds_draw_each_step_or_say_that_there_is_none(absent):
    ball = np.random.default_rng(0).normal(size=(9, 3))
    figure = figures.clouds({"norm": {"ball": ball, "centre": None if absent else ball}}, "T")
    first, second = figure.axes
    assert [ax.get_title(loc="center") for ax in figure.axes] == ["ball", "centre"]
    assert len(first.collections) == 1 and len(second.collections) == (not absent)
    assert ["(no such step)" in text.get_text() for text in second.texts] == [True] * absent
    figure.canvas.draw()
    render.plt.close(figure)


# -- the grid panel --------------------------------------------------------------------------------
def test_sliders_hold_only_values_that_exist_and_answer_when_let_go(panel, grid):
    for axis, control in panel.controls.items():
        offered = [o[1] if isinstance(o, tuple) else o for o in control.options]
        assert offered == (grid.vectors["learned"] if axis == "vector" else grid.options[axis])
        assert control.description and getattr(control, "continuous_update", False) is False


def test_moving_a_slider_shows_that_setting_and_nothing_jumps(panel, grid):
    boxes = (panel.texts, panel.gauges, panel.said)
    heights = [box.layout.height for box in boxes]
    panel.controls["radius"].value, panel.controls["coeff"].value = 16.0, -1.0
    view = grid.view(panel.state)
    title = "steered: learned vector 0 × -1"
    assert panel.texts.value == render.render_texts(view["clean"], view["text"], title)
    assert panel.gauges.value == render.render_gauges(grid, view)
    assert render.verdict(view) in plain(panel.said.value)
    assert all(heights) and heights == [box.layout.height for box in boxes]


def test_a_click_on_the_heat_map_selects_and_frames_the_cell_and_draws_once(panel, monkeypatch):
    drawn, honest = [], panel.draw
    monkeypatch.setattr(panel, "draw", lambda: drawn.append(panel.state) or honest())
    panel.cells[2, 4.0].click()
    assert [(state["source_layer"], state["radius"]) for state in drawn] == [(2, 4.0)]
    framed = [place for place, button in panel.cells.items() if "▸" in button.description]
    assert framed == [(2, 4.0)]
    assert all("change and stay fluent" in button.tooltip for button in panel.cells.values())
    panel.controls["radius"].value = 16.0  # the sliders still answer
    assert len(drawn) == 2


def test_another_kind_offers_its_own_vectors(panel):
    panel.controls["vector"].value = 1
    panel.controls["kind"].value = "random"
    assert [o[1] for o in panel.controls["vector"].options] == [0] and panel.state["vector"] == 0
    panel.controls["kind"].value = "learned"
    assert [o[1] for o in panel.controls["vector"].options] == [0, 1]
    assert notebooks.PANEL_ERROR not in panel.said.value


def test_a_callback_that_raises_is_seen_by_the_scan(panel, monkeypatch):
    def errors():
        nb = new_notebook()
        state = {"state": embed.dependency_state([panel])}
        nb.metadata["widgets"] = {notebooks.WIDGET_STATE: state}
        return notebooks.widget_errors(nb)

    assert errors() == []
    monkeypatch.setattr(panel.grid, "view", lambda state: 1 / 0)
    panel.controls["radius"].value = 4.0
    assert len(errors()) == 1 and "ZeroDivisionError" in errors()[0]


def test_the_grid_needs_no_torch(folder):
    code = (
        "import sys\nfrom helpers import figures\nfrom helpers.figures import explorer, render\n"
        "from helpers.studies import store\nfrom helpers.workbook import export\n"
        f"sweep = store.read('explorer', folder={str(folder)!r})\n"
        "panel = explorer.GridPanel(sweep)\npanel.controls['radius'].value = 4.0\n"
        "figures.bars({'a': 1}, '', '', '{}')\nrender.render_still(panel.grid, panel.state)\n"
        "print(panel.state['radius'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["4.0", "False"], done.stderr[-500:]


# -- geometry and tokens ---------------------------------------------------------------------------
def test_the_geometry_panel_draws_every_token_and_layer():
    rng = np.random.default_rng(0)
    angles, lengths = rng.uniform(1, 40, (2, 3, 4, 2, 5)), rng.uniform(50, 100, (3, 2, 5))
    angles[..., 0] = np.nan  # a shared opening is no prompt's own
    words = [list("abcde"), ["<b>", "$x$", "d", "e", "f"]]
    panel = explorer.geometry_panel(angles, lengths, [5.0, 10.0], words, (10.0, 1))
    first = panel.picture.value
    assert len(panel.controls["token"].options) == 8 and "turns this token by" in first
    for control in panel.controls.values():
        control.index = control.index + 1 if control.index == 0 else control.index - 1
    assert panel.picture.value != first and notebooks.PANEL_ERROR not in panel.picture.value
    figure = render.render_turn(angles[1, 1, :, 1, 2], lengths[1, 1, 2], 10.0, 1, "$x$")
    assert f"{np.median(angles[1, 1, :, 1, 2]):.1f}°" in figure.get_suptitle()
    figure.canvas.draw()


def test_tokens_show_the_layer_that_the_slider_says():
    moved = {"learned": np.array([[0.0, 0.25], [0.5, 2.0]]), "random": np.zeros((2, 2))}
    panel = explorer.token_panel(["a", "\n"], moved, 1)

    def shown():
        return re.findall(r"\d\.\d\d", plain(panel.picture.value))

    assert shown() == ["0.50", "2.00"]
    panel.controls["layer"].value = 0
    assert shown() == ["0.00", "0.25"]
    panel.controls["kind"].value = "random"
    assert shown() == ["0.00", "0.00"]
    render.render_token_grid(["a", "$\n$"], moved).canvas.draw()
    with pytest.raises(ValueError):
        render.render_tokens(["a"], [1, 2])


# -- no kernel -------------------------------------------------------------------------------------
def test_the_radius_slider_is_linked_in_the_browser(folder):
    box = explorer.radius_slider(store.read("goldilocks", folder=folder))
    chosen, stack = box.children
    assert len(stack.children) == len(chosen.options) == 4
    assert stack.selected_index == chosen.index == 0
    for (label, _), page in zip(chosen.options, stack.children):
        assert f"R = {label} is marked" in page.value and "<script>" not in page.value
    models = embed.dependency_state([box]).values()
    (link,) = (model["state"] for model in models if model["model_name"] == "LinkModel")
    assert (link["source"][1], link["target"][1]) == ("index", "selected_index")


def test_the_export_holds_the_slider_and_an_index(folder):
    committed = notebooks.read(notebooks.ROOT / "notebooks" / "explorer.ipynb")
    nb = export.with_widgets(committed, folder)
    (cell,) = notebooks.tagged(nb, "radius-slider")
    model = cell.outputs[-1]["data"][notebooks.WIDGET_VIEW]["model_id"]
    state = nb.metadata["widgets"][notebooks.WIDGET_STATE]["state"]
    assert state[model]["model_name"] == "VBoxModel"
    listed = export.index(notebooks.resolve())
    assert all(f'href="{path.stem}.html"' in listed for path in notebooks.resolve())


# -- the live lab ----------------------------------------------------------------------------------
def test_training_fills_the_tables(lab):
    lab.fields["radius"].value = "1, 4, 1"  # an R listed twice is trained once
    assert "at the source" in press(lab, "Train")
    found = [(row["kind"], row["radius"], row["vector"]) for row in lab.rows]
    assert found == [("learned", r, v) for r in (1.0, 4.0) for v in (0, 1)]
    assert all(row["objective"] > 0 and isinstance(row["fluent"], bool) for row in lab.rows)
    wanted = training.train(lab.span, 4.0, 2, steps=2, progress=False)
    torch.testing.assert_close(lab.sets["learned", 4.0].tensor, wanted.vectors.tensor)
    assert lab.tried.value.count("–") == 2 and lab.bar.value == lab.bar.max
    assert "In range: " in press(lab, "Compare with random") and "–" not in lab.tried.value
    for radius in (1.0, 4.0):
        norms = lab.sets["random", radius].tensor.norm(dim=1)
        assert norms.tolist() == pytest.approx([radius] * 2)


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("radius", "-3", "radius -3 is not a norm: it must be a finite number above 0"),
        ("radius", "nan", "above 0"),
        ("radius", "", "R '' is not a list of numbers"),
        ("radius", "ten", "R 'ten' is not a list of"),
        ("source", 9, "source_layer 9 is outside the model: it has 6 blocks, so use 0 … 5"),
        ("steps", 0, "must be at least 1"),
        ("target", 1, "must come after source_layer 1: use 2 … 5"),
        ("n_vectors", 0, "it must be a whole number, 1 or more"),
        ("n_vectors", 99, "use at most 32"),
        ("prompt", "  ", "give a string that is not empty"),
    ],
)
def test_a_bad_entry_is_said_in_the_panel_and_it_goes_on(lab, field, value, said):
    good = lab.fields[field].value
    lab.fields[field].value = value
    assert said in press(lab, "Train") and "⚠" in lab.status.value and not lab.rows
    lab.fields[field].value = good
    press(lab, "Train")
    assert lab.rows and not lab.buttons["Train"].disabled


def watch_measuring(monkeypatch, before=lambda: None):
    """The radii of the sets that the lab measures, in turn; `before` is called first each time."""
    asked, honest = [], live.measured

    def measured(span, prompt, sets, *others):
        asked.append([vectors.radius for vectors in sets])
        before()
        return honest(span, prompt, sets, *others)

    monkeypatch.setattr(live, "measured", measured)
    return asked


def test_comparing_again_measures_only_what_is_new(lab, monkeypatch):
    press(lab, "Train", "Compare with random")
    asked = watch_measuring(monkeypatch)
    lab.fields["radius"].value = "2"
    press(lab, "Train", "Compare with random")
    assert asked == [[2.0], [2.0]]
    lab.fields["seed"].value += 1
    press(lab, "Compare with random")
    assert asked[2:] == [[1.0, 2.0, 4.0]]


def test_in_range_is_where_more_learned_than_random_vectors_do_both():
    def row(radius, kind, both):
        return {"radius": radius, "kind": kind, "changed": True, "fluent": both}

    rows = [row(4.0, "learned", True), row(4.0, "random", False)]
    rows += [row(2.0, "learned", True), row(2.0, "random", True), row(8.0, "learned", True)]
    rows += [row(16.0, "learned", False), row(16.0, "random", False)]
    assert live.in_range(rows) == [4.0] and live.in_range([]) == []


def test_typing_and_sliding_train_nothing(lab):
    typed = {"prompt": "Else?", "radius": "7", "source": 2, "steps": 9}
    for name, value in {**typed, "coeff": 2.0, "sort by": "kl", "largest first": True}.items():
        lab.fields[name].value = value
    assert lab.thread is None and not lab.rows


@pytest.mark.parametrize("method, steps, kept", [("power", 6, 2), ("adam", 3, 1)])
def test_stop_keeps_what_is_finished(lab, method, steps, kept):
    lab.fields["method"].value, lab.fields["radius"].value = method, "2, 3"
    lab.fields["steps"].value = 20_000 if method == "power" else steps
    calls = []

    def count(change):
        calls.append(change["new"])
        if change["new"] == 7:  # power: the 6th step; adam: the second vector of four calls each
            lab.buttons["Stop"].click()

    lab.bar.observe(count, "value")
    assert "kept what was finished" in press(lab, "Train") and 7 <= max(calls) < lab.bar.max
    assert list(lab.sets) == [("learned", 2.0)] and len(lab.rows) == kept
    wanted = training.train(lab.span, 2.0, 2, method, steps, progress=False).vectors.tensor[:kept]
    torch.testing.assert_close(lab.sets["learned", 2.0].tensor, wanted)


def test_stop_before_anything_keeps_what_was_there(lab):
    press(lab, "Train")
    before = dict(lab.sets)
    lab.fields["radius"].value, lab.fields["steps"].value = "9", 20_000
    lab.bar.observe(lambda change: lab.stop.set(), "value")
    assert "before anything was finished" in press(lab, "Train") and lab.sets == before


def test_one_job_at_a_time(lab):
    lab.fields["steps"].value = 20_000
    lab.buttons["Train"].click()
    lab._start(lab._control)
    assert "One thing at a time" in plain(lab.status.value)
    assert lab.buttons["Train"].disabled and not lab.buttons["Stop"].disabled
    lab.buttons["Stop"].click()
    lab.wait(60)


def test_scaling_shows_the_scaled_vector(lab):
    press(lab, "Train")
    lab.fields["pick"].value = ("learned", 4.0, 1)
    lab.wait(60)
    lab.fields["coeff"].value = -3.0
    lab.wait(60)
    assert "‖coefficient · θ‖ = 12" in plain(lab.said.value) and "× -3" in plain(lab.texts.value)
    press(lab, "Compare with random")
    assert lab.fields["pick"].value == "" and lab.fields["pick"].index == 0  # says "(choose)"
    ends = lab.fields["coeff"].options[0], lab.fields["coeff"].options[-1]
    assert [value for _, value in ends] == [-3.0, 3.0]


def test_a_slider_that_moves_on_while_one_value_is_measured_is_followed(lab, monkeypatch):
    press(lab, "Train")
    begun, go_on = threading.Event(), threading.Event()

    def slowly():
        begun.set()
        assert go_on.wait(60)

    asked = watch_measuring(monkeypatch, slowly)
    lab.fields["pick"].value = ("learned", 4.0, 1)
    assert begun.wait(60) and not lab.fields["coeff"].disabled and lab.buttons["Train"].disabled
    for coeff in (-1.0, -2.0, -3.0):
        lab.fields["coeff"].value = coeff
    go_on.set()
    lab.wait(60)
    assert asked == [[4.0], [12.0]] and "× -3" in plain(lab.texts.value)
    assert not lab.buttons["Train"].disabled


def test_vectors_are_saved_and_loaded(lab, tiny, tmp_path):
    assert "nothing to save" in press(lab, "Save")
    assert "nothing to compare" in press(lab, "Compare with random")
    press(lab, "Train")
    lab.fields["file"].value = "tea.safetensors"
    assert "Saved 2 learned vectors of R = 4" in press(lab, "Save")
    assert (tmp_path / "vectors" / "tea.safetensors").exists()
    saved = lab.sets["learned", 4.0].tensor
    other = live.LiveLab(tiny, "What is tea?", 2, 4, "1", 2, max_new_tokens=8)

    def load(name):
        other.fields["file"].value = name
        return press(other, "Load")

    assert "There is no file 'coffee.safetensors' in vectors: it has tea" in load("coffee")
    assert "Loaded tea.safetensors: 2 vectors of R = 4" in load("tea") and len(other.rows) == 2
    torch.testing.assert_close(other.sets["learned", 4.0].tensor, saved)
    SteeringVectors(saved[:1], 1).save(tmp_path / "vectors" / "no_radius.safetensors")
    SteeringVectors(torch.ones(2, 7), 1).save(tmp_path / "vectors" / "other_model.safetensors")
    assert "1 vectors of R = 4" in load("no_radius")
    assert "d_model is 7, that of tiny-random is 32" in load("other_model")
    for name in ("../tea", "", "a/b", ".hidden"):
        other.fields["file"].value = name
        assert "no folders" in press(other, "Save")


def test_tried_has_a_line_per_radius():
    rows = [
        {"radius": r, "kind": kind, "changed": kind == "learned", "fluent": r < 9 or i == 0}
        for r, kind in ((8.0, "learned"), (40.0, "learned"), (8.0, "random"))
        for i in (0, 1)
    ]
    head, *lines = re.findall(r"<tr>(.*?)</tr>", render.render_tried(rows))
    assert [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in lines] == [
        ["8", "2 of 2", "2 of 2", "<b>2 of 2</b> ██", "0 of 2"],
        ["40", "2 of 2", "1 of 2", "<b>1 of 2</b> █", "–"],
    ]


@pytest.mark.parametrize("down, order", [(False, "2031"), (True, "3021")])
def test_the_table_is_sorted_and_what_has_no_number_comes_last(down, order):
    rows = [
        {**{name: i for name in render.COLUMNS}, "text": f"text {i}", "surprise": surprise}
        for i, surprise in enumerate([2.0, None, 1.0, 3.0])
    ]
    shown = render.render_table(rows, "surprise", down)
    assert "".join(re.findall(r"text (\d)", shown)) == order


def test_every_field_and_button_says_what_it_is(lab):
    assert all(field.description for field in lab.fields.values())
    assert all(button.tooltip for button in lab.buttons.values())
    assert not any(getattr(field, "continuous_update", False) for field in lab.fields.values())
    assert json.dumps(embed.dependency_state([lab]))
