"""Checkpoints of a training run: folders that are whole or not there, checked before they are trusted.

    run_dir/checkpoints/step-00000100/model/__0_0.distcp    weights, one file a rank (torch.distributed.checkpoint)
                                            .metadata       which tensor, or which part of one, lies where
                                      rest/                 likewise what else a run needs: optimizer, generators
                                      run.json              step, caller's notes, size and checksum of every file
    run_dir/checkpoints/step-00000200.aside/                a save that was interrupted; the next save clears it away

`run.json` is written last, then the folder is synced and takes its name. On the way back every file is held against it:
a damaged newest checkpoint is named, and the one before is taken. Under a process group every rank calls the same
functions, and rank 0 does what is done once.
"""

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from puna import progress
from puna.errors import PunaError
from puna.files import ASIDE, checksum_of, read_json, sync_file, sync_folder, write_json

#: Version of `run.json`.
FORMAT = 1
MANIFEST = "run.json"

#: The top-level key of a state that is kept apart, so that export reads it alone; the others go together.
MODEL, REST = "model", "rest"


def save_checkpoint(
    run_dir: Path | str,
    step: int,
    state: dict[str, Any],
    meta: dict[str, Any],
    *,
    keep: int = 3,
    keep_every: int | None = None,
) -> Path:
    """Writes a checkpoint, then removes those that need not be kept.

    Args:
        run_dir: the run's folder.
        step: optimizer steps taken.
        state: nested dictionaries of tensors (also sharded ones) and plain values; the weights under "model".
        meta: goes into `run.json` and must be JSON: the resolved recipe, the place in the data.
        keep: how many of the newest stay.
        keep_every: those whose step is a multiple of it stay for good; None: none do.

    Returns:
        The checkpoint's folder. If anything fails, those that were there before are untouched.
    """
    import torch.distributed.checkpoint as dcp

    folder = _folder(run_dir)
    path = folder / f"step-{step:08d}"
    aside = path.with_name(path.name + ASIDE)
    if _is_first_rank():
        _clear_leftovers(folder)
        aside.mkdir(parents=True)
    _wait_for_all()
    try:
        for part, content in _parts(state).items():
            with _plain_errors(aside):
                dcp.save(content, storage_writer=dcp.FileSystemWriter(aside / part), no_dist=not dist.is_initialized())
        if _is_first_rank():
            written = sorted(file for file in aside.rglob("*") if file.is_file())
            files = {str(file.relative_to(aside)): _fingerprint(file) for file in written}
            write_json(aside / MANIFEST, {"format": FORMAT, "step": step, "meta": meta, "files": files})
            _put_in_place(aside, path)
            _prune(folder, step, keep, keep_every)
    except BaseException:
        if _is_first_rank():
            shutil.rmtree(aside, ignore_errors=True)
        raise
    _wait_for_all()
    return path


def checkpoints(run_dir: Path | str) -> dict[int, Path]:
    """Step -> folder of every finished checkpoint of a run, oldest first; none of them checked."""
    folder = _folder(run_dir)
    found = (
        (re.fullmatch(r"step-(\d{8,})", path.name), path) for path in (folder.iterdir() if folder.is_dir() else ())
    )
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def newest_checkpoint(
    run_dir: Path | str, say: Callable[[str], None] = progress.say, *, part: str | None = None
) -> Path | None:
    """The newest sound checkpoint of a run; None if it has none at all.

    Args:
        run_dir: the run's folder.
        say: is told of every damaged checkpoint that is passed over.
        part: look only at the files of "model" or "rest"; None: at all.

    Raises:
        PunaError: there are checkpoints and all are damaged.
    """
    paths = checkpoints(run_dir)
    for path in reversed(paths.values()):
        reason = damage(path, part)
        if reason is None:
            return path
        say(f"{path} is damaged ({reason}); taking the checkpoint before it")
    if paths:
        raise PunaError(f"every checkpoint in {_folder(run_dir)} is damaged; remove the folder to start the run afresh")
    return None


def damage(path: Path, part: str | None = None) -> str | None:
    """What is wrong with the files of a checkpoint or of a part, in a few words; None if they are as written."""
    try:
        files = read_json(path / MANIFEST)["files"]
        for name, written in files.items():
            if part is not None and not name.startswith(f"{part}/"):
                continue
            if not (path / name).exists():
                return f"{name} is missing"
            if (size := (path / name).stat().st_size) != written["size"]:
                return f"{name} has {size:,} of {written['size']:,} bytes"
            if _fingerprint(path / name) != written:
                return f"{name} has other bytes than were written"
    except PunaError as error:
        return str(error).removeprefix(f"{path}/")
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not one of ours"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def load_checkpoint(path: Path | str, state: dict[str, Any]) -> dict[str, Any]:
    """Fills `state` in place from a checkpoint, to the last bit.

    Args:
        path: a checkpoint's folder, as `newest_checkpoint` gives it.
        state: nested like the one that was saved, with tensors to be filled; top-level parts that it lacks stay unread.

    Returns:
        The `meta` that was saved along.

    Raises:
        PunaError: a tensor is missing on either side, or has another shape or dtype than the one that was saved.
    """
    import torch.distributed.checkpoint as dcp

    path = Path(path)
    meta = read_meta(path)
    for part, content in _parts(state).items():
        if not (path / part).is_dir():
            raise PunaError(f"{path} has no {' or '.join(content)}; it is a checkpoint of another model or optimizer")
        reader = dcp.FileSystemReader(path / part)
        _check_fits(path, reader.read_metadata().state_dict_metadata, content)
        with _plain_errors(path):
            dcp.load(content, storage_reader=reader, no_dist=not dist.is_initialized())
        state.update(content)
    return meta


def read_meta(path: Path | str) -> dict[str, Any]:
    """The `meta` of a checkpoint."""
    return read_json(Path(path) / MANIFEST)["meta"]


def _parts(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        parts.setdefault(MODEL if key == MODEL else REST, {})[key] = value
    return parts


def _folder(run_dir: Path | str) -> Path:
    return Path(run_dir) / "checkpoints"


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def _fingerprint(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "checksum": checksum_of(file)}


def _clear_leftovers(folder: Path) -> None:
    for path in folder.glob(f"*{ASIDE}"):
        shutil.rmtree(path)


def _put_in_place(aside: Path, path: Path) -> None:
    """Gives a finished folder its name; a damaged checkpoint of the same step makes room."""
    for place in aside.rglob("*"):
        sync_file(place)
    sync_folder(aside)
    if path.exists():
        _remove(path)
    os.rename(aside, path)
    sync_folder(path.parent)


def _prune(folder: Path, step: int, keep: int, keep_every: int | None) -> None:
    paths = checkpoints(folder.parent)
    past = [s for s in paths if s <= step]
    kept = set(past[-max(keep, 1) :]) | {s for s in past if keep_every and s % keep_every == 0}
    for s, path in paths.items():
        # A later one is from before the run was continued from an earlier step, which happens if it is damaged.
        is_spent = s not in kept if s <= step else damage(path) is not None
        if is_spent:
            _remove(path)


def _remove(path: Path) -> None:
    gone = path.with_name(f"{path.name}.gone{ASIDE}")  # first the name, so that no half of it is ever taken for whole
    os.rename(path, gone)
    shutil.rmtree(gone)


def _check_fits(path: Path, stored: dict[str, Any], state: dict[str, Any]) -> None:
    tensors = dict(_tensors(state))
    for name, tensor in tensors.items():
        if name not in stored:
            raise PunaError(f"{path} has no {name}; it is a checkpoint of another model or optimizer")
        found, wanted = (_shape_and_dtype(x) for x in (stored[name], tensor))
        if found != wanted:
            raise PunaError(
                f"{path}: {name} was saved as {found}, but the run's is {wanted}; use the recipe it began with"
            )
    for name, entry in stored.items():
        if hasattr(entry, "properties") and name.partition(".")[0] in state and name not in tensors:
            raise PunaError(f"{path} holds {name}, which the run does not have; use the recipe it began with")


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        yield from _tensors(inner, f"{name}.{key}" if name else str(key))
    if isinstance(value, torch.Tensor):
        yield name, value


def _shape_and_dtype(tensor: Any) -> str:
    if hasattr(tensor, "properties"):  # what is known of a stored tensor
        return f"{tuple(tensor.size)} {tensor.properties.dtype}"
    return f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, torch.Tensor) else "a plain value"


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Lets out what went wrong rather than the wrappers that torch.distributed.checkpoint puts around it."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is (disabled, )?unavailable or uninitialized")
            yield
    except CheckpointException as wrapper:
        error = next(iter(wrapper.failures.values()))[0]
        origin: BaseException | None = error
        while origin is not None:  # torch's zip writer hides a full disk behind an error of its own
            if isinstance(origin, OSError) and origin.errno is not None:
                raise OSError(origin.errno, origin.strerror, str(path)) from None
            origin = origin.__context__
        raise error from None
