"""The Hugging Face layout: a folder of `config.json`, safetensors and a tokenizer, read strictly and written whole.

    folder/config.json                         the network's shape, always believed
    folder/model.safetensors                   or model-00001-of-00003.safetensors … and model.safetensors.index.json
    folder/generation_config.json              ids that end a text besides that of config.json; the rest goes along
    folder/tokenizer.model | tokenizer.json

Loading builds the model without memory and fills it tensor by tensor from mapped files: it takes the memory of the
model and one tensor more. Every tensor of the model must be there and every tensor that is there must be of the model.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from puna.checkpoint.hub import resolve
from puna.checkpoint.room import check_room
from puna.checkpoint.tensors import StoredTensor, are_copies, check_range, dtype_name, dtype_of
from puna.checkpoint.tokenizer_json import write_tokenizer_json
from puna.checkpoint.weights import open_weights, some, write_weights
from puna.errors import PunaError, UsageError
from puna.files import folder_aside, read_json, write_json
from puna.model.config import ModelConfig, ends_of
from puna.model.llama import Llama
from puna.model.packed import PackedLinear, pack_layers
from puna.quantized import Quantization, QuantizedLinear, model_without_memory
from puna.tokenizer import Tokenizer, load_tokenizer
from puna.tokenizer.base import GENERATION_FILE

#: Ends of the names of tensors that old checkpoints hold and no network reads.
HARMLESS_EXTRAS = ("rotary_emb.inv_freq",)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Share(Protocol):
    """The part of a model that one rank loads; the others are on other ranks."""

    def index(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Which part of a stored tensor is read."""

    def join(self, model: Llama) -> None:
        """Connects the model, once its tensors are loaded, with the other parts."""


def load(
    folder: Path | str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    share: Callable[[ModelConfig], Share] | None = None,
    for_inference: bool = False,
    context: int | None = None,
) -> tuple[Llama, Tokenizer | None]:
    """Loads a model and its tokenizer.

    Args:
        folder: a folder in Hugging Face layout, or a hub id.
        dtype: of the weights ("fp32", "bf16", "fp16" or a torch dtype); None: as stored.
        device: where the weights go.
        share: gives the part of the model to load, e.g. `puna.parallel.inference.Share`; None: the whole.
        for_inference: lay weights out as products without gradients read them fastest: bf16 on a CPU multiplies up to
            twice as fast, but such a model can be neither trained nor saved.
        context: tokens that the model may see; None: those of its config.json, which are what it was trained on. Code
            Llama, where that says 16,384, was measured up to 100,000 (arXiv:2308.12950, section 3.3).

    Returns:
        The model, and the tokenizer or None if the folder has none.

    Raises:
        PunaError: a file or tensor is missing, damaged, unknown or of the wrong shape, or the tokenizer has ids that
            the model has no embedding for.
    """
    folder = resolve(folder)
    config, quantization = load_quantized_config(folder, context=context)
    tokenizer = load_tokenizer_of(folder)
    if tokenizer is not None:
        tokenizer.check_vocab_size(config.vocab_size)
    model = build_model(
        config,
        open_weights(folder),
        quantization=quantization,
        dtype=dtype,
        device=device,
        share=None if share is None else share(config),
        for_inference=for_inference,
    )
    return model, tokenizer


def build_model(
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    *,
    quantization: Quantization | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    share: Share | None = None,
    for_inference: bool = False,
) -> Llama:
    """Makes a model, or a share of one, of stored tensors, reading one at a time; arguments as for `load`.

    A quantised model computes in bf16 unless asked for fp32; one whose weights are stored in several dtypes, in that of
    most of them.

    Raises:
        PunaError: the tensors are not exactly those of the model, or there is no room for them.
        UsageError: a quantised model was asked to compute in fp16.
    """
    dtype, device = dtype_of(dtype), torch.device(device)
    tensors = fit(config, tensors, quantization)
    if quantization is not None:
        dtype = _compute_dtype(dtype)
    whole = tensors
    if share is not None:
        tensors = {name: stored.part(share.index(name, stored.shape)) for name, stored in whole.items()}
    check_room(config, tensors, dtype, device, share=_size_bytes(tensors) / _size_bytes(whole))
    model = model_without_memory(config, quantization)
    for name, stored in tensors.items():
        _fill(model, name, stored, dtype, device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.compute_dtype = _dtype_of_most(model.parameters())
    if for_inference:
        pack_layers(model)
    if share is not None:
        share.join(model)
    if quantization is not None:
        model.compute_dtype = dtype
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.pack(dtype)
    return model


def _dtype_of_most(weights: Iterable[Tensor]) -> torch.dtype | None:
    """The dtype of most numbers; None: they all have the same."""
    sizes: Counter[torch.dtype] = Counter()
    for weight in weights:
        sizes[weight.dtype] += weight.numel()
    return sizes.most_common(1)[0][0] if len(sizes) > 1 else None


def _size_bytes(tensors: Mapping[str, StoredTensor]) -> int:
    return sum(tensor.size_bytes for tensor in tensors.values())


def _fill(model: nn.Module, name: str, stored: StoredTensor, dtype: torch.dtype | None, device: torch.device) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    empty = getattr(module, leaf)
    is_parameter = isinstance(empty, nn.Parameter)
    if not is_parameter and stored.dtype != empty.dtype:
        raise PunaError(
            f"{stored.where}: {name} of a quantised layer is {stored.dtype}, its scheme wants {empty.dtype}"
        )
    values = stored.read()
    copy = torch.empty(values.shape, dtype=(is_parameter and dtype) or values.dtype, device=device).copy_(values)
    check_range(f"{stored.where}: {name}", values, copy)
    setattr(module, leaf, nn.Parameter(copy) if is_parameter else copy)


def fit(
    config: ModelConfig, tensors: Mapping[str, StoredTensor], quantization: Quantization | None = None
) -> dict[str, StoredTensor]:
    """The stored tensors that make the model of `config`, in the model's order.

    A tied model's head, and what `HARMLESS_EXTRAS` lists, is left out.

    Raises:
        PunaError: a tensor is missing, unknown, of the wrong shape or no numbers of a weight; the message names it.
    """
    where = _place(tensors)
    if config.num_hidden_layers > len(tensors):  # the names alone might fill the memory
        raise PunaError(
            f"{where} has {len(tensors)} tensors, too few for the {config.num_hidden_layers} layers of config.json"
        )
    shapes = parameter_shapes(config, quantization)
    if missing := [name for name in shapes if name not in tensors]:
        raise PunaError(f"{where} lacks {some(missing)}, which config.json asks for; fetch or make the weights again")
    unknown = [name for name in tensors if name not in shapes and not name.endswith(HARMLESS_EXTRAS)]
    if config.tie_word_embeddings and HEAD in unknown:
        unknown.remove(HEAD)
        _check_tied(tensors[EMBEDDING], tensors[HEAD])
    if unknown:
        raise PunaError(f"{where} holds {some(unknown)}, which the model of config.json does not have")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise PunaError(_misfit(name, tensors[name], shape, config))
        dtype = tensors[name].dtype
        if quantization is None and (not dtype.is_floating_point or dtype.itemsize == 1):
            raise PunaError(
                f"{tensors[name].where}: {name} is stored as {dtype_name(dtype)}, but config.json names no "
                "quantisation; use the checkpoint that it was made from"
            )
    return {name: tensors[name] for name in shapes}


def parameter_shapes(config: ModelConfig, quantization: Quantization | None = None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, a tied head left out."""
    model = model_without_memory(config, quantization)
    return {name: tuple(values.shape) for name, values in (*model.named_parameters(), *model.named_buffers())}


def _compute_dtype(asked: torch.dtype | None) -> torch.dtype:
    if asked == torch.float16:
        raise UsageError("quantised weights are multiplied in bf16 or fp32; take one of these instead of fp16")
    return asked or torch.bfloat16


def load_config(folder: Path | str, *, rope_theta: float | None = None) -> ModelConfig:
    """The shape of the model in a folder in Hugging Face layout.

    Args:
        folder: holds `config.json`.
        rope_theta: wavelength base of the rotary positions, for a `config.json` that states none.

    Raises:
        PunaError: there is no `config.json`, it describes a network that puna does not have, or the weights are
            quantised.
    """
    config, quantization = load_quantized_config(folder, rope_theta=rope_theta)
    if quantization is not None:
        path = Path(folder) / "config.json"
        raise PunaError(f"{path}: the weights are quantised; use the checkpoint that they were made from")
    return config


def load_quantized_config(
    folder: Path | str, *, rope_theta: float | None = None, context: int | None = None
) -> tuple[ModelConfig, Quantization | None]:
    """As `load_config`, of weights that may be quantised: says how."""
    path = Path(folder) / "config.json"
    if not path.exists() and (Path(folder) / "checkpoints").is_dir():
        raise PunaError(f"{folder} is a training run, not a model; write one with `puna export {folder} -o DIR`")
    if not path.exists():
        raise PunaError(f"{folder} has no config.json; a model is a folder in Hugging Face layout, see `puna convert`")
    fields = read_json(path)
    if context is not None:
        fields["max_position_embeddings"] = context
    config = ModelConfig.from_json(fields, str(path), rope_theta=rope_theta)
    quantized = fields.get("quantization_config")
    quantization = Quantization.from_json(quantized, str(path)) if quantized else None
    if rope_theta not in (None, config.rope_theta):
        raise PunaError(f"{path} states rope_theta {config.rope_theta:g}, not {rope_theta:g}; leave out --rope-theta")
    return config.with_ends(_more_ends(Path(folder) / GENERATION_FILE)), quantization


def _more_ends(path: Path) -> tuple[int, ...]:
    """The ids at which a model ends a text, as the settings for generation say that are shipped with it.

    Models that were tuned on dialogs often name all of them there alone: the end of an answer, and that of a text.
    """
    fields = read_json(path) if path.is_file() else {}
    return ends_of(fields.get("eos_token_id"), str(path))


def load_tokenizer_of(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder; None if it has no file of one."""
    if not any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        return None
    return load_tokenizer(folder)


def save_model(model: Llama, folder: Path | str, *, tokenizer: Tokenizer | None = None) -> None:
    """Writes a model, and its tokenizer if given, in Hugging Face layout; the folder appears when it is whole.

    Raises:
        PunaError: the folder exists, the model is quantised or was loaded for inference, or the tokenizer has ids that
            it has no embedding for.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise PunaError("a quantised model is not saved from memory; copy the folder that it was loaded from")
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise PunaError("a model that was loaded for inference cannot be saved; load it without for_inference")
    tensors = {name: StoredTensor.of(values) for name, values in model.named_parameters()}
    with folder_aside(folder) as aside:
        write_model(aside, model.config, tensors, tokenizer)


def write_model(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    tokenizer: Tokenizer | None = None,
    quantization: Quantization | None = None,
) -> None:
    """Writes stored tensors in Hugging Face layout, one in memory at a time.

    Args:
        folder: empty, best one that takes its place when it is whole (`puna.files.folder_aside`).
        config: the model's shape.
        tensors: exactly the model's.
        tokenizer: goes along, with the settings for generation beside it; None: neither does. Markers that the model
            has no embeddings for are dropped from it.
        quantization: how the tensors are quantised; None: they are not.

    Raises:
        PunaError: the tensors are not those of the model, or the tokenizer has ids that it has no embedding for.
    """
    tensors = fit(config, tensors, quantization)
    if tokenizer is not None:
        tokenizer.check_vocab_size(config.vocab_size)
    ends = (id for id in config.eos_token_ids if id < config.vocab_size)  # its source may name those of such markers
    config = replace(config, eos_token_id=None).with_ends(ends)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    fields = without_eot(config, tokenizer).to_json()
    if quantization is not None:
        fields["quantization_config"] = quantization.to_json()
    if len(dtypes) == 1:
        fields["torch_dtype"] = dtype_name(dtypes.pop())
    write_json(folder / "config.json", fields)
    if tokenizer is not None:
        tokenizer.save(folder)
        write_tokenizer_json(tokenizer, folder)
    _write_generation_config(folder / GENERATION_FILE, config, tokenizer)
    write_weights(folder, tensors)


def without_eot(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """The shape without the end of a text that was infilled, which is the tokenizer's; `config.json` names others."""
    infilling = None if tokenizer is None else tokenizer.infilling
    return config if infilling is None else config.without_end(infilling.eot_id)


def _write_generation_config(path: Path, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Writes the model's ids into the settings that came with the tokenizer, or into new ones."""
    if tokenizer is not None and tokenizer.infilling is not None:
        config = config.with_ends([tokenizer.infilling.eot_id])
    fields = read_json(path) if path.exists() else {}
    fields.pop("_from_model_config", None)  # for which transformers 4 may take the ids of config.json instead
    write_json(path, {**fields, "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id})


def _check_tied(embedding: StoredTensor, head: StoredTensor) -> None:
    if not are_copies(embedding.read(), head.read()):
        raise PunaError(
            f"{head.where}: {HEAD} differs from {EMBEDDING}, but config.json ties them; "
            'set "tie_word_embeddings" to false there'
        )


def _misfit(name: str, stored: StoredTensor, shape: tuple[int, ...], config: ModelConfig) -> str:
    message = f"{stored.where}: {name} has shape {stored.shape}, config.json makes it {shape}"
    if name in (EMBEDDING, HEAD) and stored.shape[1:] == shape[1:]:
        message += f"; its vocab_size is {config.vocab_size}, the weights' is {stored.shape[0]}"
    return message


def _place(tensors: Mapping[str, StoredTensor]) -> str:
    files = {tensor.where for tensor in tensors.values()}
    return files.pop() if len(files) == 1 else str(Path(min(files, default="the checkpoint")).parent)
