"""Stored sweeps: what is computed is what is read; another model, another adapter and missing cells are said in one sentence."""

import json

import pytest

from helpers.models import load
from helpers.studies import store, stored


def double(lm, x, label=None):
    return {"rows": [{"twice": 2 * x, "model": lm.name}]}


def run_double(model, x, label=None):
    return double(load(model), x)


@pytest.fixture(scope="module")
def lm():
    return load("tiny-random")


@pytest.fixture
def configs(lm):
    return [{"model": lm.name, "x": x, "label": "a"} for x in (1, 2, 3)]


def test_what_is_computed_is_what_is_read(lm, configs, tmp_path):
    asked = []

    def parts(done):
        for config in configs:
            asked.append(len(done))
            yield lm, [config]

    path = stored.compute(
        "doubles", parts, run_double, 1, tmp_path / "out", tmp_path / "store", options=" --deep"
    )
    meta = json.loads(path.read_text())["meta"]
    assert asked == [0, 1, 2] and meta["cells"] == meta["runs"] == meta["computed"] == 3
    assert (
        meta["command"] == "python -m helpers grid doubles --model tiny-random --deep"
        and meta["organisms"] == {}
    )
    found = stored.cells("doubles", configs[::-1], lm, folder=tmp_path / "out")
    assert found == stored.cells(
        "doubles", configs[::-1], lm, "live", double, ("label",), progress=False
    )
    again = stored.compute("doubles", parts, run_double, 1, tmp_path / "out", tmp_path / "store")
    assert json.loads(again.read_text())["meta"]["computed"] == 0


def test_one_run_may_be_several_cells(lm, configs, tmp_path):
    path = stored.compute(
        "doubles",
        lambda _: [(lm, configs[:1])],
        run_double,
        1,
        tmp_path,
        tmp_path / "store",
        lambda c, r: [{"config": {**c, "half": h}, "result": r} for h in (0, 1)],
    )
    assert [c["config"]["half"] for c in json.loads(path.read_text())["cells"]] == [0, 1]


def test_a_failing_run_writes_no_file(lm, tmp_path, capsys):
    with pytest.raises(ValueError, match="1 of 1 runs of run_double failed"):
        stored.compute(
            "doubles",
            lambda _: [(lm, [{"model": "tiny-random", "x": None}])],
            run_double,
            1,
            tmp_path,
            tmp_path / "store",
        )
    assert not (tmp_path / "doubles.json").exists()


def test_what_is_not_there_is_said(lm, configs, tmp_path):
    stored.compute(
        "doubles", lambda _: [(lm, configs[:2])], run_double, 1, tmp_path, tmp_path / "store"
    )
    with pytest.raises(
        ValueError, match='lacks 1 of the 3 cells .*\'"x": 3|lacks 1 of the 3 cells'
    ):
        stored.cells("doubles", configs, lm, folder=tmp_path)
    with pytest.raises(ValueError, match='\'both\': use "stored" or "live"'):
        stored.cells("doubles", configs, lm, "both", folder=tmp_path)


def test_a_sweep_of_another_adapter_is_refused(lm, tmp_path, monkeypatch):
    meta = {
        "model": lm.name,
        "model_hash": lm.weights_hash,
        "organisms": {"refusal": stored.adapter_hash("refusal")},
    }
    cells = [{"config": {}, "result": {"rows": [{}]}}]
    store.write("doubles", cells, meta, tmp_path)
    assert stored.read("doubles", lm, tmp_path)["cells"] == cells
    store.write("doubles", cells, {**meta, "organisms": {"refusal": "another"}}, tmp_path)
    with pytest.raises(
        ValueError, match="another adapter than data/organisms/refusal: .* grid doubles"
    ):
        stored.read("doubles", lm, tmp_path)


@pytest.mark.parametrize("name", ["refusal", "choosing", "unlocking", "backdoors"])
def test_committed_sweeps_were_made_with_the_committed_adapters(name):
    meta = store.read(name)["meta"]
    assert meta["organisms"] and all(
        stored.adapter_hash(organism) == digest for organism, digest in meta["organisms"].items()
    )
