"""Products of few rows with weights of 8 bits as a Triton kernel for CUDA devices: each code is read once, as a byte.

torch would write all int8 weights in 16 bits and read them again, five bytes a weight for one; of fp8 numbers it
multiplies tiles of 64 rows at least. A program multiplies some outputs with all rows, along the whole depth, so that no
sums of others need to be joined; a row's numbers do not depend on the rows beside it. The files of
`puna.quantized.schemes` have the plain formulas. Needs Triton, which comes with torch's CUDA builds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows of a product's tiles -> outputs of a program, and the depth that it reads at a time: 8 KiB of codes, four times
#: on their way.
TILES = {16: (32, 256), 32: (64, 128), 64: (64, 128)}
STAGES = 4

#: Outputs up to which a program takes half as many, twice as deep: a device has multiprocessors for twice the programs.
FEW_OUTPUTS = 2048


def multiply(x: Tensor, codes: Tensor, scales: Tensor, row_scales: Tensor | None = None) -> Tensor:
    """Rows times the transposed weight.

    Args:
        x: (rows, in) of 16 bits, or e4m3 with `row_scales`, `puna.quantized.few_rows.MOST_ROWS` at most; its last dim
            is dense.
        codes: (out, in) int8, or e4m3 where `x` is; its last dim is dense.
        scales: (out,) that the codes are multiplied with, dense.
        row_scales: (rows,) fp32 that an `x` of 8 bits is multiplied with, dense.

    Returns:
        (rows, out) in the dtype of an `x` of 16 bits, else in bf16; sums and scales are applied in fp32.
    """
    n_rows, depth = x.shape
    n_outputs = len(codes)
    out = x.new_empty(n_rows, n_outputs, dtype=x.dtype if row_scales is None else torch.bfloat16)
    rows = triton.next_power_of_2(max(16, n_rows))
    outputs, step = TILES[rows]
    if n_outputs <= FEW_OUTPUTS:
        outputs, step = outputs // 2, 2 * step
    _multiply[(triton.cdiv(n_outputs, outputs),)](
        x, codes, scales, row_scales, out, n_rows, n_outputs, depth, x.stride(0), codes.stride(0),
        ROWS=rows, OUTPUTS=outputs, DEPTH=step, num_warps=4, num_stages=STAGES,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_rows"])
def _multiply(
    x, codes, scales, row_scales, out, n_rows, n_outputs, depth, x_row, codes_row,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row, output = tl.arange(0, ROWS), tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row, is_output = row < n_rows, output < n_outputs
    x_place, codes_place = row[:, None] * x_row, output.to(tl.int64)[:, None] * codes_row
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in range(0, depth, DEPTH):
        place = start + tl.arange(0, DEPTH)
        is_place = (place < depth)[None, :]
        weight = tl.load(codes + codes_place + place[None, :], mask=is_output[:, None] & is_place, other=0.0)
        piece = tl.load(x + x_place + place[None, :], mask=is_row[:, None] & is_place, other=0.0)
        if row_scales is not None:  # e4m3, which fp16 holds exactly
            piece = piece.to(tl.float16)
        total = tl.dot(weight.to(piece.dtype), tl.trans(piece), total)
    total *= tl.load(scales + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
    if row_scales is not None:
        total *= tl.load(row_scales + row, mask=is_row, other=0.0)[None, :]
    place = row.to(tl.int64)[None, :] * n_outputs + output[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=is_output[:, None] & is_row[None, :])
