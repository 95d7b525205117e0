"""Decoding steps of a CUDA device as graphs: one launch a step instead of a thousand.

At batch 1 a step of 7B reads its weights in 3 ms, in which a host could not launch its kernels one by one. A graph is
recorded once for every number of rows, and of blocks that the longest of them has, each rounded up; rows that stand
empty have length 0 and write to a block that nobody reads. Layers may be compiled too: then what lies between their
products is one kernel, which costs a minute at the start.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from puna.generate.engine.cache import PagedCache, PagedLayer, Step
from puna.generate.engine.scheduler import Chunk
from puna.model.llama import Llama

#: Rows beyond which a step is not recorded: its products take longer than their launches.
MOST_ROWS = 256

#: Of the compiler: kernels of its own for products of one row, which read weights at 74 to 103 % of the rate of a large
#: copy on an H200, where cuBLAS reads them at 63 to 91 %.
OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}

#: Blocks of the shortest table; longer ones have four times as many, and so on.
SHORTEST_TABLE = 16


class DecodeGraphs:
    """Steps in which every sequence has one token.

    Args:
        model: on a CUDA device.
        cache: its blocks.
        is_compiled: compile the layers when they are first used.
    """

    def __init__(self, model: Llama, cache: PagedCache, *, is_compiled: bool) -> None:
        self._model, self._cache = model, cache
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._memory: Any = None
        if is_compiled:
            cache.layer_type = _OutsideCompiledLayers
            for layer in model.model.layers:
                layer.forward = torch.compile(layer.forward, options=OPTIONS)

    def takes(self, chunks: list[Chunk]) -> bool:
        """Whether a graph can compute these chunks."""
        return len(chunks) <= MOST_ROWS and all(c.is_last and c.stop - c.start == 1 for c in chunks)

    def logits(self, chunks: list[Chunk]) -> Tensor:
        """Logits (n, V) behind the one token of each of n chunks; overwritten by the next call."""
        widest = max(len(chunk.running.blocks) for chunk in chunks)
        rows, width = 1, SHORTEST_TABLE
        while rows < len(chunks):
            rows *= 2
        while width < widest:
            width *= 4
        if (rows, width) not in self._graphs:
            self._graphs[rows, width] = self._record(rows, width)
        return self._graphs[rows, width].run(chunks, self._cache)

    def _record(self, rows: int, width: int) -> "_Graph":
        empty = self._cache.empty_slot
        host = torch.zeros(rows, 4 + width, dtype=torch.int64, pin_memory=self._cache.device.type == "cuda")
        host[:, 2] = empty
        there = host.to(self._cache.device)

        def step() -> Tensor:
            ids, positions, slots, lengths = there[:, :4].unbind(1)
            tables = there[:, 4:].to(torch.int32).contiguous(), lengths.to(torch.int32).contiguous()
            self._cache.step = Step(slots.contiguous(), rows, tables, [])
            hidden = self._model.hidden(ids[None], positions=positions[None], cache=self._cache)
            return self._model.lm_head(hidden[0])

        return _Graph(*self._capture(step), host, there, empty)

    def _capture(self, step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # what is compiled or allocated at first use is not recorded
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._memory):
            logits = step()
        return graph, logits


class _OutsideCompiledLayers(PagedLayer):
    """Compiled code calls it and does not look inside, where every layer is another."""

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """As `PagedLayer`."""
        return super().attend(q, k, v, positions)


@dataclass(eq=False)
class _Graph:
    """A recorded step, and where it reads and writes: id, position, slot, length and blocks of each row."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor
    host: Tensor
    there: Tensor
    empty_slot: int

    def run(self, chunks: list[Chunk], cache: PagedCache) -> Tensor:
        """Computes the chunks; the caller has read what the step before gave, so `host` may be written."""
        size, width = cache.block_tokens, self.host.shape[1] - 4
        rows = []
        for chunk in chunks:
            blocks = chunk.running.blocks
            row = [*chunk.ids, chunk.start, *chunk.slots(size), chunk.stop]
            rows.append([*row, *blocks, *[0] * (width - len(blocks))])
        self.host[: len(rows)] = torch.tensor(rows)
        if len(rows) < len(self.host):
            self.host[len(rows) :] = 0
            self.host[len(rows) :, 2] = self.empty_slot
        self.there.copy_(self.host, non_blocking=True)
        self.graph.replay()
        return self.logits[: len(chunks)]
