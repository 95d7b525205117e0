"""What lies between the products of a decoding step, as Triton kernels for CUDA devices.

torch would launch a dozen kernels a layer for it, of some microseconds each, in which no weight is read. The plain
formulas are `puna.model.llama.rotate`, `RMSNorm` and `puna.quantized.schemes.fp8.round_rows`. Needs Triton, which comes
with torch's CUDA builds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Of e4m3; and what the greatest number of a row is at least taken for.
GREATEST, LEAST = tl.constexpr(448.0), tl.constexpr(1e-12)


def rotate_and_keep(
    heads: Tensor, cos: Tensor, sin: Tensor, n_queries: int, pools: tuple[Tensor, Tensor] | None, slots: Tensor
) -> None:
    """Turns queries and keys by the angles of their positions, in place, and keeps keys and values.

    Args:
        heads: (n, N + 2 K, H) queries, keys and values of n tokens; dense.
        cos, sin: (n, H) fp32, dense.
        n_queries: N.
        pools: of keys and of values, (slots, K, H) in the dtype of `heads`, of the same strides and dense rows; None:
            keys are turned in place as well, and nothing is kept.
        slots: (n,) int64, dense: where in the pools a token is kept.
    """
    n, n_heads, width = heads.shape
    keys, values = pools or (None, None)
    strides = (0, 0) if keys is None else keys.stride()[:2]
    half = width // 2
    _rotate[(n, n_heads if pools else (n_heads + n_queries) // 2)](
        heads, cos, sin, keys, values, slots, n_queries, (n_heads - n_queries) // 2, n_heads, *strides,
        HALF=half, CHANNELS=triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip


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
    _rows[(len(x),)](x, norm, out, scales, x.shape[1], eps, CHANNELS=channels, num_warps=warps)


@triton.jit
def _rotate(
    heads, cos, sin, keys, values, slots, n_queries, n_keys, n_heads, pool_slot, pool_head,
    HALF: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, CHANNELS)
    is_channel = channel < HALF
    here = heads + (token * n_heads + head) * 2 * HALF + channel
    first = tl.load(here, mask=is_channel, other=0.0)
    second = tl.load(here + HALF, mask=is_channel, other=0.0)
    if head < n_queries + n_keys:
        angle = token * 2 * HALF + channel
        c, s = tl.load(cos + angle, mask=is_channel, other=0.0), tl.load(sin + angle, mask=is_channel, other=0.0)
        x, y = first.to(tl.float32), second.to(tl.float32)
        first, second = (x * c - y * s).to(first.dtype), (y * c + x * s).to(second.dtype)
    if keys is not None:  # noqa: SIM102 — it is known when the kernel is compiled, and what follows is not
        if head >= n_queries:
            place = tl.load(slots + token) * pool_slot + channel
            if head < n_queries + n_keys:
                here = keys + place + (head - n_queries) * pool_head
            else:
                here = values + place + (head - n_queries - n_keys) * pool_head
    tl.store(here, first, mask=is_channel)
    tl.store(here + HALF, second, mask=is_channel)


@triton.jit
def _rows(x, norm, out, scales, width, eps, CHANNELS: tl.constexpr):
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
