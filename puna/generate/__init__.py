"""Prompts to completions: by text here, by token in `complete`.

`generate` continues a text, `infill` writes what is missing between two; both prepare the tokens and leave the rest to
the loop. Where a completion ends, and how it is chosen, is said by `Sampling`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from puna.errors import PunaError
from puna.generate.loop import Completion, OnText, complete
from puna.generate.sampling import Sampling
from puna.model.llama import Llama
from puna.tokenizer import Tokenizer

__all__ = ["Completion", "OnText", "Sampling", "complete", "generate", "infill"]


def generate(
    model: Llama, tokenizer: Tokenizer, prompts: str | Sequence[str], *, on_text: OnText | None = None, **sampling: Any
) -> list[Completion]:
    """Continues texts.

    Args:
        model: from `puna.load`.
        tokenizer: likewise.
        prompts: one text or several.
        on_text: is given (number of the prompt, piece of text) while the text grows.
        sampling: the fields of `Sampling`, e.g. `temperature=0.2, stop=("def ",)`.

    Returns:
        One completion for each prompt, in their order.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise PunaError(f"prompt {index} is empty; write what the model is to continue")
    tokens = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    return complete(model, tokenizer, tokens, Sampling.of(sampling), on_text=on_text)


def infill(
    model: Llama,
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    order: str = "psm",
    on_text: OnText | None = None,
    **sampling: Any,
) -> Completion:
    """Writes what is missing between `prefix` and `suffix`, as an editor does at the cursor.

    Args:
        model: from `puna.load`.
        tokenizer: likewise; it has the infilling markers.
        prefix: the text before; may be empty.
        suffix: the text after; may be empty.
        order: "psm" (prefix first) or "spm" (suffix first), as the model was trained; Code Llama knows both.
        on_text: as for `generate`; the number is 0.
        sampling: the fields of `Sampling`.

    Raises:
        PunaError: the model cannot infill; the message says which can.
    """
    from puna.prompts import infill_prompt, infill_stops

    if tokenizer.infilling is None or tokenizer.infilling.eot_id >= model.config.vocab_size:
        raise PunaError(
            "this model has no infilling markers (▁<PRE> ▁<SUF> ▁<MID> ▁<EOT>); Code Llama 7B, 13B and 70B, base and "
            "Instruct, have them (34B and Python do not), and so have models trained with a puna tokenizer"
        )
    settings = Sampling.of(sampling)
    settings = replace(settings, stop_ids=(*settings.stop_ids, *infill_stops(tokenizer)))
    tokens = infill_prompt(tokenizer, prefix, suffix, order=order)
    return complete(model, tokenizer, [tokens], settings, on_text=on_text)[0]
