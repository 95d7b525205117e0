"""Training a small vocabulary like Code Llama's, for demonstrations and tests."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from puna.errors import PunaError
from puna.files import file_aside
from puna.tokenizer.base import INFILLING_PIECES, Tokenizer

#: Reading stops after this many characters: more do not make a few thousand pieces better.
MAX_CHARACTERS = 8_000_000


def train_tokenizer(texts: Iterable[str], folder: Path | str, *, vocab_size: int, infilling: bool = True) -> Tokenizer:
    """Trains a SentencePiece vocabulary with Llama's settings and writes `folder/tokenizer.model`.

    Byte-pair encoding with byte fallback, no normalisation, digits apart, all whitespace kept; `<unk>` 0, `<s>` 1,
    `</s>` 2, then the 256 bytes. The same texts give the same file.

    Args:
        texts: documents; reading stops after 8 million characters.
        folder: made if need be.
        vocab_size: number of ids in all; from 259 + 16 + the number of characters in use upwards.
        infilling: whether the last sixteen ids are Code Llama's infilling pieces (as control pieces).

    Raises:
        PunaError: there is too little text, or it has too many different characters, for this vocabulary size.
    """
    import sentencepiece

    from puna.tokenizer.sentence_piece import CONTROL, SentencePieceTokenizer, model_pb2

    file = io.BytesIO()
    extra = INFILLING_PIECES if infilling else ()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size - len(extra),
            character_coverage=0.9995,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            max_sentence_length=100_000,
            num_threads=1,
            minloglevel=2,
        )
    except UnicodeEncodeError as error:
        raise PunaError(f"cannot train a vocabulary on text that UTF-8 cannot encode: {error}") from None
    except (RuntimeError, StopIteration) as error:
        reason = str(error).rpartition("] ")[2].strip(" .\n") or "there is no text"
        raise PunaError(
            f"cannot train a vocabulary of {vocab_size} on these texts: {reason}; give more text or another vocab_size"
        ) from None
    model = model_pb2.ModelProto()
    model.ParseFromString(file.getvalue())
    lowest = model.pieces[-1].score
    for i, piece in enumerate(extra, start=1):
        model.pieces.add(piece=piece, score=lowest - i, type=CONTROL)
    model.trainer_spec.vocab_size = len(model.pieces)
    path = Path(folder) / "tokenizer.model"
    with file_aside(path) as out:
        out.write(model.SerializeToString(deterministic=True))
    return SentencePieceTokenizer(path)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    left = MAX_CHARACTERS
    for text in texts:
        for line in text[:left].split("\n"):
            if line:
                line.encode()  # an error here: the trainer would stop silently at a lone surrogate
                yield line
        left -= len(text)
        if left <= 0:
            return
