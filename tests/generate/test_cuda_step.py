"""A step in few kernels against the model's modules, on the CPU by Triton's interpreter, on a GPU as it is."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.checkpoint import load, quantize, save_model
from puna.devices import multiplies_fp8
from puna.generate import Sampling, complete
from puna.generate.engine import Engine
from puna.generate.engine.cache import PagedCache, Seen, Step
from puna.generate.engine.network import ByModules, Network
from puna.model.attention import Span
from puna.model.llama import Linear, Llama, RMSNorm, rotate
from puna.quantized.schemes import fp8, int8
from puna.testing import tiny_model
from tests.triton_interpreter import interpret, needs_triton

#: Fields of a config.
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "a head each": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def with_biases(**changes: Any) -> Llama:
    """A tiny model whose biases, where it has any, are not zeros."""
    model = tiny_model(**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    return model


def compute(model: Llama, network: Network, kept_in: torch.dtype, *, has_prompt: bool) -> list[Tensor]:
    """Logits of three sequences' newest tokens and all that is kept then, in a pool of random keys and values.

    There may be 70 tokens of a prompt beside them, behind 5 that are kept, of which the last is asked for.
    """
    device, computed_in = model.lm_head.weight.device, model.compute_dtype or model.model.embed_tokens.weight.dtype
    cache = PagedCache(model.config, 12, 16, dtype=kept_in, device=device)
    generator = torch.Generator().manual_seed(0)
    for storage in (cache.keys, cache.values):
        random = torch.randn(storage.numbers.shape[:-1].numel(), *storage.numbers.shape[-1:], generator=generator)
        for index in range(len(storage.numbers)):
            layer = storage[index].flatten()
            n = len(layer.numbers)
            rows = random.view(*storage.numbers.shape)[index].flatten(0, 1).to(device, computed_in)
            layer.write(torch.arange(n, device=device), rows)
    on_device = partial(torch.tensor, device=device)
    ids, positions, slots = [5, 9, 17], [20, 0, 33], [68, 112, 81]
    tables = on_device([[3, 4, 0], [7, 0, 0], [1, 2, 5]], dtype=torch.int32)
    seen, others, wanted = on_device([place + 1 for place in positions], dtype=torch.int32), [], None
    if has_prompt:
        places = [block * 16 + place for block in (6, 8, 9, 10, 11) for place in range(16)][:75]
        ids, positions, slots = ids + list(range(70)), positions + list(range(5, 75)), slots + places[5:]
        others, wanted = [Seen(on_device(places), [Span(0, 70, 0, 75)])], on_device([0, 1, 2, 72])
    cache.step = Step(on_device(slots), 3, (tables, seen), None, others)
    with torch.inference_mode():
        logits = network.head(network.hidden(on_device(ids), on_device(positions), cache, wanted))
    assert len(logits) == (4 if has_prompt else 3)
    return [logits, *(storage.read(torch.float32) for storage in (cache.keys, cache.values))]


def compare(model: Llama, kept_in: torch.dtype, tolerance: float) -> None:
    from puna.generate.engine.cuda_step import CudaStep

    for has_prompt in (False, True):
        networks = ByModules(model), CudaStep(model)
        expected, found = (compute(model, network, kept_in, has_prompt=has_prompt) for network in networks)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape
            assert (one - other).float().norm() <= tolerance * other.float().norm()


def compare_kernels() -> None:
    """What stands around products, for sizes that are no powers of two."""
    from puna.generate.engine.rotary_kernel import rotate_and_keep
    from puna.quantized.few_rows_kernel import multiply
    from puna.quantized.rows_kernel import norm_rows, round_rows

    torch.manual_seed(0)
    x, weights = torch.randn(3, 300).half(), [torch.randn(n, 300).div(20).half() for n in (70, 33, 40)]
    norm = RMSNorm(300, 1e-5)
    norm.weight.data = torch.rand(300).half()
    residual = torch.randn(3, 143).half()
    with torch.inference_mode():
        q, k, v = (F.linear(norm(x).double(), weight.double()) for weight in weights)
        found = multiply(x, weights, norm=norm.weight, eps=norm.eps, residual=residual)
        _assert_near(found, torch.cat([q, k, v], dim=1) + residual)
        found = multiply(x, [weights[0], weights[0].flip(0)], norm=norm.weight, eps=norm.eps, is_gated=True)
        _assert_near(found, F.silu(q) * q.flip(1))
        _assert_near(norm_rows(x, norm.weight, norm.eps), norm(x))
        _, scales = round_rows(x, norm.weight, norm.eps)
        _assert_near(scales, fp8.round_rows(norm(x))[1].view(-1))

    heads, pools, slots = torch.randn(3, 8, 24).half(), torch.zeros(2, 50, 2, 24).half(), torch.tensor([5, 49, 0])
    cos, sin = torch.rand(2, 3, 12).repeat(1, 1, 2)
    expected = rotate(heads[None], cos[None, :, None], sin[None, :, None])[0]
    turned, turned_in_place = heads.clone(), heads.clone()
    rotate_and_keep(turned, cos, sin, 4, tuple(pools), slots)
    _assert_near(turned[:, :4], expected[:, :4])
    _assert_near(pools[0][slots], expected[:, 4:6])
    assert torch.equal(pools[1][slots], heads[:, 6:])
    assert int((pools != 0).sum()) == 2 * slots.numel() * 2 * 24
    rotate_and_keep(turned_in_place, cos, sin, 4, None, slots)
    _assert_near(turned_in_place, torch.cat([expected[:, :6], heads[:, 6:]], dim=1))


def _assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 2e-3 * expected.norm()


@needs_triton
def test_its_kernels_interpreted_compute_what_modules_do() -> None:
    interpret("tests.generate.test_cuda_step.compare_all()")


def compare_all() -> None:
    """Not in bf16, whose bits the interpreter's products take for integers, nor in fp8, whose last bits it loses."""
    compare_kernels()
    for changes in MODELS.values():
        model = with_biases(**changes).half()
        compare(model, torch.float16, 5e-3)
    compare(model, torch.int8, 2e-2)
    cast = tiny_model()
    cast.compute_dtype = torch.float16
    compare(cast, torch.float16, 5e-3)
    compare(_in_int8(tiny_model().half()), torch.float16, 5e-3)


def _in_int8(model: Llama) -> Llama:
    """The same with codes, as they lie on a CUDA device."""
    for owner in list(model.modules()):
        for name, linear in list(owner.named_children()):
            if isinstance(linear, Linear):
                codes = int8.Linear(linear.in_features, linear.out_features, False, None)
                codes.load_state_dict(int8.Linear.quantize(linear.weight.float(), None))
                setattr(owner, name, codes)
    model.compute_dtype = torch.float16
    return model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Llama]:
    """A tiny model in bf16 on the GPU, as it is loaded for inference, maybe quantised by a scheme."""

    def loaded(scheme: str | None, *, dtype: str | None = None, **changes: Any) -> Llama:
        folder = tmp_path_factory.mktemp("models")
        save_model(with_biases(head_dim=64, hidden_size=128, intermediate_size=192, **changes).bfloat16(), folder / "m")
        if scheme is not None:
            quantize(folder / "m", folder / scheme, scheme=scheme)
        return load(folder / (scheme or "m"), device="cuda", dtype=dtype, for_inference=True)[0]

    return loaded


def _skip_unless_known(*dtypes: str | None) -> None:
    if "fp8" in dtypes and not multiplies_fp8(torch.device("cuda")):
        pytest.skip("needs a device that knows fp8 numbers")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kept_in", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("scheme", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_on_a_gpu_it_computes_what_modules_do(
    loaded: Callable[..., Llama], changes: dict[str, Any], scheme: str | None, kept_in: torch.dtype
) -> None:
    _skip_unless_known(scheme)
    compare(loaded(scheme, **changes), kept_in, 3e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_computes_in_fp16_too(loaded: Callable[..., Llama]) -> None:
    compare(loaded(None, dtype="fp16"), torch.float16, 3e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scheme", [None, "int8", "fp8"])
def test_an_engine_on_a_gpu_gives_the_probabilities_of_the_loop(
    loaded: Callable[..., Llama], scheme: str | None
) -> None:
    _skip_unless_known(scheme)
    model, prompts = loaded(scheme), [[1, *range(5 + n, 5 + 2 * n)] for n in (1, 40, 7, 90, 60)]
    sampling = Sampling(max_tokens=8, ignore_eos=True, logprobs=512)
    found = Engine(model, cache_tokens=2000).generate(prompts, sampling)
    expected = complete(model, None, prompts, sampling)
    for one, other in zip(found, expected, strict=True):
        for here, there in zip(one.logprobs, other.logprobs, strict=True):
            ids = here.likeliest.keys()
            assert ids == there.likeliest.keys()
            assert max(abs(here.likeliest[id] - there.likeliest[id]) for id in ids) < 0.1
            if here.chosen != there.chosen:  # two are alike but for rounding, and from here on texts differ
                break
