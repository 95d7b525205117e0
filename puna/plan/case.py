"""One case to judge: a recipe under a layout, in the numbers that memory and time depend on."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from puna.config import Recipe
from puna.model.config import ModelConfig
from puna.parallel.layout import Layout
from puna.plan.weights import Weights

#: Modes of the recipe's `recompute`.
RECOMPUTE = ("none", "selective", "block", "offload")


@dataclass(frozen=True)
class Recompute:
    """What is computed again.

    Attributes:
        mode: the recipe's `recompute`.
        layers: how many of each stage, the first ones; None: all.
    """

    mode: str
    layers: int | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """What a recipe says of it."""
        return {"recompute": self.mode, "recompute_layers": self.layers}


@dataclass(frozen=True, eq=False)
class Case:
    """A recipe under a layout.

    Attributes:
        recipe: its precision is settled, not "auto".
        is_cpu: whether a CPU computes: smaller pieces, gradients that have nowhere to go, packed attention joined.
        has_update_kernel: whether the optimizer's update is one kernel, which needs no memory of its own.
    """

    recipe: Recipe
    config: ModelConfig
    layout: Layout
    weights: Weights
    is_cpu: bool = False
    has_update_kernel: bool = False

    @cached_property
    def recompute(self) -> Recompute:
        """What the recipe computes again."""
        return Recompute(self.recipe.recompute, self.recipe.recompute_layers)

    def layers_again(self, recompute: Recompute, size: int) -> int:
        """How many of a stage of `size` layers compute again, as `puna.model.recompute` prepares them."""
        if recompute.mode == "none" or (recompute.mode == "selective" and self.recipe.compile):
            return 0
        return size if recompute.layers is None else min(recompute.layers, size)

    @cached_property
    def compute_bytes(self) -> int:
        """Bytes of a number of the activations."""
        return 4 if self.recipe.precision == "fp32" else 2

    @cached_property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a rank, before tensor parallel ranks share them."""
        return self.recipe.micro_batch_rows * self.recipe.sequence_length // self.layout.cp

    @cached_property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states of a micro-batch's tokens on a rank."""
        return self.compute_bytes * self.tokens * self.config.hidden_size

    @cached_property
    def stream_bytes(self) -> float:
        """Bytes of those hidden states that a tensor-parallel rank holds between the matrices."""
        return self.hidden_bytes / self.layout.tp

    @cached_property
    def widths(self) -> tuple[int, int, int]:
        """Widths of queries, of keys, and of the MLP on a rank."""
        c, tp = self.config, self.layout.tp
        return (
            c.num_attention_heads * c.head_dim // tp,
            c.num_key_value_heads * c.head_dim // tp,
            c.intermediate_size // tp,
        )

    @cached_property
    def is_sharded(self) -> bool:
        """Whether weights are gathered before use, in the compute dtype."""
        return self.layout.is_sharded

    @cached_property
    def uses_gradients_at_once(self) -> bool:
        """Whether the backward pass itself updates the weights."""
        optimizer = self.recipe.optimizer
        return optimizer.in_backward and optimizer.max_grad_norm is None and self.layout.micro_batches == 1

    @cached_property
    def has_gradients_on_host(self) -> bool:
        """Whether gradients wait in host memory for the update: they leave the device, and are not used at once."""
        return self.recipe.optimizer.in_backward and not self.uses_gradients_at_once and not self.is_cpu

    @cached_property
    def exchanges_heads(self) -> bool:
        """Whether context parallel ranks exchange tokens for heads rather than gather keys and values."""
        c, layout = self.config, self.layout
        return c.num_key_value_heads // layout.tp % layout.cp == 0

    @cached_property
    def most_layers(self) -> int:
        """Layers of the first pipeline rank, which has as many as any."""
        return sum(self.first_stages)

    @cached_property
    def first_stages(self) -> list[int]:
        """Layers of each stage of the first pipeline rank, the largest stage first."""
        return self.stages_of(0)

    @cached_property
    def stage_sizes(self) -> list[int]:
        """Layers of every stage, in their order."""
        return [len(layers) for layers in self.layout.stage_layers(self.config.num_hidden_layers)]

    def stages_of(self, rank: int) -> list[int]:
        """Layers of each stage that a pipeline rank holds."""
        return self.stage_sizes[rank :: self.layout.pp]

    @cached_property
    def gathers(self) -> int:
        """How often a step gathers the sharded weights of a layer.

        A pipeline leaves them whole from a backward pass to the next forward pass.
        """
        m, reshards = self.layout.micro_batches, self.recipe.parallel.reshards
        if self.layout.pp == 1:
            return 2 * m if reshards else m
        return m + 1 if reshards else 1

    @cached_property
    def sums(self) -> int:
        """How often a step sums gradients over the shards; in a pipeline once, after the last micro-batch."""
        return self.layout.micro_batches if self.layout.pp == 1 else 1

    def in_flight(self, rank: int) -> int:
        """The most activations that a pipeline rank holds at a time, counted in micro-batches of one stage.

        Source: torch's Schedule1F1B, ScheduleInterleaved1F1B and ScheduleInterleavedZeroBubble (their warm-up).
        """
        layout, schedule = self.layout, self.recipe.parallel.schedule
        if layout.pp == 1:
            return 1
        left = layout.pp - 1 - rank
        before = (layout.stages_per_rank - 1) * layout.pp
        ahead = {"1f1b": left, "interleaved": 2 * left + before, "zero-bubble": left + rank + before}[schedule]
        return min(layout.micro_batches * layout.stages_per_rank, ahead + 1)
