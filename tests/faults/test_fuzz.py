"""`make fuzz`: a short run finds nothing, and a planted fault is found, kept and reproduced."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from campaign import SEED, trials

FUZZ = Path(__file__).parents[1] / "fuzz" / "fuzz.py"


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH")
    probe = ["g++", "-fsanitize=address,undefined", "-x", "c++", "-", "-o", "/dev/null"]
    if subprocess.run(probe, input="int main() {}", text=True, capture_output=True, check=False).returncode != 0:
        pytest.skip("g++ lacks its sanitizers")


def fuzz(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FUZZ, *options], capture_output=True, text=True, check=False)


def test_no_input_makes_the_native_code_fail() -> None:
    done = fuzz("--seconds", str(trials(3, 600)), "--seed", str(SEED))
    assert done.returncode == 0, done.stderr
    total = re.findall(r"(\d+) executions, \d+/s", done.stdout)
    targets = dict(re.findall(r"^  (\w+) +(\d+) executions", done.stdout, re.M))
    assert int(total[-1]) >= 1000 and len(targets) == 9
    assert all(int(count) > 10 for count in targets.values()), done.stdout


def test_a_planted_fault_is_found_and_reproduced() -> None:
    done = fuzz("--seconds", "60", "--only", "selftest")
    assert done.returncode == 77, done.stdout + done.stderr
    assert "heap-buffer-overflow" in done.stderr
    command = re.search(r"^reproduce: (.+)$", done.stderr, re.M)
    assert command is not None, done.stderr
    program, target, path = command[1].split()
    try:
        assert Path(path).read_bytes().startswith(b"bug")
        again = subprocess.run([program, target, path], capture_output=True, text=True, check=False)
        assert again.returncode == 77 and "heap-buffer-overflow" in again.stderr
    finally:
        Path(path).unlink()
