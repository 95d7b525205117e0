"""Plain data over a pipe: what crosses between the two halves of a judgement, and nothing else does.

    [1, "a"]  ──encode──▶  b"l2:i1:1s1:a"  ──decode──▶  [1, "a"], rebuilt from the builtin types themselves

`decode` makes plain builtin values out of any bytes or refuses them, so what it returns can be compared and called upon
without asking the sender's code.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # typing's own would have to be imported
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: Longest message, in bytes.
MESSAGE_BYTES = 4 << 20

#: How deep lists, tuples, sets and dicts may lie within each other.
DEPTH = 100


class Handle:
    """The number of an object that stays with the program."""

    __match_args__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class NotDataError(Exception):
    """A value that cannot cross, or bytes that are no value; the message says which."""


class TooLongError(Exception):
    """A message beyond `MESSAGE_BYTES`."""


class Pipe:
    """Messages over two file descriptors, each led by its length in 8 bytes."""

    def __init__(self, inbox: int, outbox: int) -> None:
        self.inbox, self.outbox = inbox, outbox
        self._ahead = b""

    def send(self, message: bytes) -> None:
        """Writes one message."""
        rest = memoryview(len(message).to_bytes(8, "big") + message)
        while rest:
            rest = rest[os.write(self.outbox, rest) :]

    def receive(self) -> bytes:
        """Reads one message.

        Raises:
            EOFError: the other half is gone.
            TooLongError: the message announces more than `MESSAGE_BYTES`.
        """
        head = self._read(8)
        size = int.from_bytes(head, "big")
        if size > MESSAGE_BYTES:
            raise TooLongError
        return self._read(size)

    def is_ready(self, seconds: float) -> bool:
        """Whether something comes within that time."""
        import select

        return bool(self._ahead) or bool(select.select([self.inbox], [], [], seconds)[0])

    def _read(self, size: int) -> bytes:
        """`size` bytes; what the system gives beyond them is kept for the next message."""
        chunks, length = [self._ahead], len(self._ahead)
        while length < size:
            chunk = os.read(self.inbox, 1 << 16)
            if not chunk:
                raise EOFError
            chunks.append(chunk)
            length += len(chunk)
        whole = b"".join(chunks)
        self._ahead = whole[size:]
        return whole[:size]


def read_all(descriptor: int) -> bytes:
    """All that a file holds."""
    chunks = []
    while chunk := os.read(descriptor, 1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


#: Letter of a container -> its type, and how it is built from a list of its items. `dict` goes as its items.
CONTAINERS: dict[bytes, tuple[type, Callable[[list[Any]], Any]]] = {
    b"l": (list, list),
    b"u": (tuple, tuple),
    b"e": (set, set),
    b"z": (frozenset, frozenset),
    b"m": (dict, dict),
    b"k": (type({}.keys()), lambda items: dict.fromkeys(items).keys()),
    b"v": (type({}.values()), lambda items: dict(enumerate(items)).values()),
    b"w": (type({}.items()), lambda items: dict(items).items()),
}

#: Letter of a plain value -> its type, its text, and how it is built from the text.
SCALARS: dict[bytes, tuple[type, Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    b"i": (int, lambda x: b"%x" % int.__index__(x), lambda text: int(text, 16)),
    b"d": (float, lambda x: float.hex(x).encode(), lambda text: float.fromhex(text.decode())),
    b"c": (complex, lambda x: f"{x.real.hex()} {x.imag.hex()}".encode(), lambda text: _complex(text.decode())),
    b"s": (str, lambda x: str.encode(x, "utf-8", "surrogatepass"), lambda text: text.decode("utf-8", "surrogatepass")),
    b"b": (bytes, bytes, bytes),
    b"a": (bytearray, bytes, bytearray),
}

#: Type -> letter, and how it is spelled; None: by its items.
EXACT: dict[type, tuple[bytes, Callable[[Any], bytes] | None]] = {
    **{kind: (letter, spelled) for letter, (kind, spelled, _) in SCALARS.items()},
    **{kind: (letter, None) for letter, (kind, _) in CONTAINERS.items() if kind in (list, tuple, set, frozenset, dict)},
}

#: Letter -> value, for the values there is only one of.
CONSTANTS = {b"N": None, b"T": True, b"F": False, b"E": ...}

#: Types that may themselves be passed, by their place here.
TYPES = (int, float, str, bool, list, tuple, dict, set)

#: Letter of a standard library number -> its type, and how it is spelled; built from the spelling by the type itself.
NUMBERS = {b"D": ("decimal", "Decimal"), b"Q": ("fractions", "Fraction")}


def encode(value: Any) -> bytes:
    """Plain data as bytes: a letter, a length and the text, or a letter, a count and the items.

    A subclass of a builtin type goes as the builtin, an iterator as an iterator over the items it still has.

    Raises:
        NotDataError: the value, or something in it, is not plain data; the message names its type.
    """
    out: list[bytes] = []
    _encode(value, out, DEPTH)
    return b"".join(out)


def _encode(value: Any, out: list[bytes], depth: int) -> None:
    if depth == 0:
        raise NotDataError(f"data nested deeper than {DEPTH}")
    if (known := EXACT.get(type(value))) is not None:  # most values are: a short cut, no other way
        letter, spelled = known
        if spelled is None:
            out.append(b"%b%d:" % (letter, len(value)))
            for item in value.items() if letter == b"m" else value:
                _encode(item, out, depth - 1)
        else:
            text = spelled(value)
            out.append(b"%b%d:%b" % (letter, len(text), text))
        return
    for letter, constant in CONSTANTS.items():
        if value is constant:
            out.append(letter)
            return
    for letter, (kind, spelled, _) in SCALARS.items():
        if isinstance(value, kind):
            text = spelled(value)
            out.append(b"%b%d:%b" % (letter, len(text), text))
            return
    if isinstance(value, type) and any(value is kind for kind in TYPES):
        out.append(b"t1:%d" % TYPES.index(value))
        return
    for letter, (module, name) in NUMBERS.items():
        if type(value).__name__ == name and type(value).__module__ == module:
            text = str(value).encode()
            out.append(b"%b%d:%b" % (letter, len(text), text))
            return
    if isinstance(value, Handle):
        text = b"%d" % value.number
        out.append(b"h%d:%b" % (len(text), text))
        return
    items: list[Any]
    if isinstance(value, range):
        letter, items = b"r", [value.start, value.stop, value.step]
    elif hasattr(value, "__next__"):
        letter, items = b"n", list(value)
    else:
        letter = next((letter for letter, (kind, _) in CONTAINERS.items() if isinstance(value, kind)), b"")
        if not letter:
            raise NotDataError(f"a {type(value).__name__}, which is not plain data")
        items = list(dict.items(value)) if isinstance(value, dict) else list(value)
    out.append(b"%b%d:" % (letter, len(items)))
    for item in items:
        _encode(item, out, depth - 1)


def decode(message: bytes) -> Any:
    """The value that `encode` made the bytes of; its types are exactly the builtin ones.

    Raises:
        NotDataError: the bytes are not what `encode` makes.
    """
    try:
        value, end = _decode(message, 0, DEPTH)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise NotDataError(str(error)) from None
    if end != len(message):
        raise NotDataError("bytes after its end")
    return value


def _decode(message: bytes, start: int, depth: int) -> tuple[Any, int]:
    letter = message[start : start + 1]
    if letter in CONSTANTS:
        return CONSTANTS[letter], start + 1
    if depth == 0:
        raise NotDataError(f"nested deeper than {DEPTH}")
    colon = message.index(b":", start, start + 12)
    size, start = int(message[start + 1 : colon]), colon + 1
    if not 0 <= size <= len(message) - start:
        raise NotDataError("cut off")
    if letter in SCALARS or letter in NUMBERS:
        text, end = message[start : start + size], start + size
        return (SCALARS[letter][2](text) if letter in SCALARS else _number(letter, text.decode())), end
    if letter == b"t":
        return TYPES[int(message[start : start + size])], start + size
    if letter == b"h":
        return Handle(int(message[start : start + size])), start + size
    items = []
    for _ in range(size):
        item, start = _decode(message, start, depth - 1)
        items.append(item)
    if letter == b"r":
        return range(*items), start
    if letter == b"n":
        return iter(items), start
    if letter in CONTAINERS:
        return CONTAINERS[letter][1](items), start
    raise NotDataError(f"no kind of value is called {letter!r}")


def _complex(text: str) -> complex:
    real, imaginary = text.split()
    return complex(float.fromhex(real), float.fromhex(imaginary))


def _number(letter: bytes, text: str) -> Any:
    import importlib

    module, name = NUMBERS[letter]
    return getattr(importlib.import_module(module), name)(text)
