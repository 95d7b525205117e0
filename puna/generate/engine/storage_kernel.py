"""Writing keys or values in 8 bits as one Triton kernel for CUDA devices; torch would launch ten for either, a layer.

A program takes the head of one token. `puna.generate.engine.storage.round_heads` has the plain formula; the bits are
the same. Needs Triton, which comes with torch's CUDA builds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.devices import FUSED

#: Added to a number below 2**22 and taken off again, it leaves the nearest integer, the even one of two.
ROUNDER = tl.constexpr(1.5 * 2.0**23)


def write_rounded(x: Tensor, slots: Tensor, numbers: Tensor, scales: Tensor, greatest: float) -> None:
    """Keeps heads in 8 bits.

    Args:
        x: (T, K, H); its last dim is dense.
        slots: (T,) of the first dim of the pool, int64 and dense.
        numbers: (slots, K, H) int8 or e4m3; its last dim is dense.
        scales: (slots, K) fp32; its last dim is dense.
        greatest: what the greatest number of a head becomes.
    """
    n_tokens, n_heads, width = x.shape
    _write[(n_tokens, n_heads)](
        x, slots, numbers, scales, *x.stride()[:2], *numbers.stride()[:2], scales.stride(0), greatest,
        torch.finfo(torch.float32).tiny * greatest,
        WIDTH=width, CHANNELS=triton.next_power_of_2(width), IS_INTEGER=not numbers.dtype.is_floating_point,
        num_warps=1, **FUSED,
    )  # fmt: skip


@triton.jit
def _write(
    x, slots, numbers, scales, x_token, x_head, pool_slot, pool_head, scales_slot, greatest, least,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, IS_INTEGER: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    channel = tl.arange(0, CHANNELS)
    is_channel = channel < WIDTH
    found = tl.load(x + token * x_token + head * x_head + channel, mask=is_channel, other=0.0).to(tl.float32)
    top = tl.maximum(tl.max(tl.abs(found), 0), least)
    top = tl.where(tl.max((found != found).to(tl.int32), 0) == 1, float("nan"), top)  # maxima pass NaNs over
    scale = tl.div_rn(top, greatest)
    scaled = tl.div_rn(found, scale)
    scaled = tl.minimum(tl.maximum(scaled, -greatest), greatest)
    if IS_INTEGER:
        scaled = (scaled + ROUNDER) - ROUNDER
    place = slot * pool_slot + head * pool_head + channel
    tl.store(numbers + place, scaled.to(numbers.dtype.element_ty), mask=is_channel)
    tl.store(scales + slot * scales_slot + head, scale)
