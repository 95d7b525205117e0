"""Prompts to completions: by text here, by token in `complete`.

`generate` continues a text, `infill` writes what is missing between two, `chat` answers a dialog; they lay out the
tokens and leave the rest to the engine. `complete` is the plain loop that the engine is tested against. Where a
completion ends, and how it is chosen, is said by `Sampling`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from puna.errors import PunaError, UsageError
from puna.generate.engine import Engine
from puna.generate.engine.engine import MAX_ROWS
from puna.generate.gap import OnCut, gap_prompt
from puna.generate.loop import complete
from puna.generate.sampling import Sampling
from puna.generate.sequence import Completion, OnCompletion, OnText
from puna.model.llama import Llama
from puna.prompts import ChatTemplate, Message, chat_template, heal
from puna.tokenizer import Tokenizer
from puna.twins import make_callable

__all__ = [
    "Completion",
    "Engine",
    "OnCompletion",
    "OnCut",
    "OnText",
    "Sampling",
    "chat",
    "complete",
    "gap_prompt",
    "generate",
    "infill",
    "prompt_room",
]

make_callable(__name__)


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    on_text: OnText | None = None,
    on_completion: OnCompletion | None = None,
    n: int = 1,
    batch_rows: int = MAX_ROWS,
    lookup: bool = False,
    draft: Llama | None = None,
    cache_dtype: str | None = None,
    healing: bool = False,
    **sampling: Any,
) -> list[Completion]:
    """Continues texts.

    Args:
        model: from `puna.load`.
        tokenizer: likewise.
        prompts: one text or several.
        on_text: is given (number of the prompt, piece of text) while the text grows.
        on_completion: is given (number of the prompt, completion) once it is finished.
        n: completions of each prompt, with seeds `seed`, `seed + 1` and so on, at a temperature above 0; prompts are
            counted over all of them.
        batch_rows: most completions that run at a time; fewer do where memory is short.
        lookup: guess from what stands in the text already what comes next, and check the guesses together: faster
            where a text repeats itself, as edits do; the completions are the same.
        draft: a small model of the same vocabulary that guesses instead, e.g. 7B for 34B: faster where few prompts run.
        cache_dtype: "int8" or "fp8": keep keys and values in 8 bits, where memory is short; completions are then those
            of slightly other logits. None: as the model computes them.
        healing: for prompts that may stop inside a word: the model splits their end anew (`puna.prompts.healing`); the
            completion's text is what stands behind the prompt all the same.
        sampling: the fields of `Sampling`, e.g. `temperature=0.2, stop=("def ",)`.

    Returns:
        n completions of the first prompt, then of the second, and so on.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise PunaError(f"prompt {index} is empty; write what the model is to continue")
    settings = Sampling.of(sampling)
    encoded = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    healed = [heal(tokenizer, ids) if healing else (ids, settings.begins_with) for ids in encoded]
    tokens = [ids for ids, _ in healed for _ in range(n)]
    samplings = [each for _, cut in healed for each in replace(settings, begins_with=cut).several(n)]
    if batch_rows < 1:
        raise UsageError(f"batch_rows={batch_rows} must be 1 or more")
    rows = max(1, min(batch_rows, len(tokens)))
    engine = Engine(model, tokenizer, max_rows=rows, lookup=lookup, draft=draft, cache_dtype=cache_dtype)
    return engine.generate(tokens, samplings, on_text=on_text, on_completion=on_completion)


def infill(
    model: Llama,
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    order: Literal["psm", "spm"] = "psm",
    budget: int | None = None,
    healing: bool = True,
    cache_dtype: str | None = None,
    on_text: OnText | None = None,
    on_cut: OnCut | None = None,
    **sampling: Any,
) -> Completion:
    """Writes what is missing between `prefix` and `suffix`, as an editor does at the cursor.

    Args:
        model: from `puna.load`.
        tokenizer: likewise; it has the infilling markers.
        prefix: the text before; may be empty.
        suffix: the text after; may be empty.
        order: "psm" (prefix first) or "spm" (suffix first), as the model was trained; Code Llama knows both.
        budget: most tokens of the prompt: lines far from the gap are left out beyond it (`cut_around_gap`); None: what
            the model's context leaves (`prompt_room`).
        healing: in spm order, where prefix and middle are split together, let the model split the end of `prefix` anew:
            behind "imp" it may choose `import`. In psm order the prefix ends where a token ends, in training as here,
            and is left alone.
        cache_dtype: as for `generate`.
        on_text: as for `generate`; the number is 0.
        on_cut: is given what the budget leaves of a longer text.
        sampling: the fields of `Sampling`.

    Raises:
        PunaError: the model cannot infill; the message says which can.
    """
    settings = Sampling.of(sampling)
    budget = prompt_room(model, settings.max_tokens) if budget is None else budget
    tokens, settings = gap_prompt(
        tokenizer, prefix, suffix, settings, order=order, budget=budget, healing=healing, on_cut=on_cut
    )
    engine = Engine(model, tokenizer, max_rows=1, cache_dtype=cache_dtype)
    return engine.generate([tokens], settings, on_text=on_text)[0]


def prompt_room(model: Llama, max_tokens: int) -> int:
    """Tokens of the model's context that a completion leaves to its prompt: half of them at least."""
    context = model.config.max_position_embeddings
    return max(context - max_tokens, context // 2)


def chat(
    model: Llama,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: ChatTemplate | str,
    engine: Engine | None = None,
    cache_dtype: str | None = None,
    on_text: OnText | None = None,
    **sampling: Any,
) -> Completion:
    """Answers the last message of a dialog.

    Args:
        model: from `puna.load`.
        tokenizer: likewise.
        messages: `{"role": "system" | "user" | "assistant", "content": text}`; the last is the user's.
        template: the layout that the model was tuned with: a name, a folder that ships one, or from `chat_template`.
        engine: of this model, kept from answer to answer: what it read of the dialog before is not read again. None:
            one for this answer.
        cache_dtype: as for `generate`, where no engine is given.
        on_text: as for `generate`; the number is 0.
        sampling: the fields of `Sampling`.

    Raises:
        UnusableDialog: the dialog does not fit the template.
    """
    template = chat_template(template) if isinstance(template, str) else template
    if not messages or messages[-1]["role"] != "user":
        raise PunaError("a dialog to answer ends with a message of the user")
    tokens = template.encode(tokenizer, messages).tokens
    settings = _ending_also(sampling, template.stops(tokenizer), template.stop_strings)
    engine = engine or Engine(model, tokenizer, max_rows=1, cache_dtype=cache_dtype)
    return engine.generate([tokens], settings, on_text=on_text)[0]


def _ending_also(sampling: dict[str, Any], stop_ids: Sequence[int], stop: Sequence[str] = ()) -> Sampling:
    settings = Sampling.of(sampling)
    return replace(settings, stop_ids=(*settings.stop_ids, *stop_ids), stop=(*settings.stop, *stop))
