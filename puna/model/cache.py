"""The keys and values of tokens already seen, so that each is computed once.

Slot s of a row holds the token at position s of that row: a row that is shorter than its batch writes padding behind
its end, which no query sees and the next real token overwrites.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from puna.model.attention import attend_cached
from puna.model.config import ModelConfig


class LayerCache(Protocol):
    """What one layer kept."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Keeps new keys and values, and lets the queries see them and all that was kept before.

        Args:
            q: (B, T, N, H).
            k, v: (B, T, K, H).
            positions: (B, T) of these tokens.

        Returns:
            (B, T, N, H).
        """


class Cache(Protocol):
    """What the network asks of a cache."""

    def make_room(self, positions: Tensor) -> None:
        """Is told the positions (B, T) of the tokens that come, before the first layer."""

    def layer(self, index: int) -> LayerCache:
        """What layer `index` kept."""


class KVCache:
    """Keys and values of a batch, (layers, B, capacity, K, H) each, allocated once.

    Args:
        config: shape of the model.
        batch: B.
        capacity: most tokens a row can hold.
        dtype: of the keys and values, that of the model's activations.
        device: where they live.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        #: Slots in use by the longest row; attention looks no further.
        self.used = 0

    def make_room(self, positions: Tensor) -> None:
        """Counts the slots in use once `positions` (B, T) are written.

        Raises:
            ValueError: a position lies beyond the capacity.
        """
        self.used = max(self.used, int(positions.max()) + 1)
        if self.used > self.capacity:
            raise ValueError(f"position {self.used - 1} does not fit a cache of {self.capacity} slots")

    def layer(self, index: int) -> "_Layer":
        """What layer `index` kept."""
        return _Layer(self, index)

    def keep_rows(self, rows: list[int]) -> None:
        """Forgets all rows but these, which become rows 0, 1, 2 and so on."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values, over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


@dataclass(frozen=True)
class _Layer:
    """One layer of a `KVCache`."""

    cache: KVCache
    index: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        cache, rows = self.cache, torch.arange(len(positions), device=positions.device)[:, None]
        keys, values = cache.keys[self.index], cache.values[self.index]
        keys[rows, positions], values[rows, positions] = k, v
        return attend_cached(q, keys[:, : cache.used], values[:, : cache.used], positions)
