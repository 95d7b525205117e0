"""How tensor parallelism cuts each weight: one table, read by training, generation, planning and checkpoints alike.

Names are Hugging Face's; `*` stands for a layer's number. A matrix that is cut along its outputs (dim 0) feeds one that
is cut along its inputs (dim 1), so that nothing is exchanged between the two.
"""

import math
import re

from puna.model.config import ModelConfig

#: Weight -> the dim that tensor parallelism cuts; None: every rank keeps a copy.
SPLIT_DIM: dict[str, int | None] = {
    "model.embed_tokens.weight": 0,  # (V, D)
    "model.layers.*.self_attn.q_proj.weight": 0,  # (N * H, D)
    "model.layers.*.self_attn.k_proj.weight": 0,  # (K * H, D)
    "model.layers.*.self_attn.v_proj.weight": 0,  # (K * H, D)
    "model.layers.*.self_attn.o_proj.weight": 1,  # (D, N * H)
    "model.layers.*.mlp.gate_proj.weight": 0,  # (F, D)
    "model.layers.*.mlp.up_proj.weight": 0,  # (F, D)
    "model.layers.*.mlp.down_proj.weight": 1,  # (D, F)
    "model.layers.*.input_layernorm.weight": None,  # (D,)
    "model.layers.*.post_attention_layernorm.weight": None,  # (D,)
    "model.norm.weight": None,  # (D,)
    "lm_head.weight": 0,  # (V, D)
    "model.layers.*.self_attn.q_proj.bias": 0,  # (N * H,)
    "model.layers.*.self_attn.k_proj.bias": 0,  # (K * H,)
    "model.layers.*.self_attn.v_proj.bias": 0,  # (K * H,)
    "model.layers.*.self_attn.o_proj.bias": None,  # (D,)
    "model.layers.*.mlp.gate_proj.bias": 0,  # (F,)
    "model.layers.*.mlp.up_proj.bias": 0,  # (F,)
    "model.layers.*.mlp.down_proj.bias": None,  # (D,)
}


def split_dim(name: str) -> int | None:
    """The dim along which tensor parallelism cuts a weight; None: it does not.

    Raises:
        KeyError: the weight has no row in SPLIT_DIM.
    """
    return SPLIT_DIM[re.sub(r"\.\d+\.", ".*.", name)]


def split_misfit(config: ModelConfig, tp: int, setting: str) -> str | None:
    """Why `tp` ranks cannot share every matrix of a model, and how many can; None: they can.

    Args:
        config: of the model.
        tp: how many.
        setting: what the number is called where it was given.
    """
    kv_heads = config.num_key_value_heads
    fits = divisors(math.gcd(config.intermediate_size, config.vocab_size, kv_heads))
    if kv_heads % tp:
        return f"{setting}={tp} must divide the {kv_heads} key/value heads; use one of {fits}"
    if config.intermediate_size % tp or config.vocab_size % tp:
        return (
            f"{setting}={tp} must divide intermediate_size={config.intermediate_size} and "
            f"vocab_size={config.vocab_size}; use one of {fits}"
        )
    return None


def divisors(number: int) -> list[int]:
    """The whole numbers that divide `number`, smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]
