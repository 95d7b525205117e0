"""HumanEval infilling: a line, several lines or a random span of a solution, to be written between the rest.

    prompt        def add(x, y): …docstring…            what stands before the gap
    completion        z = x + y                         up to EOT; of a single line, its first line alone
    suffix            return z
    test          as HumanEval's

The program is prompt + completion + suffix. A prompt of the random span may end inside a word; in spm order a model
here splits it anew (`puna.generate.gap`). The paper's authors did not have it do so, which cost them most there.

Source: Efficient Training of Language Models to Fill in the Middle (arXiv:2207.14255);
https://github.com/openai/human-eval-infilling; Code Llama (arXiv:2308.12950), Table 14 (greedy, psm and spm).
"""

from pathlib import Path

from puna.evaluate.completing import Ask
from puna.evaluate.paper import Figures, table
from puna.evaluate.programs import Programs, Task
from puna.evaluate.samples import Sample
from puna.evaluate.sandbox import Job

#: What the ids of tasks begin with -> variant.
VARIANT_OF = {
    "SingleLineInfilling": "single-line",
    "MultiLineInfilling": "multi-line",
    "RandomSpanInfilling": "random-span",
    "RandomSpanInfillingLight": "random-span-light",
}

#: Variant -> file.
FILES = {variant: f"HumanEval-{name}.jsonl.gz" for name, variant in VARIANT_OF.items()}

#: What each line of the file has.
FIELDS = dict.fromkeys(("task_id", "prompt", "suffix", "canonical_solution", "entry_point", "test"), str)

#: Variant and order of the prompt -> Table 14, the released models.
FIGURES = {
    "single-line psm": table("pass@1", {"7B": "74.1", "13B": "75.9"}),
    "single-line spm": table("pass@1", {"7B": "83.3", "13B": "85.6"}),
    "multi-line psm": table("pass@1", {"7B": "48.2", "13B": "51.0"}),
    "multi-line spm": table("pass@1", {"7B": "50.8", "13B": "56.1"}),
    "random-span psm": table("pass@1", {"7B": "59.7", "13B": "63.6"}),
    "random-span spm": table("pass@1", {"7B": "39.0", "13B": "41.9"}),
}


class Infilling(Programs):
    """See the module."""

    name = "infilling"
    files = FILES
    where = "https://github.com/openai/human-eval-infilling has it (data/)"
    fields = FIELDS
    max_tokens = 256
    has_questions = False
    figures = FIGURES

    def variant(self, path: Path) -> str:
        """What the file's first task says of itself."""
        first = next(iter(self.read(path)), "")
        return VARIANT_OF.get(first.split("/")[0], super().variant(path))

    def paper(self, path: Path, order: str) -> Figures:
        """The figures of the variant and of the order of the prompt."""
        return self.figures.get(f"{self.variant(path)} {order}", {})

    def ask(self, task: Task) -> Ask:
        """The gap."""
        return Ask(task["prompt"], suffix=task["suffix"])

    def problem(self, task: Task) -> str:
        """The problem of HumanEval, in whose solution several gaps are."""
        return task.task_id.rpartition("/")[0]

    def sample(self, task: Task, text: str, *, is_chat: bool) -> Sample:
        """What fills the gap; where a line is missing, the first one, with its end."""
        if task.task_id.startswith("SingleLine"):
            text = text.lstrip("\n").split("\n")[0] + "\n"
        return Sample(task.task_id, text)

    def job(self, task: Task, sample: Sample) -> Job:
        """See `Programs`; the reference solution's helpers serve the test, its function does not."""
        middle = sample.text if sample.is_whole else f"{task['prompt']}{sample.text}{task['suffix']}"
        return Job(
            program=middle,
            entry_point=task["entry_point"],
            setup=f"{task['prompt']}{task['canonical_solution']}{task['suffix']}",
            test=f"{task['test']}\n\ncheck({task['entry_point']})\n",
        )


evaluate = Infilling().evaluate
