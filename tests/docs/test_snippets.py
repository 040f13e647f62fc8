"""Runs the Python snippets of README.md and docs/quickstart.md."""

from __future__ import annotations

import re
from pathlib import Path
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
