"""Programs in other languages: right ones pass, wrong ones do not, and each verdict is what it should be."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from puna.errors import PunaError, UsageError
from puna.evaluate import evaluate, languages
from puna.evaluate.benchmarks.humaneval_x import HumanEvalX
from puna.evaluate.benchmarks.multipl_e import FILES, MultiPLE
from puna.evaluate.completing import Ask, OnAnswer
from puna.evaluate.languages import LANGUAGES, LIMITS
from puna.evaluate.programs import Task
from puna.evaluate.samples import Sample
from puna.evaluate.sandbox import Limits, Sandbox
from tests.evaluate.conftest import judged


@pytest.fixture(scope="module")
def patient(bubblewrap: str) -> Iterator[Sandbox]:
    with Sandbox(LIMITS, workers=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def quick(bubblewrap: str) -> Iterator[Sandbox]:
    with Sandbox(Limits(**{**vars(LIMITS), "cpu_seconds": 1, "wall_seconds": 30}), workers=1) as sandbox:
        yield sandbox


def installed(language: str) -> None:
    for tool, *_ in LANGUAGES[language].commands:
        if not tool.startswith("/") and shutil.which(tool, path="/usr/bin:/bin") is None:
            pytest.skip(f"no {tool} here: apt-get install {LANGUAGES[language].package}")


JAVA = {
    "name": "HumanEval_23_strlen",
    "language": "java",
    "prompt": "class Problem {\n    public static long strlen(String string) {\n",
    "tests": '    }\n    public static void main(String[] args) {\n    assert(strlen(("abc")) == (3l));\n    }\n\n}\n',
    "stop_tokens": ["\n    }\n"],
}
PHP = {
    "name": "HumanEval_23_strlen",
    "language": "php",
    "prompt": "<?php\nfunction string_length($s) {\n",
    "tests": "function candidate(...$args) { return string_length(...$args); }\nfunction test(): void {\n"
    '    if (candidate("abc") !== 3) { throw new Exception("Test failed!"); }\n}\n\ntest();',
    "stop_tokens": ["\nfunction", "\n?>"],
}

#: Language -> completions of the task that asks for the length of a text, by the verdict that each deserves.
COMPLETIONS: dict[str, dict[str, str]] = {
    "cpp": {
        "passed": "  return string.size();",
        "prints": '  std::printf("no end of line"); return string.size();',
        "wrong": "  return string.size() + 1;",
        "does not compile": "  return strnig.size();",
        "leaves": '  std::puts("passed"); std::exit(0);',
    },
    "js": {
        "passed": "  return string.length;\n}",
        "prints": "  process.stdout.write('no end of line'); return string.length;\n}",
        "is warned of behind its tests": "  return new Buffer(string).length;\n}",
        "wrong": "  return string.length + 1;\n}",
        "does not compile": "  return string.length +;\n}",
        "leaves": "  process.exit(0);\n}",
        "timeout": "  while (true) {}\n}",
    },
    "sh": {
        "passed": '  echo "${#1}"',
        "prints": "  printf 'no end of line' >&2; echo \"${#1}\"",
        "wrong": "  echo 7",
        "leaves": "  exit 0",
        "prints the rest of its file": "  :\n}\ncat << EOF",
        "timeout": "  while true; do :; done",
    },
    "java": {
        "passed": "        return string.length();",
        "wrong": "        return string.length() + 1;",
        "does not compile": "        return string.size();",
        "leaves": "        System.exit(0); return 0;",
    },
    "php": {
        "passed": "    return strlen($s);\n}",
        "wrong": "    return 1;\n}",
        "leaves": "    exit(0);\n}",
    },
}

#: What is expected where it is not what the key says.
VERDICTS = {
    "does not compile": "error",
    "leaves": "error",
    "prints": "passed",
    "is warned of behind its tests": "passed",
    "prints the rest of its file": "error",
}


@pytest.mark.parametrize("language", FILES)
def test_verdicts_in_each_language(
    language: str, patient: Sandbox, quick: Sandbox, request: pytest.FixtureRequest
) -> None:
    installed(language)
    benchmark = MultiPLE()
    if language in ("java", "php"):  # no official file here
        fields = JAVA if language == "java" else PHP
        task = Task(str(fields["name"]), fields)
    else:
        path = request.getfixturevalue("shared") / "data/multipl-e" / FILES[language]
        task = benchmark.read(path)["HumanEval_23_strlen"]
        assert benchmark.variant(path) == language
    for kind, completion in COMPLETIONS[language].items():
        sample = benchmark.sample(task, completion + task["stop_tokens"][0] + " and more", is_chat=False)
        judgement = (quick if kind == "timeout" else patient).judge(benchmark.job(task, sample))
        expected = VERDICTS.get(kind, kind)
        if language == "sh" and kind == "wrong":
            expected = "error"  # its test ends with an exit code and no word
        assert judgement.verdict == expected, (kind, judgement)


@pytest.mark.parametrize(("language", "step"), [("js", 8), ("cpp", 50)])
def test_some_canonical_solutions_of_humaneval_x_pass(shared: Path, patient: Sandbox, language: str, step: int) -> None:
    installed(language)
    benchmark = HumanEvalX()
    tasks = list(benchmark.read(shared / f"data/humaneval-x/humaneval_{language}.jsonl.gz").values())[::step]
    jobs = [benchmark.job(task, Sample(task.task_id, task["canonical_solution"])) for task in tasks]
    verdicts = Counter(judgement.verdict for judgement in judged(patient, jobs))
    assert verdicts["passed"] == len(jobs) - (language == "js")  # 112 is one of the three


@pytest.mark.slow
@pytest.mark.parametrize(("language", "failing"), [("js", {"112", "155", "162"}), ("cpp", {"22", "137", "162"})])
def test_every_canonical_solution_of_humaneval_x_passes_but_for_the_three_known_ones(
    shared: Path, patient: Sandbox, language: str, failing: set[str]
) -> None:
    installed(language)
    benchmark = HumanEvalX()
    tasks = benchmark.read(shared / f"data/humaneval-x/humaneval_{language}.jsonl.gz")
    jobs = [benchmark.job(task, Sample(task.task_id, task["canonical_solution"])) for task in tasks.values()]
    verdicts = dict(zip(tasks, judged(patient, jobs), strict=True))
    if language == "cpp" and Path("/usr/include/boost/any.hpp").exists():
        failing = {"162"}
    assert {id.split("/")[1] for id, judgement in verdicts.items() if judgement.verdict != "passed"} == failing


def test_what_a_program_in_another_language_may_use_is_limited(patient: Sandbox) -> None:
    installed("js")
    reach = {
        "net": "const s = require('net').connect(53, '1.1.1.1'); s.on('error', e => { console.log(e.code); });",
        "files": "try { require('fs').readdirSync('/home') } catch (e) { console.log(e.code) }",
        "memory": "let a = []; while (true) a.push(Buffer.alloc(64 << 20, 1));",
        "output": "while (true) require('fs').writeSync(1, 'x'.repeat(10000));",
    }
    found = {name: patient.judge(languages.script("js", code)) for name, code in reach.items()}
    assert {name: judgement.verdict for name, judgement in found.items() if name in ("memory", "output")} == {
        "memory": "error",
        "output": "output",
    }
    assert "EPERM" in found["net"].printed
    assert found["files"].verdict == "passed"  # it caught the refusal, and came to its end


def test_a_language_without_its_tools_is_refused_with_the_package_that_has_them(
    shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(languages.shutil, "which", lambda tool, path: None)
    with pytest.raises(PunaError, match=r"programs in cpp need g\+\+, which is not installed; .*apt-get install g\+\+"):
        evaluate("multipl_e", samples="s.jsonl", data=shared / "data/multipl-e/humaneval-cpp.jsonl")
    (tmp_path / "x.jsonl").write_text(json.dumps(JAVA | {"language": "cobol"}))
    with pytest.raises(UsageError, match=r"x.jsonl is in cobol; there are cpp, js, sh, java, php"):
        evaluate("multipl_e", samples="s.jsonl", data=tmp_path / "x.jsonl")


def test_a_model_is_scored_in_another_language(shared: Path, bubblewrap: str, tmp_path: Path) -> None:
    installed("sh")
    path = tmp_path / "humaneval-sh.jsonl"
    with open(shared / "data/multipl-e/humaneval-sh.jsonl") as file:
        path.write_text("".join(line for line in file if "HumanEval_23_" in line))

    def complete(asks: Sequence[Ask], seeds: Sequence[int], on_answer: OnAnswer) -> None:
        on_answer(0, COMPLETIONS["sh"]["passed"] + "\n}\n")

    options: dict[str, Any] = {"data": path, "complete": complete}
    result = evaluate("multipl_e", **options)
    assert (result["variant"], result["pass@1"], result["paper"]["7B"]) == ("sh", 1.0, {"pass@1": 0.12})
    with pytest.raises(UsageError, match="leave --template out"):
        evaluate("multipl_e", template="codellama", **options)
