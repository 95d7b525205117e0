"""The Code Llama paper's figures, to stand beside ours: `table` spells them, each benchmark keeps its own.

Source of all: Code Llama: Open Foundation Models for Code (arXiv:2308.12950, version 3).
"""

import re
from collections.abc import Mapping

#: Model, as the paper calls it -> score -> value from 0 to 1.
Figures = Mapping[str, Mapping[str, float]]


def table(columns: str, rows: Mapping[str, str]) -> Figures:
    """Figures from a table in percent, as printed: `table("pass@1 pass@10", {"7B": "33.5 59.6"})`; "-": no figure."""
    names = columns.split()
    return {
        model: {
            name: round(float(value) / 100, 4)
            for name, value in zip(names, values.split(), strict=True)
            if value != "-"
        }
        for model, values in rows.items()
    }


def paper_name(model: str) -> str | None:
    """What the paper calls a published model, by its folder's or hub id's name; None if it is none of them.

    `codellama/CodeLlama-7b-Instruct-hf` is "Instruct 7B".
    """
    found = re.search(r"code-?llama-(7|13|34|70)b(-python|-instruct)?(-hf)?/?$", model, re.IGNORECASE)
    if found is None:
        return None
    size, kind = f"{found[1]}B", (found[2] or "").strip("-").capitalize()
    return f"{kind} {size}".strip()
