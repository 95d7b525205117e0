"""What a plan counts is what is there; layouts that it proposes are possible; rows add up."""

import json
import math
import shlex
import subprocess
import sys
from typing import Any

import pytest

import puna
from puna.checkpoint.huggingface import parameter_shapes
from puna.cli import run
from puna.config import load_recipe
from puna.errors import UsageError
from puna.model.config import PRESETS, preset
from puna.model.shapes import weight_shapes
from puna.parallel.layout import Layout
from puna.plan import REMEDIES


@pytest.mark.parametrize("name", ["tiny-64", "codellama-7b", "codellama-34b", "codellama-70b"])
def test_the_weights_that_are_counted_are_those_of_the_model(name: str) -> None:
    kinds = weight_shapes(preset(name))
    layers = preset(name).num_hidden_layers
    counted = sum(
        (layers if kind == "layer" else 1) * sum(map(math.prod, shapes.values())) for kind, shapes in kinds.items()
    )
    assert counted == sum(map(math.prod, parameter_shapes(preset(name)).values()))


@pytest.mark.parametrize(
    ("changes", "bytes_each"),
    [([], 4 + 8), (["precision=bf16-pure"], 2 + 4), (["optimizer.state_bits=8"], 4 + 2 * (1 + 4 / 64))],
)
def test_a_checkpoint_is_as_large_as_weights_and_state(changes: list[str], bytes_each: int) -> None:
    result = puna.plan("codellama-7b-pretrain", changes, device="h100", layout=True)
    expected = bytes_each * preset("codellama-7b").parameter_count / 2**30
    assert result["checkpoint_gib"] == pytest.approx(expected, rel=1e-3)


def test_layouts_that_are_proposed_are_accepted_and_fit_and_their_rows_add_up() -> None:
    result = puna.plan("codellama-34b-pretrain", devices=16, device="ascend-910b")
    assert result["best"]
    for each in result["best"]:
        recipe = load_recipe("codellama-34b-pretrain", each["overrides"])
        Layout.of(recipe, PRESETS["codellama-34b"], 16)
        assert each["memory_gib"] <= result["memory_gib"]
        assert sum(each["memory"].values()) == pytest.approx(each["memory_gib"])
    speeds = [each["tokens_per_second"] for each in result["best"]]
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize(
    ("devices", "start", "how_many"),
    [
        (1, "train", ""),
        (4, "train", "--nproc 4"),
        (16, "launch", "--nodes 2 --gpus 8 --master-addr HOST"),
        (12, "launch", "--nodes 2 --gpus 6 --master-addr HOST"),
    ],
)
def test_the_commands_that_are_printed_are_taken_by_a_shell_as_they_are(
    devices: int, start: str, how_many: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["data.train={it's $HOME: 0.9, 'a b': 0.1}", "batch_tokens=98304"]
    assert run(["plan", "tiny-pretrain", *given, "--devices", str(devices), "--device", "h100"]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("    puna ")]
    assert len(commands) == 5
    for words in commands:
        assert words[:3] == ["puna", start, "tiny-pretrain"]
        overrides = [word for word in words[3:] if "=" in word]
        assert words[3:] == [*overrides, *how_many.split()]
        recipe = load_recipe("tiny-pretrain", overrides)
        assert recipe.data.weights == {"it's $HOME": 0.9, "a b": 0.1}
        assert Layout.of(recipe, PRESETS[recipe.model], devices).devices == devices
        if start == "launch":
            assert run([*words[1:], "--master-addr", "node-0"]) == 0


def test_an_override_that_the_plan_changes_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["plan", "tiny-pretrain", "parallel.tp=3", "micro_batch_rows=1", "--devices", "2", "--device", "h100"]) == 0
    )
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("    puna ")]
    for words in commands:
        fields = [word.partition("=")[0] for word in words if "=" in word]
        assert len(fields) == len(set(fields))
        assert "parallel.tp=3" not in words


def test_only_what_a_recipe_may_say_is_proposed() -> None:
    changes = {"arithmetic": "mindformers", "batch_tokens": 2048}
    result = puna.plan("tiny-pretrain", changes, devices=4, device="h100", best=1000)
    assert result["best"]
    for each in result["best"]:
        load_recipe(load_recipe("tiny-pretrain", changes).model_dump(), each["overrides"])


def test_rows_beyond_the_models_context_are_no_plan() -> None:
    result = puna.plan("codellama-7b-long", {"sequence_length": 32_768}, devices=8, device="h200")
    message = "sequence_length=32768 is beyond the model's context of 16384 (max_position_embeddings); use that or less"
    assert not result["fits"]
    assert result["own"]["reason"] == message
    assert [each["reason"].split("; use")[0] for each in result["impossible"]] == [message.split("; use")[0]]


def test_34b_is_fine_tuned_on_one_device_of_139_gib_only_with_a_small_state() -> None:
    small = puna.plan("codellama-34b-finetune-1gpu", memory_gib=139, layout=True)
    assert small["own"]["fits"]
    full = puna.plan("codellama-34b-finetune-1gpu", {"optimizer.state_bits": 32}, memory_gib=139, layout=True)
    assert not full["own"]["fits"]
    assert full["own"]["memory_gib"] > 139


def test_what_would_help_is_said_where_nothing_fits() -> None:
    result = puna.plan("codellama-7b-pretrain", devices=2, memory_gib=40)
    assert result["best"] == []
    helped = {each["change"]: each for each in result["help"]}
    assert {"optimizer.state_bits=8", "4 devices", REMEDIES[-1]} <= helped.keys()
    assert helped[REMEDIES[-1]]["fits"]
    assert all(each["memory_gib"] < result["nearest"]["memory_gib"] for each in result["help"])


@pytest.mark.parametrize("remedy", REMEDIES)
def test_every_remedy_is_of_a_recipes_fields(remedy: str) -> None:
    load_recipe("codellama-7b-pretrain", remedy.split())


@pytest.mark.parametrize("devices", [1, 8])
def test_compiled_layers_take_with_selective_what_they_take_without(devices: int) -> None:
    def own(recompute: str) -> dict[str, Any]:
        changes = {"compile": True, "recompute": recompute, "micro_batch_rows": 1}
        found = puna.plan("codellama-7b-pretrain", changes, devices=devices, memory_gib=139, layout=True)["own"]
        return {name: found[name] for name in ("memory", "seconds")}

    assert own("selective") == own("none") != own("block")


def test_offload_frees_the_inputs_of_all_layers_but_two() -> None:
    def activations(recompute: str) -> float:
        changes = {"recompute": recompute, "micro_batch_rows": 1}
        return puna.plan("codellama-34b-finetune-1gpu", changes, memory_gib=139, layout=True)["own"]["memory"][
            "activations"
        ]

    inputs = 4096 * 8192 * 2 / 2**30  # of a layer: tokens, width, bf16
    assert activations("block") - activations("offload") == pytest.approx(46 * inputs)


def test_longer_rows_never_take_less_and_more_shards_never_more() -> None:
    def gib(length: int, devices: int) -> float:
        changes = {"sequence_length": length, "batch_tokens": 128 * 4096, "model": "codellama-7b"}
        return puna.plan("codellama-7b-pretrain", changes, devices=devices, memory_gib=80, layout=True)["own"][
            "memory_gib"
        ]

    assert gib(1024, 8) <= gib(2048, 8) <= gib(4096, 8)
    assert gib(4096, 32) <= gib(4096, 16) <= gib(4096, 8)


def test_wrong_usage_and_what_does_not_fit_have_exit_codes_of_their_own() -> None:
    for memory_gib in (0, -5, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=f"memory_gib={memory_gib} must be above 0"):
            puna.plan("codellama-34b-finetune-16", memory_gib=memory_gib)
    for bandwidth in (0, -5, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=f"bandwidth={bandwidth} must be above 0"):
            puna.plan("codellama-34b-finetune-16", device="h100", bandwidth=bandwidth)
    with pytest.raises(UsageError, match="there is no device 'abacus'"):
        puna.plan("codellama-7b-pretrain", device="abacus")
    command = [sys.executable, "-m", "puna", "plan", "codellama-70b-pretrain", "--memory-gib", "8", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert not json.loads(done.stdout)["fits"]
