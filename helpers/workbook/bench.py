"""Benchmarks, each a record in JSON: `python -m helpers bench` measures training against the
published loop; `--scaling` how cost grows with each size; `--gpu` what a CUDA card does. In the
last two, random models of one shape stand for all: cost depends on sizes, not on weights."""

import copy
import json
import multiprocessing
import os
import platform
import re
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from pprint import pprint

import numpy as np
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from .. import UserError
from ..generation import complete
from ..ledger import build_folder, write_atomically
from ..models import DEFAULT, LanguageModel, byte_tokenizer, load
from ..residual import LayerSpan, edit_at, read_at
from ..steering import SteeringVectors, steer
from ..training import directions, train, value, value_and_grad

RADIUS = 10.0
LAST = slice(-3, None)  # the target positions
QUESTION = "How do I bake bread?"
SIZES = dict(vectors=8, tokens=32, distance=6, steps=2, depth=12, width=384)
AXES = {  # one grows, the others stay as in SIZES
    "vectors": (4, 8, 16, 32, 64),
    "tokens": (16, 32, 64, 128, 256),
    "distance": (2, 4, 8, 16),  # blocks from source to target
    "steps": (1, 2, 4, 8),
    "depth": (8, 16, 32),  # half of it between the layers
    "width": (96, 192, 384, 768),
}
WORKER = dict(vectors=8, tokens=36, distance=14, steps=2, depth=30, width=576)  # the default model
PEAK = 989  # Tflop/s: dense bfloat16 products of an H100 or H200, as their maker states
SEVEN_B = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28)  # Qwen2.5-7B's
SEVEN_B |= dict(num_attention_heads=28, num_key_value_heads=4)
silent_train = partial(train, progress=False)


def seconds(*runs, repeats=5) -> list[float]:
    """Median seconds of each, after a round that warms up; in turns, so that noise meets all."""
    rounds = []
    for _ in range(repeats + 1):
        rounds.append([timed(run)[1] for run in runs])
    return np.median(rounds[1:], axis=0).tolist()


def timed(run) -> tuple:
    """What `run()` returns, and its seconds."""
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def flops(run) -> int:
    """Floating-point operations of the matrix products of `run()`; of attention, on CUDA alone."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def peak_bytes(run) -> int:
    """The most memory that `run()` holds at once in tensors on the CPU, as the allocator tells."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells whenever it starts and stops
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    events = sorted(profile.events(), key=lambda event: event.time_range.end)
    return max(accumulate(event.self_cpu_memory_usage for event in events), default=0)


def machine() -> dict:
    """What a measurement was made with: processor and card, threads, versions."""
    cpuinfo = Path("/proc/cpuinfo")
    name = cpuinfo.exists() and re.search(
        r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8")
    )
    return {
        "processor": name.group(1) if name else platform.processor() or platform.machine(),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{library.__name__: library.__version__ for library in (torch, transformers)},
    }


def random_model(config, device="cpu", dtype=torch.float32) -> LanguageModel:
    """A model of a transformers config, its random weights made on the device; it reads bytes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return LanguageModel(f"random-{config.model_type}", model, byte_tokenizer(), "random 0")


def published_loop(lm, prompt, source, target, radius, steps, lr=1e-3, enough=None):
    """The published procedure as its authors run it: one vector, each step through tokenizer, whole
    network and LM head. Returns the objective before each step (p = 2, q = 1) and the last vector
    [d_model]; stops once the objective is `enough`."""
    theta = torch.nn.Parameter(radius * directions(1, lm.d_model)[0].to(lm.device))
    optimiser = torch.optim.AdamW([theta], lr=lr, betas=(0.9, 0.98), weight_decay=0, amsgrad=True)
    seen, store = [], {}

    def run():
        with read_at(lm, target, "resid_post", store, "target"):
            lm.model(**lm.encode(prompt), use_cache=False)
        return store["target"][0, LAST]  # [n_positions, d_model]

    with torch.no_grad():
        clean = run()
    with edit_at(lm, source, "resid_post", lambda hidden: hidden + theta):
        while len(seen) < steps and not (enough and seen and seen[-1] >= enough):
            optimiser.zero_grad()
            loss = -(run() - clean).norm(dim=-1).pow(2).sum()
            loss.backward()
            seen.append(-loss.item())
            with torch.no_grad():
                theta.grad -= theta.grad.dot(theta) * theta / radius**2
                optimiser.step()
                theta.copy_(radius * theta / theta.norm())
    return seen, theta.detach()


WAYS = {  # of learning a set at once: {name: settings of train}
    "qr": {},
    "qr, mixed": {"mixed": True},
    "symmetric": {"orthogonal": "symmetric", "damping": 0.25},
    "symmetric, mixed": {"orthogonal": "symmetric", "damping": 0.25, "mixed": True},
}


def against_published(lm, steps=300, n_vectors=32, source=7, target=21) -> dict:
    """Seconds per vector to what the published loop reaches in `steps` steps: that loop, the same
    with a learning rate of R/100, and power iteration on an orthogonal set in four WAYS (mean of
    the set; in mixed precision the objective is that of the model's own)."""
    prompt = lm.chat_prompt(QUESTION)
    span = LayerSpan(lm, prompt, source, target, LAST)
    loop = partial(published_loop, lm, prompt, source, target, RADIUS, steps)
    (_, theta), published = timed(loop)
    goal = value(span, theta[None]).item()
    (seen, _), tuned = timed(partial(loop, lr=RADIUS / 100, enough=goal))
    found = {"objective": goal, "published_steps": steps, "published_seconds": published}
    found |= {"tuned_steps": len(seen), "tuned_seconds": tuned, "tuned_reached": seen[-1] >= goal}
    ways = {name: to_goal(span, goal, n_vectors, **how) for name, how in WAYS.items()}
    for way in ways.values():
        way["faster"] = published / way["seconds"]
    return found | {"vectors": n_vectors, "power": ways}


def to_goal(span, goal, n_vectors, most=12, **how) -> dict:
    """Power iteration in as many steps as it takes the mean objective to reach `goal`: steps,
    seconds per vector (median of three), the objective's mean and least, and |cosine| to the set
    of the same steps in full precision."""
    power = partial(silent_train, span, RADIUS, n_vectors)
    there = lambda step, _, objective: step and objective.mean() >= goal  # noqa: E731
    steps = len(power(steps=most, callback=there, **how).objective)
    run = partial(power, steps=steps, **how)
    result = run()
    whole = result if "mixed" not in how else power(steps=steps, **{**how, "mixed": False})
    alike = torch.cosine_similarity(result.vectors.tensor, whole.vectors.tensor).abs()
    (taken,) = seconds(run, repeats=3)
    return {
        "reached": bool(result.best.mean() >= goal),
        "steps": steps,
        "seconds": taken / n_vectors,
        "objective": result.best.mean().item(),
        "least": result.best.min().item(),
        "median_cosine_to_full_precision": alike.median().item(),
    }


def share_of_products(lm, n_vectors=32, source=7, target=21) -> float:
    """How many times as long as its bare matrix products a step takes: its floating-point
    operations at the rate of one large float32 product, against its own time."""
    span = LayerSpan(lm, lm.chat_prompt(QUESTION), source, target, LAST)
    theta = RADIUS * directions(n_vectors, lm.d_model)
    step = partial(value_and_grad, span, theta)
    rows = span.n_tokens * max(1, span.chunk)
    a, b = torch.randn(rows, 2 * lm.d_model), torch.randn(2 * lm.d_model, lm.d_model)
    taken, product = seconds(step, lambda: a @ b)
    return taken / (flops(step) * product / (2 * rows * 2 * lm.d_model**2))


def generation(lm, batches, source=7, max_new_tokens=48) -> list[dict]:
    """Tokens per second, a vector for each row, every row to its full length, greedy."""
    vectors = SteeringVectors(directions(max(batches), lm.d_model), source)
    length = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens}

    def run(batch):
        encoded = lm.encode([lm.chat_prompt(QUESTION)] * batch)
        with steer(lm, vectors[:batch], coeff=RADIUS), torch.no_grad():
            lm.model.generate(**encoded, **length, do_sample=False)

    taken = seconds(*(partial(run, batch) for batch in batches), repeats=2)
    rates = max_new_tokens * np.divide(batches, taken)
    return [{"batch": n, "tokens_per_second": rate} for n, rate in zip(batches, rates.tolist())]


def completions(lm, n_vectors=64, source=7, max_new_tokens=16) -> dict:
    """Seconds for one prompt under many vectors: as `generate` alone does it, and `complete`'s, in
    full and in mixed precision; and how many texts mixed precision leaves as they are."""
    prompt = lm.chat_prompt(QUESTION)
    vectors = SteeringVectors(RADIUS * directions(n_vectors, lm.d_model), source)
    length = {"max_new_tokens": max_new_tokens, "do_sample": False}
    run = partial(complete, lm, [prompt], vectors, max_new_tokens=max_new_tokens)

    def plain():
        with steer(lm, vectors), torch.no_grad():
            lm.model.generate(**lm.encode([prompt] * n_vectors), **length)

    taken = seconds(plain, run, partial(run, mixed=True), repeats=3)
    found = dict(zip(("generate", "complete", "complete, mixed"), taken))
    pairs = zip(run(), run(mixed=True))
    return found | {"same_texts": sum(a == b for a, b in pairs) / n_vectors}


def span_of(sizes):
    """A span of `distance` blocks in the middle of a random Llama, over one prompt of `tokens`
    tokens; heads are 32 wide, three share their keys, so `width` is a multiple of 96."""
    width, depth, distance = sizes["width"], sizes["depth"], sizes["distance"]
    shape = dict(hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=depth)
    heads = dict(num_attention_heads=width // 32, num_key_value_heads=width // 96)
    lm = random_model(transformers.LlamaConfig(**shape, **heads, vocab_size=259))
    source = (depth - distance) // 2
    return LayerSpan(lm, "a" * sizes["tokens"], source, source + distance, LAST)


def exponent(sizes, values) -> float:
    """The slope of a line through (log size, log value): 1 is in proportion, 0 is constant."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-12)), 1)[0])


def grow(axis, values, base=SIZES, repeats=3) -> dict:
    """Time and arithmetic of training, memory of a gradient step in one chunk; and exponents."""
    runs, steps = [], []
    for size in values:
        sizes = {**base, axis: size}
        if axis == "depth":
            sizes["distance"] = size // 2
        if axis == "distance":
            sizes["depth"] = max(values) + 2
        span, n_vectors = span_of(sizes), sizes["vectors"]
        runs.append(partial(silent_train, span, 5.0, n_vectors, steps=sizes["steps"]))
        whole = copy.copy(span)
        whole.chunk = n_vectors
        steps.append(partial(value_and_grad, whole, torch.randn(n_vectors, sizes["width"])))
    found = {"time": seconds(*runs, repeats=repeats)}
    found |= {"memory": list(map(peak_bytes, steps)), "arithmetic": list(map(flops, runs))}
    exponents = {name: round(exponent(values, found[name]), 3) for name in found}
    return {"sizes": list(values), **found, "exponents": exponents}


def _warm(barrier, sizes):
    _cell(0, sizes)
    barrier.wait(300)


def _cell(seed, sizes):
    torch.set_num_threads(1)
    silent_train(span_of(sizes), 5.0, sizes["vectors"], steps=sizes["steps"], seed=seed)


def with_workers(count, n_cells=8, sizes=WORKER) -> float:
    """Trainings per second on `count` processes of one thread each that are warm."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count + 1)
    with ProcessPoolExecutor(count, context, _warm, (barrier, sizes)) as pool:
        done = pool.map(partial(_cell, sizes=sizes), range(n_cells))
        barrier.wait(300)
        _, taken = timed(partial(list, done))
    return n_cells / taken


def scaling(axes=AXES, base=SIZES, repeats=3, counts=(1, 2), **workers) -> dict:
    """The record of `--scaling`."""
    grown = {axis: grow(axis, values, base, repeats) for axis, values in axes.items()}
    return {"axes": grown, "workers": {n: with_workers(n, **workers) for n in counts}}


def parity(model=DEFAULT, device="cuda", source=7, target=21, n_vectors=4, steps=5) -> dict:
    """How nearly the card learns the CPU's vectors, in float32 from one seed."""
    found = []
    for where in ("cpu", device):
        lm = load(model, device=where, dtype="float32")
        span = LayerSpan(lm, lm.chat_prompt(QUESTION), source, target, LAST)
        found.append(silent_train(span, RADIUS, n_vectors, steps=steps))
    cpu, card = found
    cosines = torch.cosine_similarity(cpu.vectors.tensor, card.vectors.tensor)
    off = (card.best.cpu() / cpu.best.cpu() - 1).abs()
    return {"lowest_cosine": cosines.min().item(), "objective_off_by": off.max().item()}


def many_vectors(lm, source=10, target=19, n_vectors=512, steps=10) -> dict:
    """Seconds to train the vectors over 40 tokens (after a step that warms up), and the rate."""
    place = (lm, "a" * 40, source, target, LAST)
    lm.model.set_attn_implementation("eager")  # PyTorch counts no grouped heads in a fused kernel
    two = partial(silent_train, LayerSpan(*place), RADIUS, 2, steps=steps)
    tflops = flops(two) * n_vectors / 2 / 1e12
    lm.model.set_attn_implementation("sdpa")
    span = LayerSpan(*place)
    silent_train(span, RADIUS, n_vectors, steps=1)
    _, taken = timed(partial(silent_train, span, RADIUS, n_vectors, steps=steps))
    rate = tflops / taken
    sizes = {"vectors": n_vectors, "steps": steps, "chunk": span.chunk, "seconds": taken}
    return {**sizes, "tflops_per_second": rate, "share_of_peak": rate / PEAK}


def main(options) -> int:
    """Measure, print, and write the record into the folder `options.out`."""
    if options.kind == "gpu" and not torch.cuda.is_available():
        raise UserError("There is no CUDA device here: nothing was measured.")
    start = time.perf_counter()
    asked = "" if options.kind == "bench" else f" --{options.kind}"
    record = {"command": f"python -m helpers bench{asked}", "machine": machine()}
    if options.kind == "scaling":
        record |= scaling()
    elif options.kind == "gpu":
        record["parity"] = parity()
        lm = random_model(transformers.Qwen2Config(**SEVEN_B), "cuda", torch.bfloat16)
        record["training"] = many_vectors(lm)
        record["generation"] = generation(lm, (1, 8, 32, 128, 512))
    else:
        lm = load(options.model or DEFAULT)
        record |= {"model": lm.name, "training": against_published(lm, options.steps)}
        record["step_to_its_products"] = share_of_products(lm)
        record["generation"] = generation(lm, (1, 32))
        record["completions"] = completions(lm)
    record["seconds"] = round(time.perf_counter() - start)
    pprint(record, width=100, compact=True, sort_dicts=False)
    path = Path(options.out or build_folder()) / f"{options.kind}.json"
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")
    return 0
