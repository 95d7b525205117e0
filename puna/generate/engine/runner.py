"""One model, its keys and values, and how it computes what a step puts together; a draft model has a runner as well."""

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from puna.devices import takes_cuda_kernels
from puna.generate.engine.cache import PagedCache, Step
from puna.generate.engine.network import Network, network_of
from puna.generate.engine.paged_attention import most_tokens
from puna.generate.engine.scheduler import Chunk
from puna.generate.engine.storage import storage_dtype, token_bytes
from puna.generate.sampling import check_numbers
from puna.model.calls import NotRepeatable
from puna.model.llama import Llama
from puna.parallel.inference import group_of

if TYPE_CHECKING:
    from puna.generate.engine.graphs import DecodeGraphs


class Runner:
    """Computes chunks.

    Args:
        model: on its device; ranks may share it.
        n_blocks: that keys and values are kept in.
        block_tokens: tokens of a block.
        choices: only ids below this are ever the likeliest.
        cache_dtype: "int8" or "fp8", which keys and values are kept in; None: as the model computes them.
        compile: on CUDA, compile the layers.

    Attributes:
        cache: the keys and values, this rank's heads.
    """

    def __init__(
        self,
        model: Llama,
        n_blocks: int,
        block_tokens: int,
        *,
        choices: int,
        cache_dtype: str | None = None,
        compile: bool = False,
    ) -> None:
        self._choices, self._device = choices, model.lm_head.weight.device
        group = group_of(model)
        self.cache = PagedCache(
            model.config,
            n_blocks,
            block_tokens,
            dtype=_kept_in(model, cache_dtype),
            device=self._device,
            tp_size=1 if group is None else group.size(),
        )
        self._network = network_of(model, self.cache, is_compiled=compile)
        with torch.accelerator.device_index(self._device.index):
            self._graphs = _graphs(self._network, self.cache, is_compiled=compile)

    def compute(self, chunks: list[Chunk]) -> "list[Logits | None]":
        """What stands behind each chunk's last tokens, as many as it may take; None where its prompt goes on.

        Args:
            chunks: single tokens first.
        """
        with torch.accelerator.device_index(self._device.index):  # Triton and graphs go by it; each thread has its own
            return self._compute(chunks)

    def _compute(self, chunks: list[Chunk]) -> "list[Logits | None]":
        if self._graphs is not None and self._graphs.takes(chunks):
            logits = Logits.of(self._graphs.logits(chunks), self._choices)
            ends = accumulate(map(len, chunks))
            return [logits.part(end - _wanted(chunk), _wanted(chunk)) for chunk, end in zip(chunks, ends, strict=True)]
        self.cache.step = Step.of(chunks, self.cache)
        ids = torch.tensor([id for chunk in chunks for id in chunk.ids])
        positions = torch.tensor([place for chunk in chunks for place in range(chunk.start, chunk.stop)])
        rows: list[int] = []
        parts: list[tuple[int, int]] = []  # of `rows`: where a chunk's begin, and how many they are
        end = 0
        for chunk in chunks:
            count = _wanted(chunk)
            end += len(chunk)
            parts.append((len(rows), count))
            rows += range(end - count, end)
        wanted = torch.tensor(rows or [0], device=self._device) if len(rows) < len(ids) else None
        hidden = self._network.hidden(ids.to(self._device), positions.to(self._device), self.cache, wanted)
        if not rows:
            return [None] * len(chunks)
        logits = Logits.of(self._network.head(hidden), self._choices)
        return [logits.part(start, count) if count else None for start, count in parts]


def _wanted(chunk: Chunk) -> int:
    """How many of a chunk's last tokens say what comes next: its newest, and the guesses behind it."""
    return min(1 + len(chunk.running.drafts), len(chunk)) if chunk.is_last else 0


def kept_bytes(model: Llama, cache_dtype: str | None) -> int:
    """Bytes of one token's keys and values in a runner, over all ranks that share the model."""
    return token_bytes(model.config, _kept_in(model, cache_dtype))


def activation_bytes(model: Llama) -> int:
    """Bytes that each token of a step takes while a layer computes it: in the gated MLP, where it takes most."""
    config, dtype = model.config, model.compute_dtype or model.lm_head.weight.dtype
    return (4 * config.intermediate_size + 3 * config.hidden_size) * dtype.itemsize


def _kept_in(model: Llama, cache_dtype: str | None) -> torch.dtype:
    weight = model.lm_head.weight
    return storage_dtype(cache_dtype, weight.device) or model.compute_dtype or weight.dtype


def _graphs(network: Network, cache: PagedCache, *, is_compiled: bool) -> "DecodeGraphs | None":
    """Recorded decoding steps, where the device has them, or our kernels compute all of them."""
    from puna.generate.engine.graphs import DecodeGraphs, RecordedSteps

    if takes_cuda_kernels(cache.device.type):
        return DecodeGraphs(network, cache, is_compiled=is_compiled)
    if not most_tokens(cache.keys.numbers):
        return None
    try:
        return RecordedSteps(network, cache)
    except NotRepeatable:
        return None


@dataclass
class Logits:
    """Logits (n, V) on the device, and the likeliest id of each row, which is asked for once for all.

    Attributes:
        drawn: the id of each row by the sampling of its sequence, where that was asked for on the device.
    """

    logits: Tensor
    likeliest: list[int]
    drawn: list[int] | None = None

    @classmethod
    def of(cls, logits: Tensor, choices: int) -> "Logits":
        """Of ids below `choices`; refuses what is no number."""
        best = logits[:, :choices].max(-1)
        numbers, ids = torch.stack([best.values.float(), best.indices.float()]).cpu()  # waits once; fp32 holds any id
        check_numbers(numbers)
        return cls(logits, ids.int().tolist())

    def part(self, start: int, count: int) -> "Logits":
        """Some of the rows."""
        return Logits(self.logits[start : start + count], self.likeliest[start : start + count])

    def row(self, number: int) -> Tensor:
        """One row on the CPU, in fp32."""
        return self.logits[number].float().cpu()

    def __len__(self) -> int:
        return len(self.likeliest)
