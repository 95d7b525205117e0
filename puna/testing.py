"""Fakes for tests, of puna and of what is built on it: small, in memory, with the interface of the real thing."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from puna.model.llama import Llama

VOCABULARY = """
import json
from pathlib import Path

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"
HALF = 0.987654 / 2 * (1 << 3)

class Table:
    '''Rows of numbers, each with a name; for example Table({"one": 1, "two": 2.5}).'''

    def __init__(self, rows: dict[str, float]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def write(self, path: Path) -> None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(self.rows, indent=4) + "\\n")

    def largest(self, count: int = 3) -> list[str]:
        # The names of the largest values, the first of equal ones before the others.
        names = sorted(self.rows, key=lambda name: -self.rows[name])
        return names[:count] if count > 0 else []

def bubble_sort(arr):
    n = len(arr)
    for i in range(n):
        for j in range(0, n - i - 1):
            if arr[j] > arr[j + 1]:
                arr[j], arr[j + 1] = arr[j + 1], arr[j]
    return arr

def test_it_sorts():
    assert bubble_sort([3, 1, 2]) == [1, 2, 3] and not bubble_sort([])
    for value in (True, False, None):
        try:
            bubble_sort(value)
        except TypeError as error:
            print(f"refused: {error!r}; 100 % of ~4 & ^5 | `6` @ $7, what else?")
"""  # what tiny models' vocabularies are trained on: every character of ASCII that is printed occurs


class FakeDataset:
    """Documents in memory, with the interface of `puna.data.shards.Dataset`.

    Args:
        documents: the token ids of each document.
        is_target: for each token of each document whether it is to be learnt; None: all are.
        info: what `dataset.json` would say, e.g. {"fill": "whole-documents"}.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        is_target: Sequence[Sequence[bool]] | None = None,
        info: dict[str, Any] | None = None,
    ) -> None:
        self.info = info or {}
        self.lengths = np.array([len(document) for document in documents], dtype=np.int32)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self._tokens = np.array([token for document in documents for token in document], dtype=np.int32)
        self._is_target: NDArray[np.bool_] | None = None
        if is_target is not None:
            self._is_target = np.array([asked for document in is_target for asked in document], dtype=np.bool_)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, start: int, stop: int) -> NDArray[np.int32]:
        """Tokens `start` to `stop` of the documents laid end to end."""
        return self._tokens[start:stop]

    def is_target(self, start: int, stop: int) -> NDArray[np.bool_] | None:
        """Whether each of these tokens is to be learnt; None: all are."""
        return None if self._is_target is None else self._is_target[start:stop]

    def document(self, index: int) -> tuple[str, str, NDArray[np.int32]]:
        """Id, source and tokens of one document."""
        return f"document-{index}", "memory", self._tokens[self.starts[index] : self.starts[index + 1]]


def tiny_model(seed: int = 0, **changes: Any) -> "Llama":
    """A model of the size `tiny-64` with random weights, drawn so wide that it prefers some tokens to others.

    Args:
        seed: of the weights.
        changes: fields of its `ModelConfig`, e.g. `vocab_size=300`.
    """
    from dataclasses import replace

    from puna.model.config import preset
    from puna.model.llama import Llama, init_weights

    model = Llama(replace(preset("tiny-64"), **{"initializer_range": 0.2, **changes}))
    init_weights(model, seed=seed)
    return model


def write_tiny_model(folder: Path | str, seed: int = 0, **changes: Any) -> Path:
    """Writes `tiny_model` with a tokenizer of its own (512 pieces, infilling markers) in Hugging Face layout.

    Args:
        folder: to be made.
        seed: as for `tiny_model`.
        changes: likewise.
    """
    import tempfile

    from puna.checkpoint import save_model
    from puna.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as place:
        tokenizer = train_tokenizer([VOCABULARY], place, vocab_size=512)
        save_model(tiny_model(seed, **changes), folder, tokenizer=tokenizer)
    return Path(folder)


class ScriptedModel:
    """A model that says `script[i]` behind a prompt and i tokens, whatever came before; for all around the network.

    Attributes:
        batch_sizes: rows of each call, in order.
    """

    def __init__(self, script: Sequence[int], *, prompt_tokens: int) -> None:
        """Takes the ids to say, the last one again and again, and the length of every prompt."""
        import torch

        from puna.model.config import preset

        self.config = preset("tiny-64")
        self.compute_dtype = None
        self.lm_head = torch.nn.Linear(self.config.vocab_size, self.config.vocab_size, bias=False)
        torch.nn.init.eye_(self.lm_head.weight)
        self.script = list(script)
        self.batch_sizes: list[int] = []
        self._first = prompt_tokens - 1

    def state_dict(self) -> "dict[str, Tensor]":
        """As of a module."""
        return self.lm_head.state_dict()

    def hidden(
        self,
        tokens: "Tensor",
        *,
        positions: "Tensor | None" = None,
        cache: Any = None,
        wanted: "Tensor | None" = None,
    ) -> "Tensor":
        """One hot at the next id: (B, T, V), or (B, W, V) of wanted tokens."""
        import torch

        self.batch_sizes.append(len(tokens))
        if positions is None:
            positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        positions = positions if wanted is None else positions[:, wanted]
        turns = (positions - self._first).clamp(0, len(self.script) - 1)
        return torch.nn.functional.one_hot(torch.tensor(self.script)[turns], self.config.vocab_size).float()

    def __call__(self, tokens: "Tensor", *, positions: "Tensor | None" = None, cache: Any = None) -> "Tensor":
        """Logits (B, T, V)."""
        return self.lm_head(self.hidden(tokens, positions=positions, cache=cache))


class PeakAnonymousMemory:
    """Watches this process's anonymous memory (what it allocated; mapped files do not count) while a block runs.

    Attributes:
        grown_bytes: the most it grew beyond what there was at the start; known when the block has ended.
    """

    def __init__(self) -> None:
        self.grown_bytes = 0
        self._is_over = threading.Event()

    def __enter__(self) -> Self:
        self._start = self._anonymous_bytes()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._watcher.join()

    def _watch(self) -> None:
        while True:
            is_last = self._is_over.wait(0.002)
            self.grown_bytes = max(self.grown_bytes, self._anonymous_bytes() - self._start)
            if is_last:
                return

    @staticmethod
    def _anonymous_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024


def write_tiny_tasks(path: Path | str, count: int = 4) -> Path:
    """Writes tasks in the form of HumanEval's official file: task `Tiny/3` wants `f3(x)`, which is always 3.

    Args:
        path: of the file; gzipped if its name ends in .gz.
        count: of the tasks.
    """
    import gzip
    import json

    tasks = [
        {
            "task_id": f"Tiny/{i}",
            "prompt": f"def f{i}(x):\n",
            "entry_point": f"f{i}",
            "canonical_solution": f"    return {i}\n",
            "test": f"def check(candidate):\n    assert candidate(2) == {i}\n",
        }
        for i in range(count)
    ]
    content = "".join(json.dumps(task) + "\n" for task in tasks).encode()
    path = Path(path)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path
