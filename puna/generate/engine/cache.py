"""The pool of keys and values, and how one step's tokens meet it.

    a step's tokens, end to end       [a's newest | b's newest | 300 of c's prompt]          (1, T)
    slots                             where each is kept: block * size + place in the block  (T,)

Each layer first writes the step's keys and values to their slots; then each sequence's queries see its own slots up to
themselves. Sequences that decode go through a kernel that reads the blocks as they lie (`attend_paged`), where there is
one; of the others, one whose blocks are neighbours is read in place on a CPU, and else gathered. What is kept in 8 bits
(`puna.generate.engine.storage`) is seen as it was rounded, by its own token too: so it makes no difference which tokens
came in one step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from puna.generate.engine.paged_attention import attend_paged, is_fast
from puna.generate.engine.scheduler import Chunk
from puna.generate.engine.storage import Storage
from puna.model.attention import Span, attend, attend_spans
from puna.model.config import ModelConfig


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
        n_decoding: sequences of one token, which come first, that go through the kernel; 0 where there is none.
        tables: for each of these its blocks, (n_decoding, blocks) int32, and its length, (n_decoding,) int32; None
            where there are none.
        others: the rest: slots of all that each sees.
    """

    slots: Tensor
    n_decoding: int
    tables: tuple[Tensor, Tensor] | None
    others: "list[Seen]"

    @classmethod
    def of(cls, chunks: list[Chunk], cache: PagedCache) -> "Step":
        """For chunks in the scheduler's order, single tokens first."""
        size, device = cache.block_tokens, cache.device
        slots = [slot for chunk in chunks for slot in chunk.slots(size)]
        n_decoding = sum(chunk.stop - chunk.start == 1 for chunk in chunks) if is_fast(cache.keys.numbers) else 0
        tables = None
        if n_decoding:
            width = max(len(chunk.running.blocks) for chunk in chunks[:n_decoding])
            rows = [chunk.running.blocks + [0] * (width - len(chunk.running.blocks)) for chunk in chunks[:n_decoding]]
            lengths = [chunk.stop for chunk in chunks[:n_decoding]]
            tables = tuple(torch.tensor(x, dtype=torch.int32).to(device, non_blocking=True) for x in (rows, lengths))
        others = [Seen.of(chunk, cache) for chunk in chunks[n_decoding:]]
        return cls(torch.tensor(slots).to(device), n_decoding, tables, others)  # type: ignore[arg-type]


@dataclass(eq=False)
class Seen:
    """What a chunk's tokens see.

    Attributes:
        n_queries: tokens of the chunk.
        slots: of all that the last of them sees, in order: a slice where blocks are neighbours.
        length: their number.
    """

    n_queries: int
    slots: Tensor | slice
    length: int

    @classmethod
    def of(cls, chunk: Chunk, cache: PagedCache) -> "Seen":
        """For a chunk of a sequence."""
        size = cache.block_tokens
        blocks = chunk.running.blocks[: -(-chunk.stop // size)]
        if blocks[-1] - blocks[0] == len(blocks) - 1 and all(b == blocks[0] + i for i, b in enumerate(blocks)):
            slots: Tensor | slice = slice(blocks[0] * size, blocks[0] * size + chunk.stop)
        else:
            places = torch.tensor(blocks)[:, None] * size + torch.arange(size)
            slots = places.flatten()[: chunk.stop].to(cache.device)
        return cls(chunk.stop - chunk.start, slots, chunk.stop)


@dataclass(frozen=True, eq=False)
class PagedLayer:
    """One layer of the pool in a step: keys and values (blocks + 1, block_tokens, K, H)."""

    keys: Storage
    values: Storage
    step: Step

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """As `LayerCache`, for (1, T, …) tokens end to end."""
        keys, values, step = self.keys.flatten(), self.values.flatten(), self.step
        keys.write(step.slots, k[0])
        values.write(step.slots, v[0])
        n = step.n_decoding
        out = []
        if step.tables is not None:
            scales = self.keys.scales, self.values.scales
            out.append(attend_paged(q[0, :n], self.keys.numbers, self.values.numbers, *step.tables, *scales))
        for seen in step.others:
            of_sequence = (storage[seen.slots].read(q.dtype) for storage in (keys, values))
            out.append(_attend(q[0, n : n + seen.n_queries], *of_sequence))
            n += seen.n_queries
        return (out[0] if len(out) == 1 else torch.cat(out))[None]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last (t, N, H) queries of a text see its (L, K, H) keys and values up to themselves."""
    if len(q) == len(k):
        return attend(q[None], k[None], v[None])[0]
    return attend_spans(q[None], k[None], v[None], [Span(0, len(q), 0, len(k))])[0]
