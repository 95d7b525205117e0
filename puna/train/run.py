"""A training run: from a recipe to a folder that holds the run.

    run_dir/recipe.yaml     the resolved recipe
            metrics.jsonl   one JSON object a step
            tokenizer/      the tokenizer of the data
            checkpoints/    step-00000100/ …

Training on an existing folder continues it from its newest sound checkpoint as if it had never stopped: everything that
happens at a step is a function of the recipe, the step and the state saved. So numbers are the same to the last bit
where the device's kernels give the same bits twice, as those of CPUs do; flash attention's backward pass on CUDA adds
in no fixed order.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puna import devices
from puna.checkpoint.huggingface import fit
from puna.checkpoint.manifest import read_meta
from puna.checkpoint.runs import Checkpoints, checkpoints
from puna.checkpoint.weights import open_weights
from puna.config import Recipe, load_recipe
from puna.data.loader import Batch, shuffled, stack
from puna.data.rows import Row
from puna.errors import PunaError, Stopped
from puna.files import file_aside, folder_aside, write_json
from puna.model.attention import Documents, way_of_attention
from puna.model.config import ModelConfig
from puna.model.flops import attended_length, flops_per_token
from puna.model.llama import initial_weight
from puna.parallel.collectives import all_max
from puna.parallel.layout import Layout
from puna.parallel.mesh import Ranks, is_first_rank, process_group, rank_device, world_size
from puna.parallel.model import Whole
from puna.progress import Progress, say
from puna.train.build import build
from puna.train.claim import Claim, only_run_in
from puna.train.continuing import (
    RECIPE,
    check_checkpoint,
    check_presence,
    check_recipe,
    check_tokenizer,
    config_of_run,
    new_run_from,
    recipe_before,
)
from puna.train.inputs import check_compiler, check_data, open_data, open_loader, verified_data, weights_folder
from puna.train.loss import IGNORE
from puna.train.metrics import Metrics
from puna.train.out_of_memory import check_host_memory, explained
from puna.train.schedule import learning_rate
from puna.train.step import summed_loss, train_step
from puna.train.stopping import stop_signals

#: Steps in a row that may be skipped because loss or gradient is not finite; one more stops the run.
MAX_SKIPPED = 3


def run(recipe: Recipe) -> dict[str, Any]:
    """Does what `puna.train` promises, for a recipe that has been checked."""
    device = rank_device(devices.pick_device(None if recipe.device == "auto" else recipe.device))
    if device.type == "cpu":
        devices.keep_freed_memory()
    with process_group(device):
        check_compiler(recipe, device)
        run_dir = Path(recipe.run_dir)
        before = recipe_before(run_dir)
        asked = before.precision if before is not None and recipe.precision == "auto" else recipe.precision
        recipe = recipe.model_copy(update={"precision": _precision(asked, device)})
        config = config_of_run(recipe, run_dir)
        layout = Layout.of(recipe, config, world_size())
        if device.type == "cpu":
            check_host_memory(recipe, config, layout)
        with only_run_in(run_dir) as claim:
            check_presence(run_dir, (before or recipe).checkpoint.every)
            if before is not None:
                check_recipe(before, recipe)
            with explained("while the model was made", recipe, device):
                run_ = _Run(recipe, config, claim, Ranks.of(layout, device), device)
            try:
                return run_.go()
            finally:
                with contextlib.suppress(Exception):  # `go` has said it, or what stopped it before
                    run_.checkpoints.wait()  # a save in the background needs the process group


class _Run:
    """One process's share of a run: model, optimizer, data and place."""

    def __init__(self, recipe: Recipe, config: ModelConfig, claim: Claim, ranks: Ranks, device: torch.device) -> None:
        self.recipe, self.config, self.claim, self.ranks, self.device = recipe, config, claim, ranks, device
        self.run_dir = run_dir = Path(recipe.run_dir)
        self.tokenizer = check_data(recipe, self.config, is_new=not checkpoints(run_dir))
        check_tokenizer(run_dir, self.tokenizer)
        self.fingerprints = verified_data(recipe)
        self.loader = open_loader(recipe)
        self.step = self.tokens = self.skipped = 0
        valid = recipe.data.valid
        self.valid_rows = open_data(recipe, valid) if valid else None
        keep = recipe.checkpoint
        self.checkpoints = Checkpoints(run_dir, keep=keep.keep, keep_every=keep.keep_every)
        checkpoint = self.checkpoints.newest()
        if checkpoint is not None:
            check_checkpoint(checkpoint, read_meta(checkpoint), recipe, config, self.fingerprints)
        self.model, self.gradients = build(recipe, self.config, ranks, device)
        if checkpoint is not None:
            self._restore(checkpoint)
        else:
            self.model.fill(self._first_weights())
        self._write_down()
        self.peak_flops = devices.peak_flops(device, self.model.dtype)

    def go(self) -> dict[str, Any]:
        """Takes the steps that are left."""
        recipe, started = self.recipe, time.monotonic()
        self._introduce()
        numbers: dict[str, Any] = {}
        not_finite: list[int] = []  # steps in a row
        is_due = False
        with (
            self._metrics() as metrics,
            Progress("training", recipe.steps, "steps") as progress,
            stop_signals() as stop_signal,
        ):
            progress.advance(self.step)
            while self.step < recipe.steps:
                with self._explained(f"in step {self.step + 1}"):
                    numbers = self._take_step()
                if numbers["targets"]:  # else nothing was tried
                    not_finite = [] if numbers["is_applied"] else [*not_finite, self.step]
                if len(not_finite) > MAX_SKIPPED:
                    self._give_up(not_finite)
                is_last = self.step == recipe.steps
                if self.valid_rows is not None and (is_last or self.step % recipe.validation.every == 0):
                    with self._explained(f"while the loss on data.valid was measured, after step {self.step}"):
                        numbers["valid_loss"] = self.validate(self.valid_rows)
                if metrics is not None:
                    metrics.write(numbers)
                note = _note(numbers) if is_last or self.step % recipe.log.every == 0 else None
                progress.advance(1, note)
                number = int(all_max(stop_signal())[0])
                is_due |= self.step % recipe.checkpoint.every == 0
                if is_last or number or (is_due and numbers["is_applied"]):  # weights may be why a loss is not finite
                    self._save()
                    is_due = False
                if is_last or number:
                    self.checkpoints.wait()  # the others are written while training goes on
                if not is_last and number:
                    raise Stopped(f"stopped at step {self.step}; run the same command to continue", number)
        if not numbers:
            say(f"{self.run_dir} has taken its {recipe.steps} steps already; raise steps to train further")
        return {"run_dir": str(self.run_dir), **numbers, "step": self.step, "tokens": self.tokens,
                "skipped": self.skipped, "wall_seconds": time.monotonic() - started}  # fmt: skip

    def validate(self, rows: Sequence[Row]) -> float:
        """Mean loss over the targets of `validation.rows` rows, always the same ones; nan where they have none."""
        layout, per_pass = self.ranks.layout, self.recipe.micro_batch_rows
        if layout.pp > 1:
            per_pass *= layout.micro_batches  # a pipeline takes as many as in a step
        n_rows, first = min(len(rows), self.recipe.validation.rows), self.ranks.dp_rank * per_pass
        chosen = shuffled(np.arange(n_rows), len(rows), key=(0,)).tolist()  # from all over the data
        loss, n_targets = 0.0, 0
        for start in range(first, first + n_rows, layout.dp_size * per_pass):  # as often on every rank
            batch = stack(rows[chosen[i]] if i < n_rows else _blank(rows[0]) for i in range(start, start + per_pass))
            more_loss, more_targets = summed_loss(self.model, batch, micro_batch_rows=self.recipe.micro_batch_rows)
            loss, n_targets = loss + more_loss, n_targets + more_targets
        return loss / n_targets if n_targets else math.nan

    def _take_step(self) -> dict[str, Any]:
        recipe, started = self.recipe, time.perf_counter()
        layout = self.ranks.layout
        batch = self.loader.batch(self.step, rank=self.ranks.dp_rank, world_size=layout.dp_size)
        update, is_mindformers = self.step + 1, recipe.arithmetic == "mindformers"
        lr = _rate(recipe, update)
        result = train_step(
            self.model, self.gradients, batch, update=update, lr=lr,
            micro_batch_rows=recipe.micro_batch_rows, max_grad_norm=recipe.optimizer.max_grad_norm,
            is_mean_of_means=is_mindformers, skips_empty=not is_mindformers,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        self.step, self.tokens = update, self.tokens + recipe.batch_tokens
        if not result.is_applied:
            self.skipped += 1
            reason = f"loss {result.loss}, gradient norm {result.grad_norm}; {self.gradients.if_not_finite}"
            if not result.n_targets:
                reason = "no row of the batch asks for a token; weights and optimizer were left alone"
            say(f"step {update}: {reason}")
        return {
            "step": self.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens": self.tokens,
            "targets": result.n_targets,
            "tokens_per_second": recipe.batch_tokens / seconds,
            "mfu": self._mfu(batch, seconds),
            "memory_gib": devices.memory_gib(self.device),
            "seconds": seconds,
            "is_applied": result.is_applied,
        }

    def _mfu(self, batch: Batch, seconds: float) -> float | None:
        if self.peak_flops is None:
            return None
        flops = flops_per_token(self.config, attended_length(Documents.of(batch.documents).lengths))
        return flops * self.recipe.batch_tokens / seconds / self.peak_flops / self.ranks.layout.devices

    def _explained(self, moment: str) -> contextlib.AbstractContextManager[None]:
        return explained(moment, self.recipe, self.device)

    def _metrics(self) -> contextlib.AbstractContextManager[Metrics | None]:
        """Where the first rank writes the numbers of each step; the others write none."""
        if not is_first_rank():
            return contextlib.nullcontext()
        return Metrics(self.run_dir, step=self.step, tensorboard=self.recipe.log.tensorboard)

    def _first_weights(self) -> Callable[[str, tuple[int, ...]], Whole]:
        """What a new run begins with, a weight at a time: those of a folder, or drawn ones."""
        source = weights_folder(self.recipe)
        say(f"a new run, from {'random weights' if source is None else f'the weights of {source}'}")
        if source is None:
            return lambda name, shape: initial_weight(name, shape, self.config, seed=self.recipe.seed)
        stored = fit(self.config, open_weights(source))
        return lambda name, _: stored[name]

    def _state(self) -> dict[str, Any]:
        return {"model": self.model.weights, "optimizer": self.gradients.optimizer.state}

    def _write_down(self) -> None:
        """What a run's folder holds from the start: its recipe, and the tokenizer of its data."""
        if not is_first_rank():
            return
        self.checkpoints.note_unsaved()
        with file_aside(self.run_dir / RECIPE, "w") as file:
            file.write(self.recipe.to_yaml())
        if self.tokenizer.is_dir() and not (self.run_dir / "tokenizer").exists():
            with folder_aside(self.run_dir / "tokenizer") as aside:
                shutil.copytree(self.tokenizer, aside, dirs_exist_ok=True)

    def _save(self) -> None:
        """Saves in the background; at once where the save before has failed, and then it must not fail again."""
        if self.claim.renew():
            self._write_down()
        try:
            self.checkpoints.wait()
            is_again = False
        except Exception:  # it has been said, and the state is here still
            is_again = True
        meta = {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "recipe": self.recipe.model_dump(mode="json"),
            "model_config": self.config.to_json(),
            "data": self.fingerprints,
        }
        self.checkpoints.save(self.step, self._state(), meta)
        if is_again:
            self.checkpoints.wait()

    def _restore(self, checkpoint: Path) -> None:
        meta = self.checkpoints.load(checkpoint, self._state())
        self.step, self.tokens, self.skipped = meta["step"], meta["tokens"], meta["skipped"]
        say(f"continuing {self.run_dir} from step {self.step}")
        was, now = (_rate(recipe, self.step + 1) for recipe in (load_recipe(meta["recipe"]), self.recipe))
        if was != now:
            say(f"the learning rate goes on at {now:.3g} instead of {was:.3g}, for the schedule follows steps")

    def _introduce(self) -> None:
        recipe, config = self.recipe, self.config
        weights = list(recipe.data.weights.values())
        shares = [rows.useful_tokens_share for rows in self.loader.sources]  # type: ignore[attr-defined]
        useful = sum(w * s for w, s in zip(weights, shares, strict=True)) / sum(weights)
        read = [recipe.steps * recipe.batch_rows * weight / sum(weights) for weight in weights]
        epochs = [f"{n / len(rows):,.1f}" for n, rows in zip(read, self.loader.sources, strict=True)]
        dtype = self.model.dtype
        is_grouped = config.num_attention_heads != config.num_key_value_heads
        way = way_of_attention(self.device, dtype, config.head_dim, is_grouped=is_grouped)
        say(
            f"{config.parameter_count / 1e6:,.1f} M weights on {devices.device_name(self.device)}, {recipe.precision}; "
            f"{recipe.steps:,} steps of {recipe.batch_rows} rows x {recipe.sequence_length:,} tokens; "
            f"epochs {', '.join(epochs)}; useful tokens {useful:.1%}; attention: {way}"
        )
        for folder, rows in zip(recipe.data.weights, self.loader.sources, strict=True):
            if rows.cut_documents:  # type: ignore[attr-defined]
                say(f"{folder}: {rows.summary()}")  # type: ignore[attr-defined]
        if self.ranks.layout.devices > 1:
            say(f"{self.ranks.layout.devices} devices: {self.ranks.layout}")

    def _give_up(self, steps: list[int]) -> None:
        path = self.run_dir / "not-finite.json"
        if is_first_rank():
            write_json(path, {step: self.loader.row_numbers(step - 1) for step in steps})
        raise PunaError(
            f"loss or gradient was not finite {len(steps)} steps in a row (steps {steps[0]} to {steps[-1]}); "
            f"{self.gradients.if_not_finite}, the batches' rows are in {path}. `puna inspect` the rows, or try a lower "
            f"optimizer.peak_lr in {new_run_from(self.run_dir)}"
        )


def _rate(recipe: Recipe, update: int) -> float:
    """The learning rate of an update, counted from 1; the final value would be that of the one behind the last."""
    shift = int(recipe.arithmetic == "mindformers")  # which counts from 0
    end = recipe.steps + 1 - shift
    return learning_rate(update - shift, recipe.schedule, peak_lr=recipe.optimizer.peak_lr, steps=end)


def _precision(asked: str, device: torch.device) -> str:
    if asked == "auto":
        return "bf16" if devices.has_fast_bf16(device) else "fp32"
    if asked != "fp32" and not devices.has_fast_bf16(device):
        say(f"precision {asked}: {devices.device_name(device)} has no bf16 units and will be slow; fp32 is faster here")
    return asked


def _blank(row: Row) -> Row:
    """A row that asks for nothing, to fill up a batch."""
    return replace(row, targets=np.full_like(row.targets, IGNORE))


def _note(numbers: dict[str, Any]) -> str:
    note = f"loss {numbers['loss']:.4f}  {numbers['tokens_per_second']:,.0f} tokens/s"
    return note + (f"  valid {numbers['valid_loss']:.4f}" if "valid_loss" in numbers else "")
