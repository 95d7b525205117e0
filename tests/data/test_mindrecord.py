"""MindRecord: rows and index of MindSpore's own files, read and written byte for byte; and what is made of them."""

import json
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from puna.cli import run
from puna.data.mindrecord import MindRecord, messagepack, write_index, write_mindrecord, write_prepared
from puna.data.mindrecord.integers import decode_all, decode_integers, encode_integers
from puna.data.prepare import prepare
from puna.data.shards import Dataset
from puna.errors import PunaError, UsageError
from puna.native import compiler

SMALL = {"header_bytes": 16 << 10, "page_bytes": 32 << 10}
IDS = {"input_ids": {"type": "int32", "shape": [-1]}}


@pytest.fixture(scope="session")
def theirs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MindSpore's own files, unpacked."""
    folder, fixtures = tmp_path_factory.mktemp("mindrecord"), shared / "fixtures/mindspore"
    for archive in [*fixtures.glob("mindrecord/*.tar.xz"), *fixtures.glob("preprocess/*.tar.xz")]:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    for file in fixtures.glob("mindrecord/*.mindrecord*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def tokenizer(shared: Path) -> Path:
    return shared / "fixtures/mindspore/tokenizer/tokenizer.model"


def plain_decode(data: bytes) -> list[int]:
    """One value after the other, as the format's description has it."""
    count, place = int.from_bytes(data[:4], "big"), 4 + -(-int.from_bytes(data[:4], "big") // 4)
    values = []
    for i in range(count):
        width = 1 << (data[4 + i // 4] >> (6 - 2 * (i % 4)) & 3)
        values.append(int.from_bytes(data[place : place + width], "little", signed=True))
        place += width
    assert place == len(data)
    return values


@given(values=arrays.arrays("i8", st.integers(0, 30), elements=st.one_of(
    st.integers(-(1 << 63), (1 << 63) - 1), st.integers(-40_000, 40_000),
    st.sampled_from([-129, -128, 127, 128, -32769, -32768, 32767, 32768, -(1 << 31) - 1, -(1 << 31), 1 << 31]),
)))  # fmt: skip
def test_integers_come_and_go_and_the_plain_way_sees_the_same(values):
    data = encode_integers(values)
    assert decode_integers(np.frombuffer(data, np.uint8)).tolist() == plain_decode(data) == values.tolist()


#: Of one byte, two, four and eight.
VALUES = [-128, 0, 127, -129, 128, 40_000, 1 << 40]


@given(
    sizes=st.lists(st.integers(0, 400), max_size=5),
    few=st.lists(st.tuples(st.integers(0, 1999), st.sampled_from(VALUES)), max_size=40),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["<i4", "<i8"]),
)
def test_many_fields_at_once_are_those_one_by_one(sizes, few, seed, dtype):
    values = np.random.default_rng(seed).integers(128, 1 << 15, 2000) * (-1) ** (seed % 2) - seed % 2
    for place, value in few:
        values[place] = value
    stops = np.cumsum(sizes)
    rows = [values[stop - size : stop] for size, stop in zip(sizes, stops, strict=True)]
    fields = [encode_integers(row) for row in rows]
    found = decode_all(*_end_to_end(fields), np.dtype(dtype))
    assert [row.tolist() for row in found] == [np.array(plain_decode(f)).astype(dtype).tolist() for f in fields]
    assert {row.dtype for row in found} <= {np.dtype(dtype)}


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize(("start", "stop"), [(0, -1), (0, 20), (0, 0), (1, None)])
def test_a_broken_field_among_others_is_refused(start, stop, is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr("puna.data.mindrecord.integers._library", lambda: None)
    elif compiler() is None:
        pytest.skip("no C compiler")
    whole = encode_integers(np.arange(1000, 1400))
    assert len(decode_all(*_end_to_end([whole, whole]), np.dtype("<i4"))) == 2
    with pytest.raises(ValueError, match=r"are announced in|are there"):
        decode_all(*_end_to_end([whole, whole[start:stop], whole]), np.dtype("<i4"))


def _end_to_end(fields: list[bytes]) -> tuple[bytes, list[tuple[int, int]]]:
    stops = np.cumsum([len(field) for field in fields]).tolist()
    return b"".join(fields), list(zip([0, *stops], stops, strict=False))


@given(data=st.binary(max_size=40))
def test_bytes_that_are_no_integers_are_refused(data):
    try:
        values = decode_integers(np.frombuffer(data, np.uint8))
    except ValueError:
        return
    assert values.tolist() == plain_decode(data)


@pytest.mark.parametrize("name", ["wiki_16x128", "qa_16x128", "wiki_multipage_120x129"])
def test_rows_of_mindspore_are_read_and_written_byte_for_byte(shared, theirs, tmp_path, name):
    record = MindRecord.open(theirs / f"{name}.mindrecord")
    rows, expected = list(record.rows()), np.load(shared / f"fixtures/mindspore/mindrecord/{name}.npz")
    for column in expected.files:
        np.testing.assert_array_equal(np.stack([row[column] for row in rows]), expected[column])
    again = tmp_path / f"{name}.mindrecord"
    write_mindrecord(again, record.header["schema"][0]["desc"], record.schema, rows, **SMALL)
    assert again.read_bytes() == (theirs / again.name).read_bytes()
    assert index_of(again) == index_of(theirs / again.name)


def test_arrays_bytes_and_single_values_together(theirs, tmp_path):
    record = MindRecord.open(theirs / "mixed_types.mindrecord")
    rows = list(record.rows())
    for i, row in enumerate(rows):
        assert row["input_ids"].tolist() == list(range(5 + i))
        assert row["labels"].tolist() == [-100, 70000, 3]
        assert (row["id"], row["text"], row["score"]) == (7 + i, f"héllo {i}", 1.5 * i)
        assert row["emb"].tolist() == [[i, i], [i, i]]
        assert (row["big"].tolist(), row["blob"]) == ([1 << 40, -1, i], b"xyz" + bytes([i]))
    again = tmp_path / "mixed_types.mindrecord"
    write_mindrecord(again, "mixed", record.schema, rows, index_fields=record.index_fields, **SMALL)
    assert again.read_bytes() == (theirs / again.name).read_bytes()
    assert index_of(again) == index_of(theirs / again.name)


def test_a_lost_index_is_made_again(theirs, tmp_path):
    for name in ("mixed_types.mindrecord", "wiki_3shards.mindrecord1", "wiki_multipage_120x129.mindrecord"):
        copy = tmp_path / name
        copy.write_bytes((theirs / name).read_bytes())
        write_index(copy)
        assert index_of(copy) == index_of(theirs / name)


def test_shards_are_read_in_the_order_in_which_mindspore_reads_them(shared, theirs):
    expected = np.load(shared / "fixtures/mindspore/mindrecord/wiki_3shards_read_order.npz")["input_ids"]
    shards = MindRecord.open_all(theirs / "wiki_3shards.mindrecord0")
    assert [len(shard) for shard in shards] == [3, 5, 8]
    np.testing.assert_array_equal([row["input_ids"] for shard in shards for row in shard.rows()], expected)


_COLUMNS = {
    "a": ({"type": "int32", "shape": [-1]}, arrays.arrays("i4", st.integers(0, 9))),
    "b": ({"type": "int64", "shape": [-1]}, arrays.arrays("i8", st.integers(0, 9))),
    "c": ({"type": "float32", "shape": [2, -1]}, arrays.arrays("f4", st.tuples(st.just(2), st.integers(1, 3)),
                                                               elements=st.floats(width=32, allow_nan=False))),
    "d": ({"type": "bytes"}, st.binary(max_size=9)),
    "e": ({"type": "int64"}, st.integers(-(1 << 63), (1 << 63) - 1)),
    "f": ({"type": "string"}, st.text(max_size=40)),
    "g": ({"type": "float64"}, st.floats(allow_nan=False)),
}  # fmt: skip


@given(data=st.data(), names=st.sets(st.sampled_from(sorted(_COLUMNS)), min_size=1), count=st.integers(1, 5))
@settings(max_examples=40)
def test_what_is_written_is_read(tmp_path_factory, data, names, count):
    names = sorted(names | {"a"})
    row = st.fixed_dictionaries({name: _COLUMNS[name][1] for name in names})
    rows = data.draw(st.lists(row, min_size=count, max_size=count))
    path = tmp_path_factory.mktemp("written") / "x.mindrecord"
    write_mindrecord(path, "x", {name: _COLUMNS[name][0] for name in names}, rows, **SMALL)
    found = list(MindRecord.open(path).rows())
    assert len(found) == len(rows)
    for ours, theirs in zip(found, rows, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value)


def test_more_rows_than_a_page_holds_go_to_several(tmp_path):
    rows = [{"input_ids": np.arange(i, i + 2000)} for i in range(3000)]  # blob pages by the hundred, raw pages two
    path = tmp_path / "x.mindrecord"
    write_mindrecord(path, "wiki", IDS, rows, **{**SMALL, "header_bytes": 256 << 10})
    record = MindRecord.open(path)
    assert sum(page.is_blob for page in record.pages) > 100
    assert sum(not page.is_blob for page in record.pages) == 2
    assert [row["input_ids"][0] for row in record.rows()] == list(range(3000))
    assert [entry[0] for entry in index_of(path)[1]] == list(range(3000))
    with pytest.raises(PunaError, match="too many pages for its header"):
        write_mindrecord(tmp_path / "y.mindrecord", "wiki", IDS, rows, **SMALL)
    assert [file.name for file in tmp_path.glob("y*")] == []


def test_what_cannot_be_written_is_refused(tmp_path):
    path = tmp_path / "x.mindrecord"
    with pytest.raises(PunaError, match=r"row 0 takes .* bytes; a page holds 32,768"):
        write_mindrecord(path, "x", IDS, [{"input_ids": np.arange(40_000)}], **SMALL)
    with pytest.raises(PunaError, match="there are no rows"):
        write_mindrecord(path, "x", IDS, [], **SMALL)
    with pytest.raises(PunaError, match=r"row 0 has the columns \['ids'\], not \['input_ids'\]"):
        write_mindrecord(path, "x", IDS, [{"ids": np.arange(4)}], **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_is_replaced_and_its_index(tmp_path):
    path = tmp_path / "x.mindrecord"
    write_mindrecord(path, "x", IDS, [{"input_ids": np.arange(4)}] * 3, **SMALL)
    write_mindrecord(path, "x", IDS, [{"input_ids": np.arange(9)}], **SMALL)
    assert [row["input_ids"].tolist() for row in MindRecord.open(path).rows()] == [list(range(9))]
    with pytest.raises(PunaError, match="there are no rows"):
        write_mindrecord(path, "x", IDS, [], **SMALL)
    assert len(list(MindRecord.open(path).rows())) == len(index_of(path)[1]) == 1


@given(cut=st.integers(0, 700), flips=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4))
@settings(max_examples=200)
def test_damage_gives_an_error_or_rows(tmp_path_factory, cut, flips):
    path = tmp_path_factory.getbasetemp() / "fuzz.mindrecord"
    content = bytearray(_small_file(tmp_path_factory))
    used = [*range(600), *range(16 << 10, (16 << 10) + 200), *range(48 << 10, len(content))]
    for place, value in flips:
        content[used[place % len(used)]] = value
    path.write_bytes(content[: len(content) - cut if cut < 100 else cut])
    try:
        record = MindRecord.open(path)
        rows = list(record.rows())
    except PunaError as error:
        assert "fuzz.mindrecord" in str(error)  # noqa: PT017
    else:
        assert sum(np.size(value) for row in rows for value in row.values()) <= 8 * len(content)


_written: list[bytes] = []


def _small_file(factory: pytest.TempPathFactory) -> bytes:
    if not _written:
        path = factory.mktemp("small") / "x.mindrecord"
        schema = {**IDS, "labels": IDS["input_ids"], "n": {"type": "int64"}}
        rows = [{"input_ids": np.arange(9), "labels": np.arange(9) - 100, "n": i} for i in range(3)]
        write_mindrecord(path, "x", schema, rows, **SMALL)
        _written.append(path.read_bytes())
    return _written[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"not a MindRecord file", "is no MindRecord file, or damaged"),
        ((4).to_bytes(8, "little") + b"null", "is no MindRecord file"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "a header of 1,152,921,504,606,846,976 bytes is announced"),
        ((17).to_bytes(8, "little") + b'{"version":"2.0"}', "version '2.0', not 3.0"),
    ],
)
def test_what_is_no_mindrecord_is_said(tmp_path, data, message):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PunaError, match=message):
        MindRecord.open(tmp_path / "x")


@pytest.mark.parametrize("value", [0, 127, 128, 255, 256, 65536, 1 << 33, -1, -32, -33, -129, -40_000, -(1 << 40), 1.5,
                                   0.1, 3.0e300, "", "é" * 20, "x" * 40, "x" * 70_000])  # fmt: skip
def test_single_values_come_and_go(value):
    encoded = messagepack.encode_map({"v": value})
    assert messagepack.decode(encoded) == ({"v": value}, len(encoded))


def test_packed_values_of_other_kinds_are_read():
    assert messagepack.decode(b"\x93\xc0\xc2\xc3")[0] == [None, False, True]
    assert messagepack.decode(b"\xc4\x02hi")[0] == b"hi"
    with pytest.raises(ValueError, match="unknown first byte 0xc1"):
        messagepack.decode(b"\xc1")
    with pytest.raises(ValueError, match="True is neither a number nor a text"):
        messagepack.encode_map({"v": True})


def test_rows_with_labels_become_dialogs_and_masked_ones_are_listed(shared, theirs, tokenizer, tmp_path):
    info = prepare("mindrecord", theirs / "qa512.mindrecord", tmp_path / "qa", tokenizer=tokenizer, workers=1)
    assert (info["documents"], info["fill"], info["left_out"]) == (8, "whole-documents", {"nothing to learn": 4})
    lost = [json.loads(line) for line in (tmp_path / "qa/left_out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lost] == [f"qa512.mindrecord:{row}" for row in (6, 8, 9, 10)]
    rows = np.load(shared / "fixtures/mindspore/preprocess/qa512_rows.npz")
    dataset = Dataset.open(tmp_path / "qa")
    for i, row in enumerate((0, 1, 2, 3, 4, 5, 7, 11)):
        start, stop = int(dataset.starts[i]), int(dataset.starts[i + 1])
        ids, labels = rows["input_ids"][row], rows["labels"][row]
        np.testing.assert_array_equal(dataset.tokens(start, stop), ids[: stop - start])
        assert not ids[stop - start :].any()
        np.testing.assert_array_equal(dataset.is_target(start, stop), labels[: stop - start] != -100)


def test_rows_without_labels_are_cut_into_the_texts_in_them(shared, theirs, tokenizer, tmp_path):
    info = prepare("mindrecord", theirs / "wiki128.mindrecord", tmp_path / "wiki", tokenizer=tokenizer, workers=1)
    rows = np.load(shared / "fixtures/mindspore/preprocess/wiki128_rows.npz")["input_ids"]
    dataset = Dataset.open(tmp_path / "wiki")
    np.testing.assert_array_equal(dataset.tokens(0, rows.size), rows.reshape(-1))
    assert info["fill"] == "end-to-end"
    assert info["documents"] == len(rows) + int((rows[:, 1:] == 1).sum())
    assert all((dataset.document(i)[2][1:] != 1).all() for i in range(len(dataset)))


def test_faithful_rows_stay_whole_and_mask_what_follows_padding(tmp_path, tokenizer):
    ids = np.array([[1, 5, 0, 7, 8, 2], [1, 9, 2, 1, 6, 0]], np.int32)
    write_mindrecord(tmp_path / "x.mindrecord", "wiki", IDS, [{"input_ids": row} for row in ids], **SMALL)
    prepare("mindrecord", tmp_path / "x.mindrecord", tmp_path / "x", tokenizer=tokenizer, workers=1, faithful=True)
    dataset = Dataset.open(tmp_path / "x")
    assert dataset.lengths.tolist() == [6, 6]
    assert dataset.tokens(0, 12).tolist() == ids.reshape(-1).tolist()
    assert np.flatnonzero(~dataset.is_target(0, 12)).tolist() == [3]
    assert dataset.info["fill"] == "whole-documents"


def test_all_shards_of_a_file_are_prepared(theirs, tmp_path, tokenizer):
    source = tmp_path / "source"
    source.mkdir()
    rows = [{"input_ids": np.array([1, 10 + i, 2])} for i in range(3)]
    write_mindrecord(source / "a.mindrecord", "wiki", IDS, rows, **SMALL)
    (source / "a.mindrecord.db").unlink()
    options = {"tokenizer": tokenizer, "workers": 1}
    prepare("mindrecord", source, tmp_path / "out", rebuild_index=True, **options)
    assert (source / "a.mindrecord.db").exists()
    (source / "a.mindrecord").rename(source / "renamed")  # which the original cannot read
    prepare("mindrecord", source / "renamed", tmp_path / "again", **options)
    assert Dataset.open(tmp_path / "again").tokens(0, 9).tolist() == [1, 10, 2, 1, 11, 2, 1, 12, 2]
    lonely = tmp_path / "wiki_3shards.mindrecord0"
    lonely.write_bytes((theirs / lonely.name).read_bytes())
    with pytest.raises(PunaError, match=r"wiki_3shards\.mindrecord1 does not exist"):
        prepare("mindrecord", lonely, tmp_path / "no", **options)


def test_shards_that_are_all_named_are_read_once(theirs, shared, tmp_path):
    shards = [theirs / f"wiki_3shards.mindrecord{i}" for i in range(3)]
    options = {"tokenizer": shared / "data/tokenizer/tokenizer.model", "workers": 1}
    one = prepare("mindrecord", shards[0], tmp_path / "one", **options)
    assert prepare("mindrecord", shards, tmp_path / "all", **options)["shards"] == one["shards"]


def test_rows_that_are_not_ids_of_the_tokenizer_are_left_out(tmp_path, tokenizer):
    schema = {**IDS, "labels": IDS["input_ids"]}
    rows = [{"input_ids": np.array([1, 511]), "labels": np.array([-100, 511])},
            {"input_ids": np.array([1, 512]), "labels": np.array([-100, 512])},
            {"input_ids": np.array([1, -3]), "labels": np.array([-100, -3])},
            {"input_ids": np.array([1, 7]), "labels": np.array([-100, 8])},
            {"input_ids": np.array([1, 7]), "labels": np.array([-100])}]  # fmt: skip
    write_mindrecord(tmp_path / "x.mindrecord", "qa", schema, rows, **SMALL)
    info = prepare("mindrecord", tmp_path / "x.mindrecord", tmp_path / "x", tokenizer=tokenizer, workers=1)
    assert info["left_out"] == {
        "labels of another length": 1, "labels that are not its ids": 1, "not of this vocabulary": 2,
    }  # fmt: skip
    write_mindrecord(tmp_path / "y.mindrecord", "y", {"ids": IDS["input_ids"]}, [{"ids": [1, 2]}], **SMALL)
    with pytest.raises(PunaError, match=r"y\.mindrecord has no column input_ids, only ids"):
        prepare("mindrecord", tmp_path / "y.mindrecord", tmp_path / "y", tokenizer=tokenizer, workers=1)


def test_prepared_text_becomes_the_rows_that_mindformers_makes_of_it(shared, theirs, tokenizer, tmp_path, capsys):
    source = shared / "fixtures/mindspore/preprocess/wiki.train.tokens"
    arguments = ["-o", str(tmp_path / "w"), "--tokenizer", str(tokenizer), "--workers", "1"]
    to = ["--to", "mindrecord", "--sequence-length", "128"]
    for _ in range(2):
        assert run(["prepare", "wikitext", str(source), *arguments, *to]) == 0
    ours, original = (
        MindRecord.open(path) for path in (tmp_path / "w/train.mindrecord", theirs / "wiki128.mindrecord")
    )
    for page, other in zip(ours.pages, original.pages, strict=True):
        assert page == other
        assert ours.bytes(page.start, page.start + page.size_bytes) == original.bytes(
            other.start, other.start + other.size_bytes
        )
    assert "tokens do not fill a row and are left out" in capsys.readouterr().err


def test_rows_of_another_length_are_not_replaced(shared, tokenizer, tmp_path, capsys):
    source = shared / "fixtures/mindspore/preprocess/wiki.train.tokens"
    command = ["prepare", "wikitext", str(source), "-o", str(tmp_path / "w"), "--tokenizer", str(tokenizer)]
    command += ["--workers", "1", "--to", "mindrecord", "--sequence-length"]
    assert run([*command, "128"]) == 0
    before = (tmp_path / "w/train.mindrecord").read_bytes()
    assert run([*command, "64"]) == 1
    said = capsys.readouterr().err
    assert "train.mindrecord exists already with rows of 129 tokens, not sequence_length + 1, which is 65; " in said
    assert (tmp_path / "w/train.mindrecord").read_bytes() == before


def test_prepared_dialogs_become_the_rows_that_mindformers_makes_of_them(shared, tokenizer, tmp_path):
    source = shared / "fixtures/mindspore/preprocess/code_alpaca_tiny.json"
    prepare("chat", source, tmp_path / "c", tokenizer=tokenizer, template="vicuna", workers=1)
    assert write_prepared(tmp_path / "c", tmp_path / "c.mindrecord", 512) == 11
    rows = list(MindRecord.open(tmp_path / "c.mindrecord").rows())
    theirs = np.load(shared / "fixtures/mindspore/preprocess/qa512_rows.npz")
    numbers = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]  # row 6 has an empty answer
    for ours, number in zip(rows, numbers, strict=True):
        if number not in (8, 9, 10):  # which their tool masks
            np.testing.assert_array_equal(ours["input_ids"], theirs["input_ids"][number])
            np.testing.assert_array_equal(ours["labels"], theirs["labels"][number])
        assert (ours["labels"] != -100).any()


@pytest.mark.parametrize(("name", "length", "lost"), [("wiki128", 128, []), ("qa512", 512, [6, 8, 9, 10])])
def test_rows_come_and_go(shared, theirs, tokenizer, tmp_path, name, length, lost):
    prepare("mindrecord", theirs / f"{name}.mindrecord", tmp_path / "x", tokenizer=tokenizer, workers=1)
    write_prepared(tmp_path / "x", tmp_path / "x.mindrecord", length)
    again, rows = (
        MindRecord.open(tmp_path / "x.mindrecord").rows(),
        MindRecord.open(theirs / f"{name}.mindrecord").rows(),
    )
    kept = [row for number, row in enumerate(rows) if number not in lost]
    for ours, original in zip(again, kept, strict=True):
        assert ours.keys() == original.keys()
        for column, values in original.items():
            np.testing.assert_array_equal(ours[column], values)


def test_rows_of_a_length_that_cannot_be_are_refused(theirs, tokenizer, tmp_path):
    prepare("mindrecord", theirs / "wiki128.mindrecord", tmp_path / "w", tokenizer=tokenizer, workers=1)
    with pytest.raises(UsageError, match="sequence_length is 1"):
        write_prepared(tmp_path / "w", tmp_path / "x", 1)
    with pytest.raises(PunaError, match="less than a row of 5,001"):
        write_prepared(tmp_path / "w", tmp_path / "x", 5000)
    arguments = ["-o", str(tmp_path / "w"), "--tokenizer", str(tokenizer), "--to", "tfrecord"]
    assert run(["prepare", "mindrecord", str(theirs / "wiki128.mindrecord"), *arguments]) == 2


def index_of(path: Path) -> tuple[list, list, list[str]]:
    """The content of an index, and its columns."""
    with closing(sqlite3.connect(path.with_name(path.name + ".db"))) as base:
        columns = [f"{name} {type}" for _, name, type, *_ in base.execute("PRAGMA table_info(INDEXES)")]
        return list(base.execute("SELECT * FROM SHARD_NAME")), list(base.execute("SELECT * FROM INDEXES")), columns
