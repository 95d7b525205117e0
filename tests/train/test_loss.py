"""The chunked cross-entropy equals the plain one, in value and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.train import loss as loss_module
from puna.train import loss_kernel
from puna.train.loss import IGNORE, reference_cross_entropy, summed_cross_entropy


def _case(rows: int, length: int, ignored: float, dtype: torch.dtype = torch.float32):
    torch.manual_seed(rows * 100 + length)
    hidden = torch.randn(rows, length, 8, dtype=dtype, requires_grad=True)
    head = torch.randn(11, 8, requires_grad=True)
    targets = torch.randint(0, 11, (rows, length))
    targets[torch.rand(rows, length) < ignored] = IGNORE
    return hidden, head, targets


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 17),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    chunk=st.sampled_from([1, 30, 1000]),
    piece=st.sampled_from([1, 25, 1000]),
)
def test_loss_and_gradients_equal_the_plain_formula(
    rows: int, length: int, ignored: float, chunk: int, piece: int
) -> None:
    hidden, head, targets = _case(rows, length, ignored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss_module.PIECE, "cpu", piece)
        loss = summed_cross_entropy(hidden, head, targets, scale=1 / 7, chunk_logits=chunk)
    grads = torch.autograd.grad(loss * 0.25, (hidden, head))
    expected = reference_cross_entropy(hidden, head, targets) / 7
    expected_grads = torch.autograd.grad(expected * 0.25, (hidden, head))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_the_gradient_of_fp32_weights_under_bf16_activations_is_fp32() -> None:
    hidden, head, targets = _case(2, 9, 0.3, torch.bfloat16)
    grads = torch.autograd.grad(summed_cross_entropy(hidden, head, targets), (hidden, head))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    expected = torch.autograd.grad(reference_cross_entropy(hidden.float(), head, targets), head)[0]
    assert (grads[1] - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("has_kernel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_targets", [1019, 130_561])  # in bf16, 1 / n is 0.29 and 0.39 % too large
def test_gradients_in_bf16_are_neither_longer_nor_shorter_than_they_should_be(
    n_targets: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, *, has_kernel: bool
) -> None:
    if not has_kernel:
        monkeypatch.setattr(loss_module, "kernel_for", lambda *_: None)
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 1000, 64).bfloat16(), (torch.randn(512, 64) / 8).bfloat16()
    targets = torch.randint(0, 512, (1, 1000))
    exact = hidden.double().requires_grad_(), head.double().requires_grad_()
    ours = hidden.requires_grad_(), head.to(dtype).requires_grad_()
    summed_cross_entropy(*ours, targets, scale=1 / n_targets, chunk_logits=512 * 256).backward()
    (
        F.cross_entropy((exact[0] @ exact[1].t()).flatten(0, 1), targets.flatten(), reduction="sum") / n_targets
    ).backward()
    for x, true in zip(ours, exact, strict=True):
        assert x.grad is not None
        assert true.grad is not None
        assert abs(torch.sum(x.grad * true.grad) / true.grad.square().sum() - 1) < 1e-3
        assert (x.grad - true.grad).norm() < 4e-3 * true.grad.norm()


def test_targets_that_bf16_knows_for_sure_still_pull_a_little() -> None:
    hidden = torch.tensor([[[8.0]]], dtype=torch.bfloat16, requires_grad=True)
    head = torch.tensor([[1.0], [0.0]], requires_grad=True)  # p = 0.99966: rounded to bf16 it is 1
    summed_cross_entropy(hidden, head, torch.tensor([[0]])).backward()
    assert head.grad is not None
    rest = 1 - torch.tensor(8.0).sigmoid()
    torch.testing.assert_close(head.grad.flatten(), 8 * torch.stack([-rest, rest]), rtol=0.02, atol=0)


def test_a_second_backward_gives_the_same_gradients() -> None:
    hidden, head, targets = _case(1, 4, 0.0)
    loss = summed_cross_entropy(hidden, head, targets) * 0.25
    first, second = (torch.autograd.grad(loss, (hidden, head), retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_the_sum_does_not_depend_on_the_cut_into_micro_batches() -> None:
    hidden, head, targets = _case(3, 16, 0.6)
    whole = summed_cross_entropy(hidden, head, targets)
    parts = sum(summed_cross_entropy(hidden[i : i + 1], head, targets[i : i + 1]) for i in range(3))
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.skipif(loss_kernel.kernel() is None, reason="no AVX-512 BF16, or no C compiler")
@pytest.mark.parametrize(("n", "vocab", "width"), [(1, 16, 64), (7, 208, 128), (1300, 112, 64)])
def test_the_kernel_is_the_plain_way(n: int, vocab: int, width: int) -> None:
    torch.manual_seed(n)
    kernel = loss_kernel.kernel()
    assert kernel is not None
    logits, x = 5 * torch.randn(n, vocab).bfloat16(), torch.randn(n, width).bfloat16()
    found, expected = logits.clone(), logits.clone()
    torch.testing.assert_close(kernel.softmax_(found), loss_module._softmax_(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    total = torch.randn(vocab, width)
    exact = total.double() + found.double().t() @ x.double()
    kernel.add_product_(total, found, x)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(loss_kernel.kernel() is None, reason="no AVX-512 BF16, or no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_the_kernel_takes_gets_the_gradient_of_the_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 70, 64).bfloat16().requires_grad_(), torch.randn(96, 64).to(dtype).requires_grad_()
    targets = torch.randint(0, 96, (2, 70))
    targets[0, :9] = IGNORE
    assert loss_kernel.kernel_for(hidden, head) is not None
    loss = summed_cross_entropy(hidden, head, targets, chunk_logits=96 * 64)
    exact = hidden.detach().float().requires_grad_(), head.detach().bfloat16().float().requires_grad_()
    expected = reference_cross_entropy(*exact, targets)
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
    pairs = zip(torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(expected, exact), strict=True)
    assert max(((found - true).norm() / true.norm()).item() for found, true in pairs) < 0.01


@pytest.mark.skipif(loss_kernel.kernel() is None, reason="no AVX-512 BF16, or no C compiler")
def test_a_logit_that_is_not_a_number_makes_its_row_none() -> None:
    logits = torch.randn(3, 32).bfloat16()
    logits[1, 7] = torch.nan
    kernel = loss_kernel.kernel()
    assert kernel is not None
    assert kernel.softmax_(logits).isnan().flatten().tolist() == [False, True, False]
    assert logits[1].isnan().all()
