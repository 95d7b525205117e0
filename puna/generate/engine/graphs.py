"""Decoding steps as graphs: one launch a step instead of a thousand, and on a CPU one call instead of three hundred.

At batch 1 a step of 7B reads its weights in 3 ms, in which a host could not launch its kernels one by one. A row is a
token. A graph is recorded once for every number of rows, and of blocks that the longest sequence has, each rounded up,
and once more for steps in which a sequence has several rows, guesses above all. Rows that stand empty have length 0 and
write to a block that nobody reads.

On a CPU a graph is a `Recording` of our kernels' calls. A model that needs more than these is refused as the first is
made, and each step is computed by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from puna.garbage import uncollected
from puna.generate.engine.cache import PagedCache, Step, first_rows
from puna.generate.engine.network import Network
from puna.generate.engine.paged_attention import most_tokens
from puna.generate.engine.scheduler import Chunk
from puna.model.calls import Recording

#: Rows beyond which a step is not recorded: its products take longer than their launches.
MOST_ROWS = 256

#: On a CPU likewise, where launches take some 2 ms.
MOST_ROWS_ON_CPU = 8

#: Blocks of the shortest table; longer ones have four times as many, and so on.
SHORTEST_TABLE = 16


class DecodeGraphs:
    """Steps in which every sequence has its newest token, or a few of them.

    Args:
        network: of a model on a CUDA device.
        cache: its blocks.
        is_compiled: its layers will be, as they are used; they are for one row at once.
    """

    most_rows = MOST_ROWS

    def __init__(self, network: Network, cache: PagedCache, *, is_compiled: bool = False) -> None:
        self._network, self._cache = network, cache
        self._graphs: dict[tuple[int, int, bool], _Graph] = {}
        self._most_tokens = most_tokens(cache.keys.numbers)
        self._memory: Any = None
        self._stream: Any = None
        if is_compiled:
            self._record_one_row()  # first: as the second size, it would have layers compiled three times

    def takes(self, chunks: list[Chunk]) -> bool:
        """Whether a graph can compute these chunks."""
        are_short = all(chunk.is_last and len(chunk) <= self._most_tokens for chunk in chunks)
        return are_short and sum(map(len, chunks)) <= self.most_rows

    def logits(self, chunks: list[Chunk]) -> Tensor:
        """Logits (n, V) behind the n tokens of chunks end to end; overwritten by the next call."""
        widest = max(len(chunk.running.blocks) for chunk in chunks)
        n, width = sum(map(len, chunks)), SHORTEST_TABLE
        while width < widest:
            width *= 4
        size = self._rows(n), width, n > len(chunks)
        if size not in self._graphs:
            self._graphs[size] = self._record(*size)
        return self._graphs[size].run(chunks, self._cache)

    def _rows(self, n: int) -> int:
        return 1 << (n - 1).bit_length()

    @torch.inference_mode()
    def _record_one_row(self) -> None:
        size = 1, SHORTEST_TABLE, False
        self._graphs[size] = self._record(*size)

    def _record(self, rows: int, width: int, has_several: bool) -> "_Graph":
        host = torch.zeros(rows * (width + 8), dtype=torch.int32, pin_memory=self._cache.device.type == "cuda")
        there = host.to(self._cache.device)
        inputs = _Inputs.of(there, rows)
        inputs.slots.fill_(self._cache.empty_slot)

        def step() -> Tensor:
            firsts = inputs.firsts if has_several else None
            self._cache.step = Step(inputs.slots, rows, (inputs.tables, inputs.lengths), firsts, [])
            return self._network.head(self._network.hidden(inputs.ids, inputs.positions, self._cache))

        return _Graph(*self._capture(step), host, there, _Inputs.of(host, rows).numpy(), self._cache.empty_slot)

    def _capture(self, step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph | Recording, Tensor]:
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        stream = self._stream = self._stream or torch.cuda.Stream()  # each stream has 32 MiB of cuBLAS's own
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what is compiled or allocated at first use is not recorded
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with uncollected(), torch.cuda.graph(graph, pool=self._memory, stream=stream):  # what is given up now ends it
            logits = step()
        return graph, logits


class RecordedSteps(DecodeGraphs):
    """On a CPU, with rows as they are.

    Args:
        network: of a model whose layers our kernels compute.
        cache: its blocks, which our kernel attends to.

    Raises:
        NotRepeatable: the model needs more than our kernels.
    """

    most_rows = MOST_ROWS_ON_CPU

    def __init__(self, network: Network, cache: PagedCache) -> None:
        super().__init__(network, cache)
        self._record_one_row()

    def _rows(self, n: int) -> int:
        return n

    def _capture(self, step: Callable[[], Tensor]) -> tuple[Recording, Tensor]:
        recording = Recording(step)
        return recording, recording.output


@dataclass(eq=False)
class _Inputs:
    """What a step reads: ids, positions, slots (rows,) int64; tables (rows, width), lengths, firsts (rows,) int32."""

    ids: Any
    positions: Any
    slots: Any
    tables: Any
    lengths: Any
    firsts: Any

    @classmethod
    def of(cls, flat: Tensor, rows: int) -> "_Inputs":
        """Views of (rows * (width + 8),) int32, so that one copy brings them all."""
        width = len(flat) // rows - 8
        tables, lengths, firsts, numbers = flat.split([rows * width, rows, rows, 6 * rows])
        ids, positions, slots = numbers.view(torch.int64).view(3, rows)
        return cls(ids, positions, slots, tables.view(rows, width), lengths, firsts)

    def numpy(self) -> "_Inputs":
        """The same memory as arrays, which take lists in a fifth of the time."""
        return _Inputs(*(tensor.numpy() for tensor in vars(self).values()))


@dataclass(eq=False)
class _Graph:
    """A recorded step, where it reads, on the host, in parts too, and on the device, and where it writes.

    Attributes:
        written: for each row the blocks that stand in its table, and how many of them.
    """

    graph: torch.cuda.CUDAGraph | Recording
    logits: Tensor
    host: Tensor
    there: Tensor
    inputs: _Inputs
    empty_slot: int
    written: list[tuple[list[int], int]] = field(init=False)

    def __post_init__(self) -> None:
        self.written = [([], 0)] * len(self.inputs.tables)

    def run(self, chunks: list[Chunk], cache: PagedCache) -> Tensor:
        """Computes the chunks; the caller has read what the step before gave, so `host` may be written."""
        n, inputs = sum(map(len, chunks)), self.inputs
        places = [place for chunk in chunks for place in range(chunk.start, chunk.stop)]
        inputs.ids[:n] = [id for chunk in chunks for id in chunk.ids]
        inputs.positions[:n] = places
        inputs.slots[:n] = [slot for chunk in chunks for slot in chunk.slots(cache.block_tokens)]
        inputs.slots[n:] = self.empty_slot
        inputs.lengths[:n] = [place + 1 for place in places]
        inputs.lengths[n:] = 0
        inputs.firsts[:] = [*first_rows(chunks), *range(n, len(inputs.firsts))]
        of_rows = [chunk.running.blocks for chunk in chunks for _ in range(len(chunk))]
        for row, blocks in enumerate(of_rows):
            known, n_known = self.written[row]
            start = n_known if blocks is known else 0  # a sequence's list only grows, and another sequence has another
            if start < len(blocks):
                inputs.tables[row, start : len(blocks)] = blocks[start:]
                self.written[row] = blocks, len(blocks)
        self.there.copy_(self.host, non_blocking=True)
        self.graph.replay()
        return self.logits[:n]
