"""What a step takes beside weights and cache."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from puna.generate.engine import Engine
from puna.generate.engine.runner import activation_bytes
from puna.model.config import preset
from puna.model.llama import Llama
from puna.testing import tiny_model


class Allocated(TorchDispatchMode):
    """The bytes of all tensors made meanwhile that are there at a time, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            storage = x.untyped_storage()
            if storage._cdata not in self._known | inputs:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["codellama-7b", "codellama-34b", "codellama-70b"])
def test_a_step_takes_what_is_counted_for_it(name: str, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = Llama(replace(preset(name), num_hidden_layers=2)).to(dtype)
    tokens = torch.zeros(1, 4096, dtype=torch.int64, device="meta")
    with torch.inference_mode(), Allocated() as allocated:
        model.hidden(tokens)
    assert allocated.most == pytest.approx(4096 * activation_bytes(model), rel=0.02)


def test_a_cache_leaves_room_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    step = 500 * activation_bytes(model)
    for free in (step + 100_000, step + 1_000_000):
        monkeypatch.setattr("puna.generate.engine.engine.free_memory_bytes", lambda _, free=free: free)
        cache = Engine(model, step_tokens=500)._runner.cache
        assert cache.keys.nbytes + cache.values.nbytes + step < free
