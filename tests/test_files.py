"""Files that are cut, altered or another program's: read rightly, or refused in one sentence."""

import json
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import ROOT, UserError, ledger
from helpers.steering import SteeringVectors
from helpers.studies import store
from helpers.workbook import notebooks, parameters

EACH = 60  # inputs per kind of file: 300 in all
RECIPE = "notebooks: ['00', '02']\nparameters:\n  RADIUS: 10.0\n  RADII: [4, 8.5]\n  MODEL: 'a/b'\n"


@st.composite
def damages(draw):
    """Up to three cuts, exchanged or added bytes, each as (kind, where, bytes)."""
    kind = st.sampled_from(["cut", "exchange", "add", "twice"])
    where = st.floats(0, 1)
    return draw(st.lists(st.tuples(kind, where, st.binary(min_size=1, max_size=4)), max_size=3))


def damaged(content, changes):
    for kind, where, new in changes:
        at = int(where * len(content))
        rest = {"cut": b"", "exchange": new + content[at + len(new) :]}
        rest |= {"add": new + content[at:], "twice": content[at // 2 :]}
        content = content[:at] + rest[kind]
    return content


def said_in_one_sentence(read, path):
    try:
        read(path)
    except ValueError as error:
        assert str(error) and "\n" not in str(error), repr(error)


def a_sweep():
    row = {"kind": "learned", "vector": 0, "coeff": 1.0, "temperature": 0, "text": "tea"}
    row |= {"distance": 0.5, "surprise": 2.0, "objective": 3.0, "kl": 0.1, "norm": 4.0}
    config = {"part": "A", "model": "m", "prompt": "p", "seed": 0, "source_layer": 1, "radius": 4.0}
    result = {"clean": "x", "own_spread": 0.1, "fluent": [1.0, 3.0], "rows": [row]}
    return {"config": config, "result": result}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """{kind: (the bytes of a whole file, how it is read)}"""
    folder = tmp_path_factory.mktemp("whole")
    vectors = folder / "v.safetensors"
    SteeringVectors(torch.ones(2, 4), 1, radius=2.0, provenance={"seed": 1}).save(vectors)
    sweep = store.write("some", [a_sweep()], {"model": "m", "model_hash": "x"}, folder)
    committed = json.loads(ledger.CLAIMS.read_text(encoding="utf-8"))[:2]
    notebook = json.loads((ROOT / "notebooks" / "explorer.ipynb").read_text(encoding="utf-8"))
    notebook["cells"] = notebook["cells"][:2]
    return {
        "vectors": (vectors.read_bytes(), SteeringVectors.load),
        "sweep": (sweep.read_bytes(), lambda p: store.Grid(store.read(p.stem, folder=p.parent))),
        "claims": (json.dumps(committed).encode(), lambda p: ledger.claims()),
        "recipe": (RECIPE.encode(), parameters.read_recipe),
        "notebook": (json.dumps(notebook).encode(), notebooks.read),
    }


@pytest.mark.parametrize("kind", ["vectors", "sweep", "claims", "recipe", "notebook"])
def test_altered_files_raise_nothing_raw(kind, originals, tmp_path, monkeypatch):
    content, read = originals[kind]
    path = tmp_path / "file.json"
    monkeypatch.setattr(ledger, "CLAIMS", path)
    path.write_bytes(content)
    read(path)  # the whole file is fine

    @settings(max_examples=EACH, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damages())
    def altered(changes):
        path.write_bytes(damaged(content, changes))
        said_in_one_sentence(read, path)

    altered()
    foreign = [b"", b"null", b"7", b"[]", b"{}", b'"x"', b"[[]]", b'{"a": 1, "a": 2}', b"\xff"]
    foreign += [b"[" * 5000, b'{"cells": 1}', b'{"nbformat": 4}', b'{"meta": [], "cells": {}}']
    foreign += [b"a: &a [*a]\n", b"a: 2001-99-99\n", b"!!python/name:os.system\n", b"a: b: c\n"]
    for other in foreign:
        path.write_bytes(other)
        said_in_one_sentence(read, path)


def _changed(document, number):
    """A document with one value somewhere in it exchanged or taken out."""
    choose = random.Random(number)
    at = document
    while True:
        key = choose.choice(sorted(at) if isinstance(at, dict) else range(len(at)))
        if not (isinstance(at[key], (dict, list)) and at[key] and choose.random() < 0.8):
            break
        at = at[key]
    if choose.random() < 0.4:
        del at[key]
    else:
        at[key] = choose.choice([None, "<b>", -1, [], {}, True, [1], {"a": 1}, 10**400])
    return document


@pytest.mark.parametrize("kind", ["sweep", "claims", "notebook"])
def test_files_of_another_form_raise_nothing_raw(kind, originals, tmp_path, monkeypatch):
    content, read = originals[kind]
    path = tmp_path / "file.json"
    monkeypatch.setattr(ledger, "CLAIMS", path)
    for number in range(100):
        path.write_text(json.dumps(_changed(json.loads(content), number)))
        said_in_one_sentence(read, path)


@pytest.mark.parametrize("content", [b"null", b"7", b'{"about": 1}'])
def test_a_header_of_vectors_of_another_form_is_said(content, tmp_path):
    from safetensors.torch import save_file

    from helpers.steering import FORMAT

    path = tmp_path / "v.safetensors"
    for about in (content.decode(), "[" * 5000, '{"site": []}', '{"source_layer": 1, "x": 2}'):
        save_file({"vectors": torch.ones(1, 4)}, path, {"format": FORMAT, "about": about})
        with pytest.raises(ValueError, match="v.safetensors"):
            SteeringVectors.load(path)


def test_a_sweep_that_cannot_be_trusted_is_one_sentence(tiny, tmp_path):
    whole = {"meta": {"model": tiny.name, "model_hash": tiny.weights_hash}, "cells": [a_sweep()]}
    text = json.dumps(whole)
    older = json.loads(text)
    del older["cells"][0]["config"]["part"]
    for content, reason in {
        text.replace('"clean": "x"', '"clean": "x", "clean": "y"'): "'clean' stands twice",
        text.replace('"meta": {', '"meta": {"organisms": [1], '): "AttributeError",
        json.dumps(older): "KeyError 'part'",
        json.dumps({"results": [1, 2]}): "KeyError 'meta'",
    }.items():
        (tmp_path / "s.json").write_text(content)
        with pytest.raises(UserError, match=f"^s.json is not a sweep .*{reason}") as caught:
            store.read("s", tiny, tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "d.json").mkdir()
    with pytest.raises(UserError, match="d.json is not a sweep"):
        store.read("d", folder=tmp_path)
    unknown = {**whole, "meta": {**whole["meta"], "organisms": {"nobody": "abc"}}}
    (tmp_path / "s.json").write_text(json.dumps(unknown))
    with pytest.raises(UserError, match="organism 'nobody' cannot be used .*train it again"):
        store.read("s", tiny, tmp_path)
    (tmp_path / "s.json").write_text(text.replace('"own_spread": 0.1, ', ""))
    with pytest.raises(UserError, match="none that the explorer can show: KeyError 'own_spread'"):
        store.Grid(store.read("s", tiny, tmp_path))
