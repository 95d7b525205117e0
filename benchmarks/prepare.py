"""`puna prepare code` against SentencePiece's own batched encoding of the same texts, on all cores.

The corpus is Python: distinct files of the running interpreter's standard library and of its installed packages, about
50 MB. SentencePiece has the easier task: its texts are in memory and its ids stay there, while puna starts, walks,
reads, filters, removes copies, writes shards and syncs them. Contenders take turns, and the ratio is the median over
rounds, so that whatever else runs on the machine disturbs both alike; processor time is recorded beside.

    python benchmarks/prepare.py --tokenizer FOLDER [--megabytes 50] [--rounds 3]
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
from record import arguments, record
from turns import children_seconds

from puna.files import read_json

#: Peak memory of all processes together that `puna prepare` may take.
MEMORY_GOAL_MB = 500


def main() -> None:
    """Gathers the corpus, lets the contenders take turns and records the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with Llama's tokenizer.model")
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    args = arguments(parser)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as place:
        corpus = Path(place) / "corpus"
        megabytes = gather(corpus, args.megabytes * 1e6) / 1e6
        texts = list(kept_texts(corpus))
        kept = sum(len(text.encode()) for text in texts) / 1e6
        runs: dict[str, list[dict[str, float]]] = {"sentencepiece": [], "puna": []}
        for _ in range(args.rounds):
            runs["sentencepiece"].append(with_sentencepiece(texts, args.tokenizer, cores))
            runs["puna"].append(with_puna(corpus, Path(place) / "out", args.tokenizer))
    best = {name: min(taken, key=lambda run: run["seconds"]) for name, taken in runs.items()}
    speeds = {name: kept / run["seconds"] for name, run in best.items()}
    record(
        "prepare",
        [
            {
                "contender": name,
                "mb_per_second": round(speeds[name], 2),
                "best": best[name],
                "seconds_of_all_rounds": [run["seconds"] for run in runs[name]],
            }
            for name in runs
        ],
        {
            "corpus": {
                "files": len(texts),
                "megabytes": round(kept, 2),
                "megabytes_before_filters": round(megabytes, 2),
            },
            "processes": cores,
            "ratio_to_sentencepiece": round(ratio(runs, "seconds"), 2),
            "ratio_to_sentencepiece_in_processor_time": round(ratio(runs, "processor_seconds"), 2),
            "goal_ratio_to_sentencepiece": 1.0,
            "peak_memory_mb": max(run["peak_memory_mb"] for run in runs["puna"]),
            "goal_peak_memory_mb": MEMORY_GOAL_MB,
        },
    )


def ratio(runs: dict[str, list[dict[str, float]]], seconds: str) -> float:
    """How many times faster puna was, the median over rounds."""
    rounds = zip(runs["sentencepiece"], runs["puna"], strict=True)
    return statistics.median(theirs[seconds] / ours[seconds] for theirs, ours in rounds)


def gather(folder: Path, size: float) -> int:
    """Copies distinct Python files into a folder until they have this many bytes; returns how many they have."""
    taken, seen = 0, set()
    for path in python_files():
        data = path.read_bytes()
        digest = xxhash.xxh3_128_digest(data)
        if not data or digest in seen:
            continue
        seen.add(digest)
        target = folder / f"{len(seen) // 200:04d}" / f"{len(seen):06d}.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        taken += len(data)
        if taken >= size:
            break
    return taken


def python_files() -> Iterator[Path]:
    """Files of the standard library (its tests are data more than code) and of installed packages, in a fixed order."""
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    for path in sorted(library.rglob("*.py")):
        if not {"site-packages", "test", "tests"} & set(path.relative_to(library).parts):
            yield path
    yield from sorted(packages.rglob("*.py"))


def kept_texts(corpus: Path) -> Iterator[str]:
    """The texts that `puna prepare code` keeps, so that both contenders encode the same."""
    from puna.data.corpora import code
    from puna.data.documents import Document, Span

    options = {"languages": None, "max_file_bytes": 1_000_000}
    for span in code.spans(corpus, options):
        if isinstance(span, Span):
            for document in code.read(span, span.load(), options):
                if isinstance(document, Document) and document.text is not None:
                    yield document.text


def with_sentencepiece(texts: list[str], tokenizer: Path, threads: int) -> dict[str, float]:
    """One round of SentencePiece's own batched encoding."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(str(tokenizer / "tokenizer.model"))
    began, processor_began = time.monotonic(), time.process_time()
    tokens = sum(map(len, processor.encode(texts, num_threads=threads)))
    seconds, processor_seconds = time.monotonic() - began, time.process_time() - processor_began
    return {"seconds": round(seconds, 2), "processor_seconds": round(processor_seconds, 2), "tokens": tokens}


def with_puna(corpus: Path, output: Path, tokenizer: Path) -> dict[str, float]:
    """One round of the whole command, from its start to its end, with the memory of all its processes watched."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "puna", "prepare", "code", str(corpus), "-o", str(output)]
    began, processor_began, peak = time.monotonic(), children_seconds(), 0
    with subprocess.Popen([*command, "--tokenizer", str(tokenizer)], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, sum(resident_bytes(pid) for pid in family(process.pid)))
            time.sleep(0.05)
    seconds, processor_seconds = time.monotonic() - began, children_seconds() - processor_began
    if process.returncode:
        raise SystemExit(f"puna prepare failed with exit code {process.returncode}")
    info: dict[str, Any] = read_json(output / "dataset.json")
    tokens = info["tokens"] - 2 * info["documents"]  # without BOS and EOS, which SentencePiece was not asked for
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor_seconds, 2),
        "tokens": tokens,
        "peak_memory_mb": round(peak / 1e6, 1),
    }


def family(pid: int) -> list[int]:
    """A process and its children."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        children = []
    return [pid, *map(int, children)]


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; pages that processes share are counted for each."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    main()
