"""MindFormers' names of Llama's parameters, and ours; what in its files is no parameter; weights laid together.

Names are a table. Two weights may be others laid together (`qkv_concat`), and are taken apart by rows:

    attention.w_qkv             for each key/value head: its query heads, the key head, the value head
    feed_forward.w_gate_hidden  gate row 0, up row 0, gate row 1, up row 1, …

Source: MindFormers v1.5.0 `mindformers/models/llama/convert_weight.py`, `llama_transformer.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.checkpoint.formats import pattern_of
from puna.checkpoint.tensors import StoredTensor
from puna.errors import PunaError
from puna.model.config import ModelConfig

#: MindFormers' name -> Hugging Face's.
NAMES = {
    "model.tok_embeddings.embedding_weight": "model.embed_tokens.weight",
    "model.layers.*.attention.wq.weight": "model.layers.*.self_attn.q_proj.weight",
    "model.layers.*.attention.wk.weight": "model.layers.*.self_attn.k_proj.weight",
    "model.layers.*.attention.wv.weight": "model.layers.*.self_attn.v_proj.weight",
    "model.layers.*.attention.wo.weight": "model.layers.*.self_attn.o_proj.weight",
    "model.layers.*.feed_forward.w1.weight": "model.layers.*.mlp.gate_proj.weight",
    "model.layers.*.feed_forward.w3.weight": "model.layers.*.mlp.up_proj.weight",
    "model.layers.*.feed_forward.w2.weight": "model.layers.*.mlp.down_proj.weight",
    "model.layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
    "model.layers.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "model.norm_out.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}

QKV = "model.layers.*.attention.w_qkv.weight"
GATE_UP = "model.layers.*.feed_forward.w_gate_hidden.weight"

#: How names of optimizer state begin, and the names of other numbers that a training run keeps.
OPTIMIZER_STATE = ("adam_m.", "adam_v.")
RUN_STATE = (
    "global_step", "scale_sense", "current_iterator_step", "last_overflow_iterator_step", "epoch_num", "step_num",
    "loss_scale", "global_batch_size", "learning_rate",
)  # fmt: skip

#: What the names of adapters' parameters hold.
_ADAPTER = re.compile(r"\.(mindpet|tk)_delta_lora_")


@dataclass(frozen=True)
class Sorted:
    """The content of a checkpoint.

    Attributes:
        weights: by MindFormers' names.
        optimizer_state: how many tensors of it were left out.
        run_state: names of numbers and texts that were left out.
    """

    weights: dict[str, StoredTensor]
    optimizer_state: int
    run_state: list[str]

    @property
    def left_out(self) -> str:
        """What was left out, for a message; empty if nothing was."""
        words = [f"{self.optimizer_state} tensors of optimizer state"] if self.optimizer_state else []
        return ", ".join(words + self.run_state)


def sort_out(content: Mapping[str, StoredTensor | str], where: str) -> Sorted:
    """Tells weights from what training keeps beside them.

    Raises:
        PunaError: Llama has no parameter of a name; the message names it.
    """
    weights: dict[str, StoredTensor] = {}
    optimizer_state, run_state = 0, []
    for name, value in content.items():
        if name.startswith(OPTIMIZER_STATE):
            optimizer_state += 1
        elif name in RUN_STATE or isinstance(value, str):
            run_state.append(name)
        elif _ADAPTER.search(name):
            raise PunaError(f"{where} holds {name}, of a LoRA adapter; merge it with MindFormers first")
        elif pattern_of(name)[1] not in {*NAMES, QKV, GATE_UP}:
            raise PunaError(f"{where} holds {name}, which MindFormers' Llama does not have")
        else:
            weights[name] = value
    return Sorted(weights, optimizer_state, run_state)


def to_hugging_face(weights: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """The weights by Hugging Face's names, those that lie together taken apart."""
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in weights.items():
        number, pattern = pattern_of(name)
        for part_name, part in _parts(pattern, tensor, config).items():
            full_name = NAMES[part_name].replace("*", number)
            if full_name in renamed:
                raise PunaError(f"{tensor.where} holds {name} and also a part of it by itself")
            renamed[full_name] = part
    return renamed


def to_mindformers(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors by Hugging Face's names, in MindFormers' order, by its names."""
    names = {ours: theirs for theirs, ours in NAMES.items()}
    renamed = {}
    for name, tensor in tensors.items():
        number, pattern = pattern_of(name)
        renamed[names[pattern].replace("*", number)] = tensor
    order = list(NAMES)

    def place(name: str) -> tuple[int, int, int]:
        number, pattern = pattern_of(name)
        part = 1 if number else 2 if order.index(pattern) else 0
        return part, int(number or 0), order.index(pattern)

    return {name: renamed[name] for name in sorted(renamed, key=place)}


def _parts(pattern: str, tensor: StoredTensor, config: ModelConfig) -> dict[str, StoredTensor]:
    if pattern == QKV:
        heads, width = config.num_attention_heads // config.num_key_value_heads, config.head_dim
        group = torch.arange(tensor.shape[0]).view(-1, heads + 2, width)  # (K, N/K + 2, H)
        rows = {"wq": group[:, :heads], "wk": group[:, heads], "wv": group[:, heads + 1]}
        return {f"model.layers.*.attention.{name}.weight": _of_rows(tensor, x.flatten()) for name, x in rows.items()}
    if pattern == GATE_UP:
        every = torch.arange(tensor.shape[0])
        parts = {"w1": every[0::2], "w3": every[1::2]}
        return {f"model.layers.*.feed_forward.{name}.weight": _of_rows(tensor, x) for name, x in parts.items()}
    return {pattern: tensor}


def _of_rows(tensor: StoredTensor, numbers: Tensor) -> StoredTensor:
    """The rows with these numbers, which are in ascending order."""

    def rows(start: int, stop: int) -> Tensor:
        wanted = numbers[start:stop]
        first, last = int(wanted[0]), int(wanted[-1]) + 1
        return tensor.rows(first, last)[wanted - first]

    return StoredTensor.by_rows((len(numbers), *tensor.shape[1:]), tensor.dtype, tensor.where, rows)
