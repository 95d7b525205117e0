"""Wikitext's rules of cleaning on bytes: what `corpora.wikitext.clean` says rule by rule, three times as fast.

A rule such as `" , "` -> `", "` takes spaces away around a mark that is rare, so NumPy looks for the marks, not for the
spaces. Where two matches would share a space, the order of the rules decides, and within a rule the first match.
"""

import re

import numpy as np
from numpy.typing import NDArray

_SPACE, _NEWLINE, _AT = b" \n@"

#: The signs that lose the space before them, in the order of the rules.
_SIGNS = b":;.!?,"
_IS_SIGN = np.isin(np.arange(256), list(_SIGNS))

#: What stands between two `@`, in the order of the rules.
_JOINED = b"-,."
_IS_JOINED = np.isin(np.arange(256), list(_JOINED))

_BRACKETS = [(b"(", re.compile(rb"\(([^)]*)\)"), b")"), (b"[", re.compile(rb"\[([^\]]*)\]"), b"]"),
             (b"{", re.compile(rb"{([^}]*)}"), b"}")]  # fmt: skip

#: What `str.strip` takes away of ASCII; `bytes.strip` by itself knows less.
_ASCII_BLANKS = b"\t\n\v\f\r\x1c\x1d\x1e\x1f "

_REPEATED = [(b"= = = =", b"===="), (b"= = =", b"==="), (b"= =", b"==")]


def clean_quickly(text: str) -> str:
    """What `corpora.wikitext.clean` makes of a text."""
    data = text.encode().replace(b"s '", b"s'")
    data = _tidied(_without_spaces_before_signs(_joined(data)))
    for spaced, written in _REPEATED:
        data = data.replace(spaced, written)
    data = _without_spaces_around(data, b"\xc2\xb0")
    return _lines_without_blanks(data).replace(b" N ", b" 1 ").replace(b" 's", b"'s").decode()


def _joined(data: bytes) -> bytes:
    """` @-@ ` -> `-`, and so for commas and points."""
    codes = _padded(data)
    at = np.flatnonzero(codes[:-3] == _AT)
    is_whole = (
        (codes[at - 1] == _SPACE) & _IS_JOINED[codes[at + 1]] & (codes[at + 2] == _AT) & (codes[at + 3] == _SPACE)
    )
    at = at[is_whole]
    if np.any(np.diff(at) == 4):  # two of them share a space
        for mark in _JOINED:
            data = data.replace(b" @%c@ " % mark, bytes([mark]))
        return data
    return _without(codes, np.concatenate([at - 1, at, at + 2, at + 3]))


def _without_spaces_before_signs(data: bytes) -> bytes:
    """` , ` -> `, `, and so for the other signs."""
    codes = _padded(data)
    at = np.flatnonzero(_IS_SIGN[codes[:-3]])
    at = at[(codes[at - 1] == _SPACE) & (codes[at + 1] == _SPACE)]
    is_gone = np.zeros(len(codes), np.bool_)
    for sign in _SIGNS:
        of_rule = at[codes[at] == sign]
        of_rule = of_rule[~is_gone[of_rule + 1]]
        is_gone[_every_other(of_rule) - 1] = True
    return _without(codes, is_gone)


def _every_other(at: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of neighbours that share a space the first, the third and so on."""
    numbers = np.arange(len(at))
    is_first = np.diff(at, prepend=-2) != 2
    return at[(numbers - np.maximum.accumulate(np.where(is_first, numbers, 0))) % 2 == 0]


def _tidied(data: bytes) -> bytes:
    """No blanks inside brackets and quotation marks."""
    for opening, pattern, closing in _BRACKETS:
        if opening in data:
            data = pattern.sub(lambda match: opening + _stripped(match[1]) + closing, data)  # noqa: B023 - used at once
    for mark in (b'"', b"'"):
        parts = data.split(mark)
        closed = len(parts) - (len(parts) % 2 == 0)
        parts[1:closed:2] = map(_stripped, parts[1:closed:2])
        data = mark.join(parts)
    return data


def _stripped(data: bytes) -> bytes:
    data = data.strip(_ASCII_BLANKS)
    return data if data.isascii() else data.decode().strip().encode()


def _without_spaces_around(data: bytes, mark: bytes) -> bytes:
    """The mark without a space before and one behind it, where it has both; quick where it is rare."""
    first, *rest = data.split(mark)
    pieces = [first]
    for piece in rest:
        if pieces[-1].endswith(b" ") and piece.startswith(b" "):
            pieces[-1], piece = pieces[-1][:-1], piece[1:]
        pieces.append(piece)
    return mark.join(pieces)


def _lines_without_blanks(data: bytes) -> bytes:
    """One space less at the end of each line, then one less at its beginning."""
    codes = _padded(data)
    at = np.flatnonzero(codes == _NEWLINE)
    is_gone = np.zeros(len(codes), np.bool_)
    is_gone[(at - 1)[codes[at - 1] == _SPACE]] = True
    is_gone[(at + 1)[(codes[at + 1] == _SPACE) & ~is_gone[at + 1]]] = True
    return _without(codes, is_gone)


def _padded(data: bytes) -> NDArray[np.uint8]:
    """The bytes with three NULs behind them, so that one may look beyond the end; before the first lies the last."""
    return np.frombuffer(data + b"\0\0\0", np.uint8)


def _without(codes: NDArray[np.uint8], gone: NDArray[np.bool_] | NDArray[np.int64]) -> bytes:
    """The bytes but for some, and the padding."""
    is_kept = np.ones(len(codes), np.bool_)
    is_kept[gone] = False
    return codes[:-3][is_kept[:-3]].tobytes()
