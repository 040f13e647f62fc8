"""The examples run as shipped."""

from __future__ import annotations

import importlib.util
import os
import subprocess
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
def test_losses_in_other_training_loops(name: str) -> None:
    losses = load(name).main(steps=40)
    assert losses[-1] < 0.5 * losses[0]


def test_train_on_your_own_scenes(tmp_path: Path) -> None:
    assert load("train_on_your_own_scenes").main(tmp_path, count=32, steps=15) < 0.9


def test_loss_in_lightning_module() -> None:
    pytest.importorskip("lightning")
    losses = load("loss_in_lightning_module").main(steps=40)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (1, False)])
def test_slurm_script_starts_every_rank_and_requeues_itself(tmp_path: Path, code: int, requeued: bool) -> None:
    """Stubs of Slurm's commands and of scenarioclip-fast record how they are called."""
    commands = {
        # Runs three tasks on two nodes and returns the highest of their exit codes.
        "srun": """
            while [[ "$1" == --* ]]; do shift; done
            worst=0
            for task in 0 1 2; do
                SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@"; code=$?; ((code > worst)) && worst=$code
            done
            exit $worst""",
        "scontrol": """
            if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "scontrol $*" >> log; fi""",
        "scenarioclip-fast": f"""
            echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" >> log; exit {code}""",
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_NODELIST": "node[7-8]", "JOB_ID": "41234", "NTASKS": "3", "CPUS_PER_TASK": "8"}
    environment = {**os.environ, **{f"SLURM_{k}": v for k, v in slurm.items()}}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    script = [str(EXAMPLES / "train.slurm.sh"), "data.shards=a dir"]
    done = subprocess.run(["bash", *script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
    command = "train -c fast --resume data.threads=8 data.shards=a dir"
    expected = [f"{rank} {rank % 2} 3 node7:21234 {command}" for rank in range(3)]
    assert (tmp_path / "log").read_text().splitlines() == expected + ["scontrol requeue 41234"] * requeued
