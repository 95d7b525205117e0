"""`run.json`: what the files of a checkpoint were when they were written, and whether they still are.

    {"format": 1, "step": 100, "meta": {…}, "files": {"model/__0_0.distcp": {"size": 4096, "checksum": "…"}, …},
     "checksum": of all the other fields}

It is written last. Ranks share the work: each takes the fingerprints of the files that it wrote, and checks its part of
all files.
"""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from puna.checkpoint.collectives import Collectives
from puna.errors import DISK_IS_FULL, PunaError
from puna.files import checksum_of, checksum_of_value, read_json, write_json

#: Version of `run.json`.
FORMAT = 1
MANIFEST = "run.json"

#: Its field with the checksum of the others.
CHECKSUM = "checksum"


class Damaged(PunaError):
    """A checkpoint's files are not as they were written; the message names it and the first of them."""


def write_manifest(folder: Path, step: int, meta: dict[str, Any], files: dict[str, Any]) -> None:
    """Writes `run.json` of files whose fingerprints are given by name."""
    manifest = {"format": FORMAT, "step": step, "meta": meta, "files": files}
    write_json(folder / MANIFEST, {**manifest, CHECKSUM: checksum_of_value(manifest)})


def fingerprints(folder: Path, rank: int) -> dict[str, Any]:
    """Name -> size and checksum of the files that a rank wrote; rank 0 wrote `.metadata` too."""
    files = [*folder.glob(f"*/__{rank}_*"), *(folder.glob("*/.metadata") if rank == 0 else ())]
    return {str(file.relative_to(folder)): _fingerprint(file) for file in files}


def read_meta(path: Path | str) -> dict[str, Any]:
    """The `meta` of a checkpoint."""
    return read_json(Path(path) / MANIFEST)["meta"]


def damage(path: Path, part: str = "", ranks: Collectives | None = None) -> str | None:
    """What is wrong with the files of a checkpoint or of a part of it, in a few words; None if they are as written.

    Args:
        path: the checkpoint's folder.
        part: the beginning of the names of the files to check.
        ranks: all ask, and share the files among themselves; None: this process checks all of them.
    """
    ranks = ranks or Collectives()
    reasons: list[str | None] = ranks.all_gather(lambda: _damage_of_share(path, part, ranks))
    return next((reason for reason in reasons if reason is not None), None)


def check_files(path: Path, part: str = "", ranks: Collectives | None = None) -> None:
    """Raises `Damaged` where there is `damage`; arguments likewise."""
    if (reason := damage(path, part, ranks)) is not None:
        raise _damaged(path, reason)


@contextlib.contextmanager
def checked_meanwhile(path: Path, part: str) -> Iterator[None]:
    """Lets a block read a part of a checkpoint while its files are checked, so that the disk reads them once.

    Raises:
        Damaged: they are not as written, whatever the block has made of them, unless the disk was full.
    """
    check_files(path, f"{part}/.metadata")  # small, and where all the rest is found
    found: Future[None] = Future()

    def check() -> None:
        try:
            check_files(path, part)
            found.set_result(None)
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=check, daemon=True).start()  # not a pool, whose threads an interrupted block would wait for
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
            raise  # at once: no damage explains that
        found.result()  # damage explains the error, if there is any
        if not path.exists():
            raise _damaged(path, "it was removed meanwhile") from None
        raise
    found.result()


def _damaged(path: Path, reason: str) -> Damaged:
    return Damaged(f"{path} is damaged ({reason})")


def _damage_of_share(path: Path, part: str, ranks: Collectives) -> str | None:
    try:
        manifest = read_json(path / MANIFEST)
        files = manifest["files"]
        if manifest.pop(CHECKSUM, None) != checksum_of_value(manifest):
            return f"{MANIFEST} has other bytes than were written"
        names = [name for name in files if name.startswith(part)]
        names.sort(key=lambda name: files[name]["size"])  # so that shares are of about one size
        for name in names[ranks.rank :: ranks.size]:
            expected = files[name]
            if not (path / name).exists():
                return f"{name} is missing"
            if (size := (path / name).stat().st_size) != expected["size"]:
                return f"{name} has {size:,} of {expected['size']:,} bytes"
            if _fingerprint(path / name) != expected:
                return f"{name} has other bytes than were written"
    except PunaError as error:
        return str(error).removeprefix(f"{path}/")
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not one of ours"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def _fingerprint(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "checksum": checksum_of(file)}
