"""The network against transformers': logits and gradients, over the families and options of `config.json`."""

import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.checkpoint import load, save_model
from puna.checkpoint.huggingface import build_model
from puna.checkpoint.tensors import StoredTensor
from puna.model.attention import Documents
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.testing import tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

#: What differs from a small untied Llama with two key/value heads and theta 1e6.
GRID = {
    "gqa": ("llama", {}),
    "mha": ("llama", {"num_key_value_heads": 4}),
    "one key/value head": ("llama", {"num_key_value_heads": 1}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "free head width": ("llama", {"head_dim": 32}),
    "theta 1e4": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "linear scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama3 scaling": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
}


@pytest.fixture(scope="module", params=GRID.values(), ids=GRID)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Llama]:
    """A model of transformers, and ours, loaded from the folder that transformers wrote."""
    family, changes = request.param
    fields = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        **changes,
    }
    config = transformers.AutoConfig.for_model(family, **fields)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    shake(theirs)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, load(folder)[0]


def test_logits_equal_transformers(pair):
    theirs, ours = pair
    tokens = some_tokens()
    with torch.no_grad():
        assert_equal_logits(ours(tokens), theirs(tokens).logits)


def test_gradients_equal_transformers(pair):
    theirs, ours = pair
    tokens = some_tokens()
    for logits in (ours(tokens), theirs(tokens).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert {name for name, _ in ours.named_parameters()} == set(gradients)
    for name, parameter in ours.named_parameters():
        scale = gradients[name].abs().max()
        assert scale > 0
        assert (parameter.grad - gradients[name]).abs().max() <= 2e-5 * scale, name
        parameter.grad = None


def test_what_we_save_opens_in_transformers_with_equal_logits(pair, tmp_path, monkeypatch):
    _, ours = pair
    monkeypatch.setattr("puna.checkpoint.weights.SHARD_BYTES", 100_000)
    save_model(ours, tmp_path / "saved")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float32}
    tokens = some_tokens()
    with torch.no_grad():
        assert_equal_logits(ours(tokens), theirs(tokens).logits)


def test_logits_equal_those_of_mindformers(shared):
    fixtures = shared / "fixtures" / "mindspore"
    weights = np.load(fixtures / "ckpt" / "tiny_llama_hf_fp32.npz")
    reference = np.load(fixtures / "reference" / "logits_fp32.npz")
    config = ModelConfig.from_json(json.loads((fixtures / "ckpt" / "hf_config.json").read_text()))
    model = build_model(config, {name: StoredTensor.of(torch.from_numpy(weights[name])) for name in weights.files})
    with torch.no_grad():
        assert_equal_logits(model(torch.from_numpy(reference["ids"]).long()), torch.from_numpy(reference["logits"]))


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=8), seed=st.integers(0, 2**31))
def test_a_packed_row_gives_the_logits_of_its_documents_alone(lengths, seed):
    documents = random_documents(lengths, seed)
    with torch.no_grad():
        packed = MODEL(torch.cat(documents)[None], **row_of(lengths))[0].split(lengths)
        alone = [MODEL(document[None])[0] for document in documents]
    for ours, reference in zip(packed, alone, strict=True):
        assert_equal_logits(ours, reference)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), min_size=2, max_size=8), seed=st.integers(0, 2**31), data=st.data())
def test_no_bit_of_a_documents_logits_depends_on_the_others_in_its_row(lengths, seed, data):
    kept = data.draw(st.integers(0, len(lengths) - 1))
    documents, others = random_documents(lengths, seed), random_documents(lengths, seed + 1)
    others[kept] = documents[kept]
    with torch.no_grad():
        one, two = (
            MODEL(torch.cat(row)[None], **row_of(lengths))[0].split(lengths)[kept] for row in (documents, others)
        )
    assert torch.equal(one, two)


MODEL = tiny_model()


def row_of(lengths: list[int]) -> dict[str, object]:
    """Positions and documents of a row that holds documents of these lengths."""
    numbers = np.repeat(np.arange(len(lengths)), lengths)[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"positions": positions, "documents": Documents.of(numbers)}


def random_documents(lengths: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(MODEL.config.vocab_size, (length,), generator=generator) for length in lengths]


def some_tokens() -> Tensor:
    return torch.randint(160, (2, 48), generator=torch.Generator().manual_seed(1))


def shake(model: torch.nn.Module) -> None:
    """Gives every weight, also biases and norms, a value that shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(0, 0.15, generator=generator)
            parameter.copy_(1 + noise if "norm" in name else noise)


def assert_equal_logits(ours: Tensor, reference: Tensor) -> None:
    scale = reference.abs().max()
    assert reference.std() > 0.05 * scale > 0
    assert (ours - reference).abs().max() <= 1e-5 * scale
