"""Weights of transformers, open_clip and the published code, exports, and files that must be rejected."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.model import FreezeConfig, ModelConfig, ScenarioCLIP, TextConfig, VisionConfig, export_hf
from scenarioclip_fast.train.config import ModelSection
from scenarioclip_fast.train.weights import load_initial_weights

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


FREEZE = FreezeConfig(1, 1)
TOKENS = [[29, 3, 30], [29, 4, 5, 6, 7, 8, 30], [29, 30]]
PADDED = torch.tensor([ids + [30] * (7 - len(ids)) for ids in TOKENS])


def clip_config(activation: str = "quick_gelu") -> Any:
    shared = {"hidden_act": activation}
    return transformers.CLIPConfig(
        text_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 31,
            "max_position_embeddings": 8,
            "bos_token_id": 29,
            "eos_token_id": 30,
            "pad_token_id": 30,
            **shared,
        },
        vision_config={
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 16,
            "patch_size": 8,
            **shared,
        },
        projection_dim=12,
    )


def random_clip(config: Any) -> Any:
    torch.manual_seed(0)
    clip = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for p in clip.parameters():
            # transformers initialises biases to zero and norms to one, which would hide swapped names.
            p.add_(torch.randn_like(p) * 0.05)
    return clip


@pytest.fixture(scope="module")
def clip() -> Any:
    return random_clip(clip_config())


def expected_outputs(clip: Any, pixels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        image, text = clip.vision_model(pixels).pooler_output, clip.text_model(tokens).pooler_output
        return {
            "image pooled": image,
            "text pooled": text,
            "image projected": clip.visual_projection(image),
            "text projected": clip.text_projection(text),
        }


def outputs(model: ScenarioCLIP, level: str, pixels: Tensor, tokens: list[list[int]]) -> dict[str, Tensor]:
    """CLIP's pooled output and embedding: the inputs of the head's first and last layernorm."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for kind, encoder in (("image", model.vision[level]), ("text", model.text[level])):
        for part, module in (("pooled", encoder.head.norm), ("projected", encoder.head.projection)):
            key = f"{kind} {part}"
            hooks.append(module.register_forward_hook(lambda _, x, y, key=key: seen.__setitem__(key, _normed(y))))
    with torch.no_grad():
        model.encode_image(pixels, level)
        model.encode_text(tokens, level)
    for hook in hooks:
        hook.remove()
    return seen


def _normed(y: Any) -> Tensor:
    """The first layernorm also returns the sum that it normalises."""
    return y[1] if isinstance(y, tuple) else y


def check_same(model: ScenarioCLIP, clip: Any, tokens: list[list[int]] = TOKENS, padded: Tensor = PADDED) -> None:
    side = model.config.vision.image_size
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(2))
    expected = expected_outputs(clip, pixels, padded)
    for level in LEVELS:
        got = outputs(model, level, pixels, tokens)
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            # Float32 through up to 12 blocks with a different order of summation; values are of order 1.
            torch.testing.assert_close(got[key], value, rtol=2e-4, atol=2e-4, msg=f"{level} {key}")


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hugging_face_directory(activation: str, tmp_path: Path) -> None:
    clip = random_clip(clip_config(activation))
    clip.save_pretrained(tmp_path)
    model = ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE)
    assert model.config.vision == VisionConfig(16, 8, 192, 2, 3, activation=activation)  # type: ignore[arg-type]
    assert model.config.text == TextConfig(8, 31, 128, 2, 2, activation=activation)  # type: ignore[arg-type]
    check_same(model, clip)


def test_real_shapes_of_vit_b_32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(vision_config={"image_size": 224, "patch_size": 32}, projection_dim=512)
    # A small depth keeps the test fast; every matrix has its real shape.
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 2
    clip = transformers.CLIPModel(config).eval()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    torch.save(clip.state_dict(), tmp_path / "pytorch_model.bin")
    model = ScenarioCLIP.from_clip(tmp_path, variant="pyramidclip", freeze=FREEZE)
    assert model.config.vision == VisionConfig(layers=2)
    assert model.config.text == TextConfig(layers=2)
    tokens = [[49406, 320, 1125, 539, 320, 2368, 49407], [49406, 1929, 49407]]
    padded = torch.tensor([tokens[0] + [49407] * 70, tokens[1] + [49407] * 74])
    check_same(model, clip, tokens, padded)
    got = model.encode_text(["a photo of a cat", "dog"], "object")
    # Only rounding differs.
    torch.testing.assert_close(got, model.encode_text(tokens, "object"), rtol=1e-5, atol=1e-5)


def open_clip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a Hugging Face CLIP under open_clip's names."""
    names = {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding": "visual.conv1",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "vision_model.encoder.layers": "visual.transformer.resblocks",
        "text_model.encoder.layers": "transformer.resblocks",
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn": "attn",
    }
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        for hf, open_clip in names.items():
            name = name.replace(hf, open_clip)
        if "attn.q_proj" in name:
            thirds = [value] + [
                state[n]
                for q in "kv"
                for n in state
                if _to_open_clip_name(n, names) == name.replace("q_proj", f"{q}_proj")
            ]
            out[name.replace("q_proj.", "in_proj_")] = torch.cat(thirds)
        elif "attn.k_proj" not in name and "attn.v_proj" not in name:
            out[name] = value
    out["visual.proj"] = out.pop("visual_projection.weight").T.contiguous()
    out["text_projection"] = out.pop("text_projection.weight").T.contiguous()
    return out


def _to_open_clip_name(name: str, names: dict[str, str]) -> str:
    for hf, open_clip in names.items():
        name = name.replace(hf, open_clip)
    return name


@pytest.mark.parametrize("form", ["safetensors", "pickle", "nested text tower in a training checkpoint"])
def test_open_clip_state_dict(form: str, clip: Any, tmp_path: Path) -> None:
    state = open_clip_names(clip.state_dict())
    assert "transformer.resblocks.1.attn.in_proj_weight" in state
    if form == "safetensors":
        safetensors.save_file(state, tmp_path / "open_clip_model.safetensors")
        path = tmp_path
    elif form == "pickle":
        path = tmp_path / "clip.pt"
        constants = {"attn_mask": torch.zeros(8, 8), "input_resolution": torch.tensor(16)}  # of older versions
        torch.save(state | constants, path)
    else:
        path = tmp_path / "epoch_1.pt"
        text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
        state = {f"module.{'text.' if k.startswith(text) else ''}{k}": v for k, v in state.items()}
        torch.save({"epoch": 1, "state_dict": state}, path)
    check_same(ScenarioCLIP.from_clip(path, freeze=FREEZE), clip)
    if form != "safetensors":
        # A text tower with a CLS embedding, and a decoder next to it.
        prefix = "" if form == "pickle" else "module."
        for name in ("cls_emb", "text_decoder.ln_final.weight"):
            torch.save(state | {f"{prefix}{name}": torch.zeros(3)}, path)
            with pytest.raises(UserError, match=f"unexpected {name}: CLIP has no such tensors"):
                ScenarioCLIP.from_clip(path, freeze=FREEZE)


def test_open_clip_config_next_to_the_weights(tmp_path: Path) -> None:
    clip = random_clip(clip_config("gelu"))
    safetensors.save_file(open_clip_names(clip.state_dict()), tmp_path / "open_clip_model.safetensors")
    record = {"vision_cfg": {"width": 192, "head_width": 64}, "text_cfg": {"heads": 2}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": record}))
    check_same(ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE), clip)
    record = {"vision_cfg": {"head_width": 96}, "text_cfg": {"heads": 4}, "quick_gelu": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": record}))
    config = ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE, activation="gelu").config
    assert (config.vision.heads, config.text.heads) == (2, 4)
    assert config.vision.activation == config.text.activation == "quick_gelu"


def test_initial_weights_use_the_activation_of_the_config(tmp_path: Path) -> None:
    clip = random_clip(clip_config("gelu"))
    torch.save(open_clip_names(clip.state_dict()), tmp_path / "clip.pt")
    sizes = ScenarioCLIP.from_clip(tmp_path / "clip.pt", freeze=FREEZE, activation="gelu").config
    model = ScenarioCLIP(sizes)
    load_initial_weights(model, tmp_path / "clip.pt")
    check_same(model, clip)


def test_heads_of_a_huge_open_clip(tmp_path: Path) -> None:
    config = clip_config()
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 1280, 5120
    config.vision_config.num_attention_heads, config.vision_config.num_hidden_layers = 16, 1
    clip = random_clip(config)
    torch.save(open_clip_names(clip.state_dict()), tmp_path / "vit-h.pt")
    check_same(ScenarioCLIP.from_clip(tmp_path / "vit-h.pt", freeze=FREEZE, variant="pyramidclip"), clip)


@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_shards_with_an_index(form: str, clip: Any, tmp_path: Path) -> None:
    clip.save_pretrained(tmp_path, max_shard_size="500KB")
    index = tmp_path / "model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    if form == "pickle":
        record = json.loads(index.read_text())
        for shard in {*record["weight_map"].values()}:
            torch.save(safetensors.load_file(tmp_path / shard), tmp_path / shard.replace(".safetensors", ".bin"))
            (tmp_path / shard).unlink()
        record["weight_map"] = {k: v.replace(".safetensors", ".bin") for k, v in record["weight_map"].items()}
        index.unlink()
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps(record))
    check_same(ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE), clip)
    for shards in ({"a": "../b.safetensors"}, {"a": index.name}, ["a"]):
        index.write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(UserError, match="expected a weight_map from tensors to files in the same directory"):
            ScenarioCLIP.from_clip(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": 5, "b": "c.safetensors"}}))
    with pytest.raises(UserError, match="5: no such file"):
        ScenarioCLIP.from_clip(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(UserError, match=r"gone\.safetensors: no such file"):
        ScenarioCLIP.from_clip(tmp_path)


def test_export_is_read_by_transformers(clip: Any, tmp_path: Path) -> None:
    clip.save_pretrained(tmp_path / "in")
    model = ScenarioCLIP.from_clip(tmp_path / "in", freeze=FREEZE)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    export_hf(model, tmp_path / "out", "relation")
    back, info = transformers.CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    rest = safetensors.load_file(tmp_path / "out" / "projection.safetensors")
    pixels = torch.randn(2, 3, 16, 16)
    expected = expected_outputs(back.eval(), pixels, PADDED)
    for kind, part, got in (
        ("vision", "image", model.encode_image(pixels, "relation")),
        ("text", "text", model.encode_text(TOKENS, "relation")),
    ):
        value = expected[f"{part} projected"] + rest[f"{kind}.projection.bias"]
        value = torch.nn.functional.layer_norm(
            value, (12,), rest[f"{kind}.out_norm.weight"], rest[f"{kind}.out_norm.bias"]
        )
        torch.testing.assert_close(got, value, rtol=2e-4, atol=2e-4)  # as above
    with pytest.raises(UserError, match=r"vision.stem: got 'conv'.* 'linear'"):
        export_hf(small("conv"), tmp_path / "no")


def small(stem: str = "linear", variant: str = "scenarioclip1", width: int = 24) -> ScenarioCLIP:
    return ScenarioCLIP(
        ModelConfig(
            variant=variant,  # type: ignore[arg-type]
            embed_dim=12,
            vision=VisionConfig(16, 8, width, 2, 3, stem=stem),  # type: ignore[arg-type]
            text=TextConfig(8, 31, 16, 2, 2),
            freeze=FREEZE,
        )
    )


@pytest.mark.parametrize("variant", ["scenarioclip1", "pyramidclip"])
def test_save_and_load(variant: str, tmp_path: Path) -> None:
    model = small(variant=variant)
    model.save_pretrained(tmp_path)
    back = ScenarioCLIP.from_pretrained(tmp_path)
    assert back.config == model.config
    state = safetensors.load_file(tmp_path / "model.safetensors")
    assert sum(v.numel() for v in state.values()) == sum(p.numel() for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    shared = back.vision["relation"].blocks[0].expand.weight
    assert shared is back.vision["global"].blocks[0].expand.weight
    last = [back.vision[level].blocks[1].expand.weight for level in LEVELS]
    assert (last[0] is last[2]) == (variant == "pyramidclip")
    assert not shared.requires_grad
    assert last[0].requires_grad


def test_the_config_of_a_run_is_saved_without_its_own_keys(tmp_path: Path) -> None:
    config = ModelSection(init="weights.pt", **vars(small().config))
    ScenarioCLIP(config).save_pretrained(tmp_path)
    assert ScenarioCLIP.from_pretrained(tmp_path).config == config.architecture


def test_all_levels_are_initialised_from_one_pair(tmp_path: Path) -> None:
    torch.manual_seed(1)
    pair, model = small(variant="pyramidclip"), small()
    model.init_towers_from(pair)
    pixels = torch.randn(2, 3, 16, 16)
    for level in LEVELS:
        assert torch.equal(model.encode_image(pixels, level), pair.encode_image(pixels, "object"))
        assert torch.equal(model.encode_text(TOKENS, level), pair.encode_text(TOKENS, "object"))
    assert model.vision["global"].head.norm.weight is not model.vision["object"].head.norm.weight
    with pytest.raises(UserError, match=r"another architecture \(this model, other model\): vision.width: 24 and 48"):
        model.init_towers_from(small(width=48))


def reference_checkpoint(variant: str, path: Path, frozen_differs: bool = False) -> dict[str, Any]:
    """A checkpoint in the published code's format, built from transformers' encoders."""
    modules: dict[str, Any] = {}
    config = clip_config()
    state: dict[str, Tensor] = {}
    prefixes = [""] if variant == "pyramidclip" else [f"{level}_" for level in LEVELS]
    for i, prefix in enumerate(prefixes):
        torch.manual_seed(0)
        vision = transformers.CLIPVisionModel(config.vision_config).eval()
        text = transformers.CLIPTextModel(config.text_config).eval()
        image_head = torch.nn.ModuleDict({"projection": torch.nn.Linear(192, 12), "norm": torch.nn.LayerNorm(12)})
        text_head = torch.nn.ModuleDict({"projection": torch.nn.Linear(128, 12), "norm": torch.nn.LayerNorm(12)})
        torch.manual_seed(i)
        with torch.no_grad():
            for module in (vision, text, image_head, text_head):
                for name, p in module.named_parameters():
                    if frozen_differs or not ("embeddings" in name or "layers.0." in name):
                        p.add_(torch.randn_like(p) * 0.05)
        for name, module in (("visual_encoder.vision_model", vision), ("text_encoder.text_model", text)):
            state |= {f"model.{prefix}{name}.{k}": v for k, v in module.state_dict().items()}
        for name, head in (("image", image_head), ("text", text_head)):
            state |= {f"model.{prefix}{name}_{k}": v for k, v in head.state_dict().items()}
        modules[prefix] = (vision, text, image_head, text_head)
    teacher = {k.removeprefix("model."): v * 0.5 for k, v in state.items()}
    state |= {f"ema.teacher.{k}": v for k, v in teacher.items()} | {
        "global_loss.logit_scale": torch.tensor(2.6),
        "student_teacher_loss_fn.distillation_loss_fn.logit_scale_s": torch.tensor(2.6),
    }
    torch.save({"epoch": 3, "state_dict": state, "ema": {"teacher_state": teacher, "steps": 5, "decay": 0.9995}}, path)
    return modules


@pytest.mark.parametrize("variant", ["scenarioclip1", "pyramidclip"])
def test_checkpoint_of_the_published_code(variant: str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    modules = reference_checkpoint(variant, path)
    model = ScenarioCLIP.from_reference(path, freeze=FreezeConfig(1, 1, pre_layernorm=False))
    assert model.config.variant == variant
    pixels = torch.randn(2, 3, 16, 16)
    for level in LEVELS:
        vision, text, image_head, text_head = modules["" if variant == "pyramidclip" else f"{level}_"]
        with torch.no_grad():
            image = image_head["norm"](image_head["projection"](vision(pixels).pooler_output))
            embedded = text_head["norm"](text_head["projection"](text(PADDED).pooler_output))
        # As above.
        torch.testing.assert_close(model.encode_image(pixels, level), image, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(model.encode_text(TOKENS, level), embedded, rtol=2e-4, atol=2e-4)
    teacher = ScenarioCLIP.from_reference(path, teacher=True, freeze=FreezeConfig(1, 1, pre_layernorm=False))
    torch.save(torch.load(path, weights_only=True)["ema"]["teacher_state"], tmp_path / "best_ema_teacher.pt")
    alone = ScenarioCLIP.from_reference(tmp_path / "best_ema_teacher.pt", freeze=teacher.config.freeze)
    for name, value in model.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], value * 0.5), name
        assert torch.equal(alone.state_dict()[name], value * 0.5), name


def test_mismatched_checkpoint_of_the_published_code(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    reference_checkpoint("scenarioclip1", path, frozen_differs=True)
    with pytest.raises(
        UserError, match=r"embedding.* frozen by the config, but it differs between 'global' and 'object'"
    ):
        ScenarioCLIP.from_reference(path, freeze=FREEZE)
    ScenarioCLIP.from_reference(path, freeze=FreezeConfig.nothing())
    record = torch.load(path, weights_only=True)
    for change, message in (
        ({"model.global_adapter.weight": torch.zeros(2)}, "unexpected global_adapter.weight: the published code"),
        ({"model.object_text_norm.bias": None}, "text encoder of level 'object': .*missing head.out_norm.bias"),
    ):
        state = {k: v for k, v in (record["state_dict"] | change).items() if v is not None}
        torch.save({"state_dict": state}, path)
        with pytest.raises(UserError, match=message):
            ScenarioCLIP.from_reference(path, freeze=FreezeConfig.nothing())
    torch.save({"state_dict": {"model.encoder.weight": torch.zeros(2)}}, path)
    with pytest.raises(UserError, match="not a checkpoint of the method's published code"):
        ScenarioCLIP.from_reference(path)
    with pytest.raises(UserError, match=r"no EMA teacher \(expected"):
        ScenarioCLIP.from_reference(path, teacher=True)


class RunsCode:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (exec, ("raise SystemExit('ran code')",))


def test_pickles_that_run_code_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "clip.pt"
    torch.save({"state_dict": RunsCode()}, path)
    for read in (ScenarioCLIP.from_clip, ScenarioCLIP.from_reference):
        with pytest.raises(UserError, match=r"clip.pt: refused: .* reading it could run code"):
            read(path)
    path.write_bytes(pickle.dumps(RunsCode()))
    with pytest.raises(UserError, match=r"clip.pt: "):
        ScenarioCLIP.from_clip(path)
    path.write_text("export PATH=/bin")  # not a pickle
    with pytest.raises(UserError, match=r"clip.pt: not a readable checkpoint"):
        ScenarioCLIP.from_clip(path)


def test_the_error_does_not_explain_how_to_run_the_code(tmp_path: Path) -> None:
    """Unlike torch's own message."""
    torch.save(RunsCode(), tmp_path / "pickle.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")  # type: ignore[no-untyped-call]
    messages = {"pickle.pt": r"\(Unsupported global: GLOBAL exec was not .* by default\)", "script.pt": "a TorchScript"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=rf"{name}: refused: .*{message}") as caught:
            ScenarioCLIP.from_clip(tmp_path / name)
        assert "weights_only" not in str(caught.value)


def test_mismatches_are_listed_in_one_error(clip: Any, tmp_path: Path) -> None:
    clip.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = safetensors.load_file(file)

    def modify(**changes: Tensor | None) -> None:
        state = whole | {k.replace("__", "."): v for k, v in changes.items()}
        safetensors.save_file({k: v for k, v in state.items() if v is not None}, file)

    modify(text_model__final_layer_norm__bias=None, text_model__encoder__layers__1__mlp__fc1__bias=torch.zeros(7))
    message = r"text encoder.*missing head.norm.bias; of another shape blocks.1.expand.bias \(\[7\], expected \[512\]\)"
    with pytest.raises(UserError, match=message):
        ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE)
    modify(vision_model__encoder__layers__0__mlp__gate__weight=torch.zeros(7))
    with pytest.raises(UserError, match=r"vision encoder, encoder.layers.0.mlp.gate.weight: CLIP has no such tensor"):
        ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE)
    # Older versions of transformers wrote these constants too.
    modify(**{f"{kind}_model__embeddings__position_ids": torch.arange(5)[None] for kind in ("vision", "text")})
    ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE)
    # Tensors of other architectures are never ignored silently.
    for name, message in (
        ("vision_model__adapter__weight", "vision encoder, unexpected adapter.weight: CLIP has"),
        ("vision_model__embeddings__patch_embedding__bias", "unexpected embeddings.patch_embedding.bias: CLIP has"),
        ("text_model__encoder__layers__0__self_attn__rope", "text encoder, encoder.layers.0.self_attn.rope: CLIP has"),
        ("visual_projection__bias", "unexpected visual_projection.bias: CLIP has"),
    ):
        modify(**{name: torch.zeros(12)})
        with pytest.raises(UserError, match=message):
            ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE)
    query = "vision_model__encoder__layers__0__self_attn__q_proj__weight"
    for wrong in (torch.zeros(7, 192), torch.zeros(192, 191), torch.zeros(192)):
        modify(**{query: wrong})
        with pytest.raises(UserError, match=r"layers.0.self_attn: got query, key and value weights of shapes \["):
            ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE)
    modify(vision_model__encoder__layers__0__mlp__fc1__weight=torch.zeros(768, 192, dtype=torch.int8))
    with pytest.raises(UserError, match=r"not floats blocks.0.expand.weight \(torch.int8\)"):
        ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE)
    for name, shape in (
        ("vision_model__embeddings__patch_embedding__weight", (192,)),
        ("vision_model__embeddings__position_embedding__weight", (0, 192)),
        ("text_model__embeddings__token_embedding__weight", (31,)),
        ("visual_projection__weight", ()),
    ):
        modify(**{name: torch.zeros(shape)})
        with pytest.raises(UserError, match=rf"got shape {re.escape(str(list(shape)))}, expected a matrix"):
            ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE)
    modify(vision_model__embeddings__class_embedding=None)
    with pytest.raises(UserError, match="not a CLIP checkpoint"):
        ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE)
    modify(visual_projection__weight=None)
    with pytest.raises(UserError, match=r"missing visual_projection.weight"):
        ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE)
    modify()
    record = json.loads((tmp_path / "config.json").read_text())
    for end in (2, 28):
        record["text_config"]["eos_token_id"] = end
        (tmp_path / "config.json").write_text(json.dumps(record))
        if end == 2:  # as in early configs
            ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE)
    with pytest.raises(UserError, match="text eos_token_id 28, expected 30, the last of the vocabulary"):
        ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE)
    (tmp_path / "config.json").write_text(json.dumps(record | {"vision_config": [1]}))
    with pytest.raises(UserError, match="vision_config: got a list, expected an object"):
        ScenarioCLIP.from_clip(tmp_path, freeze=FREEZE)
    clip.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"vision.width: 768 and 192; .*text.layers: 12 and 2"):
        ScenarioCLIP.from_clip(tmp_path, config=ModelConfig())
    assert ScenarioCLIP.from_clip(tmp_path).config.freeze == FreezeConfig(2, 2)
    with pytest.raises(UserError, match="got schema None, expected 1"):
        ScenarioCLIP.from_pretrained(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such file or directory"):
        ScenarioCLIP.from_clip(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"contains none of model.safetensors, "):
        ScenarioCLIP.from_clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not a header")
    with pytest.raises(UserError, match=r"model.safetensors: not a readable safetensors file"):
        ScenarioCLIP.from_clip(tmp_path)
    with pytest.raises(UserError, match=r"config.json: no such file"):
        ScenarioCLIP.from_pretrained(tmp_path)
    small().save_pretrained(tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    extra = {"more": torch.zeros(1)} | {k: v for k, v in state.items() if k != "text.object.head.norm.bias"}
    safetensors.save_file(extra, tmp_path / "model.safetensors")
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"missing text.object.head.norm.bias; unexpected more$"):
        ScenarioCLIP.from_pretrained(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="got a list, expected a dictionary of tensors"):
        ScenarioCLIP.from_clip(tmp_path / "list.pt")
    for content in ({"state_dict": [1]}, {"state_dict": None}):
        torch.save(content, tmp_path / "list.pt")
        for read in (ScenarioCLIP.from_clip, ScenarioCLIP.from_reference):
            with pytest.raises(UserError, match=r"state_dict: got a .*, expected a dictionary of tensors"):
                read(tmp_path / "list.pt")
    torch.save({1: torch.zeros(1)}, tmp_path / "numbers.pt")
    with pytest.raises(UserError, match="expected a dictionary of tensors, but 1 are not tensors"):
        ScenarioCLIP.from_clip(tmp_path / "numbers.pt")
    torch.save({"ema": torch.zeros(1)}, tmp_path / "ema.pt")
    with pytest.raises(UserError, match=r"no EMA teacher \(expected"):
        ScenarioCLIP.from_reference(tmp_path / "ema.pt", teacher=True)
    torch.save({"lr": 0.1}, tmp_path / "numbers.pt")
    with pytest.raises(UserError, match="expected a dictionary of tensors, but lr are not tensors"):
        ScenarioCLIP.from_clip(tmp_path / "numbers.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match=r"text.pt: "):
        ScenarioCLIP.from_clip(tmp_path / "text.pt")
