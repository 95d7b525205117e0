"""What all tests share: the folder of real data, where there is one, and a tiny model."""

from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: a busy machine would fail tests at random.
settings.register_profile("puna", deadline=None)
settings.load_profile("puna")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout, with real data sets and files made by other systems."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the size `tiny-64` with a tokenizer of 512 pieces and infilling markers; only to be read."""
    from puna.testing import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
