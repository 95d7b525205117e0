"""Hugging Face vocabularies (`tokenizer.json`), through the `tokenizers` library.

Like `sentence_piece`, this edits the file's content before the library sees it, so that the promises of `Tokenizer`
hold: puna itself puts the space in front of a text (or not), special tokens are not looked for in a text, and merges
that would spell a control piece letter by letter are removed. Added pieces written `<|…|>` are control pieces, whatever
the file calls them: Qwen2.5-Coder's infilling markers are not special there. What cannot be promised is that text comes
back as it was from a vocabulary that normalises it, as Qwen's does (NFC).

Two families are known by their decoder: byte-level vocabularies (GPT-2, Llama 3, Qwen, DeepSeek) write each byte as a
character of its own; Llama-like ones write a space as U+2581 and unknown characters as `<0xE2>` pieces.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from puna.errors import PunaError
from puna.files import read_json
from puna.tokenizer.base import MARKERS, SPACE_MARK, Tokenizer

#: Names of BOS and EOS that are tried, in this order, where no file beside tokenizer.json names them.
COMMON_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>"),
}

#: How control pieces are written; DeepSeek's bars are full-width.
_MARKER = re.compile(r"<([|\uff5c]).+\1>")

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; see `Tokenizer`."""

    def __init__(self, path: Path) -> None:
        content = read_json(path)
        if "model" not in content:
            raise PunaError(f"{path} is not a tokenizer of the `tokenizers` library (it has no model)")
        adds_leading_space, adds_space_after_control = _take_leading_space_out(content)
        content["added_tokens"] = content.get("added_tokens") or []
        for token in content["added_tokens"]:
            is_marker = token["content"] in MARKERS or _MARKER.fullmatch(token["content"])
            token["special"] = bool(token.get("special") or is_marker)
        control_pieces = _take_control_pieces_out(content)
        self._backend = _backend(content, path)
        ids = self._backend.get_vocab(with_added_tokens=True)
        pieces = [""] * (max(ids.values()) + 1)
        for piece, id in ids.items():
            pieces[id] = piece
        byte_ids = {int(match[1], 16): id for piece, id in ids.items() if (match := _BYTE_PIECE.fullmatch(piece))}
        control = {ids[piece] for piece in control_pieces if piece in ids}
        spell = _spelling_of(content, path)
        super().__init__(
            path,
            pieces=pieces,
            spellings=[b"" if i in control else spell(piece) for i, piece in enumerate(pieces)],
            control=control,
            bos_id=_special_id("bos", path, ids, fallback="eos"),
            eos_id=_special_id("eos", path, ids),
            unk_id=ids.get(content["model"].get("unk_token") or ""),
            adds_leading_space=adds_leading_space,
            byte_ids=byte_ids if len(byte_ids) == 256 else {},
            merges_plain_text=False,
            adds_space_after_control=adds_space_after_control,
            control_strips={
                ids[token["content"]]: (bool(token.get("lstrip")), bool(token.get("rstrip")))
                for token in content["added_tokens"]
            },
        )
        for id in control:
            if control.intersection(self.encode(pieces[id])):
                raise PunaError(f"{path} makes the control token {pieces[id]} out of ordinary text; puna cannot use it")

    def _split(self, texts: Sequence[str], leading_space: bool) -> list[list[int]]:
        if leading_space and self.adds_leading_space:
            texts = [" " + text if text else text for text in texts]
        if len(texts) == 1:
            return [self._backend.encode(texts[0], add_special_tokens=False).ids]
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]


def _backend(content: dict[str, Any], path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps({**content, "truncation": None, "padding": None}))
    except Exception as error:  # the library raises bare Exceptions
        raise PunaError(f"{path} is not a tokenizer that the `tokenizers` library can read: {error}") from None
    backend.encode_special_tokens = True
    return backend


def _take_leading_space_out(content: dict[str, Any]) -> tuple[bool, bool]:
    """Removes the steps that put a space in front.

    Returns:
        Whether they put one in front of a text, and whether also after each control token.
    """
    found = everywhere = False
    for step in _steps(content, "normalizer", "pre_tokenizer"):
        if step["type"] == "Prepend":
            found, everywhere, step["prepend"] = True, True, ""
        elif step["type"] == "Metaspace":
            scheme = step.pop("prepend_scheme", "always" if step.pop("add_prefix_space", True) else "never")
            found, everywhere = found or scheme != "never", everywhere or scheme == "always"
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            found, everywhere, step["add_prefix_space"] = True, True, False
    return found, everywhere


def _take_control_pieces_out(content: dict[str, Any]) -> set[str]:
    """Removes the merges that spell a control piece; returns the control pieces."""
    model, added = content["model"], content["added_tokens"]
    pieces = {token["content"] for token in added if token["special"] and not _BYTE_PIECE.fullmatch(token["content"])}
    pieces.update(piece for piece in MARKERS if piece in (model.get("vocab") or {}))
    if "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if "".join(pair) not in pieces]
    return pieces


def _steps(content: dict[str, Any], *parts: str) -> Iterator[dict[str, Any]]:
    """Every step of these parts of a tokenizer.json, those inside sequences too."""
    for part in parts:
        step = content.get(part)
        if step is None:
            continue
        if step["type"] != "Sequence":
            yield step
        for steps in (step[key] for key in ("normalizers", "pretokenizers", "decoders") if key in step):
            for inner in steps:
                yield from _steps({"step": inner}, "step")


def _spelling_of(content: dict[str, Any], path: Path) -> Any:
    """The function from a piece to its bytes, known by the decoder."""
    added = {token["content"] for token in content["added_tokens"]}
    decoders = list(_steps(content, "decoder"))
    if any(step["type"] == "ByteLevel" for step in decoders):
        byte_of = {character: bytes([byte]) for byte, character in _byte_characters().items()}
        return lambda piece: piece.encode() if piece in added else b"".join(byte_of[c] for c in piece)
    if any(SPACE_MARK in json.dumps(step, ensure_ascii=False) for step in decoders):

        def spell(piece: str) -> bytes:
            byte = _BYTE_PIECE.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE_MARK, " ").encode()

        return spell
    raise PunaError(f"{path} is neither byte-level nor Llama-like; puna reads those two families of tokenizer.json")


def _byte_characters() -> dict[int, str]:
    """Byte -> the character that stands for it in byte-level vocabularies. Source: GPT-2's encoder.py."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def _special_id(name: str, path: Path, ids: dict[str, int], fallback: str | None = None) -> int:
    """The id of BOS or EOS, by the files beside tokenizer.json, else by its usual names."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if path.with_name(file).is_file():
            token = read_json(path.with_name(file)).get(f"{name}_token")
            token = token["content"] if isinstance(token, dict) else token
            if token is not None and token in ids:
                return ids[token]
    if path.with_name("config.json").is_file():
        id = read_json(path.with_name("config.json")).get(f"{name}_token_id")
        id = id[0] if isinstance(id, list) else id
        if id is not None:
            return id
    for token in COMMON_NAMES[name]:
        if token in ids:
            return ids[token]
    if fallback is not None:
        return _special_id(fallback, path, ids)
    raise PunaError(
        f"{path} does not say which token ends a document; put tokenizer_config.json with eos_token beside it"
    )
