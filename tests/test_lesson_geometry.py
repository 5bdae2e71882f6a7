"""Notebook 01's own geometry (its cells tagged "geometry"), against vectors drawn by hand."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import ROOT
from helpers.residual import capture, input_norm
from helpers.workbook import notebooks

PROMPTS = ["How are you today?", "How old is the oldest tree?", "How?"]


def lesson():
    nb = notebooks.read(ROOT / "notebooks" / "01_layer_norm_geometry.ipynb")
    names = {"torch": torch}
    for cell in notebooks.tagged(nb, "geometry"):
        exec(cell.source, names)
    return SimpleNamespace(**names)


LESSON = lesson()


@given(st.floats(0.01, 20), st.floats(-0.99, 0.99))
def test_push_angle_is_the_angle_of_two_drawn_vectors(ratio, cosine):
    v = torch.tensor([3.0, 0.0], dtype=torch.float64)
    u = 3 * ratio * torch.tensor([cosine, (1 - cosine**2) ** 0.5], dtype=torch.float64)
    angle = LESSON.push_angle(ratio, cosine)
    assert torch.allclose(angle, LESSON.degrees(v, v + u), atol=1e-6)
    assert angle <= LESSON.worst_angle(ratio) + 1e-6


def test_special_angles():
    assert LESSON.push_angle(1.0) == pytest.approx(45)
    assert LESSON.push_angle(2.0, -1.0) == 180
    assert LESSON.push_angle(0.5, -0.5) == pytest.approx(30)  # at right angles to the sum: worst
    assert LESSON.worst_angle(0.5) == pytest.approx(30)
    assert LESSON.worst_angle([1.0, 2.0]).tolist() == [90, 180]


def test_degrees_of_tiny_and_of_opposite_vectors():
    a = torch.tensor([1.0, 0.0])
    tiny_angle = LESSON.degrees(a, torch.tensor([1.0, 1e-5])).item()
    assert tiny_angle == pytest.approx(5.7296e-4, rel=1e-3)
    assert LESSON.degrees(a, 7 * a) == 0 and LESSON.degrees(a, -a) == 180


def test_masks_leave_padding_and_the_shared_opening_out(tiny):
    chats = [tiny.chat_prompt(prompt) for prompt in PROMPTS]
    first, own = LESSON.token_masks(tiny, chats)
    real = tiny.encode(chats)["attention_mask"].bool()
    shared = len("user\nHow") + 1  # bytes that all begin with, after the one bos token
    assert first.sum(1).tolist() == [1, 1, 1]
    assert own.sum(1).tolist() == (real.sum(1) - shared).tolist()
    assert torch.equal(real.float().argmax(1), first.float().argmax(1))
    assert not (own & ~real).any()
    _, own_alone = LESSON.token_masks(tiny, chats[0])
    assert own_alone.sum() == own_alone.numel() - 1


def test_per_prompt_is_a_median_over_the_mask():
    values = torch.tensor([[float("nan"), 1.0, 5.0, 9.0]])
    mask = torch.tensor([[False, True, True, True]])
    assert LESSON.per_prompt(values, mask).tolist() == [5.0]


def test_block_shares_of_one_block():
    v, new = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    u = new - v
    shares = LESSON.block_shares(v, new)
    assert shares["length"] == pytest.approx((u.norm() / (u.norm() + v.norm())).item())
    assert shares["projection"] == pytest.approx((u @ new / (new @ new)).item(), rel=1e-5)
    cosine = torch.cosine_similarity(u, new, dim=0).item()
    assert shares["cos²"] == pytest.approx(cosine**2, rel=1e-5)
    # The notes: |v| = |u| = 1, at right angles.
    half = LESSON.block_shares(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))
    assert [share.item() for share in half.values()] == pytest.approx([0.5, 0.5, 0.5])


def test_turn_through_the_models_own_norm(tiny):
    residuals = capture(tiny, PROMPTS[0], 2)[0, 0]  # [n_tokens, d_model]
    norm = input_norm(tiny, 3)
    vectors = torch.randn(2, tiny.d_model, generator=torch.Generator().manual_seed(3))
    turned = LESSON.turn(norm, residuals, vectors)
    assert turned.shape == (2, len(residuals))
    with torch.no_grad():
        cosine = torch.cosine_similarity(norm(residuals), norm(residuals + vectors[1]), dim=-1)
    assert torch.allclose(turned[1], torch.rad2deg(cosine.acos()), atol=0.1)
    assert (LESSON.turn(norm, residuals, 100 * vectors) > turned).float().mean() > 0.9


@pytest.mark.parametrize(
    "module, centres, epsilon",
    [(torch.nn.LayerNorm(8, eps=1e-3), True, 1e-3), (torch.nn.RMSNorm(8, eps=1e-6), False, 1e-6)],
)
def test_parts_of_a_known_norm(module, centres, epsilon):
    for weight in module.parameters():
        torch.nn.init.normal_(weight, 1.0, 0.3, generator=torch.Generator().manual_seed(0))
    parts = LESSON.norm_parts(module, 8)
    assert parts["centres"] is centres and parts["epsilon"] == pytest.approx(epsilon, rel=0.01)
    assert torch.allclose(parts["gain"], module.weight, atol=1e-3)
    assert torch.allclose(parts["shift"], getattr(module, "bias", torch.zeros(8)))


def test_a_models_norm_is_rebuilt_from_its_parts(architectures):
    norm = input_norm(architectures, 2)
    x = torch.randn(5, architectures.d_model, generator=torch.Generator().manual_seed(0))
    parts = LESSON.norm_parts(norm, architectures.d_model)
    y = x - parts["centres"] * x.mean(-1, keepdim=True)
    y = y / (y.pow(2).mean(-1, keepdim=True) + parts["epsilon"]).sqrt()
    assert torch.allclose(y * parts["gain"] + parts["shift"], norm(x), atol=1e-3)
    assert any(norm is child for child in architectures.blocks[2].children())
