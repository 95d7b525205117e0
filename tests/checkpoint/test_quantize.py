"""Quantised folders: smaller, loaded like any other, and worth what their dequantised weights are."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.checkpoint import load, load_config, quantize, room, save_model
from puna.cli import run
from puna.errors import PunaError, UsageError
from puna.generate import complete, generate
from puna.generate.engine import Engine
from puna.generate.sampling import Sampling
from puna.quantized import QuantizedLinear, schemes
from puna.testing import tiny_model, write_tiny_model

#: int4's groups of 64 divide the rows of this model.
SHAPE = {"intermediate_size": 192}
PROMPTS = [[1, 20, 300, 4], [1, 7], [1, *range(40, 80)]]
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer, in fp32; only to be read."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / "model", **SHAPE)


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory):
    """Scheme -> the folder quantised by it; only to be read."""
    place = tmp_path_factory.mktemp("quantized")
    return {name: quantize(folder, place / name, scheme=name)["folder"] for name in schemes.names()}


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_completions_are_those_of_the_dequantised_weights(folder, quantized, scheme):
    """Activations stay as they are, so that the plain network with the weights that are left must say the same."""
    model = load(quantized[scheme], dtype="fp32")[0]
    plain = load(folder)[0]
    stored = load_file(f"{quantized[scheme]}/model.safetensors")
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            parts = {part: stored[f"{name}.{part}"] for part in layer.form(layer.out_features, layer.in_features, 64)}
            plain.get_submodule(name).weight.data = layer.dequantize(parts)
    tokens = torch.tensor([PROMPTS[2]])
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-3, atol=1e-3)
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    assert complete(model, None, PROMPTS, sampling) == complete(plain, None, PROMPTS, sampling)


@pytest.mark.parametrize("scheme", schemes.names())
def test_the_engine_completes_what_the_plain_loop_does(quantized, scheme):
    model, tokenizer = load(quantized[scheme])
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    expected = [one.tokens for one in complete(model, tokenizer, PROMPTS, sampling)]
    assert [one.tokens for one in Engine(model, tokenizer).generate(PROMPTS, sampling)] == expected


@pytest.mark.parametrize("scheme", schemes.names())
def test_logits_are_near_those_of_the_model(folder, quantized, scheme):
    tokens = torch.tensor([PROMPTS[2]])
    with torch.inference_mode():
        true, found = load(folder)[0](tokens), load(quantized[scheme])[0](tokens)
    assert (found - true).norm() / true.norm() < {"int8": 0.05, "fp8": 0.2, "int4": 0.5}[scheme]


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int4", 4), ("fp8", 8)])
def test_what_is_said_of_the_size_is_what_is_written(folder, tmp_path, scheme, bits):
    result = quantize(folder, tmp_path / "out", scheme=scheme)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert result["size_bytes"] == sum(values.nbytes for values in stored.values())
    assert result["size_bytes_before"] == 4 * tiny_model(**SHAPE).config.parameter_count
    assert stored[f"{UP}.weight"].nbytes == 192 * 64 * bits / 8
    assert stored["model.embed_tokens.weight"].dtype == torch.float32


def test_the_head_of_int4_has_8_bits_and_that_of_fp8_is_left_alone(quantized, folder):
    heads = {name: load_file(f"{place}/model.safetensors")["lm_head.weight"] for name, place in quantized.items()}
    assert {name: head.dtype for name, head in heads.items()} == {
        "int8": torch.int8,
        "int4": torch.int8,
        "fp8": torch.float32,
    }
    assert torch.equal(heads["fp8"], load(folder)[0].lm_head.weight)


def test_a_tied_head_stays_tied(tmp_path):
    save_model(tiny_model(tie_word_embeddings=True, **SHAPE), tmp_path / "tied")
    quantize(tmp_path / "tied", tmp_path / "out", scheme="int8")
    model = load(tmp_path / "out")[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.get_submodule(UP), QuantizedLinear)


def test_biases_go_along(tmp_path):
    model = tiny_model(attention_bias=True, model_type="qwen2", **SHAPE)
    bias = model.model.layers[1].self_attn.k_proj.bias
    torch.nn.init.normal_(bias)
    save_model(model, tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", scheme="int4")
    assert torch.equal(load(tmp_path / "out", dtype="fp32")[0].model.layers[1].self_attn.k_proj.bias, bias)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_a_quantised_model_computes_in_bf16_or_on_request_in_fp32(tmp_path, stored):
    save_model(tiny_model(**SHAPE).to(stored), tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", scheme="int4")
    model, _ = load(tmp_path / "out")
    assert model.compute_dtype == model(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    assert load(tmp_path / "out", dtype="fp32")[0].compute_dtype == torch.float32
    with pytest.raises(UsageError, match="quantised weights are multiplied in bf16 or fp32"):
        load(tmp_path / "out", dtype="fp16")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A folder of many layers, 160 MB; only to be read."""
    model = tiny_model(hidden_size=256, intermediate_size=1024, num_hidden_layers=48)
    place = tmp_path_factory.mktemp("deep") / "model"
    save_model(model, place)
    return place


@pytest.mark.parametrize("scheme", schemes.names())
def test_quantising_takes_the_memory_of_a_few_tensors(deep, tmp_path, scheme, peak_anonymous_bytes):
    peak = peak_anonymous_bytes(quantize_without_result, deep, tmp_path / "out", scheme)
    assert peak < 35_000_000  # much of it what the allocator keeps
    assert (deep / "model.safetensors").stat().st_size > 4 * 40_000_000  # all codes of 8 bits would be a quarter


def quantize_without_result(folder, output, scheme):
    quantize(folder, output, scheme=scheme)


def test_shards_are_quantised_to_shards(tmp_path, monkeypatch):
    model = tiny_model(**SHAPE)
    with monkeypatch.context() as patch:
        patch.setattr("puna.checkpoint.weights.SHARD_BYTES", 100_000)
        save_model(model, tmp_path / "sharded")
    save_model(model, tmp_path / "whole")
    tokens = torch.tensor([[1, 2, 3]])
    logits = []
    for name in ("sharded", "whole"):
        quantize(tmp_path / name, tmp_path / f"{name}-int8", scheme="int8")
        logits.append(load(tmp_path / f"{name}-int8")[0](tokens))
    assert torch.equal(*logits)


def test_text_is_generated_with_the_models_tokenizer(quantized):
    model, tokenizer = load(quantized["int8"])
    assert generate(model, tokenizer, "def area(r):", max_tokens=5, ignore_eos=True)[0].text


# ---- what is refused


def test_a_quantised_model_is_neither_quantised_again_nor_trained_nor_saved(quantized, tmp_path):
    with pytest.raises(PunaError, match="the weights are quantised; use the checkpoint that they were made from"):
        quantize(quantized["int8"], tmp_path / "again", scheme="int4")
    with pytest.raises(PunaError, match="the weights are quantised"):
        load_config(quantized["int8"])
    with pytest.raises(PunaError, match="a quantised model is not saved from memory; copy the folder"):
        save_model(load(quantized["int8"])[0], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_full_disk_is_seen_before_anything_is_written(folder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10, 10, 1000))
    with pytest.raises(PunaError, match=r"out needs 0\.\d GB, and .* has 0\.0 GB free; free some space"):
        quantize(folder, tmp_path / "new" / "out", scheme="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.weight_scale"), f"lacks {UP}.weight_scale, which config.json asks for"),
        (
            lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].float()}),
            "weight of a quantised layer is torch.float32, its scheme wants torch.int8",
        ),
        (lambda t: t.update({f"{UP}.weight_zero": torch.ones(1)}), f"holds {UP}.weight_zero, which"),
    ],
)
def test_a_tensor_that_does_not_fit_the_scheme_is_named(quantized, tmp_path, change, message):
    shutil.copytree(quantized["int8"], tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(PunaError, match=message):
        load(tmp_path / "model")


def test_a_model_that_does_not_fit_says_by_how_much_and_what_would(folder, monkeypatch):
    config = load_config(folder)
    size = 4 * config.parameter_count
    monkeypatch.setattr(room, "free_memory_bytes", lambda device: size // 3)
    with pytest.raises(PunaError, match=r"the weights need 0\.0 GiB, 0\.0 GiB more than cpu has free; .*int4 .*int8"):
        load(folder)
    monkeypatch.setattr(room, "free_memory_bytes", lambda device: 1000)
    with pytest.raises(PunaError, match="no quantisation would help"):
        load(folder)


# ---- the command


def test_the_command_prints_sizes_and_scores_before_and_after(folder, tmp_path, capsys):
    text = tmp_path / "unseen.py"
    text.write_text("import os\n\n\ndef place():\n    return os.getcwd()\n" * 3)
    arguments = ["--scheme", "int4", "--group-size", "32", "--data", str(text), "--cases", "2"]
    assert run(["quantize", str(folder), "-o", str(tmp_path / "out"), *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["scheme"], result["group_size"]) == ("int4", 32)
    assert result["before"].keys() == result["after"].keys() == {"perplexity", "exact_match", "edit_similarity"}
    assert result["after"]["perplexity"] == pytest.approx(result["before"]["perplexity"], rel=0.5)
    assert result["after"] != result["before"]
    assert run(["quantize", str(folder), "-o", str(tmp_path / "other"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"{result['after']['perplexity']:.4f}" in printed
    assert printed.endswith(f"{tmp_path / 'other'}\n")


def test_data_that_cannot_be_scored_on_is_refused_before_anything_is_written(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for name, message in (
        ("empty", "holds no code to score on"),
        ("latin.txt", "latin.txt is not UTF-8 text (byte 3)"),
    ):
        assert run(["quantize", str(folder), "-o", str(tmp_path / "out"), "--data", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--scheme", "int3"], 2, "there is no scheme 'int3'; there are fp8, int4, int8"),
        (["--scheme", "int4", "--group-size", "128"], 2, "take one of 32, 64"),
        (["--data", "nowhere"], 2, "there is no nowhere to score on"),
    ],
)
def test_a_wrong_request_is_answered_before_anything_is_written(folder, tmp_path, capsys, arguments, code, message):
    assert run(["quantize", str(folder), "-o", str(tmp_path / "out"), *arguments]) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
