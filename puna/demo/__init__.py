"""The whole of puna, small: from the text of Python's standard library to a model that is trained, tuned and scored.

    demo/library      ─ the library in pieces ─▶  demo/tokenizer, demo/data/code
    demo/data/code    ─ pretraining ─▶            demo/runs/pretrain   ─▶ demo/models/pretrained
    dialogs.json      ─ fine-tuning ─▶            demo/runs/chat       ─▶ demo/models/chat
    the models        ─ completing, scoring ─▶    demo/report.html, demo/results.json

`demo` is the table of contents. Each stage is one function of `stages.py` that calls what the command of the same name
calls; what a finished stage left is used again when the story is told again.
"""

import dataclasses
import platform
from pathlib import Path

from puna.demo import stages
from puna.demo.results import results_of
from puna.demo.stages import Places, Size
from puna.report import write_report
from puna.story import Story

__all__ = ["Size", "demo"]


def demo(output: str | Path = "demo", *, size: Size = Size()) -> Path:
    """Tells the story, or what is left of it, and writes the report.

    Args:
        output: the folder to make.
        size: how much of everything.

    Returns:
        The report's path.

    Raises:
        PunaError: `output` holds something else, or a stage cannot be done here.
    """
    at = Places(Path(output))
    settings = {"Python": platform.python_version(), "size": dataclasses.asdict(size)}
    story = Story(at.root, settings, stages=10)
    story.stage("Cut Python's standard library into pieces", stages.cut_library, at, size)
    story.stage("Train a tokenizer on them", stages.make_tokenizer, at, size)
    story.stage("Turn the pieces into tokens, half of them with a gap to fill", stages.prepare_code, at)
    story.stage("Pretrain a model from random weights", stages.pretrain, at, size)
    story.stage("Export it to the Hugging Face layout", stages.export_pretrained, at)
    story.stage("Turn dialogs into tokens", stages.prepare_dialogs, at)
    story.stage("Fine-tune the model on the dialogs, and export it", stages.fine_tune, at, size)
    story.stage("Complete, fill in and answer", stages.write_samples, at, size)
    story.stage("Score the models on code that they have not seen", stages.score_completion, at, size)
    story.stage("Run the functions that they write, in a sandbox", stages.score_problems, at)
    return write_report(results_of(at, story), at.report, data=at.results)
