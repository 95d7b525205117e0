"""Norms of rows, and rows as fp8 numbers, as one Triton kernel for CUDA devices; torch would launch six to a dozen.

A program takes a row. The plain formulas are `puna.model.llama.RMSNorm` and `puna.quantized.schemes.fp8.round_rows`.
Needs Triton, which comes with torch's CUDA builds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.devices import FUSED, early_launch

#: Of e4m3; and what the greatest number of a row is at least taken for.
GREATEST, LEAST = tl.constexpr(448.0), tl.constexpr(1e-12)


def norm_rows(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """An RMSNorm of rows.

    Args:
        x: (n, D) of 16 bits, dense.
        norm: (D,) in the dtype of `x`.
        eps: of the norm.
    """
    out = torch.empty_like(x)
    _launch_rows(x, norm, out, None, eps)
    return out


def round_rows(x: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows as e4m3, (n, D), and the scales, (n,) fp32, to multiply them with.

    Args:
        x: (n, D) of 16 bits, dense.
        norm: of an RMSNorm that comes first, as for `norm_rows`; None: there is none.
        eps: of the norm.
    """
    rounded, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(len(x), dtype=torch.float32)
    _launch_rows(x, norm, rounded, scales, eps)
    return rounded, scales


def _launch_rows(x: Tensor, norm: Tensor | None, out: Tensor, scales: Tensor | None, eps: float) -> None:
    channels = triton.next_power_of_2(x.shape[1])
    warps = min(16, max(1, channels // 1024))
    _rows[(len(x),)](
        x, norm, out, scales, x.shape[1], eps, CHANNELS=channels, num_warps=warps, **FUSED, **early_launch(x.device)
    )


@triton.jit
def _rows(x, norm, out, scales, width, eps, CHANNELS: tl.constexpr, IS_EARLY: tl.constexpr):
    if IS_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, CHANNELS)
    is_channel = channel < width
    numbers = tl.load(x + row * width + channel, mask=is_channel, other=0.0)
    wide = numbers.to(tl.float32)
    if norm is not None:
        normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)).to(numbers.dtype)
        wide = (normed * tl.load(norm + channel, mask=is_channel, other=0.0)).to(tl.float32)
    if scales is not None:
        top = tl.maximum(tl.max(tl.abs(wide), 0), LEAST)
        top = tl.where(tl.max((wide != wide).to(tl.int32), 0) == 1, float("nan"), top)  # maxima pass NaNs over
        scale = tl.div_rn(top, GREATEST)
        wide = tl.minimum(tl.maximum(tl.div_rn(wide, scale), -GREATEST), GREATEST)
        tl.store(scales + row, scale)
    tl.store(out + row * width + channel, wide.to(out.dtype.element_ty), mask=is_channel)
