"""Exchanges through memory that ranks share are those of gloo, and end with an error when a rank is lost."""

import os
import signal
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from puna.config import Parallel
from puna.data.loader import Batch
from puna.model.config import preset
from puna.model.llama import initial_weight
from puna.parallel import shared_memory
from puna.parallel.layout import Layout
from puna.parallel.mesh import Ranks
from puna.parallel.model import DistributedModel
from puna.parallel.shared_memory import SharedMemory
from puna.train.loss import summed_cross_entropy

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory without a name is Linux's")

#: Pieces of 512 fp32 numbers of three ranks.
HALF_BYTES = 3 * 512 * 4


def open_memory() -> SharedMemory:
    shared_memory.HALF_BYTES = HALF_BYTES  # in a process of its own
    memory = SharedMemory.of(dist.group.WORLD)
    assert memory is not None
    return memory


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_and_parts_of_any_length_are_those_of_gloo(in_ranks, ranks):
    equal = in_ranks(ranks, exchange)
    assert len(equal[0]) == 25
    for of_rank in equal:
        assert [case for case, is_equal in of_rank.items() if not is_equal] == []


def exchange() -> dict[str, bool]:
    memory, rank, size = open_memory(), dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    equal = {}
    for length in (1, 512, 513, 1000, 5000):
        whole = torch.randint(-9, 10, (size * length,)).float()  # whose sums are exact
        sums, expected = torch.empty(2, length)
        memory.reduce_scatter(sums, whole)
        dist.reduce_scatter(expected, list(whole.view(size, length)))
        equal[f"sums of {length}"] = torch.equal(sums, expected)
        sums.fill_(-1)
        memory.reduce_scatter(sums, whole.bfloat16())
        equal[f"sums of {length}, read in bf16"] = torch.equal(sums, expected)
        for dtype in (torch.float32, torch.bfloat16, torch.uint8):
            gathered = torch.zeros(size * length, dtype=dtype)
            part = gathered[rank * length :][:length]
            part.copy_(torch.randint(0, 200, (length,)))
            parts = [torch.empty_like(part) for _ in range(size)]
            dist.all_gather(parts, part.clone())
            memory.all_gather(gathered, part)
            equal[f"parts of {length}, {dtype}"] = torch.equal(gathered, torch.cat(parts))
    return equal


@pytest.mark.parametrize(
    "layout", [Layout(dp_shard=3), Layout(dp_shard=2, dp_replicate=2), Layout(pp=2, dp_shard=2)], ids=str
)
def test_gradients_of_a_sharded_model_are_those_that_gloo_sums(in_ranks, layout):
    for differences in in_ranks(layout.devices, compare_gradients, layout):
        assert len(differences) > 8
        assert max(differences.values()) < 1e-6, differences


def compare_gradients(layout: Layout) -> dict[str, float]:
    """Name -> what separates this rank's gradient through memory from that through gloo, as a share of its norm."""
    config, device = replace(preset("tiny-64"), vocab_size=257), torch.device("cpu")
    shared_memory.HALF_BYTES, shared_memory.IN_CACHE = HALF_BYTES, 100
    ranks = Ranks.of(layout, device)
    assert ranks.memory is not None
    tokens = np.random.default_rng(ranks.dp_rank).integers(0, config.vocab_size, (4, 33))
    positions = np.tile(np.arange(32), (4, 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.zeros_like(positions), positions)
    both = []
    for memory in (ranks.memory, None):
        model = DistributedModel.build(
            config, replace(ranks, memory=memory), Parallel(), device,
            dtype=torch.float32, compute_dtype=torch.bfloat16,
        )  # fmt: skip
        model.fill(lambda name, whole: initial_weight(name, whole, config, seed=0))
        model.forward_backward(batch, summed_cross_entropy, micro_batch_rows=1)
        both.append({name: weight.grad.to_local() for name, weight in model.weights.items()})
    ours, theirs = both
    return {name: float((grad - ours[name]).norm() / grad.norm().clamp(min=1e-30)) for name, grad in theirs.items()}


def test_no_descriptor_stays_open(in_ranks):
    assert in_ranks(2, count_descriptors) == [0, 0]


def count_descriptors() -> int:
    dist.barrier()
    before = len(os.listdir("/proc/self/fd"))
    open_memory()
    return len(os.listdir("/proc/self/fd")) - before


@pytest.mark.parametrize("missing", ["memfd_create", "readlink"])
def test_ranks_that_cannot_all_share_do_without(in_ranks, missing):
    assert in_ranks(3, try_without, missing) == [True, True, True]


def try_without(missing: str) -> bool:
    if dist.get_rank() != 1:
        return SharedMemory.of(dist.group.WORLD) is None
    error = {"side_effect": OSError("forbidden")} if missing == "memfd_create" else {"return_value": "another host"}
    with patch(f"puna.parallel.shared_memory.os.{missing}", **error):
        return SharedMemory.of(dist.group.WORLD) is None


def test_a_rank_that_is_lost_is_an_error_for_those_that_wait(in_ranks):
    first, lost, third = in_ranks(3, lose_one)
    assert lost is None
    assert "peer" in first
    assert "peer" in third


def lose_one() -> str:
    memory = open_memory()
    sums, whole = torch.empty(5000), torch.ones(15000)
    memory.reduce_scatter(sums, whole)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError) as caught:
        memory.reduce_scatter(sums, whole)
    return str(caught.value)
