"""Values that lie in files are copied from file to file by the system, and read and written where it cannot."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.checkpoint.formats.mindspore.ckpt import open_ckpt, write_ckpt
from puna.checkpoint.tensors import Extent, StoredTensor, open_safetensors, rounded, write_pickled, write_safetensors
from puna.errors import PunaError

TENSORS = {
    "matrix": torch.randn(300, 70, generator=torch.Generator().manual_seed(0)),
    "odd": torch.arange(7, dtype=torch.uint8),
    "half": torch.randn(33, dtype=torch.float32).half(),
    "number": torch.tensor(5),
    "nothing": torch.empty(0, 4),
}


@pytest.fixture
def sent(monkeypatch):
    """Sizes of what the system was asked to copy."""
    sizes = []
    real = os.sendfile

    def sendfile(target, source, start, size):
        sizes.append(size)
        return real(target, source, start, size)

    monkeypatch.setattr(os, "sendfile", sendfile)
    return sizes


@pytest.fixture
def source(tmp_path):
    save_file(TENSORS, tmp_path / "source.safetensors")
    return open_safetensors(tmp_path / "source.safetensors")


@pytest.mark.parametrize("piece", [1 << 23, 1000])
def test_stored_bytes_are_copied_by_the_system(source, tmp_path, sent, monkeypatch, piece):
    monkeypatch.setattr("puna.checkpoint.tensors.COPIED_BYTES", piece)
    write_safetensors(tmp_path / "copy", source)
    assert_written(load_file(tmp_path / "copy"))
    assert sum(sent) == sum(values.nbytes for values in TENSORS.values())
    assert max(sent) <= piece


@pytest.mark.parametrize("name", ["a", "ab", "abc", "abcd"])
def test_values_are_aligned_in_a_mapped_file(source, tmp_path, name):
    written = {name: StoredTensor.of(torch.zeros(3, dtype=torch.int8)), **source}
    write_safetensors(tmp_path / "copy", written)
    content = (tmp_path / "copy").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in written.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0


def test_between_tensors_in_memory_and_between_other_bytes(source, tmp_path, sent):
    mixed = {**source, "matrix": StoredTensor.of(TENSORS["matrix"]), **rounded({"half": source["half"]}, torch.float32)}
    write_safetensors(tmp_path / "copy", mixed)
    written = load_file(tmp_path / "copy")
    assert torch.equal(written.pop("half"), TENSORS["half"].float())
    assert_written(written, but="half")
    write_pickled(tmp_path / "copy.bin", source)
    assert_written(torch.load(tmp_path / "copy.bin"))
    assert len(sent) == 2 + 4


def test_values_of_a_ckpt_lie_in_several_messages(source, tmp_path, sent, monkeypatch):
    monkeypatch.setattr("puna.checkpoint.formats.mindspore.ckpt.MESSAGE_BYTES", 5000)
    write_ckpt(tmp_path / "x.ckpt", source)
    write_safetensors(tmp_path / "copy", open_ckpt(tmp_path / "x.ckpt"))
    assert_written(load_file(tmp_path / "copy"))
    assert sent.count(5000) == 16


@pytest.mark.parametrize("refused", [errno.EINVAL, errno.EXDEV])
@pytest.mark.parametrize("first_sent", [0, 1])
def test_where_the_system_does_not_copy_values_are_read(source, tmp_path, monkeypatch, refused, first_sent):
    real, calls = os.sendfile, []

    def sendfile(target, source, start, size):
        calls.append(size)
        if len(calls) <= first_sent:
            return real(target, source, start, min(size, 11))
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(os, "sendfile", sendfile)
    write_safetensors(tmp_path / "copy", source)
    assert calls
    assert_written(load_file(tmp_path / "copy"))


def test_a_full_disk_is_an_error(source, tmp_path, monkeypatch):
    def sendfile(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "sendfile", sendfile)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(tmp_path / "copy", source)
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


@pytest.mark.parametrize("rows", [slice(None), slice(1, 2), slice(0, 2), slice(1, None), slice(5, 9)])
def test_a_part_read_alone_is_that_of_the_whole(source, rows):
    for name, values in TENSORS.items():
        for columns in (slice(None), slice(1, 3)):
            index = (rows, columns)[: values.ndim]
            part = source[name].part(index)
            assert torch.equal(part.read(), values[index]), (name, index)
            assert torch.equal(source[name][index], values[index])
            assert (part.shape, part.dtype) == (tuple(values[index].shape), values.dtype)


def test_a_file_that_was_cut_meanwhile_is_named(source, tmp_path):
    os.truncate(tmp_path / "source.safetensors", 5000)
    with pytest.raises(PunaError, match=r"source\.safetensors is cut off"):
        write_safetensors(tmp_path / "copy", source)
    with pytest.raises(PunaError, match=r"source\.safetensors is cut off"):
        _ = source["matrix"][slice(1, None), slice(None)]


def test_fewer_bytes_than_promised_are_refused(source, tmp_path):
    place = Extent(str(tmp_path / "source.safetensors"), 0, 8)
    with pytest.raises(ValueError, match="odd was to have 7 bytes, came with 8"):
        write_safetensors(tmp_path / "copy", {"odd": replace(source["odd"], extents=lambda: [place])})


def assert_written(written, but=None):
    expected = {name: values for name, values in TENSORS.items() if name != but}
    assert written.keys() == expected.keys()
    for name, values in expected.items():
        assert written[name].dtype == values.dtype
        assert torch.equal(written[name], values), name


def test_a_file_that_the_system_does_not_map_is_not_called_damaged(tmp_path):
    allowed = Path("/proc/sys/vm/overcommit_memory")
    if not allowed.exists() or allowed.read_text().strip() == "1":
        pytest.skip("the system maps files of any size")
    size = 1 << 42
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(path := tmp_path / "large.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + size)  # nothing of it lies on the disk
        except OSError as error:
            pytest.skip(f"no file is so large here: {error}")
    with pytest.raises(PunaError, match=r"does not map .*large.safetensors .*overcommit_memory=1, or .*several files"):
        open_safetensors(path)
