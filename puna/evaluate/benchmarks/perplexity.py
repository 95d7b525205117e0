"""Perplexity by context length: how well a model predicts tokens that stand far into a file.

    position in the file     1 … 255   256 … 511   512 … 1023   …        the same documents in every span
    perplexity               exp of the mean loss of the tokens there

Where more context helps, the perplexity falls from span to span; where a model cannot use what lies so far back, it
stays or rises. Only documents of at least `length` tokens are read, and of each no more than that, in one pass; so the
perplexities of two models compare where both read the same tokens, which `tokens_sha256` tells.

Source: Code Llama (arXiv:2308.12950), section 3.3 and Figure 4, which has no numbers; it reads files of 50 kB and more.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from puna.errors import PunaError, UsageError
from puna.evaluate.corpus import unseen_documents
from puna.evaluate.likelihood import losses
from puna.evaluate.stored import computed_in, loaded
from puna.progress import Progress

#: Where the first span ends; each of the others is twice as long as all before it.
FIRST_SPAN = 256

#: By default as long a context is measured as so many documents have tokens for.
ENOUGH = 10


def evaluate(
    *,
    model: Any = None,
    tokenizer: Any = None,
    corpus: Path | str | None = None,
    length: int | None = None,
    max_documents: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Perplexity on files that the model has not seen, by the position of the token in its file.

    Args:
        model: to be scored.
        tokenizer: the model's.
        corpus: a folder of code, or a prepared folder, of which the held-out part is taken where there is one.
        length: tokens of each document that are read; by default the greatest power of two that the model's context
            has room for and `ENOUGH` documents, or all, have.
        max_documents: how many documents are taken, in the order of a hash of seed and id.
        seed: of that order.

    Returns:
        `{"benchmark", "perplexity", "by_position": [{"from", "to", "perplexity", "tokens"}], "documents", "length"}`.
    """
    if model is None:
        raise UsageError("perplexity scores a model; give one")
    documents = unseen_documents("perplexity", corpus, max_documents, seed)
    model, tokenizer = loaded(model, tokenizer, context=length)
    every = [tokenizer.encode(document.text or "", bos=True) for document in documents]
    length = length or _usual_length([len(tokens) for tokens in every], model.config.max_position_embeddings)
    if length > model.config.max_position_embeddings:
        raise UsageError(f"length={length}, but the model's context is {model.config.max_position_embeddings} tokens")
    long_enough = [tokens[:length] for tokens in every if len(tokens) >= length]
    if not long_enough:
        longest = max(map(len, every))
        raise PunaError(f"no document of {corpus} has {length} tokens; the longest has {longest}: choose a --length")
    sums = {span: 0.0 for span in spans(length)}
    with Progress("reading", len(long_enough), "documents") as progress:
        for tokens in long_enough:
            found = losses(model, tokens).double()
            for start, stop in sums:
                sums[start, stop] += float(found[start - 1 : stop - 1].sum())
            progress.advance()
    return {
        "benchmark": "perplexity",
        "perplexity": math.exp(sum(sums.values()) / len(long_enough) / (length - 1)),
        "by_position": [
            {
                "from": start,
                "to": stop - 1,
                "perplexity": math.exp(nats / len(long_enough) / (stop - start)),
                "tokens": len(long_enough) * (stop - start),
            }
            for (start, stop), nats in sums.items()
        ],
        "documents": len(long_enough),
        "length": length,
        "dtype": computed_in(model),
        "seed": seed,
        "corpus": str(corpus),
        "tokens_sha256": hashlib.sha256(json.dumps(long_enough).encode()).hexdigest(),
    }


def spans(length: int) -> list[tuple[int, int]]:
    """Positions 1 (that of the first token behind BOS) to `length` - 1, cut at `FIRST_SPAN` and its doubles."""
    edges = [1]
    edge = FIRST_SPAN
    while edge < length:
        edges.append(edge)
        edge *= 2
    return list(zip(edges, [*edges[1:], length], strict=True))


def _usual_length(lengths: list[int], context: int) -> int:
    enough = sorted(lengths, reverse=True)[min(ENOUGH, len(lengths)) - 1]
    return max(2, 2 ** (min(enough, context).bit_length() - 1))
