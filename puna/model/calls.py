"""Calls of C functions by all threads together, one by one, or recorded and repeated as one.

At batch 1 a decoding step of 1 B weights in int4 reads them in 9 ms, and a host takes 2 ms more to make its 350 calls
one by one. So a step is recorded once for each number of rows: what it computes stays where it lies, and its calls,
which hold addresses, are all made again by one call (`calls.c`).
"""

import ctypes
import functools
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from puna.native import build

SOURCE = Path(__file__).with_name("calls.c")

#: The address of a function and its arguments, as `calls.c` has them.
_Call = ctypes.c_long * 13


class Library:
    """A C library's functions by name. They take integers, addresses among them, and share loops out among threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __getitem__(self, name: str) -> Callable[..., None]:
        address = ctypes.cast(self._library[name], ctypes.c_void_p).value or 0

        def call(*arguments: int) -> None:
            one = _Call(address, *arguments)
            if (calls := _CALLS.get()) is not None:
                calls.append(one)
            else:
                _run(one, 1)

        return call


def library(source: Path, flags: tuple[str, ...]) -> Library | None:
    """The library of a C file, as `puna.native.build` makes it."""
    found = build(source, flags)
    return None if found is None or _runner() is None else Library(found)


class NotRepeatable(Exception):
    """A function does more than make our calls."""


class Recording(TorchDispatchMode):
    """The calls that a function would make, to be made with what its tensors hold by then.

    Args:
        function: called once. Torch gives it room and views, and nothing is computed.

    Attributes:
        output: of the function, once there was a `replay`; overwritten by the next.

    Raises:
        NotRepeatable: it lets torch compute.
    """

    def __init__(self, function: Callable[[], Tensor]) -> None:
        super().__init__()
        #: Memory that its tensors lie in, each with a reference to the newest of them that ends with it and its views.
        self._rooms: list[tuple[NDArray[np.uint8], weakref.ref[NDArray[np.uint8]]]] = []
        calls: list[Any] = []
        before = _CALLS.set(calls)
        try:
            with self:
                self.output = function()
        finally:
            _CALLS.reset(before)
        self._calls = (_Call * len(calls))(*calls)

    def replay(self) -> None:
        """Makes them all."""
        _run(self._calls, len(self._calls))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # in inference mode operations come here that consist of others
            out = func.decompose(*args, **(kwargs or {}))
        if out is NotImplemented:
            if not func.is_view and func not in _MAKE_ROOM:
                raise NotRepeatable(str(func))
            out = func(*args, **(kwargs or {}))
            if not func.is_view:
                out = self._room_of(out.nbytes).view(out.dtype).as_strided(out.shape, out.stride())
        return out

    def _room_of(self, nbytes: int) -> Tensor:
        """Memory of so many bytes: that of a tensor that is gone, which no later call can be told of, or new."""
        place = next((i for i, (room, last) in enumerate(self._rooms) if len(room) == nbytes and last() is None), None)
        room = torch.empty(nbytes, dtype=torch.uint8).numpy() if place is None else self._rooms.pop(place)[0]
        lent = room[:]
        self._rooms.append((room, weakref.ref(lent)))
        return torch.from_numpy(lent)


#: Where the calls of this thread are taken down; None: nowhere.
_CALLS: ContextVar[list[Any] | None] = ContextVar("calls", default=None)

_MAKE_ROOM = {torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default}


def _run(calls: Any, count: int) -> None:
    run = _runner()
    assert run is not None
    run(calls, count, torch.get_num_threads())


@functools.cache
def _runner() -> Callable[[Any, int, int], None] | None:
    found = build(SOURCE, ())
    if found is not None:
        found.run.argtypes, found.run.restype = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int], None
    return None if found is None else found.run
