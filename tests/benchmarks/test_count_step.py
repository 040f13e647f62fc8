"""The bytes, kernels and casts of a training step, counted on fake tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scenarioclip_fast.requirements import import_problem

# Of the eager bf16 step at ViT-B/32 with 128 scenes.
MOST_GB, MOST_KERNELS, MOST_CASTS = 42, 1000, 30


def test_a_step_at_full_width() -> None:
    """In a separate process, because it replaces parts of the package."""
    if problem := import_problem("triton"):
        pytest.skip(problem)
    command = [sys.executable, "-m", "scenarioclip_fast.benchmarks.count_step"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    gigabytes, kernels, casts = (float(done.stdout.split(", ")[i].split()[0]) for i in range(3))
    assert 30 < gigabytes <= MOST_GB
    assert 800 < kernels <= MOST_KERNELS
    # The weights of all products: 2,200 chunks of 65,536 elements, 320 to a launch.
    assert 10 <= casts <= MOST_CASTS
