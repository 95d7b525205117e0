"""What a run begins with, and whether it goes together: the model's shape, the folder of its weights, and its data."""

from pathlib import Path

import torch

from puna.checkpoint import is_hub_id, load_config, resolve
from puna.checkpoint.huggingface import load_tokenizer_of
from puna.config import Recipe
from puna.data.loader import Loader
from puna.data.rows import Rows, open_rows
from puna.data.shards import Dataset
from puna.devices import has_triton, package_command, takes_cuda_kernels
from puna.errors import PunaError
from puna.model.config import PRESETS, ModelConfig, preset
from puna.native import INSTALL_COMPILER, INSTALL_FOR_TRITON, cpp_compiler
from puna.parallel.mesh import world_rank, world_size
from puna.progress import say


def model_config(recipe: Recipe) -> ModelConfig:
    """The shape of the model that a recipe trains: the weights' config.json where there are weights, else a preset."""
    source = weights_folder(recipe)
    return preset(recipe.model) if source is None else load_config(source)


def weights_folder(recipe: Recipe) -> Path | None:
    """The folder that a recipe's weights come from; None: random weights."""
    if recipe.start is not None:
        return resolve(recipe.start)
    if recipe.model not in PRESETS and not is_hub_id(recipe.model) and not Path(recipe.model).exists():
        raise PunaError(f"model={recipe.model} is neither a folder nor one of {', '.join(PRESETS)}")
    return None if recipe.model in PRESETS else resolve(recipe.model)


def check_compiler(recipe: Recipe, device: torch.device) -> None:
    """Refuses to compile layers where nothing is there to do it with: a C++ compiler for a CPU, Triton for CUDA."""
    if not recipe.compile:
        return
    if device.type == "cpu" and cpp_compiler() is None:
        missing, remedy = "a C++ compiler, and none is in PATH", package_command(INSTALL_COMPILER)
    elif takes_cuda_kernels(device.type) and not has_triton():
        missing, remedy = "Triton, gcc and Python's headers", package_command(INSTALL_FOR_TRITON)
    else:
        return
    raise PunaError(f"compile=true needs {missing}: {remedy or 'install one'}; or use compile=false")


def open_loader(recipe: Recipe) -> Loader:
    """The batches of a recipe."""
    sources = [(open_data(recipe, folder), weight) for folder, weight in recipe.data.weights.items()]
    return Loader(sources, batch_rows=recipe.batch_rows, seed=recipe.seed)


def open_data(recipe: Recipe, folder: str) -> Rows:
    """The rows of a prepared folder, of the length and filling that a recipe asks for."""
    fill = None if recipe.data.fill == "auto" else recipe.data.fill
    return open_rows(Dataset.open(folder), recipe.sequence_length, fill)


def check_data(recipe: Recipe, config: ModelConfig, *, is_new: bool) -> Path:
    """Refuses data that the model cannot read; returns the folder of the data's tokenizer, with a layout of dialogs."""
    folders = [*recipe.data.weights, *([recipe.data.valid] if recipe.data.valid else [])]
    infos = {folder: Dataset.open(folder).info for folder in folders}
    tokenizers = {folder: info["tokenizer"] for folder, info in infos.items()}
    first, *others = tokenizers.items()
    for folder, tokenizer in others:
        if tokenizer["sha256"] != first[1]["sha256"]:
            raise PunaError(f"{folder} was prepared with another tokenizer than {first[0]}; prepare one of them again")
    for folder, tokenizer in tokenizers.items():
        if tokenizer["vocab_size"] > config.vocab_size:
            raise PunaError(
                f"{folder} was prepared with a tokenizer of {tokenizer['vocab_size']} ids, the model {recipe.model} "
                f"has {config.vocab_size}; prepare the data with the model's own tokenizer"
            )
    if is_new and (source := weights_folder(recipe)) is not None:
        _check_tokenizer(source, first[0], first[1]["sha256"])
    options = {folder: info.get("settings", {}).get("options", {}) for folder, info in infos.items()}
    layouts = {folder: options[folder]["template"] for folder in recipe.data.weights if "template" in options[folder]}
    if len(set(layouts.values())) > 1:
        of_each = ", ".join(f"{layout} in {folder}" for folder, layout in layouts.items())
        say(f"dialogs of several layouts: {of_each}; the first goes along with the model")
    return Path(next(iter(layouts), first[0])) / "tokenizer"


def verified_data(recipe: Recipe) -> dict[str, str]:
    """What tells the data apart that is learned from, by folder; the ranks share out the reading of all data.

    Raises:
        PunaError: a shard is damaged.
    """
    measured = [recipe.data.valid] if recipe.data.valid else []
    datasets = {folder: Dataset.open(folder) for folder in (*recipe.data.weights, *measured)}
    for dataset in datasets.values():
        dataset.verify(rank=world_rank(), size=world_size())
    return {folder: datasets[folder].fingerprint for folder in recipe.data.weights}


def _check_tokenizer(model: Path, folder: str, sha256: str) -> None:
    try:
        own = load_tokenizer_of(model)
    except PunaError as error:
        say(f"the tokenizer of {model} cannot be compared with that of {folder}, which is used: {error}")
        return
    if own is None:
        say(f"{model} has no tokenizer to compare with that of {folder}, which is used")
    elif own.sha256 != sha256:
        raise PunaError(
            f"{folder} was prepared with another tokenizer than that of {model}; prepare it again with "
            f"--tokenizer {model}"
        )
