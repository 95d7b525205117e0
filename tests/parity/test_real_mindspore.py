"""The real MindSpore reads checkpoints, slices and rows that puna writes; `make test-mindspore`."""

import importlib
import os
import tempfile
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

#: Where MindSpore is installed, and stays for the next run.
VENV = Path(os.environ.get("MINDSPORE_VENV", Path(tempfile.gettempdir()) / "mindspore-venv"))


@pytest.mark.mindspore
def test_mindspore_reads_what_puna_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "mindspore" not in request.config.option.markexpr:
        pytest.skip("downloads 800 MB; run with `make test-mindspore`")
    monkeypatch.syspath_prepend(BENCHMARKS)
    check = importlib.import_module("real_mindspore")
    found = check.checked(check.installed(VENV, "2.7.2"), tmp_path)
    assert len(found) == 14
    assert [name for name, passed in found.items() if not passed] == []
