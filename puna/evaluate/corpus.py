"""Files that a model has not seen, as a benchmark takes them: a folder of code, the held-out part of a prepared one,
or one file.

Which documents are taken, and in which order, follows from a seed and their ids, not from where they stand: a score on
`max_documents` of them is a score on the same ones wherever it is taken.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from puna.errors import PunaError, UsageError

if TYPE_CHECKING:
    from puna.data.documents import Document


def unseen_documents(benchmark: str, corpus: Path | str | None, most: int, seed: int) -> "list[Document]":
    """The documents that a benchmark scores on.

    Raises:
        UsageError: no corpus is named.
        PunaError: as for `read_documents`.
    """
    if corpus is None:
        raise UsageError(
            f"{benchmark} needs files that the model has not seen: --corpus DIR, a folder of code or prepared"
        )
    return choose_documents(read_documents(Path(corpus)), most, seed)


def read_documents(corpus: Path) -> "list[Document]":
    """The texts of a prepared folder (its held-out part, where there is one), of a folder of code, or of one file.

    Raises:
        PunaError: there is nothing to read, or it is not plain text.
    """
    if corpus.is_file():
        return [_of_file(corpus)]
    prepared = next((folder for folder in (corpus / "held_out", corpus) if (folder / "dataset.json").exists()), None)
    documents = _of_code(corpus) if prepared is None else _of_dataset(prepared)
    if not documents:
        raise PunaError(f"{prepared or corpus} holds no documents to score on")
    return documents


def choose_documents(documents: "Sequence[Document]", most: int, seed: int) -> "list[Document]":
    """The first `most` documents in the order of a hash of seed and id, wherever they stand."""
    return sorted(documents, key=lambda document: document_hash(seed, document))[:most]


def checksum(documents: "Sequence[Document]") -> str:
    """Of documents' ids and texts: what is read from others of the same name does not compare."""
    parts = [f"{document.id}\0{document.text or ''}" for document in documents]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def document_hash(seed: int, document: "Document") -> int:
    """A number that depends on seed, source and id of a document alone."""
    key = f"{seed}\0{document.source}\0{document.id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def _of_file(path: Path) -> "Document":
    from puna.data.documents import Document

    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")  # as in a folder, line ends are the file's own
    except UnicodeDecodeError as error:
        raise PunaError(f"{path} is not UTF-8 text (byte {error.start}); convert it first, e.g. with iconv") from None
    return Document(path.name, path.parent.name, text)


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
