"""Products of int8 weights with activations that a CPU's units for int8 compute, though the activations are not int8.

A row of activations becomes whole numbers of 16 bits (of 24, where it is fp32), and those their digits to the base 256,
which are multiplied as if they were rows of their own. That reads the weights once, as whatever takes rows together:

    x   1.0  -0.5   ->   times 32,382   ->   32,382  -16,191   ->   256 * (126  -63) + (126  -63)

So a row loses at most 1 / 64,764 of its greatest activation, less than rounding the result to bf16 does.
"""

import torch
from torch import Tensor

#: Digits of an activation, by its dtype.
DIGITS = {torch.bfloat16: 2, torch.float32: 3}

#: Greatest first digit. With 127, a quotient that is rounded up could need one digit more.
GREATEST = 126

#: What is added to a digit, which is signed, because the units take unsigned ones.
OFFSET = 128

#: oneDNN wants zero points and takes weights to be without.
NO_ZERO_POINTS = torch.zeros(0, dtype=torch.int64, device="cpu")

#: Rows that are multiplied at once: their digits and products in fp32 are no larger than other parts of a step.
ROWS_AT_ONCE = 128


@torch.no_grad()
def product_by_digits(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Rows times the transposed weight; for inference.

    Args:
        x: (rows, in), of a dtype in `DIGITS`.
        weight: what `torch.ops.onednn.qlinear_prepack` makes of (out, in) int8.
        weight_scale: (out,) fp32.

    Returns:
        (rows, out), in the dtype of `x`.
    """
    if len(x) <= ROWS_AT_ONCE:
        return _product(x, weight, weight_scale)
    return torch.cat([_product(rows, weight, weight_scale) for rows in x.split(ROWS_AT_ONCE)])


def digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Digits of (rows, in) activations, and the greatest of each row.

    Returns:
        (digits, rows, in) uint8, the last digit first, each with `OFFSET` added, and (rows, 1) fp32: `x` is the sum of
        `256**i * (digits[i] - OFFSET)`, times its row's greatest, over `largest_number(x.dtype)`.
    """
    count = DIGITS[x.dtype]
    x = x.float()
    greatest = x.abs().amax(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).smallest_normal)
    numbers = (x / greatest).mul_(_repeated(GREATEST, count)).add_(_repeated(OFFSET, count) + 0.5).int()
    as_bytes = numbers.view(torch.uint8).view(*x.shape, 4)  # the lowest first: there are no such units but Intel's
    return as_bytes[..., :count].permute(2, 0, 1).contiguous(), greatest


def largest_number(dtype: torch.dtype) -> int:
    """The whole number that the greatest activation of a row becomes."""
    return _repeated(GREATEST, DIGITS[dtype])


def _repeated(digit: int, count: int) -> int:
    return sum(digit * 256**i for i in range(count))


def _product(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    found, greatest = digits(x)
    products = torch.ops.onednn.qlinear_pointwise(
        found.flatten(0, 1), 1 / largest_number(x.dtype), OFFSET, weight, weight_scale, NO_ZERO_POINTS, None,
        1.0, 0, torch.float32, "none", [], ""
    ).chunk(len(found))  # fmt: skip
    total = products[0]
    for i in range(1, len(products)):
        total = total.add_(products[i], alpha=256**i)
    return total.mul_(greatest).to(x.dtype)
