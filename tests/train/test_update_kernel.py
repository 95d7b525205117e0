"""The kernel of the update against the plain way, on the CPU by Triton's interpreter, on a GPU as it is."""

import re

import pytest
import torch
from torch import Tensor

from puna.config import Optimizer
from puna.train import optimizer as optimizer_module
from puna.train.optimizer import AdamW
from tests.triton_interpreter import built_for_an_h100, interpret, needs_triton

pytestmark = needs_triton

SHAPES = {"whole blocks": (6, 192), "many tiles": (2, 1100), "odd blocks": (5, 70), "narrow": (7, 6), "norm": (130,)}
CASES = [(bits, dtype) for bits in (32, 8, 4) for dtype in (torch.float32, torch.bfloat16)]


def stepped(bits: int, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Weights and state after three updates."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device, dtype))
        for name, shape in SHAPES.items()
    }
    adamw = AdamW(weights.items(), Optimizer(state_bits=bits), seed=0)  # type: ignore[arg-type]
    for update in range(1, 4):
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator).to(device, dtype)
        adamw.step(update, 1e-3 * update, grad_scale=1 / update)
    return {"weight": {name: weight.detach() for name, weight in weights.items()}, **adamw.state}


def assert_same(ours: dict[str, dict[str, Tensor]], plain: dict[str, dict[str, Tensor]]) -> None:
    """Equal but for numbers so near a border between two levels, or two bf16 numbers, that fp32's last bit decides."""
    for kind, tensors in plain.items():
        for name, expected in tensors.items():
            found = ours[kind][name].cpu()
            assert found.dtype == expected.dtype
            difference = (found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1e-6)
            is_coded = expected.dtype in (torch.uint8, torch.bfloat16)
            assert (difference > (0 if is_coded else 1e-4)).double().mean() < 0.01, (kind, name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("bits", "dtype"), CASES)
def test_the_kernel_moves_as_the_plain_way_does(bits: int, dtype: torch.dtype) -> None:
    assert_same(stepped(bits, dtype, torch.device("cuda")), stepped(bits, dtype, torch.device("cpu")))


@pytest.mark.parametrize(("bits", "dtype"), CASES)
def test_what_moves_is_read_and_written_many_bytes_at_a_time(
    monkeypatch: pytest.MonkeyPatch, bits: int, dtype: torch.dtype
) -> None:
    from puna.train import update_kernel

    monkeypatch.setattr(optimizer_module, "takes_cuda_kernels", lambda kind: True)
    monkeypatch.setattr(optimizer_module, "_update_kernel", lambda: update_kernel.update)
    monkeypatch.setattr(optimizer_module, "_is_for_torch", lambda rows: False)
    weight = torch.nn.Parameter(torch.zeros(4, 4096, dtype=dtype))
    adamw = AdamW([("weight", weight)], Optimizer(state_bits=bits), seed=0)  # type: ignore[arg-type]
    (ptx,) = built_for_an_h100(lambda: adamw.move("weight", torch.zeros_like(weight), 1, 1e-3))
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= 2, "the weight and its gradient"
    looked_up = 2 * update_kernel.TILE // 128  # of both moments, by each of 128 threads
    assert len(re.findall(r"ld\.global\.b8", ptx)) <= looked_up, "codes are read together"
    assert not re.findall(r"st\.global\.b(8|16)", ptx)


def test_the_kernel_interpreted_moves_as_the_plain_way_does() -> None:
    interpret("tests.train.test_update_kernel.compare_all()")


def compare_all() -> None:
    """Compares all cases on the CPU; the interpreter must be chosen before triton is imported."""
    from puna.train import update_kernel

    cpu, plain_piece = torch.device("cpu"), optimizer_module._update_piece
    for bits, dtype in CASES:
        plain = stepped(bits, dtype, cpu)

        def by_kernel(piece, formats, factors, chances):  # type: ignore[no-untyped-def]
            blocks = {kind: each.blocks for kind, each in formats.items() if hasattr(each, "blocks")}
            update_kernel.update(piece, blocks, factors, chances)

        optimizer_module._update_piece = by_kernel
        ours = stepped(bits, dtype, cpu)
        optimizer_module._update_piece = plain_piece
        assert_same(ours, plain)
        print(bits, dtype, "same")
