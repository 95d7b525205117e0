"""MindFormers' `llama_preprocess.py` step by step, for `old_preprocess.py`; runs in an environment without puna.

    python in_mindformers.py wiki|qa SOURCE OUTPUT TOKENIZER SEQ_LENGTH    ->    one line of JSON, the last on stdout

MindFormers' wheel has the tokenizer that the script used, `LlamaTokenizer`, and not the script. So the steps here are
written after its description: what it calls, how often and on what, one row at a time. Tokenizer and writer of rows are
the real ones.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from mindformers.models.llama.llama_tokenizer import LlamaTokenizer
from mindspore.mindrecord import FileWriter

IDS = {"input_ids": {"type": "int32", "shape": [-1]}}
SCHEMAS = {"wiki": IDS, "qa": {**IDS, "labels": {"type": "int32", "shape": [-1]}}}

IGNORED = -100

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ROLES = {"human": "USER", "gpt": "ASSISTANT"}
END_OF_ROUND = "</s>"
BEFORE_ANSWER = " ASSISTANT: "

#: Rules of cleaning in their order: texts and what replaces them, and patterns of padded brackets and quotation marks.
NUMBERS_AND_SIGNS = [(" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), *((f" {sign} ", f"{sign} ") for sign in ":;.!?,")]
PADDED = [
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
]
REST = [
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \u00b0 ", "\u00b0"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]


def main(kind: str, source: str, output: str, vocabulary: str, seq_length: str) -> dict[str, float]:
    """Writes the rows of a file, and says how long it took from here on."""
    began, processor_began = time.monotonic(), time.process_time()
    writer = FileWriter(file_name=output, shard_num=1)
    writer.add_schema(SCHEMAS[kind], kind)
    tokenizer = LlamaTokenizer(vocab_file=vocabulary)
    tokenizer.add_bos_token = tokenizer.add_eos_token = True
    rows = 0
    for row in {"wiki": wiki_rows, "qa": qa_rows}[kind](tokenizer, source, int(seq_length) + 1):
        writer.write_raw_data([row])
        rows += 1
    writer.commit()
    seconds, processor_seconds = time.monotonic() - began, time.process_time() - processor_began
    return {"rows": rows, "seconds": seconds, "processor_seconds": processor_seconds}


def wiki_rows(tokenizer: Any, source: str, width: int) -> Iterator[dict[str, Any]]:
    """All paragraphs but headings, end to end, in rows; the rest is dropped."""
    ids: list[int] = []
    with open(source, encoding="utf-8") as file:
        for paragraph in cleaned(file.read()).split("\n\n"):
            if paragraph and not paragraph.strip().startswith("="):
                ids += tokenizer(paragraph)["input_ids"]
    for start in range(0, len(ids) - width + 1, width):
        yield {"input_ids": np.array(ids[start : start + width], dtype=np.int32)}


def cleaned(text: str) -> str:
    """A Wikitext file made readable."""
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text.replace("s '", "s'"))
    for spaced, written in NUMBERS_AND_SIGNS:
        text = text.replace(spaced, written)
    for padded, written in PADDED:
        text = re.sub(padded, written, text)
    for spaced, written in REST:
        text = text.replace(spaced, written)
    return text


def qa_rows(tokenizer: Any, source: str, width: int) -> Iterator[dict[str, Any]]:
    """Each dialog a row; all are in memory before the first is given."""
    with open(source, encoding="utf-8") as file:
        prompts = [as_text(record["conversations"]) for record in json.load(file)]
    found = [dialog_row(tokenizer, prompt, width) for prompt in prompts]
    ids, labels = (np.array(column, dtype=np.int32) for column in zip(*found, strict=True))
    for i in range(len(ids)):
        yield {"input_ids": ids[i], "labels": labels[i]}


def as_text(turns: list[dict[str, str]]) -> str:
    """A dialog in Vicuna's layout."""
    text = f"{SYSTEM} "
    for turn in turns if turns[0]["from"] == "human" else turns[1:]:
        role = ROLES[turn["from"]]
        end = END_OF_ROUND if role == "ASSISTANT" else " "
        text += f"{role}: {turn['value']}{end}" if turn["value"] else f"{role}:"
    return text


def dialog_row(tokenizer: Any, text: str, width: int) -> tuple[list[int], list[int]]:
    """Ids and labels of a dialog, of `width` each; each round is tokenised twice and its question once more."""
    rounds = []
    for piece in text.split(END_OF_ROUND):
        if not piece:
            break
        rounds.append(piece)
    row = {"input_ids": [tokenizer.bos_token_id], "attention_mask": [1]}
    for piece in rounds:
        encoded = tokenizer(piece)
        row["input_ids"].extend(encoded["input_ids"][1:])
        row["attention_mask"].extend(encoded["attention_mask"][1:])
    row = tokenizer._pad(row, max_length=width, padding_strategy="max_length")
    labels = np.array(row["input_ids"])
    used = int(np.not_equal(labels, tokenizer.pad_token_id).sum())
    place = 1
    labels[:place] = IGNORED
    for piece in rounds:
        parts = piece.split(BEFORE_ANSWER)
        if len(parts) != 2:
            break
        size = len(tokenizer(piece)["input_ids"]) - 1
        question_size = len(tokenizer(parts[0] + BEFORE_ANSWER)["input_ids"]) - 3
        labels[place : place + question_size] = IGNORED
        place += size
    labels[place:] = IGNORED
    if place >= width:
        labels = labels[:width]
    elif place != used:
        labels[:] = IGNORED
    return row["input_ids"][:width], labels.tolist()


if __name__ == "__main__":
    result = main(*sys.argv[1:])
    print(json.dumps(result))
