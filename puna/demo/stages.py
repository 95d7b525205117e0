"""The stages of the demo: what each does, and what it says.

Every stage returns an `Outcome`: a line for the reader, the commands that do the same, and what the report shows.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import puna
from puna.demo.library import copy_library
from puna.errors import PunaError
from puna.story import Outcome, command

#: What ships for fine-tuning and scoring; written for puna.
DIALOGS = tuple(Path(__file__).parent / name for name in ("dialogs.json", "conversations.json"))
PROBLEMS = Path(__file__).parent / "problems.jsonl"

#: Layout of the dialogs.
TEMPLATE = "codellama"

#: A function that is being completed ends before these.
STOPS = ("\ndef ", "\nclass ", "\n@", "\n#", "\nif ", "\n\n\n")

PROMPTS = (
    'import os\n\n\ndef read_file(path):\n    """Return the text of a file."""\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "def find(self, name, default=None):\n    try:\n",
)

#: (before the gap, behind it)
GAPS = (
    ("def maximum(a, b):\n    if a > b:\n        ", "\n    else:\n        return b\n"),
    ("class Point:\n    def __init__(self, x, y):\n        ", "\n        self.y = y\n"),
)

QUESTIONS = (
    "Write a function that adds two numbers.",
    "Write a function that returns the smaller of two values.",
    "Write a function that counts the letters of a text.",
)


@dataclass(frozen=True)
class Size:
    """How much of everything; smaller for tests."""

    modules: int | None = None
    """Modules of the standard library; None: all."""
    vocab_size: int = 4096
    pretrain: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of the recipe tiny-pretrain."""
    chat: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of the recipe tiny-chat."""
    cases: int = 100
    """Lines that each model is asked for."""
    max_tokens: int = 80
    """Of each completion that is shown."""


class Places:
    """Where everything is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.library = root / "library"
        self.tokenizer = root / "tokenizer"
        self.code, self.dialogs = root / "data" / "code", root / "data" / "dialogs"
        self.pretrain_run, self.chat_run = root / "runs" / "pretrain", root / "runs" / "chat"
        self.random, self.pretrained, self.chat = (root / "models" / name for name in ("random", "pretrained", "chat"))
        self.results, self.report = root / "results.json", root / "report.html"


def cut_library(at: Places, size: Size) -> Outcome:
    """Copies the running Python's standard library, cut between functions, so that a row holds whole pieces."""
    if not at.library.exists():
        copy_library(at.library, modules=size.modules)
    pieces = list(at.library.rglob("*.py"))
    size_mb = sum(path.stat().st_size for path in pieces) / 1e6
    return {
        "said": f"{len(pieces):,} pieces, {size_mb:.1f} MB, of the library of Python {platform.python_version()}",
        "command": f'>>> puna.demo.library.copy_library(Path("{at.library}"))',
    }


def make_tokenizer(at: Places, size: Size) -> Outcome:
    """Trains a SentencePiece vocabulary with Code Llama's infilling markers."""
    from puna.tokenizer import train_tokenizer

    texts = (path.read_text(encoding="utf-8") for path in sorted(at.library.rglob("*.py")))
    tokenizer = train_tokenizer(texts, at.tokenizer, vocab_size=size.vocab_size)
    return {
        "said": f"{tokenizer.vocab_size:,} ids, Code Llama's infilling markers among them",
        "command": f'>>> puna.tokenizer.train_tokenizer(texts, "{at.tokenizer}", vocab_size={size.vocab_size})',
    }


def prepare_code(at: Places) -> Outcome:
    """Encodes the pieces; one in twenty-five, by the hash of its name, is held out."""
    options: dict[str, Any] = {"tokenizer": at.tokenizer, "fim_rate": 0.5, "held_out": 0.04}
    info = puna.prepare("code", at.library, at.code, **options)
    return {
        "said": f"{info['documents']:,} documents, {info['tokens']:,} tokens",
        "command": command("prepare", "code", at.library, o=at.code, **options),
    }


def pretrain(at: Places, size: Size) -> Outcome:
    """Trains on the code, and measures the loss on what was held out."""
    own = {"data.train": str(at.code), "data.valid": str(at.code / "held_out"), "run_dir": str(at.pretrain_run)}
    return _trained("tiny-pretrain", own, size.pretrain)


def export_pretrained(at: Places) -> Outcome:
    """Exports the model, and beside it the random weights that it began with, to compare."""
    from puna.checkpoint import load_config, save_model
    from puna.config import load_recipe
    from puna.model.llama import Llama, init_weights

    if not at.pretrained.exists():
        puna.export(at.pretrain_run, at.pretrained)
    config = load_config(at.pretrained)
    if not at.random.exists():
        model = Llama(config)
        init_weights(model, seed=load_recipe(at.pretrain_run / "recipe.yaml").seed)
        save_model(model, at.random, tokenizer=puna.load_tokenizer(at.tokenizer))
    return {
        "said": f"{at.pretrained} opens in transformers, vLLM and llama.cpp's converter as it is",
        "command": command("export", at.pretrain_run, o=at.pretrained),
        "weights": config.parameter_count,
    }


def prepare_dialogs(at: Places) -> Outcome:
    """Lays out the dialogs that ship with puna; one in ten is held out."""
    options: dict[str, Any] = {"tokenizer": at.tokenizer, "template": TEMPLATE, "held_out": 0.1}
    info = puna.prepare("chat", DIALOGS, at.dialogs, **options)
    return {
        "said": f"{info['documents']:,} dialogs, {info['tokens']:,} tokens, {info['targets']:,} of them answers",
        "command": command("prepare", "chat", *DIALOGS, o=at.dialogs, **options),
    }


def fine_tune(at: Places, size: Size) -> Outcome:
    """Goes on from the exported weights, on the answers alone, and exports the result."""
    own = {
        "start": str(at.pretrained),
        "data.train": str(at.dialogs),
        "data.valid": str(at.dialogs / "held_out"),
        "run_dir": str(at.chat_run),
    }
    outcome = _trained("tiny-chat", own, size.chat)
    if not at.chat.exists():
        puna.export(at.chat_run, at.chat)
    return outcome | {"command": f"{outcome['command']}\n{command('export', at.chat_run, o=at.chat)}"}


def write_samples(at: Places, size: Size) -> Outcome:
    """Asks the models for a few functions; nothing is chosen from several tries."""
    from puna.generate import chat, generate, infill

    samples: list[dict[str, Any]] = []

    def add(title: str, note: str, *parts: tuple[str, str]) -> None:
        samples.append({"title": title, "note": note, "parts": [list(part) for part in parts]})

    model, tokenizer = puna.load(at.pretrained)
    for temperature, how in ((0.0, "the likeliest tokens"), (0.4, "temperature 0.4, seed 0")):
        options: dict[str, Any] = {"max_tokens": size.max_tokens, "temperature": temperature, "stop": STOPS}
        for prompt, completion in zip(PROMPTS, generate(model, tokenizer, PROMPTS, **options), strict=True):
            add("Completes", f"pretrained model, {how}", ("given", prompt), ("written", completion.text))
    for before, behind in GAPS:
        completion = infill(model, tokenizer, before, behind, max_tokens=size.max_tokens, stop=("\n",))
        add("Fills in a line", "pretrained model, the likeliest tokens",
            ("given", before), ("written", completion.text), ("given", behind))  # fmt: skip
    model, tokenizer = puna.load(at.chat)
    for question in QUESTIONS:
        message = {"role": "user", "content": question}
        answer = chat(model, tokenizer, [message], template=TEMPLATE, max_tokens=size.max_tokens)  # type: ignore[list-item]
        add(
            "Answers",
            "fine-tuned model, the likeliest tokens",
            ("given", f"{question}\n\n"),
            ("written", answer.text.strip()),
        )
    lines = [
        command("generate", at.pretrained, PROMPTS[-1], max_tokens=size.max_tokens),
        command("infill", at.pretrained, prefix=GAPS[0][0], suffix=GAPS[0][1], stop="\n"),
        command("chat", at.chat, template=TEMPLATE, temperature=0),
    ]
    return {"said": f"{len(samples)} samples", "command": "\n".join(lines), "samples": samples}


def score_completion(at: Places, size: Size) -> Outcome:
    """Next lines, and bits per byte, of the pieces that were held out."""
    from puna.evaluate import evaluate

    options: dict[str, Any] = {"corpus": at.code, "cases": size.cases}
    models = {"random": at.random, "pretrained": at.pretrained, "chat": at.chat}
    scores = {name: evaluate("completion", str(folder), **options) for name, folder in models.items()}
    before, after = (scores[name]["bits_per_byte"] for name in ("random", "pretrained"))
    return {
        "said": f"bits per byte: {before:.2f} with random weights, {after:.2f} once pretrained (less is better)",
        "command": command("evaluate", "completion", at.pretrained, **options),
        "scores": scores,
    }


def score_problems(at: Places) -> Outcome:
    """Share of a dozen functions that pass their tests; left out where nothing can hold them."""
    from puna.evaluate import evaluate
    from puna.evaluate.sandbox import Sandbox

    shown = command("evaluate", "humaneval", at.pretrained, data=PROBLEMS)
    try:
        with Sandbox():
            pass
    except PunaError as error:
        return {"said": f"left out: {error}", "command": shown, "scores": {}, "sandbox": "none: programs were not run"}
    models = {"pretrained": at.pretrained, "chat": at.chat}
    scores = {name: evaluate("humaneval", str(folder), data=PROBLEMS, max_tokens=80) for name, folder in models.items()}
    solved = {name: score["verdicts"]["passed"] for name, score in scores.items()}
    return {
        "said": f"of {scores['chat']['tasks']} functions, {solved['pretrained']} pass their tests, once fine-tuned "
        f"{solved['chat']}",
        "command": shown,
        "scores": scores,
        "sandbox": scores["chat"]["sandbox"],
    }


def _trained(recipe: str, own: Mapping[str, Any], overrides: Mapping[str, Any]) -> Outcome:
    from puna.train.metrics import read_metrics

    result = puna.train(recipe, {**own, **overrides})
    rate = result["tokens"] / sum(step["seconds"] for step in read_metrics(Path(result["run_dir"])))
    loss = f", held-out loss {result['valid_loss']:.2f}" if "valid_loss" in result else ""
    return {
        "said": f"{result['step']:,} steps, {result['tokens']:,} tokens{loss}",
        "command": command("train", recipe, {**own, **overrides}),
        "tokens": result["tokens"],
        "tokens_per_second": rate,
    }
