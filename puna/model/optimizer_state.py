"""What AdamW keeps of each weight, as shapes: read by the optimizer that allocates it and by plans that count it.

    a weight (rows, columns), 8 bits:   exp_avg         (rows, columns)       a code a number
                                        exp_avg_scales  (rows, blocks)        a scale for every 64 codes of a row
                                        and the same two for exp_avg_sq

Blocks run along a row and never into the next. A rank that holds some rows, or some whole blocks of every row, then
holds exactly the state of its part: the state of a weight does not depend on how it is sharded. Weights of one
dimension are few; they keep fp32. No torch is needed to read this.
"""

import math

from puna.model.config import ModelConfig
from puna.model.shapes import weight_shapes
from puna.model.split import split_dim

#: Numbers that share a scale; a shorter row is one block.
BLOCK = 64

#: Bytes of one element, by the name that torch gives the dtype.
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "uint8": 1}

MOMENTS = ("exp_avg", "exp_avg_sq")


def state_shapes(
    shape: tuple[int, ...], state_bits: int, *, weight_dtype: str = "float32"
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Kind of state -> shape and dtype of what is kept of a weight.

    Args:
        shape: of the weight, or of a rank's part of it.
        state_bits: 32, 8 or 4.
        weight_dtype: with 32 bits the state has the weight's dtype: "float32", or "bfloat16" under bf16-pure.
    """
    if not is_blockwise(shape, state_bits):
        dtype = weight_dtype if state_bits == 32 else "float32"
        return {moment: (shape, dtype) for moment in MOMENTS}
    rows, columns = shape
    codes = ((rows, columns * state_bits // 8), "uint8")
    scales = ((rows, math.ceil(columns / block_of(columns))), "float32")
    return {kind: kept for moment in MOMENTS for kind, kept in ((moment, codes), (f"{moment}_scales", scales))}


def state_sizes(shape: tuple[int, ...], state_bits: int, *, weight_dtype: str = "float32") -> list[int]:
    """Bytes of each tensor of the state of a weight, or of a rank's part of it; arguments as for `state_shapes`."""
    kept = state_shapes(shape, state_bits, weight_dtype=weight_dtype).values()
    return [math.prod(size) * ITEM_BYTES[dtype] for size, dtype in kept]


def misfit(shape: tuple[int, ...], state_bits: int, *, column_parts: int = 1) -> str | None:
    """Why a weight cannot have a state of so few bits; None: it can.

    Args:
        shape: of the whole weight.
        state_bits: 32, 8 or 4.
        column_parts: ranks that its last dim is split over.
    """
    if not is_blockwise(shape, state_bits):
        return None
    columns = shape[1]
    if state_bits == 4 and columns % 2:
        return f"its {columns} columns are odd, and two numbers of 4 bits share a byte; use optimizer.state_bits=8"
    block = block_of(columns)
    if column_parts > 1 and columns % (column_parts * block):
        return (
            f"its {columns} columns, split over {column_parts} ranks, are not whole blocks of {block} each; use a "
            f"parallel.tp for which {columns} / tp is a multiple of {block}, or optimizer.state_bits=32"
        )
    return None


def state_misfit(config: ModelConfig, state_bits: int, tp: int) -> str | None:
    """Why the state of a model's weights cannot have so few bits where `tp` ranks share each; None: it can."""
    if state_bits == 32:
        return None
    for name, shape in weight_shapes(config)["layer"].items():
        if reason := misfit(shape, state_bits, column_parts=tp if split_dim(name) == 1 else 1):
            return f"optimizer.state_bits={state_bits}: {name}: {reason}"
    return None


def is_blockwise(shape: tuple[int, ...], state_bits: int) -> bool:
    """Whether the state of a weight is codes and scales rather than numbers."""
    return state_bits < 32 and len(shape) == 2


def block_of(columns: int) -> int:
    """Length of the blocks in rows of a whole weight; the last block of a row may be shorter."""
    return max(1, min(BLOCK, columns))
