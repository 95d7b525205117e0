"""A model that is tuned on dialogs is asked in the layout that it was tuned on, here and elsewhere."""

import json
from pathlib import Path

import pytest
import transformers

import puna
from puna.cli.chat import _template
from puna.prompts import chat_template
from puna.tokenizer import load_tokenizer

DIALOG = [
    {"role": "user", "content": "Write add."},
    {"role": "assistant", "content": "def add(a, b):\n    return a + b"},
    {"role": "user", "content": "Now subtract."},
]


@pytest.fixture(scope="module", params=["vicuna", "codellama"])
def tuned(request: pytest.FixtureRequest, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model that learned plain texts and dialogs from one that ships another layout."""
    place = tmp_path_factory.mktemp(request.param)
    start = place / "start"
    start.mkdir()
    for file in tiny_model_folder.iterdir():
        (start / file.name).write_bytes(file.read_bytes())
    (start / "chat_template.jinja").write_text("{{ 'another' }}")
    messages = [*DIALOG, {"role": "assistant", "content": "def subtract(a, b):\n    return a - b"}]
    (place / "dialogs.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (place / "texts").mkdir()
    (place / "texts" / "a.txt").write_text("some text " * 100)
    puna.prepare("text", place / "texts", place / "plain", tokenizer=start)
    puna.prepare("chat", place / "dialogs.jsonl", place / "chat", tokenizer=start, template=request.param)
    puna.train(
        {
            "model": str(start),
            "data": {"train": {str(place / "plain"): 1.0, str(place / "chat"): 1.0}},
            "sequence_length": 128, "batch_tokens": 256, "steps": 1, "run_dir": str(place / "run"), "device": "cpu",
        }
    )  # fmt: skip
    puna.export(place / "run", place / request.param)
    return place / request.param


def test_it_is_the_layout_of_the_dialogs(tuned: Path) -> None:
    tokenizer, ours = load_tokenizer(tuned), chat_template(tuned.name)
    expected = ours.encode(tokenizer, DIALOG).tokens
    shipped = _template(None, tuned, tokenizer)
    assert shipped.encode(tokenizer, DIALOG).tokens == expected
    assert shipped.stops(tokenizer) == ours.stops(tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tuned)
    assert theirs.apply_chat_template(DIALOG, add_generation_prompt=True, return_dict=False) == expected
