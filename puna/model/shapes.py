"""The weights of a model as shapes by name, without torch: what layouts and plans are checked and counted by."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puna.model.config import ModelConfig

Shape = tuple[int, ...]


def weight_shapes(config: "ModelConfig") -> dict[str, dict[str, Shape]]:
    """Kind of part -> name of a weight -> its whole shape; layers are all alike, and named as the first."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q, d, config.attention_bias),
        "self_attn.k_proj": (kv, d, config.attention_bias),
        "self_attn.v_proj": (kv, d, config.attention_bias),
        "self_attn.o_proj": (d, q, config.attention_output_bias),
        "mlp.gate_proj": (f, d, config.mlp_bias),
        "mlp.up_proj": (f, d, config.mlp_bias),
        "mlp.down_proj": (d, f, config.mlp_bias),
    }
    layer: dict[str, Shape] = {}
    for name, (rows, columns, has_bias) in linears.items():
        layer[f"model.layers.0.{name}.weight"] = (rows, columns)
        if has_bias:
            layer[f"model.layers.0.{name}.bias"] = (rows,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        layer[f"model.layers.0.{name}.weight"] = (d,)
    head = {} if config.tie_word_embeddings else {"lm_head.weight": (v, d)}
    return {
        "layer": layer,
        "embedding": {"model.embed_tokens.weight": (v, d)},
        "norm": {"model.norm.weight": (d,)},
        "head": dict(head),
    }
