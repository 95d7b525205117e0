"""The pool of keys and values, and how one step's tokens meet it.

    a step's tokens, end to end       [a's newest | b's newest | 300 of c's prompt]          (1, T)
    slots                             where each is kept: block * size + place in the block  (T,)

Each layer first writes the step's keys and values to their slots; then each sequence's queries see its own slots up to
themselves. Single tokens, and on a CUDA device a few of a sequence, go through a kernel that reads the blocks as they
lie (`attend_paged`), where there is one. The keys and values of other chunks are read in place where they are
neighbours, and else gathered, on a CUDA device those of some chunks together. What is kept in 8 bits
(`puna.generate.engine.storage`) is seen as it was rounded, by its own token too: so it makes no difference which tokens
came in one step.
"""

from dataclasses import dataclass
from itertools import accumulate, takewhile

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from puna.devices import takes_cuda_kernels
from puna.generate.engine.paged_attention import attend_paged, most_tokens
from puna.generate.engine.scheduler import Chunk
from puna.generate.engine.storage import Storage
from puna.model.attention import Span, attend, attend_spans
from puna.model.config import ModelConfig

#: Keys that chunks see at most whose attention is one call of a CUDA device: gathered for 7B, they take 0.5 GB.
MOST_KEYS = 1 << 15


class PagedCache:
    """Keys and values in blocks: the `Cache` that the network sees during a step.

    Args:
        config: shape of the model.
        n_blocks: of the pool.
        block_tokens: tokens of a block.
        dtype: of keys and values; one of 8 bits comes with scales.
        device: where they live.
        tp_size: ranks that share the heads, each with a cache of its own.

    Attributes:
        keys, values: (layers, blocks + 1, block_tokens, K, H); the last block is for rows that stand empty.
        empty_slot: the first of that block.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_blocks: int,
        block_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        tp_size: int = 1,
    ) -> None:
        kv_heads = config.num_key_value_heads // tp_size
        shape = (config.num_hidden_layers, n_blocks + 1, block_tokens, kv_heads, config.head_dim)
        self.keys, self.values = (Storage.empty(shape, dtype, device) for _ in range(2))
        self.block_tokens, self.device = block_tokens, device
        self.empty_slot = n_blocks * block_tokens
        self.step: Step | None = None
        self.layer_type = PagedLayer

    def make_room(self, positions: Tensor) -> None:
        """The scheduler has."""

    def zero(self) -> None:
        """Makes zeros of all that is kept."""
        self.keys.zero()
        self.values.zero()

    def layer(self, index: int) -> "PagedLayer":
        """What layer `index` kept."""
        assert self.step is not None
        return self.layer_type(self.keys[index], self.values[index], self.step)


@dataclass(eq=False)
class Step:
    """Where one step's tokens lie, for all layers.

    Attributes:
        slots: (T,) of each token.
        n_rows: tokens, the first ones, that go through the kernel.
        tables: for each of these the blocks of its sequence, (n_rows, blocks) int32, and how many tokens it sees,
            (n_rows,) int32; None where there are none.
        firsts: (n_rows,) int32 for each of these the first of its sequence; None where each is of another.
        others: the rest: slots of all that each sees.
    """

    slots: Tensor
    n_rows: int
    tables: tuple[Tensor, Tensor] | None
    firsts: Tensor | None
    others: "list[Seen]"

    @classmethod
    def of(cls, chunks: list[Chunk], cache: PagedCache) -> "Step":
        """For chunks in the scheduler's order, single tokens first."""
        size, device = cache.block_tokens, cache.device
        slots = [slot for chunk in chunks for slot in chunk.slots(size)]
        most = most_tokens(cache.keys.numbers)
        short = list(takewhile(lambda chunk: len(chunk) <= most, chunks))
        places = [place for chunk in short for place in range(chunk.start, chunk.stop)]
        tables, firsts = None, None
        if short:
            width = max(len(chunk.running.blocks) for chunk in short)
            blocks = np.zeros((len(short), width), np.int32)
            for row, chunk in zip(blocks, short, strict=True):
                row[: len(chunk.running.blocks)] = chunk.running.blocks
            of_tokens = np.repeat(blocks, [len(chunk) for chunk in short], axis=0)
            tables = _on_device(of_tokens, device), _on_device([place + 1 for place in places], device)
        if len(places) > len(short):
            firsts = _on_device(first_rows(short), device)
        most_keys = MOST_KEYS if takes_cuda_kernels(device.type) else 0
        others = [Seen.of(some, cache) for some in _together(chunks[len(short) :], most_keys)]
        return cls(torch.tensor(slots).to(device), len(places), tables, firsts, others)


def first_rows(chunks: list[Chunk]) -> list[int]:
    """Of each token of chunks end to end, the number of the first one of its chunk."""
    ends = accumulate(map(len, chunks))
    return [end - len(chunk) for chunk, end in zip(chunks, ends, strict=True) for _ in range(len(chunk))]


def _on_device(numbers: ArrayLike, device: torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(numbers, np.int32)).to(device, non_blocking=True)


@dataclass(eq=False)
class Seen:
    """What the tokens of one chunk, or of some end to end, see.

    Attributes:
        slots: of all that each chunk's last token sees, in order, end to end: a slice where they are neighbours.
        spans: which tokens see which of them.
    """

    slots: Tensor | slice
    spans: list[Span]

    @classmethod
    def of(cls, chunks: list[Chunk], cache: PagedCache) -> "Seen":
        """For chunks of sequences."""
        size = cache.block_tokens
        slots, spans, query, key = [], [], 0, 0
        for chunk in chunks:
            spans.append(Span(query, query + len(chunk), key, key + chunk.stop))
            query, key = query + len(chunk), key + chunk.stop
            places = torch.tensor(chunk.running.blocks[: -(-chunk.stop // size)])[:, None] * size + torch.arange(size)
            slots.append(places.flatten()[: chunk.stop])
        together = torch.cat(slots)
        first = int(together[0])
        if torch.equal(together, torch.arange(first, first + len(together))):
            return cls(slice(first, first + len(together)), spans)
        return cls(together.to(cache.device), spans)

    @property
    def n_queries(self) -> int:
        """Tokens of the chunks."""
        return self.spans[-1].queries_stop


@dataclass(frozen=True, eq=False)
class PagedLayer:
    """One layer of the pool in a step: keys and values (blocks + 1, block_tokens, K, H)."""

    keys: Storage
    values: Storage
    step: Step

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """As `LayerCache`, for (1, T, …) tokens end to end."""
        self.keys.flatten().write(self.step.slots, k[0])
        self.values.flatten().write(self.step.slots, v[0])
        return self.see(q[0])[None]

    def see(self, q: Tensor) -> Tensor:
        """(T, N, H) to (T, N, H): queries of the step's tokens, whose keys and values are kept, see their sequences."""
        keys, values, step = self.keys.flatten(), self.values.flatten(), self.step
        n = step.n_rows
        out = []
        if step.tables is not None:
            scales = self.keys.scales, self.values.scales
            pools = self.keys.numbers, self.values.numbers
            out.append(attend_paged(q[:n], *pools, *step.tables, *scales, step.firsts))
        for seen in step.others:
            k, v = (storage[seen.slots].read(q.dtype) for storage in (keys, values))
            out.append(_attend(q[n : n + seen.n_queries], k, v, seen.spans))
            n += seen.n_queries
        return out[0] if len(out) == 1 else torch.cat(out)


def _attend(q: Tensor, k: Tensor, v: Tensor, spans: list[Span]) -> Tensor:
    """The last (t, N, H) queries of texts see their (L, K, H) keys and values up to themselves."""
    is_whole = len(spans) == 1 and len(q) == len(k)
    if is_whole and not takes_cuda_kernels(q.device.type):  # cuDNN, which torch prefers, plans anew for each length
        return attend(q[None], k[None], v[None])[0]
    return attend_spans(q[None], k[None], v[None], spans)[0]


def _together(chunks: list[Chunk], most_keys: int) -> list[list[Chunk]]:
    """Chunks in groups that see so many keys at most, or one by one."""
    groups: list[list[Chunk]] = []
    keys = most_keys
    for chunk in chunks:
        keys += chunk.stop
        if keys > most_keys:
            groups.append([])
            keys = chunk.stop
        groups[-1].append(chunk)
    return groups
