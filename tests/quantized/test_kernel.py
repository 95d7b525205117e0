"""The kernel for int8 and int4: its order of codes, and that its products are those of the dequantised weight."""

import copy

import pytest
import torch

from puna.quantized import kernel as module
from puna.quantized.kernel import HEADER, KERNEL_ROWS, MOST_INPUTS, TILE, in_blocks, kernel
from puna.quantized.schemes import int4, int8

needs_kernel = pytest.mark.skipif(kernel() is None, reason="no AVX-512 VNNI, or no C compiler")


#: Scheme and group size.
KINDS = [(int8.Linear, None), *((int4.Linear, size) for size in int4.Linear.GROUP_SIZES)]
each_scheme = pytest.mark.parametrize(("scheme", "group"), KINDS[:2], ids=["int8", "int4"])


def packed(weight, scheme, group, dtype=torch.bfloat16):
    """A layer that holds `weight`, packed; and its weight, dequantised."""
    layer = scheme(weight.shape[1], weight.shape[0], False, group)
    stored = scheme.quantize(weight, group)
    for name, values in stored.items():
        setattr(layer, name, values)
    layer.pack(dtype)
    return layer, scheme.dequantize(stored)


def relative_error(values, true):
    return float((values.double() - true).norm() / true.norm())


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_lie_where_the_kernel_reads_them(bits):
    codes = torch.randint(0, 2**bits, (2 * TILE, 3 * 16), dtype=torch.uint8)
    scales, zeros = torch.randn(2, 2 * TILE, 3).bfloat16()
    blocks = in_blocks(codes, scales, zeros, bits)
    assert blocks.shape == (2, 3, HEADER + TILE * 16 * bits // 8)
    for tile, group, output, i in [(0, 0, 0, 0), (1, 2, 5, 3), (1, 0, 31, 12), (0, 1, 17, 7)]:
        header, content = blocks[tile, group].split([HEADER, TILE * 16 * bits // 8])
        row = tile * TILE + output
        assert header.view(torch.bfloat16).view(2, TILE)[:, output].tolist() == [scales[row, group], zeros[row, group]]
        if bits == 4:
            byte = content.view(2, TILE, 4)[i // 8, output, i % 4] >> (4 if i % 8 >= 4 else 0) & 15
        else:
            byte = content.view(4, TILE, 4)[i // 4, output, i % 4]
        assert byte == codes[row, group * 16 + i]


@needs_kernel
@pytest.mark.parametrize(("scheme", "group"), KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, KERNEL_ROWS + 1])
def test_a_product_is_that_of_the_dequantised_weight(rows, scheme, group):
    layer, weight = packed(torch.randn(48, 384), scheme, group)
    assert layer.is_in_blocks
    x = torch.randn(rows, 384).bfloat16()
    out = layer(x)
    assert (out.shape, out.dtype, out.is_contiguous()) == ((rows, 48), torch.bfloat16, True)
    assert relative_error(out, x.double() @ weight.double().t()) < 4e-3


@needs_kernel
@each_scheme
def test_a_channel_much_greater_than_all_others_drowns_none(scheme, group):
    layer, weight = packed(torch.randn(64, 512), scheme, group)
    x = torch.randn(4, 512).bfloat16()
    x[:, 7] *= 300
    assert relative_error(layer(x), x.double() @ weight.double().t()) < 4e-3


@needs_kernel
@each_scheme
def test_the_dequantised_weight_is_the_references_to_the_last_bit_of_bf16(scheme, group):
    layer, weight = packed(torch.randn(48, 256), scheme, group)
    found = kernel().transposed_weight(layer.weight, 256)
    assert torch.equal(found.t()[:48], weight.bfloat16())
    assert not found.t()[48:].any()  # what lacks of a tile


@needs_kernel
@each_scheme
def test_a_row_does_not_depend_on_those_beside_it(scheme, group):
    layer, _ = packed(torch.randn(64, 256), scheme, group)
    x = torch.randn(9, 256).bfloat16()
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


@needs_kernel
@each_scheme
def test_a_packed_layer_can_be_copied(scheme, group):
    layer, _ = packed(torch.randn(16, 64), scheme, group)
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@needs_kernel
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_sums_do_not_overflow(bits):
    codes = torch.full((TILE, MOST_INPUTS), 2**bits - 1, dtype=torch.uint8)
    blocks = in_blocks(codes, torch.ones(TILE, 1).bfloat16(), torch.ones(TILE, 1).bfloat16(), bits)
    x = torch.ones(1, MOST_INPUTS, dtype=torch.bfloat16)
    for sign in (1, -1):
        expected = torch.full((1, TILE), sign * MOST_INPUTS * 2.0 ** (bits - 1))
        assert torch.allclose(kernel().product(sign * x, blocks, TILE).float(), expected, rtol=4e-3)


@needs_kernel
@each_scheme
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_what_is_not_a_number_does_not_become_one(scheme, group, odd):
    layer, _ = packed(torch.randn(16, 64), scheme, group)
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    x[1, 3] = odd
    out = layer(x)
    assert out[0].isfinite().all()
    assert not out[1].isfinite().any()
    assert torch.equal(layer(torch.zeros(1, 64, dtype=torch.bfloat16)), torch.zeros(1, 16, dtype=torch.bfloat16))


@needs_kernel
@each_scheme
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_what_the_kernel_does_not_know_goes_without_it(scheme, group, dtype):
    layer, weight = packed(torch.randn(64, 128), scheme, group, dtype)
    assert not layer.is_in_blocks
    x = torch.randn(3, 128)
    assert relative_error(layer(x), x.double() @ weight.double().t()) < 1e-5


@pytest.mark.parametrize("missing", ["has_int8_units", "library"])
def test_without_units_or_a_compiler_there_is_none(monkeypatch, missing):
    monkeypatch.setattr(module, missing, lambda *_: None)
    kernel.cache_clear()
    assert kernel() is None
    kernel.cache_clear()
