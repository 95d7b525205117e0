"""Products of quantised layers beside those of bf16: of one row and few (decoding), and of many (prompts).

    python benchmarks/quantised_products.py [--layers 6] [--rounds 7] [--schemes int8 int4] [--device cpu]

The layers are those of TinyLlama's shape (2048 wide, 5632 in the MLP, 256 for keys and values), several of each, so
that no cache holds them. A round multiplies with all of them, contender after contender; the medians count, and the
least, which others on the machine disturb least. On a CPU the packed products of a scheme and its dequantised ones run
as contenders of their own, too, at rows between: what the schemes' `PACKED_ROWS` and the kernel's `KERNEL_ROWS` are
chosen by.
"""

import argparse
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from record import arguments, record
from torch import nn
from turns import in_turn

from puna.devices import device_name, pick_device
from puna.model.llama import Linear
from puna.model.packed import PackedLinear
from puna.quantized import schemes
from puna.quantized.schemes import int4, int8

#: (out, in) of q, k, v, o, gate, up and down.
SHAPES = [(2048, 2048), (256, 2048), (256, 2048), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632)]
ROWS = (1, 2, 4, 8, 16, 64, 512)
ROWS_OF_PATHS = (16, 32, 64, 128, 192, 256)
GROUP_SIZE = 64


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--schemes", nargs="+", choices=schemes.names(), default=["int8", "int4"])
    parser.add_argument("--device", default=None)
    args = arguments(parser)
    device = pick_device(args.device)
    layers = {name: _layers(name, args.layers, device) for name in ("bf16", *args.schemes)}
    contenders: dict[str, Any] = {name: partial(_products, some) for name, some in layers.items()}
    rows = [row for n_rows in ROWS for row in _measured(contenders, n_rows, args.rounds, device)]
    if device.type == "cpu":
        paths = {
            f"{name}, {path}": partial(_by_path, layers[name], threshold, most)
            for name in args.schemes
            if (threshold := _threshold(name, layers[name][0]))
            for path, most in (("packed", max(ROWS_OF_PATHS)), ("dequantised", 0))
        }
        rows += [row for n_rows in ROWS_OF_PATHS for row in _measured(paths, n_rows, args.rounds, device)]
    sizes = {name: sum(map(_bytes, some)) / args.layers for name, some in layers.items()}
    for row in rows:
        row["median_seconds_per_layer"] = median(row["seconds"]) / args.layers
        row["least_seconds_per_layer"] = min(row["seconds"]) / args.layers
        size = sizes[row["contender"].partition(",")[0]]
        row["weights_gb_per_second"] = size / row["least_seconds_per_layer"] / 1e9
    facts = {"device": device_name(device), "threads": torch.get_num_threads(), "group_size": GROUP_SIZE}
    record("quantised_products", rows, facts | {"layers": args.layers})


def _layers(name: str, count: int, device: torch.device) -> list[nn.Module]:
    return [_layer(name, out_features, in_features, device) for out_features, in_features in SHAPES * count]


def _layer(name: str, out_features: int, in_features: int, device: torch.device) -> nn.Module:
    weight = torch.randn(out_features, in_features)
    if name == "bf16":
        linear = Linear(in_features, out_features, bias=False)
        linear.weight = nn.Parameter(weight.bfloat16())
        return PackedLinear(linear) if device.type == "cpu" else linear.to(device)
    scheme = schemes.find(name)
    size = GROUP_SIZE if scheme.GROUP_SIZES else None
    layer = scheme(in_features, out_features, False, size)
    for part, values in scheme.quantize(weight, size).items():
        setattr(layer, part, values)
    layer.to(device).pack(torch.bfloat16)
    return layer


def _measured(contenders: dict[str, Any], n_rows: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    inputs = {width: torch.randn(n_rows, width, dtype=torch.bfloat16, device=device) for _, width in SHAPES}
    turns = {name: partial(multiply, inputs) for name, multiply in contenders.items()}
    taken = in_turn(turns, rounds, device=device)
    return [{"contender": name, "rows": n_rows, "seconds": each.seconds} for name, each in taken.items()]


@torch.inference_mode()
def _products(layers: list[nn.Module], inputs: dict[int, torch.Tensor], _: int) -> None:
    for layer in layers:
        layer(inputs[layer.in_features])


def _threshold(name: str, layer: nn.Module) -> str | None:
    """Where a scheme chooses between two products on this CPU; None: there is one alone."""
    if not isinstance(layer, (int4.Linear, int8.Linear)):
        return None
    if layer.is_in_blocks:
        return "puna.quantized.kernel.KERNEL_ROWS"
    is_by_digits = isinstance(layer, int8.Linear) and layer._is_packed
    return None if is_by_digits else f"puna.quantized.schemes.{name}.PACKED_ROWS"


def _by_path(layers: list[nn.Module], threshold: str, rows: int, *turn: Any) -> None:
    with patch(threshold, rows):
        _products(layers, *turn)


def _bytes(layer: nn.Module) -> int:
    if isinstance(layer, PackedLinear):
        return layer.weight.nbytes
    return sum(x.nbytes for x in (*layer.parameters(), *layer.buffers()))


if __name__ == "__main__":
    main()
