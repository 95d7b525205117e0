"""Checkpoints of many ranks: written in one layout, read in any other, and one rank's trouble is everyone's."""

import errno
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from puna.checkpoint import export, load
from puna.checkpoint.runs import Checkpoints
from puna.config import Parallel
from puna.errors import PunaError
from puna.model.llama import initial_weight
from puna.parallel.layout import Layout
from puna.parallel.mesh import Ranks
from puna.parallel.model import DistributedModel
from tests.distributed.layouts import CONFIG

META = {"recipe": {"peak_lr": 1e-5}, "step": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def test_what_one_layout_saves_every_other_loads_to_the_last_bit(tmp_path, in_ranks):
    in_ranks(4, save_and_load_in_four, str(tmp_path))
    in_ranks(3, load_and_save_in_three, str(tmp_path))
    for step in (1, 2, 3, 4):  # saved as tp 2 x fsdp 2, fsdp 4, pp 2 x fsdp 2, uneven fsdp 3
        state = whole_state(seed=9)
        assert Checkpoints(tmp_path).load(tmp_path / "checkpoints" / f"step-{step:08d}", state) == META
        assert_same(state, whole_state(seed=1))
    assert Checkpoints(tmp_path).newest(say=pytest.fail).name == "step-00000004"


def save_and_load_in_four(run_dir: str) -> None:
    checkpoints = Checkpoints(run_dir, keep=9)
    paths = {}
    for step, layout in ((1, "tp 2 x fsdp 2"), (2, "fsdp"), (3, "pp 2 x fsdp 2")):
        state = state_of(layout, seed=1)
        paths[layout] = checkpoints.save(step, state, META)
        blank(state)  # what training does to the state from here on is no business of the save
    assert checkpoints.newest() == paths["pp 2 x fsdp 2"]
    first, second, third = paths
    for saved, layout in (
        (first, second),
        (first, third),
        (first, "hsdp"),
        (first, "tp"),
        (second, first),
        (third, first),
    ):
        state = state_of(layout, seed=9)
        assert checkpoints.load(paths[saved], state) == META
        assert_same(state, whole_state(seed=1))


def load_and_save_in_three(run_dir: str) -> None:
    checkpoints = Checkpoints(run_dir, keep=9)
    state = state_of("fsdp", seed=9)
    assert 0 in {values.to_local().numel() for values in state["model"].values()} or dist.get_rank() < 2
    assert checkpoints.load(f"{run_dir}/checkpoints/step-00000001", state) == META
    assert_same(state, whole_state(seed=1))
    checkpoints.save(4, state, META)
    checkpoints.wait()


#: So many processes -> the layouts under which they save a model.
LAYOUTS: dict[int, list[dict[str, int]]] = {
    1: [{}],
    2: [{"dp_shard": 2}, {"tp": 2}, {"pp": 2}],
    4: [{"dp_shard": 4}, {"tp": 2, "pp": 2}, {"dp_replicate": 2, "dp_shard": 2}, {"tp": 4}],
    8: [{"dp_shard": 8}, {"tp": 2, "pp": 2, "dp_shard": 2}, {"tp": 4, "dp_replicate": 2}],
}


def test_an_export_does_not_show_how_many_saved_it_and_under_which_layout(tmp_path, in_ranks):
    exported = {}
    for size, layouts in LAYOUTS.items():
        in_ranks(size, save_model_under, str(tmp_path), layouts)
        for layout in layouts:
            folder = export(tmp_path / str(layout), tmp_path / f"export of {layout}")
            exported[str(layout)] = {path.name: path.read_bytes() for path in folder.iterdir()}
            assert len(list((tmp_path / str(layout)).rglob("model/*.distcp"))) == size
    whole = exported.pop("{}")
    for name, values in load(tmp_path / "export of {}")[0].named_parameters():
        assert torch.equal(values, initial_weight(name, tuple(values.shape), CONFIG, seed=1)), name
    for layout, files in exported.items():
        assert files == whole, layout


def save_model_under(folder: str, layouts: list[dict[str, int]]) -> None:
    for sizes in layouts:
        ranks = Ranks.of(Layout(**sizes), torch.device("cpu"))
        model = DistributedModel.build(CONFIG, ranks, Parallel(), torch.device("cpu"), dtype=torch.float32)
        model.fill(lambda name, shape: initial_weight(name, shape, CONFIG, seed=1))
        checkpoints = Checkpoints(f"{folder}/{sizes}")
        checkpoints.save(1, {"model": model.weights}, {"model_config": CONFIG.to_json()})
        checkpoints.wait()


class Block(nn.Module):
    """Weights that divide by ranks, and some that do not; one has fewer rows than there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.odd = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False), nn.Linear(5, 7)
        self.norm = nn.Parameter(torch.randn(2))


def whole_state(seed: int) -> dict[str, Any]:
    """The state of a run in one process: weights, a moment in bf16, and one in bytes, two codes each, with scales."""
    torch.manual_seed(seed)
    model = {name: values.detach() for name, values in Block().named_parameters()}
    matrices = {name: values for name, values in model.items() if values.dim() == 2}
    return {
        "model": model,
        "optimizer": {
            "exp_avg": {name: torch.randn(values.shape).bfloat16() for name, values in model.items()},
            "codes": {n: torch.randint(0, 256, (v.shape[0], v.shape[1] // 2 * 2 // 2), dtype=torch.uint8)
                      for n, v in matrices.items()},
            "scales": {name: torch.randn(values.shape[0], 1) for name, values in matrices.items()},
        },
    }  # fmt: skip


def state_of(layout: str, seed: int) -> dict[str, Any]:
    """A rank's part of `whole_state` in a layout, the weights as fully_shard and tensor parallelism leave them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    size = dist.get_world_size()
    whole = whole_state(seed)
    model = Block()
    model.load_state_dict(whole["model"])
    columns_and_rows = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if layout == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    elif layout == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))
    elif layout == "tp":
        parallelize_module(model, init_device_mesh("cpu", (size,)), columns_and_rows)
    elif layout == "tp 2 x fsdp 2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], columns_and_rows)
        fully_shard(model, mesh=mesh["dp"])
    elif layout == "pp 2 x fsdp 2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
        for name in ("up", "odd") if mesh.get_local_rank("pp") else ("down", "norm"):
            delattr(model, name)
        fully_shard(model, mesh=mesh["dp"])
    weights = dict(model.state_dict())
    optimizer = {
        kind: {name: placed_like(values, weights[name]) for name, values in tensors.items() if name in weights}
        for kind, tensors in whole["optimizer"].items()
    }
    return {"model": weights, "optimizer": optimizer}


def placed_like(whole: Tensor, weight: Tensor) -> Tensor:
    """A rank's part of a tensor that is split as a weight is; one column is not split."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(weight, DTensor):
        return whole
    mesh, placements = weight.device_mesh, list(weight.placements)
    if whole.shape[-1] == 1:
        placements = [Replicate() if placement.is_shard(1) else placement for placement in placements]
    shape, offsets = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    local = whole[tuple(slice(start, start + n) for start, n in zip(offsets, shape, strict=True))].clone()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def blank(state: Any) -> None:
    if isinstance(state, Tensor):
        (state.to_local() if hasattr(state, "to_local") else state).detach().zero_()
    else:
        for value in state.values():
            blank(value)


def assert_same(state: dict[str, Any], whole: dict[str, Any]) -> None:
    """Holds what this rank has, put together with the other ranks' parts, against whole tensors."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            found = value.full_tensor() if hasattr(value, "full_tensor") else value
            assert (found.shape, found.dtype) == (whole[name].shape, whole[name].dtype), name
            assert torch.equal(found.reshape(-1).view(torch.uint8), whole[name].reshape(-1).view(torch.uint8)), name
        else:
            assert_same(value, whole[name])


# ---------------------------------------------------------------------------------------------------------------------
# Trouble


def test_one_ranks_trouble_is_heard_by_all(tmp_path, in_ranks):
    heard, by_the_other = in_ranks(2, meet_trouble, str(tmp_path))
    assert heard == by_the_other
    expected = [
        "PunaError: a rank does not see what rank 0 writes to .*; run_dir must be on a shared file system",
        "OSError: .*No space left on device",
        "PunaError: no room",
        "RuntimeError: rank 1: ValueError: cannot be read",
        "PunaError: .* has no model.more; it is a checkpoint of another model",
        r"PunaError: .*: model.norm was saved as \(2,\) torch.float32, but the run's is \(2,\) torch.float16",
        "PunaError: .* holds model.norm, which the run does not have",
    ]
    for found, pattern in zip(heard, expected, strict=True):
        assert re.match(pattern, found), found


def meet_trouble(folder: str) -> list[str]:
    """What goes wrong here goes wrong on one rank alone; gives what this rank heard of it."""
    rank = dist.get_rank()
    heard: list[str] = []
    with hears(heard):
        Checkpoints(f"{folder}/of-rank-{rank}")
    checkpoints = Checkpoints(f"{folder}/run")
    path = checkpoints.save(1, state_of("fsdp", seed=1), META)
    for target, error in (
        ("puna.checkpoint.sharded.FileSystemWriter.write_data", OSError(errno.ENOSPC, "No space left on device")),
        ("puna.checkpoint.sharded.local_piece", PunaError("no room")),
        ("puna.checkpoint.runs.fingerprints", ValueError("cannot be read")),
    ):
        checkpoints.wait()
        with hears(heard), patch(target, side_effect=error) if rank else nullcontext():
            checkpoints.save(2, state_of("fsdp", seed=1), META)
            checkpoints.wait()
    assert rank or os.listdir(path.parent) == [path.name]

    def more(model: dict[str, Tensor]) -> None:
        model["more"] = torch.ones(1)

    def other(model: dict[str, Tensor]) -> None:
        model["norm"] = model["norm"].half()

    def less(model: dict[str, Tensor]) -> None:
        del model["norm"]

    for edit, culprit in ((more, 1), (other, 0), (less, rank)):
        state = state_of("fsdp", seed=1)
        if rank == culprit:
            edit(state["model"])
        with hears(heard):
            checkpoints.load(path, state)
    return heard


def test_a_first_save_is_done_though_another_rank_cannot_look_at_the_note_of_none(tmp_path, in_ranks):
    in_ranks(2, save_where_the_note_cannot_be_read, str(tmp_path))
    assert not (tmp_path / ".unsaved").exists()
    assert Checkpoints(tmp_path).newest(say=pytest.fail).name == "step-00000001"


def save_where_the_note_cannot_be_read(run_dir: str) -> None:
    run = Checkpoints(run_dir)
    if dist.get_rank() == 0:
        run.note_unsaved()
    dist.barrier()
    exists = Path.exists

    def fails(path: Path) -> bool:
        if path.name == ".unsaved":
            raise OSError(errno.EIO, "Input/output error")
        return exists(path)

    with patch.object(Path, "exists", fails) if dist.get_rank() else nullcontext():
        run.save(1, state_of("fsdp", seed=1), META)
        run.wait()


def test_damage_in_one_ranks_share_is_noticed_by_all(tmp_path, in_ranks):
    (newest, said), (newest_to_the_other, said_to_the_other) = in_ranks(2, find_damage, str(tmp_path))
    assert newest == newest_to_the_other == "step-00000001"
    assert re.match(r".*step-00000002 is damaged \(model/__1_0.distcp has other bytes .*; taking the checkpoint", said)
    assert said_to_the_other == ""


def find_damage(run_dir: str) -> tuple[str, str]:
    checkpoints = Checkpoints(run_dir)
    for step in (1, 2):
        path = checkpoints.save(step, state_of("fsdp", seed=step), META)
    checkpoints.wait()
    file = path / "model" / "__1_0.distcp"
    if dist.get_rank() == 0:
        content = file.read_bytes()
        file.write_bytes(content[:900] + bytes([content[900] ^ 1]) + content[901:])
    dist.barrier()
    said: list[str] = []
    newest = checkpoints.newest(say=said.append)
    return newest.name, "\n".join(said)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_while_it_writes_ends_the_save_of_all(tmp_path, in_ranks, victim):
    heard = in_ranks(2, die_while_writing, str(tmp_path), victim)
    assert heard[victim] is None
    assert re.match("PunaError: another rank left, or", heard[1 - victim][0])
    assert Checkpoints(tmp_path).newest(say=pytest.fail).name == "step-00000001"
    state = whole_state(seed=9)
    Checkpoints(tmp_path).load(tmp_path / "checkpoints" / "step-00000001", state)
    assert_same(state, whole_state(seed=1))


def die_while_writing(run_dir: str, victim: int) -> list[str]:
    checkpoints = Checkpoints(run_dir)
    checkpoints.save(1, state_of("fsdp", seed=1), META)
    checkpoints.wait()
    heard: list[str] = []
    with (
        hears(heard),
        patch("puna.checkpoint.sharded.FileSystemWriter.write_data", side_effect=die)
        if dist.get_rank() == victim
        else nullcontext(),
    ):
        checkpoints.save(2, state_of("fsdp", seed=2), META)
        checkpoints.wait()
    return heard


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def hears(heard: list[str]) -> Iterator[None]:
    """Notes the error that the block must end in."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - looked at by the caller
        yield
    heard.append(f"{type(caught.value).__name__}: {caught.value}")
