"""A layout: how many devices each axis has, checked against the model and the batch before anything starts.

    devices = pp x dp_replicate x dp_shard x cp x tp          tp changes fastest: neighbours share every matrix

Rows are shared by dp_replicate x dp_shard ranks, a row's tokens by cp, and weights are sharded over dp_shard x cp. No
torch is needed to think about it: `puna plan` checks thousands of layouts, and a recipe is refused before torch loads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from puna.config import Recipe
from puna.errors import UsageError
from puna.model.config import ModelConfig
from puna.model.optimizer_state import state_misfit
from puna.model.split import divisors, split_misfit

#: Names of the axes, outermost first.
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Layout:
    """The size of every axis, and what follows from them for one recipe.

    Attributes:
        stages_per_rank: runs of layers that each pipeline rank holds.
        rows_per_rank: rows of the global batch that each of the `dp_size` shares reads.
        micro_batches: how many pieces a rank cuts them into.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    stages_per_rank: int = 1
    rows_per_rank: int = 1
    micro_batches: int = 1

    @classmethod
    def of(cls, recipe: Recipe, config: ModelConfig, devices: int) -> "Layout":
        """The layout of a recipe on so many devices.

        Raises:
            UsageError: it cannot be; the message says which field is wrong and which values would do.
        """
        p = recipe.parallel
        fixed = p.pp * p.dp_replicate * p.cp * p.tp
        dp_shard = devices // fixed if p.dp_shard == "auto" else p.dp_shard
        if fixed * dp_shard != devices:
            factors = " x ".join(f"{axis} {getattr(p, axis)}" for axis in AXES)
            needed = max(1, dp_shard) * fixed
            raise UsageError(
                f"parallel: {factors} does not make the {devices} devices there are; start {needed} processes "
                f"(--nproc {needed}, or puna launch for several machines), or use parallel.dp_shard=auto and axes "
                f"whose product divides {devices}"
            )
        layout = cls(p.pp, p.dp_replicate, dp_shard, p.cp, p.tp, p.stages_per_rank)
        reasons = list(layout._misfits(recipe, config))
        if reasons:
            raise UsageError("; ".join(reasons))
        rows = recipe.batch_rows // layout.dp_size
        return cls(*layout.sizes, p.stages_per_rank, rows, rows // recipe.micro_batch_rows)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Sizes in the order of AXES."""
        return (self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp)

    @property
    def devices(self) -> int:
        """All of them."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp_size(self) -> int:
        """Shares that the global batch's rows are cut into."""
        return self.dp_replicate * self.dp_shard

    @property
    def shard_size(self) -> int:
        """Ranks that a weight is sharded over, besides tp and pp."""
        return self.dp_shard * self.cp

    @property
    def is_sharded(self) -> bool:
        """Whether ranks that read other tokens share weights or have replicas: `fully_shard` then holds them."""
        return self.shard_size * self.dp_replicate > 1

    @property
    def stages(self) -> int:
        """Pipeline stages over all ranks."""
        return self.pp * self.stages_per_rank

    @property
    def casts_once(self) -> bool:
        """Whether layers that keep their cast weights have them from the first micro-batch of an update to the last.

        Where ranks share the weights, `fully_shard` casts what it gathers.
        """
        return self.devices == 1 and self.micro_batches > 1

    def stage_layers(self, n_layers: int) -> list[range]:
        """The layers of each stage; the first ones hold one more where they do not divide evenly."""
        share, more = divmod(n_layers, self.stages)
        ends = [share * (i + 1) + min(i + 1, more) for i in range(self.stages)]
        return [range(end - share - (i < more), end) for i, end in enumerate(ends)]

    def __str__(self) -> str:
        sizes = [f"{axis} {size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        return " x ".join(sizes) or "one device"

    def _misfits(self, recipe: Recipe, config: ModelConfig) -> Iterator[str]:
        """What is wrong with this layout, a sentence each."""
        if recipe.sequence_length > config.max_position_embeddings:
            yield (
                f"sequence_length={recipe.sequence_length} is beyond the model's context of "
                f"{config.max_position_embeddings} (max_position_embeddings); use that or less"
            )
        state_bits = recipe.optimizer.state_bits
        if reason := split_misfit(config, self.tp, "parallel.tp") or state_misfit(config, state_bits, self.tp):
            yield reason
        parts = self.cp * self.tp * (2 if self.cp > 1 else 1)
        if recipe.sequence_length % parts:
            below = recipe.sequence_length // parts * parts
            yield (
                f"sequence_length={recipe.sequence_length} must be a multiple of {parts} for parallel.cp={self.cp} and "
                f"parallel.tp={self.tp}; use {below or parts} or {below + parts}"
            )
        yield from self._pipeline_misfits(recipe, config)
        largest = -(-config.num_hidden_layers // self.stages)
        if (recipe.recompute_layers or 0) > largest:
            yield (
                f"recompute_layers={recipe.recompute_layers} is more than the {largest} layers of a stage; use "
                f"{largest} or less, or null for all"
            )
        if recipe.batch_rows % self.dp_size:
            shares = ", ".join(map(str, divisors(recipe.batch_rows)))
            yield (
                f"the {recipe.batch_rows} rows of a batch cannot be shared by dp_replicate x dp_shard = {self.dp_size} "
                f"ranks; use one of {shares} ranks, or batch_tokens in multiples of "
                f"{recipe.sequence_length * self.dp_size}"
            )
        elif (rows := recipe.batch_rows // self.dp_size) % recipe.micro_batch_rows:
            yield (
                f"micro_batch_rows={recipe.micro_batch_rows} must divide the {rows} rows of a rank "
                f"(dp_replicate x dp_shard = {self.dp_size}); use one of {divisors(rows)}"
            )
        elif self.pp > 1 and (needed := self._micro_batches_needed(recipe, rows // recipe.micro_batch_rows)):
            yield needed

    def _pipeline_misfits(self, recipe: Recipe, config: ModelConfig) -> Iterator[str]:
        p = recipe.parallel
        if self.stages > config.num_hidden_layers:
            yield (
                f"parallel.pp={self.pp} x stages_per_rank={self.stages_per_rank} makes more stages than the "
                f"{config.num_hidden_layers} layers; use {config.num_hidden_layers // self.stages_per_rank} or less"
            )
        if self.pp == 1 and self.stages_per_rank > 1:
            yield f"parallel.stages_per_rank={self.stages_per_rank} needs parallel.pp of 2 or more"
        if self.pp > 1 and (p.schedule == "1f1b") != (self.stages_per_rank == 1):
            wanted = "1" if p.schedule == "1f1b" else "2 or more"
            yield f"parallel.schedule={p.schedule} needs stages_per_rank of {wanted}, not {self.stages_per_rank}"
        if self.pp > 1 and config.tie_word_embeddings:
            yield "parallel.pp must be 1: the model's head is its embedding, which two stages cannot share"
        if p.schedule == "zero-bubble" and recipe.compile:
            yield "parallel.schedule=zero-bubble does not work with compile=true; use interleaved, or compile=false"
        if p.schedule == "zero-bubble" and recipe.recompute != "none":
            yield (
                "parallel.schedule=zero-bubble computes two backward passes and cannot recompute; use interleaved, or "
                "recompute=none"
            )
        if self.pp > 1 and p.schedule == "zero-bubble" and not self.is_sharded:
            # the second backward pass adds to .grad with no hook called; from there fully_shard takes what it reduces
            if recipe.precision == "bf16-pure":
                yield (
                    "parallel.schedule=zero-bubble sums gradients in bf16 under precision=bf16-pure where no other "
                    "ranks have the stage; use interleaved, or precision=bf16"
                )
            if recipe.optimizer.in_backward:
                yield (
                    "parallel.schedule=zero-bubble keeps gradients on the device where no other ranks have the stage; "
                    "use interleaved, or optimizer.in_backward=false"
                )

    def _micro_batches_needed(self, recipe: Recipe, micro_batches: int) -> str | None:
        if self.stages_per_rank > 1 and micro_batches % self.pp:
            return (
                f"parallel.schedule={recipe.parallel.schedule} needs micro-batches in multiples of pp={self.pp}, not "
                f"{micro_batches}; change micro_batch_rows or batch_tokens"
            )
        if micro_batches < self.pp:
            return (
                f"{micro_batches} micro-batches cannot fill a pipeline of parallel.pp={self.pp}; make micro_batch_rows "
                f"smaller, batch_tokens larger, or use pp={micro_batches} or less"
            )
        return None
