"""Activations as digits: what they stand for, and that products by digits are those of the activations."""

import pytest
import torch

from puna.devices import has_int8_units
from puna.quantized.digits import DIGITS, OFFSET, ROWS_AT_ONCE, digits, largest_number, product_by_digits

needs_units = pytest.mark.skipif(not has_int8_units(), reason="this CPU has no units for int8")


def value(x):
    """The activations that the digits of `x` stand for, in fp64."""
    found, greatest = digits(x)
    numbers = sum(256.0**i * (digit.double() - OFFSET) for i, digit in enumerate(found))
    return numbers * greatest.double() / largest_number(x.dtype)


def random_rows(rows, width, dtype):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 15), (torch.float32, 22)], ids=str)
def test_digits_stand_for_their_row_to_a_part_of_its_greatest(dtype, bits):
    x = random_rows(50, 300, dtype) * torch.logspace(-20, 20, 50)[:, None].to(dtype)
    error = (value(x) - x.double()).abs()
    assert (error <= 2.0**-bits * x.double().abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", DIGITS, ids=str)
def test_the_greatest_of_a_row_has_no_digit_too_many(dtype):
    """Whatever it is: quotients are rounded."""
    x = (1 + torch.arange(4096.0)[:, None] / 4096).to(dtype) * torch.tensor([1.0, -1.0]).to(dtype)
    assert torch.allclose(value(x), x.double(), rtol=1e-4 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("dtype", DIGITS, ids=str)
def test_zeros_stay_zeros(dtype):
    assert torch.equal(value(torch.zeros(2, 8, dtype=dtype)), torch.zeros(2, 8).double())


@needs_units
@pytest.mark.parametrize("rows", [1, 5, ROWS_AT_ONCE + 3])
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 3e-3), (torch.float32, 1e-6)], ids=str)
def test_a_product_by_digits_is_that_of_the_activations(rows, dtype, most):
    weight = torch.randint(-127, 128, (96, 320), dtype=torch.int8)
    scale = torch.rand(96) + 0.5
    x = random_rows(rows, 320, dtype)
    x[:, 7] *= 300  # as activations of language models are: one channel much greater than all others
    expected = x.double() @ weight.double().t() * scale.double()
    out = product_by_digits(x, torch.ops.onednn.qlinear_prepack(weight, None), scale)
    assert out.dtype == dtype
    assert float((out.double() - expected).norm() / expected.norm()) < most


@needs_units
def test_activations_may_come_from_where_gradients_are_recorded():
    weight = torch.randint(-127, 128, (32, 64), dtype=torch.int8)
    packed, scale = torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(32)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(
        product_by_digits(x.clone().requires_grad_(), packed, scale), product_by_digits(x, packed, scale)
    )


@needs_units
def test_the_largest_sums_do_not_overflow():
    width = 28672  # of the 70B model's down projection
    weight = torch.full((16, width), 127, dtype=torch.int8)
    x = torch.ones(1, width, dtype=torch.bfloat16)
    out = product_by_digits(x, torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(16))
    assert torch.allclose(out.float(), torch.full((1, 16), 127.0 * width), rtol=4e-3)


@needs_units
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_what_is_not_a_number_does_not_become_one(odd):
    weight = torch.ones(16, 32, dtype=torch.int8)
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    x[1, 3] = odd
    out = product_by_digits(x, torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(16))
    assert out[0].isfinite().all()
    assert not out[1].isfinite().any()
