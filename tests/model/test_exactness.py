"""The model against a naive implementation: six separate encoders, no sharing, texts padded to the context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scenarioclip_fast.data import Batch
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.losses import ScenarioLoss
from scenarioclip_fast.model import (
    EMATeacher,
    FreezeConfig,
    ModelConfig,
    ScenarioCLIP,
    TextConfig,
    TextEncoder,
    VisionConfig,
    VisionEncoder,
    tokens,
)
from scenarioclip_fast.model.encoders import Encoder, Packing

END = 30  # the last id of the small vocabulary
TEXTS = {
    "global": [[29, 3, END], [29, 4, 5, 6, END], [29, 7, END]],
    # One text is also an action; one is truncated to the context of 8.
    "object": [[29, 3, END], [29, 9, END], [29, 1, 2, END], [29, *range(10, 22), END]],
    "relation": [[29, 9, 2, 3, 4, END], [29, 1, 2, 8, END], [29, 5, END], [29, 6, 6, END], [29, 9, 9, 9, END]],
}


class SmallVocabulary:
    def tokens(self, level: str) -> list[list[int]]:
        return TEXTS[level]


def config(freeze: FreezeConfig, variant: str = "scenarioclip1", stem: str = "linear") -> ModelConfig:
    return ModelConfig(
        variant=variant,  # type: ignore[arg-type]
        embed_dim=12,
        vision=VisionConfig(image_size=16, patch_size=8, width=24, layers=3, heads=3, stem=stem),  # type: ignore[arg-type]
        text=TextConfig(context_length=8, vocab_size=END + 1, width=16, layers=3, heads=2),
        freeze=freeze,
    )


def make(freeze: FreezeConfig, variant: str = "scenarioclip1", stem: str = "linear") -> ScenarioCLIP:
    torch.manual_seed(0)
    model = ScenarioCLIP(config(freeze, variant, stem)).double()
    with torch.no_grad():
        for p in model.parameters():
            # Break the symmetric initialisation, which would hide swapped biases; make trainable parts differ by level.
            p.add_(torch.randn_like(p) * 0.1)
    model.set_vocabulary(SmallVocabulary())  # type: ignore[arg-type]
    return model


def batch(action: list[int], objects: list[int], relations: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(1)
    views = len(action) + len(objects) + len(relations)
    scenes = max(len(action), 1)
    return Batch(
        pixels=torch.randn(views, 3, 16, 16, generator=generator, dtype=torch.float64),
        keys=[f"scene {i}" for i in range(len(action))],
        action_id=torch.tensor(action, dtype=torch.long),
        object_id=torch.tensor(objects, dtype=torch.long),
        relation_id=torch.tensor(relations, dtype=torch.long),
        object_scene=torch.arange(len(objects)) % scenes,
        relation_scene=torch.arange(len(relations)) % scenes,
    )


BATCHES = {
    "repeats": batch([0, 1, 0], [3, 1, 1, 1, 0, 3], [4, 2, 2, 0]),
    "no relations": batch([2, 2], [2], []),
    "no objects": batch([1, 0], [], []),
    "one of each": batch([0], [0], [0]),
}


def naive_norm(x: Tensor, norm: Any) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    var = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * norm.weight + norm.bias


def naive_blocks(encoder: Encoder, x: Tensor, mask: Tensor | None) -> Tensor:  # [n, L, W]
    for block in encoder.blocks:
        y = naive_norm(x, block.norm_1)
        heads = []
        head = x.shape[-1] // block.attention.heads
        for i in range(block.attention.heads):
            q, k, v = (
                y @ block.attention.qkv.weight.chunk(3)[j][i * head : (i + 1) * head].T
                + block.attention.qkv.bias.chunk(3)[j][i * head : (i + 1) * head]
                for j in range(3)
            )
            scores = q @ k.mT / head**0.5
            heads.append((scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ block.attention.out.weight.T + block.attention.out.bias
        h = naive_norm(x, block.norm_2) @ block.expand.weight.T + block.expand.bias
        x = x + (h * (1.702 * h).sigmoid()) @ block.contract.weight.T + block.contract.bias
    return x


def naive_head(encoder: Encoder, x: Tensor) -> Tensor:
    head = encoder.head
    return naive_norm(naive_norm(x, head.norm) @ head.projection.weight.T + head.projection.bias, head.out_norm)


def naive_image(encoder: VisionEncoder, pixels: Tensor) -> Tensor:
    embedding = encoder.embedding
    if encoder.config.stem == "linear":
        weight = embedding.stem.weight.view(-1, 3, 8, 8)
        patches = torch.nn.functional.conv2d(pixels, weight, stride=8).flatten(2).mT
    else:
        patches = embedding.stem(pixels)
    class_token = embedding.class_token.expand(pixels.shape[0], 1, -1)
    x = torch.cat([class_token, patches], 1) + embedding.position
    return naive_head(encoder, naive_blocks(encoder, naive_norm(x, encoder.pre_norm), None)[:, 0])


def naive_text(encoder: TextEncoder, texts: list[list[int]]) -> Tensor:
    length = encoder.config.context_length
    rows = [ids if len(ids) <= length else [*ids[: length - 1], END] for ids in texts]
    tokens = torch.tensor([ids + [0] * (length - len(ids)) for ids in rows], dtype=torch.long).view(-1, length)
    x = encoder.embedding.token.weight[tokens] + encoder.embedding.position
    x = naive_blocks(encoder, x, torch.ones(length, length, dtype=torch.bool).tril())
    return naive_head(encoder, x[torch.arange(len(rows)), (tokens == END).int().argmax(1)])


def naive(model: ScenarioCLIP, batch: Any, teacher: EMATeacher | None) -> dict[str, Tensor]:
    ids = [batch.action_id, batch.object_id, batch.relation_id]
    out = {}
    for level, i, pixels in zip(LEVELS, ids, batch.pixels.split([len(i) for i in ids]), strict=True):
        texts = [TEXTS[level][j] for j in i.tolist()]
        out[f"image {level}"] = naive_image(model.vision[level], pixels)
        out[f"text {level}"] = naive_text(model.text[level], texts)
        if teacher is not None and level == "global":
            out["teacher image"] = naive_image(teacher.encoders["vision.global"], pixels).detach()
        elif teacher is not None:
            out[f"teacher {level}"] = naive_text(teacher.encoders[f"text.{level}"], texts).detach()
    return out


def fast(model: ScenarioCLIP, batch: Any, teacher: EMATeacher | None) -> dict[str, Tensor]:
    e = model(batch, teacher=teacher)
    out = {}
    for i, level in enumerate(LEVELS):
        out[f"image {level}"] = e.image[i]
        out[f"text {level}"] = e.text[i][e.text_index[i]]
        ids = (batch.action_id, batch.object_id, batch.relation_id)[i]
        assert torch.equal(e.text_id[i][e.text_index[i].cpu()], ids.cpu())
        assert torch.equal(e.text_id[i], ids.unique())
    if teacher is not None:
        out["teacher image"] = e.teacher_image
        out["teacher object"] = e.teacher_object_text[e.text_index[1]]
        out["teacher relation"] = e.teacher_relation_text[e.text_index[2]]
    return out


def loss(out: dict[str, Tensor]) -> Tensor:
    """A nonlinear function of all outputs, so that every gradient depends on every output."""
    total = torch.zeros((), dtype=torch.float64)
    for i, (name, value) in enumerate(sorted(out.items())):
        weight = torch.sin(torch.arange(value.numel(), dtype=torch.float64) + i).view_as(value)
        total = total + (value * weight).sin().sum() + (value.mean(0).sum() if len(value) else 0) * (i + 1)
        assert value.requires_grad != name.startswith("teacher")
    return total * total


def gradients(model: ScenarioCLIP) -> Iterator[tuple[str, Tensor]]:
    for name, p in model.named_parameters():
        if p.requires_grad:
            # A level absent from the batch has a zero gradient, not None, which DDP would wait for.
            assert p.grad is not None, name
            yield name, p.grad
        else:
            assert p.grad is None, name


FREEZES = {
    "part": FreezeConfig(2, 2),
    "reference": FreezeConfig(2, 2, pre_layernorm=False),
    "nothing": FreezeConfig.nothing(),
    "blocks only": FreezeConfig(1, 1, embeddings=False, pre_layernorm=False),
    "embeddings only": FreezeConfig(0, 0),
    "all blocks": FreezeConfig(3, 3),
}


@pytest.mark.parametrize("variant", ["scenarioclip1", "pyramidclip"])
@pytest.mark.parametrize("freeze", FREEZES)
def test_outputs_and_gradients_equal_the_naive_implementation(freeze: str, variant: str) -> None:
    model = make(FREEZES[freeze], variant)
    teacher = EMATeacher(model)
    with torch.no_grad():
        for p in teacher.state_dict()["tensors"].values():
            p.mul_(1.1)
    for name, some in BATCHES.items():
        for with_teacher in (teacher, None):
            results = []
            for form in (naive, fast):
                model.zero_grad()
                out = form(model, some, with_teacher)
                value = loss(out)
                value.backward()
                results.append((out, value.detach(), dict(gradients(model))))
            (expected, loss_expected, grads_expected), (got, loss_got, grads_got) = results
            assert expected.keys() == got.keys()
            for key in expected:
                # Float64 with a different order of summation: 1e-10 is about 1e5 roundings.
                torch.testing.assert_close(got[key], expected[key], rtol=1e-10, atol=1e-10, msg=f"{name}: {key}")
            torch.testing.assert_close(loss_got, loss_expected, rtol=1e-10, atol=1e-10)
            scale = max(g.abs().max() for g in grads_expected.values())
            for key in grads_expected:
                torch.testing.assert_close(
                    grads_got[key], grads_expected[key], rtol=1e-9, atol=1e-11 * scale.item(), msg=f"{name}: {key}"
                )
            assert scale > 0


def test_convolutional_stem_trains() -> None:
    model = make(FreezeConfig.nothing(), stem="conv")
    for name, some in BATCHES.items():
        results = []
        for form in (naive, fast):
            model.zero_grad()
            value = loss(form(model, some, None))
            value.backward()
            results.append((value.detach(), model.vision["global"].embedding.stem.convs[0].weight.grad.clone()))
        # As above.
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9, msg=name)
        assert results[0][1].abs().max() > 0


def test_frozen_blocks_run_once_per_view_and_string() -> None:
    model = make(FREEZES["part"])
    seen: dict[str, list[int]] = {"vision": [], "text": []}
    model.vision["relation"].blocks[1].register_forward_hook(lambda _, x, y: seen["vision"].append(len(y[0])))
    for encoder in model.text.values():
        encoder.blocks[1].register_forward_hook(lambda _, x, y: seen["text"].append(len(y[0])))
    # The other levels have copies of the shared blocks, with the same parameters.
    assert model.vision["relation"].blocks[1].expand.weight is model.vision["global"].blocks[1].expand.weight
    some = BATCHES["repeats"]
    model.vision["global"].blocks[1].register_forward_hook(lambda _, x, y: seen["vision"].append(len(y[0])))
    first = fast(model, some, None)
    assert seen["vision"] == [13]
    # Strings are computed in fixed chunks; this vocabulary fills less than one.
    all_tokens = sum(min(len(ids), 8) for texts in TEXTS.values() for ids in texts)
    assert sum(seen["text"]) == all_tokens
    again = fast(model, some, None)
    assert sum(seen["vision"]) == 26
    assert sum(seen["text"]) == all_tokens
    for key in first:
        torch.testing.assert_close(again[key], first[key], rtol=0, atol=0)


def test_cached_text_features_follow_weights_and_precision() -> None:
    model = make(FREEZES["part"])
    some = BATCHES["repeats"]
    before = fast(model, some, None)["text object"].detach()
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})
    after = fast(model, some, None)["text object"].detach()
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, naive(model, some, None)["text object"], rtol=1e-10, atol=1e-10)
    some = replace(some, pixels=some.pixels.float())
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        low = fast(model, some, None)["text object"]
    full = fast(model, some, None)["text object"]
    assert full.dtype == torch.float32
    # bfloat16 carries 8 bits; the layernorm at the end makes values of order 1.
    assert 1e-4 < (low.float() - full).abs().max() < 0.2
    model.tokens.cache_bytes = 0
    # Float32 with a different order of summation; stale bfloat16 features would be 1e-3 away.
    torch.testing.assert_close(fast(model, some, None)["text object"], full, rtol=1e-5, atol=1e-5)


def test_cached_text_features_are_usable_after_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_CHUNK", 2)  # so that a batch caches only some strings
    model = make(FREEZES["part"])
    with torch.inference_mode():
        model(BATCHES["one of each"])
    some = BATCHES["repeats"]
    out = fast(model, some, None)
    loss(out).backward()
    torch.testing.assert_close(out["text object"], naive(model, some, None)["text object"], rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        fresh = make(FREEZES["part"])
        torch.testing.assert_close(fast(fresh, some, None)["text object"], out["text object"], rtol=0, atol=0)


def test_cached_text_features_follow_assigned_weights() -> None:
    model = make(FREEZES["part"])
    states = [{k: v * factor for k, v in model.state_dict().items()} for factor in (1.0, 1.5)]
    for state in states:  # tensors with equal version counters
        model.load_state_dict(state, assign=True)
        got, expected = (form(model, BATCHES["repeats"], None)["text object"] for form in (fast, naive))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["scenarioclip0", "pyramidclip"])
def test_checkpointing_and_compiling_change_nothing(variant: str) -> None:
    torch._dynamo.reset()
    model = make(FREEZES["part"], variant)
    results = []
    for change in (
        lambda: None,
        model.set_checkpointing,
        lambda: model.compile_blocks(backend="eager", fullgraph=True),
    ):
        change()
        for name in ("repeats", "one of each"):
            model.zero_grad()
            value = loss(fast(model, BATCHES[name], None))
            value.backward()
            results.append((value.detach(), dict(gradients(model))))
    for i in range(2, 6):
        # The same operations in the same order up to fusion.
        torch.testing.assert_close(results[i], results[i % 2], rtol=1e-10, atol=1e-10)


def test_every_version_of_a_block_is_compiled() -> None:
    torch._dynamo.reset()
    model = make(FreezeConfig(1, 1))
    teacher = EMATeacher(model)
    for blocks in (model, teacher):
        blocks.compile_blocks(backend="eager", fullgraph=True)  # fullgraph: exceeding the limit is an error
    for name in ("repeats", "one of each"):
        for with_gradients in (False, True):  # the two passes of a step in microbatches
            with torch.set_grad_enabled(with_gradients):
                out = fast(model, BATCHES[name], teacher)
            if with_gradients:
                loss(out).backward()


def test_an_encoder_compiles_without_graph_breaks_for_any_number_of_rows() -> None:
    torch._dynamo.reset()
    model = make(FREEZES["reference"])
    for kind in ("vision", "text"):
        encoder = getattr(model, kind)["object"]
        compiled = torch.compile(encoder, backend="eager", fullgraph=True, dynamic=True)
        for n in (3, 5):
            lengths = np.arange(2, 2 + n)
            tokens = torch.randint(END, (int(lengths.sum()),))
            texts = (tokens, Packing.of_lengths(lengths, torch.device("cpu")))
            inputs = (torch.randn(n, 3, 16, 16, dtype=torch.float64),) if kind == "vision" else texts
            results = []
            for form in (encoder, compiled):
                model.zero_grad()
                out = form(*inputs)
                out.sin().sum().backward()
                results.append((out.detach(), {k: p.grad for k, p in encoder.named_parameters() if p.requires_grad}))
            # As above.
            torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("freeze", ["part", "nothing"])
def test_a_step_does_not_synchronise_with_the_device(freeze: str) -> None:
    """Meta tensors have no values: reading one, which would synchronise on a GPU, is an error."""
    model = make(FREEZES[freeze])
    assert model.tokens is not None
    found = model.tokens.unique_texts(BATCHES["repeats"].host_ids)
    model.tokens.cache_bytes = 0  # the cache of frozen features copies real values
    model.to("meta")
    teacher = EMATeacher(model)
    lists = {name: [t.to("meta") for t in getattr(found, name)] for name in ("index", "id")}
    out = model(BATCHES["repeats"].to("meta"), teacher, replace(found, **lists))
    assert len(out.object_scene) == 6 and out.teacher_image is not None
    sum(x.sum() for x in (*out.image, *out.text)).backward()
    teacher.update(model)
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bf16", [False, True])
def test_float32_and_bf16_agree_with_the_naive_implementation(bf16: bool, device: str) -> None:
    """With a linear loss, since a nonlinear one would amplify rounding errors."""

    def linear(out: dict[str, Tensor]) -> Tensor:
        weighted = (v * torch.arange(v.numel(), device=v.device).sin().view_as(v) for v in out.values())
        return torch.stack([v.sum() for v in weighted]).sum()

    some, model, low = BATCHES["repeats"], make(FREEZES["reference"]), make(FREEZES["reference"]).float().to(device)
    low.set_vocabulary(SmallVocabulary())  # type: ignore[arg-type]
    expected = naive(model, some, EMATeacher(model))
    linear(expected).backward()
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        got = fast(low, replace(some, pixels=some.pixels.float()).to(device), EMATeacher(low))
    linear(got).backward()
    # Rounding errors of 2^-24, or 2^-9 per factor, through three blocks whose layernorms keep values near 1.
    tolerance = 3e-2 if bf16 else 1e-5
    for key, value in expected.items():
        error = (got[key].double().cpu() - value).norm() / value.norm()
        assert error < tolerance, f"{key}: off by {error:.1e}"
    exact = dict(gradients(model))
    for name, gradient in gradients(low):
        error = (gradient.double().cpu() - exact[name]).norm() / exact[name].norm()
        assert error < 2 * tolerance, f"{name}: its gradient is off by {error:.1e}"


@pytest.mark.parametrize("name", ["no relations", "no objects"])
def test_a_batch_that_lacks_a_level_has_a_loss_and_gradients(name: str) -> None:
    model, criterion = make(FREEZES["part"]), ScenarioLoss(distillation_scale=512).double()
    terms = criterion(model(BATCHES[name], teacher=EMATeacher(model)))
    terms["loss"].backward()
    assert terms["loss"].isfinite()
    assert terms["contrastive/relation"] == 0
    for parameter, gradient in gradients(model):
        assert gradient.isfinite().all(), parameter
        if ".relation." in parameter:
            assert (gradient == 0).all(), parameter


def test_encode_methods_equal_the_forward_pass() -> None:
    model = make(FREEZES["part"])
    some = BATCHES["repeats"]
    out = fast(model, some, None)
    for level, ids, pixels in zip(
        LEVELS, (some.action_id, some.object_id, some.relation_id), some.pixels.split([3, 6, 4]), strict=True
    ):
        texts = [TEXTS[level][i] for i in ids.tolist()]
        padded = torch.zeros(len(texts), 20, dtype=torch.long)
        for row, text in zip(padded, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        for got, expected in (
            (model.encode_image(pixels, level), out[f"image {level}"]),
            (model.encode_text(texts, level), out[f"text {level}"]),
            (model.encode_text(padded, level), out[f"text {level}"]),
        ):
            # As above.
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert model.tokens.truncated == {"global": 0, "object": 1, "relation": 0}
    assert model.encode_text([], "global").shape == (0, 12)


def test_errors_state_the_expected_input() -> None:
    model = make(FREEZES["part"])
    with pytest.raises(ValueError, match="level: got 'scene', expected one of global, object, relation"):
        model.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.float64), "scene")
    with pytest.raises(ValueError, match=r"pixels: got shape \[1, 3, 8, 8\], expected \[n, 3, 16, 16\]"):
        model.encode_image(torch.zeros(1, 3, 8, 8, dtype=torch.float64), "global")
    with pytest.raises(TypeError, match=r"pixels: got torch.uint8, expected normalised floats"):
        model.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "global")
    with pytest.raises(ValueError, match="ids of level relation: got ids outside the vocabulary"):
        model(batch([0], [0], [5]))
    with pytest.raises(ValueError, match="ids of level global: got ids outside the vocabulary"):
        model(batch([99], [0], [0]))
    with pytest.raises(ValueError, match="ids of level object: got ids outside the vocabulary"):
        model(batch([0], [-1], [0]))  # no action is -1; every object has a name
    with pytest.raises(ValueError, match=r"pixels: got 3 views, expected 1 \+ 1 \+ 2"):
        replace(batch([0], [0], [0]), relation_id=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="call set_vocabulary"):
        ScenarioCLIP(model.config)(batch([0], [0], [0]))
    with pytest.raises(TypeError, match="expected a list of strings"):
        model.encode_text("a dog", "object")
    with pytest.raises(ValueError, match="ends in 5, expected 30"):
        model.encode_text([[29, 5]], "object")
