"""AdamW against torch's own; stochastic rounding against its expectation; a sharded update against the whole one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from puna.checkpoint import Checkpoints
from puna.config import Optimizer
from puna.errors import PunaError
from puna.train import optimizer as optimizer_module
from puna.train.optimizer import AdamW
from puna.train.rounding import Chance, Place, round_stochastically, seeds_of


def _parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    return {
        "matrix": torch.nn.Parameter(torch.randn(7, 6).to(dtype)),
        "norm": torch.nn.Parameter(torch.ones(5).to(dtype)),
    }


def _bits(*shape: int, key: str = "key") -> Tensor:
    return bits_at(Place(0, 0, shape[1]), shape, key=key)


def bits_at(place: Place, shape: tuple[int, ...], *, key: str = "key") -> Tensor:
    return Chance.of(seeds_of(key), place).bits(torch.empty(shape))


def test_ten_steps_equal_torchs_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(optimizer_module.PIECE, "cpu", 8)  # several pieces a tensor
    ours, theirs = _parameters(), _parameters()
    settings = Optimizer(weight_decay=0.1)
    adamw = AdamW(ours.items(), settings, seed=0)
    groups = [
        {"params": [theirs["matrix"]], "weight_decay": 0.1},
        {"params": [theirs["norm"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=settings.betas, eps=settings.eps)
    for update in range(1, 11):
        for name in ours:
            ours[name].grad = torch.randn(ours[name].shape, generator=torch.Generator().manual_seed(update))
            theirs[name].grad = ours[name].grad.clone() * 0.5
        adamw.step(update, 1e-2, grad_scale=0.5)
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_torchs_fused_update_equals_the_pieces(*, bias_correction: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = _whole(7, 64, 0, torch.float32), _whole(7, 64, 0, torch.float32)
    for weight, lanes in ((fused, optimizer_module.LANES), (plain, 1000)):
        monkeypatch.setattr(optimizer_module, "LANES", lanes)
        adamw = AdamW([("w", weight)], Optimizer(weight_decay=0.1), seed=0, bias_correction=bias_correction)
        for update in range(1, 6):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(update))
            adamw.step(update, 1e-2, grad_scale=0.3)
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-7)
    assert not torch.equal(fused, plain)  # two ways


def test_stochastic_rounding_is_right_on_average_and_gives_a_neighbour() -> None:
    x = torch.full((2000, 100), 1.0 + 0.3 * 2**-7)  # bf16 neighbours of it: 1 and 1 + 2^-7
    rounded = round_stochastically(x, _bits(2000, 100)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.mean().item() == pytest.approx(x[0, 0].item(), abs=5 * 2**-7 * (0.21 / 200_000) ** 0.5)


def test_stochastic_rounding_keeps_what_is_exact_or_not_finite() -> None:
    x = torch.tensor([[0.0, 1.5, -2.0, float("inf"), float("-inf"), float("nan")]])
    rounded = round_stochastically(x, _bits(1, 6)).float()
    assert torch.equal(rounded[0, :5], x[0, :5])
    assert rounded[0, 5].isnan()
    all_ones = torch.tensor([[0x7FFFFFFF, -1]], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(all_ones, torch.full((1, 2), 0xFFFF, dtype=torch.int32)).isnan().all()


def test_random_bits_are_even_and_know_nothing_of_their_neighbours() -> None:
    bits = _bits(512, 512)
    n = bits.numel()
    counts = torch.bincount(bits.flatten() >> 8, minlength=256)
    assert ((counts - n / 256).square() / (n / 256)).sum() < 255 + 5 * (2 * 255) ** 0.5  # chi-squared, 5 sigma
    centred = bits.double() - 32767.5
    variance = 65536**2 / 12
    others = {
        "the next column": (centred[:, 1:], centred[:, :-1]),
        "the next row": (centred[1:], centred[:-1]),
        "another key": (centred, _bits(512, 512, key="other").double() - 32767.5),
    }
    for what, (one, other) in others.items():
        assert abs((one * other).mean().item() / variance) < 5 / n**0.5, what


def test_random_bits_of_a_part_are_those_of_the_whole() -> None:
    whole = bits_at(Place(0, 0, 10), (12, 10))
    assert torch.equal(bits_at(Place(3, 4, 10), (5, 6)), whole[3:8, 4:])
    far = Place(2**31 // 10, 0, 10)  # past the int32 numbers
    assert torch.equal(bits_at(far, (3, 10))[1:], bits_at(Place(far.row + 1, 0, 10), (2, 10)))


def test_updates_too_small_for_bf16_still_move_the_weights() -> None:
    parameters = {"w": torch.nn.Parameter(torch.ones(4096, 2, dtype=torch.bfloat16))}
    adamw = AdamW(parameters.items(), Optimizer(weight_decay=0.0), seed=0)
    for update in range(1, 51):
        parameters["w"].grad = torch.ones_like(parameters["w"])
        adamw.step(update, 1e-4)  # a 78th of the distance between bf16 numbers below 1 and 26 times that at most
    assert parameters["w"].float().mean().item() == pytest.approx(1 - 50 * 1e-4, abs=2e-4)


def test_the_random_bits_are_a_function_of_seed_and_update() -> None:
    results = []
    for seed, update in ((0, 3), (0, 3), (1, 3), (0, 4)):
        parameters = _parameters(torch.bfloat16)
        adamw = AdamW(parameters.items(), Optimizer(), seed=seed, bias_correction=False)
        parameters["matrix"].grad = torch.ones_like(parameters["matrix"])
        adamw.step(update, 1e-3)
        results.append(parameters["matrix"].detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])


@pytest.mark.parametrize("state_bits", [8, 4])
def test_matrices_have_codes_and_weights_of_one_dimension_fp32(state_bits: int) -> None:
    adamw = AdamW(_parameters(torch.bfloat16).items(), Optimizer(state_bits=state_bits), seed=0)
    assert {kind: set(tensors) for kind, tensors in adamw.state.items()} == {
        "exp_avg": {"matrix", "norm"},
        "exp_avg_sq": {"matrix", "norm"},
        "exp_avg_scales": {"matrix"},
        "exp_avg_sq_scales": {"matrix"},
    }
    for moment in ("exp_avg", "exp_avg_sq"):
        assert adamw.state[moment]["matrix"].dtype == torch.uint8
        assert adamw.state[moment]["norm"].dtype == torch.float32


@pytest.mark.parametrize("state_bits", [8, 4])
def test_pieces_do_not_change_the_result(state_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for piece in (1 << 16, 130):
        monkeypatch.setitem(optimizer_module.PIECE, "cpu", piece)
        weight = _whole(9, 64, 0, torch.float32)
        adamw = AdamW([("w", weight)], Optimizer(state_bits=state_bits), seed=0)
        _take_steps(adamw, lambda grad: grad)
        results.append((weight.detach(), adamw.state))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][kind]["w"], results[1][1][kind]["w"]) for kind in results[0][1])


@pytest.mark.parametrize("state_bits", [32, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_saved_and_loaded_continues_to_the_last_bit(state_bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    weight = _whole(9, 80, 0, dtype)
    adamw = AdamW([("w", weight)], Optimizer(state_bits=state_bits), seed=0)
    _take_steps(adamw, lambda grad: grad)
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(3, {"model": {"w": weight.detach()}, "optimizer": adamw.state}, {})
    checkpoints.wait()
    other = _whole(9, 80, 1, dtype)
    continued = AdamW([("w", other)], Optimizer(state_bits=state_bits), seed=0)
    checkpoints.load(path, {"model": {"w": other.detach()}, "optimizer": continued.state})
    for each in (adamw, continued):
        _take_steps(each, lambda grad: grad, first=4)
    assert torch.equal(weight, other)


# ---------------------------------------------------------------------------------------------------------------------
# Sharded: every rank's update in turn, in one process, against the update of the whole

#: (rows, columns; 0: one dimension), (mesh, the dim that each of its axes splits; None: copies)
LAYOUTS = [
    ((7, 128), (3,), (0,)),  # 3, 3, 1 rows
    ((5, 64), (4,), (0,)),  # 2, 2, 1 rows and none
    ((6, 256), (2,), (1,)),
    ((6, 200), (2,), (None,)),
    ((5, 256), (2, 2), (0, 1)),
    ((6, 128), (2, 2), (None, 0)),
    ((7, 0), (3,), (0,)),
    ((3, 0), (2,), (None,)),
]


@pytest.mark.parametrize("state_bits", [32, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "mesh_shape", "dims"), LAYOUTS)
def test_every_ranks_part_of_an_update_is_that_of_the_whole(
    shape: tuple[int, int], mesh_shape: tuple[int, ...], dims: tuple[int | None, ...], dtype: torch.dtype,
    state_bits: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(optimizer_module.PIECE, "cpu", 300)
    settings = Optimizer(state_bits=state_bits)
    whole = _whole(*shape, 0, dtype)
    expected = AdamW([("w", whole)], settings, seed=5)
    _take_steps(expected, lambda grad: grad)
    for rank in range(torch.Size(mesh_shape).numel()):
        with _as_rank(rank, mesh_shape) as mesh:
            weight = torch.nn.Parameter(_part(_whole(*shape, 0, dtype).detach(), mesh, dims))
            adamw = AdamW([("w", weight)], settings, seed=5)
            _take_steps(adamw, lambda grad: _part(grad, mesh, dims))
            pairs = [(weight.detach(), whole.detach())]
            pairs += [(adamw.state[kind]["w"], expected.state[kind]["w"]) for kind in expected.state]
            for ours, theirs in pairs:
                assert ours.shape == theirs.shape
                assert torch.equal(ours.to_local(), _part(theirs, mesh, dims).to_local())


def test_columns_split_inside_a_block_are_refused_by_name() -> None:
    with _as_rank(0, (2,)) as mesh:
        weight = torch.nn.Parameter(_part(torch.zeros(4, 192), mesh, (1,)))
        with pytest.raises(PunaError, match=r"^o_proj cannot .* 8 bits: its 192 columns, split over 2 ranks, .* of 64"):
            AdamW([("o_proj", weight)], Optimizer(state_bits=8), seed=0)


@contextmanager
def _as_rank(rank: int, mesh_shape: tuple[int, ...]) -> Iterator[DeviceMesh]:
    """Has this process be one of many that are not there: what they hold is known, and nothing is sent.

    Each rank has a mesh of its own among more ranks than needed, because torch remembers a rank's place in a mesh.
    """
    size = torch.Size(mesh_shape).numel()
    dist.init_process_group("fake", rank=rank * size + rank, world_size=size * size)
    try:
        yield DeviceMesh("cpu", torch.arange(rank * size, (rank + 1) * size).view(mesh_shape))
    finally:
        dist.destroy_process_group()


def _part(whole: Tensor, mesh: Any, dims: tuple[int | None, ...]) -> Any:
    """The DTensor of a tensor, cut by hand as torch cuts."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    part = whole
    for axis, dim in enumerate(dims):
        if dim is not None:
            chunks = part.chunk(mesh.shape[axis], dim)
            place = mesh.get_coordinate()[axis]
            part = chunks[place] if place < len(chunks) else part.narrow(dim, 0, 0)
    placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
    return DTensor.from_local(
        part.contiguous(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _whole(rows: int, columns: int, seed: int, dtype: torch.dtype) -> torch.nn.Parameter:
    shape = (rows, columns) if columns else (rows,)
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def _take_steps(adamw: AdamW, part: Any, *, first: int = 1) -> None:
    for update in range(first, first + 3):
        weight = adamw.parameters["w"]
        grad = torch.randn(tuple(weight.shape), generator=torch.Generator().manual_seed(update)) * 1e-2
        adamw.step(update, 1e-2, take=lambda name, grad=grad, weight=weight: part(grad.to(weight.dtype)))
