"""Decoding steps of a CPU that are recorded: the same tokens as without, and none where something else is computed."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from puna.checkpoint import load, quantize, save_model
from puna.generate import Completion, Sampling
from puna.generate.engine import Engine
from puna.generate.engine.graphs import MOST_ROWS_ON_CPU, SHORTEST_TABLE, RecordedSteps
from puna.generate.engine.scheduler import Scheduler
from puna.model.layer_kernel import kernel
from puna.model.llama import Llama
from puna.parallel.inference import SummedEmbedding
from puna.quantized.kernel import kernel as quantized_kernel
from puna.testing import tiny_model

pytestmark = pytest.mark.skipif(
    kernel() is None or quantized_kernel() is None, reason="no AVX-512 BF16 and VNNI, or no C compiler"
)

PROMPTS = [[1, *range(5, 5 + n)] for n in (1, 40, 7, 90, 3, 20, 11, 2, 5, 30, 9)]
SAMPLINGS = [Sampling(max_tokens=6 + 3 * i, ignore_eos=True, temperature=i % 2, seed=i) for i in range(len(PROMPTS))]

#: Fields of a config.
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Llama]:
    """A tiny model in bf16 as it is loaded for inference, maybe quantised by a scheme, with changes of its config."""

    def loaded(scheme: str | None = None, **changes: Any) -> Llama:
        folder = tmp_path_factory.mktemp("models")
        save_model(tiny_model(head_dim=64, intermediate_size=192, **changes).bfloat16(), folder / "model")
        if scheme is not None:
            quantize(folder / "model", folder / scheme, scheme=scheme)
        return load(folder / (scheme or "model"), for_inference=True)[0]

    return loaded


def completions(model: Llama, *, is_recorded: bool = True, **options: Any) -> tuple[list[Completion], Any]:
    """Of all prompts, some at a time; and the recorded steps, which may be kept from being used."""
    engine = Engine(model, cache_tokens=2000, block_tokens=4, max_rows=MOST_ROWS_ON_CPU + 1, step_tokens=33, **options)
    graphs = engine._runner._graphs
    if not is_recorded:
        engine._runner._graphs = None
    return engine.generate(PROMPTS, SAMPLINGS), graphs


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["plain", "tied"])
def test_they_give_the_tokens_of_others(
    loaded: Callable[..., Llama], scheme: str | None, changes: dict[str, Any]
) -> None:
    model = loaded(scheme, **changes)
    found, graphs = completions(model)
    assert found == completions(model, is_recorded=False)[0]
    assert len({rows for rows, *_ in graphs._graphs}) == MOST_ROWS_ON_CPU
    assert len({width for _, width, _ in graphs._graphs}) == 2, f"tables longer than {SHORTEST_TABLE} blocks"


def test_a_sequence_that_gave_its_blocks_up_is_seen_in_its_new_ones(
    loaded: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sampling = loaded(), Sampling(max_tokens=50, ignore_eos=True)
    prompts = [[1, *range(5 + n, 5 + 2 * n)] for n in (9, 20, 14, 6)]
    given_up, preempt = [], Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self, one: given_up.append(one) or preempt(self, one))
    found, expected = [], []
    for completions, is_recorded in ((found, True), (expected, False)):
        engine = Engine(model, cache_tokens=140, block_tokens=4)
        engine._runner._graphs = engine._runner._graphs if is_recorded else None
        completions += engine.generate(prompts, sampling)
    assert given_up
    assert found == expected


def test_biases_of_packed_layers_are_recorded(loaded: Callable[..., Llama]) -> None:
    model = loaded(**BIASES)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    found, graphs = completions(model)
    assert graphs is not None
    assert found == completions(model, is_recorded=False)[0]


def test_a_draft_model_has_its_own(loaded: Callable[..., Llama]) -> None:
    model = loaded("int4")
    engine = Engine(model, draft=loaded("int8"), cache_tokens=2000)
    prompts, sampling = PROMPTS[:3], Sampling(max_tokens=30, ignore_eos=True)
    found = engine.generate(prompts, sampling)
    assert isinstance(engine._drafter._runner._graphs, RecordedSteps)
    engine = Engine(model, draft=loaded("int8"), cache_tokens=2000)
    engine._runner._graphs = engine._drafter._runner._graphs = None
    assert found == engine.generate(prompts, sampling)


def test_a_recorded_step_writes_over_no_memory_of_others(loaded: Callable[..., Llama]) -> None:
    engine = Engine(loaded(), cache_tokens=200)
    graph = engine._runner._graphs._graphs[1, SHORTEST_TABLE, False]
    with torch.inference_mode():
        others = [torch.full((n,), 7.0) for n in (16, 64, 256, 512, 1024) for _ in range(50)]
        graph.graph.replay()
    assert all((other == 7).all() for other in others)


class Adapter(nn.Module):
    """A layer, and a product of low rank beside it."""

    def __init__(self, layer: nn.Module, n_in: int, n_out: int) -> None:
        super().__init__()
        self.layer, self.down, self.up = layer, torch.zeros(n_in, 8).bfloat16(), torch.zeros(8, n_out).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.layer(x) + x @ self.down @ self.up


@pytest.mark.parametrize("kind", ["cache in 8 bits", "biases beside codes", "adapter", "not packed", "fp32"])
def test_where_something_else_is_computed_there_are_none(loaded: Callable[..., Llama], kind: str) -> None:
    options = {"cache_dtype": "int8"} if kind == "cache in 8 bits" else {}
    model = loaded("int8", **BIASES) if kind == "biases beside codes" else loaded()
    if kind == "adapter":
        model.model.layers[1].self_attn.o_proj = Adapter(model.model.layers[1].self_attn.o_proj, 256, 64)
    if kind in ("not packed", "fp32"):
        model = tiny_model(head_dim=64)
        model = model.bfloat16() if kind == "not packed" else model
    found, graphs = completions(model, **options)
    assert graphs is None
    assert [len(each.tokens) for each in found] == [sampling.max_tokens for sampling in SAMPLINGS]


def test_for_a_rank_that_has_a_part_of_the_model_there_are_none(loaded: Callable[..., Llama]) -> None:
    model, group = loaded(), SimpleNamespace(rank=lambda: 0, size=lambda: 2)  # nothing is asked of other ranks
    model.model.embed_tokens = SummedEmbedding(model.model.embed_tokens, group)
    assert Engine(model, cache_tokens=200)._runner._graphs is None
