"""The files of weights in a folder in Hugging Face layout: one, or several and an index that says which holds what.

    model.safetensors
    model-00001-of-00003.safetensors …, model.safetensors.index.json     {"weight_map": {name: file, …}, …}

`pytorch_model.bin` and its like are read too, never written.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from puna.checkpoint.tensors import StoredTensor, open_pickled, open_safetensors, write_safetensors
from puna.errors import PunaError
from puna.files import read_json, write_json

#: Most bytes of a file of weights.
SHARD_BYTES = 5_000_000_000


def open_weights(folder: Path | str) -> dict[str, StoredTensor]:
    """Every tensor of a folder in Hugging Face layout, unread; safetensors are preferred to `.bin`.

    Raises:
        PunaError: there are no weights, or the weights of two models; a file is missing or damaged, or two files hold
            the same tensor.
    """
    folder = Path(folder)
    for stem, suffix, opened in (("model", "safetensors", open_safetensors), ("pytorch_model", "bin", open_pickled)):
        index, file = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.exists() and file.exists() and file.name not in _weight_map(index).values():
            raise PunaError(
                f"{folder} holds {file.name}, and {index.name} names other files; remove what is not the model's"
            )
        if index.exists():
            return open_index(index, opened)
        if file.exists():
            return opened(file)
    raise PunaError(
        f"{folder} holds no weights: there is neither model.safetensors nor model.safetensors.index.json "
        "(nor pytorch_model.bin)"
    )


def open_index(
    index: Path, opened: Callable[[Path], dict[str, StoredTensor]] = open_safetensors, *, may_be_flat: bool = False
) -> dict[str, StoredTensor]:
    """Every tensor of the files that an index names, unread.

    Args:
        index: JSON with a "weight_map", name -> file beside it.
        opened: gives the tensors of a file.
        may_be_flat: whether JSON without a "weight_map" is itself that map.

    Raises:
        PunaError: there is no such map, a file is missing, or holds other tensors than the map says.
    """
    weight_map = _weight_map(index, may_be_flat)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not (index.parent / file).exists():
            raise PunaError(f"{index.parent / file} does not exist, but {index.name} names it; fetch it again")
        found = opened(index.parent / file)
        if both := [name for name in found if name in tensors]:
            raise PunaError(f"{some(both)} is in {file} and in {Path(tensors[both[0]].where).name} of {index.parent}")
        if lost := [name for name, place in weight_map.items() if place == file and name not in found]:
            raise PunaError(f"{index.parent / file} lacks {some(lost)}, which {index.name} says it holds")
        tensors.update(found)
    return tensors


def _weight_map(index: Path, may_be_flat: bool = False) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map", content if may_be_flat else None)
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise PunaError(f'{index} has no "weight_map" from names of tensors to names of files')
    return weight_map


def write_weights(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Writes tensors into files of at most `SHARD_BYTES`, unless one tensor is larger, in their order."""
    shards = _shards(tensors)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in shard})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.size_bytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Mapping[str, StoredTensor]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.size_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.size_bytes
    return shards


def some(names: Sequence[str]) -> str:
    """The first of some names and how many more there are, for messages."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
