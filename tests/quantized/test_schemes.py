"""Schemes of quantisation: what a weight loses, and that fast products are those of the dequantised weight."""

import pytest
import torch

from puna.devices import has_fast_bf16
from puna.errors import PunaError, UsageError
from puna.model.config import preset
from puna.quantized import Quantization, model_without_memory, schemes
from puna.quantized.schemes import fp8, int4, int8

GROUP = 64


def group_size_of(scheme):
    return GROUP if scheme.GROUP_SIZES else None


def random_weight(out_features, in_features, seed=0):
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def layer_of(scheme, weight, *, bias=False):
    """A layer that holds `weight`, not yet packed."""
    layer = scheme(weight.shape[1], weight.shape[0], bias, group_size_of(scheme))
    for name, values in scheme.quantize(weight, group_size_of(scheme)).items():
        setattr(layer, name, values)
    if bias:
        torch.nn.init.normal_(layer.bias)
    return layer


@torch.no_grad()
def relative_error(values, true):
    return float((values.float() - true).norm() / true.norm())


@pytest.fixture(params=schemes.names())
def scheme(request):
    return schemes.find(request.param)


# ---- what is stored


def test_what_is_stored_has_the_promised_form(scheme):
    stored = scheme.quantize(random_weight(48, 128), group_size_of(scheme))
    form = scheme.form(48, 128, group_size_of(scheme))
    assert {name: (tuple(values.shape), values.dtype) for name, values in stored.items()} == form


def test_each_row_is_quantised_for_itself(scheme):
    weight = random_weight(6, 128)
    whole = scheme.quantize(weight, group_size_of(scheme))
    for name, values in scheme.quantize(weight[2:3], group_size_of(scheme)).items():
        assert torch.equal(values, whole[name][2:3])


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_a_row_of_one_value_comes_back_exactly(scheme, value):
    weight = torch.full((16, 128), value)
    assert torch.allclose(scheme.dequantize(scheme.quantize(weight, group_size_of(scheme))), weight, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("scheme", "weight"),
    [
        (int8.Linear, torch.arange(-127.0, 1).expand(16, -1) / 4),
        (int4.Linear, (torch.arange(128.0) % 16 - 5).expand(16, -1) / 4),
        (fp8.Linear, torch.tensor([0.0, 448, -3.5, 0.0625]).repeat(16, 32)),
    ],
)
def test_numbers_of_the_format_come_back_exactly(scheme, weight):
    assert torch.equal(scheme.dequantize(scheme.quantize(weight, group_size_of(scheme))), weight)


def test_int8_is_wrong_by_half_a_step_at_most():
    weight = random_weight(64, 256)
    stored = int8.Linear.quantize(weight, None)
    assert ((int8.Linear.dequantize(stored) - weight).abs() <= 0.5001 * stored["weight_scale"].float()).all()


def test_fp8_takes_the_nearest_number_of_the_format():
    x = random_weight(4, 64)
    rounded, scale = fp8.round_rows(x)
    numbers = torch.arange(256, dtype=torch.uint8).view(fp8.FP8).float()
    numbers = numbers[numbers.isfinite()]
    nearest = ((x / scale)[..., None] - numbers).abs().amin(-1)
    assert torch.equal((x / scale - rounded.float()).abs(), nearest)
    assert rounded.float().abs().amax(1).tolist() == [448.0] * 4


def test_no_group_of_int4_is_worse_than_with_its_whole_range():
    weight = random_weight(64, 256).pow(3)  # few large ones among many small
    groups = weight.view(64, -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = ((groups - low) / step).round() * step + low
    best = int4.Linear.dequantize(int4.Linear.quantize(weight, GROUP)).view_as(groups)
    errors, plain_errors = ((values - groups).square().sum(-1) for values in (best, plain))
    assert (errors <= 1.1 * plain_errors).all()  # its scales and zeros have 16 bits
    assert errors.sum() < 0.9 * plain_errors.sum()


def test_smaller_groups_are_nearer():
    weight = random_weight(64, 512)
    errors = [
        relative_error(int4.Linear.dequantize(int4.Linear.quantize(weight, size)), weight) for size in (32, 64, 128)
    ]
    assert errors == sorted(errors)
    assert errors[-1] < 0.1


# ---- products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(128, 192), (48, 128)], ids=str)  # int4's kernels interleave 64 outputs
@pytest.mark.parametrize("rows", [1, 7, 140])
def test_a_product_is_that_of_the_dequantised_weight(scheme, rows, shape, dtype):
    if dtype == torch.bfloat16 and not has_fast_bf16(torch.device("cpu")):
        rows = min(rows, 7)  # slow beyond reason
    layer = layer_of(scheme, random_weight(*shape), bias=True)
    x = torch.randn(rows, shape[1]).to(dtype)
    expected = layer.reference(x)
    layer.pack()
    out = layer(x)
    assert (out.shape, out.dtype) == (expected.shape, dtype)
    assert relative_error(out, expected) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_rows_are_found_in_any_shape(scheme):
    layer = layer_of(scheme, random_weight(64, 128))
    x = torch.randn(2, 128, 3).transpose(1, 2)
    expected = layer.reference(x)
    layer.pack()
    assert layer(x).shape == (2, 3, 64)
    assert relative_error(layer(x), expected) < 1e-5


def test_the_reference_multiplies_the_weight_that_was_quantised():
    """So that the tests above do not compare one mistake with itself."""
    weight, x = random_weight(64, 256), torch.randn(5, 256)
    errors = {
        name: relative_error(layer_of(schemes.find(name), weight).reference(x), x @ weight.t())
        for name in schemes.names()
    }
    assert errors["int8"] < 0.02
    assert errors["fp8"] < 0.06
    assert errors["int4"] < 0.15


@pytest.mark.parametrize(("shape", "is_native"), [((32, 48), True), ((32, 40), False), ((24, 48), False)])
def test_fp8_is_multiplied_by_a_device_where_its_units_take_the_shape(monkeypatch, shape, is_native):
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda device: True)
    layer = layer_of(fp8.Linear, random_weight(*shape))
    layer.pack()
    assert layer._is_native == is_native


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, int8.PACKED_ROWS + 1])
def test_int8_does_without_units_for_it(monkeypatch, rows, dtype):
    monkeypatch.setattr(int8, "has_int8_units", lambda: False)
    layer = layer_of(int8.Linear, random_weight(96, 128))
    x = torch.randn(rows, 128).to(dtype)
    expected = layer.reference(x)
    layer.pack()
    assert layer.weight.layout == torch.strided
    assert relative_error(layer(x), expected) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_int4s_two_products_on_a_cpu_agree(monkeypatch):
    layer = layer_of(int4.Linear, random_weight(256, 128))
    layer.pack()
    x = torch.randn(int4.PACKED_ROWS + 1, 128)
    out = layer(x)
    monkeypatch.setattr(int4, "PACKED_ROWS", len(x))
    assert relative_error(out, layer(x)) < 1e-5


@pytest.mark.skipif(not int4._interleaves(), reason="this CPU's kernels order codes otherwise")
def test_int4_orders_codes_as_torch_does():
    pairs = torch.randint(0, 256, (192, 48), dtype=torch.uint8)
    codes = torch.stack((pairs >> 4, pairs & 15), dim=-1).flatten(1).int()
    assert torch.equal(int4._interleaved(pairs), torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))


def test_int4_does_without_the_order_of_codes_that_it_knows(monkeypatch):
    layer = layer_of(int4.Linear, random_weight(256, 128))
    x = torch.randn(int4.PACKED_ROWS + 1, 128)
    expected = layer.reference(x)
    monkeypatch.setattr(int4, "_interleaves", lambda: False)
    layer.pack()
    assert relative_error(layer(x), expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
@pytest.mark.parametrize("rows", [1, 16, 48, 300])
def test_a_product_on_an_accelerator_is_that_of_the_dequantised_weight(scheme, rows):
    device = torch.accelerator.current_accelerator()
    layer = layer_of(scheme, random_weight(256, 512), bias=True)
    x = torch.randn(rows, 512).bfloat16()
    expected = layer.reference(x)
    layer.to(device).pack()
    assert relative_error(layer(x.to(device)).cpu(), expected) < 1e-2


# ---- which layers


def test_an_unknown_scheme_lists_those_there_are():
    with pytest.raises(UsageError, match="there is no scheme 'int3'; there are fp8, int4, int8"):
        Quantization.of("int3", None, preset("tiny-256"))


@pytest.mark.parametrize(
    ("scheme", "group_size", "message"),
    [
        ("int4", 48, "int4 has no groups of 48; it has 32, 64, 128"),
        ("int4", 128, "groups of 128 do not divide rows of 688 weights, which the model has; take int8"),
        ("int8", 64, "int8 scales whole rows and takes no group size"),
    ],
)
def test_a_group_size_that_does_not_fit_is_refused_with_a_way_out(scheme, group_size, message):
    with pytest.raises(UsageError, match=message):
        Quantization.of(scheme, group_size, preset("tiny-256"))


def test_without_a_group_size_the_first_that_divides_the_rows_is_taken():
    assert Quantization.of("int4", None, preset("codellama-7b")).group_size == int4.Linear.GROUP_SIZES[0]
    assert Quantization.of("int4", None, preset("tiny-512")).group_size == 32  # 1376 = 43 * 32


def test_a_quantisation_comes_back_from_json():
    for quantization in (Quantization("int4", 64, "int8"), Quantization("fp8", None, None)):
        assert Quantization.from_json(quantization.to_json(), "config.json") == quantization


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "gptq"}, "the weights are quantised by 'gptq', which puna does not read"),
        ({"quant_method": "puna", "scheme": "int2"}, "the weights have scheme 'int2'; there are fp8"),
        ({"quant_method": "puna", "scheme": "int4"}, r"the weights have groups of None; int4 has 32, 64, 128"),
    ],
)
def test_weights_in_an_unknown_form_are_refused(fields, message):
    with pytest.raises(PunaError, match=message):
        Quantization.from_json(fields, "config.json")


def test_layers_and_head_are_replaced_norms_and_embedding_are_not():
    config = preset("tiny-512")
    model = model_without_memory(config, Quantization.of("int4", None, config))
    assert isinstance(model.model.layers[3].self_attn.k_proj, int4.Linear)
    assert isinstance(model.model.layers[0].mlp.down_proj, int4.Linear)
    assert isinstance(model.lm_head, int8.Linear)
    assert model.model.embed_tokens.weight.shape == (config.vocab_size, config.hidden_size)
    names = {name.split(".")[-2] for name, _ in model.named_parameters()}
    assert names == {"embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"}
