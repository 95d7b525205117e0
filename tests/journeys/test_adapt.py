"""`puna adapt` on a tiny model: it learns the code, files that were kept out say so, and nothing is done twice."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import puna
from puna.adapt import stages
from puna.adapt.recipe import WAYS, check_recipe, choose_recipe
from puna.adapt.stages import Places
from puna.checkpoint import save_model
from puna.checkpoint.weights import open_weights
from puna.cli import run
from puna.config import load_recipe
from puna.errors import PunaError, UsageError
from puna.files import read_json
from puna.story import FILE
from puna.testing import write_tiny_tasks

MODULES = ("argparse", "ast", "calendar", "cmd", "codecs", "configparser", "copy", "csv", "dis", "doctest", "enum")
MODULES += ("fractions", "ftplib", "functools", "gettext", "glob", "heapq", "inspect", "locale", "optparse")


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("datasketch", reason="near-copies are found with datasketch: pip install datasketch")
    folder = tmp_path_factory.mktemp("adapt") / "library"
    folder.mkdir()
    library = Path(os.__file__).parent
    for name in MODULES:
        (folder / f"{name}.py").write_text((library / f"{name}.py").read_text(encoding="utf-8")[:7_000])
    (folder / "glob_again.py").write_text((folder / "glob.py").read_text() + "\n# the end\n")
    return folder


@pytest.fixture(scope="module")
def adapted(code: Path, tiny_model_folder: Path) -> Path:
    write_tiny_tasks(code.parent / "tasks.jsonl", 1)
    report = puna.adapt(
        code,
        tiny_model_folder,
        code.parent / "out",
        epochs=1.0,
        held_out=0.25,
        cases=4,
        humaneval=code.parent / "tasks.jsonl",
        device="cpu",
        overrides={"optimizer.peak_lr": 1e-2},
    )
    return report.parent


def test_the_model_learns_the_code_and_files_kept_out_show_it(adapted: Path) -> None:
    results = read_json(adapted / "results.json")
    rows = {row["name"]: row["values"] for row in results["scores"]["rows"]}
    before, after = rows["Bits per byte"]
    assert after < 0.8 * before
    assert "fewer bits per byte" in results["lead"]
    model, tokenizer = puna.load(adapted / "model")
    assert model.config.hidden_size == 64
    assert tokenizer is not None


def test_what_is_scored_was_not_learned_not_even_as_a_near_copy(adapted: Path) -> None:
    kept = puna.evaluate("completion", str(adapted / "model"), corpus=adapted / "data", cases=1, device="cpu")
    info = read_json(adapted / "data/dataset.json")
    assert kept["documents"] == info["held_out"]["documents"]
    recipe = load_recipe(adapted / "run/recipe.yaml")
    assert recipe.sequence_length == 512 == info["settings"]["options"]["fim_tokens"]  # rows hold what was cut
    left_out = [json.loads(line) for line in (adapted / "data/left_out.jsonl").read_text().splitlines()]
    assert any("glob" in line["id"] for line in left_out)  # of glob.py and its near-copy, one stays
    assert info["documents"] + info["held_out"]["documents"] + len(left_out) == len(MODULES) + 1


def test_the_report_says_how_sure_it_is_and_what_was_done(adapted: Path) -> None:
    results = read_json(adapted / "results.json")
    page = (adapted / "report.html").read_text(encoding="utf-8")
    assert len(results["stages"]) == 7
    for stage in results["stages"]:
        assert stage["title"] in page
    titles = [table["title"] for table in results["tables"]]
    assert titles == ["How sure that is", "What changed"]
    changes = {row[0]: row[1:] for row in results["tables"][1]["rows"]}
    bits, interval = changes["Bits per byte"]
    low, high = map(float, interval.split(" to "))
    assert low < float(bits) < high < 0
    assert {"Next line, exactly right", "Next line, edit similarity"} <= changes.keys()
    assert ("HumanEval, pass@1" in changes) == bool(shutil.which("bwrap"))
    assert "optimizer:" in results["recipes"]["run"]
    if shutil.which("bwrap"):
        assert [row["values"] for row in results["scores"]["rows"]][-1] == [0.0, 0.0]
        assert "HumanEval, pass@1" in page
    else:
        assert "left out" in page


def test_the_result_is_as_exact_as_the_model_was(adapted: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    assert {tensor.dtype for tensor in open_weights(adapted / "model").values()} == {torch.float32}
    model, tokenizer = puna.load(tiny_model_folder)
    save_model(model.bfloat16(), tmp_path / "bf16", tokenizer=tokenizer)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run").symlink_to(adapted / "run")
    outcome = stages.export(Places(tmp_path / "out", tmp_path, tmp_path / "bf16"))
    assert {tensor.dtype for tensor in open_weights(tmp_path / "out/model").values()} == {torch.bfloat16}
    assert "--dtype bf16" in outcome["command"]


@pytest.fixture
def again(adapted: Path, code: Path, tiny_model_folder: Path) -> list[str]:
    """The command that `adapted` is of, but for --humaneval."""
    command = ["adapt", str(code), str(tiny_model_folder), "optimizer.peak_lr=0.01", "-o", str(adapted)]
    return [*command, "--epochs", "1", "--held-out", "0.25", "--cases", "4", "--device", "cpu"]


def test_given_again_it_does_nothing_again(adapted: Path, code: Path, again: list[str], capfd) -> None:
    before = (adapted / FILE).read_bytes()
    assert run([*again, "--humaneval", str(code.parent / "tasks.jsonl")]) == 0
    captured = capfd.readouterr()
    assert (adapted / FILE).read_bytes() == before
    assert captured.err.count("done before") == 7
    assert "has changed since" not in captured.err
    assert "bits per byte (fewer is better)" in captured.err.splitlines()[-1]
    assert captured.out.strip() == str(adapted / "report.html")
    assert run([*again, "--json"]) == 1
    assert "was made with other humaneval" in capfd.readouterr().err


def test_given_again_after_the_code_changed_it_says_that_it_goes_on_with_what_was(
    code: Path, again: list[str], capfd
) -> None:
    (code / "new.py").write_text("x = 1\n")
    try:
        assert run([*again, "--humaneval", str(code.parent / "tasks.jsonl")]) == 0
    finally:
        (code / "new.py").unlink()
    said = capfd.readouterr().err
    assert re.search(r"what is read of .*library has changed since .*data was made, .* code as it was then; ", said)
    assert said.count("done before") == 7


def test_a_report_of_few_files_gives_no_verdict(
    adapted: Path, code: Path, again: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr("puna.evaluate.pass_at_k.FEWEST_GROUPS", 1000)
    shutil.copytree(adapted, tmp_path / "out")
    command = [word if word != str(adapted) else str(tmp_path / "out") for word in again]
    assert run([*command, "--humaneval", str(code.parent / "tasks.jsonl")]) == 0
    lead = capfd.readouterr().err.splitlines()[-1]
    assert "is better or worse (too few files to say which) at writing the next line" in lead
    assert "(fewer is better, but these are too few files to say how sure that is)" in lead
    rows = read_json(tmp_path / "out/results.json")["tables"][1]["rows"]
    assert {row[2] for row in rows} == {"too few to say"}


def test_too_little_code_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/only.py").write_text("print('hello')\n" * 50)
    with pytest.raises(PunaError, match=r"of the 1 files of .*code, \d are kept for scoring .* give more code"):
        puna.adapt(tmp_path / "code", tiny_model_folder, tmp_path / "out", device="cpu")
    with pytest.raises(PunaError, match="give more code, or another --held-out"):  # which is taken
        puna.adapt(tmp_path / "code", tiny_model_folder, tmp_path / "out", device="cpu", held_out=0.05)


@pytest.fixture
def prepared(tmp_path: Path) -> Places:
    """Places with a model's config and a prepared folder's facts, as far as a recipe is chosen by them."""
    at = Places(tmp_path, tmp_path / "code", tmp_path / "seven")
    at.model.mkdir()
    from puna.model.config import preset

    (at.model / "config.json").write_text(json.dumps(preset("codellama-7b").to_json()))
    at.data.mkdir()
    (at.data / "dataset.json").write_text(json.dumps({"tokens": 50_000_000, "settings": {"options": {}}}))
    return at


def test_the_plainest_recipe_that_fits_is_taken(prepared: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    for gib in (4000, 240, 150, 90):
        monkeypatch.setattr("puna.adapt.recipe.free_memory_bytes", lambda place, gib=gib: gib << 30)
        recipe = choose_recipe(prepared, 2.0, "cpu", {"precision": "bf16"} if gib == 4000 else {})
        chosen.append((recipe.recompute, recipe.precision))
    assert chosen[0] == ("none", "bf16")
    assert len(set(chosen)) >= 3  # less memory, another way
    assert recipe.optimizer.peak_lr == 1e-5
    assert (recipe.sequence_length, recipe.batch_rows) == (4096, 32)
    assert recipe.steps == -(-100_000_000 // recipe.batch_tokens)


@pytest.mark.parametrize(("fim_rate", "length"), [(0.0, 512), (0.9, 1024)])
def test_rows_hold_what_was_cut_for_infilling_and_else_what_there_is(
    prepared: Places, fim_rate: float, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"fim_rate": fim_rate, "fim_tokens": 1024}
    (prepared.data / "dataset.json").write_text(json.dumps({"tokens": 50_000, "settings": {"options": options}}))
    monkeypatch.setattr("puna.adapt.recipe.free_memory_bytes", lambda place: 4000 << 30)
    assert choose_recipe(prepared, 2.0, "cpu", {}).sequence_length == length


def test_a_processor_keeps_room_for_what_its_process_holds_beyond_tensors(
    prepared: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("puna.adapt.recipe.free_memory_bytes", lambda place: 160 << 30)
    recipe = choose_recipe(prepared, 2.0, "cpu", {})
    own = puna.plan(recipe, device="cpu", memory_gib=160, layout=True)["own"]
    assert own["memory"]["runtime"] > 10
    assert own["memory_gib"] <= 0.85 * 160


def test_where_nothing_fits_it_says_by_how_much(prepared: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.adapt.recipe.free_memory_bytes", lambda place: 8 << 30)
    with pytest.raises(PunaError, match=r"all 6\.7 billion weights of .* takes \d+ GiB, and cpu has 8 GiB") as error:
        choose_recipe(prepared, 2.0, "cpu", {})
    assert len(WAYS) > 1
    assert 0.1 < float(str(error.value).split("room for about ")[1].split(" billion")[0]) < 1.5


def test_a_model_too_large_for_this_machine_is_refused_before_anything_is_prepared(
    code: Path, prepared: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("puna.adapt.recipe.free_memory_bytes", lambda place: 8 << 30)
    with pytest.raises(PunaError, match="and cpu has 8 GiB free"):
        puna.adapt(code, prepared.model, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"humaneval": "nofile.gz"}, r"nofile.gz does not exist; .*openai/human-eval"),
        ({"humaneval": "puna.yaml"}, r"puna.yaml, line 1: not JSON .*\nis it humaneval's official file\?"),
        ({"device": "abacus"}, "torch knows no device 'abacus'"),
    ],
)
def test_what_would_fail_after_hours_fails_at_once(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "puna.yaml").write_text("model: none\n")
    with pytest.raises(PunaError, match=message):
        puna.adapt(tmp_path, tiny_model_folder, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_lacks_something_is_refused_before_anything_is_prepared(
    code: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    def refused(code: Path, model: Path, message: str) -> None:
        with pytest.raises(PunaError, match=message):
            puna.adapt(code, model, tmp_path / "out", device="cpu")
        assert not (tmp_path / "out").exists()

    refused(tmp_path / "nowhere", tiny_model_folder, r"nowhere does not exist; name a folder of code")
    for pattern, message in (("tokenizer*", "holds neither tokenizer.model nor"), ("*.safetensors", "no weights")):
        model = shutil.copytree(tiny_model_folder, tmp_path / "model", dirs_exist_ok=True)
        for file in model.glob(pattern):
            file.unlink()
        refused(code, model, message)
    puna.quantize(tiny_model_folder, tmp_path / "int8", scheme="int8")
    refused(code, tmp_path / "int8", "the weights are quantised")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"nosuch": 1}, "there is no field nosuch"),
        ({"steps": -1}, "steps=-1"),
        ({"batch_tokens": 1000}, "batch_tokens=1000 must be a multiple of sequence_length"),
        ({"parallel.tp": 2}, "parallel.* puna adapt trains on one device"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_anything_is_prepared(
    code: Path, tiny_model_folder: Path, tmp_path: Path, override: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        puna.adapt(code, tiny_model_folder, tmp_path / "out", device="cpu", held_out=0.25, overrides=override)
    assert not (tmp_path / "out").exists()


def test_an_override_that_is_right_for_more_code_alone_is_not_refused_at_once(
    prepared: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("puna.adapt.recipe.free_memory_bytes", lambda place: 4000 << 30)
    check_recipe(prepared, 2.0, "cpu", {"schedule.warmup_steps": 50})
    with pytest.raises(UsageError, match=r"warmup_steps=999999 is more than steps"):
        check_recipe(prepared, 2.0, "cpu", {"schedule.warmup_steps": 999_999})
