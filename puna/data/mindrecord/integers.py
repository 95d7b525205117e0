"""MindRecord's compressed integers: each in as few bytes as hold it.

    00 00 00 05 | 04 00 | 01 ff 2c 01 07 00      5 values: 1, -1, 300, 7, 0
      count, big    codes   values, little-endian two's complement: of 1, 2, 4 or 8 bytes for a code of 0, 1, 2 or 3;
      endian                codes are of two bits, the first value's in the highest

`decode_integers` reads a field at once, not value by value; `decode_all` reads many, in C where there is a compiler.
"""

import ctypes
import functools
import mmap
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.native import build

Buffer = bytes | mmap.mmap

_COUNT_BYTES = 4

#: Byte of codes -> the widths of its four values, as the bytes of one number.
_WIDTHS = (1 << ((np.arange(256)[:, None] >> np.array([6, 4, 2, 0])) & 3)).astype(np.uint8).view(np.uint32).reshape(-1)

#: Width -> how far right a value goes that stands at the upper end of eight bytes.
_SHIFTS = 64 - 8 * np.arange(9)

#: Values up to which 1, 2 and 4 bytes hold a number.
_LIMITS = np.array([1 << 7, 1 << 15, 1 << 31])


def decode_integers(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The values in a field.

    Args:
        data: (bytes,) the whole field.

    Raises:
        ValueError: the bytes are no such field.
    """
    count = int.from_bytes(data[:_COUNT_BYTES].tobytes(), "big")
    start = _COUNT_BYTES + -(-count // 4)
    if len(data) < max(start, _COUNT_BYTES):
        raise ValueError(f"{count:,} integers are announced in {len(data):,} bytes")
    widths = _WIDTHS[data[_COUNT_BYTES:start]].view(np.uint8)[:count]
    stops = np.cumsum(widths, dtype=np.int64)
    size = int(stops[-1]) if count else 0
    if size != len(data) - start:
        raise ValueError(f"{count:,} integers take {size:,} bytes, {len(data) - start:,} are there")
    # The eight bytes that end where a value ends, as a number; they overlap, and need not be aligned.
    padded = np.concatenate([np.zeros(8, np.uint8), data[start:]])
    words = np.ndarray((size + 1,), "<i8", padded, strides=(1,)).take(stops)
    return words >> _SHIFTS.take(widths)


def decode_all(data: Buffer, places: Sequence[tuple[int, int]], dtype: np.dtype[Any]) -> list[NDArray[Any]]:
    """`decode_integers` of many fields.

    Args:
        data: what the fields are in; nothing else of it is read.
        places: start and stop of each.
        dtype: of the arrays, of four or eight bytes.

    Raises:
        ValueError: the bytes of one are no such field.
    """
    content = np.frombuffer(data, np.uint8)
    bounds = np.array(places, np.int64).reshape(-1, 2)
    if (library := _library()) is None or np.any(bounds < 0) or np.any(bounds > len(content)):
        return [decode_integers(content[start:stop]).astype(dtype) for start, stop in places]
    counts = np.empty(len(bounds), np.int64)
    known = content.ctypes.data, bounds.ctypes.data, len(bounds), counts.ctypes.data
    if (found := library.count_values(*known)) == len(bounds):
        values = np.empty(counts.sum(), dtype)
        found = library.decode(*known, values.ctypes.data, dtype.itemsize)
    if found < len(bounds):
        decode_integers(content[slice(*bounds[found])])  # says what is wrong
        raise AssertionError("the two ways to read a field differ")
    return [values[start:stop] for start, stop in pairwise([0, *np.cumsum(counts).tolist()])]


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = build(Path(__file__).with_suffix(".c"), ()) if sys.byteorder == "little" else None
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_long
        library.count_values.argtypes = [pointer, pointer, number, pointer]
        library.decode.argtypes = [pointer, pointer, number, pointer, pointer, number]
        library.count_values.restype = library.decode.restype = number
    return library


def encode_integers(values: NDArray[np.integer]) -> bytes:
    """The field that holds these (n,) values, compressed."""
    values = np.ascontiguousarray(values, "<i8")
    size = np.where(values < 0, ~values, values)
    codes = np.searchsorted(_LIMITS, size, side="right")
    padded = np.zeros(-(-len(values) // 4) * 4, np.uint8)
    padded[: len(values)] = codes
    packed = (padded.reshape(-1, 4) << np.array([6, 4, 2, 0], np.uint8)).sum(1, dtype=np.uint8)
    kept = np.arange(8) < (1 << codes)[:, None]
    content = values.view(np.uint8).reshape(-1, 8)[kept]
    return len(values).to_bytes(_COUNT_BYTES, "big") + packed.tobytes() + content.tobytes()
