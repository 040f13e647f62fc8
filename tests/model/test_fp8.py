from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model import EMATeacher, FreezeConfig, ModelConfig, ScenarioCLIP, TextConfig, VisionConfig
from scenarioclip_fast.model import fp8 as fp8_module
from scenarioclip_fast.model.encoders import Linear, VisionEncoder
from scenarioclip_fast.model.fp8 import E4M3, Float8Linear, product, quantize, requantize, use_fp8

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def small(freeze: FreezeConfig | None = None, width: int = 32) -> ScenarioCLIP:
    return ScenarioCLIP(
        ModelConfig(
            embed_dim=16,
            vision=VisionConfig(image_size=32, patch_size=16, width=width, layers=3, heads=2),
            text=TextConfig(context_length=8, vocab_size=31, width=16, layers=3, heads=2),
            freeze=freeze or FreezeConfig(vision_blocks=1, text_blocks=2),
        )
    )


def convert(model: ScenarioCLIP, mode: Any, teacher: EMATeacher | None = None) -> int:
    averaged = [] if teacher is None else list(teacher.encoders.values())
    return use_fp8([*model.encoders(), *averaged], [p for p in model.parameters() if not p.requires_grad], mode)


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def test_rows_are_quantised_to_their_largest_magnitude() -> None:
    x = torch.randn(64, 96) * torch.logspace(-20, 20, 64)[:, None]
    values, scale = quantize(x)
    assert values.dtype == E4M3 and values.shape == x.shape and scale.shape == (64, 1)
    assert torch.equal(values.float().abs().amax(1), torch.full((64,), 448.0))
    # E4M3 has 4 significant bits (half a unit is 2^-4 of the value), and below 2^-6 steps of 2^-9.
    error = (values.float() * scale - x).abs()
    assert (error <= x.abs() * 2**-4 * 1.001 + scale * 2**-10).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_rows(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([[0.0, 0.0], [largest, -largest], [1e-38, 0.0], [449.0, 1e9]], dtype=dtype)
    values, scale = quantize(x)
    assert values.float().isfinite().all() and scale.isfinite().all()
    assert not values[0].float().any()
    torch.testing.assert_close(values[1].float() * scale[1], x[1].float(), rtol=1e-6, atol=0)
    empty, no_scale = quantize(x[:0])
    assert empty.shape == (0, 2) and no_scale.shape == (0, 1)


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_non_finite_values_reach_the_output_of_their_row(bad: float) -> None:
    linear = Float8Linear(Linear(32, 16), fp8_gradient=True)
    x = torch.randn(3, 32)
    x[1, 5] = bad
    y = linear(x)
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    linear = Float8Linear(Linear(32, 16), fp8_gradient=True)
    x = torch.randn(4, 32)
    torch.testing.assert_close(linear(torch.cat([x, 1e6 * x]))[:4], linear(x), rtol=2**-8, atol=0)  # order of sums


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch multiplies FP8 rows on a CPU since 2.13")
def test_the_emulation_equals_torch() -> None:
    x, weight, bias = quantize(torch.randn(5, 64)), quantize(torch.randn(48, 64)), torch.randn(48).bfloat16()
    args = x[0], weight[0].t(), x[1], weight[1].t()
    expected = torch._scaled_mm(*args, bias=bias, out_dtype=torch.bfloat16)
    # Sums in another order, and the rounding to bfloat16, 2^-8.
    torch.testing.assert_close(product(x, weight, bias, fast_sum=True), expected, rtol=2**-7, atol=1e-2)


@pytest.mark.gpu
def test_the_emulation_equals_tensor_cores() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    x, weight, bias = quantize(torch.randn(300, 768)), quantize(torch.randn(256, 768)), torch.randn(256)
    expected = product(x, weight, bias, fast_sum=True).float()
    moved = [(values.cuda(), scale.cuda()) for values, scale in (x, weight)]
    for fast_sum in (False, True):
        y = product(*moved, bias.cuda(), fast_sum).cpu().float()  # type: ignore[misc, arg-type]
        # Hopper sums in 14 bits; outputs have a standard deviation of 28.
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=0.3)


@pytest.mark.parametrize("fp8_gradient", [False, True])
def test_outputs_and_gradients_are_close_to_bfloat16(fp8_gradient: bool) -> None:
    exact = Linear(96, 64)
    found = []
    for linear in (exact, Float8Linear(exact, fp8_gradient)):
        x = torch.randn(2, 50, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
        exact.zero_grad()
        with bf16():
            y = linear(x)
            part = linear.parts([x[:, 0]] * 3, [16, 32, linear.out_features - 48])[1]
        assert y.dtype == part.dtype == torch.bfloat16
        weights = torch.randn(64, generator=torch.Generator().manual_seed(2))
        ((y * weights).sum() + part.square().sum()).backward()
        assert exact.weight.grad is not None and exact.bias.grad is not None and x.grad is not None
        found.append([y, part, x.grad, exact.weight.grad.clone(), exact.bias.grad.clone()])
    for name, a, b in zip(("y", "part", "x", "weight", "bias"), *found, strict=True):
        error = ((a - b).float().norm() / a.float().norm()).item()
        # A factor's relative error is at most 2^-4 and 0.026 on average (root mean square), a product's sqrt(2) times
        # that. The gradient of the weight is as exact as in bfloat16, but of slightly different outputs.
        limit = 0.05 if name in ("y", "part") or (name == "x" and fp8_gradient) else 0.03
        assert error < limit, (name, error)
    # Nothing is returned in FP8's precision by accident.
    assert found[1][3].dtype == torch.float32


def test_a_linear_returns_the_dtype_of_its_input_outside_autocast() -> None:
    linear = Float8Linear(Linear(32, 16), fp8_gradient=True)
    assert linear(torch.randn(2, 32)).dtype == torch.float32
    assert linear(torch.randn(0, 32)).shape == (0, 16)


def test_conversion_keeps_parameters() -> None:
    model = small()
    teacher = EMATeacher(model)
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    state = {name: (t.dtype, t.shape) for name, t in model.state_dict().items()}
    averaged = teacher.state_dict()["tensors"].keys()
    # Vision: 3 blocks; text: the third, since the features of the first two are cached; six encoders and three.
    assert convert(model, "all", teacher) == 3 * (3 + 1) + 1 * 3 + 2 * 1
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == before
    assert {name: (t.dtype, t.shape) for name, t in model.state_dict().items()} == state
    assert teacher.state_dict()["tensors"].keys() == averaged
    teacher.update(model)


@pytest.mark.parametrize("pre_layernorm", [False, True])
def test_frozen_converts_only_frozen_vision_blocks(pre_layernorm: bool) -> None:
    model = small(FreezeConfig(vision_blocks=1, text_blocks=2, pre_layernorm=pre_layernorm))
    assert convert(model, "frozen") == 3
    found = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    parts = ("attention.qkv", "attention.out", "expand", "contract")
    levels = ("global", "object", "relation")
    assert found == {f"vision.{level}.blocks.0.{part}" for level in levels for part in parts}
    with bf16():
        model.encode_image(torch.randn(2, 3, 32, 32), "global").float().norm().backward()
    norm = model.vision["global"].pre_norm.weight
    assert (norm.grad is None) is pre_layernorm  # gradients pass through frozen FP8 blocks
    assert all(p.grad is None for p in model.vision["global"].blocks[0].parameters())


def test_frozen_weights_are_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    convert(model, "frozen")
    linears = [encoder.blocks[0].expand for encoder in model.vision.values()]
    assert len({id(linear.quantised) for linear in linears}) == 1
    calls: list[Tensor] = []
    monkeypatch.setattr(fp8_module, "quantize", lambda x: calls.append(x) or quantize(x))
    model.encode_image(torch.randn(2, 3, 32, 32), "global")
    assert len(calls) == 4 and all(x.shape[0] == 2 * 5 for x in calls)  # activations only


def test_frozen_weights_are_quantised_again_after_loading() -> None:
    model, other = small(), small()
    pixels = torch.randn(2, 3, 32, 32)
    convert(other, "frozen")
    expected = other.encode_image(pixels, "object")
    convert(model, "frozen")
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.encode_image(pixels, "object"), expected)
    weight = model.vision["global"].blocks[0].expand.weight
    with torch.no_grad():
        weight.mul_(2)
    requantize(model.encoders())
    values, scale = model.vision["global"].blocks[0].expand.quantised
    assert torch.equal(values.float() * scale, values.float() * quantize(weight)[1])
    assert not torch.equal(model.encode_image(pixels, "object"), expected)


def test_quantised_weights_stay_where_they_are() -> None:
    """Levels and the teacher share them, and CUDA graphs have read their addresses."""
    model = small()
    teacher = EMATeacher(model)
    encoders = [*model.encoders(), *teacher.encoders.values()]
    use_fp8(encoders, [p for p in model.parameters() if not p.requires_grad], "frozen")

    def addresses() -> list[int]:
        layers = [m for e in encoders for m in e.modules() if isinstance(m, Float8Linear)]
        return [t.data_ptr() for layer in layers for t in layer.derived()]

    before = addresses()
    assert len(set(before)) < len(before)
    model.load_state_dict(small().state_dict())
    requantize(encoders)
    assert addresses() == before


def test_widths_must_be_multiples_of_16() -> None:
    with pytest.raises(
        UserError, match=r"vision\.width: got 24, expected a multiple of 16, which FP8 products require"
    ):
        convert(small(width=24), "all")


def test_embeddings_of_real_shape_are_close_to_bfloat16() -> None:
    model = ScenarioCLIP(ModelConfig.preset("vit-b-32"))
    pixels = torch.randn(3, 3, 224, 224)
    texts = [[49406, *torch.randint(49406, (n,)).tolist(), 49407] for n in (2, 3, 6)]

    def embed() -> list[Tensor]:
        with torch.no_grad(), bf16():
            return [model.encode_image(pixels, "global").float(), model.encode_text(texts, "global").float()]

    exact = embed()
    for mode in ("frozen", "all"):
        convert(model, mode)
        for a, b in zip(exact, embed(), strict=True):
            # The target is 0.999; 12 blocks give 0.9994 for images.
            assert cosine_similarity(a, b).min() > 0.999


def test_blocks_compile_as_one_graph() -> None:
    encoder = VisionEncoder(VisionConfig(image_size=32, patch_size=16, width=32, layers=2, heads=2), 16)
    encoder.blocks[0].requires_grad_(False)
    use_fp8([encoder], encoder.blocks[0].parameters(), "all")
    weights = torch.randn(16)

    def gradients(pixels: Tensor) -> list[Tensor]:
        encoder.zero_grad()
        with bf16():
            y = encoder(pixels)
        (y.float() * weights).sum().backward()
        grad = encoder.blocks[1].expand.weight.grad
        assert grad is not None
        return [y.detach(), grad.clone()]

    batches = [torch.randn(n, 3, 32, 32) for n in (3, 5)]
    expected = [gradients(batch) for batch in batches]
    torch._dynamo.reset()
    for block in encoder.blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, results in zip(batches, expected, strict=True):
        for got, reference in zip(gradients(batch), results, strict=True):
            # Decomposed operations round differently, which may move a value to the next E4M3 number.
            assert (got - reference).norm() < 0.03 * reference.norm()
