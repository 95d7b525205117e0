"""The page of numbers says what the results say, results can be measured again, and contenders are timed in turn."""

import argparse
import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from puna.data.rows import IGNORE

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_page_is_what_the_results_generate() -> None:
    page = BENCHMARKS.parent / "docs" / "numbers.md"
    assert page.read_text(encoding="utf-8") == _loaded(BENCHMARKS / "write_numbers.py").page()


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/record.py` in a project whose code is all in a commit."""
    for name in ("COMMIT", "RESULTS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("puna", "benchmarks/results", "docs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "puna" / "code.py").write_text("fast = 1\n")
    shutil.copy(BENCHMARKS / "record.py", tmp_path / "benchmarks")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "--no-verify", "-m", "all"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return _loaded(tmp_path / "benchmarks" / "record.py")


@pytest.mark.parametrize("changed", ["puna/code.py", "puna/new.py", "benchmarks/new.py"])
def test_changed_code_is_not_measured(
    record: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    (tmp_path / changed).write_text("fast = 2\n")
    monkeypatch.setattr("sys.argv", ["speed.py"])
    with pytest.raises(SystemExit, match=rf"no commit has these changes:\n.* {changed}\ncommit them, or only try"):
        record.arguments(argparse.ArgumentParser())


def test_code_that_changed_meanwhile_is_not_recorded_but_said(
    record: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "puna" / "code.py").write_text("fast = 2\n")
    with pytest.raises(SystemExit, match="nobody could repeat"):
        record.record("speed", [{"seconds": 1}])
    assert '"seconds": 1' in capsys.readouterr().out
    assert not list((tmp_path / "benchmarks" / "results").iterdir())


def test_results_and_docs_may_have_changed(record: ModuleType, tmp_path: Path) -> None:
    for name in ("benchmarks/results/a.json", "docs/a.md"):
        (tmp_path / name).write_text("{}")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert head.stdout.startswith(record.commit())


def test_a_trial_of_changed_code_leaves_the_results_alone(
    record: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "puna" / "code.py").write_text("fast = 2\n")
    monkeypatch.setenv("RESULTS", str(tmp_path / "trial"))
    path = record.record("speed", [])
    assert path == tmp_path / "trial" / "speed.json"
    assert '+changes"' in path.read_text()


def test_contenders_take_turns_and_what_warms_up_does_not_count() -> None:
    turns: list[tuple[str, int]] = []
    contenders = {name: lambda number, name=name: turns.append((name, number)) or number for name in "ab"}
    taken = _loaded(BENCHMARKS / "turns.py").in_turn(contenders, 2, warm_ups=1)
    assert turns == [("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 3)]
    assert [len(taken[name].seconds) for name in "ab"] == [2, 2]
    assert taken["b"].answers == [1, 2, 3]


def test_a_random_row_asks_for_the_next_token_of_the_same_document() -> None:
    batch = _loaded(BENCHMARKS / "random_rows.py").random_batch(2, 10, 100, document=4)
    for tokens, targets, documents in zip(batch.tokens, batch.targets, batch.documents, strict=True):
        assert documents.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
        for place in range(10):
            is_last = place in (3, 7, 9)
            assert targets[place] == (IGNORE if is_last else tokens[place + 1])


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
