"""`puna inspect`: one row as the model sees it, to check with one's own eyes what training reads.

A line per token (its place, document, position, id, piece, and the piece that is asked for after it), then the text of
each document, the part that the model learns to write apart from the part that it only reads:

    place  document  position  token  piece    target  piece
        0         0         0      1  <s>         822  ▁def
        1         0         1    822  ▁def          -

    document 0 · 1207 of data/mine · a/b.py · 213 tokens, 212 targets
     learnt  def main():
"""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puna.cli import app
from puna.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from puna.data.rows import Row, Rows
    from puna.data.shards import Dataset
    from puna.tokenizer import Tokenizer

#: Tokens of a row that is shown where no one says how many.
SEQUENCE_LENGTH = 1024


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A prepared folder.")],
    row: Annotated[int, typer.Option("--row", "-r", help="Number of the row; -1 is the last.")] = 0,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a row.")] = SEQUENCE_LENGTH,
    fill: Annotated[
        str | None, typer.Option(help="end-to-end or whole-documents; default: as DIR was prepared for.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the row as JSON.")] = False,
) -> None:
    """Show a row of a prepared folder as the model sees it.

    A line a token: its document, its position there, its id and text, and the target that it is to foretell.
    """
    from puna.data.rows import open_rows
    from puna.data.shards import Dataset
    from puna.tokenizer import load_tokenizer

    dataset = Dataset.open(folder)
    total = int(dataset.starts[-1])
    if sequence_length > (most := max(total, SEQUENCE_LENGTH)):
        raise UsageError(
            f"--sequence-length {sequence_length} is longer than the {total} tokens of {folder}; use {most} or less"
        )
    rows = open_rows(dataset, sequence_length, fill)
    try:
        row = range(len(rows))[row]
    except IndexError:
        raise UsageError(f"{folder} has no row {row}; there are 0 to {len(rows) - 1}: {rows.summary()}") from None
    tokenizer = load_tokenizer(folder / "tokenizer")
    if as_json:
        print(json.dumps(_as_json(folder, rows, row, dataset, tokenizer), ensure_ascii=False))
    else:
        _print(folder, rows, row, dataset, tokenizer)


def _as_json(folder: Path, rows: "Rows", number: int, dataset: "Dataset", tokenizer: "Tokenizer") -> dict[str, Any]:
    row = rows[number]
    return {
        "folder": str(folder),
        "row": number,
        "rows": len(rows),
        "sequence_length": rows.sequence_length,
        "fill": rows.fill,
        "useful_tokens_share": rows.useful_tokens_share,
        "cut_documents": rows.cut_documents,
        "cut_tokens": rows.cut_tokens,
        "parts": [
            {
                "document": document,
                "id": id,
                "source": source,
                "tokens": len(places),
                "targets": _n_targets(row, places),
            }
            for document, id, source, places in _parts(rows, number, dataset, row)
        ],
        "tokens": row.tokens.tolist(),
        "targets": row.targets.tolist(),
        "documents": row.documents.tolist(),
        "positions": row.positions.tolist(),
        "pieces": [tokenizer.piece(token) for token in row.tokens.tolist()],
    }


def _print(folder: Path, rows: "Rows", number: int, dataset: "Dataset", tokenizer: "Tokenizer") -> None:
    import sys

    from rich.console import Console
    from rich.text import Text

    width = None if sys.stdout.isatty() else 100_000  # in a pipe lines stay whole
    console = Console(highlight=False, markup=False, emoji=False, width=width)
    row = rows[number]
    for line in _token_lines(row, tokenizer):
        console.print(line)
    n_padding = len(row.tokens)
    for part, (document, id, source, places) in enumerate(_parts(rows, number, dataset, row)):
        n_padding -= len(places)
        counts = f"{len(places)} tokens, {_n_targets(row, places)} targets"
        head = _shown(f"document {part} · {document} of {folder} · {id} · {source} · {counts}")
        console.print("\n", Text(head, style=_COLOURS[part % len(_COLOURS)]), sep="")
        for is_learnt, text in _runs(row, places, tokenizer):
            console.print(_labelled(is_learnt, text))
    padding = f"the last {n_padding} tokens are padding; " if n_padding else ""
    console.print(f"\n{padding}row {number} of {rows.summary()}")


#: Documents of a row take these in turn.
_COLOURS = ["cyan", "magenta"]
_LEARNT, _ONLY_READ = "green", "dim"


def _token_lines(row: "Row", tokenizer: "Tokenizer") -> Iterator["Text"]:
    from rich.cells import cell_len
    from rich.text import Text

    from puna.data.rows import IGNORE

    pieces = [_shown(tokenizer.piece(token)) for token in row.tokens.tolist()]
    width = max(map(cell_len, pieces))
    line = "{:>5}  {:>8}  {:>8}  {:>6}  {}  "
    yield Text(
        line.format("place", "document", "position", "token", "piece".ljust(width)) + "target  piece", style="bold"
    )
    columns = (row.documents.tolist(), row.positions.tolist(), row.tokens.tolist(), pieces, row.targets.tolist())
    for place, (document, position, token, piece, target) in enumerate(zip(*columns, strict=True)):
        asked = "     -" if target == IGNORE else f"{target:>6}  {_shown(tokenizer.piece(target))}"
        padded = piece + " " * (width - cell_len(piece))
        read = line.format(place, document, position, token, padded)
        yield Text.assemble((read, _COLOURS[document % len(_COLOURS)]), (asked, _LEARNT))


def _labelled(is_learnt: bool, text: str) -> "Text":
    from rich.text import Text

    label, style = ("learnt", _LEARNT) if is_learnt else ("read", _ONLY_READ)
    indented = text.replace("\n", "\n         ")
    return Text.assemble((f" {label:<6}  ", "bold"), (indented, style))


def _parts(rows: "Rows", number: int, dataset: "Dataset", row: "Row") -> Iterator[tuple[int, str, str, range]]:
    """Number, id and source of each document in a row, and its places there; padding is no document."""
    for part, document in enumerate(rows.document_numbers(number).tolist()):
        id, source, _ = dataset.document(document)
        places = (row.documents == part).nonzero()[0]
        yield document, id, source, range(int(places[0]), int(places[-1]) + 1)


def _runs(row: "Row", places: range, tokenizer: "Tokenizer") -> Iterator[tuple[bool, str]]:
    """The text of a document in pieces that are learnt, or only read, as a whole."""
    for is_learnt, run in groupby(places, key=lambda place: _is_learnt(row, place)):
        tokens = [row.tokens[place].item() for place in run]
        yield is_learnt, _spelled(tokens, tokenizer)


def _is_learnt(row: "Row", place: int) -> bool:
    from puna.data.rows import IGNORE

    return row.positions[place] > 0 and row.targets[place - 1] != IGNORE


def _n_targets(row: "Row", places: range) -> int:
    from puna.data.rows import IGNORE

    return int((row.targets[places.start : places.stop] != IGNORE).sum())


def _spelled(tokens: list[int], tokenizer: "Tokenizer") -> str:
    """The text of the tokens, with control tokens by their names."""
    runs = [(is_control, list(run)) for is_control, run in groupby(tokens, key=tokenizer.control.__contains__)]
    text = "".join(
        "".join(map(tokenizer.piece, run)) if is_control else tokenizer.decode(run, leading_space=False)
        for is_control, run in runs
    )
    return "\n".join(map(_shown, text.split("\n")))


def _shown(text: str) -> str:
    """The text with unprintable characters spelled out, so that data cannot steer the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
