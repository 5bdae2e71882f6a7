"""What a CUDA card does: `python -m helpers bench --gpu` measures it and writes build/gpu.json. A few minutes, no network.

1. parity: vectors trained on the CPU and on the card from one seed; 2. a Qwen2.5-7B-shaped model with random weights in bfloat16
trains 512 vectors; 3. tokens per second of steered generation against the batch. Without a card: one sentence, nothing written.
"""

import json
import time
from pathlib import Path

import torch

from ..ledger import write_atomically
from ..models.loading import load
from ..models.obtain import DEFAULT
from ..residual import normalise
from ..residual.span import LayerSpan
from ..steering import SteeringVectors, steer
from ..training.optimisers import train, value, value_and_grad
from . import recipes
from .bench import machine
from .scaling import flops, peak_bytes, random_model

SHAPE = "Qwen/Qwen2.5-7B-Instruct"
# Dense bfloat16 products per second as the makers state them (without sparsity); the first name found in the card's counts.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def peak_of(card) -> float | None:
    """The stated bfloat16 peak of a card in operations per second; None where it is not in the table."""
    return next(
        (peak for name, peak in PEAKS.items() if all(word in card for word in name.split())), None
    )


def parity(
    model=DEFAULT, device="cuda", source=7, target=21, radius=10.0, n_vectors=4, steps=5
) -> dict:
    """How nearly the card learns the CPU's vectors, in float32 from one seed: lowest cosine, largest gap in objective."""
    found = []
    for where in ("cpu", device):
        lm = load(model, device=where, dtype="float32")
        span = LayerSpan(
            lm, lm.chat_prompt("How do I bake bread?"), source, target, slice(-3, None)
        )
        found.append(train(span, radius, n_vectors, steps=steps, seed=0, progress=False))
    cpu, card = found
    cosine = torch.cosine_similarity(cpu.vectors.tensor, card.vectors.tensor).min().item()
    off = (card.best.cpu() / cpu.best.cpu() - 1).abs().max().item()
    return {
        "model": model,
        "n_vectors": n_vectors,
        "steps": steps,
        "lowest_cosine": cosine,
        "objective_off_by_at_most": off,
    }


def bench_training(
    lm, source=10, target=19, n_tokens=40, n_vectors=512, steps=10, radius=10.0, peak=None
) -> dict:
    """Seconds to train the vectors (after one step that warms up), operations counted by PyTorch, the share of the peak."""
    span = LayerSpan(lm, "a" * n_tokens, source, target, slice(-3, None))
    two = normalise(torch.randn(2, lm.d_model, generator=torch.Generator().manual_seed(0))).to(
        lm.device
    )
    per_vector = (
        steps * flops(lambda: value_and_grad(span, two)) / 2 + flops(lambda: value(span, two)) / 2
    )
    train(span, radius, n_vectors, steps=1, progress=False)
    taken = []

    def run():
        start = time.perf_counter()
        train(
            span, radius, n_vectors, steps=steps, progress=False
        )  # ends with its numbers on the CPU: all is done by then
        taken.append(time.perf_counter() - start)

    held = (
        peak_bytes(run, lm.device) if lm.device.type == "cuda" else run()
    )  # the profiler of a CPU would be in the time
    rate = n_vectors * per_vector / taken[0]
    return {
        "source_layer": source,
        "target_layer": target,
        "prompt_tokens": span.n_tokens,
        "vectors": n_vectors,
        "steps": steps,
        "chunk": span.chunk,
        "seconds": taken[0],
        "tflops": rate / 1e12,
        "share_of_bf16_peak": peak and rate / peak,
        "gb_beyond_the_weights": held and held / 1e9,
    }


def bench_generation(
    lm, batches=(1, 8, 32, 128, 512), source=10, n_tokens=40, max_new_tokens=48
) -> list[dict]:
    """Tokens per second, a vector for each row, every row to its full length, greedy."""
    found = []
    for batch in batches:
        vectors = SteeringVectors(
            normalise(torch.randn(batch, lm.d_model, generator=torch.Generator().manual_seed(0))),
            source,
        )
        encoded = lm.encode(["a" * n_tokens] * batch)
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            with steer(lm, vectors, coeff=10.0), torch.no_grad():
                lm.model.generate(
                    **encoded,
                    max_new_tokens=max_new_tokens,
                    min_new_tokens=max_new_tokens,
                    do_sample=False,
                )
            if lm.device.type == "cuda":
                torch.cuda.synchronize()
            taken = time.perf_counter() - start
        found.append({"batch": batch, "tokens_per_second": batch * max_new_tokens / taken})
    return found


def measure(device="cuda", config=None, training=None, generation=None, **about_parity) -> dict:
    """The whole record. `config`: the random model's shape (default: Qwen2.5-7B's); the others: options of the parts."""
    about, same = machine(device), parity(device=device, **about_parity)
    lm = random_model(config or recipes.config_of(SHAPE), device, torch.bfloat16)
    size = {
        "shape": SHAPE if config is None else lm.name,
        "weights": "random",
        "dtype": "bfloat16",
        "parameters": lm.model.num_parameters(),
    }
    return {
        "command": "python -m helpers bench --gpu",
        "machine": about,
        "parity": same,
        "model": size,
        "training": bench_training(
            lm, **{"peak": peak_of(about.get("card", "")), **(training or {})}
        ),
        "generation": bench_generation(lm, **(generation or {})),
    }


def report(record) -> list[str]:
    """The record in lines of text."""
    same, run = record["parity"], record["training"]
    share = run["share_of_bf16_peak"]
    share = f"{share:.0%} of its bfloat16 peak" if share else "peak of this card not known"
    return [
        f"on {record['machine'].get('card', record['machine']['processor'])}",
        f"parity with the CPU ({same['model']}, {same['n_vectors']} vectors, {same['steps']} steps, float32): lowest cosine "
        f"{same['lowest_cosine']:.6f}, objective off by {same['objective_off_by_at_most']:.1e} at most",
        f"{record['model']['shape']}, random weights, bfloat16: {run['vectors']} vectors, block {run['source_layer']} to "
        f"{run['target_layer']}, {run['prompt_tokens']} tokens, {run['steps']} iterations in {run['seconds']:.1f} s, "
        f"chunks of {run['chunk']}: {run['tflops']:.1f} Tflop/s, {share}",
        *(
            f"steered generation, batch {one['batch']}: {one['tokens_per_second']:,.0f} tokens/s"
            for one in record["generation"]
        ),
    ]


def main(out) -> int:
    """Measure, print, and write gpu.json into the folder `out`; 1 where there is no card."""
    if not torch.cuda.is_available():
        print(
            'There is no CUDA device here: nothing was measured, and the figures for a GPU stay "not measured".'
        )
        return 1
    record, path = measure(), Path(out) / "gpu.json"
    print("\n".join(report(record)))
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")
    return 0
