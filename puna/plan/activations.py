"""What the layers of a pipeline stage keep for the backward pass, and what is left of it from layer to layer.

What autograd keeps of each operation is read off `puna.model.llama`, in bytes a token.
"""

from dataclasses import dataclass
from functools import cache, cached_property

from puna.plan.case import Case


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that a layer's activations take for one micro-batch.

    Attributes:
        kept: from the forward to the backward pass.
        formed: by the backward pass before it begins, and dropped after.
        cast: bf16 casts of weights, kept with `kept` or formed with `formed`.
    """

    kept: float
    formed: float
    cast: float


def layer_bytes(case: Case, mode: str) -> LayerBytes:
    """What autograd keeps of a layer, by operation, under a mode of the recipe's `recompute`."""
    R, c, tp = case.tokens, case.compute_bytes, case.layout.tp
    D, (Q, K, F) = case.config.hidden_size, case.widths
    stream = c * D / tp  # the layer's input, the output of a norm before tokens are gathered
    keys = c * K * (1 if case.exchanges_heads else case.layout.cp)
    is_compiled = case.recipe.compile  # keeps inputs and results of products, and forms again what lies between them
    norm = stream + c * D  # normed (compiled: its input), times its weight: gathered where tokens are shared
    norm += 0 if is_compiled else 4 * D / tp  # its input in fp32
    out, lse = c * Q, 4 * case.config.num_attention_heads / tp
    again = out if case.is_cpu or case.layout.cp > 1 else 0  # documents joined, or exchanged back
    attention = c * Q + 2 * keys + out + lse + again
    mlp = (3 if is_compiled else 4) * c * F  # gate, up, their product; its silu
    everything = 2 * norm + attention + mlp
    cast = 0 if c == case.weights.weight_bytes or case.is_sharded else c * case.weights.part("layer", tp, 1).gathered
    is_input_kept = stream if c == 4 or is_compiled else 0  # in bf16 the norm keeps its input in fp32, beside
    if mode == "none":
        return LayerBytes(everything * R, 0, cast)
    if mode == "offload" and not case.is_cpu:
        return LayerBytes(0, (everything - is_input_kept + stream) * R, cast)
    if mode in ("block", "offload"):
        return LayerBytes(stream * R, (everything - is_input_kept) * R, cast)
    products = c * (Q + 2 * K) + 2 * c * D + 2 * c * F  # q, k, v; o and down, not yet summed over ranks; gate, up
    same = c * K + out + lse + 2 * c * F  # v, attention, gate and up are what is kept already
    dropped = c * (Q + K) + c * D  # q, k and o have served when their products are there
    formed = everything - is_input_kept - same - dropped
    return LayerBytes((stream + products + out + lse) * R, max(0, formed) * R, cast)


class Layers:
    """The layers of a rank's largest stage: the first ones recompute, and so come last in the backward pass.

    Args:
        keeping: a layer that does not recompute.
        again: one that does.
        size: how many there are.
        n_again: how many of them recompute.
        leaving: bytes on their way to the host.
        casts_once: cast weights of layers that do not recompute are there for the whole step.
    """

    def __init__(
        self, keeping: LayerBytes, again: LayerBytes, size: int, n_again: int, leaving: float, *, casts_once: bool
    ) -> None:
        self.keeping, self.again, self.leaving = keeping, again, leaving
        self.size, self.n_keeping = size, size - n_again
        #: Cast weights that are always there.
        self.always_cast = keeping.cast * self.n_keeping if casts_once else 0.0
        self.kept = self.n_keeping * keeping.kept + n_again * again.kept

    @cached_property
    def turns(self) -> list[tuple[int, float, float]]:
        """Layers that have been through the backward pass, activations left, and what the next one computes anew."""
        turns = []
        for done in _turns(self.size, self.n_keeping):
            if done < self.n_keeping:
                turns.append((done, self.kept - done * self.keeping.kept, self.keeping.formed))
            else:
                turns.append((done, (self.size - done) * self.again.kept, self.again.formed))
        return turns

    def cast(self, n: int, done: int) -> float:
        """Cast weights when the `n`-th micro-batch in flight has so many layers behind it, and begins the next."""
        if self.always_cast:
            return self.always_cast + self.again.cast * (done >= self.n_keeping)
        if done < self.n_keeping:
            return self.keeping.cast * (n * self.n_keeping - done)
        return self.keeping.cast * (n - 1) * self.n_keeping + self.again.cast


@cache
def _turns(size: int, first: int) -> list[int]:
    """Layers behind those whose backward pass may be the fullest moment: of a stage's ends and of both its kinds."""
    return sorted({0, 1, size - 1, first, first + 1} & set(range(size)))
