"""Reads a YAML, says of every key what became of it, and writes the recipe with the commands that lead to its run."""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from puna.checkpoint.formats.mindspore.model_config import read_yaml
from puna.config import Parallel, Recipe
from puna.data.rows import IGNORE
from puna.errors import PunaError
from puna.files import file_aside
from puna.migrate.keys import DIFFERENCES, GENERATION, NO_EFFECT, NOT_NEEDED, NOT_THERE, TRANSLATED
from puna.migrate.recipe import (
    SOME_STEPS,
    TRAIN_DATA,
    VALID_DATA,
    WEIGHTS,
    Settings,
    arithmetic_differences,
    check_feasible,
    generation,
    recipe_of,
    recompute_differences,
    steps_of_epochs,
    value_differences,
)
from puna.parallel.start import words_to_start

#: What became of a key -> the table that says it.
FATES = {
    "translated": TRANSLATED,
    "for puna generate": GENERATION,
    "not needed": NOT_NEEDED,
    "had no effect": NO_EFFECT,
    "not there": NOT_THERE,
}

#: How older versions spell a type -> how it is spelled now.
SPELLED = {"CheckpointMointor": "CheckpointMonitor"}

#: More values than any YAML of MindFormers has.
MOST_VALUES = 10_000

#: What became of a key that no table has.
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Translated:
    """What became of one key.

    Attributes:
        key: dotted.
        value: in the YAML.
        fate: "translated", "for puna generate", "not needed", "had no effect", "not there", "not there, was off" or
            "unknown".
        why: the fields that it went to, or the reason.
    """

    key: str
    value: Any
    fate: str
    why: str


@dataclass(frozen=True)
class Migration:
    """What a YAML became.

    Attributes:
        recipe: the training run; None: the YAML only predicts.
        keys: what became of every key.
        steps: commands to run, in order; the last one starts the run, or generates.
        differences: how the run differs from MindFormers'.
    """

    recipe: Recipe | None
    keys: list[Translated]
    steps: list[str]
    differences: list[str]

    def to_yaml(self) -> str:
        """The recipe with the commands above it; fields that have their default are left out.

        Raises:
            PunaError: the YAML only predicts.
        """
        if self.recipe is None:
            raise PunaError(f"a YAML for prediction has no recipe; run: {self.steps[-1]}")
        lines = [f"#   {step}" for step in self.steps]
        fields = self.recipe.model_dump(mode="json", exclude_unset=True)
        return "\n".join(["# To be run, in this order:", *lines, yaml.safe_dump(fields, sort_keys=False)])


def migrate(
    source: Path | str, output: Path | str | None = None, *, faithful: bool = False, rows: int | None = None
) -> Migration:
    """Turns a YAML of MindFormers into a recipe.

    Args:
        source: the YAML.
        output: the recipe's file to write; None: none is.
        faithful: keep MindFormers' arithmetic, for comparison.
        rows: how many the training data has, to count steps, where its MindRecord files are not here; of dialogs, which
            are packed, the rows of the prepared folder.

    Raises:
        PunaError: the YAML does not describe a Llama of MindFormers, or `output` exists.
        UsageError: a value in it is not one that puna can take.
    """
    source = Path(source)
    try:
        settings = Settings(by_type(read_yaml(source), iter(range(MOST_VALUES))))
    except RecursionError:
        raise PunaError(f"{source} refers to itself without end; it is no configuration of MindFormers") from None
    except StopIteration:
        raise PunaError(
            f"{source} has more than {MOST_VALUES:,} values; it is no configuration of MindFormers"
        ) from None
    check_feasible(settings, str(source))
    keys = [accounted(key, value) for key, value in flattened(settings.content)]
    if settings.get("run_mode", "train") == "predict":
        steps = [*_conversion(settings, source, "CKPT"), generation(settings)]
        return Migration(None, keys, steps, [])
    data = settings.get("train_dataset.data_loader.dataset_dir")
    found = None
    if rows is None and data is not None:
        length = settings.whole("model.model_config.seq_length", 2048)
        found = _count_rows(Path(str(data)), None if faithful else length)
    counted = found if rows is None else rows
    recipe = recipe_of(settings, where=str(source), rows=counted, is_faithful=faithful)
    steps = _conversion(settings, source, None) + _preparation(settings, recipe, faithful)
    start, how_many = words_to_start(_devices(recipe.parallel))
    steps.append(f"{start} {shlex.quote(str(output or 'recipe.yaml'))}{how_many}")
    differences = [
        *([] if faithful else DIFFERENCES),
        *value_differences(settings, recipe),
        *arithmetic_differences(settings, recipe),
        *recompute_differences(settings),
        *_step_differences(settings, recipe, found=found, given=rows, faithful=faithful),
    ]
    migration = Migration(recipe, keys, steps, differences)
    if output is not None:
        if Path(output).exists():
            raise PunaError(f"{output} exists already; choose another place or remove it first")
        with file_aside(output, "w") as file:
            file.write(migration.to_yaml())
    return migration


def by_type(value: Any, room: Iterator[int]) -> Any:
    """The same content with every list of entries that have a type, as callbacks are, turned into type -> entry.

    Args:
        value: of the YAML, in which a small file can repeat itself without end.
        room: gives a number for every value that there is room for.

    Raises:
        StopIteration: there is no room left.
    """
    next(room)
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) and "type" in entry for entry in value):
        value = dict(_named(value))
    if not isinstance(value, Mapping):
        return value
    return {str(key): by_type(inner, room) for key, inner in value.items()}


def _named(entries: list[Any]) -> Iterator[tuple[str, Any]]:
    """Entries by their types, from the second of a type on with a number: `CheckpointMonitor 2`."""
    counts: Counter[str] = Counter()
    for entry in entries:
        name = SPELLED.get(str(entry["type"]), str(entry["type"]))
        counts[name] += 1
        number = f" {counts[name]}" if counts[name] > 1 else ""
        yield name + number, {key: value for key, value in entry.items() if key != "type"} or "on"


def flattened(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The innermost values, each with its dotted key."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flattened(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def accounted(key: str, value: Any) -> Translated:
    """What became of a key, by the table that has it, or the nearest key that it is inside of."""
    name = key
    while name:
        for fate, table in FATES.items():
            if name in table:
                is_off = fate == "not there" and value is not True and value in (None, False, "", {}, [], 0, 1, "None")
                return Translated(key, value, "not there, was off" if is_off else fate, table[name])
        name = name.rpartition(".")[0]
    return Translated(key, value, UNKNOWN, "puna does not know this key; see whether the run needs it")


def _conversion(settings: Settings, source: Path, otherwise: str | None) -> list[str]:
    checkpoint = settings.get("load_checkpoint", otherwise)
    if checkpoint is None:
        return []
    words = ["puna", "convert", checkpoint, "-o", WEIGHTS, "--config", source]
    if strategy := settings.get("src_strategy_path_or_dir"):
        words += ["--strategy", strategy]
    return [shlex.join(map(str, words))]


def _preparation(settings: Settings, recipe: Recipe, faithful: bool) -> list[str]:
    steps = []
    for part, folder in (("train", TRAIN_DATA), ("eval", VALID_DATA)):
        if part == "train" or recipe.data.valid:
            data = settings.get(f"{part}_dataset.data_loader.dataset_dir", "X.mindrecord")
            words = ["puna", "prepare", "mindrecord", str(data), "-o", folder, "--tokenizer", "tokenizer.model"]
            steps.append(shlex.join([*words, *(["--faithful"] if faithful else [])]))
    return steps


def _step_differences(
    settings: Settings, recipe: Recipe, *, found: int | None, given: int | None, faithful: bool
) -> Iterator[str]:
    """What the number of steps does not follow.

    Args:
        settings: the YAML's.
        recipe: what it became.
        found: rows that were counted in the data, packed ones of dialogs.
        given: rows that the user counted.
        faithful: whether rows stay as they are.
    """
    is_stated = settings.whole("lr_schedule.total_steps", -1) > 0
    rows = found if given is None else given
    if not is_stated and rows is None:
        yield f"steps: {SOME_STEPS:,} were put, as the YAML counts epochs; give --rows, or change it"
    elif found is None and not faithful and _has_labels(settings):
        yield (
            f"steps: {recipe.steps:,} are {'stated' if is_stated else 'counted from --rows'}; rows of one dialog each "
            "became fewer, packed ones, which so many steps may see several times as often: "
            f"`puna inspect {TRAIN_DATA} --sequence-length {recipe.sequence_length}` counts them"
        )
    if is_stated and rows is not None:
        of_epochs = steps_of_epochs(settings, rows)
        if of_epochs != recipe.steps:
            yield (
                f"steps: {recipe.steps:,} of lr_schedule.total_steps, in which the learning rate falls, were put; "
                f"the epochs have {of_epochs:,}"
            )


def _has_labels(settings: Settings) -> bool:
    """Whether rows are dialogs, one each."""
    return "labels" in str(settings.get("train_dataset.input_columns", ""))


def _count_rows(path: Path, length: int | None) -> int | None:
    """Rows of a MindRecord file or folder, dialogs packed into such of a length; None if it is not here."""
    from puna.data.mindrecord import MindRecord

    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix != ".db" and file.is_file()]
        records = [MindRecord.open(file) for file in files]
    elif path.is_file():
        records = MindRecord.open_all(path)
    else:
        return None
    if length is None or not all("labels" in record.blob_fields for record in records):
        return sum(map(len, records))
    used = sum(_used(row) for record in records for row in record.rows())
    return max(1, -(-used // max(1, length)))


def _used(row: Mapping[str, Any]) -> int:
    """Ids of a dialog before the padding; none where all is masked."""
    places = row["input_ids"].reshape(-1).nonzero()[0]
    return int(places[-1]) + 1 if (row["labels"] != IGNORE).any() else 0


def _devices(parallel: Parallel) -> int:
    shards = 1 if parallel.dp_shard == "auto" else parallel.dp_shard
    return parallel.pp * parallel.dp_replicate * shards * parallel.cp * parallel.tp
