"""Exchanges between ranks on one host through memory that all of them see, in place of gloo's sockets.

Each rank has a window of two halves, and all map all windows. An exchange goes piece by piece, the halves in turn:

    rank 0   write a piece into half 0 of my window ─▶ barrier ─▶ read half 0 of all windows ─▶ write into half 1 …
    rank 1   write a piece into half 0 of my window ─▶ barrier ─▶ read half 0 of all windows ─▶ write into half 1 …

Whoever stands at a barrier has read what lay behind the barrier before, so one barrier a piece will do. It is gloo's: a
rank that is lost or never comes is gloo's error here too. Windows are memory without a name, which ends with the last
process that maps it, however that ends.

The plain reference is `torch.distributed`'s own reduce-scatter and all-gather; sums are in the order of ranks.
"""

import contextlib
import mmap
import os
import uuid
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from puna.parallel.collectives import all_min

#: Size of one half: far more than the half megabyte that could be copied in the time of a barrier.
HALF_BYTES = 16 << 20

#: Numbers summed at a time.
IN_CACHE = 1 << 17


class SharedMemory:
    """The windows of a group's ranks, as one of them sees them.

    Args:
        group: of the ranks, each of which makes one at the same time.
        windows: of each rank, in their order: two halves of HALF_BYTES.
    """

    def __init__(self, group: dist.ProcessGroup, windows: list[Tensor]) -> None:
        self.group, self._windows, self._half = group, windows, 0

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "SharedMemory | None":
        """Opens the windows of a group's ranks; None on all of them: they are on several hosts, or not on Linux."""
        windows = _open_windows(group)
        if all_min(int(windows is not None), group):
            assert windows is not None
            return cls(group, windows)
        return None

    def reduce_scatter(self, output: Tensor, whole: Tensor) -> None:
        """Sums what the ranks have, and leaves each with its part of the sum.

        Args:
            output: (n,), becomes the part of this rank; sums are formed in its dtype.
            whole: (ranks * n,), as long on every rank, in the dtype in which it is read by others.
        """
        parts, rank = whole.view(self.group.size(), -1), self.group.rank()
        size = HALF_BYTES // (len(parts) * whole.element_size())
        for start in range(0, len(output), size):
            pieces = parts[:, start : start + size]
            halves = self._next_halves(pieces)
            for reader, piece in enumerate(pieces):
                if reader != rank:
                    halves[rank][reader].copy_(piece)
            dist.barrier(self.group)
            shown = [pieces[rank] if writer == rank else half[rank] for writer, half in enumerate(halves)]
            _sum(output[start : start + size], shown)

    def all_gather(self, output: Tensor, part: Tensor) -> None:
        """Leaves every rank with the parts of all.

        Args:
            output: (ranks * n,), becomes the parts in the order of ranks.
            part: (n,), of this rank; it may lie in its place in `output`.
        """
        parts, rank = output.view(self.group.size(), -1), self.group.rank()
        if parts[rank].data_ptr() != part.data_ptr():
            parts[rank].copy_(part)
        size = HALF_BYTES // part.element_size()
        for start in range(0, len(part), size):
            piece = part[start : start + size]
            halves = self._next_halves(piece)
            halves[rank].copy_(piece)
            dist.barrier(self.group)
            for writer, half in enumerate(halves):
                if writer != rank:
                    parts[writer, start : start + size].copy_(half)

    def _next_halves(self, like: Tensor) -> list[Tensor]:
        """What is next in each rank's window, in shape and dtype as given; it holds until the next but one."""
        start, self._half = self._half * HALF_BYTES, 1 - self._half
        return [window[start : start + like.nbytes].view(like.dtype).view(like.shape) for window in self._windows]


def _sum(output: Tensor, summands: list[Tensor]) -> None:
    """Sums (n,) tensors in the dtype of the output, as much at a time as stays in a processor's cache."""
    for start in range(0, len(output), IN_CACHE):
        total, (first, *others) = output[start : start + IN_CACHE], [x[start : start + IN_CACHE] for x in summands]
        total.copy_(first)
        for other in others:
            total.add_(other)


def share_through_memory(module: FSDPModule, memory: SharedMemory, dtype: torch.dtype | None) -> None:
    """Makes a module that `fully_shard` has sharded over the group of `memory` use it.

    Args:
        module: the gradients of one backward pass are reduced at its end.
        memory: of its ranks.
        dtype: of those gradients, which are read as they are and summed in FSDP's `reduce_dtype`: the same sums from
            fewer bytes. None: they come in that dtype, e.g. because backward passes are summed before.
    """
    module.set_custom_all_gather(_AllGather(memory))  # type: ignore[arg-type]
    module.set_custom_reduce_scatter(_ReduceScatter(memory, dtype))  # type: ignore[arg-type]


class _AllGather:
    """What FSDP asks for memory, and calls."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        self._memory.all_gather(output_tensor, input_tensor)


class _ReduceScatter:
    """What FSDP asks for memory twice, first for the gradients and then for a part of their sum, and calls."""

    def __init__(self, memory: SharedMemory, dtype: torch.dtype | None) -> None:
        self._memory, self._dtype, self._is_next_whole = memory, dtype, True

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        is_whole, self._is_next_whole = self._is_next_whole, not self._is_next_whole
        return torch.empty(*size, dtype=self._dtype or dtype if is_whole else dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        assert op == dist.ReduceOp.SUM
        self._memory.reduce_scatter(output_tensor, input_tensor)


def _open_windows(group: dist.ProcessGroup) -> list[Tensor] | None:
    """Makes this rank's window and maps those of all; None: some cannot be opened here."""
    descriptor, mark = _new_window(), uuid.uuid4().bytes
    host = None
    if descriptor is not None:
        os.pwrite(descriptor, mark, 0)
        with contextlib.suppress(OSError):  # there is no /proc, and then no window is opened
            host = os.readlink("/proc/self/ns/net")  # what has a network of its own is a host of its own
    told: list[tuple[int, int | None, bytes, str | None]] = [(0, None, b"", None)] * group.size()
    dist.all_gather_object(told, (os.getpid(), descriptor, mark, host), group)
    windows = [
        _open_window(process, number, mark) if number is not None and its_host == host else None
        for process, number, mark, its_host in told
    ]
    dist.barrier(group)  # all have opened what is closed now
    if descriptor is not None:
        os.close(descriptor)
    opened = [window for window in windows if window is not None]
    return opened if len(opened) == len(windows) else None


def _new_window() -> int | None:
    """Memory without a name, as a descriptor; None: there is no such thing here."""
    try:
        descriptor = os.memfd_create("puna")
    except (AttributeError, OSError):  # not on Linux, or forbidden
        return None
    os.truncate(descriptor, 2 * HALF_BYTES)
    return descriptor


def _open_window(process: int, descriptor: int, mark: bytes) -> Tensor | None:
    """Maps a window; None: what there is under its number is not the one that is marked so."""
    try:
        file = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
    except OSError:
        return None
    try:
        if os.pread(file, len(mark), 0) == mark:
            return torch.frombuffer(mmap.mmap(file, 2 * HALF_BYTES), dtype=torch.uint8)
    except OSError:
        pass
    finally:
        os.close(file)
    return None
