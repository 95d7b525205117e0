"""Dialog fine-tuning: target tokens a second with whole dialogs packed into rows, against one padded dialog a row.

    python benchmarks/packing.py --data code_alpaca_2k.json --tokenizer tokenizer.model [--length 4096] [--steps 4]

The padded side is what the replaced system does: every dialog in a row of its own, filled up with padding to the row's
length. Both sides take the same optimizer steps with puna's own model (8 layers x 512) and loss, which multiplies only
targets with the head: the padded side is spared the logits of its padding. In turn, in one process.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import arguments, record
from turns import in_turn

from puna import devices
from puna.config import Optimizer
from puna.data.loader import Batch, Loader, stack
from puna.data.prepare import prepare
from puna.data.rows import IGNORE, PADDING, Row, WholeDocumentRows
from puna.data.shards import Dataset
from puna.model.config import preset
from puna.model.llama import Llama, init_weights
from puna.parallel.model import DistributedModel
from puna.train.gradients import Gradients
from puna.train.optimizer import AdamW
from puna.train.step import train_step


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Alpaca's JSON, e.g. Code Alpaca's")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=4)
    args = arguments(parser)
    device = devices.pick_device()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "chat"
        prepare("chat", [args.data], output, tokenizer=args.tokenizer, template="vicuna")
        dataset = Dataset.open(output)
        rows = WholeDocumentRows(dataset, args.length)
        loader = Loader([(rows, 1.0)], batch_rows=1, seed=0)
        sides = {
            "packed": [loader.batch(step) for step in range(args.steps)],
            "padded": [stack([_padded(dataset, number, args.length)]) for number in range(args.steps)],
        }
        model = Llama(preset("tiny-512")).to(device)
        init_weights(model, seed=0)
        model.compute_dtype = torch.bfloat16 if devices.has_fast_bf16(device) else None
        alone = DistributedModel.alone(model)
        gradients = Gradients(AdamW(alone.weights.items(), Optimizer(), seed=0))

        def turn(batches: list[Batch]) -> Callable[[int], Any]:
            return lambda update: train_step(
                alone, gradients, batches[update - 1], update=update, lr=1e-5, micro_batch_rows=1, max_grad_norm=1.0
            )

        turns = {side: turn(batches) for side, batches in sides.items()}
        seconds = {side: taken.median for side, taken in in_turn(turns, args.steps, warm_ups=0).items()}
        # The padded side's share of targets is that of the whole set, not of the few dialogs that were timed.
        targets = {
            "packed": dataset.info["targets"] / len(rows),
            "padded": dataset.info["targets"] / len(dataset),
        }
        results = [
            {
                "contender": side,
                "targets_per_row": targets[side],
                "seconds_per_row": seconds[side],
                "targets_per_second": targets[side] / seconds[side],
                "targets_timed": int(sum((batch.targets != IGNORE).sum() for batch in sides[side])),
            }
            for side in sides
        ]
        ratio = results[0]["targets_per_second"] / results[1]["targets_per_second"]  # type: ignore[operator]
        record("packing", results, {"ratio": ratio, "goal": 8.0, "dialogs": len(dataset), "rows": len(rows)})


def _padded(dataset: Dataset, number: int, length: int) -> Row:
    """One dialog in a row of its own, its padding in the same document, as without document masks."""
    start, stop = int(dataset.starts[number]), int(dataset.starts[number + 1])
    stop = min(stop, start + length)
    tokens = np.full(length, PADDING, dtype=np.int32)
    tokens[: stop - start] = dataset.tokens(start, stop)
    targets = np.full(length, IGNORE, dtype=np.int32)
    is_target = dataset.is_target(start, stop)
    assert is_target is not None
    targets[: stop - start - 1][is_target[1:]] = tokens[1 : stop - start][is_target[1:]]
    return Row(tokens, targets, np.zeros(length, np.int32), np.arange(length, dtype=np.int32))


if __name__ == "__main__":
    main()
