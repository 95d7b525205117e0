"""A run is a folder: it learns, continues to the last bit, and refuses what would spoil it."""

import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml

import puna
import puna.cli
from puna.checkpoint import Checkpoints, save_model, sharded
from puna.checkpoint.runs import checkpoints
from puna.config import load_recipe
from puna.data.loader import Batch, Loader
from puna.data.rows import Row
from puna.data.shards import Dataset, shard_entry, write_shard
from puna.errors import PunaError, UsageError
from puna.files import read_json, write_json
from puna.model.config import preset
from puna.model.llama import Llama
from puna.model.offload import Offload
from puna.parallel.model import DistributedModel
from puna.testing import tiny_model
from puna.train import claim, out_of_memory, stopping
from puna.train import metrics as metrics_module
from puna.train import run as run_module
from puna.train.claim import only_run_in
from puna.train.gradients import _PageLocked
from puna.train.loss import IGNORE
from puna.train.metrics import Metrics, read_metrics
from puna.train.optimizer import AdamW
from puna.train.out_of_memory import _ways_out, explained
from puna.train.step import StepResult
from puna.train.stopping import stop_signals
from tests.train.conftest import write_random_folder

Make = Callable[..., dict[str, Any]]

#: Numbers of a step that depend on the clock or the process.
CLOCKED = {"seconds", "tokens_per_second", "mfu", "memory_gib"}


def _numbers(run_dir: str | Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in read_metrics(Path(run_dir))]


def _weights(run_dir: str | Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model = Llama(preset("tiny-64")).to(dtype)
    state = {"model": model.state_dict()}
    path = Checkpoints(run_dir).newest()
    assert path is not None
    Checkpoints(run_dir).load(path, state)
    return state["model"]


def _assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_learns_and_writes_a_line_a_step(recipe: Make) -> None:
    result = puna.train(recipe(steps=40))
    lines = read_metrics(Path(result["run_dir"]))
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[-1]["loss"] < lines[0]["loss"] - 1.5
    assert lines[-1]["valid_loss"] < lines[3]["valid_loss"] - 1
    expected = {"step", "loss", "grad_norm", "lr", "tokens", "targets", "tokens_per_second", "mfu", "memory_gib"}
    assert expected | {"seconds"} <= lines[0].keys()
    assert lines[-1]["tokens"] == 40 * 256


def test_a_recipe_that_is_one_already_takes_overrides(recipe: Make) -> None:
    assert puna.train(load_recipe(recipe()), {"steps": 3})["step"] == 3


def test_a_killed_run_continues_to_the_last_bit(recipe: Make, tmp_path: Path) -> None:
    at_once = puna.train(recipe(steps=30, run_dir=str(tmp_path / "at-once")))
    content = recipe(steps=30, checkpoint={"every": 11}, run_dir=str(tmp_path / "killed"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    _train_until_killed(path, Path(content["run_dir"]), step=13)
    puna.train(path)
    assert _numbers(content["run_dir"]) == _numbers(at_once["run_dir"])
    _assert_same_weights(_weights(content["run_dir"]), _weights(at_once["run_dir"]))


@pytest.mark.parametrize("precision", ["bf16", "bf16-pure"])
def test_a_crashed_run_in_half_precision_continues_to_the_last_bit(
    recipe: Make, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"precision": precision, "sequence_length": 16, "batch_tokens": 32, "checkpoint": {"every": 2}}
    puna.train(recipe(**small, run_dir=str(tmp_path / "at-once")))
    with monkeypatch.context() as patched:
        write = run_module.Metrics.write

        def crash(self: Any, numbers: dict[str, Any]) -> None:
            write(self, numbers)
            if numbers["step"] == 5:
                raise RuntimeError("power cut")

        patched.setattr(run_module.Metrics, "write", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            puna.train(recipe(**small))
    result = puna.train(recipe(**small))
    assert _numbers(result["run_dir"]) == _numbers(tmp_path / "at-once")
    dtype = torch.bfloat16 if precision == "bf16-pure" else torch.float32
    _assert_same_weights(_weights(result["run_dir"], dtype), _weights(tmp_path / "at-once", dtype))


def _train_until_killed(recipe: Path, run_dir: Path, *, step: int) -> None:
    """Trains in another process, slowed down, and kills it with SIGKILL once it has taken `step` steps."""
    slow = (
        "import sys, time, puna.train.run as run\n"
        "write = run.Metrics.write\n"
        "run.Metrics.write = lambda self, numbers: (write(self, numbers), time.sleep(0.05))\n"
        "import puna; puna.train(sys.argv[1])\n"
    )
    with subprocess.Popen([sys.executable, "-c", slow, str(recipe)]) as process:
        deadline = time.monotonic() + 120
        while len(read_metrics(run_dir)) < step:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    assert step <= len(read_metrics(run_dir)) < 30


@pytest.mark.parametrize(
    ("options", "kill", "sent", "obeyed"),
    [
        ([], os.kill, signal.SIGTERM, signal.SIGTERM),
        (["--nproc", "2"], os.kill, signal.SIGINT, signal.SIGTERM),
        (["--nproc", "2"], os.killpg, signal.SIGTERM, signal.SIGTERM),
    ],
    ids=["alone", "the one that starts two", "all of a group"],
)
def test_signals_save_before_processes_leave_and_the_run_continues(
    recipe: Make, tmp_path: Path, options: list[str], kill: Any, sent: signal.Signals, obeyed: signal.Signals
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(steps=4000)))
    run_dir = Path(recipe()["run_dir"])
    command = [sys.executable, "-m", "puna", "train", str(path), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while len(read_metrics(run_dir)) < 3:
            assert process.poll() is None
            time.sleep(0.02)
        kill(process.pid, sent)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + obeyed
    assert "run the same command to continue" in said
    assert "Traceback" not in said
    steps = len(read_metrics(run_dir))
    newest = Checkpoints(run_dir).newest()
    assert newest is not None
    assert newest.name.endswith(f"{steps:08d}")


def test_a_second_signal_ends_a_run_at_once_unless_it_is_the_first_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "time", SimpleNamespace(sleep=lambda _: signal.raise_signal(signal.SIGINT)))
    with stop_signals() as came:
        assert came() == 0
        signal.raise_signal(signal.SIGTERM)
        assert came() == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # obeyed in a collective that waits in vain, too
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_signals_that_come_at_once_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    monkeypatch.setattr(stopping, "SAME_SECONDS", 0)
    both = (signal.SIGINT, signal.SIGTERM)
    with stop_signals() as came:
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        for each in both:
            signal.pthread_kill(threading.get_ident(), each)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        assert came() == signal.SIGINT
    assert not lost


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even if these tests run under nohup


@pytest.mark.parametrize("options", [[], ["--nproc", "2"]], ids=["alone", "two processes"])
def test_a_terminal_that_is_closed_leaves_a_saved_run(recipe: Make, tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(steps=4000)))
    run_dir = Path(recipe()["run_dir"])
    command = [sys.executable, "-m", "puna", "train", str(path), *options]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_own_terminal,
    ) as process:
        os.close(theirs)
        while len(read_metrics(run_dir)) < 3:
            assert process.poll() is None
            if select.select([ours], [], [], 0.02)[0]:
                os.read(ours, 1 << 16)
        os.close(ours)
        assert process.wait(timeout=60) == 128 + signal.SIGHUP
    newest = Checkpoints(run_dir).newest()
    assert newest is not None
    assert newest.name.endswith(f"{len(read_metrics(run_dir)):08d}")


def test_how_often_each_data_set_is_seen_is_said(
    recipe: Make, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    other = write_random_folder(tmp_path / "data", seed=1)
    puna.train(recipe(data={"train": {str(prepared): 3, str(other): 1}}, steps=8))
    rows = [-(-Dataset.open(folder).starts[-1] // 64) for folder in (prepared, other)]  # 32 are read: 24 and 8
    assert f"epochs {24 / rows[0]:.1f}, {8 / rows[1]:.1f}; useful tokens" in capsys.readouterr().err


def test_data_that_was_made_anew_meanwhile_is_told(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    content = recipe(data={"train": str(write_random_folder(tmp_path / "data", seed=1))}, steps=2)
    puna.train(content)
    puna.train({**content, "steps": 3})
    write_random_folder(tmp_path / "data", seed=2)
    with pytest.raises(PunaError, match=r"data holds other data than when .*step-00000003 was saved"):
        puna.train({**content, "steps": 4})


@pytest.mark.parametrize("use", ["train", "valid"])
def test_damaged_data_is_neither_learned_from_nor_measured(
    recipe: Make, prepared: Path, tmp_path: Path, use: str
) -> None:
    (tmp_path / "data").mkdir()
    shard = write_random_folder(tmp_path / "data", seed=1) / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(PunaError, match=r"shard-00000\.arrow is damaged"):
        puna.train(recipe(data={"train": str(prepared), use: str(tmp_path / "data")}))


def test_the_loss_is_measured_on_rows_from_all_over_the_data_and_always_on_the_same(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_data, read = run_module.open_data, []

    class Noted:
        def __init__(self, recipe: Any, folder: str) -> None:
            self.rows = open_data(recipe, folder)

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int) -> Row:
            read.append(i)
            return self.rows[i]

    monkeypatch.setattr(run_module, "open_data", Noted)
    content = recipe(steps=4, validation={"every": 2, "rows": 9})
    puna.train(content)
    first, second = sorted(read[:9]), sorted(read[9:18])
    assert len(set(first)) == 9
    assert first == second
    n_rows = len(Noted(load_recipe(content), content["data"]["valid"]))
    assert {i * 3 // n_rows for i in first} == {0, 1, 2}  # some of each third


def test_what_rows_lose_of_long_dialogs_is_said(
    recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dialogs/shard-00000.arrow"
    with write_shard(path, dialogs=True) as writer:
        for number in range(4):
            writer.add(str(number), "random", np.arange(3, 103, dtype=np.int32), np.ones(100, np.bool_))
    tokenizer = {"sha256": "0" * 64, "vocab_size": 512}
    content = {"format": 1, "kind": "chat", "fill": "whole-documents", "tokenizer": tokenizer}
    write_json(tmp_path / "dialogs/dataset.json", {**content, "shards": [shard_entry(path, writer)]})
    puna.train(recipe(data={"train": str(tmp_path / "dialogs")}, steps=2))
    assert "4 documents longer than a row were cut, losing 144 tokens" in capsys.readouterr().err


def test_the_cut_into_micro_batches_does_not_change_the_run(recipe: Make, tmp_path: Path) -> None:
    for rows in (1, 2, 4):
        puna.train(recipe(micro_batch_rows=rows, run_dir=str(tmp_path / str(rows))))
    for lines in zip(*(_numbers(tmp_path / str(rows)) for rows in (1, 2, 4)), strict=True):
        for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
            assert [line[name] for line in lines] == pytest.approx([lines[0][name]] * 3, rel=tolerance)


def test_recomputation_of_all_layers_or_of_some_changes_nothing(recipe: Make, tmp_path: Path) -> None:
    puna.train(recipe(run_dir=str(tmp_path / "kept")))
    for mode, layers in itertools.product(("block", "selective", "offload"), (None, 1)):
        run_dir = tmp_path / f"{mode}-{layers}"
        puna.train(recipe(recompute=mode, recompute_layers=layers, run_dir=str(run_dir)))
        assert _numbers(run_dir) == _numbers(tmp_path / "kept"), run_dir


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch's own modules
def test_compilation_changes_nothing_but_rounding(recipe: Make, tmp_path: Path) -> None:
    puna.train(recipe(run_dir=str(tmp_path / "eager")))
    puna.train(recipe(compile=True, run_dir=str(tmp_path / "compiled")))
    for one, other in zip(_numbers(tmp_path / "eager"), _numbers(tmp_path / "compiled"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_compilation_without_a_compiler_is_refused_before_the_folder_is_made(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apt-get").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        PunaError, match=r"needs a C\+\+ compiler, and none .*: (sudo )?apt-get install -y g\+\+; or use"
    ):
        puna.train(recipe(compile=True))
    assert not Path(recipe()["run_dir"]).exists()


@pytest.mark.parametrize("precision", ["bf16", "bf16-pure"])
def test_half_precision_follows_full_precision(recipe: Make, tmp_path: Path, precision: str) -> None:
    small = {"sequence_length": 32, "batch_tokens": 64, "steps": 8}
    full = puna.train(recipe(**small, run_dir=str(tmp_path / "full")))
    half = puna.train(recipe(**small, precision=precision, run_dir=str(tmp_path / "half")))
    assert half["loss"] == pytest.approx(full["loss"], rel=0.03)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(
    recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = recipe(steps=8, checkpoint={"every": 4})
    puna.train(content)
    first = _numbers(content["run_dir"])
    newest = Checkpoints(content["run_dir"]).newest()
    assert newest is not None
    victim = next(newest.rglob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-100])
    puna.train(content)
    said = capsys.readouterr().err
    assert newest.name in said
    assert "continuing" in said
    assert "step 4" in said
    assert _numbers(content["run_dir"]) == first


def test_a_step_that_is_not_finite_leaves_the_weights_alone(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_module.train_step

    def poisoned(model: DistributedModel, *args: Any, update: int, **options: Any) -> Any:
        before = {name: p.detach().clone() for name, p in model.weights.items()}
        if update == 3:
            handle = model.stages[0].llama.model.norm.register_forward_hook(lambda *call: call[-1] * math.inf)
        result = real(model, *args, update=update, **options)
        if update == 3:
            handle.remove()
            assert not result.is_applied
            assert all(torch.equal(before[name], p) for name, p in model.weights.items())
        return result

    monkeypatch.setattr(run_module, "train_step", poisoned)
    result = puna.train(recipe())
    assert result["skipped"] == 1
    assert [line["is_applied"] for line in _numbers(result["run_dir"])] == [True, True, False, True, True, True]


@pytest.mark.parametrize("optimizer", [{}, {"in_backward": True, "max_grad_norm": None}], ids=["plain", "in backward"])
def test_batches_that_ask_for_nothing_leave_weights_and_optimizer_alone_and_stop_no_run(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], optimizer: dict[str, Any]
) -> None:
    content = recipe(optimizer={"peak_lr": 1e-2, **optimizer}, micro_batch_rows=4, steps=2, checkpoint={"keep": 9})
    puna.train(content)
    before = _weights(content["run_dir"])
    real = Loader.batch

    def blank(self: Loader, step: int, **share: int) -> Batch:
        batch = real(self, step, **share)
        return replace(batch, targets=np.full_like(batch.targets, IGNORE)) if step >= 2 else batch

    monkeypatch.setattr(Loader, "batch", blank)
    result = puna.train({**content, "steps": 8})
    assert (result["step"], result["skipped"]) == (8, 6)
    assert capsys.readouterr().err.count("no row of the batch asks for a token; weights and optimizer were left") == 6
    _assert_same_weights(_weights(content["run_dir"]), before)
    assert [line["loss"] for line in read_metrics(Path(content["run_dir"]))[2:]] == [None] * 6


def test_numbers_that_are_not_finite_are_written_as_json_and_read_from_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    with Metrics(tmp_path, step=1) as metrics:
        metrics.write({"step": 2, "loss": math.inf, "valid_loss": math.nan, "lr": 0.5})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": None, "valid_loss": None, "lr": 0.5},
    ]
    assert read_metrics(tmp_path) == [json.loads(line) for line in lines]


def _no_memory() -> None:
    raise torch.OutOfMemoryError("Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which …")


def _no_memory_in_a_pipeline() -> None:
    try:
        _no_memory()
    except RuntimeError as error:
        raise RuntimeError("[Stage 0] failed to run forward") from error


@pytest.mark.parametrize(
    "runs_out",
    [_no_memory, _no_memory_in_a_pipeline, lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50)],
    ids=["accelerator", "pipeline", "CPU", "host"],
)
def test_memory_that_runs_out_is_one_message_with_what_would_help(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs_out: Any
) -> None:
    real, content = run_module.train_step, recipe(micro_batch_rows=4, steps=4, checkpoint={"every": 2})

    def starved(*arguments: Any, update: int, **options: Any) -> StepResult:
        if update == 3:
            runs_out()
        return real(*arguments, update=update, **options)

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "train_step", starved)
        assert puna.cli.run(["train", str(path)]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    begin = r"puna: out of memory in step 3: .* has [\d,.]+ GiB, the peak was [\d,.]+ GiB\. "
    message = re.search(f"{begin}(.*)\n(.*)", said)
    assert message is not None, said
    assert message[1] == (
        "What takes less: micro_batch_rows=2, recompute=block, optimizer.state_bits=8 (in a new run), "
        "optimizer.in_backward=true (in a new run), more devices; what fits is said by"
    )
    assert puna.cli.run(shlex.split(message[2])[1:]) in (0, 1)
    assert puna.cli.run(["train", str(path), "micro_batch_rows=2", "recompute=block"]) == 0


def _no_page_locked_memory(*_: Any, pin_memory: bool, **__: Any) -> None:
    assert pin_memory
    raise torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in …")


@pytest.mark.parametrize(
    ("runs_out", "said"),
    [
        (lambda: _PageLocked({"x": torch.ones(4)}, torch.device("cpu")), "of the host's {host}"),
        (lambda: Offload()._to_host(torch.empty(4, device="meta")), "of the host's {host}"),  # not the CPU's
        (lambda: torch.empty(1 << 50), "of the host's {host}"),
        (lambda: _no_page_locked_memory(pin_memory=True), "abacus has 8.0 GiB, the peak was 7.5 GiB. {device}"),
    ],
    ids=["gradients", "activations", "elsewhere", "the device's, in a library"],
)
def test_memory_that_runs_out_on_an_accelerators_host_is_said_to_be_the_hosts(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, runs_out: Callable[[], Any], said: str
) -> None:
    monkeypatch.setattr(torch, "empty_like", _no_page_locked_memory)
    monkeypatch.setattr(torch, "Stream", MagicMock())
    monkeypatch.setattr(torch.accelerator, "current_stream", MagicMock())
    abacus = {"device_name": "abacus", "_total_gib": 8.0, "memory_gib": 7.5}
    host = {"memory_bytes": 64 * 2**30, "free_host_bytes": 3 * 2**30}
    for name, value in {**abacus, **host}.items():
        monkeypatch.setattr(out_of_memory, name, lambda *_, value=value: value)
    content = recipe(micro_batch_rows=4, recompute="offload", optimizer={"in_backward": True})
    with (
        pytest.raises(PunaError) as caught,
        explained("in step 3", load_recipe(content), torch.device("meta")),
    ):
        runs_out()
    of_host = (
        "64.0 GiB no more than 3.0 GiB are left. What takes less: micro_batch_rows=2, recompute=block, "
        "optimizer.in_backward=false (in a new run), fewer devices a host; what fits is said by\n"
    )
    of_device = "What takes less: micro_batch_rows=2, optimizer.state_bits=8 (in a new run), more devices; what fits"
    assert str(caught.value).startswith(f"out of memory in step 3: {said.format(host=of_host, device=of_device)}")
    assert str(caught.value).endswith("puna plan RECIPE --devices 1 --memory-gib 8.0")


def test_a_model_larger_than_the_machines_memory_is_refused_before_it_is_made(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("puna.train.out_of_memory.free_host_bytes", lambda: 20 * 2**30)
    with pytest.raises(
        PunaError, match=r"6\.7 billion weights take 100\.4 GiB, and .* 20\.0 GiB are free; take a smaller"
    ):
        puna.train(recipe(model="codellama-7b", precision="bf16"))
    with pytest.raises(PunaError, match=r"take 37\.7 GiB"):
        puna.train(recipe(model="codellama-7b", precision="bf16-pure"), ["optimizer.state_bits=8"])


def test_other_errors_of_torch_are_not_called_so(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "train_step", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        puna.train(recipe())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "recompute=block, optimizer.state_bits=8 (in a new run), optimizer.in_backward=true (in a new run)"),
        ({"recompute": "block", "optimizer.state_bits": 8, "optimizer.in_backward": True}, "recompute=offload"),
        ({"recompute": "block", "recompute_layers": 1, "optimizer.in_backward": True, "micro_batch_rows": 3,
          "batch_tokens": 6 * 64}, "micro_batch_rows=2, recompute_layers=null, optimizer.state_bits=8 (in a new run)"),
    ],
)  # fmt: skip
def test_what_takes_less_memory_is_what_is_not_done_yet(recipe: Make, changes: dict[str, Any], said: str) -> None:
    assert ", ".join(_ways_out(load_recipe(recipe(), changes))) == said


def test_memory_that_a_model_does_not_find_names_no_recipe_that_is_not_written_yet(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdamW, "__init__", lambda *_, **__: _no_memory())
    all_done = {"recompute": "offload", "optimizer": {"state_bits": 4, "in_backward": True}}
    with pytest.raises(PunaError, match=r"while the model was made: .* less: more devices; .*\npuna plan RECIPE --"):
        puna.train(recipe(**all_done))


def test_losses_that_stay_not_finite_stop_the_run_and_name_the_rows(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "train_step", lambda *a, **k: StepResult(math.nan, math.nan, 1, False))
    content = recipe()
    with pytest.raises(PunaError, match=r"not finite 4 steps in a row \(steps 1 to 4\)"):
        puna.train(content)
    rows = read_json(Path(content["run_dir"]) / "not-finite.json")
    assert list(rows) == ["1", "2", "3", "4"]
    assert all(len(batch) == 4 for batch in rows.values())


def test_steps_that_are_not_finite_now_and_then_stop_no_run_and_are_counted_over_all_of_it(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_module.train_step

    def often_not_finite(*arguments: Any, update: int, **options: Any) -> StepResult:
        if update % 4:
            return StepResult(math.nan, math.nan, 1, False)
        return real(*arguments, update=update, **options)

    monkeypatch.setattr(run_module, "train_step", often_not_finite)
    assert puna.train(recipe(steps=8, checkpoint={"every": 4}))["skipped"] == 6
    assert puna.train(recipe(steps=12, checkpoint={"every": 4}))["skipped"] == 9


def test_a_loss_that_is_not_finite_is_no_update_though_its_gradient_is(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = DistributedModel.forward_backward
    monkeypatch.setattr(
        DistributedModel, "forward_backward", lambda *arguments, **options: measure(*arguments, **options) + math.inf
    )
    assert puna.train(recipe(steps=2))["skipped"] == 2


@pytest.mark.parametrize("n_rows", [1, 2, 3, 5])
def test_ranks_measure_as_often_as_each_other_and_each_row_once(monkeypatch: pytest.MonkeyPatch, n_rows: int) -> None:
    """Else one would wait for the other for ever."""
    read: list[Batch] = []
    monkeypatch.setattr(run_module, "summed_loss", lambda _, batch, **options: read.append(batch) or (0.0, 1))
    tokens = np.arange(4)
    rows = [Row(tokens + 10 * i, tokens + 10 * i, tokens, np.zeros(4, np.int32)) for i in range(n_rows)]
    counts = []
    for rank in range(2):
        run = object.__new__(run_module._Run)
        run.model = MagicMock()
        run.ranks = SimpleNamespace(layout=SimpleNamespace(pp=1, dp_size=2), dp_rank=rank)  # type: ignore[assignment]
        validation = SimpleNamespace(rows=100)
        run.recipe = SimpleNamespace(micro_batch_rows=1, validation=validation)  # type: ignore[assignment]
        before = len(read)
        run.validate(rows)
        counts.append(len(read) - before)
    assert counts[0] == counts[1]
    measured = [batch.tokens[0, 0] // 10 for batch in read if (batch.targets != IGNORE).any()]
    assert sorted(measured) == list(range(n_rows))


def test_steps_that_ask_for_nothing_are_none_of_those_that_were_not_finite(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = iter([1, 0, 1, 0, 1, 1])
    monkeypatch.setattr(run_module, "train_step", lambda *a, **k: StepResult(math.nan, math.nan, next(targets), False))
    content = recipe()
    with pytest.raises(PunaError, match=r"not finite 4 steps in a row \(steps 1 to 6\)"):
        puna.train(content)
    assert list(read_json(Path(content["run_dir"]) / "not-finite.json")) == ["1", "3", "5", "6"]


@pytest.mark.parametrize(
    ("in_backward", "fate"),
    [(False, "the weights were left alone"), (True, "whose own gradient was finite have moved")],
)
def test_what_became_of_the_weights_is_said(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], in_backward: bool, fate: str
) -> None:
    monkeypatch.setattr(run_module, "train_step", lambda *a, **k: StepResult(math.nan, math.nan, 1, False))
    optimizer = {"in_backward": in_backward, "max_grad_norm": None}
    with pytest.raises(PunaError, match=fate):
        puna.train(recipe(optimizer=optimizer, micro_batch_rows=4))
    assert fate in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 4096, "batch_tokens": 4096}, "sequence_length=4096 is beyond the model's context of 2048"),
        ({"model": "tiny-65"}, "model=tiny-65 is neither a folder nor one of .*tiny-64"),
        ({"device": "abacus"}, "abacus"),
        ({"data": {"train": "nowhere"}}, "nowhere"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(recipe: Make, change: dict[str, Any], message: str) -> None:
    content = recipe(**change)
    with pytest.raises(PunaError, match=message):
        puna.train(content)
    assert not Path(content["run_dir"]).exists()


def test_data_of_a_larger_vocabulary_is_refused(recipe: Make, prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(prepared, folder)
    info = read_json(folder / "dataset.json")
    info["tokenizer"]["vocab_size"] = 600
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(PunaError, match="a tokenizer of 600 ids, the model tiny-64 has 512"):
        puna.train(recipe(data={"train": {str(prepared): 1.0, str(folder): 1.0}}))
    info["tokenizer"] = {"vocab_size": 512, "sha256": "1" * 64}
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(PunaError, match="prepared with another tokenizer"):
        puna.train(recipe(data={"train": {str(folder): 1.0, str(prepared): 2.0}}))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "start has no tokenizer to compare with that of .*, which is used"),
        ("{", "the tokenizer of .*start cannot be compared with that of .*, which is used: .*tokenizer.json .*JSON"),
    ],
    ids=["none", "damaged"],
)
def test_a_tokenizer_that_cannot_be_compared_is_said_with_the_reason(
    recipe: Make, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None,
    said: str,
) -> None:  # fmt: skip
    start = tmp_path / "start"
    shutil.copytree(tiny_model_folder, start, ignore=shutil.ignore_patterns("tokenizer*"))
    if content is not None:
        (start / "tokenizer.json").write_text(content)
    puna.train(recipe(start=str(start), steps=2))
    assert re.search(said, capsys.readouterr().err)


def test_dialogs_of_several_layouts_are_named(
    recipe: Make, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / name for name in ("one", "other")]
    for folder, template in zip(folders, ("vicuna", "codellama"), strict=True):
        shutil.copytree(prepared, folder)
        info = read_json(folder / "dataset.json")
        write_json(folder / "dataset.json", {**info, "settings": {"options": {"template": template}}})
    puna.train(recipe(data={"train": {str(folder): 1.0 for folder in folders}}, steps=2))
    said = capsys.readouterr().err
    assert f"dialogs of several layouts: vicuna in {folders[0]}, codellama in {folders[1]}; the first goes" in said


def test_another_recipe_is_refused_in_a_run_folder_and_more_steps_are_not(
    recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    puna.train(recipe())
    for change in ({"seed": 1}, {"batch_tokens": 512}, {"sequence_length": 32}, {"precision": "bf16"}):
        (name,) = change
        with pytest.raises(UsageError, match=f"{name}: "):
            puna.train(recipe(**change))
    result = puna.train(recipe(steps=8, schedule={"warmup_steps": 2}))
    assert result["step"] == 8
    assert "steps: 6 -> 8" in capsys.readouterr().err
    assert [line["step"] for line in _numbers(result["run_dir"])] == list(range(1, 9))
    assert puna.train(recipe(steps=8))["step"] == 8
    assert "raise steps to train further" in capsys.readouterr().err


def test_another_recipe_may_take_the_folder_of_a_run_that_has_saved_nothing_once_it_is_cleared(recipe: Make) -> None:
    run_dir = Path(puna.train(recipe())["run_dir"])
    with pytest.raises(UsageError, match=r"begin a new run with its weights: puna export"):
        puna.train(recipe(seed=1))
    shutil.rmtree(run_dir / "checkpoints")
    afresh = r"remove its recipe\.yaml and metrics\.jsonl to begin afresh$"
    with pytest.raises(UsageError, match=rf"seed: 0 -> 1\); choose another run_dir, or {afresh}"):
        puna.train(recipe(seed=1))
    for name in ("recipe.yaml", "metrics.jsonl"):
        (run_dir / name).unlink()
    assert puna.train(recipe(seed=1))["step"] == 6


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl"])
def test_a_file_of_the_users_own_is_no_run_and_is_not_replaced(recipe: Make, name: str) -> None:
    content = recipe()
    (own := Path(content["run_dir"]) / name).parent.mkdir()
    own.write_text('{"model": "mine"}\n')
    with pytest.raises(PunaError, match=rf"{name} is no run's, and a run would replace it; move it, or choose another"):
        puna.train(content)
    assert own.read_text() == '{"model": "mine"}\n'


def test_a_run_that_has_saved_is_not_begun_afresh_where_its_checkpoints_are_out_of_sight(
    recipe: Make, tmp_path: Path
) -> None:
    content = recipe(steps=4, checkpoint={"every": 2})
    run_dir = Path(puna.train(content)["run_dir"])
    written = (run_dir / "metrics.jsonl").read_bytes()
    (run_dir / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(PunaError, match="holds 4 steps of a run but none of its checkpoints; bring them back, or"):
        puna.train({**content, "steps": 5, "checkpoint": {"every": 100}})
    (run_dir / "checkpoints").symlink_to(tmp_path / "disk")
    with pytest.raises(PunaError, match=r"checkpoints leads to .*/disk, which is not there; bring it back"):
        puna.train({**content, "steps": 5})
    assert (run_dir / "metrics.jsonl").read_bytes() == written
    (tmp_path / "elsewhere").rename(tmp_path / "disk")
    assert puna.train({**content, "steps": 5})["step"] == 5
    assert len(read_metrics(run_dir)) == 5


def test_a_run_that_was_killed_in_its_first_save_begins_afresh(recipe: Make) -> None:
    content = recipe(steps=4, checkpoint={"every": 2})
    run_dir = Path(puna.train(content)["run_dir"])
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints/step-00000002.aside").mkdir(parents=True)
    puna.train(content)
    assert list(checkpoints(run_dir)) == [2, 4]


def test_what_a_run_goes_on_with_is_written_down_and_a_rate_that_jumps_is_said(
    recipe: Make, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = recipe(steps=2, data={"train": str(prepared)}, schedule={"final_fraction": 0.0})
    puna.train(content)
    capsys.readouterr()
    result = puna.train({**content, "steps": 4, "data": {"train": str(prepared), "valid": str(prepared)}})
    assert "the learning rate goes on at 0.00345 instead of 0, for the schedule" in capsys.readouterr().err
    assert result["valid_loss"] > 0
    written = load_recipe(Path(result["run_dir"]) / "recipe.yaml")
    assert (written.steps, written.data.valid) == (4, str(prepared))


def test_no_update_has_a_rate_of_0_but_the_first_of_mindformers(recipe: Make, tmp_path: Path) -> None:
    schedule = {"name": "linear", "warmup_steps": 2, "final_fraction": 0.0}
    for arithmetic, fractions in (
        ("sound", [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        ("mindformers", [0, 0.5, 1, 0.75, 0.5, 0.25]),
    ):
        content = recipe(schedule=schedule, arithmetic=arithmetic, run_dir=str(tmp_path / arithmetic))
        rates = [line["lr"] for line in _numbers(puna.train(content)["run_dir"])]
        assert rates == pytest.approx([1e-2 * fraction for fraction in fractions])


def test_a_run_keeps_its_precision_where_the_recipe_leaves_it_open(recipe: Make) -> None:
    run_dir = Path(puna.train(recipe(steps=2, precision="bf16-pure"))["run_dir"])
    puna.train(recipe(steps=3, precision="auto"))
    assert load_recipe(run_dir / "recipe.yaml").precision == "bf16-pure"
    with pytest.raises(UsageError, match="precision: bf16-pure -> fp32"):
        puna.train(recipe(steps=4, precision="fp32"))


def test_micro_batches_may_change_where_the_loss_does_not_hang_on_them(recipe: Make, tmp_path: Path) -> None:
    puna.train(recipe())
    assert puna.train(recipe(steps=7, micro_batch_rows=2))["step"] == 7
    content = recipe(arithmetic="mindformers", run_dir=str(tmp_path / "means"))
    puna.train(content)
    with pytest.raises(UsageError, match="micro_batch_rows: 1 -> 2"):
        puna.train({**content, "steps": 7, "micro_batch_rows": 2})


def test_a_folder_of_which_only_checkpoints_were_copied_is_known_as_the_run_it_holds(recipe: Make) -> None:
    run_dir = Path(puna.train(recipe())["run_dir"])
    (run_dir / "recipe.yaml").unlink()
    with pytest.raises(UsageError, match="seed: 0 -> 1"):
        puna.train(recipe(steps=8, seed=1))
    assert puna.train(recipe(steps=8))["step"] == 8
    with pytest.raises(UsageError, match="seed: 0 -> 1"):
        puna.train(recipe(steps=9, seed=1))
    (run_dir / "recipe.yaml").unlink()
    newest = Checkpoints(run_dir).newest()
    assert newest is not None
    (newest / "run.json").write_text("{")
    with pytest.raises(UsageError, match="seed: 0 -> 1"):
        puna.train(recipe(steps=9, seed=1))
    assert puna.train(recipe(steps=9))["step"] == 9


def test_a_run_that_is_killed_as_it_begins_has_its_whole_tokenizer_in_the_end(
    recipe: Make, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, copytree = tmp_path / "data", shutil.copytree
    copytree(prepared, data)
    for name in ("a", "b"):
        (data / "tokenizer").mkdir(exist_ok=True)
        (data / "tokenizer" / name).write_text(name)

    def dying(source: Path, target: Path, **options: Any) -> None:
        copytree(source, target, ignore=lambda *_: ["b"], **options)
        raise KeyboardInterrupt

    content = recipe(data={"train": str(data)}, steps=2)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", dying)
        with pytest.raises(KeyboardInterrupt):
            puna.train(content)
    run_dir = Path(puna.train(content)["run_dir"])
    assert sorted(file.name for file in (run_dir / "tokenizer").iterdir()) == ["a", "b"]


def test_a_run_does_not_begin_beside_another_tokenizer_than_that_of_its_data(
    recipe: Make, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    (data / "tokenizer").mkdir()
    (data / "tokenizer/vocabulary").write_text("one")
    content = recipe(data={"train": str(data)}, steps=2)

    def dying(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "train_step", dying)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                puna.train(content)
    (data / "tokenizer/vocabulary").write_text("other")
    kept = Path(content["run_dir"]) / "tokenizer"
    with pytest.raises(PunaError, match=f"{kept} is another tokenizer than {data}/tokenizer, .*; remove it, or"):
        puna.train(content)
    shutil.rmtree(kept)
    puna.train(content)
    (data / "tokenizer/vocabulary").write_text("later")
    puna.train({**content, "steps": 3})  # goes on: the data is the same, as checkpoints know
    assert (kept / "vocabulary").read_text() == "other"


def test_a_run_goes_on_where_its_data_and_first_weights_have_moved_or_are_spelled_otherwise(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_random_folder(tmp_path / "data", seed=1)
    save_model(tiny_model(), tmp_path / "start")
    content = recipe(steps=2, data={"train": "data"}, start="start", schedule={"name": "constant"})
    puna.train({**content, "steps": 6, "run_dir": str(tmp_path / "whole")})
    puna.train(content)
    puna.train({**content, "steps": 3, "data": {"train": "data/"}})
    puna.train({**content, "steps": 4, "data": {"train": {f"{tmp_path}/data": 1.0}}})
    (tmp_path / "data").rename(tmp_path / "data2")
    (tmp_path / "start").rename(tmp_path / "start2")
    capsys.readouterr()
    puna.train({**content, "steps": 6, "data": {"train": "data2"}, "start": "start2"})
    said = capsys.readouterr().err
    assert "continuing with changes: start: start -> start2; steps: 4 -> 6; data.train: {" in said
    assert "} -> data2\n" in said
    _assert_same_weights(_weights(content["run_dir"]), _weights(tmp_path / "whole"))


def test_other_first_weights_are_refused_in_a_run_folder(recipe: Make, tmp_path: Path) -> None:
    for name in ("one", "other"):
        save_model(tiny_model(), tmp_path / name)
    (tmp_path / "link").symlink_to("one")
    content = recipe(steps=2, start=str(tmp_path / "one"))
    puna.train(content)
    with pytest.raises(UsageError, match=r"another recipe \(start: .*one -> .*other\)"):
        puna.train({**content, "start": str(tmp_path / "other")})
    assert puna.train({**content, "steps": 3, "start": str(tmp_path / "link")})["step"] == 3
    random = recipe(steps=2, run_dir=str(tmp_path / "random"))
    puna.train(random)
    with pytest.raises(UsageError, match=r"another recipe \(start: None -> .*one\)"):
        puna.train({**random, "start": str(tmp_path / "one")})


@pytest.mark.parametrize("weights", [[1, 3], [3], [3, 2]])
def test_another_mixture_is_refused_in_a_run_folder(
    recipe: Make, prepared: Path, tmp_path: Path, weights: list[int]
) -> None:
    (tmp_path / "data").mkdir()
    folders = [str(prepared), str(write_random_folder(tmp_path / "data", seed=1))]
    puna.train(recipe(data={"train": dict(zip(folders, [3, 1], strict=True))}, steps=2))
    others = dict(zip(folders, weights, strict=False))
    with pytest.raises(
        UsageError, match=r"holds a run of another recipe \(data\.train: .*\); choose .*, or begin a new"
    ):
        puna.train(recipe(data={"train": others}, steps=3))


def test_a_mixture_in_another_order_is_refused_though_its_shares_are_the_same(
    recipe: Make, prepared: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    folders = [str(prepared), str(write_random_folder(tmp_path / "data", seed=1))]
    puna.train(recipe(data={"train": dict.fromkeys(folders, 1)}, steps=2))
    with pytest.raises(PunaError, match=f"{folders[1]} holds other data than {folders[0]} did when"):
        puna.train(recipe(data={"train": dict.fromkeys(folders[::-1], 1)}, steps=3))


def test_a_model_whose_config_has_changed_is_not_trained_further(recipe: Make, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_model(tiny_model(), model)
    puna.train(recipe(model=str(model), steps=2))
    fields = read_json(model / "config.json")
    write_json(model / "config.json", {**fields, "rope_theta": 1e4})
    with pytest.raises(PunaError, match=r"another model than when .*step-00000002 was saved \(rope_theta: 1000000"):
        puna.train(recipe(model=str(model), steps=3))
    write_json(model / "config.json", fields)
    with pytest.raises(
        PunaError, match=r"tiny-128 is another model than when .*step-00000002 was saved \(vocab_size: 512 -> 4096; hid"
    ):
        puna.train(recipe(model="tiny-128", steps=3))
    assert puna.train(recipe(model=str(model), steps=3))["step"] == 3


def test_ends_and_padding_named_later_are_no_other_model_and_are_exported(recipe: Make, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_model(tiny_model(), model)
    puna.train(recipe(model=str(model), steps=2))
    write_json(model / "generation_config.json", {"eos_token_id": [2, 7]})
    write_json(model / "config.json", read_json(model / "config.json") | {"pad_token_id": 5})
    run = puna.train(recipe(model=str(model), steps=3))
    puna.export(run["run_dir"], tmp_path / "exported")
    assert read_json(tmp_path / "exported" / "generation_config.json")["eos_token_id"] == [2, 7]
    assert read_json(tmp_path / "exported" / "config.json")["pad_token_id"] == 5


def test_a_run_goes_on_without_the_folder_that_it_began_with(
    recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    save_model(tiny_model(rms_norm_eps=1e-3), model)
    content = recipe(model="tiny-64", start=str(model), schedule={"name": "constant"})
    puna.train({**content, "run_dir": str(tmp_path / "whole")})
    puna.train({**content, "steps": 3})
    shutil.rmtree(model)
    puna.train(content)
    assert "there is no folder" in capsys.readouterr().err
    _assert_same_weights(_weights(content["run_dir"]), _weights(tmp_path / "whole"))
    with pytest.raises(PunaError, match="there is no folder"):
        puna.train({**content, "run_dir": str(tmp_path / "new")})


def test_the_state_is_saved_though_the_save_before_has_failed(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = sharded.write_sharded

    def full_once(path: Path, *arguments: Any) -> None:
        if "step-00000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, *arguments)

    monkeypatch.setattr(sharded, "write_sharded", full_once)
    content = recipe(steps=6, checkpoint={"every": 2, "keep": 9})
    assert puna.train(content)["step"] == 6
    assert list(checkpoints(content["run_dir"])) == [4, 6]
    assert "step-00000002 could not be saved: [Errno 28] No space left on device" in capsys.readouterr().err


def test_a_second_save_that_fails_ends_the_run_which_begins_again_when_it_can_be_saved(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    content = recipe(steps=9, checkpoint={"every": 2})
    with monkeypatch.context() as patched:
        patched.setattr(sharded, "write_sharded", full)
        with pytest.raises(OSError, match="No space left"):
            puna.train(content)
    assert len(read_metrics(Path(content["run_dir"]))) == 4
    assert puna.train(content)["step"] == 9


def test_weights_that_are_not_finite_do_not_replace_those_that_were(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_module.train_step

    def spoiling(model: DistributedModel, *arguments: Any, update: int, **options: Any) -> StepResult:
        if update == 4:
            model.weights["model.norm.weight"].data.fill_(math.nan)
        return real(model, *arguments, update=update, **options)

    monkeypatch.setattr(run_module, "train_step", spoiling)
    content = recipe(steps=9, checkpoint={"every": 1, "keep": 2})
    with pytest.raises(PunaError, match="not finite 4 steps in a row"):
        puna.train(content)
    assert list(checkpoints(content["run_dir"])) == [2, 3]
    assert all(weight.isfinite().all() for weight in _weights(content["run_dir"]).values())


def test_a_checkpoint_that_is_due_at_a_skipped_step_is_saved_at_the_next(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_module.train_step

    def skipping(*arguments: Any, update: int, **options: Any) -> StepResult:
        result = real(*arguments, update=update, **options)
        return replace(result, is_applied=update != 3)

    monkeypatch.setattr(run_module, "train_step", skipping)
    content = recipe(steps=8, checkpoint={"every": 3, "keep": 9})
    puna.train(content)
    assert list(checkpoints(content["run_dir"])) == [4, 6, 8]


def test_a_disk_that_is_full_for_a_while_ends_no_run_and_costs_no_numbers(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = run_module.Metrics.write

    def with_full_disk(self: Any, numbers: dict[str, Any]) -> None:
        if numbers["step"] not in (2, 3):
            write(self, numbers)
            return
        with open("/dev/full", "ab", buffering=0) as full, monkeypatch.context() as patched:
            patched.setattr(self, "_file", full)
            write(self, numbers)

    monkeypatch.setattr(run_module.Metrics, "write", with_full_disk)
    result = puna.train(recipe(steps=5))
    assert [line["step"] for line in read_metrics(Path(result["run_dir"]))] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written to (No space left on device)") == 1


def test_a_folder_that_is_removed_while_it_is_trained_in_is_made_again(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    puna.train(recipe(run_dir=str(whole), steps=6))
    take_step = run_module.train_step

    def removing(*arguments: Any, update: int, **options: Any) -> StepResult:
        if update == 4:
            shutil.rmtree(run_dir, onerror=lambda *_: shutil.rmtree(run_dir, ignore_errors=True))  # a save goes on
        return take_step(*arguments, update=update, **options)

    monkeypatch.setattr(run_module, "train_step", removing)
    puna.train(recipe(steps=6, checkpoint={"every": 1, "keep": 9}))
    err = capsys.readouterr().err
    assert f"someone removed files of {run_dir} while it was trained in; checkpoints that are left: 0" in err
    assert err.count("someone removed") == 1
    _assert_same_weights(_weights(run_dir), _weights(whole))
    assert (run_dir / "recipe.yaml").is_file()
    assert [line["step"] for line in read_metrics(run_dir)] == [5, 6]
    assert puna.train(recipe(steps=6))["step"] == 6


def test_a_folder_where_another_run_has_begun_meanwhile_is_left_to_it(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, take_step = tmp_path / "run", run_module.train_step

    def replacing(*arguments: Any, update: int, **options: Any) -> StepResult:
        if update == 4:
            while not (run_dir / "checkpoints/step-00000003").is_dir():
                time.sleep(0.01)
            run_dir.rename(tmp_path / "away")
            others.enter_context(only_run_in(run_dir))
        return take_step(*arguments, update=update, **options)

    monkeypatch.setattr(run_module, "train_step", replacing)
    with contextlib.ExitStack() as others, pytest.raises(PunaError, match="another process is training"):
        puna.train(recipe(steps=6, checkpoint={"every": 3}))
    assert Checkpoints(run_dir).newest() is None


def test_where_no_lock_keeps_others_away_it_is_said(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claim, "try_lock", lambda file: None)
    puna.train(recipe(steps=2))
    assert "has no locks: see to it that no second process trains there" in capsys.readouterr().err


def test_two_processes_cannot_train_in_one_folder(recipe: Make) -> None:
    content = recipe()
    with (
        only_run_in(Path(content["run_dir"])),
        pytest.raises(PunaError, match="another process is training"),
    ):
        puna.train(content)


def test_processes_that_torchrun_starts_again_wait_for_those_before(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(claim, "LOOK_SECONDS", 0.05)
    content = recipe(steps=2)
    run_dir = Path(content["run_dir"])
    with contextlib.ExitStack() as before:
        before.enter_context(only_run_in(run_dir))
        leaves = threading.Timer(0.3, before.close)
        leaves.start()
        assert puna.train(content)["step"] == 2
        leaves.join()
    assert capsys.readouterr().err.count(f"for another process to leave {run_dir}") == 1
    monkeypatch.setattr(claim, "PATIENCE_SECONDS", 0.2)
    with only_run_in(run_dir), pytest.raises(PunaError, match="another process is training"):
        puna.train(content)


def test_numbers_that_a_crash_spoiled_do_not_keep_a_run_from_continuing(
    recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    content = recipe(steps=3)
    file = Path(content["run_dir"]) / "metrics.jsonl"
    puna.train(content)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b"\0" * 40 + b"\xff\n" + lines[2])
    puna.train({**content, "steps": 4})
    assert f"{file}: line 2 is not JSON" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(file.parent)] == [1, 3, 4]


def test_tensorboard_events_are_written_when_asked_for(recipe: Make) -> None:
    pytest.importorskip("tensorboard")
    result = puna.train(recipe(log={"tensorboard": True}))
    assert list((Path(result["run_dir"]) / "tensorboard").glob("events.out.tfevents*"))


@pytest.mark.parametrize("moment", ["add_scalar", "close"])
def test_a_full_disk_costs_tensorboard_its_numbers_and_no_run_its_end(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    board = MagicMock(**{f"{moment}.side_effect": full})
    monkeypatch.setattr(metrics_module, "_summary_writer", lambda *_: board)
    result = puna.train(recipe(steps=4, log={"tensorboard": True}))
    assert list(checkpoints(result["run_dir"])) == [4]
    assert len(read_metrics(Path(result["run_dir"]))) == 4
    said = capsys.readouterr().err
    assert said.count("TensorBoard gets no more numbers of this run") == 1
    assert "No space left on device" in said


def test_whose_weights_a_new_run_begins_with_is_said(
    recipe: Make, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    puna.train(recipe(steps=2))
    assert "a new run, from random weights\n" in capsys.readouterr().err
    puna.train(recipe(steps=3))
    assert "a new run" not in capsys.readouterr().err
    shutil.copytree(tiny_model_folder, tmp_path / "start", ignore=shutil.ignore_patterns("token*"))
    puna.train(recipe(steps=2, start=str(tmp_path / "start"), run_dir=str(tmp_path / "other")))
    assert f"a new run, from the weights of {tmp_path / 'start'}\n" in capsys.readouterr().err
