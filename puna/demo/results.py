"""From the stages to the report: the same results as JSON for programs and as a page for people."""

from pathlib import Path
from typing import Any

from puna.demo.stages import Places
from puna.report import duration, what_runs_here
from puna.report.chart import smoothed
from puna.story import Story

#: Column of the table of scores -> the model's name in the stages' scores.
MODELS = {"random weights": "random", "pretrained": "pretrained", "fine-tuned on dialogs": "chat"}


def results_of(at: Places, story: Story) -> dict[str, Any]:
    """What a report shows, see `puna.report`."""
    told = story.outcomes
    pretrained, exported = told["pretrain"], told["export_pretrained"]
    completion, problems = told["score_completion"], told["score_problems"]
    seconds = sum(stage["seconds"] for stage in story.stages)
    bits = {name: score["bits_per_byte"] for name, score in completion["scores"].items()}
    weights = f"{exported['weights'] / 1e6:.1f} million"
    return {
        "title": "A code model of one's own, in small",
        "lead": f"puna has cut Python's standard library into pieces, trained a model of {weights} weights on them, "
        "taught it to answer, and asked it to write. So small a model, trained so briefly, is no programmer; what it "
        "shows is that every stage works, and that training helps.",
        "facts": [
            {"value": f"{exported['weights'] / 1e6:.1f} M", "label": "weights"},
            {"value": f"{pretrained['tokens'] / 1e6:.2f} M", "label": "tokens seen in pretraining"},
            {"value": f"{pretrained['tokens_per_second']:,.0f}", "label": "tokens a second"},
            {"value": f"{bits['random']:.2f} → {bits['pretrained']:.2f}", "label": "bits per byte of unseen code"},
            {"value": duration(seconds), "label": "for all stages"},
        ],
        "scores": _scores(completion, problems),
        "curves": [
            _loss_curve("Loss of pretraining", at.pretrain_run),
            _loss_curve("Loss of fine-tuning", at.chat_run),
            _speed_curve("Speed of pretraining", at.pretrain_run),
        ],
        "samples": told["write_samples"]["samples"],
        "stages": [
            {"title": stage["title"], "seconds": stage["seconds"], **stage["outcome"]} for stage in story.stages
        ],
        "run": {**what_runs_here(), **story.earlier, "seeds": "0 everywhere", "sandbox": problems["sandbox"]},
        "recipes": {
            run.name: (run / "recipe.yaml").read_text(encoding="utf-8") for run in (at.pretrain_run, at.chat_run)
        },
    }


def _scores(completion: dict[str, Any], problems: dict[str, Any]) -> dict[str, Any]:
    lines, functions = completion["scores"], problems["scores"]
    first = lines["random"]

    def row(name: str, scores: dict[str, Any], key: str, better: str, unit: str = "") -> dict[str, Any]:
        values = [scores[model][key] if model in scores else None for model in MODELS.values()]
        return {"name": name, "better": better, "unit": unit, "values": values}

    notes = [f"Unseen code: {first['documents']} pieces of the library that were kept from training, by the hash of "
             f"their names; {first['cases']} lines of them asked for."]  # fmt: skip
    rows = [
        row("Bits per byte of unseen code", lines, "bits_per_byte", "lower"),
        row("Next line, exactly right", lines, "exact_match", "higher", "%"),
        row("Next line, edit similarity", lines, "edit_similarity", "higher", "%"),
    ]
    if functions:
        rows.append(row("Functions that pass their tests", functions, "pass@1", "higher", "%"))
        notes.append(f"Functions: {functions['chat']['tasks']} small ones, written for puna in HumanEval's form.")
    else:
        notes.append(f"Functions that pass their tests: {problems['said']}")
    return {"columns": list(MODELS), "rows": rows, "notes": notes}


def _loss_curve(title: str, run_dir: Path) -> dict[str, Any]:
    steps = _metrics(run_dir)
    loss, valid = _points(steps, "loss"), _points(steps, "valid_loss")
    lines = [
        {"name": "training", "points": smoothed(loss, max(1, len(loss) // 40))},
        {"name": "held out", "points": valid, "style": "dots"},
        {"name": "each step", "points": loss, "style": "faint"},
    ]
    return {"title": title, "x": "step", "y": "nats per token", "lines": lines}


def _points(steps: list[dict[str, Any]], name: str) -> list[list[float]]:
    """Step and number, of the steps that have one."""
    return [[step["step"], step[name]] for step in steps if step.get(name) is not None]


def _speed_curve(title: str, run_dir: Path) -> dict[str, Any]:
    points = [[step["step"], step["tokens_per_second"]] for step in _metrics(run_dir)]
    lines = [{"name": "tokens per second", "points": points}]
    return {"title": title, "x": "step", "y": "tokens per second", "from_zero": True, "lines": lines}


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    from puna.train.metrics import read_metrics

    return read_metrics(run_dir)
