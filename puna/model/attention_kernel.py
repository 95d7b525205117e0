"""Builds and calls `attention_kernel.c`: causal attention in bf16, forward and backward, on CPUs with AVX-512 BF16.

Between the products of `puna.model.attention_in_blocks`, which is the reference, torch copies, widens and rounds for as
long as it multiplies; here nothing leaves the cache, and scores stay in fp32 until they are weights.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from puna.devices import cpu_bf16_units
from puna.native import build

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16")

#: The width of a head is a multiple of this.
WIDTH = 64


class AttentionKernel:
    """The functions of the library.

    All tensors are bf16 on a CPU, with numbers of one token side by side; `places` are the fields of the spans, one
    after the other.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._forward, self._backward = library.forward, library.backward
        pointer, number, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        self._forward.argtypes = [*[pointer] * 6, *[number] * 8, integer]
        self._backward.argtypes = [*[pointer] * 10, *[number] * 8, integer]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, places: list[int]) -> tuple[Tensor, Tensor]:
        """What is attended to, (Tq, N, H), and the (N, Tq) fp32 logarithms of softmax's norms that `backward` wants."""
        out, log_norms = q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        _call(self._forward, (q, k, v, out, log_norms), places)
        return out, log_norms

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_norms: Tensor, grad: Tensor, places: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v from that of `out`; all are dense."""
        grads = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        _call(self._backward, (q, k, v, out, log_norms, grad.contiguous(), *grads), places)
        return grads


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes these queries, keys and values: (tokens, heads, H) each."""
    are_rows = all(x.stride(2) == 1 and x.stride(1) == x.shape[2] for x in (q, k, v))
    return are_rows and is_there(q.device, q.dtype, q.shape[2])


def is_there(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether there is a kernel for heads of a width."""
    return device.type == "cpu" and dtype == torch.bfloat16 and width % WIDTH == 0 and kernel() is not None


@functools.cache
def kernel() -> AttentionKernel | None:
    """The kernel; None: this machine has no use for it, or nothing to make it with."""
    library = build(SOURCE, FLAGS) if "avx512_bf16" in cpu_bf16_units() else None
    return None if library is None else AttentionKernel(library)


def _call(function: object, tensors: tuple[Tensor, ...], places: list[int]) -> None:
    q, k, v = tensors[:3]
    spans = (ctypes.c_long * len(places))(*places)
    sizes = len(places) // 4, *q.shape[:2], *k.shape[1:], q.stride(0), k.stride(0), v.stride(0)
    if function(*(x.data_ptr() for x in tensors), spans, *sizes, torch.get_num_threads()):  # type: ignore[operator]
        raise MemoryError("attention found no memory for the keys of a document; shorten sequence_length")
