"""`bench index` with fewer scenes than ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from scenarioclip_fast.benchmarks import bench_index


def test_a_rank_without_scenes_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_index, "SCENES", 1)
    stats = SimpleNamespace(stats=SimpleNamespace(median=1e-6))
    benchmark: Any = SimpleNamespace(name="positions", extra_info={}, stats=stats, pedantic=lambda run, **_: run())
    bench_index.test_positions("scenes", benchmark)
    assert capsys.readouterr().out.startswith("positions: 1 us a position")
