"""The demo, told in small: every stage once, the second telling for free, and a report that shows them all."""

import ast
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import puna
from puna.demo import Size, demo, stages
from puna.demo.library import PIECE_CHARACTERS, pieces
from puna.errors import PunaError
from puna.evaluate.benchmarks.humaneval import HumanEval
from puna.files import read_json, write_json
from puna.story import FILE, Story, command

SMALL = {"sequence_length": 512, "batch_tokens": 1024, "micro_batch_rows": 2, "steps": 4, "schedule.warmup_steps": 1}
QUICK = Size(
    modules=12,
    vocab_size=1024,
    pretrain={**SMALL, "model": "tiny-128", "validation.rows": 2},
    chat={**SMALL, "validation.rows": 2},
    cases=4,
    max_tokens=4,
)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo that has been told."""
    report = demo(tmp_path_factory.mktemp("demo") / "demo", size=QUICK)
    assert report.name == "report.html"
    return report.parent


def test_the_report_shows_every_stage(told: Path) -> None:
    page = (told / "report.html").read_text(encoding="utf-8")
    finished = read_json(told / FILE)["stages"]
    assert len(finished) == 10
    for stage in finished:
        assert stage["title"].replace("'", "&#39;") in page
    assert page.count("<svg") == 3


def test_training_lowers_the_bits_per_byte_of_unseen_code(told: Path) -> None:
    bits = read_json(told / "results.json")["scores"]["rows"][0]
    assert bits["name"] == "Bits per byte of unseen code"
    random, pretrained, _ = bits["values"]
    assert pretrained < random


def test_a_second_telling_does_nothing_again(told: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (told / FILE).read_bytes()
    demo(told, size=QUICK)
    assert (told / FILE).read_bytes() == before
    assert capfd.readouterr().err.count("done before") == 10


def test_the_commands_shown_are_commands_that_there_are(told: Path) -> None:
    from puna.cli import load_commands

    lines = [line for stage in read_json(told / FILE)["stages"] for line in _commands(stage["outcome"]["command"])]
    assert {words[1] for words in lines} >= {"prepare", "train", "export", "generate", "infill", "chat", "evaluate"}
    for words in lines:
        group: Any = typer.main.get_command(load_commands())
        name, *rest = words[1:]
        context = group.make_context("puna", [name, *rest])
        group.get_command(context, name).make_context(name, rest, parent=context)


def test_another_story_needs_another_folder(told: Path) -> None:
    with pytest.raises(PunaError, match="was made with other size; remove it or choose another place"):
        demo(told, size=Size(modules=13))


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(PunaError, match="exists and holds something else; choose another place with -o"):
        demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_story_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    told: list[str] = []

    def first() -> dict[str, Any]:
        told.append("first")
        return {"said": "", "command": ""}

    def second(works: bool) -> dict[str, Any]:
        if not works:
            raise PunaError("the lamp went out")
        told.append("second")
        return {"said": "", "command": ""}

    for works in (False, True):
        story = Story(tmp_path / "story", {}, stages=2)
        story.stage("The first", first)
        if works:
            story.stage("The second", second, works)
        else:
            with pytest.raises(PunaError, match="the lamp"):
                story.stage("The second", second, works)
    assert told == ["first", "second"]


def test_a_story_that_was_broken_off_before_a_stage_was_done_may_be_told_with_other_settings(tmp_path: Path) -> None:
    def breaks() -> dict[str, Any]:
        (tmp_path / "story/data").mkdir(exist_ok=True)
        raise PunaError("the lamp went out")

    for share in (0.1, 0.1, 0.2):
        with pytest.raises(PunaError, match="the lamp"):
            Story(tmp_path / "story", {"share": share}, stages=1).stage("The first", breaks)
    Story(tmp_path / "story", {"share": 0.3}, stages=1).stage("The first", lambda: {"said": "", "command": ""})
    with pytest.raises(PunaError, match="was made with other share; remove it"):
        Story(tmp_path / "story", {"share": 0.1}, stages=1)


@pytest.mark.parametrize("is_written_once", [False, True], ids=["for each stage", "once, as before"])
def test_a_story_goes_on_with_another_version_and_says_which_did_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_written_once: bool
) -> None:
    done = {"said": "", "command": ""}
    with monkeypatch.context() as patched:
        patched.setattr(puna, "__version__", "0.0.1")
        story = Story(tmp_path / "story", {"share": 0.1}, stages=2)
        story.stage("The first", lambda: done)
        assert story.earlier == {}
    if is_written_once:
        stages = [{name: value for name, value in stage.items() if name != "puna"} for stage in story.stages]
        write_json(tmp_path / "story" / FILE, {"settings": {"puna": "0.0.1", "share": 0.1}, "stages": stages})

    def second() -> dict[str, Any]:
        return done

    for _ in range(2):
        story = Story(tmp_path / "story", {"share": 0.1}, stages=2)
        story.stage("The first", lambda: pytest.fail("it is done already"))
        story.stage("The second", second)
        assert f"were done by puna 0.0.1; {puna.__version__} does the others" in capsys.readouterr().err
        assert [stage["puna"] for stage in story.stages] == ["0.0.1", puna.__version__]
        assert story.earlier == {"puna, of earlier stages": "0.0.1"}


def test_a_story_with_settings_that_json_spells_otherwise_goes_on(tmp_path: Path) -> None:
    for _ in range(2):
        settings = {"overrides": {"optimizer.betas": (0.9, 0.95)}}
        Story(tmp_path / "story", settings, stages=1).stage("The first", lambda: {"said": "", "command": ""})


def test_a_command_is_spelled_as_a_shell_reads_it() -> None:
    line = command("train", "mine", {"data.train": "my data"}, o="out", max_tokens=3)
    assert shlex.split(line) == ["puna", "train", "mine", "data.train=my data", "-o", "out", "--max-tokens", "3"]


def test_pieces_are_python_and_fit() -> None:
    source = Path(ast.__file__).read_text(encoding="utf-8")
    cut = list(pieces(source))
    assert len(cut) > 10
    for piece in cut:
        ast.parse(piece)
        assert len(piece) <= PIECE_CHARACTERS + 2


def test_a_long_class_is_cut_between_methods_and_keeps_its_header() -> None:
    methods = [f"    def method_{i}(self):\n        return {'x' * 600!r}\n" for i in range(4)]
    first, second = pieces("class Long(Base):\n" + "\n".join(methods))
    for piece in (first, second):
        assert piece.startswith("class Long(Base):\n")
        assert piece.count("class Long") == 1
        assert piece.count("def method") == 2


def test_what_is_not_python_gives_no_pieces() -> None:
    assert list(pieces("print 'hello'\n")) == []


def test_the_problems_are_solved_by_their_solutions() -> None:
    solutions = {
        line["task_id"]: line["canonical_solution"]
        for line in map(json.loads, stages.PROBLEMS.read_text(encoding="utf-8").splitlines())
    }
    tasks = HumanEval().read(stages.PROBLEMS)
    assert len(tasks) == 12
    for task in tasks.values():
        names: dict[str, Any] = {}
        exec(task["prompt"] + solutions[task.task_id] + task["test"], names)  # our own code
        names["check"](names[task["entry_point"]])


def test_the_code_in_the_dialogs_is_python() -> None:
    dialogs = json.loads(stages.DIALOGS[0].read_text(encoding="utf-8"))
    assert len(dialogs) >= 120
    assert len({dialog["instruction"] + dialog["input"] for dialog in dialogs}) == len(dialogs)
    for dialog in dialogs:
        if dialog["instruction"].startswith("Write a"):
            ast.parse(dialog["output"])


def _commands(text: str) -> list[list[str]]:
    """The command lines in what a stage shows, as words."""
    return [words for line in [text] if not line.startswith(">>>") for words in _split(line)]


def _split(text: str) -> list[list[str]]:
    words, lines = shlex.split(text), []
    for word in words:
        if word == "puna":
            lines.append([])
        lines[-1].append(word)
    return lines
