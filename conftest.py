"""Skips tests and benchmarks marked `gpu` on machines without a GPU, except in a rehearsal of `make gpu`."""

from __future__ import annotations

import os

import pytest
import torch

REHEARSAL = os.environ.get("SCENARIOCLIP_FAST_REHEARSAL") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if REHEARSAL or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU is visible to torch")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
