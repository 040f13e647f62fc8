from __future__ import annotations

import gzip
import io
import json
import math
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scenarioclip_fast.train import metrics
from scenarioclip_fast.train.metrics import MetricsLog, read_metrics
from scenarioclip_fast.train.timing import BottleneckReport, DataWait, StepProfile


def row(step: int, loss: float = 1.0, **more: float) -> dict[str, Any]:
    speed = {"scenes_per_s": 1.0, "views_per_s": 9.0, "tflop_per_s": 0.125, "data_wait": 0.25, "bad_samples": 0}
    return {"step": step, "loss": loss, "contrastive/global": 0.5, "lr": 1e-3, "grad_norm": 2.0, **speed, **more}


def test_rows_are_json_lines_with_null_for_non_finite_numbers(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, 10, tensorboard=False, file=io.StringIO())
    log.write([row(1), row(2, math.nan), row(3, math.inf)])
    log.close()
    assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, None, None]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("damage", [b"\0" * 700, b"\xff\n", b'{"st\n', b"7\n{}\n"])
def test_a_damaged_log_does_not_prevent_resuming(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps(row(step)).encode() + b"\n" for step in (1, 2, 3)]
    path.write_bytes(good[0] + damage + b"\n" + good[1] + good[2])
    MetricsLog(tmp_path, 2, 10, tensorboard=False, file=io.StringIO()).close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics, "_summary_writer", lambda *_: SimpleNamespace(add_scalar=disk_full))
    out = io.StringIO()
    log = MetricsLog(tmp_path, 0, 10, file=out)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))  # writing larger files fails, as on a full disk
    try:
        for step in range(1, 9):
            log.write([row(step)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert out.getvalue().count("metrics.jsonl not written: [Errno 27] File too large; training continues") == 1
    assert out.getvalue().count("TensorBoard events are no longer written: [Errno 28] No space left") == 1
    assert len(read_metrics(log.path)) < 3
    log.write([row(9)])
    assert [r["step"] for r in read_metrics(log.path)] == list(range(1, 10))
    log.close()


def test_log_lines_without_a_terminal_are_sparse_but_include_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    out = io.StringIO()
    log = MetricsLog(tmp_path, 0, 10, tensorboard=False, file=out)
    for step in range(1, 11):
        now += 1
        log.write([row(step)])
    log.log("a note")
    log.close()
    lines = out.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1/10", "step 6/10", "step 10/10", "a note"]
    assert "loss 1.0000 (global 0.500)" in lines[0]
    assert lines[0].endswith("0.125 TFLOP/s, waiting for data 25%")


def test_a_line_on_a_gpu_has_mfu_and_memory(tmp_path: Path) -> None:
    out = io.StringIO()
    log = MetricsLog(tmp_path, 0, 10, tensorboard=False, file=out)
    log.write([row(1, mfu=0.4567, memory_gib=12.34, bad_samples=3)])
    log.close()
    assert "MFU 45.7%, waiting for data 25%, 12.3 GiB, 3 bad samples\n" in out.getvalue()


def test_a_terminal_has_a_progress_bar(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    log = MetricsLog(tmp_path, 4, 10, tensorboard=False, file=out)
    log.write([row(5), row(6)])
    log.log("a note")
    log.close()
    assert "6/10" in out.getvalue() and "a note" in out.getvalue()


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0, 10, file=io.StringIO())
    log.write([row(1, 4.0), row(2, 3.0)])
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 4.0), (2, 3.0)]


def test_data_wait_on_a_cpu_is_the_host_wait() -> None:
    wait = DataWait(torch.device("cpu"))
    for seconds in (0.5, 0.25):
        wait.begin_step(seconds)
        wait.end_step()
    assert wait.pop() == 0.75
    assert wait.pop() == 0


def test_data_wait_on_a_gpu_is_at_most_its_idle_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0  # ms, of the GPU

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "of cuda:1"
            self.at = now

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    wait = DataWait(torch.device("cuda:1"))

    def step(begins: float, ends: float, host: float) -> None:
        nonlocal now
        now = begins
        wait.begin_step(host)
        now = ends
        wait.end_step()

    step(0, 1000, host=5.0)  # the first: nothing ran before it
    step(1000, 2000, host=0.8)  # the host waited while the GPU was busy
    step(2300, 3000, host=0.8)  # the GPU was idle for 300 ms
    assert wait.pop() == pytest.approx(0.3)
    step(4000, 5000, host=0.1)  # the host was busy with something else, such as a checkpoint
    assert wait.pop() == pytest.approx(0.1)


def test_the_bottleneck_report() -> None:
    report = BottleneckReport()
    assert not report.add(100.0, 2.9)
    assert str(report) == "compute-bound: the step waited for data 2.9% of the time"
    assert not report.add(100.0, 4.0)
    assert str(report).startswith("data-bound: the step waited for data 3.5% of the time; raise data.threads")
    assert report.add(150.0, 0.0)  # every five minutes
    assert not report.add(1.0, 0.0)


def test_a_profile_covers_its_steps(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path / "profile", 2, 3)
    lines = []
    for step in range(1, 6):
        profile.before(step)
        torch.ones(step).cumsum(0)
        lines.append(profile.after(step))
    assert [text is not None for text in lines] == [False, False, True, False, False]
    assert str(profile.path) in str(lines[2])
    events = json.loads(gzip.decompress(profile.path.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::cumsum" for event in events) == 2


def test_an_unfinished_profile_is_written(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, 2, 30)
    assert profile.close() is None
    assert not profile.path.exists()
    profile.before(2)
    assert profile.close() is not None
    assert gzip.decompress(profile.path.read_bytes())


def test_failing_to_write_a_profile_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    profile = StepProfile(tmp_path / "file", 1, 1)
    profile.before(1)
    line = profile.after(1)
    assert line is not None and line.startswith("profile not written: ")
