"""The optimizer's update as one kernel for CUDA devices: each number is read and written once.

`puna.train.optimizer` is the plain way, a dozen operations over pieces of a weight; this is the same arithmetic, tile
by tile: a few blocks of one row, whose state shares scales. It needs Triton, which comes with torch's CUDA builds.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from puna.devices import FUSED
from puna.model.optimizer_state import MOMENTS

if TYPE_CHECKING:
    from puna.train.low_bit import Blocks
    from puna.train.optimizer import Factors
    from puna.train.rounding import Chance

#: Numbers of a tile, about.
TILE = 1024


def update(
    piece: dict[str, Tensor],
    blocks: "dict[str, Blocks]",
    factors: "Factors",
    chances: "dict[str, Chance]",
) -> None:
    """Moves a weight, in place.

    Args:
        piece: "weight", "grad", "exp_avg", "exp_avg_sq" and for codes their "…_scales": (rows, columns) each, dense.
        blocks: kind of state -> how its codes are read and written; empty where the state is numbers.
        factors: what the step multiplies with.
        chances: kind -> its random bits.
    """
    weight, m, v = piece["weight"], piece["exp_avg"], piece["exp_avg_sq"]
    rows, columns = weight.shape
    block = blocks["exp_avg"].block if blocks else min(64, columns)
    width = triton.next_power_of_2(block)
    n_blocks = triton.cdiv(columns, block)
    together = max(1, min(triton.next_power_of_2(n_blocks), TILE // width))
    m_tables, v_tables = (_tables(blocks[kind]) if blocks else (weight,) * 4 for kind in MOMENTS)
    seeds = [number for kind in ("weight", *MOMENTS) for number in (chances[kind].start, chances[kind].mix)]
    groups = triton.cdiv(n_blocks, together)
    _kernel[(rows * groups,)](
        weight, piece["grad"], m, piece.get("exp_avg_scales", m), v, piece.get("exp_avg_sq_scales", v),
        *m_tables, *v_tables, columns, n_blocks, groups, chances["weight"].columns, *seeds,
        factors.grad_scale, factors.weight_kept, factors.minus_lr, factors.square_lacks, factors.eps,
        1 - factors.beta1, factors.beta2, 1 - factors.beta2,
        BITS=blocks["exp_avg"].bits if blocks else 32, BY_CHANCE=bool(blocks and blocks["exp_avg"].by_chance),
        BLOCK=block, WIDTH=width, TOGETHER=together, **FUSED,
    )  # fmt: skip


def _tables(blocks: "Blocks") -> tuple[Tensor, ...]:
    return blocks.first, blocks.borders, blocks.levels, blocks.gaps


_SEEDS = ["start_w", "mix_w", "start_m", "mix_m", "start_v", "mix_v"]


@triton.jit(do_not_specialize=[*_SEEDS, "whole_columns", "n_blocks", "groups"])
def _kernel(
    weight, grad, m, m_scales, v, v_scales,
    m_first, m_borders, m_levels, m_gaps, v_first, v_borders, v_levels, v_gaps,
    columns, n_blocks, groups, whole_columns, start_w, mix_w, start_m, mix_m, start_v, mix_v,
    grad_scale, weight_kept, minus_lr, square_lacks, eps, take_m, keep_v, take_v,
    BITS: tl.constexpr, BY_CHANCE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    number = group * TOGETHER + tl.arange(0, TOGETHER)
    inside = tl.arange(0, WIDTH)
    column = number[:, None] * BLOCK + inside[None, :]
    is_here = (inside[None, :] < BLOCK) & (column < columns)
    place = row.to(tl.int64) * columns + column
    scale_place = row.to(tl.int64) * n_blocks + number
    has_scale = number < n_blocks
    code_place, is_code = place, is_here
    if BITS == 4:  # two to a byte
        pair = tl.arange(0, WIDTH // 2)
        byte = number[:, None] * (BLOCK // 2) + pair[None, :]
        code_place = row.to(tl.int64) * (columns // 2) + byte
        is_code = (pair[None, :] < BLOCK // 2) & (byte < columns // 2)

    p = tl.load(weight + place, mask=is_here, other=0.0).to(tl.float32)
    g = tl.load(grad + place, mask=is_here, other=0.0).to(tl.float32) * grad_scale
    m_ = _read(m, m_scales, m_levels, code_place, scale_place, is_here, is_code, has_scale, BITS)
    v_ = _read(v, v_scales, v_levels, code_place, scale_place, is_here, is_code, has_scale, BITS)
    m_ += take_m * (g - m_)
    v_ = v_ * keep_v + take_v * (g * g)
    root = tl.sqrt(v_ / square_lacks) + eps
    p = p * weight_kept + m_ / (root / minus_lr)

    element = row * whole_columns + column  # modulo 2^32
    _write_numbers(weight, p, place, is_here, element + start_w, mix_w)
    _write(m, m_scales, m_, m_first, m_borders, m_levels, m_gaps, code_place, scale_place, is_code, has_scale,
           element + start_m, mix_m, BITS, BY_CHANCE)  # fmt: skip
    _write(v, v_scales, v_, v_first, v_borders, v_levels, v_gaps, code_place, scale_place, is_code, has_scale,
           element + start_v, mix_v, BITS, False)  # fmt: skip


@triton.jit
def _read(state, scales, levels, place, scale_place, is_here, is_code, has_scale, BITS: tl.constexpr):
    if BITS == 32:
        numbers = tl.load(state + place, mask=is_here, other=0.0).to(tl.float32)
    else:
        code = tl.load(state + place, mask=is_code, other=0).to(tl.int32)
        if BITS == 4:  # the even column is the upper half of a byte
            code = tl.interleave(code >> 4, code & 15)
        scale = tl.load(scales + scale_place, mask=has_scale, other=0.0)
        numbers = tl.where(is_here, tl.load(levels + code) * scale[:, None], 0.0)
    return numbers


@triton.jit
def _write(
    state, scales, exact, first, borders, levels, gaps, place, scale_place, is_code, has_scale, element, mix,
    BITS: tl.constexpr, BY_CHANCE: tl.constexpr,
):  # fmt: skip
    if BITS == 32:
        _write_numbers(state, exact, place, is_code, element, mix)
    else:
        top, bottom = tl.max(exact, 1), tl.min(exact, 1)  # what is not here is 0, as in a block that is filled up
        scale = tl.where(top >= -bottom, top, bottom)
        tl.store(scales + scale_place, scale, mask=has_scale)
        share = exact / tl.where(scale == 0, 1.0, scale)[:, None]
        upper_half = (share.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
        found = tl.load(first + upper_half).to(tl.int32)
        found += (share >= tl.load(borders + found)).to(tl.int32)
        if BY_CHANCE:
            chance = (_bits(element, mix).to(tl.float32) + 0.5) / 65536
            found += (share >= tl.load(levels + found) + tl.load(gaps + found) * chance).to(tl.int32)
        if BITS == 4:
            upper, lower = tl.split(tl.reshape(found, (found.shape[0], found.shape[1] // 2, 2)))
            found = upper * 16 + lower
        tl.store(state + place, found.to(tl.uint8), mask=is_code)


@triton.jit
def _write_numbers(target, exact, place, is_here, element, mix):
    if target.dtype.element_ty == tl.bfloat16:
        rounded = ((exact.to(tl.int32, bitcast=True) + _bits(element, mix)) & -65536).to(tl.float32, bitcast=True)
        exact = tl.where(exact == exact, rounded, exact)
    tl.store(target + place, exact.to(target.dtype.element_ty), mask=is_here)


@triton.jit
def _bits(element, mix):
    x = element ^ (element >> 16)
    x = (x * 0x7FEB352D) ^ mix
    x = (x ^ (x >> 15)) * -2073254261  # 0x846CA68B
    return (x >> 16) & 0xFFFF
