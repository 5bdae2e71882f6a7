"""The benchmarks of growth and of a GPU, on tiny sizes: what they count is right, and they run through. No time is asserted."""

import json

import pytest
import torch
import transformers
from test_residual import one_thread  # noqa: F401

from helpers import __main__
from helpers.training import value
from helpers.workbook import bench, gpu, scaling

TINY = dict(vectors=4, tokens=8, distance=2, steps=1, depth=6, width=96)
AXES = {
    "vectors": (2, 4, 8),
    "tokens": (6, 12, 24),
    "distance": (2, 4, 8),
    "steps": (1, 2, 4),
    "depth": (4, 8),
    "width": (96, 192),
}


@pytest.fixture(scope="module")
def record():
    return scaling.measure(AXES, TINY, repeats=1, counts=(2,), n_cells=2, sizes=TINY)


def test_nothing_is_worse_than_linear(record):
    """By arithmetic and memory, which are the same on every machine: in vectors, layers and steps."""
    for axis in scaling.LINEAR:
        found = record["axes"][axis]["exponents"]
        assert found["arithmetic"] < 1.02 and found["memory"] < 1.02, axis
    assert record["axes"]["vectors"]["exponents"]["arithmetic"] == pytest.approx(1, abs=1e-3)
    assert record["axes"]["steps"]["exponents"]["memory"] == pytest.approx(0, abs=0.1)
    assert record["axes"]["width"]["exponents"]["arithmetic"] == pytest.approx(
        2, abs=0.1
    )  # matrices


def test_memory_is_what_the_allocator_holds():
    def run(n=10**6):
        x = torch.zeros(n)  # 4 MB
        y = x + 1  # 8 MB at once
        del x
        return y * 2  # 8 MB again

    assert scaling.peak_bytes(run) == pytest.approx(8e6, rel=0.01)
    assert scaling.peak_bytes(lambda: None) == 0


def test_an_exponent_is_a_slope_of_logs():
    assert scaling.exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert scaling.exponent([1, 2, 4], [5, 5, 5]) == pytest.approx(0, abs=1e-9)
    assert scaling.exponent([1, 10], [1, 100]) == pytest.approx(2)


def test_two_workers_share_the_runs(record):
    workers = record["workers"]
    assert (
        workers["workers"] == [2]
        and workers["times_one"] == [1]
        and workers["runs_per_second"][0] > 0
    )


def test_the_report_names_what_grows_too_fast(record):
    assert not [
        line
        for line in scaling.report(record)
        if "arithmetic grows" in line or "memory grows" in line
    ]
    worse = json.loads(json.dumps(record))
    worse["axes"]["vectors"]["exponents"]["memory"] = 1.4
    assert "vectors: memory grows faster than in proportion (exponent 1.40)." in scaling.report(
        worse
    )


def test_the_command_writes_a_record_and_a_figure(record, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "measure", lambda: record)
    assert __main__.main(["bench", "--scaling", "--out", str(tmp_path / "new")]) == 0
    assert (
        json.loads((tmp_path / "new" / "scaling.json").read_text())["machine"]["torch"]
        == torch.__version__
    )
    assert (
        tmp_path / "new" / "scaling.png"
    ).stat().st_size > 10_000 and "2 workers:" in capsys.readouterr().out


# -- the GPU's command, on a CPU ---------------------------------------------------------------------------------------


def test_without_a_card_the_command_says_so_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert __main__.main(["bench", "--gpu", "--out", str(tmp_path)]) == 1
    assert (
        "There is no CUDA device here" in (said := capsys.readouterr().out)
        and said.count("\n") == 1
    )
    assert not list(tmp_path.iterdir())


def test_the_gpu_record_on_a_tiny_shape():
    config = transformers.Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
    )
    record = gpu.measure(
        "cpu",
        config,
        dict(source=1, target=3, n_vectors=6, steps=2, peak=1e12),
        dict(source=1, batches=(1, 2), max_new_tokens=3),
        model="tiny-random",
        source=1,
        target=3,
    )
    assert (
        record["parity"]["lowest_cosine"] == pytest.approx(1)
        and record["parity"]["objective_off_by_at_most"] == 0
    )
    run = record["training"]
    assert (
        run["prompt_tokens"] == 40
        and run["seconds"] > 0
        and run["share_of_bf16_peak"] == pytest.approx(run["tflops"])
    )
    assert [one["batch"] for one in record["generation"]] == [1, 2]
    lines = gpu.report(record)
    assert len(lines) == 5 and "6 vectors, block 1 to 3, 40 tokens, 2 iterations" in lines[2]
    json.dumps(record)


def test_operations_are_counted_as_by_hand():
    lm = scaling.random_llama(96, 4)
    span = scaling.span_of(lm, 8, 2)
    weights = sum(p.numel() for block in lm.blocks[2:4] for p in block.parameters() if p.ndim == 2)
    attention = (
        2 * 2 * 2 * 96 * 8 * 8
    )  # 2 blocks, QKᵀ and PV, a multiplication and an addition, width, tokens
    assert scaling.flops(lambda: value(span, torch.ones(1, 96))) - 2 * 8 * weights in (0, attention)


def test_peaks_are_found_by_the_cards_name():
    assert (
        gpu.peak_of("NVIDIA H100 80GB HBM3") == 989e12 and gpu.peak_of("NVIDIA H100 PCIe") == 756e12
    )
    assert gpu.peak_of("NVIDIA L40S") == 362e12 and gpu.peak_of("Some Card") is None
    assert {"processor", "cores", "threads", "torch"} <= set(bench.machine())
