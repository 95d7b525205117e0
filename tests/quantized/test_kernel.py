"""The kernel for int4: its order of codes, and that its products are those of the dequantised weight."""

import copy

import pytest
import torch

from puna.quantized import kernel as module
from puna.quantized.kernel import INPUTS, TILE, in_tiles, kernel
from puna.quantized.schemes import int4

needs_kernel = pytest.mark.skipif(kernel() is None, reason="no AVX-512 VNNI, or no C compiler")


def packed(weight, group, dtype=torch.bfloat16):
    """A layer that holds `weight`, packed; and its weight, dequantised."""
    layer = int4.Linear(weight.shape[1], weight.shape[0], False, group)
    stored = int4.Linear.quantize(weight, group)
    for name, values in stored.items():
        setattr(layer, name, values)
    layer.pack(dtype)
    return layer, int4.Linear.dequantize(stored)


def relative_error(values, true):
    return float((values.double() - true).norm() / true.norm())


@pytest.fixture
def new_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel.cache_clear()
    yield tmp_path / "puna"
    kernel.cache_clear()


def test_codes_lie_where_the_kernel_reads_them():
    codes = torch.randint(0, 16, (2 * TILE, 3 * INPUTS), dtype=torch.uint8)
    tiles = in_tiles(codes)
    assert tiles.shape == (2, 3, TILE, 4)
    for tile, block, output, byte in [(0, 0, 0, 0), (1, 2, 5, 3), (1, 0, 15, 1)]:
        row, first = codes[tile * TILE + output], block * INPUTS + byte
        assert tiles[tile, block, output, byte] == row[first] | row[first + 4] << 4


@needs_kernel
@pytest.mark.parametrize("group", int4.Linear.GROUP_SIZES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, int4.KERNEL_ROWS + 1])
def test_a_product_is_that_of_the_dequantised_weight(rows, group):
    layer, weight = packed(torch.randn(48, 384), group)
    assert layer._is_in_tiles
    x = torch.randn(rows, 384).bfloat16()
    out = layer(x)
    assert (out.shape, out.dtype) == ((rows, 48), torch.bfloat16)
    assert relative_error(out, x.double() @ weight.double().t()) < 4e-3


@needs_kernel
def test_a_channel_much_greater_than_all_others_drowns_none():
    layer, weight = packed(torch.randn(64, 512), 64)
    x = torch.randn(4, 512).bfloat16()
    x[:, 7] *= 300
    assert relative_error(layer(x), x.double() @ weight.double().t()) < 4e-3


@needs_kernel
def test_the_dequantised_weight_is_the_references_to_the_last_bit_of_bf16():
    layer, weight = packed(torch.randn(64, 256), 64)
    found = kernel().transposed_weight(layer.packed, *layer.scales_and_zeros)
    assert torch.equal(found.t(), weight.bfloat16())


@needs_kernel
def test_a_row_does_not_depend_on_those_beside_it():
    layer, _ = packed(torch.randn(64, 256), 64)
    x = torch.randn(9, 256).bfloat16()
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


@needs_kernel
def test_a_packed_layer_can_be_copied():
    layer, _ = packed(torch.randn(16, 64), 64)
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@needs_kernel
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_what_is_not_a_number_does_not_become_one(odd):
    layer, _ = packed(torch.randn(16, 64), 64)
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    x[1, 3] = odd
    out = layer(x)
    assert out[0].isfinite().all()
    assert not out[1].isfinite().any()
    assert torch.equal(layer(torch.zeros(1, 64, dtype=torch.bfloat16)), torch.zeros(1, 16, dtype=torch.bfloat16))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_what_the_kernel_does_not_know_goes_without_it(dtype):
    layer, weight = packed(torch.randn(64, 128), 64, dtype)
    assert not layer._is_in_tiles
    x = torch.randn(3, 128)
    assert relative_error(layer(x), x.double() @ weight.double().t()) < 1e-5


@needs_kernel
def test_it_is_made_once_and_found_again(new_cache, monkeypatch):
    assert kernel() is not None
    (library,) = new_cache.iterdir()
    made = library.stat().st_mtime_ns
    kernel.cache_clear()
    monkeypatch.setattr(module.subprocess, "run", None)  # not called
    assert kernel() is not None
    assert library.stat().st_mtime_ns == made


def test_without_a_compiler_there_is_none(new_cache, monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert kernel() is None


def test_a_compiler_that_fails_leaves_nothing(new_cache, monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: "false")
    assert kernel() is None
    assert not list(new_cache.glob("*"))
