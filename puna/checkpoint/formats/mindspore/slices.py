"""Slices of a training run's parameters, one folder a rank, put together; and a whole model cut into them.

    SRC/rank_0/NAME-2_12.ckpt, SRC/rank_1/…     what each rank saved; of several files the latest that every rank has
    SRC/strategy/ or SRC/../strategy/           how parameters were cut (`strategy.py`)

Nothing is read until a tensor is written, and then some rows at a time from all slices.
"""

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from puna.checkpoint.formats import one_of_copies
from puna.checkpoint.formats.mindspore.strategy import Layout, Strategy
from puna.checkpoint.tensors import StoredTensor
from puna.errors import PunaError

#: Kinds of files that a rank may have saved.
SUFFIXES = (".ckpt", ".safetensors")


def rank_folders(folder: Path) -> dict[int, Path]:
    """The folders `rank_N` in a folder, by N."""
    found = {}
    for path in folder.iterdir():
        match = re.fullmatch(r"rank_(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def chosen_files(folders: Mapping[int, Path], pick: str | None) -> dict[int, Path]:
    """The file of each rank: the only one, that of the latest step which every rank has, or the one asked for.

    Args:
        folders: rank -> its folder.
        pick: a pattern for the names of the files to take, e.g. `*-2_8.ckpt`; None: the latest.

    Raises:
        PunaError: a rank has none, or it is not clear which is meant.
    """
    files = {rank: _files(folder) for rank, folder in folders.items()}
    if pick is not None:
        files = {rank: [file for file in own if fnmatch.fnmatch(file.name, pick)] for rank, own in files.items()}
    for rank, own in files.items():
        if not own:
            raise PunaError(f"{folders[rank]} holds no {pick or 'checkpoint'}")
    if all(len(own) == 1 for own in files.values()):
        return {rank: own[0] for rank, own in files.items()}
    steps = {rank: {_step(file): file for file in own} for rank, own in files.items()}
    common = set.intersection(*(set(own) for own in steps.values())) - {None}
    if not common or any(len(steps[rank]) < len(own) or None in steps[rank] for rank, own in files.items()):
        rank = max(files, key=lambda rank: len(files[rank]))
        names = ", ".join(file.name for file in files[rank][:4])
        raise PunaError(
            f"{folders[rank]} holds {len(files[rank])} checkpoints ({names}); choose by --pick '*-E_S.ckpt'"
        )
    latest = max(step for step in common if step is not None)
    return {rank: own[latest] for rank, own in steps.items()}


def merge(ranks: Mapping[int, Mapping[str, StoredTensor]], strategy: Strategy, where: str) -> dict[str, StoredTensor]:
    """The whole parameters of all stages.

    Args:
        ranks: global rank -> its slices.
        strategy: how they were cut.
        where: the folder, for messages.

    Raises:
        PunaError: a rank, slice or layout is missing, or slices do not fit together.
    """
    sizes = {layout.devices for layouts in strategy.values() for layout in layouts.values()}
    if len(sizes) != 1:
        raise PunaError(f"the strategy of {where} has stages of {sorted(sizes)} devices; one number was expected")
    devices = sizes.pop()
    expected = [stage * devices + rank for stage in sorted(strategy) for rank in range(devices)]
    if missing := [rank for rank in expected if rank not in ranks]:
        raise PunaError(f"{where} lacks rank_{missing[0]}; its strategy is for ranks {expected[0]} to {expected[-1]}")
    if more := [rank for rank in ranks if rank not in expected]:
        raise PunaError(f"{where} holds rank_{more[0]}, which no strategy file mentions; add the missing ones")
    merged: dict[str, StoredTensor] = {}
    for stage, layouts in sorted(strategy.items()):
        own = {rank: ranks[rank] for rank in range(stage * devices, (stage + 1) * devices)}
        for name in dict.fromkeys(name for rank in own.values() for name in rank):
            if name not in layouts:
                raise PunaError(f"the strategy of {where} does not say how {name} of stage {stage} is cut")
            if name not in merged:
                slices = {rank: held[name] for rank, held in own.items() if name in held}
                merged[name] = _merged(name, slices, layouts[name], where, first_rank=stage * devices)
    return merged


def cut(name: str, tensor: StoredTensor, layout: Layout, rank: int) -> StoredTensor:
    """What one rank, counted within its stage, has of a whole tensor.

    Raises:
        PunaError: the tensor cannot be cut evenly, or has other dims than its layout.
    """
    parts, places = layout.parts(), layout.place(rank)
    if len(parts) != len(tensor.shape) or any(count > 1 for count in parts[2:]):
        raise PunaError(f"{name} has shape {tensor.shape}, but its strategy has {len(parts)} dims")
    for dim, (size, count) in enumerate(zip(tensor.shape, parts, strict=True)):
        if size % count:
            raise PunaError(
                f"{name}: dim {dim} of {size} cannot be cut into {count} equal parts; choose another layout"
            )
    if all(count == 1 for count in parts):
        return tensor
    shape = tuple(size // count for size, count in zip(tensor.shape, parts, strict=True))
    first_row = places[0] * shape[0]
    column = places[1] * shape[1] if len(shape) > 1 else 0

    def rows(start: int, stop: int) -> Tensor:
        values = tensor.rows(first_row + start, first_row + stop)
        return values[:, column : column + shape[1]] if len(shape) > 1 else values

    return StoredTensor.by_rows(shape, tensor.dtype, tensor.where, rows)


def llama_layouts(
    names: Iterable[str], row_counts: Mapping[str, int], *, dp: int, mp: int, optimizer: bool
) -> dict[str, Layout]:
    """The layouts of MindFormers' Llama.

    Args:
        names: MindFormers' names of the parameters.
        row_counts: size of dim 0 of each parameter; what the copies cannot share evenly stays whole.
        dp: copies of the model, its `data_parallel`.
        mp: parts of every matrix, its `model_parallel`.
        optimizer: copies share the weights too, its `enable_parallel_optimizer`.
    """
    layouts = {}
    for name in names:
        parts = 1
        if name.endswith("norm.weight") or name == "model.norm_out.weight":
            layouts[name] = Layout((dp, mp, 1), ((0,),))
            continue
        if name.endswith((".wo.weight", ".w2.weight")):
            matrix, axes = (dp, mp, 1), ((0,), (1,))
        elif name == "model.tok_embeddings.embedding_weight":
            matrix, axes, parts = (dp, mp, 1), ((1,), (0,)), mp
        else:
            matrix, axes, parts = (dp, 1, mp), ((0,), (1,)), mp
        sharded = optimizer and dp > 1 and row_counts[name] % (parts * dp) == 0
        layouts[name] = Layout(matrix, axes, dp if sharded else 0)
    return layouts


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())


def _step(file: Path) -> tuple[int, int] | None:
    """Epoch and step in a name like `codellama_34b_rank_0-2_12.ckpt`."""
    match = re.search(r"-(\d+)_(\d+)$", file.stem)
    return (int(match[1]), int(match[2])) if match else None


def _merged(name: str, slices: dict[int, StoredTensor], layout: Layout, where: str, *, first_rank: int) -> StoredTensor:
    """The whole tensor of the slices that the ranks of a stage hold; of several copies of a slice, one is taken."""
    first, parts = next(iter(slices.values())), layout.parts()
    if len(parts) != len(first.shape) or any(count > 1 for count in parts[2:]):
        raise PunaError(f"{where}: {name} has shape {first.shape}, but its strategy has {len(parts)} dims")
    for piece in slices.values():
        if (piece.shape, piece.dtype) != (first.shape, first.dtype):
            raise PunaError(f"{piece.where}: {name} is {piece.shape} {piece.dtype}, not {first.shape} {first.dtype}")
    if math.prod(parts) == 1:
        if len(parts) == 2:
            return first
        return one_of_copies(name, list(slices.values()))
    grid: dict[tuple[int, ...], StoredTensor] = {}  # row and column of a part -> it
    places = {
        rank: (*layout.place(rank - first_rank), 0)[:2] for rank in range(first_rank, first_rank + layout.devices)
    }
    for rank, piece in slices.items():
        grid.setdefault(places[rank], piece)
    if lost := [rank for rank, place in places.items() if place not in grid]:
        raise PunaError(f"{where}/rank_{lost[0]} lacks {name}, and no other rank holds that part of it")
    height, columns = first.shape[0], parts[1] if len(parts) > 1 else 1
    shape = tuple(size * count for size, count in zip(first.shape, parts, strict=True))

    def rows(start: int, stop: int) -> Tensor:
        bands = []
        for row in range(start // height, -(-stop // height)):
            a, b = max(start - row * height, 0), min(stop - row * height, height)
            bands.append(torch.cat([grid[row, column].rows(a, b) for column in range(columns)], -1))
        return torch.cat(bands)

    return StoredTensor.by_rows(shape, first.dtype, first.where, rows)
