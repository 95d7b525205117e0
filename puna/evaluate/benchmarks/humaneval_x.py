"""HumanEval-X: HumanEval's problems, written anew by hand in JavaScript and C++, with solutions.

    prompt        const add = (x, y) => {                 comment and signature
    completion      return x + y; }                       cut behind the brace that closes the function
    test          const testAdd = () => { console.assert(add(2, 3) === 5) } …

`console.assert` prints and goes on, so what is printed is read. Three of the canonical solutions in JavaScript do not
pass: 112 and 155 fail assertions, 162 needs the module js-md5. Of those in C++, 22 and 137 need Boost (libboost-dev),
and 162 would have to be linked with OpenSSL.

Source: CodeGeeX (arXiv:2303.17568); https://github.com/THUDM/CodeGeeX.
"""

from pathlib import Path

from puna.errors import UsageError
from puna.evaluate.completing import Ask
from puna.evaluate.languages import LIMITS, require, script
from puna.evaluate.programs import Programs, Task
from puna.evaluate.samples import Sample
from puna.evaluate.sandbox import Script

#: Language -> file.
FILES = {"js": "humaneval_js.jsonl.gz", "cpp": "humaneval_cpp.jsonl.gz"}

#: What each line of the file has.
FIELDS = {"task_id": str, "prompt": str, "test": str, "canonical_solution": str}

#: What the ids of tasks begin with -> language.
LANGUAGE_OF = {"JavaScript": "js", "CPP": "cpp"}

#: A function ends here.
CLOSING = "\n}"


class HumanEvalX(Programs):
    """See the module."""

    name = "humaneval_x"
    files = FILES
    where = "https://github.com/THUDM/CodeGeeX has it (codegeex/benchmark/humaneval-x)"
    fields = FIELDS
    limits = LIMITS
    has_questions = False

    def read(self, path: Path) -> dict[str, Task]:
        """The tasks of one language; see `Programs`."""
        tasks = super().read(path)
        for name in {task_id.split("/")[0] for task_id in tasks}:
            if name not in LANGUAGE_OF:
                raise UsageError(f"{path} is in {name}; there are {', '.join(LANGUAGE_OF)}")
            require(LANGUAGE_OF[name])
        return tasks

    def ask(self, task: Task) -> Ask:
        """The prompt."""
        return Ask(task["prompt"])

    def sample(self, task: Task, text: str, *, is_chat: bool) -> Sample:
        """What is written up to the brace that closes the function."""
        body, brace, _ = text.partition(CLOSING)
        return Sample(task.task_id, f"{body}{brace}\n")

    def job(self, task: Task, sample: Sample) -> Script:
        """See `Programs`."""
        program = sample.text if sample.is_whole else f"{task['prompt']}{sample.text}"
        return script(LANGUAGE_OF[task.task_id.split("/")[0]], f"{program}\n{task['test']}")


evaluate = HumanEvalX().evaluate
