"""Recipes: strict, overridable, and helpful when wrong."""

import pytest
import yaml

from puna.config import load_recipe, recipe_names
from puna.errors import UsageError

SMALL = {
    "model": "tiny-64",
    "data": {"train": "data/mine"},
    "sequence_length": 16,
    "run_dir": "runs/x",
    "steps": 10,
    "batch_tokens": 64,
}


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_survives_its_own_yaml(name: str) -> None:
    recipe = load_recipe(name)
    assert load_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_a_yaml_of_mindformers_is_named_with_the_command_that_translates_it(tmp_path) -> None:
    (tmp_path / "old.yaml").write_text("runner_config: {epochs: 2}\nmodel: {model_config: {seq_length: 4096}}\n")
    with pytest.raises(UsageError, match=r"is a YAML of MindFormers; .* puna migrate .*old\.yaml -o recipe\.yaml"):
        load_recipe(tmp_path / "old.yaml")


def test_overrides_reach_nested_fields_and_keep_the_others() -> None:
    recipe = load_recipe(SMALL, ["optimizer.peak_lr=1e-5", "batch_tokens=128", "optimizer.betas=[0.8, 0.9]"])
    assert recipe.optimizer.peak_lr == 1e-5
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.optimizer.weight_decay == 0.1
    assert recipe.batch_rows == 8


def test_a_wrong_field_lists_the_fields_there_are_and_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no field optimizer\.peek_lr \(did you mean peak_lr\?\); there are name, "):
        load_recipe(SMALL, ["optimizer.peek_lr=1e-5"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_tokens=65", "must be a multiple of sequence_length=16; the nearest is 64"),
        ("micro_batch_rows=3", r"must divide the 4 rows of a batch; use one of \[1, 2, 4\]"),
        ("schedule.warmup_steps=11", "more than steps=10"),
        ("recompute_layers=1", "recompute_layers=1 needs recompute=selective, block or offload"),
        ("steps=soon", "steps='soon'"),
        ("steps=1:30", "steps='1:30': input should be a valid integer"),
        ("steps=true", "steps=True: input should be a valid integer"),
        ("run_dir=true", r"""read as bool, not as text; write 'run_dir="true"'"""),
        ("precision=fp8", "precision='fp8'"),
        ("steps", "not of the form field.name=value"),
        ("data={}", r"the field data\.train is missing"),
        ("data.train={}", r"data\.train={}: dictionary should have at least 1 item"),
        ("seed=-1", "seed=-1: input should be greater than or equal to 0"),
        ('run_dir=""', "run_dir='': string should have at least 1 character"),
        ("run_dir=0.5", r"""run_dir=0\.5 is read as float, not as text; write 'run_dir="0\.5"'"""),
        ("data.train=7", r"""data\.train=7 is read as int, not as text; write 'data\.train="7"'"""),
        ("data.train={a: 1, b: 1, a: 2}", "the value is not valid YAML: a is given twice"),
    ],
)
def test_a_wrong_value_says_what_would_do(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe(SMALL, [override])


def test_text_that_looks_like_a_number_is_taken_in_quotes() -> None:
    assert load_recipe(SMALL, ['run_dir="7"']).run_dir == "7"


@pytest.mark.parametrize("text", ["yes", "True", "2026-11-26", "010", "1:30", "0.50", "1e3"])
def test_text_of_which_other_readers_of_yaml_make_something_else_stays_text(text: str, tmp_path) -> None:
    assert load_recipe(SMALL, [f"run_dir={text}"]).run_dir == text
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**SMALL, "run_dir": "X"}).replace("X", text))
    assert load_recipe(tmp_path / "recipe.yaml").run_dir == text


def test_numbers_and_truths_may_be_spelled_as_people_do() -> None:
    words = ["steps=010", "batch_tokens=1_024", "optimizer.peak_lr=1e-5", "optimizer.eps=1.0e-7", "compile=yes"]
    recipe = load_recipe(SMALL, [*words, "data.valid=null", "optimizer.max_grad_norm=~", "seed=0"])
    assert (recipe.steps, recipe.batch_tokens, recipe.compile) == (10, 1024, True)
    assert (recipe.optimizer.peak_lr, recipe.optimizer.eps, recipe.optimizer.max_grad_norm) == (1e-5, 1e-7, None)
    assert (recipe.data.valid, recipe.seed) == (None, 0)


def test_a_path_may_begin_in_the_home_folder(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    words = ["run_dir=~/runs/x", "start=~/llama", "data.train={~/a: 1, b/~: 2}", "data.valid=~/v"]
    recipe = load_recipe(SMALL, words)
    assert (recipe.run_dir, recipe.start, recipe.data.valid) == ("/home/me/runs/x", "/home/me/llama", "/home/me/v")
    assert list(recipe.data.weights) == ["/home/me/a", "b/~"]


def test_a_field_that_is_given_twice_is_refused(tmp_path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("model: tiny-64\noptimizer: {peak_lr: 1.0e-3}\nsteps: 1\noptimizer: {weight_decay: 0}\n")
    with pytest.raises(UsageError, match=r"twice\.yaml is not valid YAML: optimizer is given twice .* line 4"):
        load_recipe(path)


def test_an_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"no recipe nonsense: neither a file nor one of .*tiny-pretrain"):
        load_recipe("nonsense")


def test_a_file_that_is_not_yaml_is_named(tmp_path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("model: [")
    with pytest.raises(UsageError, match=r"broken\.yaml is not valid YAML"):
        load_recipe(path)
