"""A recipe on a second real model folder (whatever save_pretrained wrote): the command line, real notebooks, real kernels."""

import json

import nbformat
import pytest
import yaml
from conftest import tiny_model

from helpers import __main__
from helpers.workbook import runner
from helpers.workbook.notebooks import resolve


@pytest.fixture
def folder(tmp_path):
    """A small random Qwen2 with its tokenizer, as a user would save one."""
    lm, path = tiny_model("qwen2"), tmp_path / "a model"  # (with a blank in its path)
    lm.model.save_pretrained(path)
    lm.tokenizer.save_pretrained(path)
    return path


def recipe(tmp_path, notebooks, **parameters):
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump({"notebooks": notebooks, "parameters": parameters}, allow_unicode=True)
    )
    return str(path)


def test_a_recipe_runs_notebooks_on_a_model_folder(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WORKBOOK_BUILD", str(tmp_path / "build"))
    asked = recipe(
        tmp_path,
        ["00", "01"],
        MODEL=str(folder),
        SOURCE_LAYER=1,
        TARGET_LAYER=3,
        RADIUS="calibrated",
        N_VECTORS=3,
        STEPS=2,
        MAX_NEW_TOKENS=4,
        N_PROMPTS=2,
        RADII=[1.0, 4.0],
    )
    assert __main__.main(["run", "-f", asked]) == 0
    said = capfd.readouterr().out
    assert "block 1 to 3: the calibrated radius is" in said and "finished 00_start_here" in said
    assert "finished 01_layer_norm_geometry" in said and "the ledger as it was" in said
    (made,) = (tmp_path / "build" / "runs").iterdir()
    assert (
        not list(made.glob("*.failed.ipynb")) and not (tmp_path / "build" / "ledger.json").exists()
    )
    printed = json.dumps(nbformat.read(made / "00_start_here.ipynb", as_version=4))
    assert "4 blocks, d_model 32" in printed


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(MODEL="no such model"), "There is no model 'no such model'"),
        (dict(NO_SUCH=3), "No notebook of this run has a parameter 'NO_SUCH'"),
        (dict(SOURCE_LAYER=9), "source_layer 9 is outside the model: it has 4 blocks"),
    ],
)
def test_a_recipe_that_cannot_run_is_one_sentence_and_writes_nothing(
    folder, tmp_path, monkeypatch, capsys, change, message
):
    monkeypatch.setenv("WORKBOOK_BUILD", str(tmp_path / "build"))
    usual = {"MODEL": str(folder), "SOURCE_LAYER": 1, "TARGET_LAYER": 3, "RADIUS": "calibrated"}
    asked = recipe(tmp_path, ["00"], **{**usual, **change})
    assert __main__.main(["run", "-f", asked]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not (tmp_path / "build").exists()
    assert runner.read_recipe(asked)[0] == ["00"] and resolve(["00"])
