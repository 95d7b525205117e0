"""Attention of decoding as a Triton kernel for CUDA devices: keys and values are read once, by all who share them.

A program takes one sequence, one key/value head and a range of tokens; the query heads of that key/value head are the
rows of its products. Products have 16 rows at least, which the next tokens of the sequence fill where it has several.
A few long sequences would leave most of the device idle, so they are split into ranges until it is full (flash
decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html), and a second kernel joins the parts. The plain
formula is in `puna.generate.engine.paged_attention`. Needs Triton, which comes with torch's CUDA builds.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.devices import FUSED, early_launch

#: Bytes of the keys that a program multiplies at a time: 64 tokens of 128 channels in 16 bits, which 8 bits become in
#: registers.
TILE_BYTES = 64 * 128 * 2

#: Tokens of a tile, where channels are few.
MOST_TOKENS = 128

#: Of these, looking up in the table where a tile lies takes three; two tiles of keys and values are on their way then.
STAGES = 5

#: Programs that a multiprocessor works on at the same time: each takes some 70 KiB of its shared memory.
PROGRAMS_EACH = 2

#: Below any score, and finite, so that two of them can be compared by their difference.
LOWEST = tl.constexpr(-1e30)

#: Parts that the second kernel holds at a time.
MOST_SPLITS = 128


def attend_paged(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    firsts: Tensor | None = None,
    *,
    splits: int | None = None,
) -> Tensor:
    """`puna.generate.engine.paged_attention.attend_paged` on a CUDA device.

    Args:
        q: (n, N, H); its last dim is dense.
        keys, values: (blocks, block_size, K, H) of the same strides; their last dim is dense.
        block_tables: (n, max_blocks) int32; its last dim is dense.
        lengths: (n,) int32, dense.
        key_scales, value_scales: (blocks, block_size, K) fp32 of the same strides, where keys and values have 8 bits.
        firsts: (n,) int32, dense; where a sequence has several queries.
        splits: programs that share a sequence; None: as `splits_to_fill` says. Results differ by rounding only.

    Returns:
        (n, N, H).

    Raises:
        ValueError: the strides are not as said.
    """
    if keys.stride() != values.stride() or any(x.stride(-1) != 1 for x in (q, keys, block_tables, lengths)):
        raise ValueError(
            "keys and values must have the same strides and dense rows, as q, block_tables and lengths; got "
            f"{[x.stride() for x in (q, keys, values, block_tables, lengths)]}: call contiguous() on them"
        )
    if key_scales is not None and value_scales is not None and key_scales.stride() != value_scales.stride():
        raise ValueError("the scales of keys and values must have the same strides: call contiguous() on them")
    n, heads, width = q.shape
    block_size, kv_heads = keys.shape[1:3]
    channels = triton.next_power_of_2(max(16, width))
    tile = min(MOST_TOKENS, TILE_BYTES // (channels * q.element_size()))
    tiles = triton.cdiv(block_tables.shape[1] * block_size, tile)
    groups = heads // kv_heads
    rows = triton.next_power_of_2(max(16, groups))
    heads_of_token = rows if firsts is None else triton.next_power_of_2(groups)
    sequences = triton.cdiv(n, rows // heads_of_token)  # at least
    splits = splits or splits_to_fill(_multiprocessors(q.device), sequences * kv_heads, tiles)
    out = q.new_empty(q.shape)
    part_shape = (n, heads, splits) if splits > 1 else (0,)
    parts = q.new_empty((*part_shape, width), dtype=torch.float32)
    tops, totals = q.new_empty((2, *part_shape), dtype=torch.float32)
    early = early_launch(q.device)
    _attend[(n, kv_heads, splits)](
        q, keys, values, block_tables, lengths, key_scales, value_scales, firsts, out, parts, tops, totals, n,
        *q.stride()[:2], *keys.stride()[:3], *(keys if key_scales is None else key_scales).stride()[:3],
        block_tables.stride(0), width**-0.5,
        GROUPS=groups, HEADS=heads_of_token, ROWS=rows, WIDTH=width, CHANNELS=channels,
        BLOCK_SIZE=block_size, TILE=tile, IS_SPLIT=splits > 1, num_warps=4, num_stages=STAGES,
        **FUSED, **early,
    )  # fmt: skip
    if splits > 1:
        _join[(n, heads)](
            parts, tops, totals, out, splits,
            WIDTH=width, CHANNELS=channels, SPLITS=triton.next_power_of_2(splits), num_warps=4, **FUSED,
            **early,
        )  # fmt: skip
    return out


def splits_to_fill(multiprocessors: int, programs: int, tiles: int) -> int:
    """Into how many ranges sequences are split.

    Args:
        multiprocessors: of the device.
        programs: sequences x key/value heads.
        tiles: of the longest sequence that there could be.

    Returns:
        As many as fill the device once and not twice: 1 where `programs` do so already.
    """
    return max(1, min(PROGRAMS_EACH * multiprocessors // programs, tiles, MOST_SPLITS))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.get_device_module(device).get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["n", "table_sequence"])
def _attend(
    q, keys, values, block_tables, lengths, key_scales, value_scales, firsts, out, parts, tops, totals, n,
    q_sequence, q_head, pool_block, pool_slot, pool_head, scales_block, scales_slot, scales_head, table_sequence, scale,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, IS_SPLIT: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    if IS_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    row, channel = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    query, is_head = sequence + row // HEADS, row % HEADS < GROUPS  # HEADS, of which GROUPS are there, of each query
    if HEADS < ROWS:
        first = tl.load(firsts + sequence)
        if (sequence - first) % (ROWS // HEADS) != 0:
            return  # the program of a query before takes this one along
        is_head &= tl.load(firsts + query, mask=query < n, other=-1) == first
    seen = tl.load(lengths + query, mask=is_head, other=0)
    length = tl.max(seen, 0)
    share = tl.cdiv(tl.cdiv(length, TILE), splits) * TILE  # by what is there, not by what could be
    start = split * share
    stop = tl.minimum(start + share, length)

    head = kv_head * GROUPS + row % HEADS
    is_query = is_head[:, None] & (channel < WIDTH)[None, :]
    q_place = query.to(tl.int64)[:, None] * q_sequence + head[:, None] * q_head + channel[None, :]
    queries = tl.load(q + q_place, mask=is_query, other=0.0)

    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    gathered = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(start, stop, TILE):
        token = first + tl.arange(0, TILE)
        is_here = token < stop
        table = block_tables + sequence.to(tl.int64) * table_sequence
        block = tl.load(table + token // BLOCK_SIZE, mask=is_here, other=0).to(tl.int64)
        place = block * pool_block + (token % BLOCK_SIZE) * pool_slot + kv_head * pool_head
        place = place[:, None] + channel[None, :]
        is_number = is_here[:, None] & (channel < WIDTH)[None, :]
        k = tl.load(keys + place, mask=is_number, other=0.0)
        v = tl.load(values + place, mask=is_number, other=0.0)  # 0, for no weight hides a NaN that was left there
        if key_scales is not None:  # numbers of 8 bits
            its_scale = block * scales_block + (token % BLOCK_SIZE) * scales_slot + kv_head * scales_head
            k_scale = tl.load(key_scales + its_scale, mask=is_here, other=0.0)
            v_scale = tl.load(value_scales + its_scale, mask=is_here, other=0.0)
            k = (k.to(tl.float32) * k_scale[:, None]).to(queries.dtype)
            v = (v.to(tl.float32) * v_scale[:, None]).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)  # log2(e)
        scores = tl.where(is_here[None, :] & (token[None, :] < seen[:, None]), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        gathered = gathered * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top

    n_heads = tl.num_programs(1) * GROUPS
    line = query.to(tl.int64) * n_heads + head
    if IS_SPLIT:
        part = line * splits + split
        tl.store(tops + part, top, mask=is_head)
        tl.store(totals + part, total, mask=is_head)
        tl.store(parts + part[:, None] * WIDTH + channel[None, :], gathered, mask=is_query)
    else:
        mean = gathered / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(out + line[:, None] * WIDTH + channel[None, :], mean.to(out.dtype.element_ty), mask=is_query)


@triton.jit(do_not_specialize=["splits"])
def _join(
    parts, tops, totals, out, splits,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, SPLITS: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    if IS_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    line = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split, channel = tl.arange(0, SPLITS), tl.arange(0, CHANNELS)
    is_split, is_channel = split < splits, channel < WIDTH
    part = line * splits + split
    top = tl.load(tops + part, mask=is_split, other=LOWEST)
    total = tl.load(totals + part, mask=is_split, other=0.0)
    gathered = tl.load(
        parts + part[:, None] * WIDTH + channel[None, :], mask=is_split[:, None] & is_channel[None, :], other=0.0
    )
    weight = tl.exp2(top - tl.max(top, 0))
    whole = tl.sum(weight * total, 0)
    mean = tl.sum(weight[:, None] * gathered, 0) / tl.where(whole == 0, 1.0, whole)
    tl.store(out + line * WIDTH + channel, mean.to(out.dtype.element_ty), mask=is_channel)
