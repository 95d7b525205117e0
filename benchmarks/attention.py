"""Attention of one layer, forward and backward: our kernel and products in blocks beside torch's kernel, on a CPU.

    python benchmarks/attention.py [--precision bf16|fp32] [--heads 8] [--kv-heads 8] [--width 64] [--rounds 7]

All run on the same 4,096 tokens in turn, cut into documents of one length; the medians count. It says from which length
on `puna.model.attention.IN_BLOCKS_FROM` should send a document through blocks, where there is no kernel for it. On a
CPU without bf16 units the bf16 products alone take minutes; there only fp32 says something.
"""

import argparse
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from record import arguments, record
from torch import Tensor
from turns import in_turn

from puna.model import attention_kernel
from puna.model.attention_in_blocks import Span, attend_in_blocks

TOKENS = 4096
LENGTHS = (64, 128, 256, 512, 1024, 4096)


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = arguments(parser)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    shapes = [(TOKENS, heads, args.width) for heads in (args.heads, args.kv_heads, args.kv_heads)]
    rows = []
    for length in LENGTHS:
        qkv = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
        slope = torch.randn(shapes[0]).to(dtype)
        contenders = {"blocks": _in_blocks, "scaled_dot_product_attention": _sdpa_per_document}
        if attention_kernel.serves(*qkv):
            contenders["kernel"] = _by_kernel
        lengths = [length] * (TOKENS // length)
        turns = {name: partial(_forward_backward, attend, qkv, slope, lengths) for name, attend in contenders.items()}
        rows += [
            {"contender": name, "document_tokens": length, "median_seconds": taken.median, "seconds": taken.seconds}
            for name, taken in in_turn(turns, args.rounds).items()
        ]
    record("attention", rows, {"precision": args.precision, "shapes": shapes})


def _forward_backward(
    attend: Callable[..., Tensor], qkv: list[Tensor], slope: Tensor, lengths: list[int], _: int
) -> None:
    torch.autograd.grad(attend(*qkv, lengths), qkv, slope)


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    return attend_in_blocks(q, k, v, Span.of_documents(lengths))


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    with mock.patch.object(attention_kernel, "kernel", return_value=None):
        return attend_in_blocks(q, k, v, Span.of_documents(lengths))


def _sdpa_per_document(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    heads_first = ([x[None].transpose(1, 2) for x in part] for part in parts)
    is_grouped = q.shape[1] != k.shape[1]
    out = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=is_grouped) for part in heads_first]
    return torch.cat([x.transpose(1, 2)[0] for x in out])


if __name__ == "__main__":
    main()
