"""Whether a run goes on as it is asked to: under this recipe, with this model, from this data.

    recipe.yaml               check_recipe       steps: 100 -> 200 is the same run, seed: 0 -> 1 would be another
    metrics.jsonl, .unsaved   check_presence     a run whose checkpoints are out of sight is not begun afresh
    tokenizer/                check_tokenizer    a run does not begin beside another tokenizer than its data's
    checkpoints/…/run.json    check_checkpoint   the model's shape and the data's fingerprints are those of the save

What would make it another run is refused; the message says how a new one begins with its weights.
"""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from puna.checkpoint.manifest import read_meta
from puna.checkpoint.runs import CHECKPOINTS, UNSAVED, checkpoints
from puna.config import Recipe, load_recipe
from puna.errors import PunaError, UsageError
from puna.files import ASIDE, differing
from puna.model.config import PRESETS, ModelConfig
from puna.progress import say
from puna.train.inputs import model_config
from puna.train.metrics import FILE, read_metrics

#: The resolved recipe, in the run's folder.
RECIPE = "recipe.yaml"

#: What takes the place of a run without checkpoints.
TO_BEGIN_AFRESH = f"remove its {RECIPE} and {FILE} to begin afresh"

#: Fields that may change when a run continues, and all below them; any other change would make it another run.
MAY_CHANGE = {
    "model", "start", "run_dir", "steps", "micro_batch_rows", "parallel", "recompute", "recompute_layers", "compile",
    "data.valid", "validation", "checkpoint", "log", "device",
}  # fmt: skip


def recipe_before(run_dir: Path) -> Recipe | None:
    """The recipe of the run that a folder holds, also where only its checkpoints were copied; None: it holds none.

    Raises:
        PunaError: files that a run would write are there, and they are no run's.
    """
    own = [run_dir / name for name in (RECIPE, FILE) if (run_dir / name).exists()]
    if len(own) == 1 and not any(os.path.lexists(run_dir / name) for name in (UNSAVED, CHECKPOINTS)):
        raise PunaError(f"{own[0]} is no run's, and a run would replace it; move it, or choose another run_dir")
    if (run_dir / RECIPE).is_file():
        return load_recipe(run_dir / RECIPE)
    for path in reversed(checkpoints(run_dir).values()):
        try:
            meta = read_meta(path)
        except PunaError:  # damaged; where it would be continued from, that is said
            continue
        return load_recipe(meta["recipe"])
    return None


def config_of_run(recipe: Recipe, run_dir: Path) -> ModelConfig:
    """As `model_config`; a run that has checkpoints no longer needs the folder of weights that it began with."""
    try:
        return model_config(recipe)
    except PunaError as error:
        saved = list(checkpoints(run_dir).values())
        if not saved:
            raise
        say(f"{error}; the model is that of {saved[-1]}")
        return ModelConfig.from_json(read_meta(saved[-1])["model_config"], str(saved[-1]))


def check_presence(run_dir: Path, save_every: int) -> None:
    """Refuses to begin a run afresh where one has saved whose checkpoints are out of sight.

    Raises:
        PunaError: they lead to a disk that is not there, or a run of `save_every` steps or more has none.
    """
    folder = run_dir / CHECKPOINTS
    if folder.is_symlink() and not folder.exists():
        raise PunaError(f"{folder} leads to {folder.readlink()}, which is not there; bring it back, or remove the link")
    if checkpoints(run_dir) or (run_dir / UNSAVED).exists():
        return
    if any(folder.glob(f"step-*{ASIDE}")):  # its first save was killed in its last moment, or by an earlier version
        return
    last = max((numbers["step"] for numbers in read_metrics(run_dir)), default=0)
    if last >= save_every:
        raise PunaError(
            f"{run_dir} holds {last:,} steps of a run but none of its checkpoints; bring them back, or choose another "
            f"run_dir, or {TO_BEGIN_AFRESH}"
        )


def check_tokenizer(run_dir: Path, tokenizer: Path) -> None:
    """Refuses to begin a run where another tokenizer lies than that of its data: what is exported would have it.

    Raises:
        PunaError: it does; an attempt that saved nothing left it there, or it is the user's own.
    """
    kept = run_dir / "tokenizer"
    if checkpoints(run_dir) or not kept.exists():
        return
    there, own = (
        {file.name: file.read_bytes() for file in folder.glob("*") if file.is_file()} for folder in (kept, tokenizer)
    )
    if there != own:
        raise PunaError(
            f"{kept} is another tokenizer than {tokenizer}, and what is exported would have it; remove it, or choose "
            f"another run_dir"
        )


def check_recipe(before: Recipe, now: Recipe) -> None:
    """Refuses to continue a run under a recipe that would make it another run.

    Where the data and the first weights lie may change: `check_checkpoint` knows the data by its fingerprints.
    """
    fields = (recipe.model_dump(exclude={"data": {"train"}}) for recipe in (before, now))
    changed = _differences(*fields)
    may_change = MAY_CHANGE
    if now.arithmetic == "mindformers":
        may_change = may_change - {"micro_batch_rows"}  # whose means its loss is the mean of
    free = tuple(name + end for name in may_change for end in ".:")
    if _begins_with_others(before, now):
        free = tuple(name for name in free if not name.startswith(("model", "start")))
    forbidden = [change for change in changed if not change.startswith(free)]
    was, weights = list(before.data.weights.items()), list(now.data.weights.items())
    if was != weights:
        changed.append(f"data.train: {before.data.train} -> {now.data.train}")
        if [weight for _, weight in was] != [weight for _, weight in weights]:
            forbidden.append(changed[-1])
    if forbidden:
        way = f"begin {new_run_from(now.run_dir)}" if checkpoints(now.run_dir) else TO_BEGIN_AFRESH
        raise UsageError(
            f"{now.run_dir} holds a run of another recipe ({'; '.join(forbidden)}); choose another run_dir, or {way}"
        )
    if changed:
        say(f"continuing with changes: {'; '.join(changed)}")


def check_checkpoint(
    checkpoint: Path, meta: dict[str, Any], recipe: Recipe, config: ModelConfig, fingerprints: dict[str, str]
) -> None:
    """Refuses to continue from a checkpoint with another model or other data.

    Args:
        checkpoint: its folder, for the message.
        meta: what was saved beside its state.
        recipe: of the run.
        config: the model's shape now.
        fingerprints: of the data that is learned from, by folder, in the order of the mixture: whose turn it is, and
            the order of each one's rows, follow that.

    Raises:
        PunaError: the model's shape, or a folder's data, is not what it was.
    """
    before = ModelConfig.from_json(meta["model_config"], str(checkpoint))
    before = replace(before, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)  # not the network's
    if changed := _differences(asdict(before), asdict(config)):
        raise PunaError(
            f"{recipe.start or recipe.model} is another model than when {checkpoint} was saved "
            f"({'; '.join(changed)}); put its config.json back as it was, or begin {new_run_from(recipe.run_dir)}"
        )
    saved = meta.get("data", {})  # saves of earlier versions have none
    for (folder, fingerprint), (was, fingerprint_then) in zip(fingerprints.items(), saved.items(), strict=False):
        if fingerprint != fingerprint_then:
            then = "" if was == folder else f" {was} did"
            raise PunaError(
                f"{folder} holds other data than{then} when {checkpoint} was saved; name or prepare it as it was, or "
                f"begin {new_run_from(recipe.run_dir)}"
            )


def new_run_from(run_dir: Path | str) -> str:
    """How the weights of a run are trained further where the run itself cannot go on."""
    return f"a new run with its weights: puna export {run_dir} -o DIR, then start=DIR and another run_dir"


def _begins_with_others(before: Recipe, now: Recipe) -> bool:
    """Whether other first weights are asked for: where the same have moved, they are no longer where they were."""
    was, asked = (recipe.start or recipe.model for recipe in (before, now))
    if asked == was or asked in PRESETS:
        return False
    if was in PRESETS:  # random ones
        return True
    return Path(was).exists() and not (Path(asked).exists() and Path(asked).samefile(was))


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A text for each field that is not as it was."""
    return [f"{name}: {old} -> {new}" for name, (old, new) in differing(before, now).items()]
