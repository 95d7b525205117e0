"""Exchanges that gradients flow through; that their numbers are right `test_layouts` shows."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from puna.parallel.collectives import all_max, all_min, all_sum, exchange_dims, gather_dim, scatter_sum
from puna.parallel.hangs import last_collective


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def _of_numbers() -> tuple[list[float], list[float], int]:
    rank = dist.get_rank()
    return all_sum(rank, 1), all_max(rank, -rank), all_min(rank, dist.group.WORLD)


def test_plain_numbers_are_summed_and_the_least_and_the_most_of_them_found(
    in_ranks: Callable[..., list[Any]],
) -> None:
    assert in_ranks(3, _of_numbers) == [([3, 3], [2, 0], 0)] * 3
    assert all_min(7, None) == 7


def test_no_exchange_on_gloo_is_of_the_kind_that_ends_in_a_race_of_its_threads(group: dist.ProcessGroup) -> None:
    x = torch.ones(2, 4, 6, requires_grad=True)
    names = set()
    for exchanged in (gather_dim(x, 1, group), scatter_sum(x, 1, group), exchange_dims(x, 1, 2, group)):
        names.add(last_collective().partition(",")[0])
        exchanged.sum().backward()
        names.add(last_collective().partition(",")[0])
    assert names == {"gloo:all_to_all", "gloo:all_reduce"}
