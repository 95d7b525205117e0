"""Builds and calls `kernel.c`: products of int4 weights as fast as the memory gives them, on CPUs with AVX-512 VNNI.

The machine's C compiler makes a library of it when it is first asked for, in a second, and it is kept in the user's
cache under a name that holds what it was made of. Without a compiler or such a CPU there is no kernel, and layers
multiply with torch's own products.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from puna.devices import has_int8_units
from puna.files import file_aside

SOURCE = Path(__file__).with_name("kernel.c")
FLAGS = ("-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-fopenmp", "-shared", "-fPIC")

#: Outputs of a tile and inputs of a byte's four neighbours, as the kernel orders codes.
TILE, INPUTS = 16, 8


class Kernel:
    """The functions of the library.

    Weights are three tensors: codes (tiles, in / 8, 16, 4) uint8, scales and zeros (tiles, groups, 16) bf16.
    """

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        self._product, self._dequantize = loaded.product, loaded.dequantize
        pointer, number = ctypes.c_void_p, ctypes.c_long
        self._product.argtypes = [*[pointer] * 6, *[number] * 4, ctypes.c_int]
        self._dequantize.argtypes = [*[pointer] * 4, *[number] * 3, ctypes.c_int]
        self._product.restype = self._dequantize.restype = None

    def product(self, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """(rows, in) bf16, contiguous, to (rows, out) bf16."""
        rows, width = x.shape
        groups, n_out = scales.shape[1], len(codes) * TILE
        out = x.new_empty(rows, n_out)
        scratch = torch.empty(rows * (2 * width + 8 * groups + 4), dtype=torch.uint8)
        places = (each.data_ptr() for each in (codes, scales, zeros, x, out, scratch))
        self._product(*places, rows, width, n_out, width // groups, torch.get_num_threads())
        return out

    def transposed_weight(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The weight that these hold, (in, out) bf16."""
        groups, n_out, width = scales.shape[1], len(codes) * TILE, codes.shape[1] * INPUTS
        out = scales.new_empty(width, n_out)
        places = (each.data_ptr() for each in (codes, scales, zeros, out))
        self._dequantize(*places, width, n_out, width // groups, torch.get_num_threads())
        return out


def in_tiles(codes: Tensor) -> Tensor:
    """(out, in) codes to the kernel's order, (tiles, in / 8, 16, 4)."""
    first, second = codes.unflatten(1, (-1, 2, 4)).unflatten(0, (-1, TILE)).permute(3, 0, 2, 1, 4)
    return (first | second << 4).contiguous()


@functools.cache
def kernel() -> Kernel | None:
    """The kernel; None: this machine has no use for it, or nothing to make it with."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not has_int8_units():
        return None
    name = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    try:
        library = _cache() / f"int4-{name}.so"
        if not library.exists():
            with file_aside(library) as file:
                subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", file.name], check=True, capture_output=True)
        return Kernel(library)
    except (OSError, RuntimeError, subprocess.SubprocessError):  # an old compiler, no home, a full disk: only slower
        return None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "puna"
