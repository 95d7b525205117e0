"""Dialogs, of which only the assistant's answers are learnt: JSON or JSON lines, in any of three layouts.

    Alpaca      {"instruction": "…", "input": "…", "output": "…"}
    ShareGPT    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    messages    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

Any of them may have a field `system`, and Alpaca a `history` of pairs, question and answer. A JSON file is one array,
which is read piece by piece too. As in MindFormers' tool, a ShareGPT dialog that
begins with an answer loses that answer, and with the template `vicuna` (and `alpaca`) the instruction and input of an
Alpaca record are put into the words of Stanford Alpaca; elsewhere the input follows the instruction after a blank line.
"""

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.data.corpora import HELD_OUT, Option
from puna.data.documents import (
    PIECE_BYTES,
    RECORD_BYTES,
    Document,
    LeftOut,
    Span,
    after_last_line,
    checksum,
    cut_file,
    is_spellable,
    json_lines,
)
from puna.data.folders import files_of
from puna.errors import PunaError

if TYPE_CHECKING:
    from puna.prompts import Message

HELP = """Dialogs: Alpaca, ShareGPT or messages.

A record is {"instruction", "input", "output"}, {"conversations": [{"from", "value"}]} or {"messages": [{"role",
"content"}]}; files are JSON arrays, or JSON lines.
"""
#: Why a record is left out that is none of these.
UNKNOWN = "unknown layout (puna prepare chat --help shows the known ones)"

OPTIONS = (
    Option(
        "template",
        str,
        "codellama",
        "Layout, which the tuned model ships: codellama, codellama-70b, alpaca, vicuna, plain, or a model's folder.",
    ),
    HELD_OUT,
)
DISTINCT = False

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
}

#: Why a record is left out that has a turn of another role.
UNKNOWN_ROLE = f"unknown role (known: {', '.join(_ROLES)})"

#: Templates that take an Alpaca record in the words of Stanford Alpaca.
_IN_ALPACA_WORDS = ("alpaca", "vicuna")


def spans(source: Path, options: Mapping[str, Any]) -> Iterator[Span | LeftOut]:
    """Pieces of whole records, with the number of the first as state: of a line, or of an element of the array."""
    for file in files_of(source, suffixes=(".json", ".jsonl", ".ndjson")):
        if file.refused:
            yield LeftOut(file.name, source.name, file.refused)
            continue
        number = 1
        is_array = _is_array(file.path)
        for start, data, records in _array_pieces(file.path) if is_array else _line_pieces(file.path):
            state = [is_array, number]
            yield Span(str(file.path), file.name, source.name, start, start + len(data), checksum(data), state)
            number += records


def read(span: Span, data: bytes, options: Mapping[str, Any]) -> Iterator[Document | LeftOut]:
    """One dialog a record; whether the template can lay it out is seen when it is encoded."""
    is_array, first = span.state
    records = enumerate(_elements(data.decode("utf-8")), start=first) if is_array else json_lines(data, first)
    for number, record in records:
        id, messages = f"{span.id}:{number}", messages_of(record, options["template"])
        if isinstance(record, Exception):
            yield LeftOut(id, span.source, "not JSON", str(record))
        elif messages is None and (role := _unknown_role(record)) is not None:
            yield LeftOut(id, span.source, UNKNOWN_ROLE, role.encode(errors="replace").decode())
        elif messages is None:
            keys = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
            yield LeftOut(id, span.source, UNKNOWN, keys.encode(errors="replace").decode())
        elif _has_weights(record):
            yield LeftOut(id, span.source, "answers of weight 0", "puna learns all answers of a dialog")
        elif not all(is_spellable(message["content"]) for message in messages):
            yield LeftOut(id, span.source, "half a surrogate pair")
        else:
            yield Document(id, span.source, messages=messages)


def messages_of(record: Any, template: str) -> "list[Message] | None":
    """The messages of a dialog in any of the three layouts; None if it is in none of them."""
    if not isinstance(record, dict):
        return None
    if isinstance(turns := record.get("conversations"), list):
        messages = _turns(turns, "from", "value")
        messages = messages[1:] if messages and messages[0]["role"] == "assistant" else messages
    elif isinstance(turns := record.get("messages"), list):
        messages = _turns(turns, "role", "content")
    else:
        messages = _alpaca(record, template)
    system = record.get("system") or ""
    if messages is None or not isinstance(system, str):
        return None
    is_told = bool(messages) and messages[0]["role"] == "system"
    return [{"role": "system", "content": system}, *messages] if system and not is_told else messages


def _alpaca(record: dict[str, Any], template: str) -> "list[Message] | None":
    instruction, more, answer = record.get("instruction"), record.get("input") or "", record.get("output")
    history = record.get("history") or []
    if not (isinstance(instruction, str) and isinstance(more, str) and isinstance(answer, str)):
        return None
    if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
        return None
    said = [*(text for pair in history for text in pair), _question(instruction, more, template), answer]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return _turns(turns, "role", "content")


def _question(instruction: str, more: str, template: str) -> str:
    if template in _IN_ALPACA_WORDS:
        from puna.prompts import alpaca_prompt

        return alpaca_prompt(instruction, more)
    return f"{instruction}\n\n{more}" if more else instruction


def _turns(turns: list[Any], role: str, content: str) -> "list[Message] | None":
    messages: list[Message] = []
    for turn in turns:
        if not (isinstance(turn, dict) and isinstance(turn.get(role), str) and isinstance(turn.get(content), str)):
            return None
        if turn[role] not in _ROLES:
            return None
        messages.append({"role": _ROLES[turn[role]], "content": turn[content]})
    return messages


def _unknown_role(record: Any) -> str | None:
    """The first role of a turn that is not among those known, e.g. "tool"."""
    keys = {"conversations": "from", "messages": "role"} if isinstance(record, dict) else {}
    lists = [(turns, key) for name, key in keys.items() if isinstance(turns := record.get(name), list)]
    roles = (turn.get(key) for turns, key in lists for turn in turns if isinstance(turn, dict))
    return next((role for role in roles if isinstance(role, str) and role not in _ROLES), None)


def _has_weights(record: dict[str, Any]) -> bool:
    """Whether a dialog says that an answer is not to be learnt, as OpenAI's layout can."""
    lists = [turns for name in ("conversations", "messages") if isinstance(turns := record.get(name), list)]
    return any(isinstance(turn, dict) and turn.get("weight") == 0 for turns in lists for turn in turns)


def _line_pieces(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Offset, bytes and number of lines of each piece of a JSON lines file."""
    for start, data in cut_file(path, after_last_line):
        yield start, data, data.count(b"\n")


#: What may come before an element, in a piece of an array that was cut between elements.
_BEFORE = re.compile(r"[\s,]*")


def _elements(text: str) -> Iterator[Any]:
    """The elements in a piece that `_array_pieces` made."""
    decode, place = json.JSONDecoder().raw_decode, 0
    while (place := _behind(text, place)) < len(text) and text[place] != "]":
        element, place = decode(text, place)
        yield element


def _array_pieces(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Offset, bytes and number of elements of each piece of a JSON array; the first begins after its bracket."""
    with open(path, "rb") as file:
        start = file.read(RECORD_BYTES).index(b"[") + 1
        file.seek(start)
        to_text, text, number, is_last = codecs.getincrementaldecoder("utf-8")(), "", 1, False
        while not is_last:
            block = file.read(PIECE_BYTES)
            is_last = not block
            try:
                text += to_text.decode(block, final=is_last)
            except UnicodeDecodeError as error:
                raise PunaError(f"{path} is not UTF-8 ({error.reason}, near byte {file.tell():,})") from None
            stop, count, problem = _whole_elements(text, is_last)
            if problem and (is_last or len(text) - stop > RECORD_BYTES):
                raise PunaError(
                    f"{path}: record {number + count} is not valid JSON ({problem}); the file may be cut off"
                )
            if count:
                data = text[:stop].encode()
                yield start, data, count
                start, text, number = start + len(data), text[stop:], number + count


def _whole_elements(text: str, is_last: bool) -> tuple[int, int, str]:
    """Where the last whole element ends, how many there are, and what is wrong with what follows."""
    decode, stop, count = json.JSONDecoder().raw_decode, 0, 0
    while True:
        place = _behind(text, stop)
        if place == len(text):
            return stop, count, "the array does not end"
        if text[place] == "]":
            return stop, count, "more stands behind the array" if text[place + 1 :].strip() else ""
        try:
            _, end = decode(text, place)
        except (ValueError, RecursionError) as error:
            return stop, count, str(error)
        if end == len(text) and not is_last:
            return stop, count, "the array does not end"  # e.g. a number, which may go on in the next block
        stop, count = end, count + 1


def _behind(text: str, place: int) -> int:
    match = _BEFORE.match(text, place)
    return match.end() if match else place


def _is_array(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
