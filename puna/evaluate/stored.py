"""A model that is loaded once all else is known to be right: a wrong file is said before a large model is read."""

from dataclasses import dataclass
from typing import Any

from puna.errors import UsageError


@dataclass(frozen=True)
class Stored:
    """A model by its folder or hub id, and the dtype and device that it is to be loaded with."""

    name: str
    dtype: Any = None
    device: Any = "cpu"

    def __post_init__(self) -> None:
        from puna.checkpoint import is_hub_id, resolve

        if not is_hub_id(self.name):  # whose download may take an hour
            resolve(self.name)


def loaded(model: Any, tokenizer: Any, *, context: int | None = None) -> tuple[Any, Any]:
    """Model and tokenizer: those of a `Stored` one, which is loaded now, or the ones given.

    Args:
        model: a `Stored` one, or one in memory.
        tokenizer: the model's; None: its folder's.
        context: tokens that a `Stored` one may see; None: those of its config.json.

    Raises:
        PunaError: it cannot be loaded.
        UsageError: there is no tokenizer.
    """
    name = "the model"
    if isinstance(model, Stored):
        from puna.checkpoint import load

        name = model.name
        model, its_own = load(model.name, dtype=model.dtype, device=model.device, for_inference=True, context=context)
        tokenizer = tokenizer or its_own
    if tokenizer is None:
        raise UsageError(
            f"{name} has no tokenizer; copy its tokenizer.model or tokenizer.json into its folder, "
            "or give tokenizer=puna.load_tokenizer(folder)"
        )
    return model, tokenizer
