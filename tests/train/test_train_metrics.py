from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from scenarioclip_fast.train import metrics
from scenarioclip_fast.train.metrics import MetricsLog, read_metrics


def row(step: int, loss: float = 1.0) -> dict[str, Any]:
    speed = {"scenes_per_s": 1.0, "views_per_s": 9.0, "data_wait": 0.25}
    return {"step": step, "loss": loss, "contrastive/global": 0.5, "lr": 1e-3, "grad_norm": 2.0, **speed}


def test_rows_are_json_lines_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, 10, tensorboard=False, file=io.StringIO())
    log.write([row(1), row(2, math.nan), row(3, math.inf)])
    log.close()
    assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, None, None]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_resumed_log_holds_every_step_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, 10, tensorboard=False, file=io.StringIO())
    log.write([row(s) for s in range(1, 6)])
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row(6))[:20])  # killed while writing
    log = MetricsLog(tmp_path, 3, 10, tensorboard=False, file=io.StringIO())
    log.write([row(s, 2.0) for s in range(4, 11)])
    log.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 11))
    assert [r["loss"] for r in rows] == [1.0] * 3 + [2.0] * 7


def test_lines_off_a_terminal_are_few_and_the_last_step_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    out = io.StringIO()
    log = MetricsLog(tmp_path, 0, 10, tensorboard=False, file=out)
    for step in range(1, 11):
        now += 1
        log.write([row(step)])
    log.say("a note")
    log.close()
    lines = out.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1/10", "step 6/10", "step 10/10", "a note"]
    assert "loss 1.0000 (global 0.500)" in lines[0] and "waiting for data 25%" in lines[0]


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    log = MetricsLog(tmp_path, 4, 10, tensorboard=False, file=out)
    log.write([row(5), row(6)])
    log.say("a note")
    log.close()
    assert "6/10" in out.getvalue() and "a note" in out.getvalue()


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0, 10, file=io.StringIO())
    log.write([row(1, 4.0), row(2, 3.0)])
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 4.0), (2, 3.0)]
