"""Recipes: they parse, fit the notebooks and their models, and say the memory that is counted; the radius is measured."""

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from papermill.translators import PythonTranslator

from helpers.models import prompts
from helpers.residual import LayerSpan
from helpers.training import jacobian
from helpers.workbook import notebooks, recipes, runner

PATHS = sorted(recipes.FOLDER.glob("*.yaml"))
each_recipe = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def test_there_is_a_recipe_for_each_shape():
    assert (
        sorted(runner.read_recipe(path)[1]["MODEL"] for path in PATHS) == sorted(recipes.shapes())
        and len(PATHS) >= 8
    )


@each_recipe
def test_a_recipe_names_only_parameters_that_notebooks_have(path):
    names, parameters = runner.read_recipe(path)
    known = set().union(
        *(notebooks.parameters_of(notebooks.read(nb)) for nb in notebooks.resolve(names))
    )
    assert set(parameters) <= known


@each_recipe
def test_a_recipe_says_what_its_model_needs(path):
    model = runner.read_recipe(path)[1]["MODEL"]
    assert recipes.expected(model) in path.read_text(encoding="utf-8")


@each_recipe
def test_layers_go_by_depth_and_radii_by_measurement(path):
    parameters = runner.read_recipe(path)[1]
    shape = recipes.shapes()[parameters["MODEL"]]
    depth = shape.get("num_hidden_layers") or shape["n_layer"]
    assert [parameters[name] for name in ("SOURCE_LAYER", "TARGET_LAYER")] == [
        recipes.layer(k, depth) for k in (7, 21)
    ]
    for blocks in (parameters["BLOCKS"], parameters["LAYERS"]):
        assert blocks == sorted(set(blocks)) and 0 <= blocks[0] and blocks[-1] < depth
    assert parameters["LAYERS"][-1] < parameters["TARGET_LAYER"]  # they are source layers
    assert parameters["RADIUS"] == parameters["RADII"] == recipes.CALIBRATED


@each_recipe
def test_recipes_follow_the_notebooks_parameters(path):
    parameters = runner.read_recipe(path)[1]
    assert path.read_text(encoding="utf-8") == recipes.text(path, parameters["MODEL"]), (
        "run  python -m helpers.recipes --write"
    )
    assert parameters["ORGANISM"] is None and runner.read_recipe(path)[0] is None
    assert recipes.parameters_for(parameters["MODEL"]) == parameters


def test_a_recipe_hands_none_to_the_notebooks_that_have_organisms():
    (path,) = notebooks.resolve(["05"])
    _, parameters = runner.read_recipe(PATHS[0])
    share = runner._share_out([path], {"ORGANISM": parameters["ORGANISM"]})[path]
    assert share == {"ORGANISM": None}
    assert "ORGANISM = None\n" in PythonTranslator.codify(share)


def test_a_recipe_runs_a_part_of_its_notebooks_too():
    _, parameters = runner.read_recipe(PATHS[0])
    (path,) = notebooks.resolve(["00"])
    found = runner._of_these([path], {**parameters, "NO_SUCH": 1})
    assert {"MODEL", "SOURCE_LAYER", "RADIUS", "NO_SUCH"} <= set(found) and not {
        "ORGANISM",
        "SWEEP",
        "BLOCKS",
    } & set(found)
    with pytest.raises(
        notebooks.UserError, match="No notebook of this run has a parameter 'NO_SUCH'"
    ):
        runner._share_out([path], found)


def test_the_table_says_what_fits_on_a_card(capsys):
    big, small = "Qwen/Qwen2.5-7B-Instruct", "openai-community/gpt2"
    lines = recipes.table(models=[big, small]).splitlines()
    assert "24 GB" in lines[0] and len(lines) == 4
    assert lines[2].split() == [
        big,
        "7,615,616,512",
        "15.2",
        "GB",
        "105",
        "MB",
        "41",
        "13",
        "chunks",
    ]
    assert "do not fit" in recipes.table(15e9, models=[big])
    assert recipes.fits(big) == 41 and -(-512 // 41) == 13


@pytest.mark.parametrize(
    "model, parameters",
    [  # as published by their makers: so the shapes are theirs
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("google/gemma-3-1b-it", 999_885_952),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
        ("openai-community/gpt2", 124_439_808),
        ("EleutherAI/pythia-410m", 405_334_016),
    ],
)
def test_shapes_have_the_published_number_of_parameters(model, parameters):
    assert f"# {parameters:,} parameters" in recipes.expected(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_what_a_layer_span_keeps(architecture, dtype):
    lm = tiny_model(architecture)
    lm.model.to(getattr(torch, dtype))
    span = LayerSpan(lm, "a" * 40, 0, 3)
    counted = recipes.memory(lm.model.config, dtype, 0, 3, span.n_tokens)
    assert counted["parameters"] == lm.model.num_parameters()
    assert counted["weights"] == sum(p.numel() * p.element_size() for p in lm.model.parameters())
    assert (
        0.85 < counted["vector"] / span.bytes_per_vector < 1.2
    )  # tables and last norm: spread over the blocks


def test_a_7b_model_trains_512_vectors_in_chunks_on_a_card_of_24_gb():
    assert recipes.fits("Qwen/Qwen2.5-7B-Instruct", 24e9) >= 16
    assert recipes.fits("Qwen/Qwen2.5-7B-Instruct", 15e9) == 0  # the weights alone do not fit


def test_calibrated_becomes_numbers_of_the_model(capsys, tiny):
    asked = {
        "MODEL": "tiny-random",
        "SOURCE_LAYER": 1,
        "TARGET_LAYER": 4,
        "STEPS": 2,
        "RADIUS": "calibrated",
        "RADII": "calibrated",
    }
    found = recipes.resolve(asked, n_directions=2)
    radius = found["RADIUS"]
    assert asked["RADIUS"] == "calibrated" and found["STEPS"] == 2
    assert f"the calibrated radius is {radius:g}" in capsys.readouterr().out
    assert found["RADII"] == pytest.approx([share * radius for share in recipes.SPREAD], rel=0.1)
    chats = [tiny.chat_prompt(text) for text in prompts.texts("everyday", split="train", n=3)]
    span = LayerSpan(tiny, chats, 1, 4, slice(-3, None))
    low, high = jacobian.jacobian_ratio(span, [radius / 1.15, radius * 1.15], n_directions=2)
    assert low < 0.5 < high
    with pytest.raises(notebooks.UserError, match="no such model"):
        recipes.resolve({"MODEL": "no such model", "RADIUS": "calibrated"})
    with pytest.raises(notebooks.UserError, match="9 is not a layer|source_layer 9"):
        recipes.resolve({**asked, "SOURCE_LAYER": 9})
    own = {"MODEL": "no such model", "RADIUS": 3.0}
    assert recipes.resolve(own) is own  # a number of one's own: nothing is loaded


def test_shapes_name_what_configs_have():
    for model, shape in recipes.shapes().items():
        config = recipes.config_of(model).to_dict()
        assert {name: config.get(name) for name in shape} == shape, model
