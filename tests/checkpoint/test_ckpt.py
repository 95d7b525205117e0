"""MindSpore's `.ckpt` files: read bit for bit, written byte for byte, and never trusted."""

import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from puna.checkpoint.formats.mindspore import ckpt as module
from puna.checkpoint.formats.mindspore import wire
from puna.checkpoint.formats.mindspore.ckpt import CRC_MARK, open_ckpt, write_ckpt
from puna.checkpoint.tensors import StoredTensor
from puna.errors import PunaError
from puna.testing import PeakAnonymousMemory


@pytest.fixture
def fixtures(shared: Path) -> Path:
    return shared / "fixtures/mindspore/ckpt"


@pytest.mark.parametrize("name", ["tiny_llama_fp32", "tiny_llama_fp16", "tiny_llama_bf16", "train_state_subset"])
def test_a_file_of_mindspore_is_saved_again_byte_for_byte(fixtures, tmp_path, name):
    write_ckpt(tmp_path / "again.ckpt", open_ckpt(fixtures / f"{name}.ckpt"))
    assert (tmp_path / "again.ckpt").read_bytes() == (fixtures / f"{name}.ckpt").read_bytes()


def test_numbers_texts_and_the_checksum_come_and_go(fixtures, tmp_path):
    content = open_ckpt(fixtures / "small_crc.ckpt")
    assert content["w"].read().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (content["b"].dtype, content["b"].read().tolist()) == (torch.bfloat16, [0, 1, 2])
    assert (content["epoch_num"].read().item(), content["loss_scale"].read().item()) == (3, 65536.0)
    assert (content["flag"].read().item(), content["note"]) == (True, "héllo")
    write_ckpt(tmp_path / "again.ckpt", content)
    assert with_crc((tmp_path / "again.ckpt").read_bytes()) == (fixtures / "small_crc.ckpt").read_bytes()


def with_crc(data: bytes) -> bytes:
    return data + CRC_MARK + zlib.crc32(data).to_bytes(10, "big")


def test_a_flipped_bit_under_a_checksum_is_seen(fixtures, tmp_path):
    data = bytearray((fixtures / "small_crc.ckpt").read_bytes())
    data[20] ^= 1
    (tmp_path / "x.ckpt").write_bytes(data)
    with pytest.raises(PunaError, match=r"x\.ckpt is damaged: its checksum is not that of its content"):
        open_ckpt(tmp_path / "x.ckpt")


_SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
_ARRAYS = st.one_of(
    [arrays.arrays(dtype, _SHAPES) for dtype in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]
)


@given(values=st.dictionaries(st.text(min_size=1, max_size=8), st.one_of(_ARRAYS, st.text(max_size=5)), max_size=4),
       message_bytes=st.integers(1, 40))  # fmt: skip
@settings(max_examples=60)
def test_what_is_written_is_read(tmp_path_factory, values, message_bytes):
    path = tmp_path_factory.mktemp("ckpt") / "x.ckpt"
    values = {name: value.rstrip("\0") if isinstance(value, str) else value for name, value in values.items()}
    stored = {
        name: value if isinstance(value, str) else StoredTensor.of(torch.from_numpy(value))
        for name, value in values.items()
    }
    if not stored:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MESSAGE_BYTES", message_bytes)
        write_ckpt(path, stored)
    found = open_ckpt(path)
    assert list(found) == list(values)
    for name, value in values.items():
        if isinstance(value, str):
            assert found[name] == value
        else:
            assert found[name].shape == value.shape
            assert found[name].read().numpy().tobytes() == value.tobytes()


def test_a_large_tensor_is_written_in_messages_of_one_tag(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MESSAGE_BYTES", 16)
    write_ckpt(tmp_path / "x.ckpt", {"w": StoredTensor.of(torch.arange(10, dtype=torch.float32))})
    data = (tmp_path / "x.ckpt").read_bytes()
    sizes = [stop - start for _, _, start, stop in wire.fields(data, 0, len(data))]
    assert len(sizes) == 3  # 16, 16 and 8 bytes of content
    assert sizes[0] == sizes[1] == sizes[2] + 8
    assert open_ckpt(tmp_path / "x.ckpt")["w"].read().tolist() == list(range(10))


def test_parts_of_unequal_size_are_joined(tmp_path):
    """As `np.array_split` makes them, with `async_save`."""
    values = torch.arange(15, dtype=torch.int32).view(5, 3)
    data = b"".join(
        module._head("w", [5, 3], "Int32", part.nbytes) + part.numpy().tobytes() for part in values.tensor_split(2)
    )
    (tmp_path / "x.ckpt").write_bytes(data)
    stored = open_ckpt(tmp_path / "x.ckpt")["w"]
    assert torch.equal(stored.read(), values)
    assert torch.equal(stored.rows(2, 4), values[2:4])


def test_one_number_as_old_files_spell_it(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(module._head("n", [0], "Int32", 4) + (7).to_bytes(4, "little"))
    stored = open_ckpt(tmp_path / "x.ckpt")["n"]
    assert (stored.shape, stored.read().item()) == ((), 7)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 something else", "is no checkpoint of MindSpore"),
        (module._head("w", [4], "Float32", 16) + bytes(15), "announced"),
        (module._head("w", [5], "Float32", 16) + bytes(16), r"w of shape \(5,\) and type Float32 has 16 bytes"),
        (module._head("w", [4], "Int4", 4) + bytes(4), "w is stored as 'Int4', which puna does not read"),
        (module._head("w", [1] * 9, "Int8", 1) + bytes(1), "more than 8 dims"),
        (module._head("w", [1 << 62, 4], "Int8", 0), "has 0 bytes; the file is damaged"),
        (2 * (module._head("a", [1], "Int8", 1) + bytes(1) + module._head("b", [1], "Int8", 1) + bytes(1)), "a twice"),
        (wire.counted_field(1, wire.counted_field(1, b"w")), "lacks its name or its values"),
        (wire.counted_field(1, [wire.counted_field(1, b"w"), wire.counted_field(3, b"")]), "embeddings that grows"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "9,223,372,036,854,775,807 bytes are announced"),
        (b"\x0a" + b"\xff" * 20, "does not end"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path, data, message):
    (tmp_path / "x.ckpt").write_bytes(data)
    with pytest.raises(PunaError, match=message):
        open_ckpt(tmp_path / "x.ckpt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PunaError, match=r"gone\.ckpt does not exist"):
        open_ckpt(tmp_path / "gone.ckpt")


def test_a_dtype_that_mindspore_has_not_is_refused(tmp_path):
    with pytest.raises(PunaError, match=r"w: MindSpore has no dtype torch\.complex64"):
        write_ckpt(tmp_path / "x.ckpt", {"w": StoredTensor.of(torch.ones(2, dtype=torch.complex64))})
    assert not list(tmp_path.iterdir())


def _small() -> bytes:
    head = module._head("model.w", [2, 3], "Float16", 12)
    return with_crc(head + bytes(range(12)) + module._head("s", [], "Int64", 8) + bytes(8))


@given(cut=st.integers(0, len(_small())), flips=st.lists(st.integers(0, 8 * len(_small()) - 1), max_size=4),
       insert=st.binary(max_size=12))  # fmt: skip
@settings(max_examples=300)
def test_damage_gives_an_error_or_tensors_never_more(tmp_path_factory, cut, flips, insert):
    data = bytearray(_small())
    for bit in flips:
        data[bit // 8] ^= 1 << bit % 8
    data[cut:cut] = insert
    for content in (bytes(data), bytes(data[:cut])):
        path = tmp_path_factory.getbasetemp() / "fuzz.ckpt"
        path.write_bytes(content)
        try:
            found = open_ckpt(path)
        except PunaError as error:
            assert "fuzz.ckpt" in str(error)  # noqa: PT017
        else:
            assert sum(x.read().nbytes for x in found.values() if not isinstance(x, str)) <= len(content)


def test_reading_takes_the_memory_of_a_piece(tmp_path):
    size = 300_000_000
    with open(tmp_path / "x.ckpt", "wb") as file:
        file.write(module._head("w", [size // 1000, 1000], "Int8", size))
        file.truncate(file.tell() + size)
    stored = open_ckpt(tmp_path / "x.ckpt")["w"]
    with PeakAnonymousMemory() as memory:
        rows = sum(len(piece) for piece in stored.pieces())
    assert rows == size // 1000
    assert memory.grown_bytes < 200_000_000
