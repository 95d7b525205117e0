"""The stages of `puna adapt`: what each does, and what it says; see `puna.story`."""

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import puna
from puna.adapt.recipe import BYTES_A_TOKEN, row_length
from puna.checkpoint import load_config
from puna.checkpoint.tensors import DTYPES
from puna.checkpoint.weights import open_weights
from puna.config import Recipe, load_recipe
from puna.data.corpora.code import language_of
from puna.data.folders import files_of
from puna.data.prepare import changed_source
from puna.data.shards import DATASET_FILE
from puna.devices import pick_device
from puna.errors import PunaError
from puna.evaluate.benchmarks.humaneval import HumanEval
from puna.evaluate.samples import FOLDER_VARIABLE
from puna.progress import say
from puna.story import Outcome, command

#: Share of the documents that get a gap to fill, where the model knows infilling; Code Llama's.
FIM_RATE = 0.9

#: Most files that are scored, in the order of a hash of their names.
MAX_DOCUMENTS = 200


class Places:
    """Where everything is.

    Args:
        root: the folder to make.
        code: the folder of code.
        model: the folder of the model that is adapted.
    """

    def __init__(self, root: Path, code: Path, model: Path) -> None:
        self.root, self.code, self.model = root, code, model
        self.data, self.held_out = root / "data", root / "data" / "held_out"
        self.run, self.adapted = root / "run", root / "model"
        self.before, self.after = root / "before", root / "after"
        self.results, self.report = root / "results.json", root / "report.html"


def check(at: Places, humaneval: str | Path | None, device: str | None) -> None:
    """Asks at once what a stage would ask after hours: are code, device, tokenizer, weights and HumanEval there?

    Raises:
        PunaError: it is not.
    """
    if not at.code.exists():
        raise PunaError(f"{at.code} does not exist; name a folder of code")
    pick_device(device)
    load_config(at.model)
    puna.load_tokenizer(at.model)
    open_weights(at.model)
    data = _humaneval_file(humaneval)
    if data is not None:
        HumanEval().tasks(data)


def say_what_changed(at: Places) -> None:
    """Says so where the code is no longer what was prepared: to refuse would end a run that was broken off."""
    changed = changed_source(at.data) if (at.data / DATASET_FILE).exists() else None
    if changed:
        say(
            f"what is read of {changed} has changed since {at.data} was made, and all that follows is of the code as "
            "it was then; choose another place with -o for the code as it is"
        )


def prepare(at: Places, held_out: float) -> Outcome:
    """Encodes the code; the files kept for scoring are chosen by the hash of their names, near-copies go with them."""
    tokenizer = puna.load_tokenizer(at.model)
    options: dict[str, Any] = {"tokenizer": at.model, "held_out": held_out}
    if tokenizer.infilling is not None:
        options["fim_rate"] = FIM_RATE
        there = sum(file.size for file in files_of(at.code, respect_gitignore=True) if language_of(file.name))
        options["fim_tokens"] = row_length(load_config(at.model), there / BYTES_A_TOKEN)
    info = puna.prepare("code", at.code, at.data, near_duplicates=True, **options)
    kept = info.get("held_out", {}).get("documents", 0)
    if not kept or not info["documents"]:
        shutil.rmtree(at.data)  # of no use, and in the way of the next attempt
        raise PunaError(
            f"of the {info['documents'] + kept} files of {at.code}, {kept} are kept for scoring and "
            f"{info['documents']} are left to learn from; give more code, or another --held-out"
        )
    shown = command("prepare", "code", at.code, o=at.data, **options) + " --near-duplicates"
    return {
        "said": f"{info['documents']:,} files, {info['tokens']:,} tokens to learn from; {kept:,} files kept out",
        "command": shown,
        "documents": info["documents"],
        "tokens": info["tokens"],
        "kept": kept,
    }


def score_before(at: Places, cases: int, device: str | None) -> Outcome:
    """Lines, blocks and bits per byte of the held-out files, by the model as it was."""
    return _completion(at, at.model, at.before, cases, device)


def score_general_before(at: Places, humaneval: str | Path | None, device: str | None) -> Outcome:
    """HumanEval, by the model as it was."""
    return _humaneval(at.model, at.before, humaneval, device)


def begun_recipe(at: Places) -> Recipe | None:
    """The recipe of a run that stopped, which goes on as it was started; None: there is no run yet."""
    stored = at.run / "recipe.yaml"
    return load_recipe(stored) if stored.exists() else None


def train(at: Places, recipe: Recipe) -> Outcome:
    """Trains, or goes on."""
    from puna.train import train as train_recipe

    result = train_recipe(recipe)
    loss = f", held-out loss {result['valid_loss']:.2f}" if "valid_loss" in result else ""
    return {
        "said": f"{result['step']:,} steps, {result['tokens']:,} tokens{loss}",
        "command": command("train", at.run / "recipe.yaml"),
        "tokens": result["tokens"],
        "valid_loss": result.get("valid_loss"),
    }


def export(at: Places) -> Outcome:
    """Exports the weights in Hugging Face layout, as exact as those of the model that was adapted."""
    kinds = Counter(tensor.dtype for tensor in open_weights(at.model).values())
    dtype = next((name for name, known in DTYPES.items() if known == kinds.most_common(1)[0][0]), None)
    if not at.adapted.exists():
        puna.export(at.run, at.adapted, dtype=dtype)
    options = {} if dtype is None else {"dtype": dtype}
    return {
        "said": f"{at.adapted} opens in transformers, vLLM and llama.cpp's converter as it is",
        "command": command("export", at.run, o=at.adapted, **options),
    }


def score_after(at: Places, cases: int, device: str | None) -> Outcome:
    """Lines, blocks and bits per byte of the held-out files, by the adapted model."""
    return _completion(at, at.adapted, at.after, cases, device)


def score_general_after(at: Places, humaneval: str | Path | None, device: str | None) -> Outcome:
    """HumanEval, by the adapted model."""
    return _humaneval(at.adapted, at.after, humaneval, device)


def _completion(at: Places, model: Path, folder: Path, cases: int, device: str | None) -> Outcome:
    from puna.evaluate import evaluate

    options: dict[str, Any] = {"corpus": at.held_out, "cases": cases, "max_documents": MAX_DOCUMENTS}
    output = folder / "completion"
    scores = evaluate("completion", str(model), device=device, output=output, **options)
    return {
        "said": f"bits per byte {scores['bits_per_byte']:.3f}; next line right {_share(scores, 'exact_match')}",
        "command": command("evaluate", "completion", model, o=output, **options),
        "scores": scores,
    }


def _humaneval(model: Path, folder: Path, data: str | Path | None, device: str | None) -> Outcome:
    from puna.evaluate import evaluate
    from puna.evaluate.sandbox import Sandbox

    output = folder / "humaneval"
    shown = command("evaluate", "humaneval", model, o=output, **({} if data is None else {"data": data}))
    if _humaneval_file(data) is None:
        said = f"left out: no {HumanEval.files['']} in a folder that {FOLDER_VARIABLE} names, nor --humaneval FILE"
        return {"said": said, "command": shown, "scores": None}
    try:
        with Sandbox(workers=1):
            pass
    except PunaError as error:
        return {"said": f"left out: {error}", "command": shown, "scores": None}
    scores = evaluate("humaneval", str(model), device=device, output=output, data=data)
    return {
        "said": f"pass@1 {_share(scores, 'pass@1')}",
        "command": shown,
        "scores": scores,
    }


def _share(scores: dict[str, Any], name: str) -> str:
    """A score in percent, and its interval if there is one."""
    interval = scores["intervals"][name]
    return f"{scores[name]:.1%}" + (f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else "")


def _humaneval_file(data: str | Path | None) -> str | Path | None:
    """HumanEval's file or its folder; None: there is none, and none was named."""
    usual = os.environ.get(FOLDER_VARIABLE)
    return usual if data is None and usual and (Path(usual) / HumanEval.files[""]).is_file() else data
