"""SentencePiece vocabularies (`tokenizer.model`), made safe and exact by editing the model before it is loaded.

SentencePiece's Python offers no switch for what Code Llama needs, but its file is a protobuf that says it all:

- the infilling markers and `<step>` are ordinary pieces there, so that a source file which contains ` <EOT>` would end
  an infilling by itself: they are retyped as control pieces, which text cannot produce;
- text in the middle of a line takes no implicit space: a second processor has `add_dummy_prefix` off. Meta's
  `encode_infilling` drops the first two ids of "☺" + text to the same end.

One character would still be lost, U+2581, which SentencePiece reads as a space: `Tokenizer` carries it around.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from puna.errors import PunaError
from puna.tokenizer.base import INFILLING_PIECES, SPACE_MARK, STEP_PIECE, Tokenizer

#: The generated module has no types.
model_pb2: Any = sentencepiece_model_pb2

#: Types of pieces.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model`; see `Tokenizer`."""

    def __init__(self, path: Path) -> None:
        model = read_model(path)
        for piece in model.pieces:
            if piece.piece in (*INFILLING_PIECES, STEP_PIECE):
                piece.type = CONTROL
        super().__init__(
            path,
            pieces=[piece.piece for piece in model.pieces],
            spellings=[_spelling(piece, model.trainer_spec.unk_surface) for piece in model.pieces],
            control=[i for i, piece in enumerate(model.pieces) if piece.type in (CONTROL, UNUSED)],
            **_special_ids(model, path),
            adds_leading_space=model.normalizer_spec.add_dummy_prefix,
            byte_ids=_byte_ids(model),
            merges_plain_text=_merges_plain_text(model),
        )
        self._spaced = _processor(model)
        model.normalizer_spec.add_dummy_prefix = False
        self._plain = _processor(model)

    def _split(self, texts: Sequence[str], leading_space: bool) -> list[list[int]]:
        processor = self._spaced if leading_space else self._plain
        if len(texts) == 1:
            return [processor.encode(texts[0])]  # a batch starts threads, which costs more than a short text
        return processor.encode(list(texts), num_threads=1)


def read_model(path: Path) -> Any:
    """Reads a SentencePiece model.

    Raises:
        PunaError: the file is not one, or is cut off.
    """
    model = model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        model.Clear()
    if not model.pieces:
        raise PunaError(f"{path} is not a SentencePiece model, or is cut off; fetch it again")
    return model


def _processor(model: Any) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def _special_ids(model: Any, path: Path) -> dict[str, int]:
    ids = {}
    for name in ("bos", "eos", "unk"):
        id, piece = (getattr(model.trainer_spec, f"{name}_{what}") for what in ("id", "piece"))
        if not 0 <= id < len(model.pieces):
            id = next((i for i, p in enumerate(model.pieces) if p.piece == piece), -1)
        ids[f"{name}_id"] = id
    if ids["eos_id"] < 0:
        raise PunaError(f"{path} has no end-of-document piece ({model.trainer_spec.eos_piece}); puna cannot use it")
    if ids["bos_id"] < 0:
        ids["bos_id"] = ids["eos_id"]
    return ids


def _spelling(piece: Any, unk_surface: str) -> bytes:
    if piece.type == BYTE:
        return bytes([int(piece.piece[3:5], 16)])
    if piece.type == UNKNOWN:
        return unk_surface.encode()
    return b"" if piece.type == CONTROL else piece.piece.replace(SPACE_MARK, " ").encode()


def _byte_ids(model: Any) -> dict[int, int]:
    ids = {int(piece.piece[3:5], 16): i for i, piece in enumerate(model.pieces) if piece.type == BYTE}
    return ids if len(ids) == 256 else {}


def _merges_plain_text(model: Any) -> bool:
    normalizer = model.normalizer_spec
    return (
        model.trainer_spec.model_type == model_pb2.TrainerSpec.BPE
        and bool(_byte_ids(model))
        and normalizer.escape_whitespaces
        and not model.trainer_spec.treat_whitespace_as_suffix
        and not normalizer.remove_extra_whitespaces
        and not normalizer.precompiled_charsmap
        and not any(piece.type == USER_DEFINED for piece in model.pieces)
    )
