"""Ranks that share a model choose the tokens that one process chooses with all of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna.checkpoint import load, quantize, room, save_model
from puna.checkpoint.huggingface import load_quantized_config
from puna.checkpoint.weights import open_weights
from puna.cli import run
from puna.errors import PunaError, UsageError
from puna.generate import Engine, complete
from puna.model.config import preset
from puna.model.llama import Llama, init_weights
from puna.model.split import split_dim
from puna.parallel import start
from puna.parallel.inference import Share
from puna.testing import PeakAnonymousMemory, tiny_model, write_tiny_model
from tests.generate import sharing_ranks
from tests.generate.sharing_ranks import GREEDY, PROMPTS, SAMPLED

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
WIDE = {**HEADS, "head_dim": 16, "hidden_size": 128, "intermediate_size": 256}

#: Folder -> fields of its model.
PLAIN: dict[str, dict[str, Any]] = {
    "plain": HEADS,
    "tied, with biases": {
        **HEADS,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    },
}
#: Folder -> scheme and groups that make it of a model with the fields of `WIDE`.
QUANTIZED: dict[str, dict[str, Any]] = {"int8": {"scheme": "int8"}, "int4": {"scheme": "int4", "group_size": 32}}

MODELS = [*PLAIN, *QUANTIZED]
SIZES = [2, 4]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each model; biases are random."""
    place = tmp_path_factory.mktemp("models")
    for name, fields in {**PLAIN, "wide": WIDE}.items():
        model = tiny_model(**fields)
        for weight_name, weight in model.named_parameters():
            if weight_name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.2)
        save_model(model, place / name)
    for name, how in QUANTIZED.items():
        quantize(place / "wide", place / name, **how)
    return {name: place / name for name in MODELS}


@pytest.fixture(scope="module")
def ranks(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four processes found: by the number of those that share a model, and by its folder."""
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "PUNA", [sharing_ranks.__file__])
        assert start.start_processes([str(results), *map(str, folders.values())], 4) == 0
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_ranks_choose_the_tokens_of_the_plain_loop(ranks, folders: dict[str, Path], name: str, size: int) -> None:
    model, _ = load(folders[name], dtype=torch.float32)
    greedy, sampled = (
        [completion.tokens for completion in complete(model, None, PROMPTS, samplings)]
        for samplings in (GREEDY, SAMPLED)
    )
    for rank in ranks:
        assert rank[str(size)][name]["greedy"] == greedy
        assert rank[str(size)][name]["sampled"] == sampled
        assert rank[str(size)][name]["given_way"] > 0
        assert rank[str(size)][name]["leaked"] == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_in_8_bits_and_with_a_draft_they_choose_what_one_process_chooses(
    ranks, folders: dict[str, Path], name: str, size: int
) -> None:
    model, _ = load(folders[name], dtype=torch.float32)
    engine = Engine(model, cache_tokens=256, cache_dtype="int8")
    expected = [completion.tokens for completion in engine.generate(PROMPTS, GREEDY)]
    assert all(rank[str(size)][name]["in_int8"] == expected for rank in ranks)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_all_ranks_have_the_same_logits_to_the_last_bit(ranks, name: str, size: int) -> None:
    assert len({rank[str(size)][name]["logits"] for rank in ranks}) == 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PLAIN)
def test_a_rank_holds_its_share_of_weights_and_cache(ranks, folders: dict[str, Path], name: str, size: int) -> None:
    model, _ = load(folders[name])
    share = sum(w.numel() // (1 if split_dim(n) is None else size) for n, w in model.named_parameters())
    for rank in ranks:
        assert rank[str(size)][name]["parameters"] == share
        assert rank[str(size)][name]["kv_heads"] == 4 // size


def test_a_shared_model_does_not_stream(ranks) -> None:
    assert all("cannot stream" in rank["2"]["plain"]["stream"] for rank in ranks)


def test_a_share_without_room_is_told_what_a_share_of_few_bits_would_take(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    size_bytes = sum(weight.nbytes for weight in load(folders["plain"])[0].parameters())
    monkeypatch.setattr(room, "free_memory_bytes", lambda device: size_bytes // 5)
    with pytest.raises(PunaError, match=r"the weights need .* int8 .* would fit"):
        load(folders["plain"], share=lambda config: Share(config, _Ranks(4)))  # type: ignore[arg-type]
    with pytest.raises(PunaError, match="no quantisation would help"):
        load(folders["plain"])


class _Ranks:
    """A process group that exchanges nothing."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self.size, self.rank = lambda: size, lambda: rank


def test_the_shares_of_all_ranks_make_up_the_stored_tensors(folders: dict[str, Path]) -> None:
    for name in MODELS:
        config, _ = load_quantized_config(folders[name])
        shares = [Share(config, _Ranks(4, rank)) for rank in range(4)]  # type: ignore[arg-type]
        for tensor_name, stored in open_weights(folders[name]).items():
            whole, made = stored.read(), torch.zeros(stored.shape, dtype=stored.dtype)
            for share in shares:
                index = share.index(tensor_name, stored.shape)
                part = stored.part(index)
                made[index] = part.read()
                assert part.shape == made[index].shape
            assert torch.equal(made, whole)


def test_a_share_is_loaded_in_the_memory_of_a_share(tmp_path: Path) -> None:
    config = replace(preset("tiny-512"), vocab_size=8000)
    model = Llama(config)
    init_weights(model, seed=0)
    save_model(model, tmp_path / "model")
    size_bytes = sum(weight.nbytes for weight in model.parameters())
    with PeakAnonymousMemory() as memory:
        share, _ = load(tmp_path / "model", share=lambda config: Share(config, _Ranks(8)))  # type: ignore[arg-type]
    assert share.config == config
    assert memory.grown_bytes < size_bytes / 4


@pytest.mark.parametrize(
    ("fields", "size", "expected"),
    [
        ({}, 8, r"the number of processes=8 must divide the 4 key/value heads; use one of \[1, 2, 4\]"),
        ({"vocab_size": 510}, 4, r"must divide intermediate_size=176 and vocab_size=510; use one of \[1, 2\]"),
    ],
)
def test_too_many_processes_are_refused_with_the_numbers_that_would_do(
    fields: dict[str, Any], size: int, expected: str
) -> None:
    config = tiny_model(**HEADS, **fields).config
    with pytest.raises(UsageError, match=expected):
        Share(config, _Ranks(size))  # type: ignore[arg-type]


def test_a_process_alone_has_no_share() -> None:
    with pytest.raises(UsageError, match="started together; use --nproc, or torchrun"):
        Share(tiny_model().config)


def test_a_group_of_quantised_weights_is_not_cut() -> None:
    share = Share(tiny_model(**HEADS).config, _Ranks(4))  # type: ignore[arg-type]
    name = "model.layers.0.mlp.down_proj.weight_scale"
    assert share.index(name, (64, 8)) == (slice(0, 64), slice(0, 2))
    assert share.index(name, (64, 1)) == (slice(0, 64), slice(0, 1)), "a scale of whole rows is every rank's"
    with pytest.raises(UsageError, match="has 6 groups in a row, which 4 processes cannot share"):
        share.index(name, (64, 6))


def test_the_only_group_of_a_row_is_not_cut(tmp_path: Path) -> None:
    save_model(tiny_model(**{**WIDE, "intermediate_size": 128}), tmp_path / "whole")
    quantize(tmp_path / "whole", tmp_path / "int4", scheme="int4", group_size=128)
    with pytest.raises(UsageError, match="o_proj has 1 group in a row, which 2 processes cannot share; start fewer"):
        load(tmp_path / "int4", share=lambda config: Share(config, _Ranks(2)))  # type: ignore[arg-type]
    load(tmp_path / "int4", share=lambda config: Share(config, _Ranks(1)))  # type: ignore[arg-type]


def test_the_command_speaks_once_and_says_what_one_process_says(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_model(tmp_path / "model")
    prompts = ["def bubble_sort(arr):", "def quick_sort(arr):"]
    output = tmp_path / "out.jsonl"
    command = ["generate", str(folder), *prompts, "--max-tokens", "20", "--dtype", "fp32", "-o", str(output), "--json"]
    assert run([*command, "--nproc", "2"]) == 0
    printed, said = capfd.readouterr()
    assert json.loads(printed)["output"] == str(output)
    assert said.count("2/2 completions") == 1
    expected = puna.generate(*load(folder, dtype=torch.float32), prompts, max_tokens=20)
    assert [json.loads(line)["completion"] for line in output.read_text().splitlines()] == [x.text for x in expected]


def test_infill_in_two_processes_says_what_one_says(
    tiny_model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "code.py"
    file.write_text("retur<FILL>\n")
    command = ["infill", str(tiny_model_folder), "--file", str(file), "--max-tokens", "8", "--order", "spm"]
    assert run([*command, "--no-healing", "--nproc", "2"]) == 0
    model, tokenizer = puna.load(tiny_model_folder)
    expected = puna.infill(model, tokenizer, "retur", "\n", order="spm", healing=False, max_tokens=8)
    assert capfd.readouterr().out == expected.text + "\n"


def test_what_befalls_one_process_ends_all_with_a_line_each(
    tmp_path: Path, tiny_model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"  # no folder; only the first process writes, and so only it finds out
    file.write_text("")
    assert run(["generate", str(tiny_model_folder), "def", "-o", str(file / "out.jsonl"), "--nproc", "2"]) == 1
    printed, said = capfd.readouterr()
    assert printed == ""
    assert f"{file} is a file" in said
    assert "Traceback" not in said


def test_each_process_is_given_the_same_command_without_nproc(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(start, "start_processes", lambda words, count: started.append((words, count)) or 0)
    given = ["--nproc", "4", "--stop", "--", "--stop", "-x", "-o", "out.jsonl", "--ignore-eos", "--seed", "3"]
    assert run(["generate", *given, "folder", "--", "-1", "a b"]) == 0
    ((words, count),) = started
    assert count == 4
    assert words[-4:] == ["--", "folder", "-1", "a b"]
    assert {"--stop=--", "--stop=-x", "--output=out.jsonl", "--ignore-eos", "--seed=3"} < set(words)
    assert not any("nproc" in word or word == "--json" for word in words)
    assert run(["infill", "folder", "--prefix", "", "--no-healing", "--nproc", "2"]) == 0
    (_, (words, _)) = started
    assert {"--prefix=", "--no-healing"} < set(words)
    assert run(["infill", "folder", "--prefix", "", "--nproc", "2"]) == 0
    assert "--healing" in started[-1][0]
