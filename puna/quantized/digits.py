"""Products of int8 weights with activations that a CPU's units for int8 compute, though the activations are not int8.

A row of activations becomes whole numbers of 16 bits (of 24, where it is fp32), and those their digits to the base 256,
which are multiplied as if they were rows of their own. That reads the weights once, as whatever takes rows together:

    x   1.0  -0.5   ->   scale 1 / 32,382   ->   32,382  -16,191   ->   256 * (126  -63) + (126  -63)

So a row loses at most 1 / 64,764 of its greatest activation, less than rounding the result to bf16 does.
"""

import torch
from torch import Tensor

#: Digits of an activation, by its dtype.
DIGITS = {torch.bfloat16: 2, torch.float32: 3}

#: Greatest first digit. With 127, a quotient that is rounded up could need one digit more.
GREATEST = 126

#: Rows that are multiplied at once: their digits and products in fp32 are no larger than other parts of a step.
ROWS_AT_ONCE = 128


def product_by_digits(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Rows times the transposed weight.

    Args:
        x: (rows, in), of a dtype in `DIGITS`.
        weight: what `torch.ops.onednn.qlinear_prepack` makes of (out, in) int8.
        weight_scale: (out, 1) fp32.

    Returns:
        (rows, out), in the dtype of `x`.
    """
    no_zero_points = torch.zeros(len(weight_scale), dtype=torch.int64)
    scales = weight_scale.view(-1)
    return torch.cat([_product(rows, weight, scales, no_zero_points) for rows in x.split(ROWS_AT_ONCE)])


def digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Digits of (rows, in) activations, each 128 more than it stands for, and the rows' scales.

    Returns:
        (digits, rows, in) uint8, the last digit first, and (rows, 1) fp32:
        `x` is the sum of `256**i * (digits[i] - 128)`, times its row's scale.
    """
    count = DIGITS[x.dtype]
    ones = sum(256**i for i in range(count))
    greatest = x.abs().amax(dim=1, keepdim=True).float()
    scale = (greatest / (GREATEST * ones)).clamp_min(torch.finfo(torch.float32).tiny)
    numbers = x.float().mul(1 / scale).round_().int().add_(128 * ones)
    found = torch.empty(count, *x.shape, dtype=torch.uint8)
    for i, digit in enumerate(found):
        digit.copy_(numbers >> 8 * i)  # keeps the lowest 8 bits
    return found, scale


def _product(x: Tensor, weight: Tensor, weight_scales: Tensor, weight_zeros: Tensor) -> Tensor:
    rows, scale = digits(x)
    products = torch.ops.onednn.qlinear_pointwise(
        rows.flatten(0, 1), 1.0, 128, weight, weight_scales, weight_zeros, None, 1.0, 0, torch.float32, "none", [], ""
    ).unflatten(0, (len(rows), -1))
    total = products[0]
    for i in range(1, len(products)):
        total = total.add_(products[i], alpha=256**i)
    return total.mul_(scale).to(x.dtype)
