"""Creates a virtual environment like that of a bare GPU machine: Python 3.12, torch 2.11, packages of machine.txt.

Run: python benchmarks/gpu/like_machine.py DIR

If Python 3.12 or this torch is unavailable, falls back to the current Python with a supported torch; like.json in DIR
records the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("machine.txt")
VERSION = "3.12"
PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def interpreters() -> list[str]:
    """Python 3.12 interpreters: GPU_PYTHON, the one on PATH, those of pyenv."""
    candidates = [os.environ.get("GPU_PYTHON"), shutil.which(f"python{VERSION}")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += map(str, sorted(pyenv.glob(f"versions/{VERSION}.*/bin/python"), reverse=True))
    query = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
    out = []
    for path in filter(None, candidates):
        done = subprocess.run([path, "-c", query], capture_output=True, text=True, check=False)  # it may be a shim
        if done.stdout.strip() == VERSION:
            out.append(path)
    return out


def make(python: str, folder: Path, requirements: list[str]) -> str | None:
    """Create the environment; return None, or the error."""
    shutil.rmtree(folder, ignore_errors=True)
    install = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    # torch first, since it brings gigabytes of dependencies: an unavailable version fails early.
    commands = [[python, "-m", "venv", str(folder)], [*install, requirements[0]], [*install, *requirements]]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            text = (done.stderr or done.stdout).strip().splitlines()
            return next((line for line in reversed(text) if "ERROR" in line), text[-1] if text else "no reason given")
    return None


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    lines = [line.strip() for line in REQUIREMENTS.read_text().splitlines()]
    requirements = [line for line in lines if line and not line.startswith("#")]
    reason = f"no Python {VERSION} was found (GPU_PYTHON=... names one)"
    for python in interpreters():
        print(f"{folder.name}: Python {VERSION}, {requirements[0]} and {len(requirements) - 1} packages", flush=True)
        if (reason := make(python, folder, requirements) or "") == "":
            break
    else:
        dependencies = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
        supported = next(entry for entry in dependencies if entry.startswith("torch"))
        print(f"{folder.name}: {reason}; falling back to {sys.executable} with {supported}", flush=True)
        # The versions pinned in machine.txt may not exist for this Python.
        relaxed = [supported, *(line.partition("==")[0] for line in requirements[1:])]
        if (failure := make(sys.executable, folder, relaxed)) is not None:
            print(f"error: {failure}", file=sys.stderr)
            return 1
    (folder / "like.json").write_text(json.dumps({"fallback_reason": reason}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
