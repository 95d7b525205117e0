"""How surprised a model is by tokens: the sum over a document, or token by token.

A document that is longer than the model's context is read in windows: every token but the first is asked for once, and
sees at least half a window of what stands before it, where there is so much.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from puna.errors import PunaError

if TYPE_CHECKING:
    from torch import Tensor

#: Positions whose logits are in memory at once.
CHUNK = 512


def negative_log_likelihood(model: Any, tokens: Sequence[int], window: int) -> float:
    """Sum of -ln p(token | what stands before it) over all tokens but the first, which is only seen.

    Args:
        model: on any device.
        tokens: BOS and the text.
        window: most tokens that the model sees at once; see `windows`.
    """
    spans = windows(len(tokens), window)
    return sum(float(losses(model, tokens[start:stop], first - start).sum()) for start, first, stop in spans)


def losses(model: Any, tokens: Sequence[int], first: int = 1) -> "Tensor":
    """-ln p of tokens[first:] with all that stands before each: (T - first,) fp32 on the CPU, from one pass.

    Raises:
        PunaError: one of them is not a number.
    """
    import torch
    from torch.nn.functional import cross_entropy

    device = model.lm_head.weight.device
    with torch.inference_mode():
        wanted = torch.arange(first - 1, len(tokens) - 1, device=device)
        hidden = model.hidden(torch.tensor([tokens[:-1]], device=device), wanted=wanted)[0]
        targets = torch.tensor(tokens[first:], device=device)
        found = torch.cat(
            [
                cross_entropy(model.lm_head(some).float(), theirs, reduction="none").cpu()
                for some, theirs in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
            ]
        )
    if not found.isfinite().all():
        raise PunaError("the model's losses are not numbers: its weights are damaged, or too large for this dtype")
    return found


def windows(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Cuts a document for a model that sees `window` tokens at once, so that every token but the first is asked once.

    Yields:
        (start, first, stop): with tokens[start:stop - 1] before the model, tokens[first:stop] are asked for. The first
        window asks for `window` tokens; the following ones see half a window of what was asked before.
    """
    first = 1
    while first < length:
        start = 0 if first == 1 else first - max(1, window // 2)
        stop = min(length, start + window + 1)
        yield start, first, stop
        first = stop
