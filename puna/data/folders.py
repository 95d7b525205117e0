"""Which files a source holds, in an order that depends on nothing but their names."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from puna.errors import PunaError
from puna.story import FILE as STORY_FILE
from puna.story import holds_story

#: Folders that hold no work of the source's authors; skipped without listing them as left out.
_HISTORIES = (".git", ".hg", ".svn", ".bzr")
_CACHES = ("__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache")
SKIPPED_FOLDERS = frozenset([*_HISTORIES, *_CACHES])

#: Folders of packages that others wrote, and the file that marks a virtual environment, whatever its name.
_INSTALLED = frozenset(["node_modules", "site-packages", ".venv", ".tox"])
_ENVIRONMENT_FILE = "pyvenv.cfg"


class Found(NamedTuple):
    """A file or folder of a source.

    Attributes:
        path: where it is.
        name: within the source, with forward slashes, as text that UTF-8 can spell.
        size: in bytes.
        refused: why it is left out, or None; a folder that is left out stands for all that is in it.
    """

    path: Path
    name: str
    size: int
    refused: str | None = None


def files_of(source: Path, *, suffixes: Sequence[str] = (), respect_gitignore: bool = False) -> Iterator[Found]:
    """Files of a folder and of the folders in it, or the one file that `source` is.

    Args:
        source: a file or a folder. Links inside it are not followed, so that nothing is read twice.
        suffixes: of the files of a folder to take, e.g. ".txt"; none: take all.
        respect_gitignore: leave out what .gitignore files name, those above the source included, up to its repository's
            root.

    Raises:
        PunaError: the source does not exist.
    """
    if not source.exists():
        raise PunaError(f"{source} does not exist")
    if source.is_dir():
        for file in _walk(source, "", _rules_above(source.resolve()) if respect_gitignore else None):
            is_other = suffixes and not file.refused and file.path.suffix not in suffixes
            yield file._replace(refused=f"not a {' or '.join(suffixes)} file") if is_other else file
    else:
        yield Found(source, _as_text(source.name), source.stat().st_size)


class _Rules(NamedTuple):
    """The patterns of one .gitignore, and how a name within the source becomes one within that file's folder."""

    spec: Any
    prefix: str  # put in front: the path from a .gitignore above down to the source
    skipped: int  # characters left out: the path from the source down to a .gitignore in it


def _walk(folder: Path, name: str, rules: list[_Rules] | None) -> Iterator[Found]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    except OSError:
        yield Found(folder, f"{name}/", 0, "unreadable")
        return
    names = {entry.name for entry in entries}
    if _is_ours(folder, names):
        yield Found(folder, f"{name}/", 0, "made by puna")
        return
    if name and (folder.name in _INSTALLED or _ENVIRONMENT_FILE in names):  # one that is named itself is wanted
        yield Found(folder, f"{name}/", 0, "installed packages")
        return
    if rules is not None and ".gitignore" in names:
        rules = [*rules, *_rules_in(folder, prefix="", skipped=len(name) + 1 if name else 0)]
    for entry in entries:
        path, inner = folder / entry.name, f"{name}/{_as_text(entry.name)}" if name else _as_text(entry.name)
        if entry.is_symlink():
            yield Found(path, inner, 0, "symbolic link")
        elif entry.is_dir():
            if entry.name in SKIPPED_FOLDERS:
                continue
            if _is_ignored(f"{inner}/", rules):
                yield Found(path, f"{inner}/", 0, "ignored by .gitignore")
            else:
                yield from _walk(path, inner, rules)
        elif entry.is_file():
            refused = "ignored by .gitignore" if _is_ignored(inner, rules) else None
            yield Found(path, inner, entry.stat().st_size, refused)
        else:
            yield Found(path, inner, 0, "neither file nor folder")


def _is_ours(folder: Path, names: set[str]) -> bool:
    """Whether a folder with these names in it is a prepared one or one of `puna adapt`, finished or not.

    Such a one may lie in its own source.
    """
    from puna.data.shards import DATASET_FILE, WORK_FOLDER

    is_prepared = "tokenizer" in names and bool(names & {DATASET_FILE, WORK_FOLDER})
    return is_prepared or (STORY_FILE in names and holds_story(folder))


def _is_ignored(name: str, rules: list[_Rules] | None) -> bool:
    for spec, prefix, skipped in reversed(rules or []):  # the innermost that says anything decides
        verdict = spec.check_file(prefix + name[skipped:]).include
        if verdict is not None:
            return bool(verdict)
    return False


def _rules_above(source: Path) -> list[_Rules]:
    tops = [folder for folder in [source, *source.parents] if (folder / ".git").exists()]
    above = [folder for folder in source.parents if tops and folder.is_relative_to(tops[0])]
    rules = [
        rules
        for folder in reversed(above)
        for rules in _rules_in(folder, prefix=f"{source.relative_to(folder).as_posix()}/", skipped=0)
    ]
    return [] if _is_ignored("", rules) else rules  # a folder that is ignored itself was named on purpose


def _rules_in(folder: Path, *, prefix: str, skipped: int) -> list[_Rules]:
    from pathspec import GitIgnoreSpec

    try:
        lines = (folder / ".gitignore").read_text(encoding="utf-8-sig", errors="replace").splitlines()
        return [_Rules(GitIgnoreSpec.from_lines(lines), prefix, skipped)]
    except (OSError, ValueError):  # missing, unreadable, or with a pattern that git rejects too
        return []


def _as_text(name: str) -> str:
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")
