"""Checkpoints of a training run: folders that are whole or not there, checked before they are used.

    run_dir/checkpoints/step-00000100/model/__0_0.distcp    weights, one file a rank (torch.distributed.checkpoint)
                                            .metadata       which tensor, or which part of one, lies where
                                      rest/                 likewise what else a run needs: optimizer, generators
                                      run.json              step, caller's notes, size and checksum of every file, and
                                                            a checksum of all this
    run_dir/checkpoints/step-00000200.aside/                a save that is going on, or was interrupted: the next one
                                                            clears it away
    run_dir/.unsaved                                        there until the first save is done: that there are no
                                                            checkpoints means that none were saved, not that they are
                                                            out of sight

`Checkpoints.save` copies the state and returns; a thread writes it. `run.json` (`manifest.py`) is written last, then
the folder is synced and takes its name. Before loading, every file is compared with it: a damaged newest checkpoint is
named, and the one before is taken.

Every rank writes and checks its own share, rank 0 does what is done once, and all of them must see the same folder.
Which rank held what is not stored: a checkpoint is whole tensors in pieces, and any layout may read it.
"""

import concurrent.futures
import contextlib
import copy
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from puna import progress
from puna.checkpoint.collectives import Collectives
from puna.checkpoint.manifest import Damaged, check_files, fingerprints, read_meta, write_manifest
from puna.devices import free_host_bytes, page_locked
from puna.errors import PunaError
from puna.files import ASIDE, sync_folder

#: The folder of a run's checkpoints, in the run's.
CHECKPOINTS = "checkpoints"

#: The note that a run has saved nothing yet, in its folder.
UNSAVED = ".unsaved"

#: The share of a host's free memory that copies of the state may take: training needs some, too.
ROOM_SHARE = 0.8

#: The top-level key of a state that is kept apart, so that export reads it alone; the others go together.
MODEL, REST = "model", "rest"

T = TypeVar("T")


class Checkpoints:
    """A run's checkpoints: saved in the background, found, checked and loaded by all its ranks together.

    Every rank of the process group makes one, and calls the same methods in the same order; what goes wrong on one rank
    is raised on all. Without a process group it serves one process. From the first save on, a rank's part of the state
    is held a second time, in host memory: each save copies into the memory of the one before. Where a host has no room
    for that, training waits until the state is written.

    Args:
        run_dir: the run's folder, on a file system that all ranks share.
        keep: how many of the newest stay. One that `newest` found damaged is none of them.
        keep_every: the first one at or after each multiple of so many steps stays for good; None: none does.

    Raises:
        PunaError: a rank does not see the folder that rank 0 sees.
    """

    def __init__(self, run_dir: Path | str, *, keep: int = 3, keep_every: int | None = None) -> None:
        self.run_dir, self._keep, self._keep_every = Path(run_dir), keep, keep_every
        self._ranks = Collectives.of_run()
        self._copies: dict[str, Tensor] = {}
        self._damaged: set[Path] = set()
        self._has_room: bool | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        if self._ranks.size > 1:
            _check_shared(_folder(self.run_dir), self._ranks)

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> Path:
        """Waits for the save before, copies the state, and writes it in the background.

        Where host memory has no room for the copy, the state is written as it stands before this returns.

        Args:
            step: optimizer steps taken.
            state: nested dictionaries of tensors and plain values; the weights under "model". Of a sharded tensor every
                rank has its part; a name may be on some ranks only; what is not sharded is alike wherever it is.
            meta: goes into `run.json` and must be JSON: the resolved recipe, the place in the data. Rank 0's counts.

        Returns:
            The folder, which is there once `wait` has returned.

        Raises:
            Exception: as `wait` does, of the save before.
        """
        self.wait()
        staged: Future[dict[str, dict[str, Any]]] = Future()
        has_room = self._find_room(state)
        try:
            staged.set_result(self._stage(state, is_copied=has_room))
        except Exception as error:
            staged.set_exception(error)  # raised in the background, where the other ranks hear of it
        self._saving = self._writer.submit(self._write, step, staged, copy.deepcopy(meta))
        if not has_room:
            concurrent.futures.wait([self._saving])  # errors are raised by `wait`, as always
        return _path(self.run_dir, step)

    def note_unsaved(self) -> None:
        """Notes in the folder of a run without checkpoints that it has saved none; the first save takes the note away.

        One process calls it, before the run has come to its first save. A note beside checkpoints goes.
        """
        note = self.run_dir / UNSAVED
        if checkpoints(self.run_dir):
            note.unlink(missing_ok=True)
        else:
            note.touch()

    def wait(self) -> None:
        """Returns when the last save is done.

        Raises:
            Exception: it failed, on any rank; the checkpoints before it are untouched. OSError for a full disk.
        """
        if self._saving is not None:
            concurrent.futures.wait([self._saving])
            saving, self._saving = self._saving, None
            saving.result()

    def newest(self, say: Callable[[str], None] = progress.say) -> Path | None:
        """The newest checkpoint whose files are as they were written; None if there are no checkpoints.

        All ranks get the same answer.

        Args:
            say: is told on rank 0 of every damaged checkpoint that is passed over.

        Raises:
            PunaError: there are checkpoints and all are damaged.
        """
        self.wait()

        def sound(path: Path) -> Path:
            try:
                check_files(path, ranks=self._ranks)
            except Damaged:
                self._damaged.add(path)
                raise
            return path

        steps = partial(self._ranks.broadcast, lambda: list(checkpoints(self.run_dir)))
        return newest_sound(self.run_dir, steps, sound, say if self._ranks.is_first else lambda _: None)

    def load(self, path: Path | str, state: dict[str, Any]) -> dict[str, Any]:
        """Fills `state` in place from a checkpoint of any layout, to the last bit.

        Args:
            path: a checkpoint's folder, as `newest` gives it.
            state: nested like the one that was saved, with tensors to be filled; top-level parts that no rank has stay
                unread. Every rank reads only what it holds.

        Returns:
            The `meta` that was saved along.

        Raises:
            PunaError: a tensor is missing on either side, all ranks taken together, or has another shape or dtype than
                the one that was saved.
        """
        from puna.checkpoint.sharded import forms, read_sharded

        self.wait()
        path, parts = Path(path), _parts(state)

        def check(asked: list[dict[str, dict[str, str]]]) -> dict[str, Any]:
            for part in sorted({part for of_rank in asked for part in of_rank}):
                _check_fits(path, part, [of_rank.get(part, {}) for of_rank in asked])
            return read_meta(path)

        def read() -> None:
            for part, content in parts.items():
                read_sharded(path / part, content)
                state.update(content)

        meta = self._ranks.all_reduce(lambda: {part: forms(content) for part, content in parts.items()}, check)
        self._ranks.all_gather(read)
        return meta

    def _find_room(self, state: dict[str, Any]) -> bool:
        """Whether every host has room for its ranks' copies; all ranks get the same answer, and rank 0 says it if not.

        Once they are there, they stay.
        """
        if self._has_room:
            return True

        def scarcest(rooms: list[tuple[int, int]]) -> tuple[int, int]:
            return max(rooms, key=lambda room: room[0] - ROOM_SHARE * room[1])

        needed, free = self._ranks.all_reduce(lambda: (_copies_bytes(state), free_host_bytes()), scarcest)
        has_room = needed <= ROOM_SHARE * free
        if not has_room and self._has_room is None and self._ranks.is_first:
            progress.say(
                f"training waits while checkpoints are written: copies of the state would take {needed / 2**30:,.1f} "
                f"GiB of a host's memory, which has {free / 2**30:,.1f} GiB free"
            )
        self._has_room = has_room
        return has_room

    def _stage(self, state: dict[str, Any], *, is_copied: bool) -> dict[str, dict[str, Any]]:
        """Pieces of this rank by part and name, or copies of them in the memory of those of the last save."""
        from puna.checkpoint.sharded import Piece, flat, local_piece

        copies: dict[str, Tensor] = {}
        staged: dict[str, dict[str, Any]] = {}
        is_far = False
        for part, content in _parts(state).items():
            values = staged[part] = {}
            for name, value in flat(content).items():
                if not isinstance(value, Tensor):
                    values[name] = copy.deepcopy(value)
                elif (piece := local_piece(value)) is not None:
                    is_far |= piece.values.device.type != "cpu"
                    if is_copied:
                        own = copies[name] = _copied(piece.values, self._copies.get(name))
                    else:
                        own = piece.values.contiguous()
                    values[name] = Piece(own, piece.offsets, piece.shape)
        if is_far:
            torch.accelerator.synchronize()
        self._copies = copies
        return staged

    def _write(self, step: int, staged: Future[dict[str, dict[str, Any]]], meta: dict[str, Any]) -> None:
        """Writes a checkpoint, then removes those that need not be kept; in the background of every rank."""
        from puna.checkpoint.sharded import write_sharded

        ranks, path, note = self._ranks, _path(self.run_dir, step), self.run_dir / UNSAVED
        aside = path.with_name(path.name + ASIDE)
        is_unsaved = False

        def make_room(parts: list[list[str]]) -> list[str]:
            nonlocal is_unsaved
            is_unsaved = note.exists()
            _clear_leftovers(aside.parent)
            aside.mkdir(parents=True)
            return sorted({part for of_rank in parts for part in of_rank})

        def finish(files: list[dict[str, Any]]) -> None:
            written = {name: fingerprint for of_rank in files for name, fingerprint in sorted(of_rank.items())}
            write_manifest(aside, step, meta, written)
            if is_unsaved:  # no longer, as soon as the checkpoint has its name
                note.unlink(missing_ok=True)
                sync_folder(note.parent)
            _put_in_place(aside, path)
            self._damaged.discard(path)
            try:
                _prune(aside.parent, step, self._keep, self._keep_every, self._damaged)
            except OSError as error:  # the checkpoint itself is there
                progress.say(f"checkpoints that need not be kept could not be removed: {error}")

        try:
            for part in ranks.all_reduce(lambda: list(staged.result()), make_room):
                write_sharded(aside / part, staged.result().get(part, {}), ranks)
            ranks.all_reduce(lambda: fingerprints(aside, ranks.rank), finish)
        except BaseException as error:
            if ranks.is_first:
                with contextlib.suppress(OSError):
                    if is_unsaved and not path.exists():
                        note.touch()
                shutil.rmtree(aside, ignore_errors=True)
                progress.say(f"{path.name} could not be saved: {error}")  # now, while there is time to make room
            raise


def checkpoints(run_dir: Path | str) -> dict[int, Path]:
    """Step -> folder of every finished checkpoint of a run, oldest first; none of them checked."""
    folder = _folder(run_dir)
    found = (
        (re.fullmatch(r"step-(\d{8,})", path.name), path) for path in (folder.iterdir() if folder.is_dir() else ())
    )
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def newest_sound(
    run_dir: Path | str,
    steps: Callable[[], Iterable[int]],
    attempt: Callable[[Path], T],
    say: Callable[[str], None] = progress.say,
) -> T | None:
    """What `attempt` gives for the newest of a run's checkpoints for which it does not raise `Damaged`.

    Args:
        run_dir: the run's folder, which may be trained in meanwhile.
        steps: gives those of the checkpoints that there are now.
        attempt: is given a checkpoint's folder.
        say: is told of every damaged checkpoint that is passed over.

    Raises:
        PunaError: there are checkpoints and all are damaged.
    """
    tried: set[int] = set()
    while untried := set(steps()) - tried:
        step = max(untried)
        tried.add(step)
        path = _path(run_dir, step)
        try:
            return attempt(path)
        except Damaged as damaged:
            gone = f"{path} was removed meanwhile, as training removes old ones; taking another"
            say(f"{damaged}; taking the checkpoint before it" if path.exists() else gone)
    if tried:
        raise PunaError(
            f"every checkpoint in {_folder(run_dir)} is damaged or cannot be read; the lines above say why. "
            f"Where none can be mended, start afresh in another run_dir"
        )
    return None


def _check_fits(path: Path, part: str, asked: list[dict[str, str]]) -> None:
    """Compares what a part holds with what the ranks ask for, each by names and forms."""
    from puna.checkpoint.sharded import PLAIN, stored_forms

    wanted = {name: form for of_rank in asked for name, form in of_rank.items()}
    if not (path / part).is_dir():
        raise PunaError(f"{path} has no {next(iter(wanted), part)}; it is a checkpoint of another model or optimizer")
    stored = stored_forms(path / part)
    for name, form in (pair for of_rank in asked for pair in of_rank.items()):
        if name not in stored:
            raise PunaError(f"{path} has no {name}; it is a checkpoint of another model or optimizer")
        if stored[name] != form:
            raise PunaError(
                f"{path}: {name} was saved as {stored[name]}, but the run's is {form}; use the recipe it began with"
            )
    keys = {name.partition(".")[0] for name in wanted}
    for name, form in stored.items():
        if form != PLAIN and name.partition(".")[0] in keys and name not in wanted:
            raise PunaError(f"{path} holds {name}, which the run does not have; use the recipe it began with")


def _parts(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        parts.setdefault(MODEL if key == MODEL else REST, {})[key] = value
    return parts


def _folder(run_dir: Path | str) -> Path:
    return Path(run_dir) / CHECKPOINTS


def _path(run_dir: Path | str, step: int) -> Path:
    return _folder(run_dir) / f"step-{step:08d}"


def _copies_bytes(state: dict[str, Any]) -> int:
    """Bytes of host memory that copies of the state take, of this rank and of the others on its host.

    An accelerator's tensors are copied to page-locked memory.
    """
    from puna.checkpoint.sharded import flat, local_piece

    tensors = [value for value in flat(state).values() if isinstance(value, Tensor)]
    pieces = [piece.values for piece in map(local_piece, tensors) if piece is not None and piece.values.numel()]
    own = sum(x.nbytes if x.device.type == "cpu" else page_locked(x.nbytes) for x in pieces)
    return own * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _copied(values: Tensor, kept: Tensor | None) -> Tensor:
    """A copy in host memory, in `kept` if that fits."""
    if kept is None or (kept.shape, kept.dtype) != (values.shape, values.dtype):
        kept = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.device.type != "cpu")
    return kept.copy_(values, non_blocking=True)


def _check_shared(folder: Path, ranks: Collectives) -> None:
    """Makes sure that every rank sees a folder that rank 0 makes."""

    def make() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="seen-by-all-", suffix=ASIDE, dir=folder)

    def look() -> None:
        if not (folder / name).is_dir():
            raise PunaError(
                f"a rank does not see what rank 0 writes to {folder}; run_dir must be on a shared file system"
            )

    name = Path(ranks.broadcast(make)).name
    try:
        ranks.all_gather(look)
    finally:
        if ranks.is_first:
            os.rmdir(folder / name)


def _clear_leftovers(folder: Path) -> None:
    """Removes what can be removed: on NFS a file that is being read stays, under another name, until it is closed."""
    for path in folder.glob(f"*{ASIDE}"):
        shutil.rmtree(path, ignore_errors=True)


def _put_in_place(aside: Path, path: Path) -> None:
    """Gives a finished folder, whose files are synced, its name; a damaged checkpoint of that name is removed first."""
    for folder in (*(place for place in aside.iterdir() if place.is_dir()), aside):
        sync_folder(folder)
    if path.exists():
        _remove(path)
    os.rename(aside, path)
    sync_folder(path.parent)


def _prune(folder: Path, step: int, keep: int, keep_every: int | None, damaged: set[Path]) -> None:
    """Removes what need not be kept up to a step, and what is damaged.

    Later ones, which could not be read when the run was continued from an earlier step, stay until the run has come to
    theirs: they may have been sound, and the reading have failed for the moment.
    """
    paths = {s: path for s, path in checkpoints(folder.parent).items() if s <= step}
    sound = [s for s, path in paths.items() if path not in damaged]
    kept = set(sound[-max(keep, 1) :])
    if keep_every:
        kept |= {s for before, s in pairwise([0, *sound]) if s // keep_every > before // keep_every}
    for s, path in paths.items():
        if s not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    gone = path.with_name(f"{path.name}.gone{ASIDE}")  # renamed first: half of it is never taken for a checkpoint
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)  # the next save tries again
