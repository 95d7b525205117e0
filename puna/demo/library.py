"""The running Python's standard library, cut into pieces that a small model reads whole.

    json/decoder.py     import re …              json/decoder-1.py    the imports and the first functions
                        def _decode_uXXXX …      json/decoder-2.py    class JSONDecoder(object):
                        class JSONDecoder …                               def decode(self, s, …

Cuts lie between functions, or between the methods of a long class, whose header every piece then repeats. What is
longer than a piece is left out.
"""

import ast
import os
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from puna.errors import PunaError
from puna.files import ASIDE
from puna.progress import Progress

#: Characters of a piece, about 450 tokens: with its infilling markers it fits a row of 512.
PIECE_CHARACTERS = 1500

#: Folders of the standard library that hold tests, programs, tables or other people's packages.
_NOT_OURS = ("site-packages", "dist-packages", "lib-dynload", "ensurepip", "__pycache__", "__phello__")
_NOT_PLAIN = ("test", "tests", "idlelib", "turtledemo", "tkinter", "lib2to3", "distutils", "encodings", "pydoc_data")
LEFT_OUT = frozenset([*_NOT_OURS, *_NOT_PLAIN])


def copy_library(folder: Path, *, modules: int | None = None) -> dict[str, int]:
    """Writes the pieces of the library's modules to `folder`, which appears when it is whole.

    Args:
        folder: to be made.
        modules: how many modules to take, by name; None: all.

    Returns:
        {"modules", "pieces", "bytes"}.

    Raises:
        PunaError: this Python has no sources of its library, or `folder` exists.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(library.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(library).parts)]
    if not paths:
        raise PunaError(f"{library} holds no Python files; run the demo with a Python that has its library's sources")
    count = size_bytes = 0
    aside = folder.with_name(folder.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    with Progress("cutting", len(paths[:modules]), "modules") as progress:
        for path in paths[:modules]:
            name = path.relative_to(library).with_suffix("")
            for number, piece in enumerate(pieces(path.read_text(encoding="utf-8", errors="replace")), start=1):
                place = aside / name.with_name(f"{name.name}-{number}.py")
                place.parent.mkdir(parents=True, exist_ok=True)
                size_bytes += place.write_bytes(piece.encode())
                count += 1
            progress.advance()
    os.rename(aside, folder)  # not synced: thousands of files that can be cut again
    return {"modules": len(paths[:modules]), "pieces": count, "bytes": size_bytes}


def pieces(source: str) -> Iterator[str]:
    """Cuts the text of a module; what is not Python gives nothing."""
    piece, open_class = "", ""
    for header, text in _parts(source):
        part = text if header == open_class else header + text
        if piece and len(piece) + len(part) > PIECE_CHARACTERS:
            yield piece
            piece, part = "", header + text
        piece, open_class = (piece + part).lstrip("\n"), header
    if piece:
        yield piece


def _parts(source: str) -> Iterator[tuple[str, str]]:
    """Statements in order, long classes as header and method; nothing that is longer than a piece."""
    try:
        with warnings.catch_warnings(action="ignore"):  # odd escapes of old modules
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.split("\n")
    for node, text in _texts(tree.body, lines, 0):
        if len(text) <= PIECE_CHARACTERS:
            yield "", text
        elif isinstance(node, ast.ClassDef):
            begin = _first_line(node.body[0])
            header = "\n".join(["\n", *lines[_first_line(node) : begin], ""])
            for _, method in _texts(node.body, lines, begin):
                if len(header) + len(method) <= PIECE_CHARACTERS:
                    yield header, method


def _texts(body: list[ast.stmt], lines: list[str], start: int) -> Iterator[tuple[ast.stmt, str]]:
    """Each statement with its text, comments and blank lines before it included."""
    for node in body:
        yield node, "\n".join(lines[start : node.end_lineno]) + "\n"
        start = node.end_lineno or start


def _first_line(node: ast.stmt) -> int:
    """The index of the line on which a statement or its first decorator stands."""
    return min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]) - 1
