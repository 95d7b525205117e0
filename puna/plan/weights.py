"""What a model's weights take on a rank: counted from their shapes, as `puna.model.split` and sharding cut them.

Four kinds of parts make up any stage: a layer, the embedding, the final norm and the head.
"""

import math
from dataclasses import dataclass

from puna.devices import page_locked
from puna.model.config import ModelConfig
from puna.model.optimizer_state import state_sizes
from puna.model.shapes import Shape, weight_shapes
from puna.model.split import split_dim


@dataclass(frozen=True)
class Part:
    """A part of the model on the rank that holds most of it.

    Attributes:
        gathered: numbers once the shards are gathered; tensor parallel ranks still share them.
        own: numbers that the rank keeps.
        largest: numbers of the largest weight that it keeps.
        state: bytes of the optimizer's state of its numbers.
        locked, locked_state: bytes of page-locked memory that copies of weights and of state take.
    """

    gathered: int
    own: int
    largest: int
    state: int
    locked: int
    locked_state: int


class Weights:
    """The weights of one model and what is kept of each.

    Args:
        config: shape of the model.
        weight_bytes: of a number: 4, or 2 under bf16-pure.
        state_bits: of the optimizer's state.
    """

    def __init__(self, config: ModelConfig, *, weight_bytes: int, state_bits: int) -> None:
        self.config, self.weight_bytes, self.state_bits = config, weight_bytes, state_bits
        self._shapes = weight_shapes(config)
        self._parts: dict[tuple[str, int, int], Part] = {}
        self._all_parts: dict[tuple[int, int], dict[str, Part]] = {}

    def part(self, kind: str, tp: int, shards: int) -> Part:
        """The part called "layer", "embedding", "norm" or "head", cut by `tp` and then into `shards`."""
        key = (kind, tp, shards)
        if key not in self._parts:
            cut = [_cut(name, shape, tp) for name, shape in self._shapes[kind].items()]
            own = [(math.ceil(shape[0] / shards), *shape[1:]) for shape in cut]
            dtype = "float32" if self.weight_bytes == 4 else "bfloat16"
            kept = [size for shape in own for size in state_sizes(shape, self.state_bits, weight_dtype=dtype)]
            self._parts[key] = Part(
                gathered=sum(map(math.prod, cut)),
                own=sum(map(math.prod, own)),
                largest=max(map(math.prod, own), default=0),
                state=sum(kept),
                locked=sum(page_locked(self.weight_bytes * math.prod(shape)) for shape in own),
                locked_state=sum(map(page_locked, kept)),
            )
        return self._parts[key]

    def parts(self, tp: int, shards: int) -> dict[str, Part]:
        """Every kind of part, cut by `tp` and then into `shards`."""
        key = (tp, shards)
        if key not in self._all_parts:
            self._all_parts[key] = {kind: self.part(kind, tp, shards) for kind in self._shapes}
        return self._all_parts[key]

    @property
    def checkpoint_bytes(self) -> int:
        """Of all weights and of their state, which is what a checkpoint holds."""
        times = {"layer": self.config.num_hidden_layers}
        parts = self.parts(1, 1).items()
        return sum(times.get(kind, 1) * (self.weight_bytes * part.own + part.state) for kind, part in parts)


def _cut(name: str, shape: Shape, tp: int) -> Shape:
    """The shape of one tensor parallel rank's part."""
    dim = split_dim(name)
    return shape if dim is None else tuple(size // tp if i == dim else size for i, size in enumerate(shape))
