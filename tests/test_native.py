"""C files become libraries, once, where the machine can make them."""

import ctypes
from pathlib import Path

import pytest

from puna import native

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "twice.c"
    file.write_text("int twice(int x) { return 2 * x; }\n")
    return file


@needs_compiler
def test_a_library_does_what_its_source_says(source: Path) -> None:
    library = native.build(source, ("-O1",))
    assert isinstance(library, ctypes.CDLL)
    assert library.twice(21) == 42


@needs_compiler
def test_it_is_made_once_and_again_when_its_source_changes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.build(source, ()) is not None
    with monkeypatch.context() as without:
        without.setattr(native.subprocess, "run", None)  # not called
        assert native.build(source, ()) is not None
    source.write_text("int twice(int x) { return x + x + 1; }\n")
    assert native.build(source, ()).twice(1) == 3


@needs_compiler
def test_what_cannot_be_made_leaves_nothing(source: Path) -> None:
    source.write_text("int twice(int x) {\n")
    assert native.build(source, ()) is None
    assert not list((source.parent / "cache").rglob("*.*"))


def test_without_a_compiler_there_is_none(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native.build(source, ()) is None
