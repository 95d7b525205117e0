"""What all benchmarks of programs share: protocols, seeds, going on after a kill, forms of samples."""

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna.errors import PunaError, UsageError
from puna.evaluate import evaluate
from puna.evaluate.benchmarks import names
from puna.evaluate.completing import PROTOCOLS, Ask, Completer, OnAnswer
from puna.evaluate.judging import Judge
from puna.evaluate.paper import paper_name, table
from puna.evaluate.samples import Sample
from puna.evaluate.sandbox import Judgement
from puna.log import Log
from puna.testing import ScriptedModel, tiny_model, write_tiny_model, write_tiny_tasks


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tiny_tasks(tmp_path / "tasks.jsonl")


class Answers:
    """Answers with `return SEED % 4`, the last ask first, and is killed when it has given `killed_at` answers."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.asked: list[str] = []
        self.killed_at, self.calls = killed_at, 0

    def __call__(self, asks: Sequence[Ask], seeds: Sequence[int], on_answer: OnAnswer) -> None:
        self.calls += 1
        self.asked += [ask.prefix for ask in asks]
        for given, number in enumerate(reversed(range(len(asks)))):
            if given == self.killed_at:
                raise KeyboardInterrupt
            on_answer(number, f"    return {seeds[number] % 4}\n")


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_answers_and_verdicts(
    bubblewrap: str, data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"data": data, "protocol": "sample", "samples_per_task": 5}
    once = Answers()
    whole = evaluate("humaneval", complete=once, output=tmp_path / "whole", **options)
    assert (once.calls, len(once.asked)) == (1, 20)  # no answer waits for others
    with pytest.raises(KeyboardInterrupt):
        evaluate("humaneval", complete=Answers(killed_at=9), output=tmp_path / "killed", **options)
    samples = tmp_path / "killed/samples.jsonl"
    assert len(samples.read_text().splitlines()) == 9
    samples.write_text(samples.read_text()[:-20])  # the last line was being written
    rest = Answers()
    again = evaluate("humaneval", complete=rest, output=tmp_path / "killed", **options)
    assert len(rest.asked) == 20 - 8
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    assert (tmp_path / "killed/details.jsonl").read_text().count("\n") == 20
    done = Answers()
    assert evaluate("humaneval", complete=done, output=tmp_path / "killed", **options)["pass@1"] == whole["pass@1"]
    assert done.asked == []


def test_a_folder_of_another_run_is_refused(bubblewrap: str, data: Path, tmp_path: Path) -> None:
    evaluate("humaneval", complete=Answers(), data=data, output=tmp_path / "run")
    with pytest.raises(PunaError, match=r"run holds answers of another run: its answers.seed is 0, this one's 1"):
        evaluate("humaneval", complete=Answers(), data=data, output=tmp_path / "run", seed=1)
    with pytest.raises(PunaError, match=r"jsonl is a file; name a folder"):
        evaluate("humaneval", complete=Answers(), data=data, output=data)


def test_a_run_that_meets_another_at_work_in_its_folder_changes_nothing_there(
    bubblewrap: str, data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"data": data, "output": tmp_path / "run"}

    class Meeting(Answers):
        def __call__(self, *arguments: Any) -> None:
            before = (tmp_path / "run/settings.json").read_bytes()
            with pytest.raises(PunaError, match=r"another process is writing .*; wait for it, or choose another place"):
                evaluate("humaneval", complete=Answers(), seed=1, **options)
            assert (tmp_path / "run/settings.json").read_bytes() == before
            super().__call__(*arguments)

    assert evaluate("humaneval", complete=Meeting(), **options)["answers"]["seed"] == 0


def test_a_run_that_ended_before_its_first_answer_leaves_no_claim_on_its_folder(
    bubblewrap: str, data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"data": data, "max_tokens": 2, "device": "cpu", "output": tmp_path / "run"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(PunaError, match=r"empty has no config\.json"):
        evaluate("humaneval", str(tmp_path / "empty"), **options)
    assert evaluate("humaneval", str(write_tiny_model(tmp_path / "model")), **options)["samples"] == 4


def test_answers_of_another_model_and_of_other_weights_are_not_gone_on_with(
    bubblewrap: str, data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"data": data, "max_tokens": 2, "device": "cpu", "output": tmp_path / "run"}
    first, second = (write_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second")))
    evaluate("humaneval", str(first), **options)
    evaluate("humaneval", str(first), **options)
    with pytest.raises(PunaError, match=r"of another run: its model is .*first, this one's .*second"):
        evaluate("humaneval", str(second), **options)
    shutil.copytree(second, first, dirs_exist_ok=True)
    with pytest.raises(PunaError, match=r"of another run: its weights is "):
        evaluate("humaneval", str(first), **options)


def test_answers_of_the_same_weights_with_another_config_are_not_gone_on_with(
    bubblewrap: str, data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"data": data, "max_tokens": 2, "device": "cpu", "output": tmp_path / "run"}
    model = write_tiny_model(tmp_path / "model")
    evaluate("humaneval", str(model), **options)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0}))
    with pytest.raises(PunaError, match=r"of another run: its weights is "):
        evaluate("humaneval", str(model), **options)


@pytest.mark.parametrize("option", [{"cache_dtype": "int8"}, {"dtype": "bf16"}])
def test_answers_of_other_numbers_are_not_gone_on_with_even_where_none_are_named(
    bubblewrap: str, data: Path, tmp_path: Path, tiny_model_folder: Path, option: dict[str, str]
) -> None:
    options: dict[str, Any] = {"data": data, "max_tokens": 2, "device": "cpu", "output": tmp_path / "run"}
    evaluate("humaneval", str(tiny_model_folder), **options, **option)
    (name,) = option
    with pytest.raises(PunaError, match=f"another run: its answers.{name} is {option[name]}, this one's None"):
        evaluate("humaneval", str(tiny_model_folder), **options)


@pytest.mark.parametrize("kind", ["plain", "for inference", "int8"])
def test_answers_of_a_model_in_memory_are_not_those_of_the_same_after_training(
    bubblewrap: str, data: Path, tmp_path: Path, kind: str
) -> None:
    folder = write_tiny_model(tmp_path / "model")
    if kind == "int8":
        puna.quantize(folder, folder := tmp_path / "int8", scheme="int8")
    dtype = "bf16" if kind == "for inference" else None
    model, tokenizer = puna.load(folder, dtype=dtype, for_inference=kind != "plain")
    options: dict[str, Any] = {"data": data, "max_tokens": 2, "tokenizer": tokenizer, "output": tmp_path / "run"}
    first = evaluate("humaneval", model, **options)
    assert evaluate("humaneval", model, **options)["weights"] == first["weights"]
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.mul_(1.01)
    with pytest.raises(PunaError, match="answers of another run: its weights is "):
        evaluate("humaneval", model, **options)


def test_each_answer_has_a_seed_of_its_own_that_depends_on_task_and_number_alone(
    bubblewrap: str, data: Path, tmp_path: Path
) -> None:
    def seeds(samples_per_task: int) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}

        def complete(asks: Sequence[Ask], seeds: Sequence[int], on_answer: OnAnswer) -> None:
            for number, (ask, seed) in enumerate(zip(asks, seeds, strict=True)):
                found.setdefault(ask.prefix, []).append(seed)
                on_answer(number, "    return 1\n")

        evaluate("humaneval", complete=complete, data=data, protocol="sample", samples_per_task=samples_per_task)
        return found

    first, second = seeds(3), seeds(5)
    assert first == {task: some[:3] for task, some in second.items()}
    assert len({seed for some in second.values() for seed in some}) == 20


def test_protocols_are_the_papers(tiny_model_folder: Path) -> None:
    import puna

    model, tokenizer = puna.load(tiny_model_folder)
    sampling = Completer(model, tokenizer, max_tokens=8, stop=(), batch_rows=1, how=PROTOCOLS["sample"]).sampling
    assert (sampling.temperature, sampling.top_p, PROTOCOLS["sample"].samples) == (0.8, 0.95, 200)
    sampling = Completer(model, tokenizer, max_tokens=8, stop=(), batch_rows=1).sampling
    assert (sampling.temperature, PROTOCOLS["greedy"].samples) == (0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "beam"}, r"no protocol 'beam'; there are greedy, sample"),
        ({"samples_per_task": 10}, r"10 samples a task make no sense for the protocol 'greedy'"),
        ({"protocol": "sample", "samples_per_task": 0}, r"0 samples a task make no sense"),
        ({"variant": "sanitized"}, r"humaneval has no variant 'sanitized'; it has none"),
    ],
)
def test_a_wrong_protocol_is_refused(options: dict[str, Any], message: str, data: Path) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate("humaneval", complete=Answers(), data=data, **options)


def test_whole_programs_in_evalplus_form_are_judged(bubblewrap: str, data: Path, tmp_path: Path) -> None:
    lines = [{"task_id": f"Tiny/{i}", "solution": f"def f{i}(x):\n    return {i}\n", "raw": "…"} for i in range(4)]
    lines[3]["solution"] = "def other(x):\n    return 3\n"
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = evaluate("humaneval", samples=path, data=data)
    assert (result["pass@1"], result["verdicts"]["error"]) == (0.75, 1)


def test_an_instruct_model_is_asked_in_its_layout_and_its_code_taken_out_of_the_answer(
    bubblewrap: str, data: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    import puna

    _, tokenizer = puna.load(tiny_model_folder)
    model = ScriptedModel([1], prompt_tokens=1)
    completer = Completer(
        model, tokenizer, max_tokens=8, stop=("\ndef",), batch_rows=1, template="codellama"
    )  # fmt: skip
    assert completer.sampling.stop == ()  # a chat answer may well hold "\ndef"
    ids, _ = completer._asked(Ask("def f(x):\n", question="Write f."))
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode("[INST] Write f. [/INST]", bos=True))

    def complete(asks: Sequence[Ask], seeds: Sequence[int], on_answer: OnAnswer) -> None:
        assert all("```python\ndef f" in (ask.question or "") for ask in asks)
        for number, i in enumerate(ask.prefix[5] for ask in asks):
            on_answer(number, f"Of course!\n```python\ndef f{i}(x):\n    return {i}\n```\nGood luck.")

    result = evaluate("humaneval", complete=complete, data=data, template="codellama", output=tmp_path / "run")
    assert result["pass@1"] == 1.0
    line = json.loads((tmp_path / "run/samples.jsonl").read_text().splitlines()[0])
    assert line["answer"].startswith("Of course!")
    assert line["solution"].startswith("def f")


def test_a_question_beyond_the_context_is_named_before_any_is_answered(
    bubblewrap: str, tmp_path: Path, tiny_model_folder: Path
) -> None:
    data = write_tiny_tasks(tmp_path / "tasks.jsonl", 3)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lines[1]["prompt"] = f"# {'long ' * 100}\n{lines[1]['prompt']}"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, tokenizer = puna.load(tiny_model_folder)
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=256)
    options: dict[str, Any] = {"tokenizer": tokenizer, "data": data, "max_tokens": 4, "output": tmp_path / "run"}
    with pytest.raises(PunaError, match=r"question of Tiny/1 has \d+ tokens, and the model's context is 256; score a"):
        evaluate("humaneval", model, template="codellama", **options)
    assert (tmp_path / "run/samples.jsonl").read_text() == ""
    assert evaluate("humaneval", model, **options)["cut_prompts"] == 1


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("codellama/CodeLlama-7b-hf", "7B"),
        ("/models/CodeLlama-34b-Instruct-hf/", "Instruct 34B"),
        ("codellama-70b-python", "Python 70B"),
        ("runs/mine", None),
        ("CodeLlama-7b-hf-ours", None),
    ],
)
def test_published_models_are_known_by_name(model: str, name: str | None) -> None:
    assert paper_name(model) == name


def test_the_papers_figures_are_spelled_once_and_lie_between_0_and_1() -> None:
    assert table("pass@1 pass@10", {"7B": "33.5 -"}) == {"7B": {"pass@1": 0.335}}
    from puna.evaluate.benchmarks import find

    figures = [
        value
        for name in names()
        for rows in getattr(find(name), "FIGURES", {}).values()
        for row in rows.values()
        for value in row.values()
    ]
    assert len(figures) > 80
    assert all(0 <= value <= 1 for value in figures)


def test_a_timeout_is_judged_once_more_before_it_counts() -> None:
    verdicts = {"slow": iter(["timeout", "passed"]), "endless": iter(["timeout", "timeout"]), "wrong": iter(["wrong"])}

    class Scripted:
        def judge(self, program: str) -> Judgement:
            return Judgement(next(verdicts[program]), "", 0.0)

        def submit(self, program: str) -> Future[Judgement]:
            future: Future[Judgement] = Future()
            future.set_result(self.judge(program))
            return future

    judge = Judge(lambda sample: sample.text, Scripted(), Log())  # type: ignore[arg-type,return-value]
    for program in verdicts:
        judge.submit(Sample("task", program))
    assert [judgement.verdict for judgement in judge.finish().values()] == ["passed", "timeout", "wrong"]
    assert [list(rest) for rest in verdicts.values()] == [[], [], []]


def test_where_an_answer_ends_the_next_begins(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = puna.load(tiny_model_folder)
    steps, given, asks, seeds = [0], [], [Ask(f"def f{i}(x):\n") for i in range(16)], list(range(16))

    def completer(rows: int) -> Completer:
        return Completer(model, tokenizer, max_tokens=60, stop=("q",), batch_rows=rows, how=PROTOCOLS["sample"])

    def step(engine: puna.generate.Engine, computed: Any = puna.generate.Engine._step) -> Any:
        steps[0] += 1
        return computed(engine)

    alone, lengths = completer(1), []
    monkeypatch.setattr(puna.generate.Engine, "_step", step)
    answers = []
    for ask, seed in zip(asks, seeds, strict=True):
        before = steps[0]
        answers += alone([ask], [seed])
        lengths.append(steps[0] - before)
    longest_of_pairs = sum(max(lengths[i : i + 2]) for i in range(0, 16, 2))
    steps[0] = 0
    assert completer(2)(asks, seeds, lambda number, text: given.append((number, text))) == answers
    assert steps[0] < 0.9 * longest_of_pairs
    assert sorted(given) == list(enumerate(answers))
    assert given != sorted(given)
