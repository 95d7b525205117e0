"""Causal attention on a CPU: matrix products over blocks of queries.

torch's CPU kernel spends more time around its small products than in them, above all backward and in bf16. Here one
block of queries meets every key that its last query sees, for as many heads as fit the cache at once:

    document of 300 tokens     queries 0-127 x keys 0-127, queries 128-255 x keys 0-255, queries 256-299 x keys 0-299
    its last 100 tokens        queries 0-99 x keys 0-299

All that a query sees is in its block, so softmax and its gradient are one call each, and nothing is kept but queries,
keys and values: the backward pass forms the weights again. Above the diagonal only a block's last square is computed.
Products are in the dtype of the input, softmax in fp32 inside; `attend_reference` is the plain formula. Where
`puna.model.attention_kernel` serves, it does the same in less time.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from puna.model import attention_kernel

#: Queries of a block, and scores of a block over all its heads: these stay in a cache.
QUERIES = 128
SCORES = 1 << 20


@dataclass(frozen=True)
class Span:
    """A run of queries of one document, and the keys from its start that the last of them sees.

    Query `queries_stop - 1 - i` sees all but the last i keys. Both are numbered over rows laid end to end.
    """

    queries_start: int
    queries_stop: int
    keys_start: int
    keys_stop: int

    @classmethod
    def of_documents(cls, lengths: Iterable[int]) -> "list[Span]":
        """Those of whole documents that lie end to end."""
        stops = list(itertools.accumulate(lengths))
        return [cls(start, stop, start, stop) for start, stop in itertools.pairwise([0, *stops])]


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, spans: list[Span]) -> Tensor:
    """Causal attention of runs of queries to the keys of their documents, differentiable once.

    Args:
        q: (Tq, N, H) queries.
        k, v: (T, K, H) keys and values; N is a multiple of K.
        spans: which queries see which keys; together they hold each query once, and those of a document lie side by
            side.

    Returns:
        (Tq, N, H).
    """
    places = [place for s in spans for place in (s.queries_start, s.queries_stop, s.keys_start, s.keys_stop)]
    if torch.is_grad_enabled():
        out: Tensor = _AttendInBlocks.apply(q, k, v, places)
        return out
    return _forward(q, k, v, places)[0]


class _AttendInBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, places: list[int]) -> Tensor:
        out, log_norms = torch.ops.puna.attend_in_blocks(q, k, v, places)
        ctx.save_for_backward(q, k, v, *((out, log_norms) if len(log_norms) else ()))
        ctx.places = places
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        if kept and (kernel := attention_kernel.kernel()) is not None:
            out, log_norms = kept
            return *kernel.backward(q, k, v, out, log_norms, grad, ctx.places), None
        groups, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
        mask = _mask(groups, QUERIES, q.dtype, q.device)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros(k.shape[1], k.shape[0], k.shape[2], device=k.device) for _ in range(2))
        for queries, keys, heads in _blocks(q, k, ctx.places):
            q_, k_, v_ = _heads_first(q, queries, heads, groups) * scale, k[keys, heads], v[keys, heads]
            grad_ = _heads_first(grad, queries, heads, groups)
            weights = _weights(q_, k_, mask)
            _add_product_(grad_v[heads, keys], weights.mT, grad_)
            slope = torch._softmax_backward_data(grad_ @ v_.transpose(0, 1).contiguous().mT, weights, -1, weights.dtype)
            _add_product_(grad_k[heads, keys], slope.mT, q_)
            _put(grad_q, queries, heads, groups, (slope @ k_.transpose(0, 1)).mul_(scale))
        grad_k, grad_v = (x.to(k.dtype).transpose(0, 1).contiguous() for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, None


def _forward(q: Tensor, k: Tensor, v: Tensor, places: list[int]) -> tuple[Tensor, Tensor]:
    """What is attended to, and what the kernel's backward pass wants beside it: nothing where there is none."""
    kernel = attention_kernel.kernel()
    if kernel is not None and attention_kernel.serves(q, k, v):
        return kernel.forward(q, k, v, places)
    groups, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    mask = _mask(groups, QUERIES, q.dtype, q.device)
    out = torch.empty_like(q)
    for queries, keys, heads in _blocks(q, k, places):
        weights = _weights(_heads_first(q, queries, heads, groups) * scale, k[keys, heads], mask)
        _put(out, queries, heads, groups, weights @ v[keys, heads].transpose(0, 1))
    return out, q.new_empty(0)


def _blocks(q: Tensor, k: Tensor, places: list[int]) -> Iterator[tuple[slice, slice, slice]]:
    """The queries of each block, the keys they see, and the key/value heads that are done at once."""
    groups = q.shape[1] // k.shape[1]
    for span in (Span(*places[i : i + 4]) for i in range(0, len(places), 4)):
        for start in range(span.queries_start, span.queries_stop, QUERIES):
            stop = min(start + QUERIES, span.queries_stop)
            keys = slice(span.keys_start, span.keys_stop - (span.queries_stop - stop))
            n_heads = max(1, SCORES // (groups * (stop - start) * (keys.stop - keys.start)))
            for head in range(0, k.shape[1], n_heads):
                yield slice(start, stop), keys, slice(head, min(head + n_heads, k.shape[1]))


def _weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """(heads, queries, H) and (keys, heads, H) to (heads, queries, keys): softmax over what each query sees."""
    scores = q @ k.transpose(0, 1).contiguous().mT  # whole rows are copied, and oneDNN takes such a view as it is
    n_queries = q.shape[1] // (len(mask) // mask.shape[1])
    if n_queries > 1:
        scores[..., -n_queries:] += mask[: q.shape[1], :n_queries]
    return scores.softmax(-1)


@cache
def _mask(groups: int, queries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(queries x groups, queries): what is added to the last square of a block."""
    with torch.inference_mode(False):
        square = torch.full((queries, queries), float("-inf"), dtype=dtype, device=device).triu_(1)
        return square.repeat_interleave(groups, dim=0)


def _heads_first(x: Tensor, rows: slice, heads: slice, groups: int) -> Tensor:
    """(T, K x groups, H) to (heads, rows x groups, H): the queries that share keys become one matrix."""
    return x[rows].unflatten(1, (-1, groups))[:, heads].transpose(0, 1).flatten(1, 2)


def _put(x: Tensor, rows: slice, heads: slice, groups: int, values: Tensor) -> None:
    """Writes (heads, rows x groups, H) to where `_heads_first` takes it from."""
    x[rows].unflatten(1, (-1, groups))[:, heads] = values.unflatten(1, (-1, groups)).transpose(0, 1)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to `total`, in fp32."""
    if a.dtype == total.dtype:
        total.baddbmm_(a, b)
    else:
        total += a @ b


# One operation by name, so that selective recomputation can keep its result.
_LIBRARY = torch.library.Library("puna", "DEF")
_LIBRARY.define("attend_in_blocks(Tensor q, Tensor k, Tensor v, int[] places) -> (Tensor, Tensor)")
_LIBRARY.impl("attend_in_blocks", _forward, "CPU")
_LIBRARY.impl("attend_in_blocks", lambda q, k, v, places: (torch.empty_like(q), q.new_empty(0)), "Meta")
