"""What all tests share: the folder of real data, where there is one, tokenizers and a tiny model."""

import os
import signal
from pathlib import Path

# Models here are so small that a second thread only waits for the first; read when torch and its kin are loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# A script that runs the tests in its background ignores Ctrl-C, and so would every program that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """A vocabulary of 1,024 ids with infilling markers, trained on a few modules of the standard library."""
    from puna.tokenizer import train_tokenizer

    library = Path(os.__file__).parent
    texts = [(library / name).read_text(encoding="utf-8") for name in ("argparse.py", "ast.py", "os.py", "random.py")]
    return train_tokenizer(texts, tmp_path_factory.mktemp("small"), vocab_size=1024)


@pytest.fixture(scope="session")
def code_llama_tokenizer(shared: Path, tmp_path_factory: pytest.TempPathFactory):
    """Llama's vocabulary with the sixteen pieces of Code Llama behind it, ordinary ones as in the published file."""
    from puna.tokenizer import load_tokenizer
    from puna.tokenizer.base import INFILLING_PIECES
    from puna.tokenizer.sentence_piece import NORMAL, read_model

    model = read_model(shared / "data/tokenizer/tokenizer.model")
    for i, piece in enumerate(INFILLING_PIECES):
        model.pieces.add(piece=piece, score=-32000.0 - i, type=NORMAL)
    path = tmp_path_factory.mktemp("code_llama") / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    return load_tokenizer(path)
