'''Key retrieval: whether a model finds one line among thousands of others.

    …                                        other code, as many tokens as asked for
    def my_function() -> int:                at a tenth, a half … of the way
        """Note that this function is used at the end"""
        return 42
    …                                        more of it
    assert my_function() ==                  the answer: 42

Whole lines of other code are taken until prompt and answer have the length asked for.

Source: Code Llama (arXiv:2308.12950), section 3.3 and Table 8 of the appendix: 64 examples a cell, code of CodeContests
around the key. The code around ours is the corpus given, or the standard library of the Python that runs it.
'''

import hashlib
import random
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puna.data.documents import Document
from puna.errors import PunaError, UsageError
from puna.evaluate.completing import ROWS, Ask, Completer
from puna.evaluate.corpus import choose_documents, read_documents
from puna.evaluate.paper import table
from puna.evaluate.stored import computed_in, loaded
from puna.progress import Progress

#: Fractions of the way at which the key stands; those of the paper.
POSITIONS = (0.0, 0.2, 0.4)

#: Lengths in tokens that are asked for by default, as far as the model's context reaches.
LENGTHS = (1000, 2000, 4000, 8000, 16000, 24000, 32000, 64000, 100_000)

KEY = 'def my_function() -> int:\n    """Note that this function is used at the end"""\n    return {}\n'
QUESTION = "assert my_function() == "

#: Tokens kept for the answer: a number of two digits.
ANSWER_TOKENS = 4

COLUMNS = "8000@0.0 8000@0.2 8000@0.4 16000@0.0 16000@0.2 16000@0.4 24000@0.0 24000@0.2 24000@0.4"

#: "length@position" -> share found.
FIGURES = {
    "": table(
        COLUMNS,
        {
            "7B": "100 95.3 100 54.7 100 98.4 3.1 85.9 85.9",
            "13B": "100 100 100 100 100 100 100 89.1 6.3",
            "34B": "76.6 100 100 95.3 96.9 100 81.3 0 81.3",
        },
    )
}


def evaluate(
    *,
    model: Any = None,
    tokenizer: Any = None,
    corpus: Path | str | None = None,
    length: int | None = None,
    cases: int = 64,
    seed: int = 0,
    batch: int = ROWS,
    cache_dtype: str | None = None,
) -> dict[str, Any]:
    """Share of the keys that the model finds, by the length of the prompt and the place of the key.

    Args:
        model: to be scored.
        tokenizer: the model's.
        corpus: code around the key; by default Python's standard library.
        length: tokens of a prompt; by default each of `LENGTHS` that fits the model's context.
        cases: prompts of each length and position.
        seed: of keys and code.
        batch: prompts that are read and answered at a time, as far as memory has room for them.
        cache_dtype: as for `Completer`.

    Returns:
        `{"benchmark", "retrieved", "cells": {"8000@0.2": share, …}, "cases", …}`.
    """
    if model is None:
        raise UsageError("key_retrieval scores a model; give one")
    lines = _lines(None if corpus is None else Path(corpus), seed)
    model, tokenizer = loaded(model, tokenizer, context=length)
    context = model.config.max_position_embeddings
    lengths = [length] if length else [one for one in LENGTHS if one <= context] or [context]
    if max(lengths) > context:
        raise UsageError(f"length={length}, but the model's context is {context} tokens")
    options: dict[str, Any] = {"batch_rows": batch, "cache_dtype": cache_dtype}
    complete = Completer(model, tokenizer, max_tokens=ANSWER_TOKENS, stop=("\n",), **options)
    cells = {}
    with Progress("retrieving", len(lengths) * len(POSITIONS) * cases, "keys") as progress:
        for one in lengths:
            for position in POSITIONS:
                keys = [random.Random(f"{seed} {one} {position} {i}").randint(10, 99) for i in range(cases)]
                prompts = [
                    prompt(tokenizer, lines, key, one - ANSWER_TOKENS, position, f"{seed} {i}")
                    for i, key in enumerate(keys)
                ]
                answers = complete([Ask(text) for text in prompts], on_answer=lambda *_: progress.advance())
                found = sum(is_found(key, answer) for key, answer in zip(keys, answers, strict=True))
                cells[f"{one}@{position}"] = found / cases
    return {
        "benchmark": "key_retrieval",
        "retrieved": sum(cells.values()) / len(cells),
        "cells": cells,
        "cases": cases,
        "paper": {name: dict(row) for name, row in FIGURES[""].items()},
        "seed": seed,
        "length": lengths,
        "dtype": computed_in(model),
        "corpus": str(corpus) if corpus else "Python's standard library",
        "corpus_sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }


def prompt(tokenizer: Any, lines: Sequence[str], key: int, length: int, position: float, seed: str) -> str:
    """Code with the key in it, of at most `length` tokens and, but for a line, no fewer.

    Raises:
        PunaError: there is not enough code for that, or no room for the key.
    """
    start = random.Random(seed).randrange(len(lines))
    around = [*lines[start:], *lines[:start]]

    def text(count: int) -> str:
        before = round(count * position)
        return "".join([*around[:before], KEY.format(key), *around[before:count], QUESTION])

    def fits(count: int) -> bool:
        return len(tokenizer.encode(text(count), bos=True)) <= length

    if not fits(0):
        raise PunaError(f"{length} tokens have no room for the key; choose a greater --length")
    most = 1
    while most < len(around) and fits(most):
        most *= 2
    if most >= len(around) and fits(len(around)):
        raise PunaError(f"there is not enough code for {length} tokens; name more of it with --corpus")
    least, most = most // 2, min(most, len(around))
    while most - least > 1:  # text(least) fits, text(most) does not
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return text(least)


def is_found(key: int, answer: str) -> bool:
    """Whether an answer begins with the key, and with no other number."""
    number = re.match(r"\s*(\d+)", answer)
    return number is not None and int(number[1]) == key


def _lines(corpus: Path | None, seed: int) -> list[str]:
    """Lines of code with their ends, document after document in the order of a hash."""
    if corpus is None:
        paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        documents = [Document(path.name, "stdlib", path.read_text(encoding="utf-8")) for path in paths]
    else:
        documents = read_documents(corpus)
    chosen = choose_documents(documents, len(documents), seed)
    return [line for document in chosen for line in (document.text or "").splitlines(keepends=True)]
