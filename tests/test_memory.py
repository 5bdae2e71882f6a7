"""Memory: chunks from a budget; where memory runs out, halves, the same results, and a sentence that says so."""

import pytest
import torch
from conftest import tiny_model

from helpers.generation import complete
from helpers.residual import LayerSpan, memory
from helpers.residual import span as residual_span
from helpers.residual.memory import in_parts, is_out_of_memory
from helpers.steering import SteeringVectors
from helpers.training import normalise, train, value, value_and_grad

CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError(CPU),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."
    ),
    RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
]
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__ + str(e)[:12])


def short_of_memory(run, rows_of, at_most, error, sizes):
    """A stand-in for `run` that has no room for more than `at_most` rows; `sizes` takes what was asked of it."""

    def stand_in(*args, **kwargs):
        sizes.append(rows_of(*args, **kwargs))
        if sizes[-1] > at_most:
            raise error
        return run(*args, **kwargs)

    return stand_in


def span_of(lm, **options):
    return LayerSpan(lm, ["hello there", "you"], 1, 3, slice(-2, None), **options)


def some_vectors(lm, n):
    return 3.0 * normalise(torch.randn(n, lm.d_model, generator=torch.Generator().manual_seed(0)))


@each_error
def test_gradients_in_halves_are_the_same(error, monkeypatch, capsys, tiny):
    whole, span, vectors, sizes = span_of(tiny), span_of(tiny), some_vectors(tiny, 11), []
    whole.chunk = span.chunk = 11
    expected = value_and_grad(whole, vectors)
    monkeypatch.setattr(span, "_run", short_of_memory(span._run, len, 3, error, sizes))
    found = value_and_grad(span, vectors)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert sizes == [11, 5, 2, 2, 2, 2, 2, 1] and span.chunk == 2
    assert capsys.readouterr().out == (
        "Out of memory: going on with 5 vectors at a time.\n"
        "Out of memory: going on with 2 vectors at a time.\n"
    )
    sizes.clear()
    value_and_grad(span, vectors)  # remembered
    assert max(sizes) == 2 and not capsys.readouterr().out


def test_training_goes_on_and_learns_the_same(monkeypatch, capsys, tiny):
    span, sizes = span_of(tiny), []
    expected = train(span_of(tiny), 3.0, 6, steps=3, progress=False)
    monkeypatch.setattr(span, "_run", short_of_memory(span._run, len, 2, ERRORS[0], sizes))
    found = train(span, 3.0, 6, steps=3, progress=False)
    assert "going on with" in capsys.readouterr().out and max(sizes) > 2
    torch.testing.assert_close(found.vectors.tensor, expected.vectors.tensor, rtol=1e-3, atol=1e-4)


def test_without_a_gradient_too(monkeypatch, capsys, tiny):
    whole, span, vectors = span_of(tiny), span_of(tiny), some_vectors(tiny, 9)
    monkeypatch.setattr(span, "_run", short_of_memory(span._run, len, 4, ERRORS[1], []))
    span.chunk = 3
    torch.testing.assert_close(value(span, vectors), value(whole, vectors), rtol=1e-4, atol=1e-4)
    assert "going on with 4 vectors" in capsys.readouterr().out and span.chunk == 1


@each_error
def test_completions_in_halves_are_the_same(error, monkeypatch, capsys):
    lm, sizes = tiny_model("llama"), []
    vectors, asked = SteeringVectors(some_vectors(lm, 3), 1), ["hello", "a longer prompt"]
    options = dict(max_new_tokens=4, temperature=1.0)
    expected = complete(lm, asked, vectors, **options)
    monkeypatch.setattr(
        lm.model,
        "generate",
        short_of_memory(lm.model.generate, lambda **kw: len(kw["input_ids"]), 2, error, sizes),
    )
    assert complete(lm, asked, vectors, **options) == expected and sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    assert "going on with 1 completions at a time" in capsys.readouterr().out
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_not_even_one_is_one_sentence(capsys):
    def never(part):
        raise ERRORS[2]

    with pytest.raises(
        MemoryError, match="Out of memory with 1 of the vectors at a time .*: use shorter"
    ) as caught:
        in_parts(never, [1, 2, 3], 8, "vectors")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None
    assert capsys.readouterr().out.count("going on with") == 1  # 3 → 1


def test_other_errors_are_not_a_lack_of_memory():
    for error in (RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError("x")):
        assert not is_out_of_memory(error)
        calls = []

        def run(part):
            calls.append(part)
            raise error

        with pytest.raises(type(error)):
            in_parts(run, [1, 2], 2)
        assert len(calls) == 1
    assert all(map(is_out_of_memory, ERRORS))


def test_a_real_allocation_that_fails_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_chunks_come_from_what_is_free_or_given(monkeypatch, tiny):
    need = span_of(tiny).bytes_per_vector
    assert span_of(tiny, memory_budget=3 * need + 1).chunk == 3
    monkeypatch.setattr(residual_span, "free_memory", lambda device: 10 * need)
    assert span_of(tiny).chunk == 5  # half of what is free
    monkeypatch.setattr(residual_span, "free_memory", lambda device: 0)
    assert span_of(tiny).chunk == 1
    assert memory.free_memory(torch.device("cpu")) > 10**8
