"""How well a model knows code that it has not seen: the next line of a file, and bits per byte.

    document    import os                   prompt: all that stands before a line chosen by (seed, document, k)
                print(os.getcwd())          target: that line; the model's line is compared with it, both stripped
                …                           bits per byte: all of the document, line by line and byte by byte

Exact match and edit similarity say what the user of an editor would see. Bits per byte says how surprised the model is;
it counts bytes, not tokens, so models with different tokenizers compare. Taken before and after training on a team's
code, on files kept out of it, they show whether the training helped.
"""

import hashlib
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.errors import PunaError, UsageError
from puna.evaluate.completing import Ask, Completer
from puna.files import file_aside
from puna.progress import Progress

if TYPE_CHECKING:
    from puna.data.documents import Document

#: Longer lines are not asked for: they are data rather than code.
LONGEST_LINE = 120

#: Most tokens that the model sees at once for bits per byte, where its context has room for them.
WINDOW = 4096

#: Positions whose logits are in memory at once.
CHUNK = 512


@dataclass(frozen=True)
class Case:
    """A line to be written, and what stands before it."""

    document: str
    line: int
    prompt: str
    target: str


def evaluate(
    *,
    model: Any = None,
    tokenizer: Any = None,
    corpus: Path | str | None = None,
    cases: int = 200,
    max_documents: int = 200,
    seed: int = 0,
    batch: int = 16,
    max_tokens: int = 64,
    details: Path | str | None = None,
) -> dict[str, Any]:
    """Next-line exact match, edit similarity and bits per byte on files that the model has not seen.

    Args:
        model: to be scored.
        tokenizer: the model's.
        corpus: a folder of code, or a prepared folder, of which the held-out part is taken where there is one.
        cases: how many lines are asked for; fewer where the documents have fewer.
        max_documents: how many documents are taken, in the order of a hash of seed and id.
        seed: of the choice of documents and lines.
        batch: prompts that are completed together.
        max_tokens: most tokens of a line.
        details: where every case and its completion go, as JSON lines.

    Returns:
        `{"benchmark", "exact_match", "edit_similarity", "bits_per_byte", "cases", "documents", …}`.
    """
    if model is None:
        raise UsageError("completion scores a model; give one")
    if corpus is None:
        raise UsageError(
            "completion needs files that the model has not seen: --corpus DIR, a folder of code or prepared"
        )
    documents = choose_documents(read_documents(Path(corpus)), max_documents, seed)
    chosen = list(islice(choose_cases(documents, seed), cases))
    if not chosen:
        raise PunaError(
            f"{corpus} has no line to ask for: no document has a second line of up to {LONGEST_LINE} characters"
        )
    started = time.monotonic()
    complete = Completer(model, tokenizer, max_tokens=max_tokens, stop=("\n",), batch_rows=batch)
    lines = _completed(chosen, complete, batch)
    completed = time.monotonic()
    nats, tokens, size_bytes = _surprise(model, tokenizer, documents)
    read = time.monotonic()

    matches = [line.strip() == case.target for line, case in zip(lines, chosen, strict=True)]
    similarities = [edit_similarity(line.strip(), case.target) for line, case in zip(lines, chosen, strict=True)]
    if details is not None:
        with file_aside(details, "w") as file:
            for case, *scored in zip(chosen, lines, matches, similarities, strict=True):
                record = asdict(case) | dict(zip(("completion", "exact_match", "edit_similarity"), scored, strict=True))
                file.write(json.dumps(record) + "\n")
    return {
        "benchmark": "completion",
        "exact_match": sum(matches) / len(chosen),
        "edit_similarity": sum(similarities) / len(chosen),
        "bits_per_byte": nats / math.log(2) / size_bytes,
        "cases": len(chosen),
        "cut_prompts": complete.cut_prompts,
        "documents": len(documents),
        "bytes": size_bytes,
        "tokens": tokens,
        "window": _window(model),
        "seed": seed,
        "corpus": str(corpus),
        "seconds": {"completing": round(completed - started, 3), "reading": round(read - completed, 3)},
    }


# ---- documents and cases


def read_documents(corpus: Path) -> "list[Document]":
    """The texts of a prepared folder (its held-out part, where there is one), or of a folder of code.

    Raises:
        PunaError: there is nothing to read, or it is not plain text.
    """
    prepared = next((folder for folder in (corpus / "held_out", corpus) if (folder / "dataset.json").exists()), None)
    documents = _of_code(corpus) if prepared is None else _of_dataset(prepared)
    if not documents:
        raise PunaError(f"{prepared or corpus} holds no documents to score on")
    return documents


def choose_documents(documents: "Sequence[Document]", most: int, seed: int) -> "list[Document]":
    """The first `most` documents in the order of a hash of seed and id, wherever they stand."""
    return sorted(documents, key=lambda document: _hash(seed, document))[:most]


def choose_cases(documents: "Sequence[Document]", seed: int) -> Iterator[Case]:
    """Lines to ask for: the first of every document, then the second of every document, and so on.

    The k-th line of a document depends on seed, document and k alone. Blank lines, lines longer than `LONGEST_LINE`
    and the first line of a document are not asked for.
    """
    orders = [_line_order(document, seed) for document in documents]
    for k in range(max(map(len, orders), default=0)):
        for document, order in zip(documents, orders, strict=True):
            if k < len(order):
                lines = (document.text or "").split("\n")
                before = "\n".join(lines[: order[k]]) + "\n"
                yield Case(f"{document.source}/{document.id}", order[k] + 1, before, lines[order[k]].strip())


def _line_order(document: "Document", seed: int) -> list[int]:
    lines = (document.text or "").split("\n")
    order = [i for i, line in enumerate(lines) if i > 0 and 0 < len(line.strip()) <= LONGEST_LINE]
    random.Random(_hash(seed, document)).shuffle(order)
    return order


def _hash(seed: int, document: "Document") -> int:
    key = f"{seed}\0{document.source}\0{document.id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def _of_code(folder: Path) -> "list[Document]":
    from puna.data import corpora
    from puna.data.documents import Document, LeftOut

    kind, options = corpora.find("code"), corpora.checked_options("code", {})
    documents, left_out, seen = [], Counter[str](), set()
    for span in kind.spans(folder, options):
        if isinstance(span, LeftOut):
            left_out[span.reason] += 1
        elif span.checksum not in seen:
            seen.add(span.checksum)
            for found in kind.read(span, span.load(), options):
                if isinstance(found, Document):
                    documents.append(found)
                else:
                    left_out[found.reason] += 1
    if not documents:
        why = ", ".join(f"{count} × {reason}" for reason, count in left_out.most_common(3)) or "it is empty"
        raise PunaError(f"{folder} holds no code to score on: {why}")
    return documents


def _of_dataset(folder: Path) -> "list[Document]":
    from puna.data.documents import Document
    from puna.data.shards import Dataset
    from puna.tokenizer import load_tokenizer

    dataset, tokenizer = Dataset.open(folder), load_tokenizer(folder / "tokenizer")
    if len(dataset) and dataset.is_target(0, 1) is not None:
        raise PunaError(f"{folder} holds dialogs; completion is scored on code or text")
    documents = []
    for index in range(len(dataset)):
        name, source, tokens = dataset.document(index)
        if tokenizer.infilling is not None and tokenizer.infilling.prefix_id in tokens:
            raise PunaError(f"{folder} is cut for infilling and has no held-out part; prepare it with --held-out 0.05")
        documents.append(Document(name, source, tokenizer.decode(tokens.tolist())))
    return documents


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


def negative_log_likelihood(model: Any, tokens: Sequence[int], window: int) -> float:
    """Sum of -ln p(token | what stands before it) over all tokens but the first, which is only seen.

    Args:
        model: on any device.
        tokens: BOS and the text.
        window: most tokens that the model sees at once; see `windows`.
    """
    import torch
    from torch.nn.functional import cross_entropy

    device = model.lm_head.weight.device
    total = 0.0
    with torch.inference_mode():
        for start, first, stop in windows(len(tokens), window):
            hidden = model.hidden(torch.tensor([tokens[start : stop - 1]], device=device))[0, first - 1 - start :]
            targets = torch.tensor(tokens[first:stop], device=device)
            for some, theirs in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
                total += float(cross_entropy(model.lm_head(some).float(), theirs, reduction="sum"))
    return total


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


def _window(model: Any) -> int:
    return min(WINDOW, model.config.max_position_embeddings)


def _completed(chosen: list[Case], complete: Completer, batch: int) -> list[str]:
    """The model's line for every case; prompts of similar length go together, so that little is padded."""
    order = sorted(range(len(chosen)), key=lambda i: len(chosen[i].prompt))
    lines = [""] * len(chosen)
    with Progress("completing", len(chosen), "lines") as progress:
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            for i, text in zip(some, complete([Ask(chosen[i].prompt) for i in some]), strict=True):
                lines[i] = text.split("\n")[0]
            progress.advance(len(some))
    return lines


def _surprise(model: Any, tokenizer: Any, documents: "Sequence[Document]") -> tuple[float, int, int]:
    """Nats, tokens and bytes of all documents."""
    nats, tokens, size_bytes = 0.0, 0, 0
    with Progress("reading", len(documents), "documents") as progress:
        for document in documents:
            ids = tokenizer.encode(document.text, bos=True)
            nats += negative_log_likelihood(model, ids, _window(model))
            tokens += len(ids) - 1
            size_bytes += len((document.text or "").encode())
            progress.advance()
    return nats, tokens, size_bytes
