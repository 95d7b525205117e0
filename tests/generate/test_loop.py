"""The plain loop, held against transformers, against a real MindFormers run, and against each row on its own."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from puna.checkpoint import load, save_model
from puna.errors import PunaError, UsageError
from puna.generate import Sampling, complete
from puna.generate.loop import _decode, _prefill
from puna.generate.sequence import Sequence
from puna.model.cache import KVCache
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.testing import ScriptedModel, tiny_model
from puna.tokenizer import Tokenizer

PROMPTS = [[1, 17, 203, 44], [1, 99], [1, 5, 6, 7, 8, 9, 10, 11, 300, 301, 302], [1, 44, 44, 17]]


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
    model = tiny_model(seed)
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


SAMPLED = Sampling(temperature=1.0, top_k=40, top_p=0.95, max_tokens=30)


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=30), SAMPLED], ids=["greedy", "sampled"])
def test_prompts_of_different_lengths_together_equal_each_alone(model: Llama, sampling: Sampling) -> None:
    samplings = [replace(sampling, seed=seed) for seed in range(len(PROMPTS))]
    together = complete(model, None, PROMPTS, samplings)
    alone = [complete(model, None, [prompt], s)[0] for prompt, s in zip(PROMPTS, samplings, strict=True)]
    in_pairs = complete(model, None, PROMPTS, samplings, batch_rows=2)
    assert together == alone == in_pairs
    assert len({tuple(completion.tokens) for completion in together}) == len(PROMPTS)


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 511), min_size=1, max_size=20), min_size=1, max_size=5),
    steps=st.integers(0, 4),
)
def test_logits_of_a_padded_batch_are_those_of_a_plain_forward(
    model: Llama, prompts: list[list[int]], steps: int
) -> None:
    sequences = [Sequence(i, prompt, Sampling(), model.config, None) for i, prompt in enumerate(prompts)]
    cache = KVCache(model.config, len(prompts), 32)
    with torch.inference_mode():
        logits = _prefill(model, cache, sequences)
        for step in range(steps):
            for sequence in sequences:
                sequence.tokens.append((7 * step + 11 * sequence.index) % 512)
            logits = _decode(model, cache, sequences)
        for sequence, row in zip(sequences, logits, strict=True):
            plain = model(torch.tensor([sequence.tokens]))[0, -1]
            torch.testing.assert_close(row, plain, atol=1e-5 * plain.abs().max().item(), rtol=0)


def test_a_completion_depends_on_its_seed_and_prompt_alone(model: Llama) -> None:
    def sampled(prompt: list[int], seed: int) -> tuple[list[int], Sampling]:
        return prompt, replace(SAMPLED, seed=seed)

    def run(*rows: tuple[list[int], Sampling]) -> list[list[int]]:
        return tokens_of(complete(model, None, [row[0] for row in rows], [row[1] for row in rows]))

    first = run(sampled([1, 5], 3))[0]
    greedy = ([1, 2, 3], Sampling(max_tokens=3))
    assert run(greedy, sampled([1, 9, 9, 9, 9], 0), sampled([1, 5], 3), sampled([1, 5], 4))[2] == first
    assert run(sampled([1, 5], 3), sampled([1, 5], 3)) == [first, first]
    others = run(*(sampled([1, 5], seed) for seed in range(4, 10)))
    assert len({tuple(tokens) for tokens in [first, *others]}) == 7


def test_rows_with_samplings_of_their_own_do_not_mix(model: Llama) -> None:
    samplings = [
        Sampling(max_tokens=4),
        Sampling(max_tokens=9, repetition_penalty=1.5),
        SAMPLED,
        Sampling(max_tokens=1),
    ]
    together = complete(model, None, PROMPTS, samplings)
    assert together == [complete(model, None, [p], s)[0] for p, s in zip(PROMPTS, samplings, strict=True)]
    assert [len(completion.tokens) for completion in together] == [4, 9, 30, 1]


def test_finished_rows_leave_the_batch() -> None:
    model = ScriptedModel([7, 8, 9, 10, 11], prompt_tokens=2)
    samplings = [Sampling(max_tokens=n) for n in (3, 1, 5, 1)]
    completions = complete(model, None, [[1, 4]] * 4, samplings)
    assert tokens_of(completions) == [[7, 8, 9], [7], [7, 8, 9, 10, 11], [7]]
    assert model.batch_sizes == [4, 2, 2, 1, 1]


def scripted(tokenizer: Tokenizer, text: str, prompt: list[int], *, ends: list[int] | None = None) -> ScriptedModel:
    ids = tokenizer.encode(text, leading_space=False)
    return ScriptedModel([*ids, *([tokenizer.eos_id] if ends is None else ends)], prompt_tokens=len(prompt))


def test_eos_ends_a_completion_and_is_no_part_of_it(tokenizer: Tokenizer) -> None:
    model = scripted(tokenizer, "x = 1", [1, 4])
    (completion,) = complete(model, tokenizer, [[1, 4]], Sampling())
    assert (completion.text, completion.finish, completion.prompt_tokens) == ("x = 1", "stop", 2)
    assert tokenizer.eos_id not in completion.tokens
    assert tokenizer.decode(completion.tokens, leading_space=False) == "x = 1"


def test_eot_and_stop_ids_end_a_completion_too(tokenizer: Tokenizer) -> None:
    assert tokenizer.infilling is not None
    at_eot = scripted(tokenizer, "x = 1", [1, 4], ends=[tokenizer.infilling.eot_id, 70])
    assert complete(at_eot, tokenizer, [[1, 4]], Sampling())[0].text == "x = 1"
    at_70 = scripted(tokenizer, "x = 1", [1, 4], ends=[70, 71])
    (completion,) = complete(at_70, tokenizer, [[1, 4]], Sampling(stop_ids=(70,)))
    assert (completion.text, completion.finish) == ("x = 1", "stop")
    assert 70 not in completion.tokens


def test_ignore_eos_goes_on_to_max_tokens(tokenizer: Tokenizer) -> None:
    model = scripted(tokenizer, "x", [1, 4])
    (completion,) = complete(model, tokenizer, [[1, 4]], Sampling(max_tokens=9, ignore_eos=True))
    assert (len(completion.tokens), completion.finish) == (9, "length")
    assert completion.tokens.count(tokenizer.eos_id) == 9 - len(tokenizer.encode("x", leading_space=False))
    assert completion.text == "x"


def test_without_a_tokenizer_the_models_own_eos_ends() -> None:
    model = ScriptedModel([7, 2, 8], prompt_tokens=1)
    assert tokens_of(complete(model, None, [[1]], Sampling())) == [[7]]


def test_an_end_that_generation_config_names_alone_ends_a_completion(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path / "model")
    settings = tmp_path / "model" / "generation_config.json"

    def tokens() -> list[int]:
        model, _ = load(tmp_path / "model")
        return complete(model, None, [[1, 5]], Sampling(max_tokens=6))[0].tokens

    whole = tokens()
    settings.write_text(json.dumps({"eos_token_id": [2, whole[3]]}))
    assert tokens() == whole[: whole.index(whole[3])]


def test_a_stop_string_that_spans_tokens_cuts_the_text_before_it(tokenizer: Tokenizer) -> None:
    model = scripted(tokenizer, "x = 1\n\ndef f(): pass", [1, 4])
    stop = "1\n\nde"
    assert not any(stop in tokenizer.decode([id], leading_space=False) for id in model.script)
    (completion,) = complete(model, tokenizer, [[1, 4]], Sampling(stop=("zzz", stop)))
    assert (completion.text, completion.finish) == ("x = ", "stop")
    spelled = tokenizer.decode(completion.tokens, leading_space=False)
    assert stop in spelled
    assert "f()" not in spelled


def test_the_leading_space_of_a_continuation_is_kept(tokenizer: Tokenizer) -> None:
    model = scripted(tokenizer, " return x", [1, 4])
    assert complete(model, tokenizer, [[1, 4]], Sampling())[0].text == " return x"


def test_streamed_pieces_are_whole_characters_and_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    text = "naïve 🦙 = 'ñandú'\n\ndef 高原"
    model = scripted(tokenizer, text, [1, 4])
    assert sum(tokenizer.decode([id], leading_space=False) == "\ufffd" for id in model.script) > 8
    pieces: list[str] = []
    (completion,) = complete(
        model, tokenizer, [[1, 4]], Sampling(stop=("\n\nclass",)), on_text=lambda i, piece: pieces.append(piece)
    )
    assert "".join(pieces) == completion.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 8
    assert "" not in pieces


def test_streamed_text_is_never_taken_back_by_a_stop_string(tokenizer: Tokenizer) -> None:
    model = scripted(tokenizer, "x = 1\n\ndefault = 2\n\ndef f", [1, 4])
    pieces: dict[int, list[str]] = {0: [], 1: []}
    samplings = [Sampling(stop=("\n\ndef ",)), Sampling(stop=("\n\nd",))]
    completions = complete(
        model, tokenizer, [[1, 4], [1, 4]], samplings, on_text=lambda i, piece: pieces[i].append(piece)
    )
    assert [completion.text for completion in completions] == ["x = 1\n\ndefault = 2", "x = 1"]
    assert ["".join(pieces[i]) for i in (0, 1)] == [completion.text for completion in completions]


def test_what_was_held_back_for_a_stop_string_comes_with_the_end(tokenizer: Tokenizer) -> None:
    model = scripted(tokenizer, "x\n\n", [1, 4])
    assert complete(model, tokenizer, [[1, 4]], Sampling(stop=("\n\n\n",)))[0].text == "x\n\n"


def test_half_a_character_at_the_end_is_marked_as_lost(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦙", leading_space=False)[:-1]
    model = ScriptedModel(ids, prompt_tokens=2)
    (completion,) = complete(model, tokenizer, [[1, 4]], Sampling(max_tokens=len(ids)))
    assert completion.text == "a\ufffd"


def test_a_full_context_ends_a_completion() -> None:
    model = tiny_model(max_position_embeddings=16)
    prompts = [[1] * 10, [1] * 15, [1]]
    completions = complete(model, None, prompts, Sampling(max_tokens=50, ignore_eos=True))
    assert [len(completion.tokens) for completion in completions] == [6, 1, 15]
    assert {completion.finish for completion in completions} == {"length"}


def test_ids_that_the_tokenizer_cannot_spell_are_never_chosen(tokenizer: Tokenizer) -> None:
    model = tiny_model(vocab_size=600)
    with torch.no_grad():
        model.lm_head.weight[512:] *= 50
    (without,) = complete(model, None, [[1, 5]], Sampling(max_tokens=10))
    assert max(without.tokens) >= 512
    (completion,) = complete(model, tokenizer, [[1, 5]], Sampling(max_tokens=10))
    assert len(completion.tokens) == 10
    assert max(completion.tokens) < 512


def test_half_precision_models_generate() -> None:
    model = tiny_model().to(torch.bfloat16)
    assert len(complete(model, None, PROMPTS, Sampling(max_tokens=3, ignore_eos=True))[0].tokens) == 3
    model = tiny_model()
    model.compute_dtype = torch.bfloat16
    assert len(complete(model, None, PROMPTS, Sampling(max_tokens=3, ignore_eos=True))[0].tokens) == 3


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, 2], []], "prompt 1 is empty"),
        ([[1, 512]], "prompt 0 holds id 512, but the model's vocabulary has 512 ids"),
        ([[1], [-1]], "prompt 1 holds id -1"),
        ([[1] * 2048], "prompt 0 has 2048 tokens and the model's context 2048"),
    ],
)
def test_a_prompt_that_cannot_be_completed_is_named(model: Llama, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(PunaError, match=message):
        complete(model, None, prompts, Sampling())


def test_no_prompts_no_completions(model: Llama) -> None:
    assert complete(model, None, [], Sampling()) == []


def test_a_list_of_samplings_must_fit_the_prompts(model: Llama) -> None:
    with pytest.raises(UsageError, match="2 samplings for 1 prompts"):
        complete(model, None, [[1]], [Sampling(), Sampling()])


def test_stop_strings_need_a_tokenizer(model: Llama) -> None:
    with pytest.raises(UsageError, match="stop strings need a tokenizer"):
        complete(model, None, [[1]], Sampling(stop=("x",)))
