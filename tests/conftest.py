"""What all tests share: the folder of real data, where there is one."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout, with real data sets and files made by other systems."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder
