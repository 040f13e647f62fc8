"""Joining and leaving a world."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from scenarioclip_fast.distributed import join_world

# NCCL may wait for lost ranks when a failed rank destroys its groups. Here it waits forever.
STUCK = """
import os, time
import torch.distributed as dist
from scenarioclip_fast import distributed
distributed._GRACE_S = 0.5
dist.destroy_process_group = lambda: time.sleep(3600)
os.environ["RANK"] = "0" if os.fork() else "1"
with distributed.join_world("cpu", timeout_s=8):
    raise ValueError("a mistake")
"""


def test_one_process_on_the_second_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["cuda:0"]

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], str(device)
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_world("cuda:1") as world:
        # Otherwise torch.accelerator.synchronize() would not wait for copies from this GPU.
        assert current == ["cuda:1"] == [str(world.device)]
    assert current == ["cuda:0"]


def test_a_failed_rank_ends_even_if_destroying_its_groups_hangs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", STUCK],
        env={**os.environ, **place, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "cannot continue: rank" in done.stderr and "ValueError: a mistake" in done.stderr
