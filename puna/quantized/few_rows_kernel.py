"""Products of few rows as a Triton kernel for CUDA devices: each weight is read once, and as it is stored.

Such a product only reads weights. torch would write those of int8 in 16 bits and read them again, five bytes a weight
for one; of fp8 numbers it multiplies tiles of 64 rows at least; and in 16 bits what stands between products takes it a
dozen kernels a layer, in which nothing is read. So one kernel takes several weights over the same rows, the norm before
them, and what comes behind. A program multiplies some outputs with all rows, along the whole depth, so that no sums of
others need to be joined; a row's numbers do not depend on the rows beside it. The files of `puna.quantized.schemes`
and `puna.model.llama` have the plain formulas. Needs Triton, which comes with torch's CUDA builds.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.devices import FUSED, early_launch, has_tensor_memory

#: Rows of a product's tiles -> outputs of a program, and the bytes of each that it reads at a time: 8 KiB, four times
#: on their way.
TILES = {16: (32, 256), 32: (64, 128), 64: (64, 128)}
STAGES, WARPS = 4, 4

#: Bytes that a device brings into its second-level cache at a time.
LINE_BYTES = 128

#: Outputs up to which a program takes half as many, twice as deep: a device has multiprocessors for twice the programs.
#: Codes of int8 are widened by twice the instructions then, so fewer outputs are few.
FEW_OUTPUTS, FEW_OUTPUTS_OF_INT8 = 4096, 2048


def multiply(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor] = (),
    *,
    row_scales: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:
    """Rows times each of up to three transposed weights, end to end.

    Args:
        x: (rows, in) of 16 bits, or e4m3 with `row_scales`, `puna.quantized.few_rows.MOST_ROWS` at most; its last dim
            is dense.
        weights: (out, in) each, in the dtype of `x`, or int8; of the same strides, their last dim dense.
        scales: (out,) that each of 8 bits is multiplied with, dense.
        row_scales: (rows,) fp32 that an `x` of 8 bits is multiplied with, dense.
        dtype: of the result where `x` has 8 bits.
        norm: (in,) of an RMSNorm of an `x` of 16 bits that comes first, dense. It divides by the root mean square
            behind the product, which is the same but for rounding and reads `x` once. None: there is none.
        eps: of the norm.
        residual: (rows, out of all) that is added to the result, in its dtype, dense.
        is_gated: of two weights alike, give silu(first) * second.

    Returns:
        (rows, out of all), gated (rows, out), in the dtype of an `x` of 16 bits; sums, scales and the norm's divisor
        are applied in fp32.
    """
    n_rows, depth = x.shape
    first, second, third, *_ = (*weights, None, None)
    first_scales, second_scales, third_scales, *_ = (*scales, None, None, None)
    sizes = [0 if weight is None else len(weight) for weight in (first, second, third)]
    width = sizes[0] if is_gated else sum(sizes)
    out = x.new_empty(n_rows, width, dtype=x.dtype if row_scales is None else dtype)
    rows = triton.next_power_of_2(max(16, n_rows))
    outputs, step_bytes = TILES[rows]
    if width <= (FEW_OUTPUTS_OF_INT8 if first.dtype == torch.int8 else FEW_OUTPUTS):
        outputs, step_bytes = outputs // 2, 2 * step_bytes
    if is_gated and has_tensor_memory(x.device):  # Triton 3.6 fails to build two products of 64 outputs for it
        outputs = min(outputs, 32)
    programs = sum(triton.cdiv(size, outputs) for size in (sizes[:1] if is_gated else sizes))
    _multiply[(programs,)](
        x, row_scales, norm, first, second, third, first_scales, second_scales, third_scales, residual, out,
        n_rows, *sizes, width, depth, x.stride(0), first.stride(0), eps,
        ROWS=rows, OUTPUTS=outputs, DEPTH=step_bytes // first.element_size(), IS_GATED=is_gated,
        LINES=triton.next_power_of_2(STAGES * step_bytes // LINE_BYTES), LINE=LINE_BYTES // first.element_size(),
        num_warps=WARPS, num_stages=STAGES, **FUSED, **early_launch(x.device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_rows"])
def _multiply(
    x, row_scales, norm, first, second, third, first_scales, second_scales, third_scales, residual, out,
    n_rows, n_first, n_second, n_third, width, depth, x_row, weight_row, eps,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, IS_GATED: tl.constexpr,
    LINES: tl.constexpr, LINE: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    program, begin = tl.program_id(0), 0
    weight, scales, n_outputs = first, first_scales, n_first
    if second is not None and not IS_GATED:
        before = tl.cdiv(n_first, OUTPUTS)
        if program >= before:
            program -= before
            weight, n_outputs, begin = second, n_second, n_first
            if second_scales is not None:
                scales = second_scales
            if third is not None:
                before = tl.cdiv(n_second, OUTPUTS)
                if program >= before:
                    program -= before
                    weight, n_outputs, begin = third, n_third, n_first + n_second
                    if third_scales is not None:
                        scales = third_scales

    row, output = tl.arange(0, ROWS), program * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row, is_output = row < n_rows, output < n_outputs
    weight_place = output.to(tl.int64)[:, None] * weight_row
    if IS_EARLY:  # the beginning of the weights comes while the kernel before ends
        tl.extra.cuda.gdc_launch_dependents()
        line = tl.minimum(output, n_outputs - 1).to(tl.int64)[:, None] * weight_row
        line += tl.minimum(tl.arange(0, LINES) * LINE, depth - 1)[None, :]
        _fetch(weight + line)
        if IS_GATED:
            _fetch(second + line)
        tl.extra.cuda.gdc_wait()
    total, ups = tl.zeros([OUTPUTS, ROWS], tl.float32), tl.zeros([OUTPUTS, ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, depth, DEPTH):
        place = start + tl.arange(0, DEPTH)
        is_place = place < depth
        is_weight = is_output[:, None] & is_place[None, :]
        piece = tl.load(x + row[:, None] * x_row + place[None, :], mask=is_row[:, None] & is_place[None, :], other=0.0)
        if row_scales is not None:  # e4m3, which fp16 holds exactly
            piece = piece.to(tl.float16)
        if norm is not None:
            wide = piece.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            piece = (wide * tl.load(norm + place, mask=is_place, other=0.0).to(tl.float32)[None, :]).to(piece.dtype)
        columns = tl.trans(piece)
        numbers = tl.load(weight + weight_place + place[None, :], mask=is_weight, other=0.0)
        total = tl.dot(numbers.to(piece.dtype), columns, total)
        if IS_GATED:
            numbers = tl.load(second + weight_place + place[None, :], mask=is_weight, other=0.0)
            ups = tl.dot(numbers.to(piece.dtype), columns, ups)

    factor = tl.full([ROWS], 1.0, tl.float32)
    if norm is not None:
        factor = tl.rsqrt(squares / depth + eps)
    if row_scales is not None:
        factor *= tl.load(row_scales + row, mask=is_row, other=0.0)
    total *= factor[None, :]
    if scales is not None:
        total *= tl.load(scales + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
    if IS_GATED:
        ups *= factor[None, :]
        if second_scales is not None:
            ups *= tl.load(second_scales + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
        gate = total.to(out.dtype.element_ty).to(tl.float32)
        gate = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
        total = gate * ups.to(out.dtype.element_ty).to(tl.float32)
    place = row[None, :] * width + begin + output[:, None]
    is_out = is_output[:, None] & is_row[None, :]
    if residual is not None:
        added = tl.load(residual + place, mask=is_out, other=0.0).to(tl.float32)
        total = total.to(out.dtype.element_ty).to(tl.float32) + added
    tl.store(out + place, total.to(out.dtype.element_ty), mask=is_out)


@triton.jit
def _fetch(places):
    """Has the lines of memory that hold `places` brought into the device's second-level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
    )
