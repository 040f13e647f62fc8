"""benchmarks/gpu.sh on machines that it is not made for, and its budgets with a Python that only pretends."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"

# A GPU, but no compute-sanitizer; one benchmark hangs, one fails, the ceilings leave a record.
PRETENDER = """#!/bin/sh
case "$*" in
  "-c import pytest") exit $NO_PYTEST;;
  "-c "*) exit 0;;
  *"bench views"*) exec sleep 60;;
  *"bench data"*) echo broken; exit 1;;
  *"bench ceilings"*) echo '{}' >"$OUT/record.json";;
esac
echo "ran: $*"
"""


def run(tmp_path: Path, python: str, **variables: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("bash") is None or shutil.which("timeout") is None:
        pytest.skip("bash or timeout is not on PATH")
    env = {**os.environ, "PYTHON": python, "OUT": str(tmp_path / "out"), **variables}
    return subprocess.run(["bash", SCRIPT], env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def pretender(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.write_text(PRETENDER)
    path.chmod(0o755)
    return str(path)


def sections(tmp_path: Path) -> dict[str, str]:
    with (tmp_path / "out" / "sections.csv").open() as lines:
        return {row["section"]: row["exit"] for row in csv.DictReader(lines)}


def test_without_python(tmp_path: Path) -> None:
    done = run(tmp_path, "no-such-python")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no-such-python is not on PATH: make gpu PYTHON=...\n"


def test_without_torch_or_gpu(tmp_path: Path) -> None:
    for python, message in (
        ("false", "has no torch"),
        (write(tmp_path, "no_gpu", NO_GPU), "sees no GPU through torch"),
    ):
        done = run(tmp_path, python)
        assert (done.returncode, done.stdout) == (2, "") and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


NO_GPU = '#!/bin/sh\ncase "$*" in *is_available*) exit 1;; esac\n'


def write(tmp_path: Path, name: str, text: str) -> str:
    path = tmp_path / name
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_one_deadline(tmp_path: Path, pretender: str) -> None:
    """What hangs is stopped, what comes too late is left out, and both are said."""
    done = run(tmp_path, pretender, TOTAL="8", NO_PYTEST="0")
    found = sections(tmp_path)
    assert done.returncode == 1
    assert found["build"] == found["tests"] == found["bench_ceilings"] == "0"
    stopped = next(said for name, said in found.items() if name == "bench_views")
    assert stopped.startswith("stopped at its budget of ")
    assert found["demo"] == "left out: no time was left"
    assert "ran: benchmarks/readme.py" in done.stdout
    assert "bench ceilings --device cuda --limit 5" in (tmp_path / "out" / "log.txt").read_text()


def test_a_failure_costs_only_itself(tmp_path: Path, pretender: str) -> None:
    quick = write(tmp_path, "quick", PRETENDER.replace("exec sleep 60", "exit 0"))
    done = run(tmp_path, quick, NO_PYTEST="0")
    found = sections(tmp_path)
    assert done.returncode == 1 and found["bench_data"] == "1" and found["demo"] == "0"
    # A machine that is handed back may return no more than a few files.
    left = ["all.tar.gz", "log.txt", "record.json", "sections.csv"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == left
    assert "== bench_data: exit 1" in (tmp_path / "out" / "log.txt").read_text()
    with tarfile.open(tmp_path / "out" / "all.tar.gz") as everything:
        broken = everything.extractfile("./bench_data.txt")
        assert broken is not None and broken.read() == b"broken\n"


def test_a_stopped_run_of_pytest_says_what_failed(tmp_path: Path, pretender: str) -> None:
    """It is interrupted, not ended."""
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_wrong():\n    assert 1 == 2\ndef test_slow():\n    time.sleep(60)\n"
    )
    tests = f'*"-m pytest"*) exec {sys.executable} -m pytest -p no:cacheprovider {tmp_path / "test_slow.py"};;'
    slow = write(tmp_path, "slow", PRETENDER.replace('*"bench views"*', tests + '\n  *"bench views"*'))
    run(tmp_path, slow, TOTAL="6", NO_PYTEST="0", ONLY="tests")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "assert 1 == 2" in log and "KeyboardInterrupt" in log


def test_only_some_sections(tmp_path: Path, pretender: str) -> None:
    done = run(tmp_path, pretender, NO_PYTEST="0", ONLY="bench_ema demo")
    assert done.returncode == 0
    assert sections(tmp_path) == {"build": "0", "bench_ema": "0", "demo": "0"}


def test_without_pytest(tmp_path: Path, pretender: str) -> None:
    done = run(tmp_path, pretender, NO_PYTEST="1")
    assert done.returncode == 1
    assert sections(tmp_path)["tests and benchmarks"] == "left out: pytest is not installed"
    assert sections(tmp_path)["demo"] == "0"
