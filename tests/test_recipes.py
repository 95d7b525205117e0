"""The shipped recipes: what their comments and the guide for newcomers promise is so."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

import puna
from puna.config import RECIPES, Recipe, load_recipe, recipe_names
from puna.launch import launch
from puna.model.config import PRESETS
from puna.parallel.layout import Layout

DEVICES = re.compile(r"(\d+) devices? of (\d+) GiB")
OVERRIDE = re.compile(r"\b[a-z_]+(?:\.[a-z_]+)?=[^\s,;:]*[^\s,;:.]")


def comment_of(name: str) -> str:
    """The comment above a recipe, in one line."""
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def commands_of(name: str) -> list[list[str]]:
    """The commands in the comment above a recipe."""
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    return [shlex.split(line.removeprefix("#")) for line in lines if line.startswith("#   puna ")]


def state_gib(recipe: Recipe, devices: int) -> float:
    """What weights, gradients and optimizer state take on each of so many devices, by the arithmetic alone."""
    weight, gradient = 2 if recipe.precision == "bf16-pure" else 4, 4
    state = weight if recipe.optimizer.state_bits == 32 else recipe.optimizer.state_bits / 8
    a_weight = weight + 2 * state + (0 if recipe.optimizer.in_backward else gradient)
    return PRESETS[recipe.model].parameter_count * a_weight / devices / 2**30


LARGE = [name for name in recipe_names() if name.startswith("codellama")]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_how_its_data_is_prepared_and_how_it_is_started(name: str) -> None:
    recipe = load_recipe(name)
    prepare, *starts = commands_of(name)
    assert prepare[:2] == ["puna", "prepare"]
    assert prepare[prepare.index("-o") + 1] == recipe.data.train
    assert {tuple(words[2:3]) for words in starts} == {(name,)}
    assert recipe.run_dir == f"runs/{name}"
    if name in LARGE:
        assert ("--fim-rate" in prepare) == (prepare[2] == "code" and "34b" not in name)


@pytest.mark.parametrize("name", LARGE)
def test_the_devices_that_a_recipe_names_are_a_layout_and_hold_its_state(name: str) -> None:
    recipe = load_recipe(name)
    named = [(int(devices), int(memory)) for devices, memory in DEVICES.findall(comment_of(name))]
    assert named
    for devices, memory in named:
        Layout.of(recipe, PRESETS[recipe.model], devices)
        assert state_gib(recipe, devices) < 0.95 * memory


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_fits_the_devices_that_it_names(name: str) -> None:
    for devices, memory in DEVICES.findall(comment_of(name)):
        own = puna.plan(name, devices=int(devices), memory_gib=float(memory), layout=True)["own"]
        assert own["fits"], own["memory_gib"]


#: A recipe's words on a model of another size: devices, memory, and what to change.
OTHER_SIZE = re.compile(r"(?:13B|70B)[^.:]* on (\d+) devices of (\d+) GiB: ((?:\S+=\S+ ?)+)")


@pytest.mark.parametrize("name", [name for name in LARGE if re.search("13B|70B, ", comment_of(name))])
def test_another_size_fits_the_devices_that_a_recipe_names_for_it(name: str) -> None:
    ((devices, memory, changes),) = OTHER_SIZE.findall(comment_of(name))
    own = puna.plan(name, OVERRIDE.findall(changes), devices=int(devices), memory_gib=float(memory), layout=True)["own"]
    assert own["fits"], own


def test_34b_on_one_device_fits_the_faster_ways_that_its_recipe_names() -> None:
    name = "codellama-34b-finetune-1gpu"
    four_bits = {"optimizer.state_bits": 4}
    at_once = {"optimizer.max_grad_norm": None, "batch_tokens": 8192, "micro_batch_rows": 2, "recompute_layers": 34}
    speeds = []
    for changes in ({}, four_bits | {"micro_batch_rows": 4, "recompute_layers": 44}, four_bits | at_once):
        own = puna.plan(name, changes, memory_gib=139, layout=True)["own"]
        assert own["fits"]
        speeds.append(own["tokens_per_second"])
    assert speeds == sorted(speeds)


@pytest.mark.parametrize("name", LARGE)
def test_the_overrides_that_a_recipe_names_are_accepted_for_the_devices_it_names(name: str) -> None:
    for together in re.finditer(rf"(?:{OVERRIDE.pattern} ?)+", comment_of(name)):
        load_recipe(name, OVERRIDE.findall(together[0]))
    starts = [words for words in commands_of(name) if words[1] == "launch"]
    for words in starts:
        options = dict(pairwise(words))
        nodes, gpus = int(options.get("--nodes", 1)), int(options["--gpus"])
        assert launch(name, [word for word in words[3:] if "=" in word], nodes=nodes, gpus=gpus, format="slurm")
        assert any(int(devices) == nodes * gpus for devices, _ in DEVICES.findall(comment_of(name)))


@pytest.mark.parametrize(
    ("name", "axes", "micro_batches", "rows"),
    [
        ("codellama-34b-pretrain", {"tp": 8, "pp": 2, "dp_shard": 1}, 128, 128),
        ("codellama-34b-finetune-16p", {"tp": 8, "pp": 2, "dp_shard": 1}, 128, 128),
        ("codellama-34b-finetune-32p", {"tp": 4, "pp": 4, "dp_shard": 2}, 128, 256),
    ],
)
def test_the_recipes_of_mindformers_have_its_layout_and_numbers(
    name: str, axes: dict[str, int], micro_batches: int, rows: int
) -> None:
    recipe = load_recipe(name)
    devices = axes["tp"] * axes["pp"] * axes["dp_shard"]
    layout = Layout.of(recipe, PRESETS[recipe.model], devices)
    assert {axis: getattr(layout, axis) for axis in axes} == axes
    assert (layout.micro_batches, recipe.batch_rows, recipe.sequence_length) == (micro_batches, rows, 4096)
    optimizer, schedule = recipe.optimizer, recipe.schedule
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.95), 1e-8, 0)
    assert (optimizer.peak_lr, optimizer.max_grad_norm) == (1e-5, 1)
    assert (schedule.name, schedule.final_fraction) == ("cosine", 0)
    assert schedule.warmup_steps == 0.03 * recipe.steps


@pytest.mark.parametrize(("name", "peak_lr"), [("codellama-7b-paper", 3e-4), ("codellama-34b-paper", 1.5e-4)])
def test_the_papers_schedule_is_500_billion_tokens_in_batches_of_4_million(name: str, peak_lr: float) -> None:
    recipe = load_recipe(name)
    assert recipe.batch_tokens == 4 * 2**20
    assert recipe.steps * recipe.batch_tokens == pytest.approx(500e9, rel=1e-5)
    assert (recipe.optimizer.peak_lr, recipe.optimizer.betas) == (peak_lr, (0.9, 0.95))
    assert (recipe.schedule.warmup_steps, recipe.schedule.final_fraction) == (1000, pytest.approx(1 / 30))


@pytest.mark.parametrize(
    ("name", "batch_tokens", "steps"), [("codellama-7b-long", 2 * 2**20, 3000), ("codellama-34b-long", 2**20, 11_000)]
)
def test_the_long_stage_is_the_papers(name: str, batch_tokens: int, steps: int) -> None:
    recipe = load_recipe(name)
    assert (recipe.sequence_length, recipe.batch_tokens, recipe.steps) == (16_384, batch_tokens, steps)
    assert recipe.optimizer.peak_lr == 2e-5
    assert PRESETS[recipe.model].rope_theta == 1e6
    assert PRESETS[recipe.model].max_position_embeddings == 16_384


def test_the_fields_and_recipes_that_the_guide_for_newcomers_names_exist() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "coming_from_mindformers.md").read_text()
    fields = re.findall(r"`((?:data|optimizer|parallel|schedule|validation|checkpoint|log)\.[a-z_]+)[`:]", guide)
    assert len(fields) > 20
    for field in fields:
        group, name = field.split(".")
        assert name in Recipe.model_fields[group].annotation.model_fields, field
    named = set(re.findall(r"`(codellama-[a-z0-9-]+)`", guide)) - set(PRESETS)
    assert named <= set(recipe_names())
