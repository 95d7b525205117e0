"""A model under a layout: what this rank holds of it, and how micro-batches pass through it.

Order of the ways, each of which leaves the network's code alone: pipeline stages -> tensor parallel -> context parallel
-> what the caller does to layers (recomputation, compilation) -> sharding. Everything is built without memory; then the
rank's own parts are allocated and filled. One rank alone casts once an update what sharding would have cast.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from puna.config import Parallel
from puna.data.loader import Batch
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.parallel.casts import Casts
from puna.parallel.context import share_tokens, token_indices
from puna.parallel.layout import Layout
from puna.parallel.mesh import Ranks
from puna.parallel.pipeline import check_schedule, make_schedule
from puna.parallel.shared_memory import share_through_memory
from puna.parallel.stage import Stage
from puna.parallel.tensor import gather_tokens, split_weights
from puna.progress import still_at_work

#: Does what it will to the layers of a network, and returns those that keep what they compute for the backward pass.
Prepare = Callable[[Llama], Iterable[nn.Module]]


class Whole(Protocol):
    """A whole weight, of which parts are taken: a tensor, or one that is stored."""

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor:
        """The values of a part."""


#: (hidden (B, T, D), head (V or V / tp, D), targets (B, T)) -> a scalar whose gradient is wanted.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class DistributedModel:
    """What one rank holds of a model.

    Args:
        stages: the runs of layers that the rank holds.
        ranks: who shares the model.
        settings: how it is shared, beyond the axes' sizes.
        device: of this rank.

    Attributes:
        weights: name -> weight; DTensors where they are shared.
    """

    def __init__(self, stages: list[Stage], ranks: Ranks, settings: Parallel, device: torch.device) -> None:
        self.stages, self.ranks, self.settings, self.device = stages, ranks, settings, device
        self.config = stages[0].llama.config
        self.weights = {name: weight for stage in stages for name, weight in stage.weights().items()}
        self.dtype = stages[0].llama.compute_dtype or next(iter(self.weights.values())).dtype
        #: Whether replicas of the weights sum their gradients in the last micro-batch alone, or in each.
        self.sums_replicas_once = True
        self._casts = Casts([], self.dtype)
        self._schedules: dict[tuple[int, int], Any] = {}

    @classmethod
    def alone(cls, model: Llama) -> "DistributedModel":
        """A whole model on its device, shared with no one."""
        layers = range(model.config.num_hidden_layers)
        ranks = Ranks(Layout(), None, None, None)
        return cls([Stage(model, layers)], ranks, Parallel(), model.lm_head.weight.device)

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        ranks: Ranks,
        settings: Parallel,
        device: torch.device,
        *,
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None = None,
        prepare: Prepare = lambda model: model.model.layers,
    ) -> "DistributedModel":
        """Makes a rank's share of a model; its weights are allocated and unfilled.

        Args:
            config: of the whole model.
            ranks: who shares it.
            settings: how it is shared, beyond the axes' sizes.
            device: of this rank.
            dtype: of the weights that are trained.
            compute_dtype: of activations and products; None: that of the weights.
            prepare: is given each stage's network before its weights are sharded.

        Raises:
            UsageError: the pipeline's schedule needs another version of torch.
        """
        if ranks.layout.pp > 1:
            check_schedule(settings.schedule)
        layers = ranks.layout.stage_layers(config.num_hidden_layers)
        stages: list[Stage] = []
        keeping: list[nn.Module] = []
        for number in range(ranks.pp_rank, ranks.layout.stages, ranks.layout.pp):
            with torch.device("meta"):
                stage = Stage(Llama(config).to(dtype), layers[number])
            stage.llama.compute_dtype = compute_dtype
            keeping += _share(stage, ranks, settings, prepare)
            stage.to_empty(device=device)
            if config.tie_word_embeddings:
                stage.llama.lm_head.weight = stage.llama.model.embed_tokens.weight
            stages.append(stage)
        model = cls(stages, ranks, settings, device)
        if compute_dtype not in (None, dtype) and ranks.layout.casts_once:
            model._casts = Casts(keeping, model.dtype)
        return model

    @torch.no_grad()
    def fill(self, whole: Callable[[str, tuple[int, ...]], Whole]) -> None:
        """Fills the weights.

        Args:
            whole: gives a whole weight by name and shape, of which this rank's part is taken.
        """
        for name, weight in self.weights.items():
            part = weight.to_local() if isinstance(weight, DTensor) else weight
            if part.numel():
                part.copy_(whole(name, tuple(weight.shape))[_index_of_part(weight)])

    def forward_backward(self, batch: Batch, loss: Loss, *, micro_batch_rows: int) -> float:
        """Adds the gradients of `loss` over this rank's rows to the weights' gradients.

        Args:
            batch: whole rows of this rank; it takes its own tokens of them.
            loss: what to differentiate; summed over micro-batches.
            micro_batch_rows: rows that go through at once.

        Returns:
            The sum that `loss` gave over this rank's tokens; 0 on ranks without the last pipeline stage.
        """
        self._casts.refresh()
        if self.ranks.layout.pp > 1:
            return self._run_pipeline(batch, loss, micro_batch_rows, with_backward=True)
        total = torch.zeros((), device=self.device)
        starts = range(0, len(batch.tokens), micro_batch_rows)
        for start in starts:
            self._sync_replicas(when=start == starts[-1])
            share = self._loss_of(batch[start : start + micro_batch_rows], loss)
            share.backward()
            total += share.detach()
            still_at_work()
        return total.item()

    @torch.no_grad()
    def evaluate(self, batch: Batch, loss: Loss, *, micro_batch_rows: int) -> float:
        """The sum of `loss` over this rank's tokens, as `forward_backward` returns it; no gradients."""
        self._casts.refresh()
        with self._evaluating():
            if self.ranks.layout.pp > 1:
                return self._run_pipeline(batch, loss, micro_batch_rows, with_backward=False)
            starts = range(0, len(batch.tokens), micro_batch_rows)
            return sum(self._loss_of(batch[i : i + micro_batch_rows], loss).item() for i in starts)

    def _loss_of(self, batch: Batch, loss: Loss) -> Tensor:
        tokens, targets, positions, numbers = self._tensors(batch)
        return self._head_loss(self.stages[-1](tokens, positions, numbers), targets, loss)

    def _head_loss(self, hidden: Tensor, targets: Tensor, loss: Loss) -> Tensor:
        head = self.stages[-1].llama.lm_head.weight
        hidden = gather_tokens(hidden, self.ranks.tp)
        return loss(hidden, head.to_local() if isinstance(head, DTensor) else head, targets)

    def _tensors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, targets and positions of this rank, (B, T / cp), and the document numbers of whole rows."""
        layout = self.ranks.layout
        own: Any = slice(None)
        if layout.cp > 1:
            own = token_indices(batch.tokens.shape[1], layout.cp, self.ranks.cp_rank)
        tokens, targets, positions = (
            torch.from_numpy(np.ascontiguousarray(field[:, own], dtype=np.int64)).to(self.device)
            for field in (batch.tokens, batch.targets, batch.positions)
        )
        return tokens, targets, positions, torch.from_numpy(np.ascontiguousarray(batch.documents))

    def _run_pipeline(self, batch: Batch, loss: Loss, micro_batch_rows: int, *, with_backward: bool) -> float:
        tokens, targets, positions, numbers = self._tensors(batch)
        shape = (micro_batch_rows, tokens.shape[1])
        n_micro_batches = len(tokens) // micro_batch_rows
        schedule = self._schedule(shape, n_micro_batches)
        self._loss = loss
        losses: list[Tensor] = []
        is_first = any(stage.is_first for stage in self.stages)
        is_last = any(stage.is_last for stage in self.stages)
        run = schedule.step if with_backward else schedule.eval
        options = {"return_outputs": False} if with_backward else {}
        run(
            *((tokens,) if is_first else ()),
            target=targets if is_last else None,
            losses=losses if is_last else None,
            positions=positions,
            numbers=numbers,
            **options,
        )
        return float(sum(each.detach().item() for each in losses))

    def _schedule(self, shape: tuple[int, int], n_micro_batches: int) -> Any:
        key = (shape[0], n_micro_batches)
        if key not in self._schedules:
            self._schedules[key] = make_schedule(
                self.stages,
                self.ranks,
                self.settings.schedule,
                shape=shape,
                dtype=self.dtype,
                device=self.device,
                n_micro_batches=n_micro_batches,
                loss=lambda hidden, targets: self._head_loss(hidden, targets, self._loss),
            )
        return self._schedules[key]

    def _sync_replicas(self, *, when: bool) -> None:
        """Gradients are summed over dp_replicate in the last micro-batch alone."""
        if self.ranks.layout.dp_replicate > 1 and self.sums_replicas_once:
            for stage in self.stages:
                stage.set_requires_all_reduce(when)  # type: ignore[operator]

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        for stage in self.stages:
            stage.eval()
        yield
        for stage in self.stages:
            stage.train()
            if isinstance(stage, FSDPModule):
                stage.reshard()  # the head stayed whole for a backward pass that does not come


def _share(stage: Stage, ranks: Ranks, settings: Parallel, prepare: Prepare) -> Iterable[nn.Module]:
    if ranks.tp is not None:
        assert ranks.weights is not None
        split_weights(stage.llama, ranks.weights["tp"])
    if ranks.cp is not None:
        share_tokens(stage.llama, ranks.cp)
    keeping = prepare(stage.llama)
    if ranks.layout.is_sharded:
        _shard(stage, ranks, settings)
    return keeping


def _shard(stage: Stage, ranks: Ranks, settings: Parallel) -> None:
    """Shards weights over the ranks that read other tokens: layers in units of their own, the rest together."""
    assert ranks.weights is not None
    axes = ("dp_replicate", "shard") if ranks.layout.dp_replicate > 1 else "shard"
    policy = MixedPrecisionPolicy(
        param_dtype=stage.llama.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    options: dict[str, Any] = {"mesh": ranks.weights[axes], "mp_policy": policy}
    layers, size = list(stage.llama.model.layers), settings.layers_per_unit
    for start in range(0, len(layers), size):
        unit = layers[start : start + size]
        fully_shard(unit if size > 1 else unit[0], reshard_after_forward=settings.reshards, **options)
    fully_shard(stage, reshard_after_forward=False, **options)  # the loss needs the head once the stage has run
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are divided by the global number of targets: sum them
            module.set_force_sum_reduction_for_comms(True)
            if ranks.memory is not None:
                # pipelines sum the gradients of micro-batches first, in fp32
                formed = policy.param_dtype if ranks.layout.pp == 1 else None
                share_through_memory(module, ranks.memory, formed)


def _index_of_part(weight: Tensor) -> tuple[slice, ...]:
    """Where in a whole weight lies what this rank holds of it."""
    if not isinstance(weight, DTensor):
        return tuple(slice(None) for _ in weight.shape)
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
