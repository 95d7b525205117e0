"""The loader: which rows a training step reads, as a function of the step.

    step ─▶ places in the stream ─▶ source of each ─▶ place in its epoch ─▶ shuffled row ─▶ batch

Nothing is kept between two steps, so a run resumes at any step, and every rank of any number of ranks knows the same
global batch and takes its slice. Two sources with weights 3 and 1, of 5 and 4 rows, 4 rows a step, seed 0:

    place in the stream    0   1   2   3  |  4   5   6   7  | …
    source                 0   0   0   1  |  0   0   0   1  | …    3 : 1, and never a whole row away from it
    epoch.place in it     0.0 0.1 0.2 0.0 | 0.3 0.4 1.0 0.1 | …    source 0 begins its second epoch, in another order
    row                    0   4   3   0  |  2   1   1   1  | …    the order is drawn from (seed, source, epoch)
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from puna.data.rows import Row
from puna.errors import PunaError, UsageError

#: The most rows after which a mixture's pattern repeats; weights are rounded to this share of the whole, if need be.
LONGEST_PERIOD = 1 << 16


@dataclass(frozen=True)
class Batch:
    """Rows above each other; every field is (B, T) int32, with the meaning that it has in `Row`."""

    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]
    documents: NDArray[np.int32]
    positions: NDArray[np.int32]

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(self.tokens[rows], self.targets[rows], self.documents[rows], self.positions[rows])


def stack(rows: Iterable[Row]) -> Batch:
    """The batch of these rows, in this order."""
    fields = zip(*((row.tokens, row.targets, row.documents, row.positions) for row in rows), strict=True)
    return Batch(*(np.stack(field) for field in fields))


class Loader:
    """Endless shuffled batches of one or several sources of rows.

    Each epoch of a source holds every row of it once, in an order of its own. Batches run on across the ends of epochs,
    so that no row is left out and none is padded. A mixture draws from its sources in proportion to their weights, in
    rows: at any place of the stream each source has given its exact share, to less than one row.

    Args:
        sources: rows and their weight; weights are relative, 3 and 1 or 0.75 and 0.25.
        batch_rows: B, rows of the global batch.
        seed: from 0; decides every order.

    Raises:
        UsageError: no source, a weight that is not positive or below 1 : 65,536, no rows in a batch, a negative seed.
        PunaError: a source without rows, or sources with rows of different lengths.
    """

    def __init__(self, sources: Sequence[tuple[Sequence[Row], float]], *, batch_rows: int, seed: int) -> None:
        if batch_rows < 1:
            raise UsageError(f"batch_rows is {batch_rows}; a batch needs one row at least")
        if seed < 0:
            raise UsageError(f"seed is {seed}; choose 0 or a larger whole number")
        self.sources = [rows for rows, _ in sources]
        self.batch_rows, self.seed = batch_rows, seed
        self._mixture = Mixture([weight for _, weight in sources])
        _check_rows(self.sources)

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """One rank's part of a step's global batch: rows rank · B ÷ world_size onwards.

        Args:
            step: optimizer steps already taken, from 0.
            rank: which part, from 0.
            world_size: how many parts; divides `batch_rows`.

        Returns:
            A batch of B ÷ world_size rows. The parts of all ranks, one after the other, are the global batch, whatever
            the number of ranks.

        Raises:
            UsageError: `batch_rows` cannot be shared evenly.
        """
        if self.batch_rows % world_size:
            raise UsageError(_uneven(self.batch_rows, world_size))
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} ranks")
        per_rank = self.batch_rows // world_size
        numbers = self.row_numbers(step)[rank * per_rank : (rank + 1) * per_rank]
        return stack(self.sources[source][row] for source, row in numbers)

    def row_numbers(self, step: int) -> list[tuple[int, int]]:
        """(source, row) of every row of a step's global batch, in order; for finding the data behind a bad step."""
        if step < 0:
            raise ValueError(f"step {step} is below 0")
        places = np.arange(step * self.batch_rows, (step + 1) * self.batch_rows, dtype=np.int64)
        sources, drawn = self._mixture.at(places)
        rows = np.empty_like(drawn)
        for source in np.unique(sources).tolist():
            length = len(self.sources[source])
            epochs, within = np.divmod(drawn, length)
            for epoch in np.unique(epochs[sources == source]).tolist():
                here = (sources == source) & (epochs == epoch)
                rows[here] = shuffled(within[here], length, (self.seed, source, epoch))
        return list(zip(sources.tolist(), rows.tolist(), strict=True))


def shuffled(places: NDArray[np.int64], length: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """The entries at `places` of an order of 0 … length - 1 drawn from `key`; no more of the order is computed.

    A Feistel network over pairs (left, right) with left · right just above `length`: each half is moved round its own
    circle by a random function of the other, which can be undone whatever the function, so pairs are permuted. What
    falls beyond `length` is sent through again until it lies within.

    Args:
        places: (n,) from 0 to `length` - 1.
        length: of the order.
        key: whole numbers from 0.

    Returns:
        (n,) numbers from 0 to `length` - 1; all places together give each once.

    Source: Black and Rogaway, Ciphers with arbitrary finite domains (CT-RSA 2002), sections 4 and 5.
    """
    n_left = math.isqrt(length - 1) + 1
    n_right = -(-length // n_left)
    round_keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
    numbers = places.astype(np.uint64)
    beyond = np.ones(numbers.shape, dtype=np.bool_)
    while beyond.any():
        numbers[beyond] = _feistel(numbers[beyond], np.uint64(n_left), np.uint64(n_right), round_keys)
        beyond = numbers >= length
    return numbers.astype(np.int64)


#: Half as many leave orders of five or six rows visibly uneven; from twelve on they pass a chi-squared test.
_ROUNDS = 16


def _feistel(
    numbers: NDArray[np.uint64], n_left: np.uint64, n_right: np.uint64, round_keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    left, right = np.divmod(numbers, n_right)
    for left_key, right_key in round_keys.reshape(-1, 2):
        left = (left + _mixed(right ^ left_key) % n_left) % n_left
        right = (right + _mixed(left ^ right_key) % n_right) % n_right
    return left * n_right + right


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result depends on every bit: SplitMix64's finalizer."""
    for shift, factor in _MIXING:
        bits = (bits ^ (bits >> shift)) * factor
    return bits ^ (bits >> _LAST_SHIFT)


_MIXING = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)


class Mixture:
    """Whose turn it is at each place of a stream that several sources share by weight.

    The weights become whole shares of a period, and the turns of one period are laid down once; every period repeats
    them. Weights as people write them (0.9 and 0.1, thirds) are kept exactly, others to one row in LONGEST_PERIOD.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._shares = _whole_shares(weights)
        self._period = sum(self._shares)
        turns = _turns(self._shares)
        before = np.empty(self._period, dtype=np.int64)
        for source, share in enumerate(self._shares):
            before[turns == source] = np.arange(share)
        self._turns, self._before = turns, before

    def at(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each place, and how many rows that source has given before it."""
        periods, within = np.divmod(places, self._period)
        sources = self._turns[within]
        return sources, periods * np.array(self._shares, dtype=np.int64)[sources] + self._before[within]


def _whole_shares(weights: Sequence[float]) -> list[int]:
    if not weights:
        raise UsageError("there is no data to load; name one data set at least")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise UsageError(f"a data set has weight {weight}; weights are above 0 (leave out what is not to be read)")
    exact = [Fraction(str(float(weight))) for weight in weights]  # 0.1 as a tenth, not as the float beside it
    fractions = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(fraction.denominator for fraction in fractions))
    if period <= LONGEST_PERIOD:
        return [int(fraction * period) for fraction in fractions]
    shares = [int(fraction * LONGEST_PERIOD) for fraction in fractions]
    by_remainder = sorted(range(len(shares)), key=lambda k: shares[k] - fractions[k] * LONGEST_PERIOD)
    for k in by_remainder[: LONGEST_PERIOD - sum(shares)]:
        shares[k] += 1
    if 0 in shares:
        raise UsageError(
            f"a data set has weight {weights[shares.index(0)]} of {sum(weights)}, less than one row in "
            f"{LONGEST_PERIOD:,}; give it more or leave it out"
        )
    return shares


def _turns(shares: Sequence[int]) -> NDArray[np.int64]:
    """The turns of one period, such that each source is less than one row from its share at every place.

    Row j of a source with share s in a period of P may come once j · P ÷ s is reached and must have come before
    (j + 1) · P ÷ s; of those that may come, the one that must come first is taken. This always succeeds.

    Source: Baruah, Cohen, Plaxton and Varvel, Proportionate progress (Algorithmica 15, 1996).
    """
    period = sum(shares)
    waiting = [(0, source, 0) for source in range(len(shares))]  # (first place, source, row)
    due: list[tuple[int, int, int]] = []  # (place before which it must come, source, row)
    turns = np.empty(period, dtype=np.int64)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, source, row = heapq.heappop(waiting)
            heapq.heappush(due, (-(-(row + 1) * period // shares[source]), source, row))
        _, source, row = heapq.heappop(due)
        turns[place] = source
        if row + 1 < shares[source]:
            heapq.heappush(waiting, ((row + 1) * period // shares[source], source, row + 1))
    return turns


def _check_rows(sources: Sequence[Sequence[Row]]) -> None:
    for number, rows in enumerate(sources):
        if not len(rows):
            raise PunaError(f"data set {number} of {len(sources)} has no rows; prepare it again or leave it out")
    lengths = [len(rows[0].tokens) for rows in sources]
    if len(set(lengths)) > 1:
        raise PunaError(f"the data sets have rows of {lengths} tokens; open them with one sequence_length")


def _uneven(batch_rows: int, world_size: int) -> str:
    below = batch_rows - batch_rows % world_size
    rows = f"{below} or {below + world_size}" if below else f"{world_size}"
    ranks = ", ".join(str(n) for n in range(1, batch_rows + 1) if batch_rows % n == 0)
    return (
        f"a global batch of {batch_rows} rows cannot be shared evenly by {world_size} ranks; "
        f"take {rows} rows, or one of {ranks} ranks"
    )
