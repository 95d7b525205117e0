"""The page of numbers says what the results say."""

import importlib.util
from pathlib import Path

HERE = Path(__file__).parents[1]


def test_the_page_is_what_the_results_generate() -> None:
    spec = importlib.util.spec_from_file_location("numbers_page", HERE / "benchmarks" / "write_numbers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (HERE / "docs" / "numbers.md").read_text(encoding="utf-8") == module.page()
