r"""MultiPL-E: HumanEval's problems in other languages, judged by their tests there.

    prompt        long string_length(std::string string) {        up to where the body begins
    completion        return string.size();                       cut before the task's own stop strings
    tests         }\nint main() { … assert(candidate("x") == 1); }

One file a language; a language whose tools are not installed is refused with the package that has them. The tests run
in the program's own process, as the authors have it: see `Script` in `puna.evaluate.sandbox`.

Source: MultiPL-E (arXiv:2208.08227), https://github.com/nuprl/MultiPL-E; Code Llama (arXiv:2308.12950), Table 4.
"""

from pathlib import Path

from puna.errors import UsageError
from puna.evaluate.answers import cut
from puna.evaluate.completing import Ask
from puna.evaluate.languages import LIMITS, require, script
from puna.evaluate.paper import table
from puna.evaluate.programs import Programs, Task
from puna.evaluate.samples import Sample
from puna.evaluate.sandbox import Script

#: Language -> file, as the DeepSeek-Coder repository names them.
FILES = {language: f"humaneval-{language}.jsonl" for language in ("cpp", "js", "sh", "java", "php")}

#: What each line of the file has.
FIELDS = {"name": str, "language": str, "prompt": str, "tests": str, "stop_tokens": list}

#: What the files' authors call a language, where it is not our name.
CALLED = {"bash": "sh", "javascript": "js", "c++": "cpp"}

#: Table 4: pass@1 of C++, Java, PHP and Bash; its column of TypeScript is headed JavaScript elsewhere, and left out.
TABLE = {
    "7B": "28.6 34.2 24.2 12.0",
    "13B": "39.1 38.0 34.2 15.2",
    "34B": "47.8 45.6 44.1 17.1",
    "70B": "52.8 51.9 50.9 29.1",
    "Instruct 7B": "31.1 30.4 28.6 10.1",
    "Instruct 13B": "42.2 40.5 32.3 13.9",
    "Instruct 34B": "45.3 43.7 36.6 19.6",
    "Instruct 70B": "53.4 58.2 58.4 29.7",
    "Python 7B": "32.3 35.4 32.3 16.5",
    "Python 13B": "39.1 37.3 33.5 13.9",
    "Python 34B": "42.2 44.9 42.9 14.3",
    "Python 70B": "54.7 57.6 53.4 25.3",
}
FIGURES = {
    language: table("pass@1", {model: row.split()[column] for model, row in TABLE.items()})
    for column, language in enumerate(("cpp", "java", "php", "sh"))
}


class MultiPLE(Programs):
    """See the module."""

    name = "multipl_e"
    files = FILES
    where = "https://github.com/deepseek-ai/DeepSeek-Coder has it (Evaluation/HumanEval/data)"
    fields = FIELDS
    id_field = "name"
    limits = LIMITS
    has_questions = False
    figures = FIGURES

    def read(self, path: Path) -> dict[str, Task]:
        """The tasks of one language; see `Programs`."""
        tasks = super().read(path)
        for language in {_language(task) for task in tasks.values()}:
            if language not in FILES:
                raise UsageError(f"{path} is in {language}; there are {', '.join(FILES)}")
            require(language)
        return tasks

    def variant(self, path: Path) -> str:
        """The language of the file."""
        return next((_language(task) for task in self.read(path).values()), super().variant(path))

    def ask(self, task: Task) -> Ask:
        """The prompt."""
        return Ask(task["prompt"])

    def sample(self, task: Task, text: str, *, is_chat: bool) -> Sample:
        """What stands before the task's own stop strings."""
        return Sample(task.task_id, cut(text, task["stop_tokens"]))

    def job(self, task: Task, sample: Sample) -> Script:
        """See `Programs`."""
        program = sample.text if sample.is_whole else f"{task['prompt']}{sample.text}"
        return script(_language(task), f"{program}\n{task['tests']}")


def _language(task: Task) -> str:
    name: str = task["language"].lower()
    return CALLED.get(name, name)


evaluate = MultiPLE().evaluate
