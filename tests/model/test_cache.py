"""Keys and values that are kept give the same logits as keys and values computed anew."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.model.cache import KVCache
from puna.model.llama import Llama
from puna.testing import tiny_model

CAPACITY = 24


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_model()


def random_tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(seed))


def in_pieces(model: Llama, tokens: Tensor, cuts: list[int], cache: KVCache) -> Tensor:
    """Logits of (B, T) tokens that are fed from cut to cut."""
    edges = sorted({0, *cuts, tokens.shape[1]})
    out = []
    for start, stop in pairwise(edges):
        positions = torch.arange(start, stop).expand(len(tokens), -1)
        out.append(model(tokens[:, start:stop], positions=positions, cache=cache))
    return torch.cat(out, dim=1)


def assert_same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(1, CAPACITY - 1), max_size=6))
def test_tokens_fed_in_any_pieces_give_the_logits_of_all_at_once(model: Llama, seed: int, cuts: list[int]) -> None:
    tokens = random_tokens(seed, 2, CAPACITY)
    with torch.inference_mode():
        pieces = in_pieces(model, tokens, cuts, KVCache(model.config, 2, CAPACITY))
        assert_same(pieces, model(tokens))


def test_what_padding_wrote_is_overwritten_and_never_seen(model: Llama) -> None:
    tokens = random_tokens(1, 1, 8)
    with torch.inference_mode():
        expected = model(tokens)[:, 4:]
        for padding in (0, 7, 511):
            cache = KVCache(model.config, 1, CAPACITY)
            padded = torch.cat((tokens[:, :4], torch.full((1, 9), padding)), dim=1)
            model(padded, cache=cache)
            steps = [model(tokens[:, at : at + 1], positions=torch.tensor([[at]]), cache=cache) for at in range(4, 8)]
            assert_same(torch.cat(steps, dim=1), expected)


def test_rows_at_different_positions_do_not_mix(model: Llama) -> None:
    long, short = random_tokens(2, 1, 10), random_tokens(3, 1, 4)
    with torch.inference_mode():
        cache = KVCache(model.config, 2, CAPACITY)
        prompts = torch.cat((long[:, :9], torch.cat((short[:, :3], torch.zeros(1, 6, dtype=torch.long)), dim=1)))
        model(prompts, cache=cache)
        last = torch.tensor([[long[0, 9]], [short[0, 3]]])
        both = model(last, positions=torch.tensor([[9], [3]]), cache=cache)
        assert_same(both[0, 0], model(long)[0, -1])
        assert_same(both[1, 0], model(short)[0, -1])


def test_rows_that_are_kept_go_on_as_before(model: Llama) -> None:
    tokens = random_tokens(4, 4, 10)
    with torch.inference_mode():
        cache = KVCache(model.config, 4, CAPACITY)
        model(tokens[:, :6], cache=cache)
        cache.keep_rows([3, 1])
        assert cache.keys.shape[1] == cache.values.shape[1] == 2
        positions = torch.arange(6, 10).expand(2, -1)
        assert_same(model(tokens[[3, 1], 6:], positions=positions, cache=cache), model(tokens[[3, 1]])[:, 6:])


def test_a_cache_holds_exactly_what_it_was_made_for(model: Llama) -> None:
    config = model.config
    cache = KVCache(config, 3, 7, dtype=torch.bfloat16)
    assert cache.keys.shape == cache.values.shape == (config.num_hidden_layers, 3, 7, 2, 16)
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16
    with torch.inference_mode():
        full = KVCache(config, 1, 7)
        model(random_tokens(5, 1, 7), cache=full)
        assert full.used == 7
        with pytest.raises(ValueError, match="position 7 does not fit a cache of 7 slots"):
            model(random_tokens(5, 1, 1), positions=torch.tensor([[7]]), cache=full)


def test_writing_one_layer_leaves_the_others(model: Llama) -> None:
    cache = KVCache(model.config, 1, 4)
    positions = torch.tensor([[2]])
    cache.make_room(positions)
    k, v = torch.ones(1, 1, 2, 16), torch.full((1, 1, 2, 16), 2.0)
    cache.layer(1).attend(torch.ones(1, 1, 4, 16), k, v, positions)
    for kept, new in ((cache.keys, k), (cache.values, v)):
        assert not kept[0].any()
        assert torch.equal(kept[1, 0, 2], new[0, 0])
        assert not kept[1, 0, :2].any()
        assert not kept[1, 0, 3:].any()
