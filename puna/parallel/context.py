"""Context parallelism: ranks share the tokens of a row, and documents stay apart.

A row of T tokens is cut into 2·cp chunks; rank r takes chunk r and chunk 2·cp-1-r, so that everyone has as much to
attend to. Row of 8 chunks on 4 ranks:

    chunk   0  1  2  3  4  5  6  7
    rank    0  1  2  3  3  2  1  0

Everything but attention is per token. For attention there are two ways, both exact, and both keep to documents:

- where the heads can be shared as well, ranks exchange tokens for heads: each attends over whole rows for its heads;
- elsewhere keys and values are gathered, and each rank attends from its own queries to the keys of their documents.

Source: DeepSpeed-Ulysses (arXiv:2309.14509) for the first; Llama 3 (arXiv:2407.21783), section 3.3.2, for the second.
"""

import functools

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from puna.model.attention import Documents, Span, attend, attend_spans
from puna.model.llama import Attention, Llama
from puna.parallel.collectives import exchange_dims, gather_dim

#: Dims of queries, keys and values (B, T, N, H).
TOKENS, HEADS = 1, 2


def share_tokens(model: Llama, group: dist.ProcessGroup) -> None:
    """Lets every attention of a model work on a rank's tokens of each row; see `token_indices`."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = functools.partial(attend_shared, group=group)


def token_indices(length: int, size: int, rank: int) -> NDArray[np.int64]:
    """Places in a row of `length` tokens that one of `size` ranks holds, in its order."""
    chunks = np.arange(length).reshape(2 * size, -1)
    return np.concatenate([chunks[rank], chunks[2 * size - 1 - rank]])


def attend_shared(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, *, group: dist.ProcessGroup) -> Tensor:
    """`attend` where each rank of a group holds its tokens of every row.

    Args:
        q: (B, T / cp, N, H) queries of this rank's tokens.
        k, v: (B, T / cp, K, H) their keys and values.
        documents: those of the whole rows.
        group: the cp ranks.

    Returns:
        (B, T / cp, N, H).
    """
    size = group.size()
    if q.shape[HEADS] % size == 0 and k.shape[HEADS] % size == 0:
        return _attend_by_heads(q, k, v, documents, group)
    return _attend_by_keys(q, k, v, documents, group)


def _attend_by_heads(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, group: dist.ProcessGroup) -> Tensor:
    to_row, to_ranks = _orders(q.shape[TOKENS] * group.size(), group.size(), q.device)
    q, k, v = (exchange_dims(x, TOKENS, HEADS, group)[:, to_row] for x in (q, k, v))
    out = attend(q, k, v, documents)
    return exchange_dims(out[:, to_ranks], HEADS, TOKENS, group)


def _attend_by_keys(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, group: dist.ProcessGroup) -> Tensor:
    batch, length = q.shape[0], q.shape[TOKENS] * group.size()
    to_row, _ = _orders(length, group.size(), q.device)
    k, v = (gather_dim(x, TOKENS, group)[:, to_row] for x in (k, v))
    lengths = (length,) * batch if documents is None else documents.lengths
    return attend_spans(q, k, v, _spans(lengths, batch, length, group.size(), group.rank()))


@functools.cache  # else each layer would wait for the device
def _orders(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """From all ranks' tokens, one rank after the other, to the row's order; and back."""
    to_ranks = np.concatenate([token_indices(length, size, rank) for rank in range(size)])
    return torch.from_numpy(np.argsort(to_ranks)).to(device), torch.from_numpy(to_ranks).to(device)


def _spans(lengths: tuple[int, ...], batch: int, length: int, size: int, rank: int) -> list[Span]:
    """The runs of this rank's queries that lie in one document and one chunk, and the keys that each sees.

    Queries and keys are numbered over the rows laid end to end: a rank's rows have length / size tokens.
    """
    chunk = length // (2 * size)
    own = length // size
    ends = np.cumsum(lengths)
    spans = []
    for row in range(batch):
        for place, number in enumerate((rank, 2 * size - 1 - rank)):
            first, last = row * length + number * chunk, row * length + (number + 1) * chunk
            query = row * own + place * chunk
            for document in range(int(np.searchsorted(ends, first, side="right")), len(ends)):
                start, stop = int(ends[document]) - lengths[document], min(int(ends[document]), last)
                if start >= last:
                    break
                begin = max(start, first)
                spans.append(Span(query + begin - first, query + stop - first, start, stop))
    return spans
