"""Benchmarks as ratios measured in one process: `python -m helpers bench` prints them and writes build/bench.json."""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers

from ..ledger import build_folder, write_atomically
from ..models.loading import load
from ..residual import normalise
from ..residual.span import LayerSpan
from ..steering import steer
from ..training.optimisers import random_vectors, train, value, value_and_grad

SOURCE, TARGET, RADIUS, LAST = 7, 21, 10.0, 3
QUESTION = "How do I bake bread?"  # with the default model's chat template: 36 tokens


def published_loop(
    lm, prompt, source, target, radius, steps, lr=1e-3, last=LAST, seed=0, enough=None
):
    """The published procedure as its authors run it: one vector, each step through tokenizer, whole network and LM head.

    Returns the objective before each step (p = 2, q = 1), the last vector and the seconds taken; `enough` stops early.
    """
    generator = torch.Generator().manual_seed(seed)
    theta = torch.nn.Parameter(
        (radius * normalise(torch.randn(1, lm.d_model, generator=generator)))[0].to(lm.device)
    )
    store = {}
    blocks = lm.blocks
    handles = [
        blocks[target].register_forward_hook(
            lambda m, a, out: store.update(out=out[0] if isinstance(out, tuple) else out)
        )
    ]

    def run():
        lm.model(**lm.encode(prompt), use_cache=False)
        return store["out"][0, -last:]

    try:
        with torch.no_grad():
            clean = run()
        handles.append(
            blocks[source].register_forward_hook(
                lambda m, a, out: (
                    (out[0] + theta, *out[1:]) if isinstance(out, tuple) else out + theta
                )
            )
        )
        optimiser = torch.optim.AdamW(
            [theta], lr=lr, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True
        )
        seen, start = [], time.perf_counter()
        for _ in range(steps):
            optimiser.zero_grad()
            loss = -(run() - clean).norm(dim=-1).pow(2).sum()
            loss.backward()
            seen.append(-loss.item())
            if enough is not None and seen[-1] >= enough:
                break
            with torch.no_grad():
                theta.grad -= theta.grad.dot(theta) * theta / radius**2
                optimiser.step()
                theta.copy_(radius * theta / theta.norm())
        return seen, theta.detach(), time.perf_counter() - start
    finally:
        for handle in handles:
            handle.remove()


def matrix_products(span, n):
    """The matrix products of one gradient step for n vectors and nothing else: forward, and backward to the inputs."""
    tokens, blocks = (
        n * span.n_prompts * span.n_tokens,
        [span.lm.blocks[k] for k in range(span.first, max(span.target_layers) + 1)],
    )
    config = span.lm.model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or span.lm.d_model // heads
    shapes = [m.weight for b in blocks for m in b.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {
        w.shape: (torch.randn(tokens, w.shape[1]), torch.randn(tokens, w.shape[0])) for w in shapes
    }
    q, s = (
        torch.randn(n * span.n_prompts * heads, span.n_tokens, width),
        torch.randn(n * span.n_prompts * heads, span.n_tokens, span.n_tokens),
    )

    def run():
        for w in shapes:
            x, y = inputs[w.shape]
            x @ w.T, y @ w
        for _ in blocks:  # QKᵀ and PV; then dP, dV, dQ, dK
            q @ q.mT, s @ q, q @ q.mT, s.mT @ q, s @ q, s.mT @ q

    return run


def seconds(*runs, repeats=5):
    """Median seconds of each callable, taken in turn so that a noisy machine is noisy to all."""
    times = [[] for _ in runs]
    for i in range(repeats + 1):
        for run, taken in zip(runs, times):
            start = time.perf_counter()
            run()
            if i:  # the first round warms up
                taken.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def bench_training(lm, steps=300, n_vectors=8):
    """Time per vector to reach what the published procedure has after `steps` steps, and the cost of a step in matrix products."""
    prompt = lm.chat_prompt(QUESTION)
    span = LayerSpan(lm, prompt, SOURCE, TARGET, slice(-LAST, None))
    seen, theta, published = published_loop(lm, prompt, SOURCE, TARGET, RADIUS, steps)
    goal = value(span, theta[None]).item()
    tuned, _, tuned_seconds = published_loop(
        lm, prompt, SOURCE, TARGET, RADIUS, steps, lr=RADIUS / 100, enough=goal
    )
    out = {
        "prompt_tokens": span.n_tokens,
        "published_steps": steps,
        "published_objective": goal,
        "published_seconds_per_vector": published,
        "tuned_adam_steps": len(tuned),
        "tuned_adam_seconds_per_vector": tuned_seconds,
        "tuned_adam_reached": tuned[-1] >= goal,
    }
    for name, orthogonal in (("free", False), ("orthogonal", True)):
        history = train(
            span, RADIUS, n_vectors, steps=12, orthogonal=orthogonal, progress=False
        ).objective.mean(1)
        reached = next((i + 1 for i, v in enumerate(history.tolist()) if v >= goal), None)
        start = time.perf_counter()
        if reached:
            train(span, RADIUS, n_vectors, steps=reached, orthogonal=orthogonal, progress=False)
        taken = (time.perf_counter() - start) / n_vectors
        out |= {
            f"power_{name}_steps": reached,
            f"power_{name}_seconds_per_vector": taken,
            f"power_{name}_times_faster": published / taken if reached else None,
            f"power_{name}_times_faster_than_tuned_adam": tuned_seconds / taken
            if reached
            else None,
        }
    vectors = random_vectors(span, RADIUS, n_vectors).tensor.to(lm.device)
    step, products = seconds(
        lambda: value_and_grad(span, vectors), matrix_products(span, n_vectors)
    )
    (one,) = seconds(lambda: value_and_grad(span, vectors[:1]))
    return out | {
        "step_ms_per_vector": 1000 * step / n_vectors,
        "step_ms_alone": 1000 * one,
        "step_over_matrix_products": step / products,
    }


def bench_generation(lm, batch=32, max_new_tokens=48):
    """Steered tokens per second in a batch against one at a time (greedy, every row to its full length)."""
    prompt = lm.chat_prompt(QUESTION)
    vectors = random_vectors(LayerSpan(lm, prompt, SOURCE, TARGET), RADIUS, batch)
    length = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": max_new_tokens,
        "do_sample": False,
    }

    def generate(n):
        with steer(lm, vectors[:n]):
            lm.model.generate(**lm.encode([prompt] * n), **length)

    many, one = seconds(lambda: generate(batch), lambda: generate(1), repeats=3)
    return {
        "batch": batch,
        "tokens_per_second_one": max_new_tokens / one,
        "tokens_per_second_batch": batch * max_new_tokens / many,
        "batch_over_one": batch * one / many,
    }


def peak_memory_gb() -> float | None:
    """Peak resident memory of this process in GB; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def machine(device="cpu") -> dict:
    """What a measurement was made with: processor or card, threads, versions."""
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (
                line.split(":")[1].strip()
                for line in cpuinfo.read_text().splitlines()
                if line.startswith("model name")
            ),
            name,
        )
    found = {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.device(device).type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "card": card.name,
            "card_gb": round(card.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m helpers bench", description=__doc__)
    parser.add_argument(
        "--steps",
        type=int,
        default=300,
        help="steps of the published procedure (300, as published)",
    )
    parser.add_argument("--model", default=None)
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="instead: how time and memory grow with each size, and with workers",
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="instead: parity with the CPU, a 7B-shaped model, batched generation on CUDA",
    )
    parser.add_argument(
        "--out",
        default=build_folder(),
        help="folder for what --scaling and --gpu write (default: build)",
    )
    args = parser.parse_args(argv)
    if args.scaling:
        from . import scaling

        return scaling.main(args.out)
    if args.gpu:
        from . import gpu

        return gpu.main(args.out)
    start = time.perf_counter()
    lm = load(args.model) if args.model else load()
    result = {"model": lm.name, "load_seconds": time.perf_counter() - start}
    result["machine"] = machine()
    result["training"] = bench_training(lm, args.steps)
    result["generation"] = bench_generation(lm)
    result["peak_memory_gb"] = peak_memory_gb()
    for part in ("training", "generation"):
        print(part)
        for key, number in result[part].items():
            print(
                f"  {key:46s} {number:,.3f}"
                if isinstance(number, float)
                else f"  {key:46s} {number}"
            )
    write_atomically(Path("build/bench.json"), json.dumps(result, indent=1))
    print(
        f"peak memory {result['peak_memory_gb'] or float('nan'):.2f} GB; written to build/bench.json"
    )
    return 0
