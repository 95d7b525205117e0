"""Checkpoints of MindSpore with MindFormers' names: one file, or the slices of a training run.

    X.ckpt                              one model; also X.safetensors, or several and param_name_map.json
    SRC/rank_N/*.ckpt, SRC/strategy/    slices and how they were cut
    model.yaml                          beside them, where puna wrote them: MindFormers' `model:` section

Optimizer state and counters are recognised and left out, which is said; only the model is converted. Names are in
`names.py`, the file in `ckpt.py`, how parameters are cut in `strategy.py` and `slices.py`, the model's shape in
`model_config.py`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from puna.checkpoint.formats import pattern_of
from puna.checkpoint.formats.mindspore.ckpt import open_ckpt, write_ckpt
from puna.checkpoint.formats.mindspore.model_config import config_of, to_yaml
from puna.checkpoint.formats.mindspore.names import sort_out, to_hugging_face, to_mindformers
from puna.checkpoint.formats.mindspore.slices import (
    SUFFIXES,
    chosen_files,
    cut,
    llama_layouts,
    merge,
    rank_folders,
)
from puna.checkpoint.formats.mindspore.strategy import Strategy, read_strategies, write_strategy
from puna.checkpoint.huggingface import load_tokenizer_of, without_eot
from puna.checkpoint.tensors import StoredTensor, open_safetensors, safetensors_metadata
from puna.checkpoint.weights import open_index
from puna.errors import PunaError, UsageError
from puna.files import file_aside, folder_aside
from puna.model.config import ModelConfig
from puna.progress import say
from puna.tokenizer import Tokenizer

#: Names of options of `puna.convert` that `read` and `write` take.
READ_OPTIONS = ("config", "strategy", "pick")
WRITE_OPTIONS = ("layout",)

#: The file that states the model's shape beside weights that puna wrote.
MODEL_FILE = "model.yaml"

#: Says in which of several safetensors a parameter is: {"weight_map": {name: file}} as `mindspore.unified_safetensors`
#: writes it, {name: file} as MindFormers does, whose files do not say what they are.
INDEX_FILE = "param_name_map.json"


def recognises(place: Path) -> bool:
    """Whether this is a `.ckpt` or MindSpore's safetensors, or a folder of either, their map or ranks' folders."""
    if place.is_file():
        return _is_mindspore(place)
    if (place / "config.json").exists():
        return False
    has_files = any(file.is_file() and _is_mindspore(file) for file in place.iterdir())
    return has_files or (place / INDEX_FILE).exists() or bool(rank_folders(place))


def read(
    place: Path,
    rope_theta: float | None,
    *,
    config: str | Path | None = None,
    strategy: str | Path | None = None,
    pick: str | None = None,
) -> tuple[ModelConfig, dict[str, StoredTensor], Tokenizer | None]:
    """Shape, unread tensors under Hugging Face names, and the tokenizer that lies beside them.

    Args:
        place: a file, or a folder of one or of slices.
        rope_theta: the rotary base, where nothing states it.
        config: MindFormers' YAML, a `config.json` or the name of a preset; None: `model.yaml` beside the weights, or
            what the shapes tell.
        strategy: file or folder; None: `strategy` beside the ranks' folders, or one folder above.
        pick: a pattern for the names of files, where there are several.

    Raises:
        PunaError: something is missing, damaged, unknown, or not stated.
    """
    folder = place.parent if place.is_file() else place
    folders = {} if place.is_file() else rank_folders(place)
    if folders:
        content = _merged(place, folders, strategy, pick)
    else:
        content = _whole(place, pick)
    sorted_out = sort_out(content, str(place))
    if sorted_out.left_out:
        say(f"left out of the model: {sorted_out.left_out}")
    if config is None and (folder / MODEL_FILE).exists():
        config = folder / MODEL_FILE
    shape = config_of(sorted_out.weights, str(place), config, rope_theta)
    return shape, to_hugging_face(sorted_out.weights, shape), load_tokenizer_of(folder)


def write(
    folder: Path,
    config: ModelConfig,
    tensors: dict[str, StoredTensor],
    tokenizer: Tokenizer | None,
    *,
    layout: str | None = None,
) -> None:
    """Writes `model.ckpt`, or slices with their strategy files, and MindFormers' `model:` section beside them.

    Args:
        folder: to be made.
        config: the model's shape.
        tensors: the model's.
        tokenizer: goes along.
        layout: "dp=1,mp=2,pp=2" (and "optimizer=1" to share the weights among copies), or strategy files to cut by.

    Raises:
        PunaError: MindFormers' Llama is no such network, or the tensors cannot be cut so.
    """
    config = without_eot(config, tokenizer)
    section = to_yaml(config, tensors)
    renamed = to_mindformers(tensors)
    strategy = None if layout is None else _strategy(layout, renamed, config)
    with folder_aside(folder) as aside:
        with file_aside(aside / MODEL_FILE, "w") as file:
            file.write(section)
        if tokenizer is not None:
            tokenizer.save(aside)
        if strategy is None:
            write_ckpt(aside / "model.ckpt", renamed)
        else:
            _write_slices(aside, renamed, strategy)
    end, *others = config.eos_token_ids or (None,)
    if others:
        say(f"MindFormers' Llama ends texts at {end} alone, not at {', '.join(map(str, others))} too")


def _is_mindspore(file: Path) -> bool:
    if file.suffix == ".safetensors":
        return safetensors_metadata(file).get("format") == "ms"
    return file.suffix == ".ckpt"


def _open(file: Path) -> Mapping[str, StoredTensor | str]:
    return open_ckpt(file) if file.suffix == ".ckpt" else open_safetensors(file)


def _whole(place: Path, pick: str | None) -> Mapping[str, StoredTensor | str]:
    if place.is_file():
        return _open(place)
    if (place / INDEX_FILE).exists():
        return open_index(place / INDEX_FILE, may_be_flat=True)
    return _open(_chosen({0: place}, pick)[0])


def _merged(
    folder: Path, folders: dict[int, Path], strategy: str | Path | None, pick: str | None
) -> Mapping[str, StoredTensor | str]:
    files = _chosen(folders, pick)
    if strategy is None and len(files) == 1:
        return _open(files[min(files)])
    ranks = {}
    for rank, file in files.items():
        own = sort_out(_open(file), str(file))
        ranks[rank] = own.weights
        if rank == min(files) and own.left_out:
            say(f"left out of the model, on each rank: {own.left_out}")
    return merge(ranks, read_strategies(_strategy_place(folder, strategy)), str(folder))


def _chosen(folders: dict[int, Path], pick: str | None) -> dict[int, Path]:
    files = chosen_files(folders, pick)
    if any(sum(x.suffix in SUFFIXES for x in folder.iterdir()) > 1 for folder in folders.values()):
        say(f"of several checkpoints {next(iter(files.values())).name} is taken (--pick chooses another)")
    return files


def _strategy_place(folder: Path, stated: str | Path | None) -> Path:
    if stated is not None:
        return Path(stated)
    for place in (folder / "strategy", folder.parent / "strategy"):
        if place.is_dir():
            return place
    raise PunaError(
        f"{folder} has slices, but there is no {folder / 'strategy'}; give the strategy files with --strategy, or "
        "convert one rank's folder if each holds the whole model"
    )


def _strategy(layout: str, tensors: Mapping[str, StoredTensor], config: ModelConfig) -> Strategy:
    """The layouts of every stage: those of strategy files, or MindFormers' own for these numbers."""
    if "=" not in layout:
        if not Path(layout).exists():
            raise UsageError(f"layout {layout!r} is neither numbers, as dp=1,mp=8,pp=2, nor strategy files")
        strategy = read_strategies(Path(layout))
        spoken_of = {name for layouts in strategy.values() for name in layouts}
        if lost := [name for name in tensors if name not in spoken_of]:
            raise PunaError(f"{layout} does not say how {lost[0]} is cut; is it of another model?")
        return {
            stage: {name: layouts[name] for name in tensors if name in layouts} for stage, layouts in strategy.items()
        }
    sizes = _sizes(layout)
    stages, layers = sizes["pp"], config.num_hidden_layers
    row_counts = {name: tensor.shape[0] for name, tensor in tensors.items()}
    if (ranks := sizes["dp"] * sizes["mp"]) > (rows := max(row_counts.values())):
        raise UsageError(
            f"layout {layout!r} has dp x mp = {ranks:,} ranks a stage, and no tensor has more than {rows:,} rows; use "
            f"{rows} ranks or less"
        )
    if layers % stages:
        raise UsageError(f"pp={stages} must divide the {layers} layers of the model")
    names: dict[int, list[str]] = {stage: [] for stage in range(stages)}
    for name in tensors:
        number = pattern_of(name)[0]
        last = stages - 1 if not name.startswith("model.tok_embeddings") else 0
        names[int(number) * stages // layers if number else last].append(name)
    dp, mp, optimizer = sizes["dp"], sizes["mp"], bool(sizes["optimizer"])
    return {stage: llama_layouts(own, row_counts, dp=dp, mp=mp, optimizer=optimizer) for stage, own in names.items()}


def _sizes(layout: str) -> dict[str, int]:
    sizes = {"dp": 1, "mp": 1, "pp": 1, "optimizer": 0}
    for part in layout.split(","):
        match = re.fullmatch(r"\s*(\w+)=(\d+)\s*", part)
        if not match or match[1] not in sizes:
            raise UsageError(f"layout {layout!r}: {part!r} is not one of {', '.join(f'{name}=N' for name in sizes)}")
        sizes[match[1]] = int(match[2])
    if zero := [name for name in ("dp", "mp", "pp") if sizes[name] < 1]:
        raise UsageError(f"layout {layout!r}: {zero[0]} must be 1 or more")
    return sizes


def _write_slices(folder: Path, tensors: Mapping[str, StoredTensor], strategy: Strategy) -> None:
    for stage, layouts in sorted(strategy.items()):
        devices = next(iter(layouts.values())).devices
        for i in range(devices):
            rank = stage * devices + i
            slices = {name: cut(name, tensors[name], layout, i) for name, layout in layouts.items()}
            write_ckpt(folder / f"rank_{rank}" / f"checkpoint_{rank}.ckpt", slices)
            write_strategy(folder / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt", stage, layouts)
