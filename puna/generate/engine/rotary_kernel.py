"""What lies between products and attention of a decoding step, as one Triton kernel for CUDA devices.

torch would launch a dozen a layer for it, of some microseconds each, in which no weight is read. The plain formula is
`puna.model.llama.rotate`. Needs Triton, which comes with torch's CUDA builds.
"""

import triton
import triton.language as tl
from torch import Tensor

from puna.devices import FUSED, early_launch


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
        HALF=half, CHANNELS=triton.next_power_of_2(half), num_warps=1, **FUSED,
        **early_launch(heads.device),
    )  # fmt: skip


@triton.jit
def _rotate(
    heads, cos, sin, keys, values, slots, n_queries, n_keys, n_heads, pool_slot, pool_head,
    HALF: tl.constexpr, CHANNELS: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    if IS_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
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
