"""Packed linear layers against plain ones over the same weights."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.checkpoint import load, save_model
from puna.errors import PunaError
from puna.generate import Sampling
from puna.generate.engine import Engine
from puna.model import packed
from puna.model.layer_kernel import kernel
from puna.model.llama import Linear, gated, rotate
from puna.model.packed import FusedNorm, PackedLinear, pack_layers
from puna.testing import tiny_model

pytestmark = pytest.mark.skipif(
    not packed._gains(torch.empty(1, 1, dtype=torch.bfloat16)),
    reason="this CPU has no units for bf16 that oneDNN knows",
)


def random_linear(inputs: int, outputs: int, *, bias: bool = False) -> Linear:
    linear = Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)
    for weight in linear.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(inputs + outputs))
    return linear


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70), inputs=st.integers(1, 150), outputs=st.integers(1, 150), bias=st.booleans()
)  # fmt: skip
@torch.no_grad()
def test_a_packed_layer_computes_what_the_plain_one_does(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    linear = random_linear(inputs, outputs, bias=bias)
    x = torch.randn(2, rows, inputs, generator=torch.Generator().manual_seed(rows)).bfloat16()
    expected = linear.double()(x.double())
    packed_linear = PackedLinear(linear.bfloat16())
    for out in (packed_linear(x), packed_linear(x.transpose(0, 1)).transpose(0, 1)):
        assert out.dtype == torch.bfloat16
        assert out.shape == expected.shape
        assert (out - expected).norm() <= 4e-3 * expected.norm()  # half a step of bf16 at most


def test_only_layers_in_bf16_are_packed() -> None:
    for dtype, expected in ((torch.bfloat16, True), (torch.float32, False), (torch.float16, False)):
        model = tiny_model().to(dtype)
        pack_layers(model)
        layers = [module for module in model.modules() if isinstance(module, Linear)]
        assert len(layers) == 7 * model.config.num_hidden_layers + 1
        assert all((type(layer) is PackedLinear) == expected for layer in layers)
        fused = [module for module in model.modules() if isinstance(module, FusedNorm)]
        fused += [layer for layer in model.model.layers if layer.mlp.gated is not gated]
        assert all((layer.self_attn.rotate is rotate) == (layer.mlp.gated is gated) for layer in model.model.layers)
        is_fused = expected and kernel() is not None
        assert len(fused) == (3 * model.config.num_hidden_layers + 1 if is_fused else 0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_loaded_for_inference_writes_what_the_plain_one_does(tied: bool, tmp_path: Path) -> None:
    save_model(tiny_model(tie_word_embeddings=tied).to(torch.bfloat16), tmp_path / "model")
    plain, _ = load(tmp_path / "model")
    fast, _ = load(tmp_path / "model", for_inference=True)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, logits = plain(ids).float(), fast(ids).float()
    assert not torch.equal(logits, torch.zeros_like(logits))
    assert (logits - expected).norm() <= 1e-2 * expected.norm()
    completion = Engine(fast).generate([[5, 6, 7]], Sampling(max_tokens=5, ignore_eos=True))[0]
    assert len(completion.tokens) == 5


def test_a_model_loaded_for_inference_is_not_saved(tmp_path: Path) -> None:
    save_model(tiny_model().to(torch.bfloat16), tmp_path / "model")
    fast, _ = load(tmp_path / "model", for_inference=True)
    with pytest.raises(PunaError, match="load it without for_inference"):
        save_model(fast, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("is_fp32", ["lm_head", "layernorm", "norm", "embed_tokens", "bias", "proj"])
def test_weights_stored_in_several_dtypes_are_computed_with_in_that_of_most(tmp_path: Path, is_fp32: str) -> None:
    model = tiny_model(head_dim=64, model_type="qwen2", attention_bias=True)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        is_bias = name.endswith("bias")
        weight.data = (torch.randn(weight.shape, generator=generator) / 10 if is_bias else weight.data).bfloat16()
        weight.data = weight.data.float() if is_fp32 in name else weight.data
    save_model(model, tmp_path / "model")
    loaded, _ = load(tmp_path / "model", for_inference=True)
    tokens = torch.tensor([[1, *range(5, 60)]])
    with torch.inference_mode():
        exact, found = model.float()(tokens), loaded(tokens)
    assert found.dtype == (torch.float32 if is_fp32 == "proj" else torch.bfloat16)
    assert (found - exact).norm() < 0.02 * exact.norm()
    prompt, sampling = tokens[0, :20].tolist(), Sampling(max_tokens=8, ignore_eos=True, logprobs=0)
    (ours,) = Engine(loaded, cache_tokens=256).generate([prompt], sampling)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ours.tokens]))[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ours.tokens)[:, None])[:, 0]
    assert [each.chosen for each in ours.logprobs] == pytest.approx(expected.tolist(), abs=0.3)
