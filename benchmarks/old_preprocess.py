"""`puna prepare wikitext` and `chat` against MindFormers' `llama_preprocess.py`, which they replace, on the same files.

The old script is not in MindFormers' wheel; its tokenizer is. So `in_mindformers.py` takes the script's steps around
the real `LlamaTokenizer` of MindFormers 1.3.2 and the real FileWriter of MindSpore, in an environment of its own, where
both are installed (800 MB) if they are not there yet. With `--fixtures`, rows that the real script once wrote are held
against those of the steps. In any case both must give the same ids; the old tokenizer takes a `<unk>` in a text for a
control token, so Wikitext's ids are compared on a copy with another word there. Contenders take turns. Timed are the
whole command and the work alone, on the clock and in processor time of all processes; ratios are medians over the
rounds.

    python benchmarks/old_preprocess.py --wikitext wiki.train.tokens --alpaca code_alpaca_2k.json
        --tokenizer tokenizer.model [--fixtures DIR] [--venv DIR] [--rounds 3]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from real_mindspore import installed
from record import arguments, compile_puna, record
from turns import children_seconds

from puna.data.mindrecord import MindRecord
from puna.data.prepare import prepare
from puna.data.shards import Dataset
from puna.files import read_any_json, write_json
from puna.prompts import alpaca_prompt

#: Of the packages that the old script's steps run with.
VERSIONS = {"mindspore": "2.7.2", "mindformers": "1.3.2"}

#: How many times faster than the old tool puna should be.
GOAL = 20

IGNORED = -100

#: What is timed: the whole command, and the work alone without start and imports; each also in processor time.
KINDS = ("seconds", "processor_seconds", "work_seconds", "work_processor_seconds")

_WORK = """
import json, resource, sys, time
from puna.data.prepare import prepare
import puna.tokenizer.sentence_piece
def spent():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
began, processor_began = time.monotonic(), spent()
prepare(sys.argv[1], sys.argv[2], sys.argv[3], tokenizer=sys.argv[4], **json.loads(sys.argv[5]))
print(time.monotonic() - began, spent() - processor_began)
"""


def main() -> None:
    """Checks, measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--alpaca", type=Path, required=True, help="a list of Alpaca records")
    parser.add_argument("--tokenizer", type=Path, required=True, help="Llama's tokenizer.model")
    parser.add_argument("--fixtures", type=Path, help="what the real script wrote: preprocess/ and tokenizer/")
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "mindspore-venv")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq-length", type=int, default=4096)
    args = arguments(parser)
    python = installed(args.venv, **VERSIONS)
    compile_puna()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        facts: dict[str, Any] = {**VERSIONS, "goal_ratio": GOAL}
        if args.fixtures:
            facts["rows_of_the_real_script"] = steps_are_the_scripts(python, args.fixtures, place)
        conversations = place / "conversations.json"
        write_json(conversations, converted(read_any_json(args.alpaca)))
        works = {
            "wikitext": ("wiki", args.wikitext, args.wikitext, {}),
            "chat": ("qa", conversations, args.alpaca, {"template": "vicuna"}),
        }
        facts["ids, wikitext"] = same_texts(python, args, place)
        rows = []
        for kind, (old_kind, old_source, source, options) in works.items():
            rounds = []
            for i in range(args.rounds):
                old = with_mindformers(
                    python, old_kind, old_source, place / f"{kind}-{i}", args.tokenizer, args.seq_length
                )
                rounds.append((old, with_puna(kind, source, place / f"{kind}-{i}.puna", args.tokenizer, options)))
            rows += summaries(kind, source, rounds)
            for name in KINDS:
                facts[f"ratio, {kind}, {name}"] = round(
                    statistics.median(old[name] / new[name] for old, new in rounds), 1
                )
        facts["ids, chat"] = same_dialogs(place / "chat-0", place / "chat-0.puna")
    record("old_preprocess", rows, facts)


def converted(records: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Alpaca records as `alpaca_converter.py` hands them to the old script."""
    return [
        {
            "id": str(number),
            "conversations": [
                {"from": "human", "value": alpaca_prompt(record["instruction"], record["input"])},
                {"from": "gpt", "value": record["output"]},
            ],
        }
        for number, record in enumerate(records, 1)
    ]


def steps_are_the_scripts(python: Path, fixtures: Path, place: Path) -> str:
    """Holds rows that the real script wrote against those of the steps; says how many are equal."""
    texts, tokenizer = fixtures / "preprocess", fixtures / "tokenizer/tokenizer.model"
    equal = 0
    for kind, source, length, name in (
        ("wiki", "wiki.train.tokens", 128, "wiki128_rows"),
        ("qa", "code_alpaca_tiny_conversation.json", 512, "qa512_rows"),
        ("qa", "multi_turn_conversation.json", 256, "multi_turn256_rows"),
    ):
        with_mindformers(python, kind, texts / source, place / name, tokenizer, length)
        found, expected = list(MindRecord.open(place / name).rows()), np.load(texts / f"{name}.npz")
        if not all(np.array_equal([row[column] for row in found], expected[column]) for column in expected.files):
            sys.exit(f"{name}: the steps do not give the rows of the real script")
        equal += len(found)
    return f"{equal} of {equal} are those of the steps"


def same_texts(python: Path, args: argparse.Namespace, place: Path) -> str:
    """Makes sure that both give the same ids for Wikitext without `<unk>`; says how many."""
    source = place / "plain.tokens"
    source.write_text(args.wikitext.read_text(encoding="utf-8").replace("<unk>", "unknown"), encoding="utf-8")
    with_mindformers(python, "wiki", source, place / "plain", args.tokenizer, args.seq_length)
    prepare("wikitext", source, place / "plain.puna", tokenizer=args.tokenizer)
    dataset = Dataset.open(place / "plain.puna")
    ids = np.concatenate([row["input_ids"] for row in MindRecord.open(place / "plain").rows()])
    if not np.array_equal(dataset.tokens(0, len(ids)), ids) or int(dataset.starts[-1]) - len(ids) > args.seq_length:
        sys.exit("puna prepare wikitext gives other ids than the old script")
    return f"all {len(ids):,} of the old script's rows are equal"


def same_dialogs(old: Path, new: Path) -> str:
    """Makes sure that both give the same ids for dialogs, but for those that the old script masks; says how many."""
    dataset, rows = Dataset.open(new), list(MindRecord.open(old).rows())
    dialogs = {int(dataset.document(i)[0].rpartition(":")[2]): dataset.document(i)[2] for i in range(len(dataset))}
    kept = {number: row["input_ids"] for number, row in enumerate(rows, 1) if np.any(row["labels"] != IGNORED)}
    for number, row in kept.items():
        ids = dialogs[number][: len(row)]
        if not np.array_equal(ids, row[: len(ids)]) or row[len(ids) :].any():
            sys.exit(f"dialog {number} of {new} has other ids than the old script's")
    return f"equal in all {len(kept):,} dialogs of the old script; puna has {len(dialogs):,}"


def with_mindformers(
    python: Path, kind: str, source: Path, output: Path, tokenizer: Path, length: int
) -> dict[str, float]:
    """One round of the old script's steps."""
    script = Path(__file__).with_name("in_mindformers.py")
    words = [python, script, kind, source, output, tokenizer, length]
    printed, whole = run(words)
    found = json.loads(printed.splitlines()[-1])
    return {**whole, "work_seconds": found["seconds"], "work_processor_seconds": found["processor_seconds"]}


def with_puna(kind: str, source: Path, output: Path, tokenizer: Path, options: dict[str, Any]) -> dict[str, float]:
    """One round of the whole command, and one of the work alone."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    words = [sys.executable, "-m", "puna", "prepare", kind, source, "-o", output, "--tokenizer", tokenizer, *flags]
    _, whole = run(words)
    alone = output.with_name(f"{output.name}.alone")
    printed, _ = run([sys.executable, "-c", _WORK, kind, source, alone, tokenizer, json.dumps(options)])
    seconds, processor_seconds = map(float, printed.split())
    return {**whole, "work_seconds": seconds, "work_processor_seconds": processor_seconds}


def run(words: list[Any]) -> tuple[str, dict[str, float]]:
    """What a command prints, and the seconds that it takes, on the clock and of processors."""
    began, before = time.monotonic(), children_seconds()
    result = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{words[1:4]} failed:\n{result.stderr[-3000:]}")
    return result.stdout, {"seconds": time.monotonic() - began, "processor_seconds": children_seconds() - before}


def summaries(work: str, source: Path, rounds: list[tuple[dict[str, float], dict[str, float]]]) -> list[dict[str, Any]]:
    """A row of the result for each of the two: medians over the rounds, and the quickest round."""
    rows = []
    for contender, taken in zip(("llama_preprocess.py", "puna prepare"), zip(*rounds, strict=True), strict=True):
        medians = {name: round(statistics.median(found[name] for found in taken), 3) for name in KINDS}
        best = {f"least_{name}": round(min(found[name] for found in taken), 3) for name in ("seconds", "work_seconds")}
        megabytes = round(source.stat().st_size / 1e6, 2)
        rows.append({"work": work, "contender": contender, "megabytes": megabytes, **medians, **best})
    return rows


if __name__ == "__main__":
    main()
