"""The kernel of layers in bf16: each operation against the network's plain one, to the last bit where sums allow."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.model.config import preset
from puna.model.layer_kernel import MOST_ROWS, TILE, kernel
from puna.model.llama import Linear, RMSNorm, rotary_frequencies, rotary_tables, rotate
from puna.model.packed import PackedLinear, _gains, in_tile

needs_kernel = pytest.mark.skipif(kernel() is None, reason="no AVX-512 BF16, or no C compiler")


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).bfloat16()


def packed(weight: Tensor) -> PackedLinear:
    linear = Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return PackedLinear(linear)


def test_a_tile_holds_two_inputs_of_all_outputs_then_the_next_two() -> None:
    rows = random(3, 70)
    tile = in_tile(rows).view(torch.bfloat16).view(-1, TILE, 2)
    assert len(tile) == 48  # the width padded to 96, by two
    assert torch.equal(tile[0, :3], rows[:, :2])
    assert torch.equal(tile[34, :3], rows[:, 68:70])
    assert not tile[35:].any()
    assert not tile[:, 3:].any()


@needs_kernel
@pytest.mark.skipif(not _gains(random(1, 1)), reason="weights are not packed here")
@pytest.mark.parametrize("shape", [(64, 64), (200, 96), (2, 2), (130, 514)], ids=str)
def test_products_of_few_rows_are_the_kernels(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(*shape)
    layer = packed(weight)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)  # not called
    for rows in (1, 2, 5, 6, 7, 12, MOST_ROWS):
        x = random(rows, shape[1])
        expected = x.double() @ weight.double().t()
        assert (layer(x) - expected).norm() <= 3e-3 * expected.norm()


@needs_kernel
def test_a_row_of_a_product_does_not_depend_on_those_beside_it() -> None:
    layer, x = packed(random(96, 384)), random(MOST_ROWS, 384)
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


@needs_kernel
def test_what_is_not_a_number_in_a_product_does_not_become_one() -> None:
    layer, x = packed(random(64, 64)), random(2, 64)
    x[1, 3] = torch.nan
    out = layer(x)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 7, 100), (1, 50, 2048)], ids=str)
@torch.no_grad()
def test_norms_are_the_networks(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(shape[-1], 1e-5).bfloat16()
    norm.weight.copy_(random(shape[-1]))
    x = random(*shape, scale=3.0)
    found, expected = kernel().rms_norm(x, norm.weight, torch.tensor(norm.eps)), norm(x)
    assert (found == expected).float().mean() > 0.99  # sums in another order now and then round another way
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


@needs_kernel
@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("tokens", [1, 300])
def test_rotations_are_the_networks(heads: int, tokens: int) -> None:
    config = preset("tiny-64")
    positions = torch.arange(1, tokens + 1)[None] * 31
    x, tables = random(1, tokens, heads, config.head_dim), rotary_tables(positions, config)
    expected = rotate(x, *tables)
    assert not torch.equal(x, expected)
    assert torch.equal(kernel().rotate_(x.clone(), *tables), expected)


@needs_kernel
@pytest.mark.parametrize("count", [1, 1000, 50_000])
def test_gates_are_the_networks(count: int) -> None:
    gate, up = random(count, scale=8.0), random(count)
    found, expected = kernel().swiglu_(gate.clone(), up), F.silu(gate) * up
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-30)
    assert (found == expected).float().mean() > 0.99


@needs_kernel
@pytest.mark.parametrize("count", [1, 1000, 50_000])
def test_sums_are_torchs(count: int) -> None:
    x, y = random(count), random(count, scale=30.0)
    y[0] = torch.nan
    torch.testing.assert_close(kernel().add(x, y), x + y, rtol=0, atol=0, equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}])
def test_rotary_tables_are_the_networks(scaling: dict[str, object] | None) -> None:
    config = replace(preset("tiny-64"), rope_scaling=scaling)
    positions = torch.arange(100).view(2, 50) * 1777
    found = kernel().rotary_tables(positions, rotary_frequencies(config))
    for table, expected in zip(found, rotary_tables(positions, config), strict=True):
        torch.testing.assert_close(table, expected, rtol=2**-23, atol=1e-9)


@needs_kernel
def test_rows_are_taken_and_put_where_places_say() -> None:
    x, places = random(9, 70), torch.tensor([[3, 0], [8, 3]])
    assert torch.equal(kernel().take_rows(x, places), x[places])
    out, expected = random(20, 70), random(20, 70)
    kernel().put_rows(x, torch.arange(18, 0, -2), out)
    expected[torch.arange(18, 0, -2)] = x
    assert torch.equal(out, expected)


@needs_kernel
def test_a_row_that_is_not_there_is_no_number() -> None:
    found = kernel().take_rows(random(9, 70), torch.tensor([8, 9, -1]))
    assert found.isnan().all(1).tolist() == [False, True, True]
