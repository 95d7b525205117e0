"""From a folder of code and a model to the team's own model, and to a page that says whether it is any better.

    code    ─ prepare ─▶   DIR/data, one file in ten held out, near-copies of those left out of training
    model   ─ score ─▶     DIR/before/…   the held-out files; HumanEval, for what may be forgotten
            ─ train ─▶     DIR/run        with infilling where the model knows it, as it fits this device
            ─ export ─▶    DIR/model      in Hugging Face layout
            ─ score ─▶     DIR/after/…    the same again
                           DIR/report.html, DIR/results.json

`adapt` is the table of contents; each stage is one function of `stages.py`. What a finished stage left is used again
when the command is given again, and training goes on where it was broken off; where the code has changed meanwhile,
that is said.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.adapt import stages
from puna.adapt.recipe import check_recipe, choose_recipe
from puna.adapt.results import results_of
from puna.adapt.stages import Places
from puna.checkpoint import resolve
from puna.report import write_report
from puna.story import Story
from puna.twins import make_callable

make_callable(__name__)


def adapt(
    code: str | Path,
    model: str | Path,
    output: str | Path,
    *,
    epochs: float = 2.0,
    held_out: float = 0.1,
    cases: int = 200,
    humaneval: str | Path | None = None,
    device: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Trains a model further on a folder of code, scores it before and after on files kept out, and exports it.

    Args:
        code: the folder.
        model: a folder in Hugging Face layout, or a hub id.
        output: the folder to make; what is there of a run that stopped is used.
        epochs: how often the code is seen.
        held_out: share of the files that are kept from training, by the hash of their names.
        cases: lines that the models are asked for.
        humaneval: the official file of HumanEval, or one of its form; by default that in the folder PUNA_DATA, if any.
        device: to train and score on; an accelerator by default, if there is one.
        overrides: dotted fields of the recipe and their values, which go before what is chosen.

    Returns:
        The report's path; results.json beside it says the same.

    Raises:
        PunaError: there is too little code, no recipe fits the device, or a stage cannot be done here.
        UsageError: an argument is wrong.
    """
    at = Places(Path(output), Path(code), resolve(model))
    settings = {
        "code": str(code),
        "model": str(model),
        "epochs": epochs,
        "held_out": held_out,
        "cases": cases,
        "humaneval": None if humaneval is None else str(humaneval),
        "overrides": dict(overrides or {}),
    }
    if stages.begun_recipe(at) is None:
        check_recipe(at, epochs, device, overrides or {})
    stages.check(at, humaneval, device)
    story = Story(at.root, settings, stages=7)
    stages.say_what_changed(at)
    story.stage("Turn the code into tokens, and keep some files for scoring", stages.prepare, at, held_out)
    recipe = stages.begun_recipe(at) or choose_recipe(at, epochs, device, overrides or {})  # it fits, or none scores
    story.stage("Score the model on the files that were kept", stages.score_before, at, cases, device)
    story.stage("Score it on HumanEval", stages.score_general_before, at, humaneval, device)
    story.stage("Train it on the rest", stages.train, at, recipe)
    story.stage("Export the result", stages.export, at)
    story.stage("Score the result on the files that were kept", stages.score_after, at, cases, device)
    story.stage(
        "Score it on HumanEval, for what it may have forgotten", stages.score_general_after, at, humaneval, device
    )
    return write_report(results_of(at, story), at.report, data=at.results)
