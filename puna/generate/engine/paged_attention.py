"""Attention of sequences' newest tokens to all that they kept, where what was kept lies in blocks of a shared pool.

A block table says where a sequence lies. With blocks of 4 tokens, a sequence of 6 with the table `[7, 2, …]` has
tokens 0 to 3 in block 7, and 4 and 5 in the first half of block 2; the rest of block 2 and of the table counts for
nothing. `attend_paged` is one operation by name, so that a compiled model holds it as it is; on a CUDA device it is the
kernel of `paged_attention_kernel`, on a CPU in bf16 that of `puna.model.layer_kernel`, elsewhere the plain formula,
`attend_paged_reference`.
"""

import torch
from torch import Tensor

from puna.devices import has_triton, takes_cuda_kernels
from puna.generate.engine.storage import Storage
from puna.model import layer_kernel as cpu

#: Newest tokens of a sequence that the kernel of a CUDA device takes: guesses, and the last few of a prompt whose
#: beginning is known. Each some read keys and values anew, so a longer chunk is better off gathering them.
MOST_TOKENS = 32


def attend_paged(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    firsts: Tensor | None = None,
) -> Tensor:
    """Attention of queries to their sequences' tokens in the pool, up to and with the queries' own.

    Shapes alone decide what is launched, so that a CUDA graph can hold it; it waits for nothing.

    Args:
        q: (n, N, H) the newest token of each sequence, or some of them, in order and beside each other.
        keys, values: (blocks, block_size, K, H) of q's type or of 8 bits, the pool of one layer; N is a multiple of K.
        block_tables: (n, max_blocks) int32 of each query's sequence; beyond its last block anything may stand.
        lengths: (n,) int32 tokens that each query sees, its own included; 0: the row stands empty.
        key_scales, value_scales: (blocks, block_size, K) fp32 that keys and values of 8 bits are multiplied with.
        firsts: (n,) int32 the row of the first query of each one's sequence, so that they may read keys and values
            together; None: no sequence has two.

    Returns:
        (n, N, H); zeros where the length is 0.
    """
    if q.dtype == keys.dtype and (kernel := _cpu_kernel(keys)) is not None:
        return kernel.attend_paged(q, keys, values, block_tables, lengths)
    return torch.ops.puna.attend_paged(q, keys, values, block_tables, lengths, key_scales, value_scales, firsts)


def most_tokens(keys: Tensor) -> int:
    """How many tokens of a sequence a kernel takes at a time for such keys; 0: there is none."""
    if takes_cuda_kernels(keys.device.type):
        return MOST_TOKENS if has_triton() else 1
    return 0 if _cpu_kernel(keys) is None else 1


def attend_paged_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """The formula of `attend_paged`, by the row: softmax(q k' / sqrt(H)) v in fp32, masked, over all in its table."""
    n, heads, width = q.shape
    block_size, kv_heads = keys.shape[1:3]
    place = torch.arange(block_tables.shape[1] * block_size, device=q.device)  # (S,)
    is_here = place < lengths[:, None]  # (n, S)
    blocks = block_tables.long()[:, place // block_size].where(is_here, 0)
    pools = Storage(keys, key_scales), Storage(values, value_scales)
    k, v = (pool[blocks, place % block_size].read(torch.float32).float() for pool in pools)  # (n, S, K, H)
    v = v.where(is_here[:, :, None, None], 0.0)  # no weight hides a NaN that was left there
    scores = torch.einsum("nkgh,nskh->nkgs", q.float().view(n, kv_heads, -1, width), k) / width**0.5
    is_hidden = ~is_here[:, None, None]
    weights = scores.masked_fill(is_hidden, float("-inf")).softmax(-1).masked_fill(is_hidden, 0.0)
    return torch.einsum("nkgs,nskh->nkgh", weights, v).reshape(n, heads, width).to(q.dtype)


def _cpu_kernel(keys: Tensor) -> cpu.Kernel | None:
    is_known = keys.device.type == "cpu" and keys.dtype == torch.bfloat16 and keys.shape[-1] % 32 == 0
    return cpu.kernel() if is_known else None


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, lengths: Tensor, *scales_and_firsts: Tensor | None
) -> Tensor:
    if takes_cuda_kernels(q.device.type) and has_triton():
        from puna.generate.engine import paged_attention_kernel as cuda

        return cuda.attend_paged(q, keys, values, block_tables, lengths, *scales_and_firsts)
    return attend_paged_reference(q, keys, values, block_tables, lengths, *scales_and_firsts[:2])


# Not by torch.library.custom_op, which would load torch's compiler and Triton.
_LIBRARY = torch.library.Library("puna", "FRAGMENT")
_LIBRARY.define(
    "attend_paged(Tensor q, Tensor keys, Tensor values, Tensor block_tables, Tensor lengths, "
    "Tensor? key_scales=None, Tensor? value_scales=None, Tensor? firsts=None) -> Tensor"
)
_LIBRARY.impl("attend_paged", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("attend_paged", lambda q, *rest: q.new_empty(q.shape), "Meta")
