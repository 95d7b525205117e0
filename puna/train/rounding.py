"""Stochastic rounding: up or down by chance, so that the mean is right; the same chance on one device as on many.

    seeds_of("0:17:lm_head.weight:weight")  +  Place of this rank's part  ->  Chance  ->  16 random bits for each number

The chance of a number is a function of a text (seed, update, name) and of its place in the whole weight, so it depends
neither on how the weight is sharded nor on the pieces in which it is worked on.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def round_stochastically(x: Tensor, chance: Tensor) -> Tensor:
    """Rounds fp32 to bf16, up or down with the probability that makes the mean right.

    bf16 is the upper half of fp32: adding 16 random bits and dropping the lower half does it, and leaves infinities
    what they are, whose lower half is 0. What is not a number stays so.

    Args:
        x: fp32.
        chance: int32 of the same shape, evenly from 0 to 2^16 - 1.
    """
    rounded = (x.contiguous().view(torch.int32) + chance).bitwise_and_(-65536).view(torch.float32)
    return torch.where(x == x, rounded, x).to(torch.bfloat16)  # the bits of some NaNs would become those of a number


def seeds_of(key: str) -> tuple[int, int]:
    """Two numbers of 32 bits that are a function of a text."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


@dataclass(frozen=True)
class Place:
    """Where the part of a weight that lies here begins in the whole, and how many columns the whole has."""

    row: int
    column: int
    columns: int

    @classmethod
    def of(cls, parameter: Tensor) -> "Place":
        """The place of a tensor's part on this rank; a tensor of one dimension is one column."""
        offset: tuple[int, ...] = (0, 0)
        if isinstance(parameter, DTensor):
            _, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
        return cls(offset[0], offset[1] if len(offset) > 1 else 0, math.prod(parameter.shape[1:]))

    def below(self, rows: int) -> "Place":
        """The place so many rows further down."""
        return Place(self.row + rows, self.column, self.columns)


@dataclass(frozen=True)
class Chance:
    """Random bits for the elements of a part of a weight: a function of two seeds and of the place in the whole.

    Attributes:
        start: the number of the part's first element (row times columns plus column) plus a seed, as int32.
        mix: the other seed, as int32.
        columns: of the whole.
    """

    start: int
    mix: int
    columns: int

    @classmethod
    def of(cls, seeds: tuple[int, int], place: Place) -> "Chance":
        """For the part that begins at `place`, with seeds from `seeds_of`."""
        start = place.row * place.columns + place.column + seeds[0]
        return cls(_int32(start), _int32(seeds[1]), place.columns)

    def bits(self, like: Tensor) -> Tensor:
        """16 random bits for each element.

        The number of an element goes through the two multiplications of a 32-bit hash, with a seed before each; the
        upper half comes out well mixed. Places 2^32 apart have the same bits.

        Args:
            like: (rows, columns of the part) on the device that makes them.

        Returns:
            int32 of the same shape, evenly from 0 to 2^16 - 1.

        Source: lowbias32, Chris Wellons, "Prospecting for Hash Functions" (2018); shifts here keep the sign, which
        folds the 32 bits to 30.
        """
        rows, columns = (torch.arange(size, device=like.device, dtype=torch.int32) for size in like.shape)
        x = (rows * self.columns + self.start)[:, None] + columns  # modulo 2^32
        x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_xor_(self.mix)
        x.bitwise_xor_(x >> 15).mul_(0x846CA68B - (1 << 32))
        return x.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def _int32(x: int) -> int:
    """Modulo 2^32."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)
