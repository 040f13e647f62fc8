"""Skips tests marked `gpu` where there is no GPU, except in a rehearsal of `make gpu`; sets up parallel tests."""

from __future__ import annotations

import os

import pytest
import torch

REHEARSAL = os.environ.get("SCENARIOCLIP_FAST_REHEARSAL") == "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The workers of `-n auto`: up to 4, but 1 on a GPU, whose memory some tests measure."""
    cores = os.cpu_count() or 1
    workers = 1 if torch.cuda.is_available() else min(4, cores)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(2, cores // workers)))  # at least 2, to test parallel kernels
    return workers


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        # Inherited by the benchmarks that tests run, this would disable pytest-benchmark.
        os.environ.pop("PYTEST_XDIST_WORKER", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if REHEARSAL or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU is visible to torch")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
