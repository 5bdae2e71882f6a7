"""helpers.geometry: closed forms against vectors, a norm's parts against the modules, shares and masks against plain loops."""

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import figures
from helpers.residual import LayerSpan, capture, geometry

PROMPTS = ["How are you today?", "How old is the oldest tree?", "How?"]


@pytest.fixture(scope="module")
def run(tiny):
    prompts = [tiny.chat_prompt(p) for p in PROMPTS]
    return prompts, geometry.stream(tiny, prompts), *geometry.token_masks(tiny, prompts)


# ---------------------------------------------------------------------------------------------- angles
@given(st.floats(0.01, 20), st.floats(-0.99, 0.99))
def test_push_angle_is_the_angle_of_two_drawn_vectors(ratio, cosine):
    v = torch.tensor([3.0, 0.0], dtype=torch.float64)
    u = 3 * ratio * torch.tensor([cosine, (1 - cosine**2) ** 0.5], dtype=torch.float64)
    angle = geometry.push_angle(ratio, cosine)
    assert torch.allclose(angle, geometry.degrees(v, v + u), atol=1e-6)
    assert angle <= geometry.worst_angle(ratio) + 1e-6


def test_worst_angle_is_reached_and_special_cases():
    assert (
        geometry.push_angle(0.5, -0.5)
        == pytest.approx(geometry.worst_angle(0.5).item())
        == pytest.approx(30)
    )
    assert geometry.push_angle(1.0) == pytest.approx(45)
    assert (
        geometry.worst_angle([1.0, 2.0]).tolist() == [90, 180]
        and geometry.push_angle(2.0, -1.0) == 180
    )


def test_degrees_of_tiny_angles():
    a = torch.tensor([1.0, 0.0])
    assert geometry.degrees(a, torch.tensor([1.0, 1e-5])).item() == pytest.approx(
        5.7296e-4, rel=1e-3
    )
    assert geometry.degrees(a, 7 * a) == 0 and geometry.degrees(a, -a) == 180


# ---------------------------------------------------------------------------------------------- norms
@pytest.mark.parametrize(
    "module, centres, epsilon",
    [
        (torch.nn.LayerNorm(8), True, 1e-5),
        (torch.nn.LayerNorm(8, eps=1e-3), True, 1e-3),
        (torch.nn.RMSNorm(8, eps=1e-6), False, 1e-6),
    ],
)
def test_parts_of_a_known_norm(module, centres, epsilon):
    for weight in module.parameters():
        torch.nn.init.normal_(weight, 1.0, 0.3, generator=torch.Generator().manual_seed(0))
    parts = geometry.norm_parts(module, 8)
    assert parts["centres"] is centres and parts["epsilon"] == pytest.approx(epsilon, rel=0.01)
    assert torch.allclose(parts["gain"], module.weight, atol=1e-3)
    assert torch.allclose(parts["shift"], getattr(module, "bias", torch.zeros(8)))


def test_input_norm_of_every_architecture(architectures):
    """Rebuilt from its parts, the norm that was found gives what the module gives."""
    lm = architectures
    norm, x = (
        geometry.input_norm(lm, 2),
        torch.randn(5, lm.d_model, generator=torch.Generator().manual_seed(0)),
    )
    parts = geometry.norm_parts(norm, lm.d_model)
    y = x - parts["centres"] * x.mean(-1, keepdim=True)
    y = (
        y / (y.pow(2).mean(-1, keepdim=True) + parts["epsilon"]).sqrt() * parts["gain"]
        + parts["shift"]
    )
    assert torch.allclose(y, norm(x), atol=1e-3)
    assert any(norm is child for child in lm.blocks[2].children())


# ---------------------------------------------------------------------------------------------- real residuals
def test_stream_is_the_embedding_and_all_block_outputs(tiny, run):
    prompts, stream, *_ = run
    assert torch.equal(stream[1:].nan_to_num(), capture(tiny, prompts).nan_to_num())
    ids = tiny.encode(prompts[1])["input_ids"][0]
    assert torch.allclose(stream[0, 1, -len(ids) :], tiny.model.get_input_embeddings()(ids))


def test_masks_leave_the_shared_opening_out(tiny, run):
    prompts, stream, first, own = run
    real = ~stream[0].isnan().any(-1)
    shared = (
        len("user\nHow") + 1
    )  # bytes of the template and the word that all begin with, after its one bos token
    assert (
        first.sum(1).tolist() == [1, 1, 1]
        and own.sum(1).tolist() == (real.sum(1) - shared).tolist()
    )
    assert torch.equal(real.float().argmax(1), first.float().argmax(1)) and not (own & ~real).any()
    alone = geometry.token_masks(tiny, prompts[0])
    assert alone[1].sum() == alone[0].numel() - 1


def test_shares_of_blocks_against_a_loop(run):
    _, stream, _, own = run
    shares = geometry.block_shares(stream)
    where = own.nonzero()[3]
    for k in range(len(stream) - 1):
        v, new = stream[k][tuple(where)], stream[k + 1][tuple(where)]
        u = new - v
        assert shares["length"][k][tuple(where)] == pytest.approx(
            (u.norm() / (u.norm() + v.norm())).item(), rel=1e-4
        )
        assert shares["projection"][k][tuple(where)] == pytest.approx(
            (u @ new / (new @ new)).item(), rel=1e-3, abs=1e-5
        )
        assert shares["cos²"][k][tuple(where)] == pytest.approx(
            (u @ new).item() ** 2 / ((u @ u) * (new @ new)).item(), rel=1e-3
        )
    half = geometry.block_shares(
        torch.tensor([[[[1.0, 0.0]]], [[[1.0, 1.0]]]])
    )  # the notes: |v| = |u| = 1, at right angles
    assert [s.item() for s in half.values()] == pytest.approx([0.5, 0.5, 0.5])


def test_per_prompt_is_a_median_over_the_mask():
    values, mask = (
        torch.tensor([[float("nan"), 1.0, 5.0, 9.0]]),
        torch.tensor([[False, True, True, True]]),
    )
    assert geometry.per_prompt(values, mask).tolist() == [5.0]


def test_turn_grid_is_turn_cell_by_cell(tiny, run):
    _, stream, _, own = run
    grid = geometry.turn_grid(tiny, stream, own, [1, 100], [0, 4], n_vectors=2, seed=3)
    assert grid.shape == (2, 2, 2, *own.shape) and torch.equal(~grid.isnan()[0, 0, 0], own)
    unit = torch.nn.functional.normalize(
        torch.randn(2, 32, generator=torch.Generator().manual_seed(3)), dim=-1
    )
    i, t = own.nonzero()[0].tolist()
    one = geometry.turn(geometry.input_norm(tiny, 5), stream[5][i, t], 100 * unit)
    assert torch.allclose(grid[1, 1, :, i, t], one, atol=1e-3)
    assert (grid[1].nanmedian() > grid[0].nanmedian()) and grid.nan_to_num().max() <= 180


def test_first_share(tiny, run):
    delta = torch.tensor([3.0, 4.0, 0.0]).reshape(1, 1, 3, 1)
    assert geometry.first_share(delta).item() == pytest.approx(9 / 25)
    span = LayerSpan(tiny, run[0][0], 1, 4)
    with torch.no_grad():
        share = geometry.first_share(
            span.delta(torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))
        )
    assert share.shape == (2, 1) and 0 < share.min() and share.max() < 1


# ---------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    "radii, message",
    [
        ([], "radii is empty"),
        ([5, 0], "radius 0 is not a norm"),
        (-2.0, "radius -2 is not a norm"),
        ([float("nan")], "radius nan"),
    ],
)
def test_bad_radii(radii, message):
    with pytest.raises(ValueError, match=message):
        geometry.check_radii(radii)


@pytest.mark.parametrize(
    "layers, message",
    [
        ([6], "layer 6 is outside the model: it has 6 blocks"),
        ([0, 5], r"use ascending ones from 0 … 4"),
        ([3, 1], "use ascending ones"),
        ([], "use ascending ones"),
    ],
)
def test_bad_layers(tiny, run, layers, message):
    with pytest.raises(ValueError, match=message):
        geometry.turn_grid(tiny, run[1], run[3], [1.0], layers)


def test_a_prompt_of_one_token_and_other_mistakes(tiny):
    with pytest.raises(ValueError, match="prompt 1 has 1 token: at least 2 are needed"):
        geometry.token_masks(tiny, ["two", tiny.tokenizer.bos_token])
    with pytest.raises(ValueError, match="delta holds 1 token"):
        geometry.first_share(torch.ones(1, 1, 1, 4))
    with pytest.raises(ValueError, match="layer 9 is outside"):
        geometry.input_norm(tiny, 9)


# ---------------------------------------------------------------------------------------------- figures
@pytest.mark.parametrize("ratio", [0.05, 1.0, 12.0])
def test_the_widgets_picture_draws_without_a_widget(ratio):
    figure = figures.push_picture(ratio, [1.0, float("nan"), 44.0], "A title")
    left, right = figure.axes
    drawn = geometry.push_angle(ratio).item()
    assert any(f"{drawn:.1f}°" in text.get_text() for text in left.texts + right.texts)
    assert sum(bar.get_height() for bar in right.patches) == 2
    plt.close(figure)


def test_clouds_and_grid_draw():
    ball = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    figure = figures.clouds(
        {"a": {"in": ball, "out": None}, "b": {"in": ball, "out": 2 * ball}}, "A title"
    )
    assert len(figure.axes) == 4 and figure.axes[1].get_title() == "out"
    plt.close(figure)
    figure = figures.grid(
        [[1.0, 2.0], [30.0, 4.0]], ["r", "s"], [0, 1], "A title", "x", "y", "degrees"
    )
    assert {t.get_text() for t in figure.axes[0].texts} == {"1", "2", "30", "4"}
    plt.close(figure)
