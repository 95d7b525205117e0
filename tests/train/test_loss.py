"""The chunked cross-entropy equals the plain one, in value and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.train.loss import IGNORE, reference_cross_entropy, summed_cross_entropy


def _case(rows: int, length: int, ignored: float, dtype: torch.dtype = torch.float32):
    torch.manual_seed(rows * 100 + length)
    hidden = torch.randn(rows, length, 8, dtype=dtype, requires_grad=True)
    head = torch.randn(11, 8, requires_grad=True)
    targets = torch.randint(0, 11, (rows, length))
    targets[torch.rand(rows, length) < ignored] = IGNORE
    return hidden, head, targets


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 17), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([1, 30, 1000]))
def test_loss_and_gradients_equal_the_plain_formula(rows: int, length: int, ignored: float, chunk: int) -> None:
    hidden, head, targets = _case(rows, length, ignored)
    loss = summed_cross_entropy(hidden, head, targets, chunk_logits=chunk)
    grads = torch.autograd.grad(loss * 0.25, (hidden, head))
    expected = reference_cross_entropy(hidden, head, targets)
    expected_grads = torch.autograd.grad(expected * 0.25, (hidden, head))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_the_gradient_of_fp32_weights_under_bf16_activations_is_fp32() -> None:
    hidden, head, targets = _case(2, 9, 0.3, torch.bfloat16)
    grads = torch.autograd.grad(summed_cross_entropy(hidden, head, targets), (hidden, head))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    expected = torch.autograd.grad(reference_cross_entropy(hidden.float(), head, targets), head)[0]
    assert (grads[1] - expected).norm() < 0.02 * expected.norm()


def test_the_sum_does_not_depend_on_the_cut_into_micro_batches() -> None:
    hidden, head, targets = _case(3, 16, 0.6)
    whole = summed_cross_entropy(hidden, head, targets)
    parts = sum(summed_cross_entropy(hidden[i : i + 1], head, targets[i : i + 1]) for i in range(3))
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
