"""What a training token costs, and the share of the device's peak that a run reaches (MFU).

Two conventions are in use and differ by up to a fifth, so both are here and results name theirs:

- full: 6 * N_mm + 12 * L * D * T - the whole T x T square of scores (torchtitan, Megatron-LM, llm-foundry);
- causal: 6 * N_mm + 6 * L * D * T - the half that a causal model needs.

N_mm are the weights that multiply every token: the head is one of them, the embedding table is not. D is N * H. For
packed documents T is the mean length that a token attends within, sum(l^2) / sum(l). Recomputation is never counted.
"""

from collections.abc import Iterable

from puna.model.config import ModelConfig


def flops_per_token(config: ModelConfig, attended: float, *, convention: str = "full") -> float:
    """Floating-point operations of one token, forward and backward.

    Args:
        config: shape of the model.
        attended: T, from `attended_length`.
        convention: "full" or "causal".
    """
    per_pair = {"full": 12, "causal": 6}[convention]
    width = config.num_attention_heads * config.head_dim
    return 6 * config.matmul_parameter_count + per_pair * config.num_hidden_layers * width * attended


def attended_length(lengths: Iterable[int]) -> float:
    """The document length that the mean token finds itself in: sum(l^2) / sum(l)."""
    lengths = list(lengths)
    return sum(n * n for n in lengths) / sum(lengths)
