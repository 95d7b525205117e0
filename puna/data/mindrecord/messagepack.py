"""As much of MessagePack as single values in MindRecord need: numbers, texts, lists and maps.

Source: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

import contextlib
import struct
from typing import Any

#: First byte -> how the number after it is packed.
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip

#: First byte -> the value itself.
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}

#: First byte -> kind of what follows, and bytes of its length.
_SIZED = {
    0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4), 0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4),
    0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip


def decode(data: bytes, place: int = 0) -> tuple[Any, int]:
    """The value at a place, and the place after it.

    Raises:
        ValueError: the bytes are not a value.
        IndexError: it is cut off.
    """
    first = data[place]
    place += 1
    if first in _CONSTANTS:
        return _CONSTANTS[first], place
    if first < 0x80 or first >= 0xE0:
        return first - 256 * (first >= 0xE0), place
    if first in _NUMBERS:
        form = struct.Struct(_NUMBERS[first])
        return form.unpack(_cut(data, place, form.size))[0], place + form.size
    if first in _SIZED:
        kind, width = _SIZED[first]
        size = int.from_bytes(_cut(data, place, width), "big")
        place += width
    elif first >= 0xA0 and first < 0xC0:
        kind, size = "text", first & 31
    elif first < 0xA0:
        kind, size = ("map" if first < 0x90 else "list"), first & 15
    else:
        raise ValueError(f"unknown first byte {first:#x}")
    if kind in ("text", "bytes"):
        content = _cut(data, place, size)
        return content.decode("utf-8") if kind == "text" else content, place + size
    values = []
    for _ in range(size * (2 if kind == "map" else 1)):
        value, place = decode(data, place)
        values.append(value)
    if kind == "list":
        return values, place
    if not all(isinstance(key, str) for key in values[::2]):
        raise ValueError("a key is no text")
    return dict(zip(values[::2], values[1::2], strict=True)), place


def encode_map(values: dict[str, Any]) -> bytes:
    """A map of texts to numbers and texts, by name, as MindSpore writes it: numbers as short as they can be.

    Raises:
        ValueError: it has more than 15 entries, or a value of another kind.
    """
    if len(values) > 15:
        raise ValueError(f"{len(values)} single values; 15 at most")
    return bytes([0x80 | len(values)]) + b"".join(_text(name) + _encoded(values[name]) for name in sorted(values))


def _encoded(value: Any) -> bytes:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        with contextlib.suppress(OverflowError):  # too large for a single
            single = struct.pack(">f", value)
            if struct.unpack(">f", single)[0] == value:
                return b"\xca" + single
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is neither a number nor a text")
    if -32 <= value < 128:
        return struct.pack(">b", value)
    kinds = (0xCC, 0xCD, 0xCE, 0xCF) if value >= 0 else (0xD0, 0xD1, 0xD2, 0xD3)
    for kind in kinds:
        try:
            return bytes([kind]) + struct.pack(_NUMBERS[kind], value)
        except struct.error:
            continue
    raise ValueError(f"{value} has more than 64 bits")


def _text(text: str) -> bytes:
    content = text.encode()
    if len(content) < 32:
        return bytes([0xA0 | len(content)]) + content
    for kind, width in ((0xD9, 1), (0xDA, 2), (0xDB, 4)):
        if len(content) < 1 << 8 * width:
            return bytes([kind]) + len(content).to_bytes(width, "big") + content
    raise ValueError(f"a text of {len(content):,} bytes")


def _cut(data: bytes, start: int, size: int) -> bytes:
    if start + size > len(data):
        raise IndexError(f"{size:,} bytes are announced, {len(data) - start:,} are there")
    return data[start : start + size]
