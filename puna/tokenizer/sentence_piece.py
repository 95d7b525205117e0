"""SentencePiece vocabularies (`tokenizer.model`), made safe and exact by editing the model before it is loaded.

SentencePiece's Python offers no switch for what Code Llama needs, but its file is a protobuf that says it all:

- the infilling markers and `<step>` are ordinary pieces there, so that a source file which contains ` <EOT>` would end
  an infilling by itself: they and their fragments (` <E`, ` <M`) are retyped as control pieces, which text cannot
  produce. The text is then spelled by Llama's own pieces;
- so are pieces that files beside it call special (e.g. `<|im_end|>`), whatever type they have in the model;
- pieces that Hugging Face added after the model's last id are listed in files beside it, and become control pieces;
- text in the middle of a line takes no implicit space: a second processor has `add_dummy_prefix` off. Meta's
  `encode_infilling` drops the first two ids of "☺" + text to the same end.

One character would still be lost, U+2581, which SentencePiece reads as a space: `Tokenizer` carries it around.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from puna.errors import PunaError
from puna.files import read_json
from puna.tokenizer.base import MARKERS, SPACE_MARK, Tokenizer

#: The generated module has no types.
model_pb2: Any = sentencepiece_model_pb2

#: Types of pieces.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model`; see `Tokenizer`."""

    def __init__(self, path: Path) -> None:
        model = read_model(path)
        pieces = [piece.piece for piece in model.pieces]
        types = [piece.type for piece in model.pieces]
        # The fragments of markers too: text such as ` <E>` is then spelled by Llama's own pieces, not by half a marker.
        markers, settings = {i for i, piece in enumerate(pieces) if piece in MARKERS}, _settings(path)
        for i in markers | {i for i in _told_special(settings, pieces) if types[i] in (NORMAL, USER_DEFINED)}:
            model.pieces[i].type = types[i] = CONTROL
        bos_id, eos_id, unk_id = _special_ids(model, pieces, path)
        added, byte_ids = _added_pieces(settings, path, len(pieces)), _byte_ids(pieces, types)
        super().__init__(
            path,
            pieces=[*pieces, *added],
            spellings=_spellings(pieces, types, model.trainer_spec.unk_surface) + [b""] * len(added),
            control=[
                *(i for i, type in enumerate(types) if type in (CONTROL, UNUSED)),
                *range(len(pieces), len(pieces) + len(added)),
            ],
            bos_id=bos_id,
            eos_id=eos_id,
            unk_id=unk_id,
            adds_leading_space=model.normalizer_spec.add_dummy_prefix,
            byte_ids=byte_ids,
            merges_plain_text=bool(byte_ids) and USER_DEFINED not in types and only_merges(model),
            adds_space_after_control=settings.get("legacy") is not False,
        )
        self._model = model.SerializeToString()
        model.normalizer_spec.add_dummy_prefix = False
        self._plain = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    @cached_property
    def _spaced(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self._model)

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
    model, content = model_pb2.ModelProto(), path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/=]+ 0\n", content):
        raise PunaError(
            f"{path} is a vocabulary of tiktoken, as Llama 3's; take the Hugging Face version's tokenizer.json"
        )
    try:
        model.ParseFromString(content)
    except DecodeError:
        model.Clear()
    if not model.pieces:
        raise PunaError(f"{path} is not a SentencePiece model, or is cut off; fetch it again")
    return model


def only_merges(model: Any) -> bool:
    """Whether a model splits text by merging neighbours (BPE), and does nothing else to it before."""
    normalizer = model.normalizer_spec
    return (
        model.trainer_spec.model_type == model_pb2.TrainerSpec.BPE
        and normalizer.escape_whitespaces
        and not model.trainer_spec.treat_whitespace_as_suffix
        and not normalizer.remove_extra_whitespaces
        and not normalizer.precompiled_charsmap
    )


def _settings(path: Path) -> dict[str, Any]:
    """What Hugging Face keeps beside a tokenizer.model."""
    file = path.with_name("tokenizer_config.json")
    return read_json(file) if file.is_file() else {}


def _added_pieces(settings: dict[str, Any], path: Path, size: int) -> list[str]:
    """The pieces after the model's own `size` ones that files beside it list; all are control pieces."""
    ids = {int(i): token["content"] for i, token in settings.get("added_tokens_decoder", {}).items()}
    file = path.with_name("added_tokens.json")
    if file.is_file():
        ids.update({i: piece for piece, i in read_json(file).items()})
    return [ids.get(i, "") for i in range(size, max(ids, default=-1) + 1)]


def _told_special(settings: dict[str, Any], pieces: Sequence[str]) -> set[int]:
    """Ids of the model's own pieces that Hugging Face takes for control tokens; the model may say otherwise."""
    told = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
    own = {i: token for i, token in told.items() if i < len(pieces) and token["content"] == pieces[i]}
    return {i for i, token in own.items() if token.get("special")}


def _special_ids(model: Any, pieces: Sequence[str], path: Path) -> tuple[int, int, int | None]:
    """The ids of BOS, EOS and of what cannot be spelled."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    told = model.trainer_spec
    bos, eos, unk = (
        id if 0 <= id < len(ids) else ids.get(piece)
        for id, piece in ((told.bos_id, told.bos_piece), (told.eos_id, told.eos_piece), (told.unk_id, told.unk_piece))
    )
    if eos is None:
        raise PunaError(f"{path} has no end-of-document piece ({told.eos_piece}); puna cannot use it")
    return (eos if bos is None else bos), eos, unk


def _spellings(pieces: Sequence[str], types: Sequence[int], unk_surface: str) -> list[bytes]:
    spellings = [piece.replace(SPACE_MARK, " ").encode() for piece in pieces]
    for i, type in enumerate(types):
        if type == BYTE:
            spellings[i] = bytes([_byte(pieces[i])])
        elif type in (UNKNOWN, CONTROL):
            spellings[i] = unk_surface.encode() if type == UNKNOWN else b""
    return spellings


def _byte_ids(pieces: Sequence[str], types: Sequence[int]) -> dict[int, int]:
    ids = {_byte(pieces[i]): i for i, type in enumerate(types) if type == BYTE}
    return ids if len(ids) == 256 else {}


def _byte(piece: str) -> int:
    """What a piece such as `<0x0A>` spells."""
    return int(piece[3:5], 16)
