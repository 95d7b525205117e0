"""State in 8 and 4 bits: how far what is kept may be from what was given, and what it takes."""

import functools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.config import Optimizer
from puna.model.optimizer_state import misfit, state_shapes, state_sizes
from puna.testing import tiny_model
from puna.train.low_bit import Blocks, lowest_by_upper_half, signed_levels, unsigned_levels
from puna.train.optimizer import AdamW
from puna.train.rounding import Chance, Place, seeds_of

CPU = torch.device("cpu")

#: Kind, bits -> levels, and the largest error of a number, as a part of its block's scale.
MAPS = {
    ("exp_avg", 8): (signed_levels(8), 0.00704),
    ("exp_avg", 4): (signed_levels(4), 0.1126),
    ("exp_avg_sq", 8): (unsigned_levels(8), 0.00352),
    ("exp_avg_sq", 4): (unsigned_levels(4), 0.0606),
}

numbers = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@functools.cache
def blocks_of(levels: Tensor, block: int, by_chance: bool) -> Blocks:
    return Blocks(levels, block, CPU, by_chance=by_chance)


def kept(x: Tensor, levels: Tensor, *, block: int = 64, chance: Tensor | None = None) -> Tensor:
    """What comes back of numbers that were kept as codes."""
    blocks = blocks_of(levels, block, chance is not None)
    codes = torch.zeros(len(x), x.shape[1] * blocks.bits // 8, dtype=torch.uint8)
    scales = torch.zeros(len(x), math.ceil(x.shape[1] / block))
    blocks.write(x, codes, scales, lambda: chance)
    return blocks.read(codes, scales)


def scales_of(x: Tensor) -> Tensor:
    """The largest magnitude of each block of 64, at each element."""
    return torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in x.split(64, dim=1)], 1)


@pytest.mark.parametrize(("kind", "bits"), MAPS)
def test_there_are_as_many_levels_as_codes_up_to_one(kind: str, bits: int) -> None:
    levels, _ = MAPS[kind, bits]
    assert len(levels.unique()) == len(levels) == 2**bits
    assert levels[-1] == 1
    assert (levels == 0).any() == (kind == "exp_avg")
    assert torch.equal(levels, levels.sort().values)


@pytest.mark.parametrize(("kind", "bits"), MAPS)
@pytest.mark.parametrize("by_chance", [False, True])
def test_no_two_borders_share_an_upper_half(kind: str, bits: int, by_chance: bool) -> None:
    levels, _ = MAPS[kind, bits]
    borders = levels[1:] if by_chance else (levels[1:] + levels[:-1]) / 2
    upper_halves = borders.view(torch.int32) >> 16
    assert len(upper_halves.unique()) == len(borders)


def test_the_lowest_number_of_an_upper_half_is_its_largest_magnitude_below_zero() -> None:
    lowest = lowest_by_upper_half()
    for half, expected in ((0x3F80, 1.0), (0xBF80, -1.0 - 2**-7 + 2**-23), (0x0000, 0.0)):
        assert lowest[half].item() == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=20), st.sampled_from(list(MAPS)))
@example([1e6, 490535.40625], ("exp_avg_sq", 8))  # in the middle between two levels
def test_a_number_comes_back_as_the_nearest_level_times_its_blocks_scale(
    values: list[float], which: tuple[str, int]
) -> None:
    levels, largest_error = MAPS[which]
    x = torch.tensor([values * (2 if len(values) % 2 else 1)])
    x = x.square() if which[0] == "exp_avg_sq" else x
    scale = x.max() if x.max() >= -x.min() else x.min()
    result = kept(x, levels, block=max(1, x.shape[1]))
    if scale == 0:
        assert not result.any()
        return
    shares, found = x[0] / scale, result[0] / scale
    least = (shares[:, None] - levels).abs().amin(1)
    assert ((found[:, None] - levels).abs() <= 1e-6 * levels.abs()).any(1).all()
    assert ((found - shares).abs() <= least + 1e-6).all(), "of two levels that are as near, either"
    assert least.max() <= largest_error


@pytest.mark.parametrize(("kind", "bits"), MAPS)
def test_errors_reach_half_the_widest_gap_and_no_further(kind: str, bits: int) -> None:
    levels, largest_error = MAPS[kind, bits]
    x = torch.rand(50, 200, generator=torch.Generator().manual_seed(0))
    error = ((kept(x, levels) - x) / scales_of(x)).abs()
    assert 0.95 * largest_error < error.max() <= largest_error


@pytest.mark.parametrize(("kind", "bits"), MAPS)
def test_the_largest_of_a_block_comes_back_exact(kind: str, bits: int) -> None:
    levels, _ = MAPS[kind, bits]
    x = torch.randn(30, 130, generator=torch.Generator().manual_seed(0))
    x = x.square() if kind == "exp_avg_sq" else x
    is_largest = x.abs() == scales_of(x)
    assert torch.equal(kept(x, levels)[is_largest], x[is_largest])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_mean_square_never_becomes_zero_beside_others(bits: int) -> None:
    x = torch.zeros(1, 64)
    x[0, 0] = 1.0
    assert kept(x, unsigned_levels(bits)).amin() > 0
    assert not kept(torch.zeros(1, 64), unsigned_levels(bits)).any()


def test_rounding_by_chance_is_right_on_average_and_keeps_levels() -> None:
    levels = signed_levels(4)
    x = torch.full((4000, 64), 0.3)
    x[:, 0], x[:, 1], x[:, 2] = 1.0, levels[3], -0.5
    chance = Chance.of(seeds_of("test"), Place(0, 0, 64)).bits(x)
    result = kept(x, levels, chance=chance)
    assert set(result[:, 3:].unique().tolist()) == {levels[11].item(), levels[12].item()}
    assert result[:, 3:].mean().item() == pytest.approx(0.3, abs=5 * 0.11 / (4000 * 61) ** 0.5)
    assert result[:, 2].mean().item() == pytest.approx(-0.5, abs=5 * 0.11 / 4000**0.5)
    assert torch.equal(result[:, :2], x[:, :2])


@pytest.mark.parametrize("shape", [(3, 64), (5, 200), (7, 10), (64,), (1, 1000), (0, 128), (2, 66)])
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_plan_are_those_allocated(shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    adamw = AdamW([("w", parameter)], Optimizer(state_bits=bits), seed=0)
    name = str(dtype).removeprefix("torch.")
    assert sum(state_sizes(shape, bits, weight_dtype=name)) == sum(kind["w"].nbytes for kind in adamw.state.values())
    assert {kind: tuple(kept["w"].shape) for kind, kept in adamw.state.items()} == {
        kind: size for kind, (size, _) in state_shapes(shape, bits, weight_dtype=name).items()
    }


def test_a_large_matrix_takes_two_and_an_eighth_or_one_and_an_eighth_bytes_a_weight() -> None:
    shape = (8192, 22016)
    assert sum(state_sizes(shape, 8)) / math.prod(shape) == 2.125
    assert sum(state_sizes(shape, 4)) / math.prod(shape) == 1.125


def test_a_plan_counts_without_torch() -> None:
    code = "import puna.model.optimizer_state, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_odd_columns_and_splits_inside_a_block_are_refused_with_their_numbers() -> None:
    assert misfit((4, 256), 4, column_parts=2) is None
    assert misfit((4, 7), 8) is None
    assert misfit((7,), 4) is None
    assert "7 columns are odd" in str(misfit((4, 7), 4))
    assert "192 columns, split over 2 ranks, are not whole blocks of 64" in str(misfit((4, 192), 8, column_parts=2))
    assert misfit((4, 192), 32, column_parts=2) is None
    with pytest.raises(Exception, match="w cannot have optimizer state of 4 bits: its 7 columns are odd"):
        AdamW([("w", torch.nn.Parameter(torch.zeros(4, 7)))], Optimizer(state_bits=4), seed=0)


@pytest.mark.parametrize("peak_lr", [1e-3, 3e-3])
def test_low_bits_learn_as_fp32_does(peak_lr: float) -> None:
    losses = {bits: _final_loss(bits, peak_lr) for bits in (32, 8, 4)}
    assert losses[32] < 1.5  # of 6.26 at the start
    assert losses[8] == pytest.approx(losses[32], abs=0.05)
    assert losses[32] - 0.6 < losses[4] < losses[32] + 0.05


def _final_loss(bits: int, peak_lr: float) -> float:
    """Mean loss of the last ten of sixty steps on four phrases, each said twice in a row."""
    model = tiny_model(initializer_range=0.02)
    adamw = AdamW(model.named_parameters(), Optimizer(state_bits=bits), seed=0)
    generator = torch.Generator().manual_seed(0)
    phrases = torch.randint(3, 512, (4, 8), generator=generator).repeat(1, 2)
    losses = []
    for update in range(1, 61):
        logits = model(phrases[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), phrases[:, 1:].flatten())
        loss.backward()
        adamw.step(update, peak_lr)
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return sum(losses[-10:]) / 10
