"""A SentencePiece vocabulary for transformers: `tokenizer.json`, beside the `tokenizer.model` that stays the truth.

transformers 5 rebuilds a bare `tokenizer.model` without its scores and then merges runs of spaces first, so indented
code gets other ids than the model was trained on. The merges written here are in the order of the scores. Two things
remain as transformers has them: control pieces that are spelled in a text (`</s>`) become control ids, and so does a
marker of infilling, if written with U+2581 (`▁<PRE>`).
"""

from pathlib import Path
from typing import Any

from puna.files import write_json
from puna.tokenizer.base import SPACE_MARK, Tokenizer
from puna.tokenizer.sentence_piece import only_merges, read_model


def write_tokenizer_json(tokenizer: Tokenizer, folder: Path) -> None:
    """Adds `tokenizer.json`, and `tokenizer_config.json` if there is none, to a folder with a `tokenizer.model`.

    Nothing is done where there is a `tokenizer.json` already, or where SentencePiece does more than merge pairs
    (another algorithm, normalisation of characters): transformers has no exact form for that.
    """
    if (folder / "tokenizer.json").exists() or not (folder / "tokenizer.model").exists():
        return
    model = read_model(folder / "tokenizer.model")
    if not (model.normalizer_spec.add_dummy_prefix and only_merges(model)):
        return
    bos, eos, unk = (tokenizer.piece(id) for id in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id or 0))
    ids = {piece: id for id in range(tokenizer.vocab_size) if (piece := tokenizer.piece(id))}
    control = dict.fromkeys([unk, bos, eos, *(piece for piece, id in ids.items() if id in tokenizer.control)])
    write_json(folder / "tokenizer.json", _content(model, ids, list(control), bos, unk))
    if not (folder / "tokenizer_config.json").exists():
        names = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False}
        write_json(folder / "tokenizer_config.json", config)


def _content(model: Any, ids: dict[str, int], control: list[str], bos: str, unk: str) -> dict[str, Any]:
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    begin, first, second = ({"SpecialToken": {"id": bos, "type_id": 0}}, *(_sequence(name) for name in "AB"))
    return {
        "version": "1.0",
        "added_tokens": [{"id": ids[piece], "content": piece, **flags, "special": True} for piece in control],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE_MARK},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, begin, second],
            "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": unk,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": _merges(model, ids, set(control)),
        },
    }


def _sequence(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}


def _merges(model: Any, ids: dict[str, int], control: set[str]) -> list[list[str]]:
    """Every pair of pieces that makes up another one, ordered by that one's score, the highest first."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL and piece.piece in ids}
    merges = []
    for piece in sorted(scores.keys() - control, key=lambda piece: (-scores[piece], ids[piece])):
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += sorted(
            ([left, right] for left, right in halves if left in scores and right in scores),
            key=lambda pair: (ids[pair[0]], ids[pair[1]]),
        )
    return merges
