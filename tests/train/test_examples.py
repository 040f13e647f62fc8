"""The examples run as they are shipped."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["loss_in_plain_pytorch", "loss_in_open_clip_loop"])
def test_a_loop_of_ones_own(name: str) -> None:
    losses = load(name).main(steps=40)
    assert losses[-1] < 0.5 * losses[0]


def test_own_scenes(tmp_path: Path) -> None:
    assert load("train_on_your_own_scenes").main(tmp_path, count=32, steps=15) < 0.9
