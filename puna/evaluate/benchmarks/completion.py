"""How well a model knows code that it has not seen: the next line of a file, the block that follows, bits per byte.

    document    import os                   line: all that stands before a line chosen by (seed, document, k) is the
                                            prompt; the model's line is compared with it, both stripped
                def place():                block: the prompt ends behind a line that opens a block; the model's text,
                    return os.getcwd()      up to the first line indented no deeper, is compared with the block
                …                           bits per byte: all of the document, byte by byte

Exact match and edit similarity say what the user of an editor would see. Bits per byte says how surprised the model is;
it counts bytes, not tokens, so models with different tokenizers compare. Taken before and after training on a team's
code, on files kept out of it, they show whether the training helped.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.errors import PunaError, UsageError
from puna.evaluate.completing import ROWS, Ask, Completer
from puna.evaluate.corpus import checksum, document_hash, unseen_documents
from puna.evaluate.likelihood import negative_log_likelihood
from puna.evaluate.pass_at_k import bootstrap, share_interval
from puna.evaluate.stored import computed_in, loaded
from puna.files import file_aside
from puna.progress import Progress

if TYPE_CHECKING:
    from puna.data.documents import Document

#: Longer lines are not asked for: they are data rather than code.
LONGEST_LINE = 120

#: Longer blocks are not asked for: nobody takes twenty lines unread from an editor.
LONGEST_BLOCK = 12

#: Most tokens that the model sees at once for bits per byte, where its context has room for them.
WINDOW = 4096

#: A block may take so many times the tokens of a line; so many times fewer are asked for, to take no longer.
BLOCK_TOKENS = 4


@dataclass(frozen=True)
class Case:
    """A line or block to be written, and what stands before it; `indent` is that of the line that opens the block."""

    kind: str
    document: str
    line: int
    prompt: str
    target: str
    indent: int = 0


@dataclass(frozen=True)
class Scored:
    """A case, what the model wrote, and how like the target that is."""

    case: Case
    completion: str

    @property
    def is_exact(self) -> bool:
        """Whether it is the target, character by character."""
        return self.completion == self.case.target

    @property
    def similarity(self) -> float:
        """Edit similarity to the target."""
        return edit_similarity(self.completion, self.case.target)

    def record(self) -> dict[str, Any]:
        """As a line of a file."""
        scores = {"exact_match": self.is_exact, "edit_similarity": self.similarity}
        return asdict(self.case) | {"completion": self.completion} | scores


def evaluate(
    *,
    model: Any = None,
    tokenizer: Any = None,
    corpus: Path | str | None = None,
    cases: int = 200,
    max_documents: int = 200,
    seed: int = 0,
    batch: int = ROWS,
    max_tokens: int = 64,
    cache_dtype: str | None = None,
    output: Path | str | None = None,
) -> dict[str, Any]:
    """Next line and block, exact match and edit similarity, and bits per byte on files that the model has not seen.

    Args:
        model: to be scored.
        tokenizer: the model's.
        corpus: a folder of code, or a prepared folder, of which the held-out part is taken where there is one.
        cases: how many lines are asked for, and a quarter as many blocks; fewer where the documents have fewer.
        max_documents: how many documents are taken, in the order of a hash of seed and id.
        seed: of the choice of documents, lines and blocks.
        batch: lines or blocks that are written at a time.
        max_tokens: most tokens of a line; a block has `BLOCK_TOKENS` times as many.
        cache_dtype: as for `Completer`.
        output: a folder for every case with its completion, and every document with its nats.

    Returns:
        `{"benchmark", "exact_match", "edit_similarity", "block_exact_match", …, "bits_per_byte", "intervals", …}`;
        the scores of blocks are missing where the documents have none. Intervals are those of
        `puna.evaluate.pass_at_k`, over documents, and None where those are too few.
    """
    if model is None:
        raise UsageError("completion scores a model; give one")
    documents = unseen_documents("completion", corpus, max_documents, seed)
    lines = list(islice(choose_cases(documents, seed), cases))
    blocks = list(islice(choose_blocks(documents, seed), max(1, cases // BLOCK_TOKENS)))
    if not lines:
        raise PunaError(
            f"{corpus} has no line to ask for: no document has a second line of up to {LONGEST_LINE} characters; "
            "give more code"
        )
    model, tokenizer = loaded(model, tokenizer)
    started = time.monotonic()
    # One for both: its cache takes most of the memory that is free, and would leave a second one next to none.
    complete = Completer(
        model, tokenizer, max_tokens=max_tokens * BLOCK_TOKENS, stop=(), batch_rows=batch, cache_dtype=cache_dtype
    )
    line = partial(complete, max_tokens=max_tokens, stop=("\n",))
    scored = {
        "": _completed(lines, line, _first_line),
        "block_": _completed(blocks, complete, _block),
    }
    completed = time.monotonic()
    surprises = _surprises(model, tokenizer, documents)
    read = time.monotonic()

    means, ranges = {}, {}
    for prefix, found in scored.items():
        if found:
            exact, similar = [float(one.is_exact) for one in found], [one.similarity for one in found]
            for name, values in (("exact_match", exact), ("edit_similarity", similar)):
                means[prefix + name] = sum(values) / len(values)
                ranges[prefix + name] = share_interval(values, groups=[one.case.document for one in found])
    sizes = [one["bytes"] for one in surprises]
    bits = [one["nats"] / math.log(2) / one["bytes"] for one in surprises]
    if output is not None:
        every = [one.record() for found in scored.values() for one in found]
        for name, records in (("cases", every), ("documents", surprises)):
            with file_aside(Path(output) / f"{name}.jsonl", "w") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
    return {
        "benchmark": "completion",
        **means,
        "bits_per_byte": sum(b * size for b, size in zip(bits, sizes, strict=True)) / sum(sizes),
        "intervals": ranges | {"bits_per_byte": bootstrap(bits, weights=sizes)},
        "cases": len(lines),
        "blocks": len(blocks),
        "cut_prompts": complete.cut_prompts,
        "documents": len(documents),
        "bytes": sum(sizes),
        "tokens": sum(one["tokens"] for one in surprises),
        "window": _window(model),
        "dtype": computed_in(model),
        "seed": seed,
        "corpus": str(corpus),
        "corpus_sha256": checksum(documents),
        "seconds": {"completing": round(completed - started, 3), "reading": round(read - completed, 3)},
    }


# ---- cases


def choose_cases(documents: "Sequence[Document]", seed: int) -> Iterator[Case]:
    """Lines to ask for: the first of every document, then the second of every document, and so on.

    The k-th line of a document depends on seed, document and k alone. Blank lines, lines longer than `LONGEST_LINE`
    and the first line of a document are not asked for.
    """
    return _in_turn([_line_cases(document, seed) for document in documents])


def choose_blocks(documents: "Sequence[Document]", seed: int) -> Iterator[Case]:
    """Blocks to ask for, in the same order: what is indented deeper than the line before it, in whatever language.

    Blocks of more than `LONGEST_BLOCK` lines, or with a line longer than `LONGEST_LINE`, are not asked for.
    """
    return _in_turn([_block_cases(document, seed) for document in documents])


def _in_turn(cases: list[Iterator[Case]]) -> Iterator[Case]:
    while cases:
        found = [(some, next(some, None)) for some in cases]
        yield from (case for _, case in found if case is not None)
        cases = [some for some, case in found if case is not None]


def _line_cases(document: "Document", seed: int) -> Iterator[Case]:
    lines = (document.text or "").split("\n")
    asked = [i for i, line in enumerate(lines) if i > 0 and 0 < len(line.strip()) <= LONGEST_LINE]
    for i in _shuffled(asked, document, seed):
        yield _case("line", document, lines, i, lines[i].strip())


def _block_cases(document: "Document", seed: int) -> Iterator[Case]:
    lines = (document.text or "").split("\n")
    for i in _shuffled([i for i in range(1, len(lines)) if _block_at(lines, i)], document, seed):
        yield _case("block", document, lines, i, "\n".join(_block_at(lines, i)), _indent(lines[i - 1]))


def _block_at(lines: list[str], i: int) -> list[str]:
    """The lines of a block that begins in line i and may be asked for; none where there is no such block."""
    if not lines[i - 1].strip():
        return []
    block = _deeper((lines[j] for j in range(i, len(lines))), _indent(lines[i - 1]), LONGEST_BLOCK)
    return block if len(block) <= LONGEST_BLOCK and all(len(line) <= LONGEST_LINE for line in block) else []


def _case(kind: str, document: "Document", lines: list[str], i: int, target: str, indent: int = 0) -> Case:
    # Made one by one: the prompts of all lines of a long file together take the square of its size.
    return Case(kind, f"{document.source}/{document.id}", i + 1, "\n".join(lines[:i]) + "\n", target, indent)


def _shuffled(lines: list[int], document: "Document", seed: int) -> list[int]:
    random.Random(document_hash(seed, document)).shuffle(lines)
    return lines


def _deeper(lines: Iterable[str], indent: int, most: float = math.inf) -> list[str]:
    """The lines up to the first that is indented no deeper, without blanks at their ends.

    Of a block of more than `most` lines, some more than those are enough.
    """
    block: list[str] = []
    for line in lines:
        if line.strip() and _indent(line) <= indent:
            break
        block.append(line.rstrip())
        if block[-1] and len(block) > most:
            break
    while block and not block[-1]:
        block.pop()
    return block


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


# ---- scores


def edit_similarity(a: str, b: str) -> float:
    """1 - Levenshtein distance / length of the longer; 1 for two empty texts."""
    return 1 - levenshtein(a, b) / max(len(a), len(b), 1)


def levenshtein(a: str, b: str) -> int:
    """Fewest characters to insert, delete or replace to make `b` of `a`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def _window(model: Any) -> int:
    return min(WINDOW, model.config.max_position_embeddings)


def _first_line(case: Case, text: str) -> str:
    return text.split("\n")[0].strip()


def _block(case: Case, text: str) -> str:
    return "\n".join(_deeper(text.split("\n"), case.indent))


def _completed(cases: list[Case], complete: Callable[..., list[str]], cut: Any) -> list[Scored]:
    """What the model writes for every case."""
    with Progress("completing", len(cases), f"{cases[0].kind}s" if cases else "") as progress:
        texts = complete([Ask(case.prompt) for case in cases], on_answer=lambda *_: progress.advance())
    return [Scored(case, cut(case, text)) for case, text in zip(cases, texts, strict=True)]


def _surprises(model: Any, tokenizer: Any, documents: "Sequence[Document]") -> list[dict[str, Any]]:
    """Nats, tokens and bytes of every document that is not empty, as lines of a file."""
    surprises = []
    with Progress("reading", len(documents), "documents") as progress:
        for document in documents:
            if not (text := document.text):
                continue
            ids = tokenizer.encode(text, bos=True)
            nats = negative_log_likelihood(model, ids, _window(model))
            sizes = {"tokens": len(ids) - 1, "bytes": len(text.encode())}
            surprises.append({"document": f"{document.source}/{document.id}", "nats": nats, **sizes})
            progress.advance()
    return surprises
