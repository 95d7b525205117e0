"""How keys and values lie in memory: as they were computed, or in 8 bits with a scale for each token and head.

    k of one head   0.5  -1.0  0.25     ->   int8: 64  -127  32,  scale 1/127        fp8: 224  -448  112,  scale 1/448

A scale is found as its token comes, so nothing is calibrated, and what is kept of a token depends on that token alone.
int8 (steps of 1/127 of the greatest) is the finer of both where the numbers of a head are alike; fp8 (e4m3: steps of
1/16 to 1/8 of each number) does not lose small numbers beside a great one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from puna.devices import has_triton, multiplies_fp8, takes_cuda_kernels
from puna.errors import UsageError
from puna.model import layer_kernel
from puna.model.cache import token_bytes as plain_token_bytes
from puna.model.config import ModelConfig

#: Name -> dtype of 8 bits.
IN_8_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

#: Dtype of 8 bits -> the greatest number of a head becomes this.
GREATEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}

#: Of scales: on CUDA devices, the smallest number that is fetched on its own has 32 bits.
SCALE_DTYPE = torch.float32


@dataclass(frozen=True, eq=False)
class Storage:
    """Keys or values.

    Attributes:
        numbers: (…, K, H).
        scales: (…, K) fp32, which they are multiplied with; None: they are as they were computed.
    """

    numbers: Tensor
    scales: Tensor | None = None

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> "Storage":
        """Room for `shape` (…, K, H), not yet written."""
        scales = torch.empty(shape[:-1], dtype=SCALE_DTYPE, device=device) if dtype in GREATEST else None
        return cls(torch.empty(shape, dtype=dtype, device=device), scales)

    def __getitem__(self, index: int | slice | Tensor | tuple[Tensor, ...]) -> "Storage":
        """Along dims before K."""
        bits = _as_plain(self.numbers)[index].view(self.numbers.dtype)
        return Storage(bits, None if self.scales is None else self.scales[index])

    def flatten(self) -> "Storage":
        """The first two dims as one; it is the same memory."""
        return Storage(self.numbers.flatten(0, 1), None if self.scales is None else self.scales.flatten(0, 1))

    def write(self, slots: Tensor, x: Tensor) -> None:
        """Keeps (T, K, H) at `slots` (T,) of the first dim."""
        is_bf16 = x.device.type == "cpu" and x.dtype == self.numbers.dtype == torch.bfloat16
        if self.scales is not None:
            if takes_cuda_kernels(x.device.type) and (kernel := _kernel()) is not None:
                return kernel(x, slots, self.numbers, self.scales, GREATEST[self.numbers.dtype])
            x, scales = round_heads(x, self.numbers.dtype)
            self.scales.index_copy_(0, slots, scales)
        elif is_bf16 and (ours := layer_kernel.kernel()) is not None:
            return ours.put_rows(x.contiguous(), slots, self.numbers)
        _as_plain(self.numbers).index_copy_(0, slots, _as_plain(x))

    def read(self, dtype: torch.dtype) -> Tensor:
        """(…, K, H), in `dtype` where they are in 8 bits."""
        if self.scales is None:
            return self.numbers
        return (_in_fp32(self.numbers) * self.scales[..., None]).to(dtype)

    def zero(self) -> None:
        """Makes zeros of all."""
        for x in (_as_plain(self.numbers), self.scales):
            if x is not None:
                x.zero_()

    @property
    def nbytes(self) -> int:
        """Of the numbers and their scales."""
        return self.numbers.nbytes + (0 if self.scales is None else self.scales.nbytes)


def round_heads(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(…, H) in 8 bits, and the scales (…) fp32 to multiply them with.

    What comes back differs by half a scale at most from an int8, and from an fp8 by a sixteenth of the number, or by a
    1024th of the scale where that is more. What is no number has a scale that is none, and comes back as none.
    """
    x, greatest = x.float(), GREATEST[dtype]
    scales = x.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny * greatest) / greatest
    x = (x / scales[..., None]).clamp(-greatest, greatest)
    return (x if dtype.is_floating_point else x.round()).to(dtype), scales


def storage_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """The dtype that keys and values are kept in; None: as they are computed.

    Args:
        name: of IN_8_BITS, or None.
        device: where they are kept.

    Raises:
        UsageError: there is no such dtype, or not on this device.
    """
    if name is None:
        return None
    if name not in IN_8_BITS:
        raise UsageError(
            f"a cache is kept in {' or '.join(IN_8_BITS)}, not in {name!r}; leave it out for the model's own dtype"
        )
    if name == "fp8" and device.type != "cpu" and not multiplies_fp8(device):
        raise UsageError(f"{device} does not know fp8 numbers (on CUDA, compute capability 8.9 does); take int8")
    return IN_8_BITS[name]


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values and their scales, over all layers."""
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    return plain_token_bytes(config, dtype) + (heads * SCALE_DTYPE.itemsize if dtype in GREATEST else 0)


@cache
def _kernel() -> Callable[..., None] | None:
    """What writes in 8 bits on CUDA devices, where Triton is there."""
    if not has_triton():
        return None
    from puna.generate.engine import storage_kernel

    return storage_kernel.write_rounded


def _in_fp32(x: Tensor) -> Tensor:
    """8 bits as fp32; an fp8 on a CPU is looked up, which takes a fifth of the time of torch's own way."""
    if x.dtype == torch.float8_e4m3fn and x.device.type == "cpu":
        return _all_fp8().index_select(0, x.view(torch.uint8).flatten().int()).view(x.shape)
    return x.float()


@cache
def _all_fp8() -> Tensor:
    """What the bytes 0 to 255 stand for."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def _as_plain(x: Tensor) -> Tensor:
    """The same bits as a dtype that torch copies anywhere."""
    return x.view(torch.int8) if x.dtype in GREATEST else x
