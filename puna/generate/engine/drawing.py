"""Tokens of many rows drawn at a time, where logits lie on an accelerator.

`puna.generate.sampling.choose` does the same for one row, on the CPU, and is what this is tested against: fetching the
logits of 64 rows and choosing one by one takes longer than a step of 7B. Random numbers are the sequences' own.
"""

from collections.abc import Sequence as Several

import torch
from torch import Tensor

from puna.generate.sampling import Sampling

#: Rows that are drawn at a time: a row takes some 30 bytes for each id of the vocabulary meanwhile.
MOST_ROWS = 64


def draw(logits: Tensor, samplings: Several[Sampling], shares: Several[float]) -> list[int]:
    """The next token of each row.

    Args:
        logits: (n, V), numbers all.
        samplings: of each row; temperatures above 0. Nothing but temperature, top_k, top_p and min_p is looked at.
        shares: of each row, a uniformly distributed number of [0, 1).
    """
    ids: list[int] = []
    for start in range(0, len(logits), MOST_ROWS):
        some = slice(start, start + MOST_ROWS)
        ids += _draw(logits[some].float(), samplings[some], shares[some])
    return ids


def _draw(scores: Tensor, samplings: Several[Sampling], shares: Several[float]) -> list[int]:
    n_ids = scores.shape[1]

    def column(numbers: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(numbers, dtype=dtype).to(scores.device, non_blocking=True)[:, None]

    temperatures = column([max(s.temperature, torch.finfo(torch.float32).tiny) for s in samplings])
    scores = (scores - scores.amax(1, keepdim=True)) / temperatures
    if most := max((s.top_k for s in samplings if s.top_k < n_ids), default=0):
        places = column([(s.top_k or 1) - 1 for s in samplings], torch.int64)
        least = scores.topk(most).values.gather(1, places.clamp(max=most - 1))
        is_limited = column([0 < s.top_k < n_ids for s in samplings], torch.bool)
        scores = scores.masked_fill(is_limited & (scores < least), -torch.inf)
    if any(s.top_p < 1 for s in samplings):
        ascending, order = scores.softmax(1).sort(dim=1, stable=True)
        is_tail = ascending.cumsum(1) <= column([1 - s.top_p for s in samplings])
        is_tail[:, -1] = False
        scores = scores.masked_fill(torch.empty_like(is_tail).scatter_(1, order, is_tail), -torch.inf)
    if any(s.min_p > 0 for s in samplings):
        likelihoods = scores.softmax(1)
        least = column([s.min_p for s in samplings]) * likelihoods.amax(1, keepdim=True)
        scores = scores.masked_fill(likelihoods < least, -torch.inf)
    together = scores.softmax(1).double().cumsum(1)
    reached = column(list(shares), torch.float64) * together[:, -1:]
    return torch.searchsorted(together, reached, right=True)[:, 0].tolist()
