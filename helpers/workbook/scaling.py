"""How the cost of training grows: time, memory and arithmetic against each size, and against workers, with fitted exponents.

    python -m helpers bench --scaling        # prints the exponents, writes build/scaling.json and build/scaling.png

Random models of one shape (Llama) stand for all: cost depends on sizes, not on what the weights know.
"""

import json
import os
import time
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers

from ..ledger import write_atomically
from ..models.loading import LanguageModel, byte_tokenizer
from ..residual.span import LayerSpan
from ..studies import sweeps
from ..training.optimisers import train, value_and_grad
from .bench import machine, seconds

BASE = dict(vectors=8, tokens=32, distance=6, steps=2, depth=12, width=384)
AXES = {
    "vectors": (4, 8, 16, 32, 64),
    "tokens": (16, 32, 64, 128, 256),
    "distance": (2, 4, 8, 16),
    "steps": (1, 2, 4, 8),
    "depth": (8, 16, 32),
    "width": (96, 192, 384, 768),
}
LABELS = {
    "vectors": "vectors",
    "tokens": "prompt tokens",
    "distance": "blocks from source to target",
    "steps": "steps",
    "depth": "depth of the model (blocks)\nhalf of it between the layers",
    "width": "width of the model (d_model)",
}
LINEAR = (
    "vectors",
    "distance",
    "steps",
    "depth",
)  # where nothing may grow faster than in proportion
WORKER = dict(
    vectors=8, tokens=36, distance=14, steps=2, depth=30, width=576
)  # as the default model in notebook 02
MEASURES = {"seconds": "time", "bytes": "memory", "flops": "arithmetic"}


@lru_cache(maxsize=1)  # the sizes of one axis after another share a model
def random_llama(width, depth) -> LanguageModel:
    """A Llama with random weights that reads bytes; heads are 32 wide, three share their keys: width is a multiple of 96."""
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=depth,
        vocab_size=259,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 96,
    )
    return random_model(config)


def random_model(config, device="cpu", dtype=torch.float32, seed=0) -> LanguageModel:
    """A LanguageModel of a transformers config, its random weights made on the device; it reads bytes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return LanguageModel(f"random-{config.model_type}", model, byte_tokenizer(), f"random {seed}")


def span_of(lm, tokens, distance):
    """A layer span of `distance` blocks in the middle of the model, over one prompt of `tokens` tokens, the last 3 as target."""
    source = (lm.n_layers - distance) // 2
    return LayerSpan(lm, "a" * tokens, source, source + distance, slice(-3, None))


def job(vectors, tokens, distance, steps, depth, width):
    """(training to be called, one gradient step over all vectors as one chunk to be called) for these sizes."""
    lm = random_llama(width, depth)
    usual, whole = span_of(lm, tokens, distance), span_of(lm, tokens, distance)
    whole.chunk = vectors
    theta = torch.randn(vectors, width, generator=torch.Generator().manual_seed(0))
    return partial(train, usual, 5.0, vectors, steps=steps, progress=False), partial(
        value_and_grad, whole, theta
    )


def peak_bytes(run, device="cpu") -> int:
    """The most memory that `run()` holds at once in tensors it made, as the allocator tells."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with (
        _silent(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        run()
    events = sorted(
        (e.start_ns(), e.nbytes())
        for e in profile.profiler.kineto_results.events()
        if e.name() == "[memory]"
    )
    return max(accumulate(size for _, size in events), default=0)


@contextmanager
def _silent():
    """The profiler tells file descriptor 2 that it starts and stops, whatever its settings."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def flops(run) -> int:
    """Floating-point operations of the matrix products of `run()`, counted by PyTorch, which counts attention's on CUDA alone."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def exponent(sizes, values) -> float:
    """The slope of a straight line through (log size, log value), by least squares: 1 is in proportion, 0 is constant."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-12)), 1)[0])


def grow(axis, sizes, base=BASE, repeats=3) -> dict:
    """{"sizes", "seconds", "bytes", "flops", "exponents"} along one axis, the other sizes as in `base`.

    Time and arithmetic: training. Memory: a gradient step with all vectors in one chunk (usual chunks bound it to a budget).
    """
    settings = [{**base, axis: size} for size in sizes]
    if axis == "depth":
        settings = [{**one, "distance": one["depth"] // 2} for one in settings]
    if axis == "distance":
        settings = [{**one, "depth": max(sizes) + 2} for one in settings]
    jobs = [job(**one) for one in settings]
    found = {
        "sizes": list(sizes),
        "seconds": seconds(*[training for training, _ in jobs], repeats=repeats),
        "bytes": [peak_bytes(gradient) for _, gradient in jobs],
        "flops": [flops(training) for training, _ in jobs],
    }
    return {
        **found,
        "exponents": {MEASURES[name]: round(exponent(sizes, found[name]), 3) for name in MEASURES},
    }


# ---------------------------------------------------------------------------------------------- workers
def cell(seed, **sizes) -> dict:
    """What a worker computes: a training, of another seed each time."""
    lm = random_llama(sizes["width"], sizes["depth"])
    span = span_of(lm, sizes["tokens"], sizes["distance"])
    return {
        "objective": train(
            span, 5.0, sizes["vectors"], steps=sizes["steps"], seed=seed, progress=False
        ).best
    }


def warm(number, folder, workers, **sizes) -> dict:
    """Make a worker ready (imports, its model, one training), and wait until all of them are: one call for each of them."""
    result, end = cell(number, **sizes), time.monotonic() + 120
    (Path(folder) / str(number)).touch()
    while len(list(Path(folder).iterdir())) < workers and time.monotonic() < end:
        time.sleep(0.02)
    return result


def bench_workers(counts=(1, 2), n_cells=8, sizes=WORKER) -> dict:
    """Runs per second of a sweep on pools of one-thread workers that are warm, and how many times the first pool's that is."""
    rates = []
    for count in counts:
        with TemporaryDirectory() as folder, sweeps.pool(count) as pool:
            sweeps.run(
                [dict(number=i, folder=folder, workers=count, **sizes) for i in range(count)],
                warm,
                pool,
                progress=False,
            )
            start = time.perf_counter()
            done = sweeps.run(sweeps.grid(seed=range(n_cells), **sizes), cell, pool, progress=False)
            rates.append(n_cells / (time.perf_counter() - start))
        if done.failed:
            raise RuntimeError(done.message)
    return {
        "workers": list(counts),
        "runs": n_cells,
        "runs_per_second": rates,
        "times_one": [rate / rates[0] for rate in rates],
    }


# ---------------------------------------------------------------------------------------------- the figure and the command
def figure(record):
    """A panel for each axis (time and memory, both relative to the smallest size, with their exponents), and one for workers."""
    import matplotlib.pyplot as plt

    from ..figures import charts

    grown, workers = record["axes"], record["workers"]
    fig, panels = plt.subplots(2, 4, figsize=(14, 6.6))
    for ax, (axis, found) in zip(panels.flat, grown.items()):
        sizes = np.array(found["sizes"])
        ax.plot(sizes, sizes / sizes[0], color="0.5", linestyle=":", label="in proportion")
        for i, name in enumerate(("seconds", "bytes")):
            values, power = np.array(found[name]), found["exponents"][MEASURES[name]]
            ax.plot(
                sizes,
                values / values[0],
                marker="os"[i],
                color=charts.OTHERS[i],
                label=f"{MEASURES[name]}: size^{power:.2f}",
            )
        ax.set(
            xscale="log",
            yscale="log",
            xticks=sizes,
            xticklabels=sizes,
            xlabel=LABELS[axis],
            ylabel="relative to the smallest",
        )
        ax.minorticks_off()
        ax.legend(fontsize=9)
    for ax in panels.flat[len(grown) + 1 :]:
        ax.axis("off")
    ax = panels.flat[len(grown)]
    ax.bar(
        [str(n) for n in workers["workers"]],
        workers["times_one"],
        color=charts.OTHERS[0],
        width=0.5,
    )
    ax.axhline(1.7, color="0.35", linestyle="--", linewidth=1)
    ax.set(xlabel="workers of one thread each", ylabel="throughput, times one worker's")
    fig.suptitle("How does the cost of training grow?")
    return fig


def report(record) -> list[str]:
    """The exponents as lines of text, with a sentence for whatever grows faster than it may."""
    lines = [
        f"{'cost ~ size^exponent':32s}" + "".join(f"{name:>12s}" for name in MEASURES.values())
    ]
    for axis, found in record["axes"].items():
        powers = "".join(f"{found['exponents'][measure]:12.2f}" for measure in MEASURES.values())
        lines.append(f"{LABELS[axis].splitlines()[0]:32s}{powers}")
    workers = record["workers"]
    lines += [
        f"{n} worker{'s' * (n > 1)}: {rate:.2f} runs a second, {times:.2f} times one worker's"
        for n, rate, times in zip(
            workers["workers"], workers["runs_per_second"], workers["times_one"]
        )
    ]
    lines += [
        f"{LABELS[axis]}: {measure} grows faster than in proportion (exponent {power:.2f})."
        for axis in LINEAR
        if axis in record["axes"]
        for measure, power in record["axes"][axis]["exponents"].items()
        if power > 1.1
    ]
    return lines


def measure(axes=AXES, base=BASE, repeats=3, **workers) -> dict:
    """The whole record: every axis, then workers; what it was measured with stands in "machine" and "command"."""
    start = time.perf_counter()
    record = {
        "command": "python -m helpers bench --scaling",
        "machine": machine(),
        "base": base,
        "axes": {axis: grow(axis, sizes, base, repeats) for axis, sizes in axes.items()},
        "workers": bench_workers(**workers),
    }
    return {**record, "seconds": round(time.perf_counter() - start)}


def main(out) -> int:
    """Measure, print, and write scaling.json and scaling.png into the folder `out`."""
    record, out = measure(), Path(out)
    print("\n".join(report(record)))
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "scaling.json", json.dumps(record, indent=1) + "\n")
    figure(record).savefig(out / "scaling.png", dpi=100)
    print(f"{record['seconds']} s; written to {out / 'scaling.json'} and scaling.png")
    return 0
