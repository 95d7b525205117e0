"""A training checkpoint becomes a folder in Hugging Face layout, tensor by tensor, without a device.

Only the weights are read, and checked at the same time: optimizer states stay on the disk. What is written is what the
run holds, to the last bit, unless another dtype is asked for; and it is the same whether one process saved the run or
many ranks did, in whatever layout. One process does it. Where ranks wrote whole rows of a tensor, the system copies
them from file to file; what was cut otherwise is put together first.
"""

from pathlib import Path

import torch

from puna.checkpoint.huggingface import fit, load_tokenizer_of, write_model
from puna.checkpoint.manifest import Damaged, checked_meanwhile, read_meta
from puna.checkpoint.runs import MODEL, checkpoints, newest_sound
from puna.checkpoint.tensors import counted, dtype_of, rounded
from puna.errors import PunaError
from puna.files import folder_aside
from puna.model.config import ModelConfig


def export(
    run_dir: Path | str, output: Path | str, *, step: int | None = None, dtype: torch.dtype | str | None = None
) -> Path:
    """Writes the weights of a run in Hugging Face layout.

    Args:
        run_dir: the run's folder; its `tokenizer/` goes along if there is one.
        output: the folder to make.
        step: of the checkpoint to take; None: the newest sound one.
        dtype: "fp32", "bf16", "fp16" or a torch dtype to round the weights to; None: as the run holds them.

    Returns:
        `output`.

    Raises:
        PunaError: the run has no such checkpoint, it is damaged, a weight is too large for fp16, or `output` exists.
    """
    run_dir, output, dtype = Path(run_dir), Path(output), dtype_of(dtype)
    if output.exists():
        raise PunaError(f"{output} exists already; choose another place or remove it first")

    def attempt(checkpoint: Path) -> None:
        with folder_aside(output) as aside, checked_meanwhile(checkpoint, MODEL):
            from puna.checkpoint.sharded import open_sharded  # loads torch.distributed.checkpoint, a second or two

            config = ModelConfig.from_json(read_meta(checkpoint)["model_config"], str(checkpoint))
            tensors = fit(config, open_sharded(checkpoint / MODEL, MODEL))
            with counted("exporting", rounded(tensors, dtype)) as tensors:
                write_model(aside, config, tensors, load_tokenizer_of(run_dir / "tokenizer"))

    steps = _steps(run_dir, step)
    if step is None:
        newest_sound(run_dir, lambda: checkpoints(run_dir), attempt)
        return output
    try:
        attempt(steps[step])
    except Damaged as damaged:
        raise PunaError(f"{damaged}; export another step") from None
    return output


def _steps(run_dir: Path, step: int | None) -> dict[int, Path]:
    """The run's checkpoints, the one asked for among them."""
    if not run_dir.is_dir():
        raise PunaError(f"there is no run folder {run_dir}")
    paths = checkpoints(run_dir)
    if not paths:
        raise PunaError(f"{run_dir} has no checkpoints; name a folder that `puna train` made")
    if step is not None and step not in paths:
        raise PunaError(f"{run_dir} has no checkpoint of step {step}; there are {', '.join(map(str, paths))}")
    return paths
