"""Gradients on the host and in the backward pass against those that stay on the device."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from puna.config import Optimizer
from puna.errors import PunaError
from puna.model.llama import Llama
from puna.testing import tiny_model
from puna.train import gradients as gradients_module
from puna.train import optimizer as optimizer_module
from puna.train.gradients import Gradients, HostGradients, UpdatesInBackward, WideGradients, gradients_of, square_of
from puna.train.optimizer import AdamW

Kind = Callable[[AdamW], Gradients]


def _train(
    kind: Kind, *, micro_batches: int, max_grad_norm: float | None = None, dtype: torch.dtype = torch.float32,
    steps: int = 2, model: Llama | None = None,
) -> tuple[dict[str, Tensor], list[float]]:  # fmt: skip
    """The weights and squared norms after some steps of a tiny model."""
    model = (model or tiny_model()).to(dtype)
    adamw = AdamW(model.named_parameters(), Optimizer(), seed=0)
    gradients = kind(adamw)
    generator = torch.Generator().manual_seed(0)
    squares = []
    for update in range(1, steps + 1):
        gradients.begin(update, 1e-2)
        for _ in range(micro_batches):
            tokens = torch.randint(3, 512, (2, 12), generator=generator)
            logits = model(tokens[:, :-1]).float()
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        squares.append(gradients.squared_norm())
        scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / squares[-1] ** 0.5)
        adamw.step(update, 1e-2, grad_scale=scale, take=gradients.pop)
        gradients.clear()
        assert all(p.grad is None for p in model.parameters())
    return dict(model.named_parameters()), squares


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_sums_on_the_host_with_clipping_equal_the_plain_way_to_the_last_bit(micro_batches: int) -> None:
    plain, expected = _train(Gradients, micro_batches=micro_batches, max_grad_norm=0.1)
    weights, squares = _train(HostGradients, micro_batches=micro_batches, max_grad_norm=0.1)
    assert squares == expected
    assert expected[0] > 0.1**2  # it was clipped
    assert all(torch.equal(weights[name], plain[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_in_the_backward_pass_equal_the_plain_way_to_the_last_bit(dtype: torch.dtype) -> None:
    plain, expected = _train(Gradients, micro_batches=1, dtype=dtype)
    weights, squares = _train(UpdatesInBackward, micro_batches=1, dtype=dtype)
    assert squares == expected
    assert all(torch.equal(weights[name], plain[name]) for name in plain)


@pytest.mark.parametrize("kind", [HostGradients, UpdatesInBackward])
def test_a_weight_that_is_embedding_and_head_is_moved_by_the_sum_of_both(kind: Kind) -> None:
    plain, _ = _train(Gradients, micro_batches=1, model=tiny_model(tie_word_embeddings=True))
    weights, _ = _train(kind, micro_batches=1, model=tiny_model(tie_word_embeddings=True))
    assert all(torch.equal(weights[name], plain[name]) for name in plain)


@pytest.mark.parametrize("kind", [Gradients, WideGradients, HostGradients, UpdatesInBackward])
def test_grad_holds_every_gradient_or_never_more_than_one(kind: Kind) -> None:
    model = tiny_model()
    parameters = list(model.parameters())
    largest = max(p.nbytes for p in parameters)
    total = sum(p.nbytes for p in parameters)
    adamw = AdamW(model.named_parameters(), Optimizer(), seed=0)
    live = []
    for parameter in parameters:  # before the hooks of `kind`: when a gradient is there and has not been taken
        parameter.register_post_accumulate_grad_hook(
            lambda _: live.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))
        )
    gradients = kind(adamw)
    gradients.begin(1, 1e-3)
    model(torch.arange(3, 13)[None]).sum().backward()
    assert len(live) == len(parameters)
    assert max(live) == (total if kind is Gradients else largest)


def test_bf16_gradients_are_summed_in_fp32_or_right_on_average_where_torchs_sums_lose_small_ones() -> None:
    sums = {}
    for kind in (Gradients, WideGradients, HostGradients):
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        gradients = kind(AdamW([("w", weight)], Optimizer(), seed=0))
        gradients.begin(1, 1e-3)
        for size in (1.0, *[2.0**-10] * 100):
            (weight * size).sum().backward()
        total = gradients.pop("w") if kind is Gradients else (gradients.squared_norm(), gradients.pop("w"))[1]
        assert total is not None
        assert total.dtype == (torch.float32 if kind is WideGradients else torch.bfloat16)
        sums[kind] = total.float().mean().item()
    assert sums[Gradients] == 1.0
    assert sums[WideGradients] == 1 + 100 * 2**-10
    assert sums[HostGradients] == pytest.approx(1 + 100 * 2**-10, abs=0.002)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4096, 4000), (32000, 64), (3, 5), (7,), (0, 4)])
def test_the_norm_of_a_large_matrix_loses_nothing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = sum(float(part.double().square().sum()) for part in x.split(1000))
    assert square_of(x).item() == pytest.approx(expected, rel=1e-5)


def test_bf16_sums_are_the_same_again_and_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = _train(HostGradients, micro_batches=3, dtype=torch.bfloat16)
    monkeypatch.setitem(optimizer_module.PIECE, "cpu", 200)
    pieces, _ = _train(HostGradients, micro_batches=3, dtype=torch.bfloat16)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


@pytest.mark.parametrize("kind", [Gradients, WideGradients, HostGradients])
def test_sums_that_are_not_finite_are_dropped_and_the_next_update_begins_anew(kind: Kind) -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    adamw = AdamW([("w", weight)], Optimizer(), seed=0)
    gradients = kind(adamw)
    gradients.begin(1, 1e-3)
    (weight * float("inf")).sum().backward()
    assert gradients.squared_norm() == float("inf")
    gradients.clear()
    assert gradients.squared_norm() == 0
    adamw.step(1, 1e-3, take=gradients.pop)
    assert torch.equal(weight, torch.ones(3, 4))
    gradients.begin(2, 1e-3)
    (weight * 2).sum().backward()
    assert gradients.squared_norm() == 48
    assert torch.equal(gradients.pop("w"), torch.full((3, 4), 2.0))


def test_in_the_backward_pass_a_gradient_that_is_not_finite_leaves_its_own_weight_alone() -> None:
    good, bad = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    adamw = AdamW([("good", good), ("bad", bad)], Optimizer(), seed=0)
    gradients = UpdatesInBackward(adamw)
    gradients.begin(1, 1e-3)
    (good + bad * float("nan")).sum().backward()
    assert gradients.squared_norm() != gradients.squared_norm()
    assert torch.equal(bad, torch.ones(3, 4))
    assert not adamw.state["exp_avg"]["bad"].any()
    assert (good < 1).all()


def test_a_second_gradient_in_one_update_is_refused_where_the_first_has_been_used() -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    gradients = UpdatesInBackward(AdamW([("w", weight)], Optimizer(), seed=0))
    gradients.begin(1, 1e-3)
    weight.sum().backward()
    with pytest.raises(PunaError, match=r"w got a second gradient in update 1.*set optimizer\.max_grad_norm"):
        weight.sum().backward()


@pytest.mark.parametrize(
    ("in_backward", "is_clipped", "micro_batches", "dtype", "expected"),
    [
        (False, False, 1, torch.bfloat16, Gradients),
        (False, True, 2, torch.float32, Gradients),
        (False, True, 2, torch.bfloat16, WideGradients),
        (True, True, 1, torch.float32, HostGradients),
        (True, False, 2, torch.bfloat16, HostGradients),
        (True, False, 1, torch.bfloat16, UpdatesInBackward),
    ],
)
def test_gradients_are_where_they_are_right_and_wait_on_the_host_only_if_something_must_be_known_first(
    in_backward: bool, is_clipped: bool, micro_batches: int, dtype: torch.dtype, expected: type
) -> None:
    adamw = AdamW(tiny_model().to(dtype).named_parameters(), Optimizer(), seed=0)
    made = gradients_of(adamw, in_backward=in_backward, is_clipped=is_clipped, micro_batches=micro_batches)
    assert type(made) is expected


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_sums_in_page_locked_memory_equal_the_plain_way_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.train.gradients.IN_FLIGHT_BYTES", 1 << 16)  # the backward pass must wait
    results = []
    for kind in (Gradients, HostGradients):
        weights = [nn.Parameter(torch.randn(256, 64, generator=torch.Generator().manual_seed(i)).to(
            torch.accelerator.current_accelerator())) for i in range(8)]  # fmt: skip
        adamw = AdamW([(str(i), weight) for i, weight in enumerate(weights)], Optimizer(), seed=0)
        gradients = kind(adamw)
        for update in range(1, 4):
            gradients.begin(update, 1e-2)
            for size in (1.0, 0.3, 0.7):
                sum((weight * weight * size).sum() for weight in weights).backward()  # type: ignore[union-attr]
            squares = gradients.squared_norm()
            adamw.step(update, 1e-2, grad_scale=min(1.0, 1 / squares**0.5), take=gradients.pop)
            gradients.clear()
        results.append(weights)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


class _FakeStream:
    """A stream that does everything at once, and counts the events that were waited for."""

    waits = 0

    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def __enter__(self) -> "_FakeStream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        assert isinstance(other, _FakeStream)

    def record_event(self) -> "_FakeStream":
        return self

    def synchronize(self) -> None:
        type(self).waits += 1


@pytest.mark.parametrize("in_flight_bytes", [1 << 20, 300])
def test_the_backward_pass_waits_for_the_host_once_too_much_is_on_its_way(
    in_flight_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, *, device, pin_memory: empty_like(x, device=device))
    monkeypatch.setattr(torch, "Stream", _FakeStream)
    monkeypatch.setattr(torch.accelerator, "current_stream", _FakeStream)
    monkeypatch.setattr(gradients_module, "IN_FLIGHT_BYTES", in_flight_bytes)
    weights = {str(i): nn.Parameter(torch.ones(8, 8)) for i in range(3)}  # 256 bytes each
    gradients = HostGradients(AdamW(weights.items(), Optimizer(), seed=0))
    gradients._sums = gradients_module._PageLocked(weights, torch.device("cpu"))
    waited = []
    for size in (1.0, 2.0):
        _FakeStream.waits = 0
        sum((weight * size).sum() for weight in weights.values()).backward()  # type: ignore[union-attr]
        waited.append(_FakeStream.waits)
    # one fits; with the sum before, which is on its way too, none does
    assert waited == ([0, 0] if in_flight_bytes > 300 else [2, 1 + 3])
    assert gradients.squared_norm() == 3 * 64 * 9
    assert all(torch.equal(gradients.pop(name), torch.full((8, 8), 3.0)) for name in weights)  # type: ignore[arg-type]
    assert gradients.pop("0") is None


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    place = tmp_path_factory.mktemp("ranks")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_as_rank, args=(rank, store.port, place)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(600)  # a busy machine may take minutes to load torch twice
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return [torch.load(place / f"{rank}.pt") for rank in range(2)]


def _as_rank(rank: int, port: int, place: Path) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    kinds = (Gradients, WideGradients, HostGradients, UpdatesInBackward)
    seen = {kind.__name__: _sharded_steps(kind) for kind in kinds}
    seen["state"] = _saved_state(place / "state")
    seen["partial"] = _partial_gradient(rank)
    seen["one rank not finite"] = _one_rank_not_finite(rank)
    torch.save(seen, place / f"{rank}.pt")
    store.set(f"{rank} is done", "")
    store.wait(["0 is done", "1 is done"])  # a rank that leaves early may close connections that the other still reads
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads are at work still when the interpreter ends, and may abort it


def _layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 3, bias=False), nn.LayerNorm(3), nn.Linear(3, 5, bias=False))


def _sharded_steps(kind: type[Gradients]) -> dict[str, Any]:
    """Weights after two steps under FSDP, the same rows on both ranks, and what `.grad` held after a backward pass."""
    from torch.distributed.fsdp import fully_shard

    model = _layers()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    adamw = AdamW(model.named_parameters(), Optimizer(state_bits=8), seed=0)
    gradients = kind(adamw)
    squares, held = [], 0
    for update in (1, 2):
        gradients.begin(update, 1e-2)
        for micro_batch in range(1 if kind is UpdatesInBackward else 2):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(update + 10 * micro_batch))
            model(x).square().sum().backward()
            held += sum(p.grad is not None for p in model.parameters())
        squares.append(gradients.squared_norm())
        adamw.step(update, 1e-2, take=gradients.pop)
        gradients.clear()
    whole = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    return {"weights": whole, "squares": squares, "held": held}


def _saved_state(path: Path) -> dict[str, Any]:
    """State in 4 bits of a weight sharded by rows, unevenly, gathered, and saved in parts."""
    from torch.distributed.checkpoint import save
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(5, 128), mesh, [Shard(0)]))
    adamw = AdamW([("w", weight)], Optimizer(state_bits=4), seed=0)
    grad = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    adamw.step(1, 1e-2, take=lambda _: distribute_tensor(grad, mesh, [Shard(0)]))
    save(adamw.state, checkpoint_id=path)
    return {kind: tensors["w"].full_tensor() for kind, tensors in adamw.state.items()}  # type: ignore[attr-defined]


def _partial_gradient(rank: int) -> dict[str, Any]:
    """A weight of which both ranks have a copy, and of its gradient a summand each."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Replicate()]))
    adamw = AdamW([("w", weight)], Optimizer(), seed=0)
    gradients = Gradients(adamw)
    weight.grad = DTensor.from_local(torch.full((2, 2), rank + 1.0), mesh, [Partial()])
    square = gradients.squared_norm()
    grad = gradients.pop("w")
    assert grad is not None
    return {"square": square, "grad": grad.to_local()}  # type: ignore[attr-defined]


def _one_rank_not_finite(rank: int) -> Tensor:
    """A rank's part of a weight, sharded by rows, after a gradient that is infinite in the other's part."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)]))
    gradients = UpdatesInBackward(AdamW([("w", weight)], Optimizer(), seed=0))
    gradients.begin(1, 1e-2)
    weight.backward(DTensor.from_local(torch.full((2, 2), float("inf") if rank else 1.0), mesh, [Shard(0)]))
    return weight.detach().to_local()  # type: ignore[attr-defined]


def _whole_steps(micro_batches: int) -> tuple[dict[str, Tensor], list[float]]:
    """The same as `_sharded_steps`, on one rank without FSDP."""
    model = _layers()
    adamw = AdamW(model.named_parameters(), Optimizer(state_bits=8), seed=0)
    gradients = Gradients(adamw)
    squares = []
    for update in (1, 2):
        for micro_batch in range(micro_batches):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(update + 10 * micro_batch))
            model(x).square().sum().backward()
        squares.append(gradients.squared_norm())
        adamw.step(update, 1e-2, take=gradients.pop)
        gradients.clear()
    return {name: p.detach() for name, p in model.named_parameters()}, squares


@pytest.mark.parametrize(
    ("kind", "micro_batches"),
    [("Gradients", 2), ("WideGradients", 2), ("HostGradients", 2), ("UpdatesInBackward", 1)],
)
def test_under_fsdp_all_ways_take_the_steps_of_one_rank(
    kind: str, micro_batches: int, of_two_ranks: list[dict[str, Any]]
) -> None:
    weights, squares = _whole_steps(micro_batches)
    for name, weight in weights.items():
        torch.testing.assert_close(of_two_ranks[0][kind]["weights"][name], weight)
    shares = [seen[kind]["squares"] for seen in of_two_ranks]
    assert [sum(share) for share in zip(*shares, strict=True)] == pytest.approx(squares)


def test_under_fsdp_no_gradient_stays_in_grad(of_two_ranks: list[dict[str, Any]]) -> None:
    for seen in of_two_ranks:
        assert seen["Gradients"]["held"] == 16
        assert seen["HostGradients"]["held"] == seen["UpdatesInBackward"]["held"] == 0


def test_a_gradient_that_is_a_sum_over_ranks_is_summed_before_it_is_measured(
    of_two_ranks: list[dict[str, Any]],
) -> None:
    for seen in of_two_ranks:
        assert torch.equal(seen["partial"]["grad"], torch.full((2, 2), 3.0))
    assert sum(seen["partial"]["square"] for seen in of_two_ranks) == pytest.approx(4 * 9)


def test_a_weight_is_left_alone_on_all_ranks_if_its_gradient_is_infinite_on_one(
    of_two_ranks: list[dict[str, Any]],
) -> None:
    for seen in of_two_ranks:
        assert torch.equal(seen["one rank not finite"], torch.ones(2, 2))


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_state_saved_in_parts_is_loaded_whole(of_two_ranks: list[dict[str, Any]], tmp_path_factory: Any) -> None:
    from torch.distributed.checkpoint import load

    path = next(tmp_path_factory.getbasetemp().glob("ranks*/state"))
    adamw = AdamW([("w", nn.Parameter(torch.ones(5, 128)))], Optimizer(state_bits=4), seed=0)
    load(adamw.state, checkpoint_id=path, no_dist=True)
    expected = of_two_ranks[0]["state"]
    assert expected["exp_avg"].any()
    assert {kind: tuple(tensors["w"].shape) for kind, tensors in adamw.state.items()} == {
        "exp_avg": (5, 64), "exp_avg_scales": (5, 2), "exp_avg_sq": (5, 64), "exp_avg_sq_scales": (5, 2),
    }  # fmt: skip
    assert all(torch.equal(adamw.state[kind]["w"], expected[kind]) for kind in expected)
