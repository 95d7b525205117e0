"""Benchmarks whose answers are programs: tasks or samples in, verdicts and pass@k out.

A benchmark is a subclass of `Programs` that says what its tasks ask, where an answer ends and how it is judged; the
rest is here, the same for all. Generation and judging overlap, and what an `output` folder holds is not done again:

    tasks ──▶ Ask ──Completer──▶ Sample ──▶ samples.jsonl
                                    │
                                    └─▶ Job ──Sandbox──▶ Judgement ──▶ verdicts.jsonl ──▶ pass@k
                                             at the same time
"""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import puna
from puna.errors import PunaError, UsageError
from puna.evaluate.answers import code_of, cut
from puna.evaluate.completing import PROTOCOLS, ROWS, Ask, Completer, Completes, How
from puna.evaluate.judging import Judge
from puna.evaluate.paper import Figures
from puna.evaluate.pass_at_k import intervals, scores
from puna.evaluate.remote import REQUESTS, RemoteCompleter
from puna.evaluate.samples import LinesError, Sample, data_file, read_lines, read_sample, read_samples
from puna.evaluate.sandbox import VERDICTS, Job, Judgement, Limits, Sandbox, Script
from puna.evaluate.stored import Stored, agreed, computed_in, is_helper, loaded
from puna.files import check_writable, differing, file_aside, read_json, sha256_of, write_json
from puna.log import Log, open_log
from puna.progress import Progress, say
from puna.prompts import chat_template, check_order

#: What a run keeps in its folder while it goes on.
SAMPLES, VERDICTS_LOG = "samples.jsonl", "verdicts.jsonl"


#: What a run may go on with that it did not begin with, and then names both: the version that asks and judges, and the
#: place of a server, which says of its model no more than a name.
SOURCES = ("puna", "server")


@dataclass(frozen=True)
class Task:
    """One task: its id, and its fields in the official file."""

    task_id: str
    fields: Mapping[str, Any]

    def __getitem__(self, field: str) -> Any:
        return self.fields[field]


class Programs(ABC):
    """A benchmark whose answers are programs.

    Attributes:
        name: of the benchmark.
        files: variant -> what the authors call its data file; the first is the default.
        where: where the authors keep the files.
        fields: what each line of a file has, and of which type.
        id_field: the one that names the task.
        stops: an answer that continues a prompt ends before the first of these.
        max_tokens: most tokens of an answer.
        limits: what one judgement may use.
        figures: variant -> the paper's figures; see `paper`.
        has_questions: whether a task can be put as a question, to a model with a chat template.
    """

    name: str
    files: Mapping[str, str]
    where: str
    fields: Mapping[str, type | tuple[type, ...]]
    id_field: str = "task_id"
    stops: tuple[str, ...] = ()
    max_tokens: int = 512
    limits: Limits = Limits()
    figures: Mapping[str, Figures] = {}
    has_questions: bool = True

    @abstractmethod
    def ask(self, task: Task) -> Ask:
        """What a model is asked."""

    @abstractmethod
    def job(self, task: Task, sample: Sample) -> Job | Script:
        """A sample as the sandbox takes it."""

    def read(self, path: Path) -> dict[str, Task]:
        """The tasks of an official file, by their ids.

        Raises:
            PunaError: the file is missing, cut off, or not what it should be; the message names file and line.
        """
        lines = (line for _, line in read_lines(path, self.fields))
        return {task.task_id: task for task in (Task(line[self.id_field], line) for line in lines)}

    def function(self, task: Task) -> str:
        """The name of the function that a task asks for."""
        name: str = task["entry_point"]
        return name

    def problem(self, task: Task) -> str:
        """What a task is of: those of one problem are drawn together for intervals; here each is one of its own."""
        return task.task_id

    def sample(self, task: Task, text: str, *, is_chat: bool) -> Sample:
        """What a model wrote, as a sample: cut at the stops, or taken out of an answer in chat."""
        code = code_of(text, self.function(task)) if is_chat else None
        return Sample(task.task_id, cut(text, self.stops)) if code is None else Sample(task.task_id, code, True)

    def variant(self, path: Path) -> str:
        """Which of `files` a file is, by its name; the first if it is none."""
        return next((variant for variant, name in self.files.items() if path.name == name), next(iter(self.files)))

    def paper(self, path: Path, order: str) -> Figures:
        """The paper's figures for a file and, where gaps are filled in, an order of the prompt."""
        return self.figures.get(self.variant(path), {})

    def evaluate(
        self,
        *,
        model: Any = None,
        tokenizer: Any = None,
        samples: Path | str | None = None,
        server: str | None = None,
        data: Path | str | None = None,
        variant: str | None = None,
        output: Path | str | None = None,
        protocol: str = "greedy",
        samples_per_task: int | None = None,
        seed: int = 0,
        template: str | None = None,
        order: Literal["psm", "spm"] = "psm",
        batch: int | None = None,
        cache_dtype: str | None = None,
        max_tokens: int | None = None,
        workers: int | None = None,
        complete: Completes | None = None,
    ) -> dict[str, Any]:
        """Share of the tasks whose tests pass.

        Args:
            model: writes the answers, with `tokenizer`.
            tokenizer: the model's.
            server: the URL of a server that speaks OpenAI's API; `model` is then what that calls its model, or None.
            samples: instead of a model, a file of samples; any number a task, at least one.
            data: the official file, or the folder that holds it; by default the folder PUNA_DATA.
            variant: which of the benchmark's files, where it has several.
            output: a folder for samples and verdicts; a run that was killed goes on with what is there.
            protocol: of `PROTOCOLS`.
            samples_per_task: other than the protocol's.
            seed: of the samples; each has random numbers of its own.
            template: a chat template's name, or a folder that ships one: tasks are put as questions in its layout.
            order: of infilling prompts.
            batch: how many answers are written at a time; by default `ROWS`, and `REQUESTS` of a server.
            cache_dtype: as for `Completer`.
            max_tokens: an answer's greatest length, other than the benchmark's.
            workers: how many judgements run at once; by default one a core.
            complete: instead of a model, a function that is given asks, seeds and where each answer goes (`Completes`).

        Returns:
            `{"benchmark", "pass@1"…, "intervals", "tasks", "samples", "verdicts": {verdict: count}, "sandbox", …}`;
            intervals are those of `puna.evaluate.pass_at_k`, over problems, and None where those are too few. Of
            processes that share the model, the first has it, and the others an empty one.
        """
        if sum(given is not None for given in (model if server is None else server, samples, complete)) != 1:
            raise UsageError(f"{self.name} scores either a model or a file of samples; give one of them")
        if template is not None and not self.has_questions:
            raise UsageError(f"{self.name} asks for what is missing in a program, not in chat; leave --template out")
        if cache_dtype is not None and (server is not None or samples is not None):
            raise UsageError("a cache in 8 bits is for a model that answers here; leave --cache-dtype out")
        check_order(order)
        if template is not None and server is None:
            chat_template(template)
        how = _how(protocol, samples_per_task)
        path, tasks = self.tasks(data, variant)
        given = [] if samples is None else read_samples(samples, tasks)
        most = max_tokens or self.max_tokens
        rows = batch or (ROWS if server is None else REQUESTS)
        options: dict[str, Any] = {"max_tokens": most, "stop": self.stops, "batch_rows": rows, "how": how}
        of_a_model = options | {"template": template, "order": order, "cache_dtype": cache_dtype}
        if is_helper(model):
            with agreed(model):  # the first opens sandbox and folder
                pass
            Completer(*loaded(model, tokenizer), **of_a_model)([])
            return {}
        with ExitStack() as stack:
            # Before a large model is loaded: is there a sandbox, is the server there, is the folder this run's?
            if server is not None:
                complete = RemoteCompleter(server, model, is_chat=template is not None, **options)
            if samples is not None:
                answers: dict[str, Any] = {"file": Path(samples).name, "sha256": sha256_of(samples)}
            else:
                answers = {"protocol": protocol, **vars(how), "max_tokens": most, "seed": seed, "template": template}
                of_model = {"dtype": model.dtype if isinstance(model, Stored) else None, "cache_dtype": cache_dtype}
                answers |= {name: str(value) for name, value in of_model.items() if value is not None}
                if self.ask(next(iter(tasks.values()))).suffix is not None:  # gaps are filled in
                    answers["order"] = order
                    if order == "spm" and complete is None:  # a server, or a function, does it in its own way
                        answers["healed"] = True
            settings = {
                "puna": puna.__version__,
                "benchmark": self.name,
                **_named(complete, model, output),
                **({"variant": self.variant(path)} if len(self.files) > 1 else {}),
                "data": {"file": path.name, "sha256": sha256_of(path)},
                "answers": answers,
            }
            folder = None if output is None else Path(output)
            with agreed(model):
                sandbox = stack.enter_context(Sandbox(self.limits, workers=workers))
                if folder is not None:
                    check_writable(folder)
                    folder.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(open_log(folder and folder / VERDICTS_LOG))
                if folder is not None:  # which no other process is at work in
                    settings = _settle(folder, settings)
                written = stack.enter_context(open_log(folder and folder / SAMPLES if samples is None else None))
            if samples is None and complete is None:
                complete = Completer(*loaded(model, tokenizer), **of_a_model)
            started = time.monotonic()
            judge = Judge(lambda sample: self.job(tasks[sample.task_id], sample), sandbox, log)
            if complete is not None:
                wanted = _Wanted(tasks, how.samples, seed)
                given = wanted.samples(self, complete, written, judge, is_chat=template is not None)
            generated = time.monotonic()
            for sample in given:
                judge.submit(sample)
            judgements = judge.finish()
            judged = time.monotonic()
        problems = {task_id: self.problem(task) for task_id, task in tasks.items()}
        if folder is not None:
            _write_details(folder, given, judgements, problems)
        return {
            **settings,
            **_scored(given, judgements, problems),
            "paper": {model: dict(row) for model, row in self.paper(path, order).items()},
            "sandbox": sandbox.mechanism,
            "limits": vars(self.limits),
            **(_computed(complete) if isinstance(complete, Completer) else {}),
            "seconds": {"completing": round(generated - started, 3), "judging": round(judged - generated, 3)},
        }

    def tasks(self, data: Path | str | None, variant: str | None = None) -> tuple[Path, dict[str, Task]]:
        """The official file and its tasks; see `evaluate` for the arguments.

        Raises:
            UsageError: neither `data` nor PUNA_DATA, or no such variant.
            PunaError: there is no such file, or it is not what it should be; the message says where to get it.
        """
        path = data_file(self.name, data, self._file(variant), self.where)
        try:
            tasks = self.read(path)
        except LinesError as error:
            raise PunaError(f"{error}\nis it {self.name}'s official file? {self.where}") from None
        if not tasks:
            raise PunaError(f"{path} holds no tasks; get the official file: {self.where}")
        return path, tasks

    def _file(self, variant: str | None) -> str:
        if variant is None:
            return next(iter(self.files.values()))
        if variant not in self.files:
            known = ", ".join(name for name in self.files if name) or "none"
            raise UsageError(f"{self.name} has no variant {variant!r}; it has {known}")
        return self.files[variant]


def _named(complete: Completes | None, model: Any, output: Path | str | None) -> dict[str, Any]:
    """What was scored, so that a folder of another model is not gone on with."""
    if isinstance(complete, RemoteCompleter):
        return {"model": complete.model, "server": complete.url}
    if isinstance(model, Stored):
        return model.named
    if model is None or output is None:
        return {}
    from puna.model.mark import mark_in_memory

    return {"weights": mark_in_memory(model)}


def _computed(complete: Completer) -> dict[str, Any]:
    return {"dtype": computed_in(complete.model), "cut_prompts": complete.cut_prompts}


def _how(protocol: str, samples_per_task: int | None) -> How:
    if protocol not in PROTOCOLS:
        raise UsageError(f"there is no protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    how = PROTOCOLS[protocol]
    if samples_per_task is None:
        return how
    if samples_per_task < 1 or (how.temperature == 0 and samples_per_task > 1):
        raise UsageError(
            f"{samples_per_task} samples a task make no sense for the protocol {protocol!r}; "
            "greedy gives one answer, however often it is asked"
        )
    return How(how.temperature, how.top_p, samples_per_task)


# ---- answers


class _Wanted:
    """The answers that a model owes: `count` a task, each with a seed made of `seed`, the task and its number."""

    def __init__(self, tasks: Mapping[str, Task], count: int, seed: int) -> None:
        self.tasks, self.count, self.seed = tasks, count, seed

    def samples(
        self, benchmark: Programs, complete: Completes, log: Log, judge: Judge, *, is_chat: bool
    ) -> list[Sample]:
        """All of them, in the order of the tasks; those of the log are not asked for again."""
        found = {(line["task_id"], line["number"]): read_sample(line, SAMPLES) for line in log.lines}
        asks = {name: replace(benchmark.ask(task), name=name) for name, task in self.tasks.items()}
        every = [(task_id, number) for task_id in self.tasks for number in range(self.count)]
        left = [one for one in every if one not in found]
        for sample in found.values():
            judge.submit(sample)
        with Progress("completing", len(left), "answers") as progress:

            def keep(index: int, answer: str) -> None:
                task_id, number = left[index]
                found[task_id, number] = sample = benchmark.sample(self.tasks[task_id], answer, is_chat=is_chat)
                log.append({**sample.record(), "number": number, **({"answer": answer} if is_chat else {})})
                judge.submit(sample)
                progress.advance()

            complete([asks[task_id] for task_id, _ in left], [self._seed(*one) for one in left], keep)
        return [found[one] for one in every]

    def _seed(self, task_id: str, number: int) -> int:
        digest = hashlib.blake2b(f"{self.seed}\0{task_id}\0{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


# ---- results


def _scored(
    samples: list[Sample], judgements: Mapping[Sample, Judgement], problems: Mapping[str, str]
) -> dict[str, Any]:
    passed: dict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        passed[sample.task_id].append(judgements[sample].verdict == "passed")
    counts = [(len(verdicts), sum(verdicts)) for verdicts in passed.values()]
    verdicts = Counter(judgements[sample].verdict for sample in samples)
    if verdicts["sandbox"]:
        first = next(judgement for judgement in judgements.values() if judgement.verdict == "sandbox")
        say(f"{verdicts['sandbox']} samples count as failed though the sandbox is at fault; the first: {first.detail}")
    return {
        **scores(counts),
        "intervals": intervals(counts, groups=[problems[task_id] for task_id in passed]),
        "tasks": len(passed),
        "samples": len(samples),
        "verdicts": {verdict: verdicts[verdict] for verdict in VERDICTS},
    }


def _settle(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes the settings of a run into its folder; answers that are there must be of the same run.

    Returns:
        The settings, in which `SOURCES` are all that the run's answers came from.

    Raises:
        PunaError: it holds another run's answers.
    """
    path = folder / "settings.json"
    logs = [log for name in (SAMPLES, VERDICTS_LOG) if (log := folder / name).exists()]
    if path.exists() and any(log.stat().st_size for log in logs):
        before = read_json(path)
        for name in SOURCES:
            old, new = before.pop(name, None), settings.get(name)
            if old is not None and new is not None and new not in old.split(", "):
                say(f"{folder} holds answers from {name} {old}; those that are missing come from {new}")
                settings = settings | {name: f"{old}, {new}"}
            elif old is not None:
                settings = settings | {name: old}
        told = {name: value for name, value in settings.items() if name not in SOURCES}
        if changed := differing(told, before):
            name, (new, old) = next(iter(changed.items()))
            raise PunaError(
                f"{folder} holds answers of another run: its {name} is {old}, this one's {new}; choose another folder"
            )
    write_json(path, settings)
    return settings


def _write_details(
    folder: Path, samples: list[Sample], judgements: Mapping[Sample, Judgement], problems: Mapping[str, str]
) -> None:
    with file_aside(folder / "details.jsonl", "w") as file:
        for sample in samples:
            line = sample.record() | {"problem": problems[sample.task_id]} | judgements[sample].record()
            file.write(json.dumps(line) + "\n")
