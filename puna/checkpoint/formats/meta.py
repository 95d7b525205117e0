"""Meta's own files, up to Llama 2: `params.json` and `consolidated.NN.pth`, one a rank of its model parallelism.

Three things differ from the Hugging Face layout. Names. Rotary pairs: Meta turns channels (2i, 2i + 1), Hugging Face
channels (i, i + H/2), so the rows of q and k are put in another order within each head. And every rank holds a slice:

    consolidated.00.pth  layers.0.attention.wq.weight (D/2, D)  ┐ dim 0, rows
    consolidated.01.pth  layers.0.attention.wq.weight (D/2, D)  ┴ reordered ─▶ model.layers.0.self_attn.q_proj.weight

Source: facebookresearch/codellama `llama/model.py` (layers and their slices); transformers
`convert_llama_weights_to_hf.py` (order of rows).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.checkpoint.formats import check_plain_llama, one_of_copies, pattern_of
from puna.checkpoint.tensors import StoredTensor, open_pickled, write_pickled
from puna.errors import PunaError
from puna.files import folder_aside, read_json, write_json
from puna.model.config import ModelConfig
from puna.model.split import SPLIT_DIM
from puna.tokenizer import Tokenizer, load_tokenizer

#: Meta's name -> Hugging Face's.
NAMES: dict[str, str] = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.*.attention.wq.weight": "model.layers.*.self_attn.q_proj.weight",
    "layers.*.attention.wk.weight": "model.layers.*.self_attn.k_proj.weight",
    "layers.*.attention.wv.weight": "model.layers.*.self_attn.v_proj.weight",
    "layers.*.attention.wo.weight": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.feed_forward.w1.weight": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.feed_forward.w2.weight": "model.layers.*.mlp.down_proj.weight",
    "layers.*.feed_forward.w3.weight": "model.layers.*.mlp.up_proj.weight",
    "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
    "layers.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

#: Meta's model parallelism splits weights along the dims of `puna.model.split`, and the embedding along this one.
EMBEDDING_DIM = 1  # of (V, D)

#: Llama 3 has another vocabulary, in another format, and cuts the embedding otherwise; it is known by either of these.
OF_LLAMA_3 = {"vocab_size": 128_256, "use_scaled_rope": True}

#: Tensors that are left out: tables that are computed anew.
SKIPPED = ("rope.freqs",)

#: The tokenizer's file; beside the weights, or one folder above them where several sizes share it.
VOCABULARY = "tokenizer.model"

#: Fields of `params.json`; the last ones only say how Meta's code finds the feed-forward width or sizes its caches.
KNOWN_FIELDS = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta"} | {
    "multiple_of",
    "ffn_dim_multiplier",
    "max_seq_len",
    "max_batch_size",
}

#: Rope theta -> context length of the family that has it; `params.json` does not say the length.
CONTEXT_LENGTHS = {1e4: 4096, 1e6: 16384}


def recognises(folder: Path) -> bool:
    """Whether the folder has Meta's two kinds of files."""
    return (folder / "params.json").exists() and any(folder.glob("consolidated.*.pth"))


def read(folder: Path, rope_theta: float | None) -> tuple[ModelConfig, dict[str, StoredTensor], Tokenizer | None]:
    """Shape, unread tensors under Hugging Face names, and the tokenizer beside the weights or one folder above.

    Args:
        folder: Meta's.
        rope_theta: for a `params.json` that has none.

    Raises:
        PunaError: a rank's file is missing, or a field, tensor or shape is not what Meta's code makes.
    """
    ranks = [open_pickled(file) for file in _rank_files(folder)]
    params = _params(folder / "params.json", rope_theta)
    tensors = {}
    for name in ranks[0]:
        if name not in SKIPPED:
            hf_name, dim = _translated(name, folder)
            tensors[hf_name] = _merged(name, [_slice_of(name, rank, folder) for rank in ranks], dim)
    for rank in ranks[1:]:
        for name in rank:
            if name not in ranks[0]:
                raise PunaError(f"{rank[name].where} holds {name}, which the first rank's file lacks")
    vocabularies = [place / VOCABULARY for place in (folder, folder.parent) if (place / VOCABULARY).exists()]
    tokenizer = load_tokenizer(vocabularies[0]) if vocabularies else None
    config = _config(params, tensors, folder / "params.json", tokenizer)
    return config, {name: _reordered(name, tensor, config, to_halves) for name, tensor in tensors.items()}, tokenizer


def write(folder: Path, config: ModelConfig, tensors: dict[str, StoredTensor], tokenizer: Tokenizer | None) -> None:
    """Writes one `consolidated.00.pth` with `params.json`, readable by Meta's code.

    Raises:
        PunaError: the model has what Meta's format cannot say (biases, scaled positions, free head widths).
    """
    check_plain_llama(config, "Meta's format", {"rope_scaling": config.rope_scaling is not None})
    names = {hf: meta for meta, hf in NAMES.items()}
    if config.tie_word_embeddings:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    renamed = {}
    for name, tensor in tensors.items():
        number, pattern = pattern_of(name)
        renamed[names[pattern].replace("*", number)] = _reordered(name, tensor, config, to_pairs)
    with folder_aside(folder) as aside:
        write_json(aside / "params.json", _params_of(config))
        write_pickled(aside / "consolidated.00.pth", renamed)
        if tokenizer is not None:
            tokenizer.save(aside)


def to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k for pairs (2i, 2i + 1), put in the order for pairs (i, i + H/2).

    Args:
        weight: (heads * H, D).
        head_dim: H.
    """
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)


def to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_halves`."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def _rank_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("consolidated.*.pth"))
    for number, file in enumerate(files):
        if file.name != f"consolidated.{number:02d}.pth":
            raise PunaError(
                f"{folder}/consolidated.{number:02d}.pth is missing, but {file.name} is there; fetch all of them"
            )
    return files


def _params(path: Path, rope_theta: float | None) -> dict[str, Any]:
    params = read_json(path)
    if missing := [name for name in ("dim", "n_layers", "n_heads", "norm_eps") if name not in params]:
        raise PunaError(f"{path} lacks {', '.join(missing)}")
    if any(params.get(name) == value for name, value in OF_LLAMA_3.items()):
        raise PunaError(
            f"{path} is of Llama 3, which puna does not read in Meta's files; convert the Hugging Face version"
        )
    if unknown := [name for name in params if name not in KNOWN_FIELDS]:
        raise PunaError(f"{path} has the field {unknown[0]!r}, which puna does not know")
    stated = params.setdefault("rope_theta", rope_theta)
    if stated is None:
        raise PunaError(
            f"{path} has no rope_theta; state the one the model was trained with, "
            "e.g. --rope-theta 10000 (Llama 2, 70B-Instruct) or 1000000 (Code Llama)"
        )
    if rope_theta not in (None, stated):
        raise PunaError(f"{path} states rope_theta {stated:g}, not {rope_theta:g}; leave out --rope-theta")
    return params


def _translated(name: str, folder: Path) -> tuple[str, int | None]:
    number, pattern = pattern_of(name)
    if pattern not in NAMES:
        raise PunaError(f"{folder} holds {name}, which Meta's Llama does not have")
    dim = EMBEDDING_DIM if pattern == "tok_embeddings.weight" else SPLIT_DIM[NAMES[pattern]]
    return NAMES[pattern].replace("*", number), dim


def _slice_of(name: str, rank: dict[str, StoredTensor], folder: Path) -> StoredTensor:
    if name not in rank:
        file = next(iter(rank.values())).where if rank else folder
        raise PunaError(f"{file} lacks {name}, which the first rank's file holds")
    return rank[name]


def _merged(name: str, slices: list[StoredTensor], dim: int | None) -> StoredTensor:
    first = slices[0]
    if dim is None:
        return one_of_copies(name, slices)
    if len(slices) == 1:
        return first
    shape = list(first.shape)
    shape[dim] = sum(piece.shape[dim] for piece in slices)
    return StoredTensor(tuple(shape), first.dtype, first.where, lambda: torch.cat([p.read() for p in slices], dim))


def _config(
    params: dict[str, Any], tensors: dict[str, StoredTensor], path: Path, tokenizer: Tokenizer | None
) -> ModelConfig:
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"):
        if name not in tensors:
            raise PunaError(f"{path.parent} lacks the tensor that becomes {name}")
    vocab_size = tensors["model.embed_tokens.weight"].shape[0]
    if params.get("vocab_size", -1) not in (-1, vocab_size):
        raise PunaError(f"{path} states vocab_size {params['vocab_size']}, but the embedding has {vocab_size} rows")
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=params["dim"],
        intermediate_size=tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
        rope_theta=float(params["rope_theta"]),
        max_position_embeddings=CONTEXT_LENGTHS.get(params["rope_theta"], 4096),
        rms_norm_eps=params["norm_eps"],
        bos_token_id=tokenizer.bos_id if tokenizer else 1,
        eos_token_id=tokenizer.eos_id if tokenizer else 2,
    )


def _reordered(
    name: str, tensor: StoredTensor, config: ModelConfig, reorder: Callable[[Tensor, int], Tensor]
) -> StoredTensor:
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    return StoredTensor(tensor.shape, tensor.dtype, tensor.where, lambda: reorder(tensor.read(), config.head_dim))


def _params_of(config: ModelConfig) -> dict[str, Any]:
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        **_feed_forward_fields(config.hidden_size, config.intermediate_size),
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
    }


def _feed_forward_fields(dim: int, width: int) -> dict[str, Any]:
    """`multiple_of` and `ffn_dim_multiplier` from which Meta's code computes the feed-forward width."""
    plain = int(8 * dim / 3)
    if -(-plain // 256) * 256 == width:
        return {"multiple_of": 256}
    multiple = next(m for m in (4096, 1024, 256, 64, 16, 4, 1) if width % m == 0)
    # Meta's code truncates multiplier * plain, then rounds up to a multiple: aim between the two.
    return {
        "multiple_of": multiple,
        "ffn_dim_multiplier": (width + 0.5) / plain if multiple == 1 else (width - 0.5) / plain,
    }
