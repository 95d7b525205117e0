"""What `real_mindspore.py` asks of MindSpore; it runs in MindSpore's own environment, which has no puna.

    python in_mindspore.py TASK '{"argument": …}'    ->    one line of JSON, the last on stdout

Each function below is a task.
"""

import glob
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

began = time.monotonic()
import mindspore  # noqa: E402
import mindspore.dataset  # noqa: E402

IMPORT_SECONDS = time.monotonic() - began


def reads_checkpoint(path: str, weights: str, again: str) -> dict[str, bool]:
    """Whether a `.ckpt` holds these weights, and whether MindSpore saves it again with the same bytes."""
    content, expected = mindspore.load_checkpoint(path), np.load(weights)
    mindspore.save_checkpoint([{"name": name, "data": value} for name, value in content.items()], again)
    with open(path, "rb") as ours, open(again, "rb") as theirs:
        return {"same_values": same(content, expected), "same_bytes_when_saved_again": ours.read() == theirs.read()}


def merges_slices(folder: str, weights: str) -> dict[str, bool]:
    """Whether MindSpore's own tool makes these weights of slices and their strategy files."""
    strategy = f"{folder}/strategy/ckpt_strategy_rank_0.ckpt"
    if "pp=" in folder:
        strategy = f"{folder}/merged.ckpt"
        mindspore.merge_pipeline_strategys(f"{folder}/strategy", strategy)
    mindspore.transform_checkpoints(folder, f"{folder}/whole", "whole", src_strategy_file=strategy)
    (whole,) = glob.glob(f"{folder}/whole/rank_0/*.ckpt")
    return {"same_values": same(mindspore.load_checkpoint(whole), np.load(weights))}


def reads_rows(path: str, rows: str) -> dict[str, Any]:
    """Whether a MindRecord file gives these rows in order, and all of them shuffled; and how long it takes."""
    began, expected = time.monotonic(), np.load(rows)
    found = list(dataset(path, shuffle=False))
    seconds = time.monotonic() - began
    equal = all(np.array_equal(np.stack([row[name] for row in found]), expected[name]) for name in expected.files)
    count = sum(1 for _ in dataset(path, shuffle=True))
    return {"same_values": equal and count == len(found), "rows": count, "seconds": seconds}


def reads_all(path: str) -> dict[str, Any]:
    """How long it takes to read all rows of a MindRecord file."""
    began, processor_began = time.monotonic(), time.process_time()
    tokens = sum(len(row["input_ids"]) for row in dataset(path, shuffle=False))
    processor_seconds = time.process_time() - processor_began
    return {"tokens": tokens, "seconds": time.monotonic() - began, "processor_seconds": processor_seconds}


def converts(path: str, output: str) -> dict[str, float]:
    """How long it takes to make safetensors of a `.ckpt`."""
    began, processor_began = time.monotonic(), time.process_time()
    content = mindspore.load_checkpoint(path)
    parameters = [{"name": name, "data": value} for name, value in content.items()]
    mindspore.save_checkpoint(parameters, output, format="safetensors")
    return {"seconds": time.monotonic() - began, "processor_seconds": time.process_time() - processor_began}


def dataset(path: str, *, shuffle: bool) -> Any:
    """The rows of a MindRecord file, as NumPy arrays."""
    rows = mindspore.dataset.MindDataset(path, shuffle=shuffle)
    return rows.create_dict_iterator(output_numpy=True, num_epochs=1)


def same(content: Any, expected: Any) -> bool:
    """Whether a checkpoint holds exactly these arrays, which are of single precision."""
    single = {name: value.astype(mindspore.float32).asnumpy() for name, value in content.items()}
    return set(single) == set(expected.files) and all(np.array_equal(single[name], expected[name]) for name in single)


TASKS = {task.__name__: task for task in (reads_checkpoint, merges_slices, reads_rows, reads_all, converts)}

if __name__ == "__main__":
    result = TASKS[sys.argv[1]](**json.loads(sys.argv[2]))
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3
    version = {"mindspore": mindspore.__version__, "import_seconds": IMPORT_SECONDS, "peak_memory_mb": round(peak)}
    print(json.dumps({**result, **version}), flush=True)
    os._exit(0)  # MindSpore's threads take their time to end
