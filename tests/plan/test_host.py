"""What a plan says of host memory is what a run takes there."""

from typing import Any

import pytest
import torch

import puna
from puna.checkpoint.huggingface import parameter_shapes
from puna.checkpoint.runs import _copies_bytes
from puna.cli import run
from puna.devices import page_locked
from puna.model.config import PRESETS
from puna.model.optimizer_state import state_shapes

ONE_GPU = "codellama-34b-finetune-1gpu"


def host_memory(recipe: str, changes: dict[str, Any], **arguments: Any) -> dict[str, float]:
    """Row -> bytes on the host of a device."""
    own = puna.plan(recipe, changes, layout=True, **arguments)["own"]
    return {name: gib * 2**30 for name, gib in own["host_memory"].items()}


def test_page_locked_memory_comes_in_powers_of_two() -> None:
    assert [page_locked(n) for n in (0, 1, 3, 4096, 4097)] == [0, 1, 4, 4096, 8192]


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("device", ["h200", "cpu"])
def test_copies_for_checkpoints_are_what_a_run_looks_for_room_for(bits: int, device: str) -> None:
    changes = {"model": "codellama-7b", "optimizer.state_bits": bits, "precision": "bf16-pure"}
    place, dtype = "meta" if device == "h200" else "cpu", torch.bfloat16

    def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(1, dtype=dtype, device=place).expand(shape)  # takes no memory

    shapes = parameter_shapes(PRESETS["codellama-7b"])
    state = {
        "model": {name: tensor(shape, dtype) for name, shape in shapes.items()},
        "optimizer": {
            name: {kind: tensor(size, getattr(torch, its)) for kind, (size, its) in
                   state_shapes(shape, bits, weight_dtype="bfloat16").items()}
            for name, shape in shapes.items()
        },
    }  # fmt: skip
    planned = host_memory(ONE_GPU, changes, device=device)
    assert planned["copies for checkpoints"] == pytest.approx(_copies_bytes(state))


def test_gradients_wait_on_the_host_unless_they_are_used_at_once() -> None:
    shapes = parameter_shapes(PRESETS["codellama-34b"])
    locked = sum(page_locked(2 * torch.Size(shape).numel()) for shape in shapes.values())
    assert host_memory(ONE_GPU, {}, memory_gib=139)["gradients"] == locked > 1.3 * 2 * 33e9
    at_once = {"optimizer.max_grad_norm": None, "batch_tokens": 4096}
    assert host_memory(ONE_GPU, at_once, memory_gib=139)["gradients"] == 0
    assert host_memory(ONE_GPU, {"optimizer.in_backward": False}, memory_gib=139)["gradients"] == 0
    assert host_memory(ONE_GPU, {}, device="cpu")["gradients"] == 0  # they stay where they are


def test_offloaded_inputs_wait_there_for_every_micro_batch_in_flight() -> None:
    changes = {"recompute": "offload", "recompute_layers": 10, "parallel.pp": 2, "parallel.tp": 8}
    inputs = 4096 * 8192 * 2 / 8  # tokens, width, bf16, shared by tp
    assert host_memory("codellama-34b-pretrain", changes, devices=16, memory_gib=64)["activations"] == 2 * 10 * inputs


def test_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run(["plan", ONE_GPU, "--memory-gib", "139", "--layout"])
    out = capsys.readouterr().out
    assert "host memory a device: 86.50 GiB of gradients" in out
    assert "copies for checkpoints: 178.41 GiB of host memory a device, or training waits for each" in out
