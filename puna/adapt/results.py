"""From the stages to the report: is the adapted model better on the team's code, and what did it forget?"""

from pathlib import Path
from typing import Any

from puna.adapt.stages import Places
from puna.evaluate.comparing import compare
from puna.evaluate.samples import read_lines
from puna.report import duration, what_runs_here
from puna.story import Story

#: Score -> its name on the page, its unit, and what is better.
ROWS = {
    "bits_per_byte": ("Bits per byte", "", "lower"),
    "exact_match": ("Next line, exactly right", "%", "higher"),
    "edit_similarity": ("Next line, edit similarity", "%", "higher"),
    "block_exact_match": ("Next block, exactly right", "%", "higher"),
    "block_edit_similarity": ("Next block, edit similarity", "%", "higher"),
}

#: The same of HumanEval.
GENERAL = {"pass@1": ("HumanEval, pass@1", "%", "higher")}

#: Lines and blocks shown of those whose completion changed, and characters shown of what stands before them.
SHOWN, SHOWN_CHARACTERS = 8, 300


def results_of(at: Places, story: Story) -> dict[str, Any]:
    """What the report shows, see `puna.report`."""
    told = story.outcomes
    before, after = (told[name]["scores"] for name in ("score_before", "score_after"))
    general = [told[name]["scores"] for name in ("score_general_before", "score_general_after")]
    sandbox = {"sandbox": general[0]["sandbox"]} if all(general) else {}
    changes = _changes(at)
    gain = before["bits_per_byte"] - after["bits_per_byte"]
    bits = changes.get("bits_per_byte")  # files of earlier versions do not say
    return {
        "title": f"{Path(at.model).name}, adapted to {at.code.name or at.code}",
        "lead": f"On files of {at.code} that were kept from training, the adapted model is "
        f"{_verdict(changes['edit_similarity']['interval'])} at writing "
        f"the next line, and needs {abs(gain):.3f} {'fewer' if gain >= 0 else 'more'} bits per byte (fewer is better"
        f"{_chance(bits['interval']) if bits else ''}).",
        "facts": [
            {"value": f"{told['prepare']['documents']:,}", "label": "files learned from"},
            {"value": f"{told['prepare']['kept']:,}", "label": "files kept for scoring"},
            {"value": f"{told['train']['tokens']:,}", "label": "tokens seen"},
            {
                "value": f"{before['bits_per_byte']:.3f} → {after['bits_per_byte']:.3f}",
                "label": "bits per byte of unseen files",
            },
            {"value": duration(sum(stage["seconds"] for stage in story.stages)), "label": "for all stages"},
        ],
        "scores": _scores(before, after, general, told["score_general_before"]["said"]),
        "tables": [_intervals(before, after, general), _differences(changes)],
        "samples": _samples(at),
        "stages": [
            {"title": stage["title"], "seconds": stage["seconds"], **stage["outcome"]} for stage in story.stages
        ],
        "run": {**what_runs_here(), **story.earlier, "seeds": "0 everywhere", **sandbox},
        "recipes": {"run": (at.run / "recipe.yaml").read_text(encoding="utf-8")},
    }


def _verdict(interval: list[float] | None) -> str:
    if interval is None:
        return "better or worse (too few files to say which)"
    low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else "neither better nor worse beyond chance"


def _chance(interval: list[float] | None) -> str:
    if interval is None:
        return ", but these are too few files to say how sure that is"
    low, high = interval
    return ", and here it may be chance" if low <= 0 <= high else ""


def _scores(before: dict[str, Any], after: dict[str, Any], general: list[Any], said: str) -> dict[str, Any]:
    rows = [
        {"name": title, "unit": unit, "better": better, "values": [before[name], after[name]]}
        for name, (title, unit, better) in ROWS.items()
        if name in before and name in after
    ]
    notes = [f"{before['documents']} files kept from training, {before['cases']} lines and {before['blocks']} blocks."]
    if all(general):
        values = [scores["pass@1"] for scores in general]
        title, unit, better = GENERAL["pass@1"]
        rows.append({"name": title, "unit": unit, "better": better, "values": values})
        notes.append("HumanEval is not the team's code: what falls there was forgotten.")
    else:
        notes.append(f"HumanEval: {said}")
    return {"columns": ["before", "after"], "rows": rows, "notes": notes}


def _intervals(before: dict[str, Any], after: dict[str, Any], general: list[Any]) -> dict[str, Any]:
    rows = [
        [ROWS[name][0], *(_interval(scores["intervals"][name]) for scores in (before, after))]
        for name in ROWS
        if name in before and name in after
    ]
    if all(general):
        rows.append([GENERAL["pass@1"][0], *(_interval(scores["intervals"]["pass@1"]) for scores in general)])
    notes = ["Between these values 95 of 100 such sets of files and tasks would lie."]
    return {"title": "How sure that is", "columns": ["", "before", "after"], "rows": rows, "notes": notes}


def _differences(changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    rows = [
        [(ROWS | GENERAL)[name][0], f"{change['difference']:+.3f}", _interval(change["interval"], sign="+")]
        for name, change in changes.items()
    ]
    notes = ["Each file, line and task with itself: where the interval holds no zero, the change is more than chance."]
    return {"title": "What changed", "columns": ["", "after − before", "95 of 100"], "rows": rows, "notes": notes}


def _interval(interval: list[float] | None, sign: str = "") -> str:
    return "too few to say" if interval is None else f"{interval[0]:{sign}.3f} to {interval[1]:{sign}.3f}"


def _changes(at: Places) -> dict[str, dict[str, Any]]:
    """Score -> its difference and the interval of that, task by task."""
    changes = {}
    for benchmark, rows in (("completion", ROWS), ("humaneval", GENERAL)):
        folders = (at.before / benchmark, at.after / benchmark)
        if all((folder / "result.json").exists() for folder in folders):
            found = compare(*folders)
            for name in rows:
                if name in found["intervals"]:
                    changes[name] = {"difference": found["difference"][name], "interval": found["intervals"][name]}
    return changes


def _cases(folder: Path) -> list[dict[str, Any]]:
    return [
        line
        for _, line in read_lines(folder / "completion" / "cases.jsonl", {"kind": str, "document": str, "target": str})
    ]


def _samples(at: Places) -> list[dict[str, Any]]:
    """The first cases whose completion changed, with what was asked for."""
    samples: list[dict[str, Any]] = []
    for before, after in zip(_cases(at.before), _cases(at.after), strict=True):
        if before["completion"] != after["completion"] and len(samples) < 2 * SHOWN:
            prompt = before["prompt"][-SHOWN_CHARACTERS:]
            for when, case in (("before", before), ("after", after)):
                note = f"{when}; edit similarity {case['edit_similarity']:.0%}; asked for: {before['target'][:200]}"
                parts = [["given", prompt], ["written", case["completion"]]]
                samples.append({"title": f"{case['document']}, line {case['line']}", "note": note, "parts": parts})
    return samples
