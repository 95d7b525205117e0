"""Protocol Buffers' wire format: the fields of a message as they lie in a buffer, and the bytes of a field.

A message is a run of fields, each a key (number · 8 + kind) and a value; MindSpore's files use two kinds, whole numbers
and counted bytes (texts, inner messages). Nothing is copied: counted bytes are given as the place where they lie, and
every length that a file states is checked against the end of what surrounds it.

Source: https://protobuf.dev/programming-guides/encoding
"""

import mmap
from collections.abc import Iterable, Iterator

Buffer = bytes | mmap.mmap

#: Kinds of values.
VARINT, COUNTED = 0, 2

#: Bytes of kinds of fixed width, which are skipped.
_FIXED_WIDTHS = {1: 8, 5: 4}

_LONGEST_VARINT = 10


class BrokenMessage(Exception):
    """The bytes are no message; says where."""


def fields(data: Buffer, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message.

    Yields:
        Number, kind, and for whole numbers the value and 0, for counted bytes their start and stop.

    Raises:
        BrokenMessage: the bytes from `start` to `stop` are not a message.
    """
    place = start
    while place < stop:
        key, place = varint(data, place, stop)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, place = varint(data, place, stop)
            yield number, kind, value, 0
            continue
        size = _FIXED_WIDTHS.get(kind, 0)
        if kind == COUNTED:
            size, place = varint(data, place, stop)
        elif not size:
            raise BrokenMessage(f"unknown kind of field at byte {place:,}")
        if size > stop - place:
            raise BrokenMessage(f"{size:,} bytes are announced at byte {place:,}, {stop - place:,} are there")
        yield number, kind, place, place + size
        place += size


def varint(data: Buffer, place: int, stop: int) -> tuple[int, int]:
    """A whole number, seven bits a byte with the lowest first, and the place after it."""
    value = 0
    for i in range(_LONGEST_VARINT):
        if place + i >= stop:
            raise BrokenMessage(f"it ends within a number at byte {place:,}")
        byte = data[place + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, place + i + 1
    raise BrokenMessage(f"a number at byte {place:,} does not end")


def varints(data: Buffer, kind: int, value: int, stop: int) -> Iterator[int]:
    """The numbers of a repeated field, which may come one by one or packed into counted bytes."""
    if kind == VARINT:
        yield value
        return
    while value < stop:
        number, value = varint(data, value, stop)
        yield number


def signed(value: int) -> int:
    """An unsigned number of 64 bits read as a signed one."""
    return value - (1 << 64) if value >> 63 else value


def text(data: Buffer, start: int, stop: int) -> str:
    """Counted bytes as a text.

    Raises:
        BrokenMessage: they are not UTF-8.
    """
    try:
        return data[start:stop].decode("utf-8")
    except UnicodeDecodeError:
        raise BrokenMessage(f"the text at byte {start:,} is not UTF-8") from None


def encoded_varint(value: int) -> bytes:
    """The bytes of a whole number; negative ones take ten."""
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def number_field(number: int, value: int) -> bytes:
    """The bytes of a field with a whole number."""
    return encoded_varint(number << 3 | VARINT) + encoded_varint(value)


def counted_field(number: int, content: bytes | Iterable[bytes]) -> bytes:
    """The bytes of a field with counted bytes, e.g. an inner message given as its fields."""
    content = content if isinstance(content, bytes) else b"".join(content)
    return counted_key(number, len(content)) + content


def counted_key(number: int, size: int) -> bytes:
    """The key and the size that come before `size` counted bytes."""
    return encoded_varint(number << 3 | COUNTED) + encoded_varint(size)
