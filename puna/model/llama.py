"""The network: Llama as Code Llama has it, readable in one sitting.

    tokens (B, T) -> embed_tokens -> N x [norm, attention, norm, gated MLP] -> norm -> lm_head -> logits (B, T, V)

It knows no device, file, mesh or hidden cache. Modules bear Hugging Face's names, so a checkpoint needs no map, and
heads are found with -1, so a layer does not know whether it holds all of them. Weights are cast to the activations'
dtype where they are used: fp32 master weights compute in bf16 by setting `compute_dtype`, and gradients arrive in fp32.
"""

import hashlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model.attention import Documents, attend
from puna.model.cache import Cache, LayerCache
from puna.model.config import ModelConfig


class Llama(nn.Module):
    """A causal language model; parameters are uninitialised until loaded or drawn by `init_weights`.

    Attributes:
        compute_dtype: dtype of the activations; None: that of the weights.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits of the token that follows each token.

        Args:
            tokens: (B, T) ids.
            positions: (B, T) position of each token in its document; None: 0 to T-1 in every row.
            documents: the documents in the rows, which never see each other; None: each row is one.
            cache: keys and values of earlier tokens, extended in place; excludes `documents`.

        Returns:
            (B, T, V) in the compute dtype.
        """
        return self.lm_head(self.hidden(tokens, positions=positions, documents=documents, cache=cache))

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        cache: Cache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """What the head multiplies, normed.

        Args:
            tokens, positions, documents, cache: as for `forward`.
            wanted: (W,) places in every row of the tokens that are asked for; the others are spared the last layer's
                MLP. None: all.

        Returns:
            (B, T, D), or (B, W, D).
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        if cache is not None:
            if documents is not None:
                raise ValueError("a cache holds one document a row; documents cannot be given with it")
            cache.make_room(positions)
        return self.model(tokens, positions, documents, cache, self.compute_dtype, wanted)


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.rotary_tables = config, rotary_tables
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        documents: Documents | None,
        cache: Cache | None,
        dtype: torch.dtype | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """(B, T) ids to (B, T, D), or (B, W, D) of wanted tokens."""
        x = self.embed_tokens(tokens)
        x = x if dtype is None else x.to(dtype)
        rotation = self.rotary_tables(positions, self.config)
        for index, layer in enumerate(self.layers):
            of_layer = None if cache is None else cache.layer(index)
            x = layer(x, rotation, positions, documents, of_layer, wanted if index == len(self.layers) - 1 else None)
        return self.norm(x)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.add = torch.add
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        documents: Documents | None,
        cache: LayerCache | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) to (B, T, D), or (B, W, D) of wanted tokens: the others give only keys and values."""
        x = self.add(x, self.self_attn(self.input_layernorm(x), rotation, positions, documents, cache))
        x = x if wanted is None else x[:, wanted]
        return self.add(x, self.mlp(self.post_attention_layernorm(x)))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attend, self.rotate = attend, rotate
        self.head_dim = config.head_dim
        width, kv_width = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = Linear(width, config.hidden_size, bias=config.attention_output_bias)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        documents: Documents | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rotate(q, *rotation), self.rotate(k, *rotation)
        out = self.attend(q, k, v, documents) if cache is None else cache.attend(q, k, v, positions)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = gated
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, then times the weight (the reference's order)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class Linear(nn.Linear):
    """A linear layer whose weights are cast to the input's dtype where they are used."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of `x`."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def reset_parameters(self) -> None:
        """Leaves the weights uninitialised: torch's own draw would load its compiler if they are on the meta device."""


class Embedding(nn.Embedding):
    """A table of token vectors."""

    def reset_parameters(self) -> None:
        """Leaves the weights uninitialised, as in `Linear`."""


def rotary_tables(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines that rotate channel pairs (i, i + H/2) by position times frequency.

    Angles are formed in fp64, so the tables are right to fp32's last digit at any position (a product in fp32 would be
    wrong by 0.006 radians at position 100,000).

    Args:
        positions: (B, T) integers.
        config: gives H, theta and the scaling.

    Returns:
        Two (B, T, 1, H) float32 tensors.

    Source: RoFormer (arXiv:2104.09864), eq. 15; theta from Code Llama (arXiv:2308.12950), section 2.4.
    """
    frequencies = rotary_frequencies(config, positions.device)
    angles = positions.double()[..., None, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotary_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position of each channel pair, (H/2,) float64, with the config's scaling applied.

    They are formed on the device that asks, so that a CUDA graph can hold it.

    Source: for `llama3`, the function that Meta published with Llama 3.1 (long wavelengths are stretched by `factor`,
    short ones kept, those between blended).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling: dict[str, Any] = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / scaling["factor"])
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the channel pairs (i, i + H/2) of every head by the angles of its position, in fp32.

    Args:
        x: (B, T, N, H).
        cos, sin: (B, T, 1, H) from `rotary_tables`.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, number by number."""
    return F.silu(gate) * up


def compile_layers(model: Llama) -> None:
    """Compiles each layer when it is first used; attention stays out, for it loops over documents on the host.

    Training goes through `puna.model.recompute.prepare_layers`.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = torch.compiler.disable(module.attend)
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward)


def init_weights(model: Llama, *, seed: int) -> None:
    """Draws every weight of a model, as `initial_weight` does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, tuple(parameter.shape), model.config, seed=seed))


def initial_weight(name: str, shape: tuple[int, ...], config: ModelConfig, *, seed: int) -> Tensor:
    """Where a weight begins, in fp32: drawn from N(0, initializer_range) by its name, so no order or split matters.

    Norms are ones and biases zeros.
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0, config.initializer_range, generator=generator)
