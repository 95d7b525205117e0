"""What a model's weights take on a rank: counted from their shapes, as `puna.model.split` and sharding cut them.

Four kinds of parts make up any stage: a layer, the embedding, the final norm and the head.
"""

import math
from dataclasses import dataclass

from puna.devices import page_locked
from puna.model.config import ModelConfig
from puna.model.optimizer_state import misfit, state_sizes
from puna.model.split import split_dim

Shape = tuple[int, ...]


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
        self._misfits: dict[int, str | None] = {}

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

    def misfit(self, tp: int) -> str | None:
        """Why the optimizer's state cannot be kept under so much tensor parallelism; None: it can."""
        if tp not in self._misfits:
            self._misfits[tp] = self._misfit(tp)
        return self._misfits[tp]

    def _misfit(self, tp: int) -> str | None:
        for name, shape in self._shapes["layer"].items():
            parts = tp if split_dim(name) == 1 else 1
            if reason := misfit(shape, self.state_bits, column_parts=parts):
                return f"optimizer.state_bits={self.state_bits}: {reason}"
        return None


def weight_shapes(config: ModelConfig) -> dict[str, dict[str, Shape]]:
    """Kind of part -> name of a weight -> its whole shape; layers are all alike, and named as the first."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q, d, config.attention_bias),
        "self_attn.k_proj": (kv, d, config.attention_bias),
        "self_attn.v_proj": (kv, d, config.attention_bias),
        "self_attn.o_proj": (d, q, config.attention_output_bias),
        "mlp.gate_proj": (f, d, config.mlp_bias),
        "mlp.up_proj": (f, d, config.mlp_bias),
        "mlp.down_proj": (d, f, config.mlp_bias),
    }
    layer: dict[str, Shape] = {}
    for name, (rows, columns, has_bias) in linears.items():
        layer[f"model.layers.0.{name}.weight"] = (rows, columns)
        if has_bias:
            layer[f"model.layers.0.{name}.bias"] = (rows,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        layer[f"model.layers.0.{name}.weight"] = (d,)
    head = {} if config.tie_word_embeddings else {"lm_head.weight": (v, d)}
    return {
        "layer": layer,
        "embedding": {"model.embed_tokens.weight": (v, d)},
        "norm": {"model.norm.weight": (d,)},
        "head": dict(head),
    }


def _cut(name: str, shape: Shape, tp: int) -> Shape:
    """The shape of one tensor parallel rank's part."""
    dim = split_dim(name)
    return shape if dim is None else tuple(size // tp if i == dim else size for i, size in enumerate(shape))
