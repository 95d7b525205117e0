"""Attention: every query sees the keys of its own document, up to itself.

`attend` serves training, where whole documents lie end to end; `attend_cached` serves generation, where a query meets
keys that were kept. `attend_reference` is the plain formula that both are tested against.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.devices import has_fast_bf16, takes_cuda_kernels
from puna.model import attention_kernel
from puna.model.attention_in_blocks import Span, attend_in_blocks

#: Queries of a document, or numbers in the keys that they see, from which `attend_in_blocks` serves bf16 on a CPU.
#: Below both torch's kernel is faster; fp32 gains nothing by it.
IN_BLOCKS_FROM = 64
IN_BLOCKS_FROM_NUMBERS = 1 << 16


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie when its rows are laid end to end.

    Attributes:
        lengths: tokens of each document part, in order; their sum is B * T.
        starts: (documents + 1,) int32 on the batch's device, the running sum of `lengths` from 0.
    """

    lengths: tuple[int, ...]
    starts: Tensor

    @classmethod
    def of(cls, numbers: np.ndarray, device: torch.device | str = "cpu") -> "Documents":
        """Finds the documents of a batch.

        Args:
            numbers: (B, T) number of the document that each token belongs to; a row's first token always starts one.
            device: where attention will happen.
        """
        is_start = np.ones(numbers.shape, dtype=bool)
        is_start[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        starts = np.append(np.flatnonzero(is_start), numbers.size)
        return cls(tuple(np.diff(starts).tolist()), torch.from_numpy(starts.astype(np.int32)).to(device))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document part."""
        return max(self.lengths)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Causal attention within each document of a batch.

    Args:
        q: (B, T, N, H) queries.
        k, v: (B, T, K, H) keys and values; N is a multiple of K.
        documents: the documents of the batch; None: each row is one document.

    Returns:
        (B, T, N, H).
    """
    is_grouped = q.shape[2] != k.shape[2]
    q_, k_, v_ = (x.flatten(0, 1) for x in (q, k, v))
    if attention_kernel.serves(q_, k_, v_):
        lengths = (q.shape[1],) * len(q) if documents is None else documents.lengths
        return attend_in_blocks(q_, k_, v_, Span.of_documents(lengths)).view_as(q)
    if documents is None or set(documents.lengths) == {q.shape[1]}:
        if _is_for_blocks(k, q.shape[1], k.shape[1]):
            return attend_in_blocks(q_, k_, v_, Span.of_documents([q.shape[1]] * len(q))).view_as(q)
        return _sdpa(q, k, v, is_causal=True, enable_gqa=is_grouped)
    if (varlen := _varlen_attention(q.device.type, q.dtype, is_grouped)) is not None:
        starts, longest = documents.starts, documents.longest
        return varlen(q_, k_, v_, starts, starts, longest, longest, window_size=(-1, 0)).view_as(q)
    parts = zip(*(x.split(documents.lengths) for x in (q_, k_, v_)), strict=True)
    return torch.cat([_attend_document(*part) for part in parts]).view_as(q)


def _attend_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if _is_for_blocks(k, len(q), len(k)):
        return attend_in_blocks(q, k, v, Span.of_documents([len(q)]))
    return _sdpa(q[None], k[None], v[None], is_causal=True, enable_gqa=q.shape[1] != k.shape[1])[0]


def _is_for_blocks(k: Tensor, n_queries: int, n_keys: int) -> bool:
    """Whether so many queries and keys (..., K, H) of a document are computed in blocks."""
    is_large = n_queries >= IN_BLOCKS_FROM or n_keys * k.shape[-2] * k.shape[-1] >= IN_BLOCKS_FROM_NUMBERS
    return is_large and k.device.type == "cpu" and k.dtype == torch.bfloat16


def attend_spans(q: Tensor, k: Tensor, v: Tensor, spans: list[Span]) -> Tensor:
    """Causal attention of some of the queries of a batch to all of its keys.

    Args:
        q: (B, Tq, N, H) queries, Tq of each row.
        k, v: (B, T, K, H) keys and values of whole rows.
        spans: which queries see which keys; together they hold each query once, in order.

    Returns:
        (B, Tq, N, H).
    """
    is_grouped = q.shape[2] != k.shape[2]
    q_, k_, v_ = (x.flatten(0, 1) for x in (q, k, v))
    places = [(slice(s.queries_start, s.queries_stop), slice(s.keys_start, s.keys_stop)) for s in spans]
    if (varlen := _varlen_attention(q.device.type, q.dtype, is_grouped)) is not None:
        if not _is_whole([keys for _, keys in places], len(k_)):
            k_, v_ = (torch.cat([x[keys] for _, keys in places]) for x in (k_, v_))
        counts = [np.array([place.stop - place.start for place in side]) for side in zip(*places, strict=True)]
        starts = [torch.from_numpy(np.append(0, n.cumsum()).astype(np.int32)) for n in counts]
        starts = [n.to(q.device, non_blocking=True) for n in starts]  # else each layer would wait for the device
        longest = [int(n.max()) for n in counts]
        return varlen(q_, k_, v_, *starts, *longest, window_size=(-1, 0)).view_as(q)
    sizes = [(queries.stop - queries.start, keys.stop - keys.start) for queries, keys in places]
    if _is_for_blocks(k, max(n for n, _ in sizes), max(n for _, n in sizes)):
        return attend_in_blocks(q_, k_, v_, spans).view_as(q)
    out = []
    for (queries, keys), (n_queries, n_keys) in zip(places, sizes, strict=True):
        if n_queries == 1:
            out.append(_attend_newest(q_[queries], k_[keys], v_[keys]))
            continue
        is_visible = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
        mask = {"is_causal": True} if n_queries == n_keys else {"attn_mask": is_visible}
        out.append(_sdpa(q_[None, queries], k_[None, keys], v_[None, keys], enable_gqa=is_grouped, **mask)[0])
    return torch.cat(out).view_as(q)


def _is_whole(places: list[slice], length: int) -> bool:
    """Whether places lie end to end from 0 to a length."""
    return [place.start for place in places] + [length] == [0] + [place.stop for place in places]


def _attend_newest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One (1, N, H) query sees all of (S, K, H): the heads that share keys are its rows, and no mask is needed."""
    grouped = q.unflatten(1, (k.shape[1], -1))  # (1, K, N / K, H)
    return F.scaled_dot_product_attention(grouped, k.transpose(0, 1)[None], v.transpose(0, 1)[None]).flatten(1, 2)


def way_of_attention(device: torch.device, dtype: torch.dtype, width: int, *, is_grouped: bool) -> str:
    """What computes attention over packed documents on a device, in words: a run prints it at its start."""
    if _varlen_attention(device.type, dtype, is_grouped) is not None:
        return "variable-length flash attention"
    if attention_kernel.is_there(device, dtype, width):
        return "a kernel for all documents, built by this machine's C compiler"
    if device.type == "cpu" and dtype == torch.bfloat16:
        return f"blocks of products per document, scaled_dot_product_attention below {IN_BLOCKS_FROM} tokens"
    return "scaled_dot_product_attention per document"


def attend_cached(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Attention of new tokens to everything kept so far, their own keys included.

    Args:
        q: (B, T, N, H) queries.
        k, v: (B, S, K, H) keys and values; slot s holds the token at position s.
        positions: (B, T) position of each query; it sees slots 0 to its position.

    Returns:
        (B, T, N, H).
    """
    is_visible = torch.arange(k.shape[1], device=q.device) <= positions[:, None, :, None]  # (B, 1, T, S)
    return _sdpa(q, k, v, attn_mask=is_visible, enable_gqa=q.shape[2] != k.shape[2])


def attend_reference(q: Tensor, k: Tensor, v: Tensor, documents: np.ndarray | None = None) -> Tensor:
    """The plain formula of `attend`: softmax(q k' / sqrt(H)) v in fp32 under a dense mask.

    Args:
        q, k, v: as for `attend`.
        documents: (B, T) document numbers; None: each row is one document.
    """
    batch, length, heads, width = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqnh,bsnh->bnqs", q.float(), k.float()) / width**0.5
    mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[None].expand(batch, -1, -1)
    if documents is not None:
        numbers = torch.from_numpy(documents).to(q.device)
        mask = mask & (numbers[:, :, None] == numbers[:, None, :])
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bnqs,bsnh->bqnh", weights, v.float()).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)  # type: ignore[arg-type]


@cache
def _varlen_attention(device: str, dtype: torch.dtype, is_grouped: bool) -> Callable[..., Any] | None:
    """Torch's flash attention over documents of any lengths, where it can serve; None elsewhere."""
    if not takes_cuda_kernels(device) or dtype not in (torch.bfloat16, torch.float16):
        return None
    if not has_fast_bf16(torch.device(device)):  # flash attention begins with the same devices
        return None
    from torch.nn.attention.varlen import varlen_attn

    must_be_told = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 takes groups as they come
    return partial(varlen_attn, enable_gqa=True) if is_grouped and must_be_told else varlen_attn
