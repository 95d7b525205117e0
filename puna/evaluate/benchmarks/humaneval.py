"""HumanEval: 164 Python functions to complete from signature and docstring, judged by their tests.

    prompt        def add(x, y): …docstring…                        the model sees this, as it is
    completion        return x + y                                  cut before the first of `STOPS`
    test          def check(candidate): assert candidate(2, 3) == 5

The program that is judged is prompt + completion; the test runs beside it, never in it (`puna.evaluate.sandbox`).

Source: Evaluating Large Language Models Trained on Code (arXiv:2107.03374); data and sample format of
https://github.com/openai/human-eval; stop strings and the unstripped prompt of bigcode-evaluation-harness, which Code
Llama's authors point to (github.com/facebookresearch/codellama, issues 72 and 104).
"""

from puna.evaluate.answers import parsed, preamble
from puna.evaluate.completing import Ask
from puna.evaluate.paper import table
from puna.evaluate.programs import Programs, Task
from puna.evaluate.samples import Sample
from puna.evaluate.sandbox import Job

#: A completion ends before the first of these.
STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")

#: Bodies that make a prompt whole: behind a docstring, inside a loop or branch, behind a `try`.
STUBS = ("    pass", "        pass", "    finally:\n        pass")

#: What an Instruct model is asked; the paper does not say what its authors asked.
QUESTION = "Complete this Python function. Answer with the whole function in one block of code.\n\n```python\n{}\n```"

#: Variant -> file; there is only one.
FILES = {"": "HumanEval.jsonl.gz"}

#: What each line of the file has.
FIELDS = {"task_id": str, "prompt": str, "entry_point": str, "test": str}

#: Table 2.
FIGURES = {
    "": table(
        "pass@1 pass@10 pass@100",
        {
            "7B": "33.5 59.6 85.9",
            "13B": "36.0 69.4 89.8",
            "34B": "48.8 76.8 93.0",
            "70B": "53.0 84.6 96.2",
            "Instruct 7B": "34.8 64.3 88.1",
            "Instruct 13B": "42.7 71.6 91.6",
            "Instruct 34B": "41.5 77.2 93.5",
            "Instruct 70B": "67.8 90.3 97.3",
            "Python 7B": "38.4 70.3 90.6",
            "Python 13B": "43.3 77.4 94.1",
            "Python 34B": "53.7 82.8 94.7",
            "Python 70B": "57.3 89.3 98.4",
        },
    )
}


class HumanEval(Programs):
    """See the module."""

    name = "humaneval"
    files = FILES
    where = "https://github.com/openai/human-eval has it (data/HumanEval.jsonl.gz)"
    fields = FIELDS
    stops = STOPS
    figures = FIGURES

    def ask(self, task: Task) -> Ask:
        """The prompt, or a question about it."""
        return Ask(task["prompt"], question=QUESTION.format(task["prompt"].strip()))

    def job(self, task: Task, sample: Sample) -> Job:
        """See `Programs`; on the test's side, the prompt's other functions are those of the prompt."""
        return Job(
            program=program(task, sample),
            entry_point=task["entry_point"],
            setup=_with_stub(task["prompt"]),
            test=f"{task['test']}\n\ncheck({task['entry_point']})\n",
        )


def program(task: Task, sample: Sample) -> str:
    """Prompt and completion; or a whole program behind the prompt's imports and helpers, which it may leave out."""
    if not sample.is_whole:
        return f"{task['prompt']}{sample.text}\n"
    if "from __future__" in sample.text:  # which must stand first
        return sample.text
    return f"{preamble(task['prompt'], task['entry_point'])}{sample.text}\n"


def _with_stub(prompt: str) -> str:
    """A prompt made whole, so that what it defines beside the function asked for is there: a body that does nothing."""
    wholes = [f"{prompt}\n{stub}\n" for stub in STUBS]
    return next((whole for whole in wholes if parsed(whole) is not None), wholes[0])


evaluate = HumanEval().evaluate
