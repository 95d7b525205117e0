"""Optimizer state in 8 or 4 bits: numbers as codes of a few levels, times a scale for every block of a row.

    exp_avg      0.02  -0.08  0.001 …   scale -0.08   levels -0.25  1  -0.0125 …   codes 90 255 119 …

The scale is the number of largest magnitude, with its sign, so that it is always level 1 and comes back exact; it stays
in fp32, because a rounded scale would grow or stall an average that moves by a thousandth a step.

Levels:
    exp_avg, 8 and 4 bits: the dynamic map of 8-bit optimizers (arXiv:2110.02861, section 1.3): each decade below 1 has
        half the levels of the one above.
    exp_avg_sq, 8 bits: the same without a sign; 4 bits: (1/16)^2, (2/16)^2 … 1, even steps of the square root, which is
        what divides. Neither has a level 0, which would throw weights far away (arXiv:2309.01507, section 4.1): the
        dynamic map's 0 becomes the lower edge of its lowest decade.

Rounding is to the nearest level, but by chance for exp_avg in 4 bits: levels there are so far apart that the tenth of a
gradient that a step adds would mostly be rounded away.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Blocks:
    """Reads and writes the state of one kind: codes (rows, columns), or two to a byte, and scales (rows, blocks).

    Args:
        levels: ascending, 256 or 16 of them; the last is 1.
        block: length of a block.
        device: of the state.
        by_chance: numbers go to the level below or above with the probability that makes the mean right, rather than
            to the nearest.
    """

    def __init__(self, levels: Tensor, block: int, device: torch.device, *, by_chance: bool = False) -> None:
        self.bits = {256: 8, 16: 4}[len(levels)]
        self.block = block
        self.by_chance = by_chance
        borders = levels[1:] if by_chance else (levels[:-1] + levels[1:]) / 2
        #: For every upper half of a fp32 number: how many borders lie below all numbers that begin with it.
        self.first = torch.bucketize(lowest_by_upper_half(), borders, right=True).to(torch.uint8).to(device)
        #: The border above each level; none above the last.
        self.borders = F.pad(borders, (0, 1), value=torch.inf).to(device)
        self.levels = levels.to(device)
        self.gaps = F.pad(levels.diff(), (0, 1), value=torch.inf).to(device)
        bytes_ = torch.arange(256)
        by_byte = levels[:, None] if self.bits == 8 else torch.stack([levels[bytes_ >> 4], levels[bytes_ & 15]], 1)
        #: The one or two levels that a byte stands for.
        self._by_byte = by_byte.contiguous().to(device)

    def read(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The numbers, (rows, columns) in fp32."""
        levels = self._by_byte.index_select(0, codes.flatten().int()).view(len(codes), -1)
        return (self._blocks(levels) * scales[:, :, None]).flatten(1)[:, : levels.shape[1]]

    def write(self, exact: Tensor, codes: Tensor, scales: Tensor, chance: Callable[[], Tensor]) -> None:
        """Keeps (rows, columns) of fp32 numbers as codes and scales.

        Args:
            exact: the numbers.
            codes: written.
            scales: written.
            chance: gives int32 of the numbers' shape, evenly from 0 to 2^16 - 1; asked only if rounding is by chance.
        """
        blocks = self._blocks(exact)
        top, bottom = blocks.amax(-1), blocks.amin(-1)
        scales.copy_(torch.where(top >= -bottom, top, bottom))
        shares = blocks / torch.where(scales == 0, 1.0, scales)[:, :, None]
        shares = shares.flatten(1)[:, : exact.shape[1]].contiguous()
        found = self._borders_below(shares)
        if self.by_chance:
            found += shares >= self._at(self.levels, found) + self._at(self.gaps, found) * ((chance() + 0.5) / 65536)
        codes.copy_(found if self.bits == 8 else found[:, ::2] * 16 + found[:, 1::2])

    def _borders_below(self, shares: Tensor) -> Tensor:
        """How many borders are not above each number from -1 to 1: by its upper half, then one border more or not.

        Several times as fast as a binary search on a CPU. No two borders share an upper half.
        """
        upper_half = (shares.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
        found = self._at(self.first, upper_half)
        return found + (shares >= self._at(self.borders, found))

    @staticmethod
    def _at(table: Tensor, index: Tensor) -> Tensor:
        return table.index_select(0, index.flatten().int()).view(index.shape)

    def _blocks(self, x: Tensor) -> Tensor:
        """(rows, columns) as (rows, blocks, block); a shorter last block is filled up with zeros."""
        lacking = -x.shape[1] % self.block
        return (F.pad(x, (0, lacking)) if lacking else x).unflatten(1, (-1, self.block))


def signed_levels(bits: int) -> Tensor:
    """The 2^bits levels of `exp_avg`, ascending from near -1 to 1."""
    decades = _decades(bits - 1, finest=1)
    return torch.cat([-decades, torch.tensor([0.0, 1.0]), decades]).sort().values


def unsigned_levels(bits: int) -> Tensor:
    """The 2^bits levels of `exp_avg_sq`, ascending to 1; none is 0."""
    if bits == 4:
        return (torch.arange(1, 17) / 16) ** 2
    return torch.cat([torch.tensor([10.0 ** (1 - bits), 1.0]), _decades(bits - 1, finest=2)]).sort().values


def lowest_by_upper_half() -> Tensor:
    """For each of the 2^16 upper halves of a fp32 number, the lowest number that begins with it."""
    upper = torch.arange(1 << 16, dtype=torch.int64)
    bits = (upper << 16) | torch.where(upper >= 1 << 15, 0xFFFF, 0)
    return bits.to(torch.int32).view(torch.float32)


def _decades(n: int, *, finest: int) -> Tensor:
    """Levels of `n` decades up to 1: the middles of `finest` equal parts of the lowest, twice as many in the next, …"""
    edges = [torch.linspace(0.1, 1, finest * 2**i + 1) * 10.0 ** (i + 1 - n) for i in range(n)]
    return torch.cat([(edge[:-1] + edge[1:]) / 2 for edge in edges])
