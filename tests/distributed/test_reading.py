"""What each rank reads of a folder in Hugging Face layout: its own part of it, and the disk no more than that.

Ranks are taken one at a time in a fake group, as if each were on a machine of its own. Bytes come by `read`, which
Linux counts, or from mapped memory: there what operations take of it is counted.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from puna.checkpoint import load, load_config, save_model
from puna.checkpoint.weights import open_weights
from puna.config import load_recipe
from puna.model.config import preset
from puna.model.llama import Llama, init_weights
from puna.parallel.inference import Share
from puna.parallel.layout import Layout
from puna.parallel.mesh import Ranks, SharedMemory
from puna.parallel.model import DistributedModel
from puna.train.run import _Run

IO = Path("/proc/self/io")

pytestmark = pytest.mark.skipif(not IO.exists(), reason="needs Linux, which counts what a process reads")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 80 MB."""
    config = replace(
        preset("tiny-64"), num_hidden_layers=4, hidden_size=512, intermediate_size=2048, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, vocab_size=4096,
    )  # fmt: skip
    model = Llama(config)
    init_weights(model, seed=0)
    path = tmp_path_factory.mktemp("models") / "model"
    save_model(model, path)
    return path


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Makes this process one of so many."""
    monkeypatch.setattr(SharedMemory, "of", lambda _: None)  # ranks are alone on their machines

    def join(rank: int, size: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=size)

    yield join
    dist.destroy_process_group()


def train(folder: Path, world_size: int, **parallel: int) -> dict[str, Tensor]:
    """A rank's weights as a run begins with them."""
    recipe = load_recipe({
        "model": str(folder), "start": str(folder), "data": {"train": "nothing"}, "run_dir": "nowhere", "steps": 1,
        "sequence_length": 64, "batch_tokens": 64 * 8, "parallel": parallel,
    })  # fmt: skip
    config = load_config(folder)
    ranks = Ranks.of(Layout.of(recipe, config, world_size), torch.device("cpu"))
    model = DistributedModel.build(config, ranks, recipe.parallel, torch.device("cpu"), dtype=torch.float32)
    run: Any = SimpleNamespace(recipe=recipe, config=config)
    model.fill(_Run._first_weights(run))
    return {name: x.to_local() if isinstance(x, DTensor) else x for name, x in model.weights.items()}


def generate(folder: Path, _: int) -> dict[str, Tensor]:
    """A rank's weights as it generates with them."""
    with torch.no_grad():
        model, _tokenizer = load(folder, share=Share)
    return dict(model.named_parameters())


class _MappedReads(TorchDispatchMode):
    """Counts the bytes that operations take of mapped files of a folder, and those that it reads itself to know."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder, self.size_bytes, self.looked_bytes = str(folder), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor) and x.device.type == "cpu" and self._is_mapped(x.data_ptr()):
                    self.size_bytes += x.nbytes
        return func(*args, **(kwargs or {}))

    def _is_mapped(self, place: int) -> bool:
        maps = Path("/proc/self/maps").read_text()
        self.looked_bytes += len(maps)
        for line in maps.splitlines():
            start, _, stop = line.split(" ", 1)[0].partition("-")
            if self._folder in line and int(start, 16) <= place < int(stop, 16):
                return True
        return False


def _counted(what: str) -> int:
    return next(int(line.split()[1]) for line in IO.read_text().splitlines() if line.startswith(what))


@pytest.mark.parametrize(
    ("start", "size", "layout"),
    [(train, 4, {"tp": 2, "pp": 2}), (train, 4, {"dp_shard": 4}), (generate, 2, {})],
    ids=["training under tp 2 x pp 2", "training under dp_shard 4", "generation by 2 processes"],
)
def test_a_rank_reads_its_part_and_no_more(
    folder: Path, as_rank: Callable[[int, int], None], start: Callable[..., Any], size: int, layout: dict[str, int]
) -> None:
    whole = (folder / "model.safetensors").stat().st_size
    total = 0
    for rank in range(size):
        as_rank(rank, size)
        start(folder, size, **layout)  # imports what it needs
        before = _counted("rchar")
        with _MappedReads(folder) as mapped:
            weights = start(folder, size, **layout)
        read = _counted("rchar") - before - mapped.looked_bytes + mapped.size_bytes
        assert read == pytest.approx(sum(weight.nbytes for weight in weights.values()), rel=0.02)
        assert read < 1.1 * whole / size
        total += read
    assert total == pytest.approx(whole, rel=0.02)


def test_the_disk_reads_no_more_than_the_rows_that_a_rank_holds(
    folder: Path, as_rank: Callable[[int, int], None]
) -> None:
    file = folder / "model.safetensors"

    def read_from_disk(read: Callable[[], object]) -> int:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = _counted("read_bytes")
        read()
        return _counted("read_bytes") - before

    if read_from_disk(file.read_bytes) < file.stat().st_size:
        pytest.skip("needs a disk whose page cache can be cleared")
    as_rank(1, 4)
    weights = train(folder, 4, dp_shard=4)
    share = sum(weight.nbytes for weight in weights.values())
    to_open = read_from_disk(lambda: open_weights(folder))  # the beginning of the file, in which its header lies
    assert read_from_disk(lambda: train(folder, 4, dp_shard=4)) <= to_open + 1.05 * share
