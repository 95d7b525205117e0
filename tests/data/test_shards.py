import errno
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.data import shards
from puna.data.shards import Dataset, shard_entry, write_shard
from puna.errors import PunaError

DOCUMENTS = [("a", [5, 6, 7]), ("b", [8]), ("c", [9, 10, 11, 12]), ("d", [13, 14]), ("e", [15, 16, 17])]


def write_dataset(folder: Path, parts, *, dialogs: bool = False) -> Path:
    """A prepared folder with one shard for each list of (id, tokens); in dialogs, odd ids are targets."""
    folder.mkdir(parents=True)
    entries = []
    for number, documents in enumerate(parts):
        path = folder / f"shard-{number:05d}.arrow"
        with write_shard(path, dialogs=dialogs) as writer:
            for id, tokens in documents:
                ids = np.array(tokens, np.int32)
                writer.add(id, "here", ids, ids % 2 == 1 if dialogs else None)
        entries.append(shard_entry(path, writer))
    (folder / "dataset.json").write_text(json.dumps({"format": shards.FORMAT, "shards": entries}))
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two shards, the first of two record batches."""
    monkeypatch.setattr(shards, "BATCH_TOKENS", 4)
    return write_dataset(tmp_path / "data", [DOCUMENTS[:3], DOCUMENTS[3:]], dialogs=True)


def test_documents_come_back_as_they_were_written(folder):
    dataset = Dataset.open(folder)
    found = [dataset.document(i) for i in range(len(dataset))]
    assert [(id, tokens.tolist()) for id, _, tokens in found] == DOCUMENTS
    assert {source for _, source, _ in found} == {"here"}
    assert all(tokens.dtype == np.int32 for _, _, tokens in found)


def test_every_piece_of_the_line_of_tokens_is_that_of_the_documents_end_to_end(folder):
    dataset = Dataset.open(folder)
    line = np.concatenate([tokens for _, tokens in DOCUMENTS])
    for start in range(len(line) + 1):
        for stop in range(start, len(line) + 1):
            assert dataset.tokens(start, stop).tolist() == line[start:stop].tolist()
            assert dataset.is_target(start, stop).tolist() == (line[start:stop] % 2 == 1).tolist()


@given(st.lists(st.lists(st.lists(st.integers(0, 31999), min_size=1, max_size=9), max_size=4), max_size=4))
def test_starts_and_lengths_say_where_documents_are(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("any") / "data"
    dataset = Dataset.open(write_dataset(folder, [[("x", tokens) for tokens in part] for part in parts]))
    documents = [tokens for part in parts for tokens in part]
    assert dataset.lengths.tolist() == [len(tokens) for tokens in documents]
    assert dataset.starts.dtype == np.int64
    assert len(dataset.starts) == len(documents) + 1
    for i, tokens in enumerate(documents):
        assert dataset.tokens(int(dataset.starts[i]), int(dataset.starts[i + 1])).tolist() == tokens


def test_without_dialogs_there_are_no_targets_to_ask_for(tmp_path):
    dataset = Dataset.open(write_dataset(tmp_path / "data", [DOCUMENTS]))
    assert dataset.is_target(0, 5) is None
    assert dataset.info["shards"][0]["targets"] == 13


def test_targets_are_counted(folder):
    assert [shard["targets"] for shard in Dataset.open(folder).info["shards"]] == [4, 3]


def test_a_shard_is_plain_arrow(folder):
    table = pa.ipc.open_file(folder / "shard-00000.arrow").read_all()
    assert table.column_names == ["id", "source", "tokens", "is_target"]
    assert table["tokens"].to_pylist() == [tokens for _, tokens in DOCUMENTS[:3]]
    assert table.schema.field("tokens").type == pa.list_(pa.int32())


def test_a_data_set_travels_to_another_process(folder):
    assert pickle.loads(pickle.dumps(Dataset.open(folder))).tokens(0, 13).tolist() == list(range(5, 18))


def test_tokens_beyond_the_end_are_an_error_not_fewer_tokens(folder):
    with pytest.raises(IndexError, match="which has 13"):
        Dataset.open(folder).tokens(10, 14)


def test_a_cut_off_shard_is_named_when_the_folder_is_opened(folder):
    shard = folder / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(PunaError, match=r"shard-00001\.arrow has .* cut off or damaged; prepare the data again"):
        Dataset.open(folder)


def test_a_missing_shard_is_named(folder):
    (folder / "shard-00000.arrow").unlink()
    with pytest.raises(PunaError, match=r"shard-00000\.arrow is missing"):
        Dataset.open(folder)


def test_a_shard_that_is_not_arrow_is_named_when_it_is_read(folder):
    shard = folder / "shard-00001.arrow"
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(PunaError, match=r"shard-00001\.arrow is not a shard"):
        Dataset.open(folder).tokens(0, 13)


def test_another_folders_shard_of_the_same_size_is_found_out(folder, tmp_path):
    other = write_dataset(tmp_path / "other", [[("x", [1, 2]), ("y", [3])]], dialogs=True)
    shutil.copy(other / "shard-00000.arrow", folder / "shard-00000.arrow")
    info = json.loads((folder / "dataset.json").read_text())
    info["shards"][0]["size_bytes"] = (folder / "shard-00000.arrow").stat().st_size
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(PunaError, match=r"does not hold what dataset\.json says"):
        Dataset.open(folder).tokens(0, 13)


def test_one_changed_byte_is_found_by_verify(folder):
    Dataset.open(folder).verify()
    shard = folder / "shard-00000.arrow"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(PunaError, match=r"shard-00000\.arrow is damaged"):
        Dataset.open(folder).verify()


def test_folders_that_are_not_prepared_say_why(tmp_path):
    with pytest.raises(PunaError, match="does not exist; make it with `puna prepare`"):
        Dataset.open(tmp_path / "nowhere")
    with pytest.raises(PunaError, match=r"is not a prepared folder \(no dataset.json\)"):
        Dataset.open(tmp_path)
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(PunaError, match="is not finished; run the `puna prepare` that makes it again"):
        Dataset.open(tmp_path)


def test_another_format_is_refused(folder):
    (folder / "dataset.json").write_text('{"format": 99, "shards": []}')
    with pytest.raises(PunaError, match="format 1 expected, 99 found"):
        Dataset.open(folder)


def test_an_error_while_writing_leaves_no_shard(tmp_path):
    def write_and_fail():
        with write_shard(tmp_path / "shard.arrow") as writer:
            writer.add("a", "b", np.array([1], np.int32))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path, full_disk):
    with pytest.raises(OSError, match="No space left") as caught, write_shard(tmp_path / "shard.arrow") as writer:
        writer.add("a", "b", np.arange(100_000, dtype=np.int32))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "shard.arrow")


@pytest.fixture
def full_disk(monkeypatch):
    """Everything that shards write goes to a device that is always full."""
    import contextlib

    @contextlib.contextmanager
    def file_on_a_full_disk(path):
        with open("/dev/full", "wb") as file:
            yield file

    monkeypatch.setattr(shards, "file_aside", file_on_a_full_disk)
