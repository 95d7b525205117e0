"""Rows: what the model reads at once, cut out of documents that lie end to end on the disk.

Row *i* is a function of *i* alone, so any order, any number of ranks and any place to resume at see the same rows, and
the same shards serve every sequence length. Two ways to fill rows. End to end, for pretraining:

    documents   a a a|b b|c c c c c         starts = [0, 3, 5, 10], rows of 4; - is IGNORE, . is padding
    row 0       a a a b    targets a a - b    documents 0 0 0 1    positions 0 1 2 0
    row 1       b c c c    targets - c c c    documents 0 1 1 1    positions 0 0 1 2
    row 2       c c . .    targets c - - -    documents 0 0 1 1    positions 0 1 0 1

and whole documents, for dialogs and infilling, which lose their sense when cut; what is longer than a row goes on in
another, but a dialog ends with its row, and what it loses is counted:

    row 0       a a a c    targets a a - -    documents 0 0 0 1    positions 0 1 2 0    (of a dialog, no fifth c)
    row 1       b b . .    targets b - - -    documents 0 0 1 1    positions 0 1 0 1
    row 2       c c c c    targets c c c c    documents 0 0 0 0    positions 0 1 2 3    (of a dialog, no fourth target)

The loader (`puna.data.loader`) asks for rows in a shuffled order and stacks them into batches.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from puna.errors import PunaError, UsageError

#: In `Row.targets`: nothing is asked here. The value that torch's cross-entropy ignores.
IGNORE = -100

#: The token that fills a row's unused end. No document sees it and nothing is asked of it.
PADDING = 0


@dataclass(frozen=True)
class Row:
    """One row of `sequence_length` T; every field is (T,) int32.

    Attributes:
        tokens: token ids.
        targets: the token that should follow each token, or IGNORE.
        documents: 0, 1, 2 … in the row's order; padding is a document of its own, the last.
        positions: 0, 1, 2 … within each document's part of this row.
    """

    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]
    documents: NDArray[np.int32]
    positions: NDArray[np.int32]


class Documents(Protocol):
    """What rows need of a data set: documents of tokens, laid end to end (`puna.data.shards.Dataset`)."""

    @property
    def info(self) -> dict[str, Any]: ...
    @property
    def lengths(self) -> NDArray[np.int32]: ...
    @property
    def starts(self) -> NDArray[np.int64]: ...
    def __len__(self) -> int: ...
    def tokens(self, start: int, stop: int) -> NDArray[np.int32]: ...
    def is_target(self, start: int, stop: int) -> NDArray[np.bool_] | None: ...


class Rows(Sequence[Row]):
    """Rows of one length over one data set; index errors and negative indices as in a list.

    Raises:
        UsageError: `sequence_length` is below 2.
        PunaError: the data set holds no tokens.
    """

    #: The name of this way to fill rows, as in `dataset.json`.
    fill: str
    #: Documents that are cut to a row, and how many of their tokens no row holds.
    cut_documents = 0
    cut_tokens = 0
    #: Documents whose rest is in other rows.
    split_documents = 0

    def __init__(self, dataset: Documents, sequence_length: int) -> None:
        if sequence_length < 2:
            raise UsageError(f"sequence_length is {sequence_length}; a row needs 2 tokens at least, one and its target")
        self.dataset, self.sequence_length = dataset, sequence_length
        self.total_tokens = int(dataset.starts[-1])
        if self.total_tokens == 0:
            raise PunaError(
                f"the data set{_named(dataset)} holds no tokens; prepare it again from a source with documents"
            )

    @overload
    def __getitem__(self, index: SupportsIndex) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._row(i) for i in range(len(self))[index]]
        return self._row(self._checked(index))

    @property
    def useful_tokens_share(self) -> float:
        """Tokens of documents ÷ tokens of all rows; the rest is padding."""
        return (self.total_tokens - self.cut_tokens) / (len(self) * self.sequence_length)

    def summary(self) -> str:
        """One line for the person watching: how many rows, how full, and what was cut."""
        line = (
            f"{len(self):,} rows of {self.sequence_length:,} tokens, {self.fill}, {self.useful_tokens_share:.1%} useful"
        )
        if self.cut_documents:
            line += f"; {self.cut_documents:,} documents longer than a row were cut, losing {self.cut_tokens:,} tokens"
        if self.split_documents:
            line += f"; {self.split_documents:,} documents longer than a row go on in others"
            if self._splits_infilling:
                line += (
                    ", of which some are cut for infilling and make no sense in parts: prepare the data again with "
                    f"--fim-tokens {self.sequence_length}"
                )
        return line

    @property
    def _splits_infilling(self) -> bool:
        options = self.dataset.info.get("settings", {}).get("options", {})
        return bool(options.get("fim_rate")) and options["fim_tokens"] > self.sequence_length

    @abstractmethod
    def document_numbers(self, index: SupportsIndex) -> NDArray[np.int64]:
        """The data set's numbers of the documents in a row, in the row's order."""

    @abstractmethod
    def _row(self, i: int) -> Row: ...

    def _checked(self, index: SupportsIndex) -> int:
        try:
            return range(len(self))[index]
        except IndexError:
            raise IndexError(
                f"there is no row {index}; {len(self):,} rows of {self.sequence_length:,} tokens are there"
            ) from None


class EndToEndRows(Rows):
    """Row *i* holds tokens i·T to (i+1)·T of all documents laid end to end; only the last row is padded.

    Every token is in exactly one row. A document that runs on into the next row is asked for its next token across the
    border; a row never asks for the first token of the next document.
    """

    fill = "end-to-end"

    def __len__(self) -> int:
        return -(-self.total_tokens // self.sequence_length)

    def document_numbers(self, index: SupportsIndex) -> NDArray[np.int64]:
        start, stop = self._span(self._checked(index))
        first, last = self._documents(start, stop)
        numbers = np.arange(first, last, dtype=np.int64)
        return numbers[np.diff(self.dataset.starts[first : last + 1]) > 0]

    def _row(self, i: int) -> Row:
        start, stop = self._span(i)
        read = self.dataset.tokens(start, min(stop + 1, self.total_tokens))  # one more: the last token's target
        tokens, targets = _blank(self.sequence_length)
        tokens[: stop - start] = read[: stop - start]
        targets[: len(read) - 1] = read[1:]
        asked = self.dataset.is_target(start + 1, start + len(read))
        if asked is not None:
            targets[: len(read) - 1][~asked] = IGNORE
        first, last = self._documents(start, stop)
        edges = self.dataset.starts[first : last + 1]
        targets[edges[1:][edges[1:] <= stop] - start - 1] = IGNORE
        return _assembled(tokens, targets, np.diff(edges.clip(start, stop)))

    def _span(self, i: int) -> tuple[int, int]:
        return i * self.sequence_length, min((i + 1) * self.sequence_length, self.total_tokens)

    def _documents(self, start: int, stop: int) -> tuple[int, int]:
        """The numbers of the first document in a span of tokens, and of the one after the last."""
        starts = self.dataset.starts
        return int(np.searchsorted(starts, start, side="right")) - 1, int(np.searchsorted(starts, stop, side="left"))


class WholeDocumentRows(Rows):
    """Rows of uncut documents, packed by best-fit decreasing.

    A document longer than a row is taken in pieces, all but its last of a row each, and asked for its next token across
    the border as in `EndToEndRows`; a dialog, whose answers say little without what they answer, is cut to a row and
    counted. The packing is made once, from the lengths alone, and sixteen bytes a document of it are kept. Rows are
    numbered by their first document, and hold their documents in the data set's order.
    """

    fill = "whole-documents"

    def __init__(self, dataset: Documents, sequence_length: int) -> None:
        super().__init__(dataset, sequence_length)
        lengths = dataset.lengths
        is_long = lengths > sequence_length
        n_pieces = -(-lengths.astype(np.int64) // sequence_length)
        self._are_dialogs = dataset.is_target(0, 1) is not None
        if self._are_dialogs:
            n_pieces = np.minimum(n_pieces, 1)
            self.cut_documents = int(is_long.sum())
            self.cut_tokens = int(lengths[is_long].sum(dtype=np.int64)) - self.cut_documents * sequence_length
        else:
            self.split_documents = int(is_long.sum())
        #: The number of each document's first piece, and of all pieces.
        self._firsts = np.concatenate([[0], np.cumsum(n_pieces)])
        row_of = best_fit(self._piece_lengths(n_pieces), sequence_length)
        self._order = np.argsort(row_of, kind="stable")
        self._edges = np.concatenate([[0], np.cumsum(np.bincount(row_of))])

    def __len__(self) -> int:
        return len(self._edges) - 1

    def document_numbers(self, index: SupportsIndex) -> NDArray[np.int64]:
        return self._places(self._pieces(self._checked(index)))[0]

    def _row(self, i: int) -> Row:
        numbers, starts, lengths = self._places(self._pieces(i))
        stops = np.cumsum(lengths)
        goes_on = (starts + lengths < self.dataset.starts[numbers + 1]) & (not self._are_dialogs)
        tokens, targets = _blank(self.sequence_length)
        asked = np.ones(self.sequence_length, dtype=np.bool_)
        behind = np.full(len(stops), IGNORE, dtype=np.int32)  # each piece: the next token of its document
        spans = zip(starts.tolist(), lengths.tolist(), stops.tolist(), goes_on.tolist(), strict=True)
        for number, (start, length, stop, has_more) in enumerate(spans):
            read = self.dataset.tokens(start, start + length + has_more)
            tokens[stop - length : stop] = read[:length]
            if has_more:
                behind[number] = read[length]
            is_target = self.dataset.is_target(start, start + length)
            if is_target is not None:
                asked[stop - length : stop] = is_target
        targets[:-1] = np.where(asked[1:], tokens[1:], IGNORE)
        targets[stops - 1] = behind
        targets[stops[-1] :] = IGNORE
        return _assembled(tokens, targets, lengths)

    def _piece_lengths(self, n_pieces: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each piece; a document's last piece holds what the others leave."""
        lengths = np.full(self._firsts[-1], self.sequence_length)
        is_there = n_pieces > 0
        left = self.dataset.lengths - (n_pieces - 1) * self.sequence_length
        lengths[self._firsts[1:][is_there] - 1] = np.minimum(left, self.sequence_length)[is_there]
        return lengths

    def _pieces(self, i: int) -> NDArray[np.int64]:
        return self._order[self._edges[i] : self._edges[i + 1]]

    def _places(self, pieces: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of each piece its document's number, its first token in the data set, and how many tokens it has."""
        numbers = np.searchsorted(self._firsts, pieces, side="right") - 1
        offsets = (pieces - self._firsts[numbers]) * self.sequence_length
        lengths = np.minimum(self.dataset.lengths[numbers] - offsets, self.sequence_length)
        return numbers, self.dataset.starts[numbers] + offsets, lengths


#: Name of a way to fill rows -> the rows.
FILLS: dict[str, type[Rows]] = {rows.fill: rows for rows in (EndToEndRows, WholeDocumentRows)}


def open_rows(dataset: Documents, sequence_length: int, fill: str | None = None) -> Rows:
    """The rows of a data set.

    Args:
        dataset: a prepared folder, opened.
        sequence_length: T, tokens a row.
        fill: a name in FILLS; None: as the data set was prepared for.

    Raises:
        UsageError: no such way to fill rows, or `sequence_length` is below 2.
        PunaError: the data set holds no tokens.
    """
    fill = fill or dataset.info.get("fill", EndToEndRows.fill)
    if fill not in FILLS:
        raise UsageError(f"there is no way to fill rows called {fill!r}; choose one of {', '.join(FILLS)}")
    return FILLS[fill](dataset, sequence_length)


def best_fit(lengths: NDArray[np.integer], capacity: int) -> NDArray[np.int64]:
    """The row of each document by best-fit decreasing: the longest first, each into the fullest row that has room.

    Documents of one length are placed together, and so are rows with one amount of space left. As a row's space more
    than halves each time it is met by a new length, there are at most about 3 · capacity · log2(capacity) steps, each a
    few numpy calls, whatever the number of documents.

    Args:
        lengths: (N,) tokens of each document, from 1 to `capacity`.
        capacity: tokens of a row.

    Returns:
        (N,) row numbers 0, 1, 2 …, by the row's first document.
    """
    longest_first = np.argsort(lengths, kind="stable")[::-1]
    counts = np.bincount(lengths)
    row_of = np.empty(len(lengths), dtype=np.int64)
    n_rows = 0
    with_space: list[list[NDArray[np.int64]]] = [[] for _ in range(capacity + 1)]  # space left -> the rows, in pieces
    is_there = bytearray(capacity + 1)  # space left -> 1 if there are such rows; searched at the speed of memchr

    def keep(rows: NDArray[np.int64], space: int) -> None:
        if space and len(rows):
            with_space[space].append(rows)
            is_there[space] = 1

    for length in np.flatnonzero(counts)[::-1].tolist():
        documents, longest_first = np.split(longest_first, [counts[length]])
        while len(documents):
            space = is_there.find(1, length)
            if space < 0:
                space = capacity
                fitting = space // length
                rows = np.arange(n_rows, n_rows - (-len(documents) // fitting))
                n_rows += len(rows)
            else:
                fitting = space // length
                rows = with_space[space].pop()
                is_there[space] = bool(with_space[space])
                n_needed = -(-len(documents) // fitting)
                keep(rows[n_needed:], space)
                rows = rows[:n_needed]
            placed = documents[: len(rows) * fitting]
            row_of[placed] = np.repeat(rows, fitting)[: len(placed)]
            n_full, n_rest = divmod(len(placed), fitting)
            keep(rows[:n_full], space - fitting * length)
            keep(rows[n_full:], space - n_rest * length)
            documents = documents[len(placed) :]
    return _by_first_document(row_of, n_rows)


def _by_first_document(row_of: NDArray[np.int64], n_rows: int) -> NDArray[np.int64]:
    first = np.empty(n_rows, dtype=np.int64)
    first[row_of[::-1]] = np.arange(len(row_of) - 1, -1, -1)  # the last write wins: the smallest number
    number = np.empty(n_rows, dtype=np.int64)
    number[np.argsort(first)] = np.arange(n_rows)
    return number[row_of]


def _blank(sequence_length: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return np.full(sequence_length, PADDING, dtype=np.int32), np.full(sequence_length, IGNORE, dtype=np.int32)


def _assembled(tokens: NDArray[np.int32], targets: NDArray[np.int32], lengths: NDArray[np.integer]) -> Row:
    """The row of documents of these `lengths`, empty ones left out, and of padding after them."""
    lengths = np.append(lengths, len(tokens) - lengths.sum())
    lengths = lengths[lengths > 0]
    documents = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    firsts = np.repeat((np.cumsum(lengths) - lengths).astype(np.int32), lengths)
    return Row(tokens, targets, documents, np.arange(len(tokens), dtype=np.int32) - firsts)


def _named(dataset: Documents) -> str:
    folder = getattr(dataset, "folder", None)
    return f" {folder}" if folder else ""
