"""`scenarioclip-fast export`: other programs load the files, and errors are one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import Views, generate_scenes
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model import FreezeConfig, ModelConfig, ScenarioCLIP, TextConfig, VisionConfig, export_hf
from scenarioclip_fast.model.pretrained import read_scales
from scenarioclip_fast.ops.views import CLIP_STD, render_views

Image = pytest.importorskip("PIL.Image")


SCALES = {"global": 20.0, "object": 40.0, "relation": 80.0}


def trained(path: Path) -> ScenarioCLIP:
    torch.manual_seed(0)
    config = ModelConfig(
        embed_dim=12,
        vision=VisionConfig(16, 8, 24, 2, 3),
        text=TextConfig(8, 31, 16, 2, 2),
        freeze=FreezeConfig.nothing(),
    )
    model = ScenarioCLIP(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(path, SCALES)
    return model


def test_each_level_becomes_a_transformers_clip_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    model = trained(tmp_path / "run" / "model")
    assert main(["export", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert str(tmp_path / "hf" / "relation") in capsys.readouterr().out
    pixels = torch.randn(2, 3, 16, 16)
    for level in ("global", "object", "relation"):
        clip = transformers.CLIPModel.from_pretrained(tmp_path / "hf" / level).eval()
        assert clip.logit_scale.exp().item() == pytest.approx(SCALES[level], rel=1e-6)  # a float32 logarithm
        head = model.vision[level].head
        with torch.no_grad():
            pooled = clip.vision_model(pixels).pooler_output
            got = head.out_norm(clip.visual_projection(pooled) + head.projection.bias)
            # Float32 sums in a different order.
            torch.testing.assert_close(got, model.encode_image(pixels, level), rtol=2e-4, atol=2e-4)


def test_exported_image_processor_matches_the_views(tmp_path: Path) -> None:
    """The processor of transformers matches the scene's global view up to rounding."""
    transformers = pytest.importorskip("transformers")
    trained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    scene = next(iter(generate_scenes(1, seed=0)))
    prepare = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "hf" / "global")
    got = prepare(Image.fromarray(scene.image.numpy()), return_tensors="pt")["pixel_values"]  # type: ignore[union-attr]
    expected = render_views([scene.image], Views.of_scenes([scene]), size=16)[:1]  # type: ignore[list-item]
    torch.testing.assert_close(got, expected, rtol=0, atol=2 / 255 / min(CLIP_STD))


def test_whole_model_in_one_file(tmp_path: Path) -> None:
    model = trained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--to", "safetensors", "--out", str(tmp_path / "out")]) == 0
    back = ScenarioCLIP.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())
    assert read_scales(tmp_path / "out") == SCALES


def test_invalid_usage_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "--to", "hf", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path} has no trained model")
    assert error.count("\n") == 1


@pytest.mark.parametrize("form", ["safetensors", "hf"])
def test_an_earlier_export_is_kept_without_force(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "run" / "model")
    out = tmp_path / "out" if form == "safetensors" else tmp_path / "out" / "object"
    out.mkdir(parents=True)
    (out / "model.safetensors").write_bytes(b"kept")
    command = ["export", str(tmp_path / "run"), "--to", form, "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "model.safetensors exists: pass --force to overwrite it" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == b"kept"
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert main([*command, "--force"]) == 0
    assert (out / "model.safetensors").read_bytes() != b"kept"


def test_invalid_scales_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = trained(tmp_path / "model")
    for scales in ({"global": 0}, {"global": float("nan")}, {"global": float("inf")}, {"foo": 3.0}):
        with pytest.raises(
            UserError, match=r"scales: got .*, expected a finite factor above 0 for each of global, obj"
        ):
            model.save_pretrained(tmp_path / "new", scales)
        assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "new", {"global": 14, "object": torch.tensor(20.0)})  # type: ignore[dict-item]
    assert read_scales(tmp_path / "new") == {"global": 14.0, "object": 20.0}
    for scale in (0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"scale: got .*, expected a finite number above 0"):
            export_hf(model, tmp_path / "hf", scale=scale)


def test_a_run_directory_is_not_a_saved_model(tmp_path: Path) -> None:
    trained(tmp_path / "run" / "model")
    with pytest.raises(UserError, match=r"run is a run directory: expected its model, .*run/model"):
        ScenarioCLIP.from_pretrained(tmp_path / "run")
