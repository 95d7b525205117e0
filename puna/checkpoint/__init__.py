"""Weights on disk: the Hugging Face layout, training checkpoints, and the ways between formats.

`huggingface` reads and writes the only layout in which weights leave puna, `runs` keeps a training run's checkpoints,
`export` turns the latter into the former, `convert` does so for other systems' files (`formats/`, one file each), and
`quantize` makes a folder's weights smaller.
"""

from puna.checkpoint.convert import convert
from puna.checkpoint.export import export
from puna.checkpoint.hub import is_hub_id, resolve
from puna.checkpoint.huggingface import load, load_config, save_model
from puna.checkpoint.quantize import quantize
from puna.checkpoint.runs import Checkpoints

__all__ = [
    "Checkpoints",
    "convert",
    "export",
    "is_hub_id",
    "load",
    "load_config",
    "quantize",
    "resolve",
    "save_model",
]
