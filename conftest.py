"""Tests and benchmarks marked `gpu` are left out where there is none."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        absent = pytest.mark.skip(reason="no GPU is visible to torch")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(absent)
