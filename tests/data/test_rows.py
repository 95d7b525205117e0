"""Rows hold every token once, keep documents apart, and are packed as tightly as the slow formula does it."""

import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.data.rows import FILLS, IGNORE, EndToEndRows, Row, WholeDocumentRows, best_fit, open_rows
from puna.data.shards import DATASET_FILE, Dataset, shard_entry, write_shard
from puna.errors import PunaError, UsageError
from puna.files import write_json
from puna.testing import FakeDataset

A, B, C = 11, 12, 13
#: HOUSE's example: three documents, laid end to end.
AABBC = [[A] * 3, [B] * 2, [C] * 5]

lengths_of_documents = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)
sequence_lengths = st.integers(2, 50)


def numbered(lengths: list[int], is_target: list[list[bool]] | None = None) -> FakeDataset:
    """Documents whose tokens are 1, 2, 3 … over all of them, so that a token tells its place."""
    stops = np.cumsum(lengths)
    return FakeDataset([range(s - n + 1, s + 1) for n, s in zip(lengths, stops, strict=True)], is_target)


def all_marked(lengths: list[int]) -> list[list[bool]]:
    return [[True] * n for n in lengths]


def fields(row: Row) -> list[list[int]]:
    return [row.tokens.tolist(), row.targets.tolist(), row.documents.tolist(), row.positions.tolist()]


def test_end_to_end_rows_of_the_example():
    rows = EndToEndRows(FakeDataset(AABBC), 4)
    assert len(rows) == 3
    assert fields(rows[0]) == [[A, A, A, B], [A, A, IGNORE, B], [0, 0, 0, 1], [0, 1, 2, 0]]
    assert fields(rows[1]) == [[B, C, C, C], [IGNORE, C, C, C], [0, 1, 1, 1], [0, 0, 1, 2]]
    assert fields(rows[2]) == [[C, C, 0, 0], [C, IGNORE, IGNORE, IGNORE], [0, 0, 1, 1], [0, 1, 0, 1]]
    assert rows.useful_tokens_share == 10 / 12
    assert [rows.document_numbers(i).tolist() for i in range(3)] == [[0, 1], [1, 2], [2]]


def test_whole_document_rows_of_the_example():
    rows = WholeDocumentRows(FakeDataset(AABBC), 4)
    assert len(rows) == 3
    assert fields(rows[0]) == [[A, A, A, C], [A, A, IGNORE, IGNORE], [0, 0, 0, 1], [0, 1, 2, 0]]
    assert fields(rows[1]) == [[B, B, 0, 0], [B, IGNORE, IGNORE, IGNORE], [0, 0, 1, 1], [0, 1, 0, 1]]
    assert fields(rows[2]) == [[C, C, C, C], [C, C, C, C], [0, 0, 0, 0], [0, 1, 2, 3]]
    assert [rows.document_numbers(i).tolist() for i in range(3)] == [[0, 2], [1], [2]]
    assert (rows.split_documents, rows.cut_documents, rows.cut_tokens, rows.useful_tokens_share) == (1, 0, 0, 10 / 12)
    assert rows.summary().endswith("83.3% useful; 1 documents longer than a row go on in others")


def test_infilling_that_rows_cut_apart_is_told():
    documents = FakeDataset(AABBC)
    documents.info["settings"] = {"options": {"fim_rate": 0.9, "fim_tokens": 5}}
    assert WholeDocumentRows(documents, 4).summary().endswith("prepare the data again with --fim-tokens 4")
    assert "infilling" not in WholeDocumentRows(documents, 5).summary()
    documents.info["settings"]["options"]["fim_tokens"] = 4
    assert "infilling" not in WholeDocumentRows(documents, 4).summary()


def test_whole_document_rows_of_the_example_as_dialogs():
    rows = WholeDocumentRows(FakeDataset(AABBC, [[True] * len(document) for document in AABBC]), 4)
    assert len(rows) == 3
    assert fields(rows[0]) == [[A, A, A, 0], [A, A, IGNORE, IGNORE], [0, 0, 0, 1], [0, 1, 2, 0]]
    assert fields(rows[1]) == [[B, B, 0, 0], [B, IGNORE, IGNORE, IGNORE], [0, 0, 1, 1], [0, 1, 0, 1]]
    assert fields(rows[2]) == [[C, C, C, C], [C, C, C, IGNORE], [0, 0, 0, 0], [0, 1, 2, 3]]
    assert (rows.cut_documents, rows.cut_tokens, rows.useful_tokens_share) == (1, 1, 9 / 12)
    assert "1 documents longer than a row were cut, losing 1 tokens" in rows.summary()
    assert "75.0% useful" in rows.summary()


def test_two_whole_documents_that_fill_a_row_share_it_without_padding():
    (row,) = WholeDocumentRows(FakeDataset([[A] * 3, [B] * 2]), 5)
    assert fields(row) == [[A, A, A, B, B], [A, A, IGNORE, B, IGNORE], [0, 0, 0, 1, 1], [0, 1, 2, 0, 1]]


@given(lengths_of_documents, sequence_lengths)
def test_end_to_end_rows_hold_every_token_once_and_in_order(lengths, sequence_length):
    rows = EndToEndRows(numbered(lengths), sequence_length)
    tokens = np.concatenate([row.tokens for row in rows])
    total = sum(lengths)
    assert tokens[:total].tolist() == list(range(1, total + 1))
    assert not tokens[total:].any()
    assert len(tokens) - total < sequence_length


@given(lengths_of_documents, sequence_lengths)
def test_end_to_end_rows_ask_for_every_token_of_a_document_but_its_first(lengths, sequence_length):
    dataset = numbered(lengths)
    asked = np.concatenate([row.targets for row in EndToEndRows(dataset, sequence_length)])
    firsts = dataset.starts[:-1][dataset.lengths > 0] + 1
    expected = sorted(set(range(1, sum(lengths) + 1)) - set(firsts.tolist()))
    assert asked[asked != IGNORE].tolist() == expected


@given(lengths_of_documents, sequence_lengths)
def test_whole_document_rows_hold_every_token_of_a_dialog_that_is_not_cut_once(lengths, sequence_length):
    dataset = numbered(lengths, all_marked(lengths))
    rows = WholeDocumentRows(dataset, sequence_length)
    kept = [
        int(s) + 1 + i for s, n in zip(dataset.starts, lengths, strict=False) for i in range(min(n, sequence_length))
    ]
    tokens = np.concatenate([row.tokens for row in rows])
    assert sorted(tokens[tokens != 0].tolist()) == kept
    assert rows.cut_documents == sum(n > sequence_length for n in lengths)
    assert rows.cut_tokens == sum(lengths) - len(kept)
    assert rows.useful_tokens_share == len(kept) / tokens.size


@given(lengths_of_documents, sequence_lengths)
def test_whole_document_rows_hold_every_token_of_a_text_once_and_ask_for_all_but_the_firsts(lengths, sequence_length):
    dataset = numbered(lengths)
    rows = WholeDocumentRows(dataset, sequence_length)
    tokens, targets = (np.concatenate([getattr(row, name) for row in rows]) for name in ("tokens", "targets"))
    assert sorted(tokens[tokens != 0].tolist()) == list(range(1, sum(lengths) + 1))
    firsts = dataset.starts[:-1][dataset.lengths > 0] + 1
    assert sorted(targets[targets != IGNORE].tolist()) == sorted(set(range(1, sum(lengths) + 1)) - set(firsts.tolist()))
    is_in_one = {document: 0 for document, n in enumerate(lengths) if 0 < n <= sequence_length}
    for i in range(len(rows)):
        for document in rows.document_numbers(i).tolist():
            if document in is_in_one:
                is_in_one[document] += 1
    assert set(is_in_one.values()) <= {1}
    assert rows.split_documents == sum(n > sequence_length for n in lengths)
    assert rows.cut_documents == rows.cut_tokens == 0


@pytest.mark.parametrize("fill", FILLS)
@given(lengths=lengths_of_documents, sequence_length=sequence_lengths)
def test_a_row_never_asks_for_the_next_documents_first_token(fill, lengths, sequence_length):
    dataset = numbered(lengths)
    for row in open_rows(dataset, sequence_length, fill):
        asked = row.targets != IGNORE
        assert (row.targets[asked] == row.tokens[asked] + 1).all()  # tokens are numbered: the next one, and
        document = np.searchsorted(dataset.starts, [row.tokens[asked] - 1, row.targets[asked] - 1], side="right")
        assert (document[0] == document[1]).all()  # of the same document


@pytest.mark.parametrize("fill", FILLS)
@given(lengths=lengths_of_documents, sequence_length=sequence_lengths)
def test_document_numbers_and_positions_tell_the_parts_of_a_row(fill, lengths, sequence_length):
    dataset = numbered(lengths)
    rows = open_rows(dataset, sequence_length, fill)
    for i, row in enumerate(rows):
        assert {field.shape for field in vars(row).values()} == {(sequence_length,)}
        assert {field.dtype for field in vars(row).values()} == {np.dtype(np.int32)}
        numbers = rows.document_numbers(i).tolist()
        has_padding = row.tokens[-1] == 0
        assert np.unique(row.documents).tolist() == list(range(len(numbers) + has_padding))
        assert (np.diff(row.documents) >= 0).all()
        for k in range(len(numbers) + has_padding):
            part = row.tokens[row.documents == k]
            assert row.positions[row.documents == k].tolist() == list(range(len(part)))
            if k < len(numbers):
                document = dataset.document(numbers[k])[2]
                at = document.tolist().index(part[0])
                assert part.tolist() == document[at : at + len(part)].tolist()
            else:
                assert not part.any()
                assert (row.targets[row.documents == k] == IGNORE).all()


@pytest.mark.parametrize("fill", FILLS)
@settings(max_examples=50)
@given(data=st.data(), lengths=lengths_of_documents, sequence_length=sequence_lengths)
def test_only_tokens_marked_as_targets_are_asked_for(fill, data, lengths, sequence_length):
    marks = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    marked, unmarked = numbered(lengths, marks), numbered(lengths, all_marked(lengths))
    is_target = np.array([False, *(mark for document in marks for mark in document)])  # tokens are numbered from 1
    for with_marks, without in zip(
        open_rows(marked, sequence_length, fill), open_rows(unmarked, sequence_length, fill), strict=True
    ):
        expected = [t if t != IGNORE and is_target[t] else IGNORE for t in without.targets.tolist()]
        assert with_marks.targets.tolist() == expected
        assert with_marks.tokens.tolist() == without.tokens.tolist()


def test_rows_are_a_sequence():
    rows = EndToEndRows(numbered([10]), 4)
    assert rows[-1].tokens.tolist() == rows[2].tokens.tolist() == [9, 10, 0, 0]
    assert rows[np.int64(1)].tokens.tolist() == [5, 6, 7, 8]
    assert [row.tokens[0] for row in rows[:2]] == [1, 5]
    assert len(list(rows)) == 3
    for index in (3, -4):
        with pytest.raises(IndexError, match=rf"no row {index}; 3 rows of 4 tokens"):
            rows[index]


def test_a_row_can_be_written_to_without_changing_the_data():
    rows = EndToEndRows(numbered([10]), 4)
    rows[0].tokens[:] = 99
    assert rows[0].tokens.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("fill", FILLS)
def test_a_row_of_one_token_is_refused(fill):
    with pytest.raises(UsageError, match="sequence_length is 1; a row needs 2"):
        open_rows(numbered([10]), 1, fill)


@pytest.mark.parametrize("documents", [[], [[], []]])
@pytest.mark.parametrize("fill", FILLS)
def test_an_empty_data_set_is_refused_by_name(fill, documents, tmp_path):
    dataset = FakeDataset(documents)
    dataset.folder = tmp_path
    with pytest.raises(PunaError, match=rf"the data set {re.escape(str(tmp_path))} holds no tokens"):
        open_rows(dataset, 8, fill)


def test_rows_are_filled_as_the_data_was_prepared_for_unless_asked_otherwise():
    assert isinstance(open_rows(FakeDataset(AABBC), 4), EndToEndRows)
    dialogs = FakeDataset(AABBC, info={"fill": "whole-documents"})
    assert isinstance(open_rows(dialogs, 4), WholeDocumentRows)
    assert isinstance(open_rows(dialogs, 4, "end-to-end"), EndToEndRows)
    with pytest.raises(UsageError, match="'tetris'; choose one of end-to-end, whole-documents"):
        open_rows(dialogs, 4, "tetris")


def plain_best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook's formula: one document after the other, each into the fullest row that has room."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@given(st.integers(1, 40).flatmap(lambda T: st.tuples(st.lists(st.integers(1, T), max_size=60), st.just(T))))
def test_best_fit_packs_as_the_textbook_does(lengths_and_capacity):
    lengths, capacity = lengths_and_capacity
    row_of = best_fit(np.array(lengths, dtype=np.int32), capacity)
    filled = np.bincount(row_of, weights=lengths).astype(int).tolist()
    expected = plain_best_fit_decreasing(lengths, capacity)
    assert sorted(filled) == sorted(sum(row) for row in expected)  # rows filled alike may have swapped their documents
    firsts = [row_of.tolist().index(row) for row in range(len(expected))]
    assert firsts == sorted(firsts)  # rows are numbered by their first document


def test_packing_takes_a_fraction_of_a_second_for_many_documents_and_wastes_little():
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 200_000).astype(np.int32).clip(1, 4096)
    started = time.process_time()
    row_of = best_fit(lengths, 4096)
    assert time.process_time() - started < 2.0
    filled = np.bincount(row_of, weights=lengths)
    assert filled.max() <= 4096
    assert filled.mean() / 4096 > 0.999


@pytest.mark.parametrize("fill", FILLS)
def test_rows_of_shards_on_the_disk_are_those_of_the_fake_in_memory(fill, tmp_path, monkeypatch):
    monkeypatch.setattr("puna.data.shards.BATCH_TOKENS", 30)  # several record batches a shard
    random = np.random.default_rng(0)
    documents = [random.integers(1, 100, random.integers(1, 25)).astype(np.int32) for _ in range(40)]
    marks = [random.random(len(document)) < 0.5 for document in documents]
    entries = []
    for number, shard in enumerate((range(25), range(25, 40))):
        path = tmp_path / f"shard-{number:05d}.arrow"
        with write_shard(path, dialogs=True) as writer:
            for i in shard:
                writer.add(str(i), "source", documents[i], marks[i])
        entries.append(shard_entry(path, writer))
    write_json(tmp_path / DATASET_FILE, {"format": 1, "shards": entries, "fill": fill})
    on_disk = open_rows(Dataset.open(tmp_path), 16)
    fake = open_rows(FakeDataset(documents, marks), 16, fill)
    assert type(on_disk) is FILLS[fill]
    assert [fields(row) for row in on_disk] == [fields(row) for row in fake]
    assert len(fake) > 20
