"""Runs the Python snippets of README.md, docs/quickstart.md and docs/new-loss.md."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import scenarioclip_fast as scf

ROOT = Path(__file__).resolve().parents[2]


def snippet(page: str) -> str:
    """The only Python block of a page."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return str(code)


def test_readme() -> None:
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[5:20, 5:20] = True
    names: dict[str, Any] = {
        "image": torch.randn(4, 8),
        "text": torch.randn(3, 8),
        "logit_scale": 14.3,
        "text_of_each_image": torch.tensor([0, 1, 2, 0]),
        "subject_mask": mask,
        "object_mask": mask.flip(0),
    }
    losses, region = snippet("README.md").split("# The focused region")
    exec(losses, names)
    assert names["loss"].isfinite() and names["ClipLoss"] is scf.losses.ClipLoss
    names["image"] = torch.randint(256, (40, 60, 3), dtype=torch.uint8)
    exec(f"# {region}", names)
    assert names["region"].shape == (40, 60, 3)


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scenarioclip_fast.data.preprocess")
    from PIL import Image

    from scenarioclip_fast.model import ModelConfig

    monkeypatch.chdir(tmp_path)
    scf.ScenarioCLIP(ModelConfig.preset("tiny")).save_pretrained(tmp_path / "runs" / "mine" / "model")
    Image.new("RGB", (90, 60), "red").save("photo.jpg")
    names: dict[str, Any] = {}
    exec(snippet("docs/quickstart.md"), names)
    assert names["image"].shape == (1, 128) and names["texts"].shape == (2, 128)


@pytest.mark.parametrize("rows", [[0, 3, 2], [2, 3, 0], [0, 0, 0]])
def test_new_loss(rows: list[int]) -> None:
    """Levels without rows add 0, and still give every parameter a gradient, which DDP waits for."""
    names: dict[str, Any] = {}
    exec(snippet("docs/new-loss.md"), names)
    module = scf.losses.ScenarioLoss(contrastive=names["SigmoidLevelLoss"]())
    image, text = ([torch.randn(n, 8, requires_grad=True) for n in rows] for _ in range(2))
    embeddings = SimpleNamespace(
        image=image, text=text, text_index=[torch.arange(n) for n in rows], teacher_image=None, action_scene=None
    )
    out = module(embeddings)
    out["loss"].backward()
    terms = [out[f"contrastive/{level}"] > 0 for level in ("global", "object", "relation")]
    assert terms == [n > 0 for n in rows]
    assert all(x.grad is not None for x in (*image, *text))
    # the distillation has no parameter by default
    assert {n: p.grad is not None and bool(p.grad.isfinite()) for n, p in module.named_parameters()} == dict.fromkeys(
        (
            f"contrastive.{kind}.{level}"
            for kind in ("logit_scale", "bias")
            for level in ("global", "object", "relation")
        ),
        True,
    )
