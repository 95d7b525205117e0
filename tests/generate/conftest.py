"""A tiny model and its tokenizer, for the loop and the engine alike."""

from pathlib import Path

import pytest

from puna.model.llama import Llama
from puna.testing import tiny_model
from puna.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_model()


@pytest.fixture(scope="module")
def precise_model() -> Llama:
    """Computes in fp64: sums in another order may change the last bit, and a drawn token may hang on fp32's."""
    return tiny_model().double()


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Tokenizer:
    return load_tokenizer(tiny_model_folder)
