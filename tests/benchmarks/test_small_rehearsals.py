"""The GPU cases of the smaller benchmarks, rehearsed on a CPU at toy sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ("views", "ceilings", "distillation", "ema", "layers", "data", "trainer")
RUN = """
import sys
import pytest
code = pytest.main(sys.argv[2:])
sys.path.insert(0, "benchmarks")
from scenarioclip_fast.benchmarks import tune_views
sys.exit(code or tune_views.main(["--quick", "--out", sys.argv[1]]))
"""
# Accepted reasons for skipping a case.
ALLOWED = (
    "Pillow decodes on the CPU",
    "takes half a minute",
    "nvidia-dali",
    "nvidia-nvimgcodec",
    "torchvision",
    "simplejpeg",
    "instant-clip-tokenizer",
)


def test_rehearsals(tmp_path: Path) -> None:
    lines, tuned = tmp_path / "lines.jsonl", tmp_path / "tuned.json"
    options = ["-m", "gpu", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'pytest'}"]
    options += ["-p", "scenarioclip_fast.bench.plugin", f"--bench-lines={lines}"]
    files = [f"benchmarks/bench_{name}.py" for name in FILES]
    # One thread: more do not help at toy sizes.
    env = {**os.environ, "SCENARIOCLIP_FAST_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(tuned), *files, *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    cases = [row for row in rows if "outcome" in row]
    assert len(cases) == next(row["total"] for row in rows if "total" in row)
    skipped = [row for row in cases if row["outcome"] != "measured"]
    assert all(row["outcome"] == "left out" and row["reason"].startswith(ALLOWED) for row in skipped), skipped
    # The names that benchmarks/readme.py matches.
    measured = {(row["group"], row["form"]) for row in cases if row["outcome"] == "measured"}
    for form in ("python loop", "ours: cuda", "ours: triton"):
        assert ("distillation forward + backward, 128 scenes, cuda", form) in measured
    assert ("all four distillation terms, forward + backward, 128 scenes, cuda", "ours: cuda") in measured
    assert {form for group, form in measured if group == "ceilings, cuda"} == {
        "copy",
        "product, float32",
        "product, tf32",
        "product, bfloat16",
    }
    assert sum(group.startswith("mixed views, ") and group.endswith(", GPU") for group, _ in measured) == 4
    assert any(group.startswith("ema update, ") for group, _ in measured)
    if not any("simplejpeg" in row["reason"] for row in skipped):
        assert {("whole batches, cuda", form) for form in ("published", "ours, torch")} <= measured
        assert ("640 x 480, 6 objects, 3 relations, cuda", "ours, torch") in measured

    found = json.loads(tuned.read_text())
    assert len(found["calls"]) == 4 and len(found["variants"]) == 3
    assert found["kernels, masked, training"][-1]["kernels"] == "all"
