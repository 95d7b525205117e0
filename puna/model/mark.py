"""A mark of a model's weights in memory, which is another one once the model is trained further."""

import hashlib

import torch

from puna.model.llama import Llama

#: Numbers of each tensor that are looked at.
NUMBERS = 64


def mark_in_memory(model: Llama) -> str:
    """A hash of names and of some numbers of each tensor; a step of training changes some of them.

    Layers that are packed for inference, and cannot change, do not show theirs; the embedding and the norms do.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items() if not tensor.is_mkldnn}
    some = [tensor.flatten()[:: max(1, tensor.numel() // NUMBERS)].float() for tensor in tensors.values()]
    numbers = torch.cat(some).cpu().numpy().tobytes()
    return hashlib.sha256(repr(list(tensors)).encode() + numbers).hexdigest()[:16]
