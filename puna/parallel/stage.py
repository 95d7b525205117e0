"""Pipeline stages: a model that holds a run of its layers, under the names that they have in the whole."""

import torch
from torch import Tensor, nn

from puna.model.attention import Documents
from puna.model.llama import Llama


class Stage(nn.Module):
    """A run of a model's layers; the first one begins with the embedding, the last one ends with the norm.

    Parts that it does not hold pass their input on. The head's weight belongs to the last stage, for the loss to
    multiply with.

    Args:
        llama: the whole model; what the stage does not hold is taken out of it.
        layers: numbers of those that it holds.
    """

    def __init__(self, llama: Llama, layers: range) -> None:
        super().__init__()
        config = llama.config
        self.llama = llama
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.num_hidden_layers
        decoder = self.llama.model
        for number in range(config.num_hidden_layers):
            if number not in layers:
                del decoder.layers._modules[str(number)]  # the others keep their numbers, and so their weights' names
        if not self.is_first:
            decoder.embed_tokens = nn.Identity()  # type: ignore[assignment]
        if not self.is_last:
            decoder.norm = nn.Identity()  # type: ignore[assignment]
            self.llama.lm_head = nn.Identity()  # type: ignore[assignment]

    def __call__(self, x: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
        """What the next stage takes, or what the head multiplies.

        Args:
            x: (B, T) tokens for the first stage, (B, T, D) from the one before for the others.
            positions: (B, T) of the tokens in their documents.
            numbers: (B, whole row) documents' numbers, in host memory.

        Returns:
            (B, T, D).
        """
        # Read here, for `fully_shard` moves every tensor that `forward` is given to the accelerator.
        return super().__call__(x, positions, Documents.of(numbers.numpy(), x.device))

    def forward(self, x: Tensor, positions: Tensor, documents: Documents) -> Tensor:
        """As a call, which see."""
        out = self.llama.model(x, positions, documents, None, self.llama.compute_dtype)
        # `fully_shard` hangs its backward pass on the output as a hook, which a view would not keep.
        return out.clone() if out._is_view() else out

    def weights(self) -> dict[str, Tensor]:
        """Name in the whole model -> weight, a tied head left out."""
        return {name.removeprefix("llama."): weight for name, weight in self.named_parameters()}

    def output_like(self, rows: int, tokens: int, dtype: torch.dtype) -> Tensor:
        """An empty tensor of the shape and dtype that `forward` returns."""
        return torch.empty(rows, tokens, self.llama.config.hidden_size, dtype=dtype, device="meta")
