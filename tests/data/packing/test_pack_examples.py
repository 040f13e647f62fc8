"""The scripts in examples/ that pack in parts run as shipped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scenarioclip_fast.data import ShardSet, generate_scenes
from scenarioclip_fast.data.synthetic import write_published_layout

EXAMPLES = Path(__file__).parents[3] / "examples"


def stubs(folder: Path, **commands: str) -> dict[str, str]:
    """An environment in which these commands are on PATH."""
    for name, body in commands.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_the_shell_script_packs_and_merges(tmp_path: Path) -> None:
    write_published_layout(generate_scenes(30, seed=3), tmp_path / "set")
    environment = stubs(tmp_path, scenarioclip_fast=f'exec "{sys.executable}" -m scenarioclip_fast "$@"')
    script = ["bash", str(EXAMPLES / "pack_in_parts.sh")]
    command = [*script, "2", str(tmp_path / "out"), str(tmp_path / "set"), "--shard-size", "8", "--split", "hash"]
    for _ in range(2):  # the second run finds nothing to do
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert sum(len(ShardSet(tmp_path / "out", split=split)) for split in ("train", "val", "test")) == 30
    assert done.stderr.count("up to date") == 3
    failed = subprocess.run([*command[:-1], "no"], env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and failed.stderr.endswith("run the command again to go on\n")
    assert subprocess.run(script, capture_output=True, text=True, check=False).returncode == 2


@pytest.mark.parametrize("end", ["complete", "failed", "time limit"])
def test_the_slurm_script_packs_a_part_and_requeues_itself(end: str, tmp_path: Path) -> None:
    body = {"complete": "exit 0", "failed": "exit 2", "time limit": "exec sleep 60"}[end]
    log = tmp_path / "log"
    environment = stubs(
        tmp_path, scenarioclip_fast=f'echo "$*" >> "{log}"; {body}', scontrol=f'echo "scontrol $*" >> "{log}"'
    )
    slurm = {"ARRAY_TASK_ID": "3", "ARRAY_TASK_COUNT": "7", "ARRAY_JOB_ID": "41", "CPUS_PER_TASK": "8"}
    environment |= {f"SLURM_{name}": value for name, value in slurm.items()}
    command = ["bash", str(EXAMPLES / "pack.slurm.sh"), "out", "a set", "--shard-size", "5"]
    with subprocess.Popen(command, env=environment, cwd=tmp_path) as running:
        deadline = time.monotonic() + 30
        while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        if end == "time limit":
            running.send_signal(signal.SIGTERM)
        code = running.wait(30)
    lines = log.read_text().splitlines()
    assert lines[0] == "pack a set --shard-size 5 --out out --part 3/7 --workers 8"
    assert (code, lines[1:]) == (2 if end == "failed" else 0, ["scontrol requeue 41_3"] if end == "time limit" else [])


def test_the_slurm_script_merges(tmp_path: Path) -> None:
    environment = stubs(tmp_path, scenarioclip_fast='echo "$*" > log')
    subprocess.run(
        ["bash", str(EXAMPLES / "pack.slurm.sh"), "--merge", "out"], env=environment, cwd=tmp_path, check=True
    )
    assert (tmp_path / "log").read_text() == "pack --merge out\n"
