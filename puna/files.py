"""Files that are either whole or not there.

Everything puna keeps is written under a temporary name beside its place, synced and renamed, so that Ctrl-C, `kill -9`
or a full disk leave what was there before.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import mmap
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import xxhash

from puna.errors import PunaError

#: Suffix of files and folders that are still being written; whatever bears it may be deleted.
ASIDE = ".aside"

#: What a file system says that has no locks, as some of those that a cluster shares.
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextlib.contextmanager
def file_aside(path: Path | str, mode: str = "wb", *, sync: bool = True) -> Iterator[IO[Any]]:
    """Opens a file beside `path` that takes its place, synced, once the block has ended without an error.

    A link stays, and what it leads to is replaced; a device or a pipe, which nothing can replace, is written to.

    Args:
        path: the file.
        mode: as for `open`.
        sync: wait until it is on the disk; False for what is made anew after a crash.

    Raises:
        PunaError: `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise PunaError(f"{path} is a folder; name a file")
    if is_device(path):
        with open(path, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        return
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}{ASIDE}")
    try:
        with open(aside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(aside, path)
        if sync:
            sync_folder(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def is_device(path: Path | str) -> bool:
    """Whether there is something else than a file or folder: a device, a pipe, or a link to one."""
    return Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir()


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, mapped to be read.

    Raises:
        PunaError: it is missing or empty.
    """
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise PunaError(f"{path} does not exist") from None
    except ValueError:
        raise PunaError(f"{path} is empty; fetch or make it again") from None


@contextlib.contextmanager
def folder_aside(path: Path | str) -> Iterator[Path]:
    """Gives an empty folder beside `path` that takes its place once the block has ended without an error.

    It is locked while this process lives, and what killed processes of this machine left beside the same place goes.

    Raises:
        PunaError: `path` exists already; nothing is overwritten.
    """
    path = Path(path)
    exists = PunaError(f"{path} exists already; choose another place or remove it first")
    if os.path.lexists(path):
        raise exists
    path.parent.mkdir(parents=True, exist_ok=True)
    of_this_machine = f"{path.name}.{os.uname().nodename}-"
    for left in path.parent.glob(f"{glob.escape(of_this_machine)}*{ASIDE}"):
        _remove_if_dead(left)
    held = None
    while held is None:
        aside = path.with_name(f"{of_this_machine}{secrets.token_hex(4)}{ASIDE}")
        held = _make_locked(aside)
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                sync_file(file)
        for folder in [aside, *(f for f in aside.rglob("*") if f.is_dir())]:
            sync_folder(folder)
        try:
            os.rename(aside, path)
        except OSError as error:
            raise exists if os.path.lexists(path) else error from None  # another process made it meanwhile
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        os.close(held)


def _make_locked(aside: Path) -> int | None:
    """Makes a folder, locks it and gives its descriptor; None: before it was locked, another process took it for dead.

    Where folders cannot be locked, none is taken for dead.
    """
    aside.mkdir()
    with contextlib.suppress(FileNotFoundError):
        held = os.open(aside, os.O_RDONLY)
        is_locked = None
        with contextlib.suppress(OSError):  # NFS locks no folders
            is_locked = try_lock(held)
        if is_locked is not False and aside.exists():
            return held
        os.close(held)
    return None


def _remove_if_dead(aside: Path) -> None:
    """Removes a folder that no process holds. Where that cannot be known, it stays."""
    with contextlib.suppress(OSError):
        descriptor = os.open(aside, os.O_RDONLY)
        try:
            if try_lock(descriptor):
                shutil.rmtree(aside, ignore_errors=True)
        finally:
            os.close(descriptor)


def try_lock(file: IO[Any] | int) -> bool | None:
    """Takes an open file or folder for this process alone, until it is closed or the process ends.

    Returns:
        False: another process has it. None: its file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        return None
    return True


def lock(file: IO[Any], name: Path | str) -> bool:
    """As `try_lock`; a file system without locks keeps no one away.

    Args:
        file: the file.
        name: what the work is on, for the message.

    Returns:
        Whether it is locked.

    Raises:
        PunaError: another process has it.
    """
    is_locked = try_lock(file)
    if is_locked is False:
        raise PunaError(f"another process is writing {name}; wait for it, or choose another place")
    return is_locked is True


def check_writable(folder: Path | str) -> None:
    """Refuses, before long work, a place where its results could not be written.

    Raises:
        PunaError: there is something else than a folder, or it may not be written to.
    """
    folder = Path(folder).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise PunaError(f"{there} is a file; name a folder")
    if not os.access(there, os.W_OK):
        raise PunaError(f"{there} cannot be written to; choose another place")


def check_file(path: Path | str) -> None:
    """Refuses, before long work, a place where a file could not be written.

    Raises:
        PunaError: there is a folder, or none may be written to.
    """
    if Path(path).is_dir():
        raise PunaError(f"{path} is a folder; name a file")
    check_writable(Path(path).parent)


def sync_file(path: Path) -> None:
    """Waits until the file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin_sync(file: IO[Any], start: int) -> None:
    """Lets the system write to the disk what a file holds from `start` on, while more is written behind it."""
    file.flush()
    if hasattr(os, "posix_fadvise"):  # "not needed" is first written out, which nobody waits for
        os.posix_fadvise(file.fileno(), start, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(path: Path) -> None:
    """Waits until the folder's names are on the disk."""
    sync_file(path)


def write_json(path: Path | str, value: Any) -> None:
    """Writes `value` as indented JSON, aside and renamed."""
    with file_aside(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path | str) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        PunaError: as `read_any_json`, or the file holds something else.
    """
    fields = read_any_json(path)
    if not isinstance(fields, dict):
        raise PunaError(f"{path} is not a JSON object; make or fetch it again")
    return fields


def read_any_json(path: Path | str) -> Any:
    """Reads a JSON file.

    Raises:
        PunaError: the file is missing, unreadable or not JSON; the message names it and the line.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PunaError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise PunaError(f"{path} is not valid JSON ({error}); it may be cut off: make or fetch it again") from None


def sha256_of(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hex; for identity (tokenizers, data sets)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mark_of(files: Iterable[Path]) -> str | None:
    """What tells files from others that may come to stand in their places: names, sizes and times; None: no files."""
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16] if facts else None


def checksum_of(path: Path | str) -> str:
    """XXH3-128 of a file's bytes, in hex; for damage (checkpoints, shards), at the memory's speed."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def checksum_of_value(value: Any) -> str:
    """Likewise of what JSON can hold, however it is laid out there."""
    return xxhash.xxh3_128(json.dumps(value).encode()).hexdigest()


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The innermost fields in which two nested mappings differ: dotted name -> both values, None where one lacks it."""
    first, second = _dotted(one), _dotted(other)
    pairs = {name: (first.get(name), second.get(name)) for name in {**first, **second}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _dotted(fields: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= _dotted(value, f"{path}{name}.") if isinstance(value, Mapping) else {f"{path}{name}": value}
    return found
