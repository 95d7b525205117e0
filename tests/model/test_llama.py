"""The network's parts against formulas written out independently of it."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from puna.model.cache import KVCache
from puna.model.config import ModelConfig, preset
from puna.model.llama import Llama, RMSNorm, init_weights, rotary_tables, rotate
from puna.testing import tiny_model

CODE_LLAMA = preset("codellama-7b")
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def exact_angle(position: int, pair: int, width: int, theta: float) -> float:
    """Position times frequency, reduced to a turn with 40 digits of pi, so that fp64 loses nothing of it."""
    from mpmath import mp

    with mp.workdps(40):
        return float(mp.fmod(position * mp.mpf(theta) ** (mp.mpf(-2 * pair) / width), 2 * mp.pi))


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rotary_tables_are_exact_to_position_100_000(theta: float) -> None:
    config = replace(CODE_LLAMA, rope_theta=theta)
    positions = [0, 1, 2, 1023, 4095, 16_383, 65_537, 99_999, 100_000]
    cos, sin = rotary_tables(torch.tensor([positions]), config)
    assert cos.shape == sin.shape == (1, len(positions), 1, 128)
    assert cos.dtype == sin.dtype == torch.float32
    angles = [[exact_angle(position, pair, 128, theta) for pair in range(64)] for position in positions]
    for table, function in ((cos, math.cos), (sin, math.sin)):
        expected = np.array([[function(angle) for angle in row] for row in angles])
        for half in (table[0, :, 0, :64], table[0, :, 0, 64:]):
            assert np.abs(half.numpy().astype(np.float64) - expected).max() < 6e-8  # half of fp32's last digit at 1


def test_linear_scaling_stretches_positions() -> None:
    scaled = replace(CODE_LLAMA, rope_scaling={"rope_type": "linear", "factor": 4.0})
    positions = torch.tensor([[0, 4, 400, 16_000]])
    for ours, expected in zip(rotary_tables(positions, scaled), rotary_tables(positions // 4, CODE_LLAMA), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-7, rtol=0)


def test_llama_3_scaling_is_metas_published_function() -> None:
    config = replace(CODE_LLAMA, rope_theta=500_000.0, rope_scaling=LLAMA_3)
    frequencies = []
    for pair in range(64):  # apply_scaling of meta-llama/llama-models, word for word
        frequency = 500_000.0 ** (-2 * pair / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4.0:
            frequencies.append(frequency)
        elif wavelength > 8192 / 1.0:
            frequencies.append(frequency / 8.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            frequencies.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
    cos, _ = rotary_tables(torch.tensor([[777]]), config)
    expected = torch.tensor([math.cos(777 * frequency) for frequency in frequencies])
    torch.testing.assert_close(cos[0, 0, 0, :64], expected, atol=1e-7, rtol=0)


def test_rotation_turns_each_pair_by_its_angle() -> None:
    x = torch.arange(1.0, 9.0).view(1, 1, 1, 8)
    angles = [0.1, 0.2, 0.3, 0.4]
    cos, sin = (torch.tensor([f(a) for a in angles] * 2).view(1, 1, 1, 8) for f in (math.cos, math.sin))
    turned = rotate(x, cos, sin).flatten().tolist()
    for pair, angle in enumerate(angles):
        value = complex(pair + 1, pair + 5) * complex(math.cos(angle), math.sin(angle))
        assert (turned[pair], turned[pair + 4]) == pytest.approx((value.real, value.imag), rel=1e-6)


def test_only_the_distance_of_positions_matters() -> None:
    model = tiny_model()
    tokens = torch.tensor([[5, 9, 300, 2, 7]])
    with torch.inference_mode():
        here = model(tokens)
        far = model(tokens, positions=torch.arange(1000, 1005)[None])
        apart = model(tokens, positions=torch.tensor([[0, 1, 2, 3, 40]]))
    torch.testing.assert_close(far, here, atol=1e-4, rtol=0)
    assert (apart - here).abs().max() > 1e-2


def test_norms_are_formed_in_fp32_under_bf16_input() -> None:
    norm = RMSNorm(64, eps=1e-5)
    x = (torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 30).bfloat16()
    ours = norm(x)
    assert ours.dtype == torch.bfloat16
    for row, out in zip(x.tolist(), ours, strict=True):
        square = sum(Fraction(value) ** 2 for value in row) / 64
        exact = torch.tensor([value / math.sqrt(square + Fraction(1, 100_000)) for value in row], dtype=torch.float64)
        assert torch.equal(out, exact.float().bfloat16()), "the right value, rounded once"
    rough = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    assert not torch.equal(rough, ours), "formed in bf16 it would have been another"


def test_norm_weights_are_applied_after_rounding() -> None:
    norm = RMSNorm(4, eps=0.0)
    norm.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 0.5]))
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    torch.testing.assert_close(norm(x), torch.tensor([[1.0, -2.0, 3.0, -0.5]]), atol=0, rtol=0)


def test_weights_are_drawn_by_name_whatever_else_there_is() -> None:
    small, deep = Llama(preset("tiny-64")), Llama(replace(preset("tiny-64"), num_hidden_layers=4))
    for model in (small, deep):
        init_weights(model, seed=3)
    shared = dict(small.named_parameters())
    for name, parameter in deep.named_parameters():
        if name in shared:
            assert torch.equal(parameter, shared[name]), name
    drawn = {name: p for name, p in small.named_parameters() if p.dim() > 1}
    assert len({tuple(p.flatten()[:4].tolist()) for p in drawn.values()}) == len(drawn), "two weights share their draws"


def test_weights_are_normal_with_the_configs_range_norms_one_biases_zero() -> None:
    config = replace(preset("tiny-64"), attention_bias=True, mlp_bias=True, attention_output_bias=True)
    model = Llama(replace(config, initializer_range=0.05))
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    init_weights(model, seed=0)
    kinds = {"bias": 0, "norm": 0, "weight": 0}
    for name, parameter in model.named_parameters():
        kind = "bias" if name.endswith("bias") else "norm" if "norm" in name else "weight"
        kinds[kind] += 1
        if kind == "weight":
            n = parameter.numel()
            assert parameter.std().item() == pytest.approx(0.05, rel=5 / math.sqrt(2 * n))
            assert abs(parameter.mean().item()) < 5 * 0.05 / math.sqrt(n)
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float(kind == "norm"))), name
    assert kinds == {"bias": 14, "norm": 5, "weight": 16}


def test_another_seed_draws_other_weights() -> None:
    assert not torch.equal(tiny_model(seed=0).lm_head.weight, tiny_model(seed=1).lm_head.weight)
    assert torch.equal(tiny_model(seed=1).lm_head.weight, tiny_model(seed=1).lm_head.weight)


def test_fp32_weights_compute_in_bf16_and_get_fp32_gradients() -> None:
    model = tiny_model(attention_bias=True)
    model.compute_dtype = torch.bfloat16
    tokens = torch.tensor([[5, 9, 300, 2, 7]])
    logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    exact = tiny_model(attention_bias=True)
    exact(tokens).square().mean().backward()
    for (name, parameter), (_, reference) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        error = (parameter.grad - reference.grad).norm() / reference.grad.norm()
        assert error < 0.1, f"{name}: {error}"


def test_grouped_heads_are_full_heads_whose_keys_are_shared() -> None:
    grouped = tiny_model(num_key_value_heads=2)
    full = Llama(replace(grouped.config, num_key_value_heads=4))
    weights = grouped.state_dict()
    for name, values in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = values.view(2, 16, 64).repeat_interleave(2, dim=0).reshape(64, 64)
    full.load_state_dict(weights)
    tokens = torch.tensor([[5, 9, 300, 2, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(grouped(tokens), full(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("is_cached", [False, True])
def test_wanted_tokens_get_what_they_get_among_all(is_cached: bool) -> None:
    model = tiny_model().double()
    tokens = torch.randint(512, (2, 9), generator=torch.Generator().manual_seed(0))
    caches = [KVCache(model.config, 2, 9, dtype=torch.float64) if is_cached else None for _ in range(2)]
    wanted = torch.tensor([3, 8])
    some = model.hidden(tokens, cache=caches[0], wanted=wanted)
    torch.testing.assert_close(some, model.hidden(tokens, cache=caches[1])[:, wanted])
    kept = [torch.stack([cache.keys, cache.values]) for cache in caches if cache is not None]
    assert not kept or torch.equal(*kept)


def test_a_tied_head_is_the_embedding_table() -> None:
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 512)
    untied = tiny_model()
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_the_number_of_weights_is_counted_without_making_them(changes: dict) -> None:
    config = replace(preset("tiny-64"), head_dim=24, **changes)
    assert config.parameter_count == sum(parameter.numel() for parameter in Llama(config).parameters())


@pytest.mark.parametrize("is_tied", [True, False])
def test_weights_that_multiply_every_token_are_all_but_table_and_norms(is_tied: bool) -> None:
    config = replace(preset("tiny-64"), tie_word_embeddings=is_tied)
    layers = sum(p.numel() for name, p in Llama(config).named_parameters() if "proj" in name)
    assert config.matmul_parameter_count == layers + config.vocab_size * config.hidden_size


def test_the_config_is_in_the_network_and_not_shared_between_networks() -> None:
    config = ModelConfig(**{**preset("tiny-64").__dict__, "rms_norm_eps": 0.5})
    model = Llama(config)
    assert model.config is config
    assert {m.eps for m in model.modules() if isinstance(m, RMSNorm)} == {0.5}
