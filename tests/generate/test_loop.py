"""The plain loop, held against transformers, against a real MindFormers run, and against each row on its own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from puna.errors import PunaError, UsageError
from puna.generate import Sampling, complete
from puna.model.config import ModelConfig, preset
from puna.model.llama import Llama, init_weights

PROMPTS = [[1, 17, 203, 44], [1, 99], [1, 5, 6, 7, 8, 9, 10, 11, 300, 301, 302], [1, 44, 44, 17]]


def random_model(seed: int = 0, **changes) -> Llama:
    """A tiny model whose weights are wide enough to say something definite."""
    config = preset("tiny-64")
    model = Llama(ModelConfig(**{**config.__dict__, "initializer_range": 0.2, **changes}))
    init_weights(model, seed=seed)
    return model


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model()


def theirs(model: Llama) -> LlamaForCausalLM:
    fields = {k: v for k, v in model.config.to_json().items() if k not in ("architectures", "model_type")}
    twin = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="eager")).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def tokens_of(completions) -> list[list[int]]:
    return [completion.tokens for completion in completions]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
def test_greedy_equals_transformers_generate(seed: int, penalty: float) -> None:
    model = random_model(seed)
    twin = theirs(model)
    ours = complete(model, None, PROMPTS, Sampling(max_tokens=24, repetition_penalty=penalty))
    assert len({id for completion in ours for id in completion.tokens}) > 10, "one id repeated would prove little"
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        expected = twin.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=penalty,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert completion.tokens == [id for id in expected if id != 2]
        assert (completion.finish == "stop") == (2 in expected)


@pytest.mark.parametrize(("penalty", "key"), [(1.0, "batch_greedy"), (1.2, "batch_greedy_repetition_penalty_1.2")])
def test_greedy_equals_what_mindformers_generated(shared: Path, penalty: float, key: str) -> None:
    fixtures = shared / "fixtures" / "mindspore"
    config = ModelConfig.from_json(json.loads((fixtures / "ckpt" / "hf_config.json").read_text()))
    model = Llama(config)
    weights = np.load(fixtures / "ckpt" / "tiny_llama_hf_fp32.npz")
    model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
    reference = json.loads((fixtures / "reference" / "generate.json").read_text())
    prompts = [[id for id in row if id] for row in reference["input_ids_right_padded_to_64"]]
    assert [len(prompt) for prompt in prompts] == [20, 21]
    samplings = [Sampling(max_tokens=48 - len(prompt), repetition_penalty=penalty) for prompt in prompts]
    ours = complete(model, None, prompts, samplings)
    assert [prompt + completion.tokens for prompt, completion in zip(prompts, ours, strict=True)] == reference[key]
