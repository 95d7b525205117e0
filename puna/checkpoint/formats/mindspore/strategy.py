"""How MindSpore cut the parameters of a training run among its devices: strategy files, read and written.

Devices of a pipeline stage form a matrix, the last axis fastest. Each dim of a parameter is cut along axes of that
matrix, which a tensor map counts from the last: with the matrix (1, 1, 2) the map (0, -1) cuts dim 0 in two.

    rank_2 of stage_devices = 2   ->   stage 1, place 0 in it   ->   coordinates (0, 0, 0)   ->   first half of dim 0

Axes that cut no dim hold copies, unless the optimizer was sharded too: then they cut dim 0 of what is left again.
Files are Protocol Buffers, one for a rank or merged (names begin with their stage: `1-lm_head.weight`), or JSON.

Source: mindspore 2.7 `node_strategy.proto`, `parallel/checkpoint_transform.py`.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.checkpoint.formats.mindspore import wire
from puna.errors import PunaError
from puna.files import file_aside

#: Stage -> parameter -> its layout.
Strategy = dict[int, dict[str, "Layout"]]

#: MindSpore's number of optimizer shards for as many as there can be.
_ALL = -1

#: Errors that reading JSON of another kind, or damaged JSON, may end in.
_MISREADINGS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)

#: No training run had more devices; a larger number is a sign of damage.
_MOST_DEVICES = 1 << 20


@dataclass(frozen=True)
class Layout:
    """How one parameter is cut among the devices of its stage.

    Attributes:
        device_matrix: sizes of the axes, the last one fastest.
        tensor_map: for each dim the axes that cut it, counted from the last; none: the dim is whole.
        optimizer_shards: into how many parts axes that hold copies cut dim 0 again; 0 or 1: they do not.
    """

    device_matrix: tuple[int, ...]
    tensor_map: tuple[tuple[int, ...], ...]
    optimizer_shards: int = 0

    @property
    def devices(self) -> int:
        """Devices of the stage."""
        return math.prod(self.device_matrix)

    def parts(self) -> list[int]:
        """For each dim, into how many parts it is cut."""
        counts = [math.prod(self._size(axis) for axis in axes) for axes in self.tensor_map]
        if counts:
            counts[0] *= math.prod(size for size, _ in self.sharding_axes())
        return counts

    def place(self, rank: int) -> list[int]:
        """For each dim, which of its parts a rank has.

        Args:
            rank: within the stage.
        """
        places = [self._index(axes, rank) for axes in self.tensor_map]
        if places:
            for size, stride in self.sharding_axes():
                places[0] = places[0] * size + rank // stride % size
        return places

    def _index(self, axes: tuple[int, ...], rank: int) -> int:
        index = 0
        for axis in axes:
            index = index * self._size(axis) + rank // self._stride(axis) % self._size(axis)
        return index

    def _size(self, axis: int) -> int:
        return self.device_matrix[len(self.device_matrix) - 1 - axis]

    def _stride(self, axis: int) -> int:
        return math.prod(self.device_matrix[len(self.device_matrix) - axis :])

    def sharding_axes(self) -> list[tuple[int, int]]:
        """Size and stride of the axes that shard the optimizer, outermost first: as many as are needed."""
        if self.optimizer_shards in (0, 1):
            return []
        used = {axis for axes in self.tensor_map for axis in axes}
        chosen: list[tuple[int, int]] = []
        for axis in range(len(self.device_matrix)):
            reached = math.prod(size for size, _ in chosen)
            if self.optimizer_shards != _ALL and reached >= self.optimizer_shards:
                break
            if axis not in used and self._size(axis) > 1:
                chosen.insert(0, (self._size(axis), self._stride(axis)))
        return chosen


def read_strategies(path: Path) -> Strategy:
    """The strategy in a file, merged or of one rank, or in all files of a folder.

    Raises:
        PunaError: there is none, one is damaged or of a kind that puna does not read, or two disagree.
    """
    if not path.is_dir():
        return _read(path)
    files = sorted(file for file in path.iterdir() if file.suffix in (".ckpt", ".json") and file.is_file())
    if not files:
        raise PunaError(f"{path} holds no strategy files (*.ckpt, *.json)")
    strategy: Strategy = {}
    for file in files:
        for stage, layouts in _read(file).items():
            known = strategy.setdefault(stage, {})
            for name, layout in layouts.items():
                if known.setdefault(name, layout) != layout:
                    raise PunaError(
                        f"{file} cuts {name} differently from another file of {path}; give one with --strategy"
                    )
    return strategy


def write_strategy(path: Path, stage: int, layouts: Mapping[str, Layout]) -> None:
    """Writes the strategy file of a rank, which MindSpore's tools read."""
    node = f"stage{stage}/layout-only".encode()
    strategy = [wire.number_field(1, stage), wire.counted_field(2, wire.number_field(1, 1))]
    content = [wire.number_field(1, 1)]
    content.append(wire.counted_field(2, [wire.counted_field(1, node), wire.counted_field(2, strategy)]))
    for name, layout in layouts.items():
        content.append(wire.counted_field(3, [wire.counted_field(1, name.encode()), _encoded(layout)]))
    with file_aside(path) as file:
        file.write(b"".join(content))


def _encoded(layout: Layout) -> bytes:
    maps = [axes or (-1,) for axes in layout.tensor_map]
    if all(len(axes) == 1 for axes in maps):
        maps = [tuple(axis for axes in maps for axis in axes)]
    shards = layout.optimizer_shards
    step = min((stride for _, stride in layout.sharding_axes()), default=0)
    fields = [wire.counted_field(1, [wire.number_field(1, size) for size in layout.device_matrix])]
    fields += [wire.counted_field(2, [wire.number_field(1, axis) for axis in axes]) for axes in maps]
    fields += [wire.counted_field(3, b""), wire.counted_field(4, b""), wire.number_field(5, 0)]
    return wire.counted_field(2, [*fields, wire.number_field(6, step), wire.number_field(7, shards)])


def _read(path: Path) -> Strategy:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise PunaError(f"{path} does not exist") from None
    try:
        stage, items = _from_json(content) if content[:1] == b"{" else _from_message(content)
        strategy: Strategy = {}
        for name, fields in items:
            prefix = re.match(r"(\d+)-", name)
            layouts = strategy.setdefault(int(prefix[1]) if prefix else stage, {})
            layouts[name[prefix.end() :] if prefix else name] = _layout(name, fields)
    except (wire.BrokenMessage, *_MISREADINGS) as error:
        raise PunaError(f"{path} is no strategy file of MindSpore, or damaged ({error})") from None
    if not strategy:
        raise PunaError(f"{path} holds no layout of any parameter")
    return strategy


def _layout(name: str, fields: dict[str, Any]) -> Layout:
    matrix = tuple(int(size) for size in fields["matrix"])
    maps = fields["maps"]
    axes = [(axis,) for axis in maps[0]] if len(maps) == 1 else [tuple(dim) for dim in maps]
    axes = [tuple(int(axis) for axis in dim if axis != -1) for dim in axes]
    if fields["uneven"]:
        raise ValueError(f"{name} is cut into uneven parts, which puna does not read")
    if not matrix or min(matrix) < 1 or math.prod(matrix) > _MOST_DEVICES:
        raise ValueError(f"{name} has the device matrix {matrix}")
    if any(not 0 <= axis < len(matrix) for dim in axes for axis in dim):
        raise ValueError(f"{name} has the tensor map {axes} on the device matrix {matrix}")
    layout = Layout(matrix, tuple(axes), fields["shards"])
    found = math.prod(size for size, _ in layout.sharding_axes())
    if layout.optimizer_shards not in (_ALL, 0, found):
        raise ValueError(f"{name} has {layout.optimizer_shards} shards of the optimizer, on devices for {found}")
    return layout


def _from_message(data: bytes) -> tuple[int, list[tuple[str, dict[str, Any]]]]:
    """The stage of a `ParallelStrategyMap`, and the names and fields of its layouts."""
    stage, items = None, []
    for number, kind, start, stop in wire.fields(data, 0, len(data)):
        if number == 2 and kind == wire.COUNTED and stage is None:
            stage = _stage_of_item(data, start, stop)
        elif number == 3 and kind == wire.COUNTED:
            items.append(_item(data, start, stop))
    return stage or 0, items


def _stage_of_item(data: bytes, start: int, stop: int) -> int | None:
    for number, kind, first, end in wire.fields(data, start, stop):
        if number == 2 and kind == wire.COUNTED:
            for inner, inner_kind, value, _ in wire.fields(data, first, end):
                if inner == 1 and inner_kind == wire.VARINT:
                    return value
    return None


def _item(data: bytes, start: int, stop: int) -> tuple[str, dict[str, Any]]:
    name = None
    found: dict[str, Any] = {"matrix": None, "maps": [], "uneven": False, "shards": 0}
    for number, kind, first, end in wire.fields(data, start, stop):
        if number == 1 and kind == wire.COUNTED:
            name = wire.text(data, first, end)
        elif number == 2 and kind == wire.COUNTED:
            for inner, inner_kind, value, inner_stop in wire.fields(data, first, end):
                if inner == 7 and inner_kind == wire.VARINT:
                    found["shards"] = wire.signed(value)
                elif inner in (1, 2, 3, 4) and inner_kind == wire.COUNTED:
                    _note(found, inner, _dims(data, value, inner_stop))
    if name is None or found["matrix"] is None:
        raise wire.BrokenMessage(f"a layout at byte {start:,} lacks its name or its devices")
    return name, found


def _note(found: dict[str, Any], number: int, dims: list[int]) -> None:
    if number == 1 and found["matrix"] is None:  # of several, MindSpore goes by the first
        found["matrix"] = dims
    elif number == 2:
        found["maps"].append(dims)
    elif number in (3, 4):
        found["uneven"] |= bool(dims)


def _dims(data: bytes, start: int, stop: int) -> list[int]:
    """The numbers of a message whose only field is a repeated number."""
    return [
        wire.signed(dim)
        for number, kind, first, end in wire.fields(data, start, stop)
        if number == 1
        for dim in wire.varints(data, kind, first, end)
    ]


def _from_json(content: bytes) -> tuple[int, list[tuple[str, dict[str, Any]]]]:
    fields = json.loads(content)
    nodes = list(fields.get("parallel_strategy_item", {}).values())
    items = []
    for name, layout in fields["parallel_layout_item"].items():
        matrix, maps = layout["dev_matrix"], layout["tensor_map"]
        nested = bool(matrix) and isinstance(matrix[0], list)
        found = {
            "matrix": matrix[0] if nested else matrix,
            "maps": maps if maps and isinstance(maps[0], list) else [maps],
            "uneven": bool(layout.get("param_split_shape") or layout.get("indices_offset")),
            "shards": layout.get("opt_weight_shard_size", 0),
        }
        items.append((name, found))
    return int(nodes[0].get("stage", 0)) if nodes else 0, items
