"""`make gpu-rehearse`: runs `make gpu` on a machine without a GPU, as far as possible.

Copies the tracked files and gpu-pack/ into an empty directory without .git and runs `make gpu` there, without a package
index and in the environment of like_machine.py: wheels, build, tests, benchmarks, tuning, demo, record. Tests run up to
their first use of the device; benchmarks run on the CPU at toy sizes. Prints the start-up time of each section.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gpu import pack, sections
from gpu.jobs import PASSED

ROOT = Path(__file__).resolve().parents[2]
TARGET_S = 40  # total start-up time of the sections, on two idle cores
TIME_FACTOR = 6.0  # two cores compared with a GPU machine with sixteen


def copy_checkout(folder: Path) -> None:
    """Copy the tracked and untracked files that git does not ignore, and gpu-pack/."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(ROOT / pack.FOLDER, folder / pack.FOLDER)


def environment(work: Path, python: Path) -> dict[str, str]:
    """An environment without a package index and without caches of earlier runs."""
    dropped = ("SCENARIOCLIP_FAST_", "PIP_", "TRITON_", "PYTEST_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    env |= {
        "HOME": str(work / "home"),
        "PIP_NO_INDEX": "1",
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "SCENARIOCLIP_FAST_REHEARSAL": "1",
        "MPLCONFIGDIR": str(work / "matplotlib"),
        "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", "")]),
    }
    (work / "home").mkdir()
    return env


def main() -> int:
    parser = argparse.ArgumentParser(description="Rehearse make gpu without a GPU.")
    parser.add_argument("python", type=Path, help="interpreter of an environment made by like_machine.py")
    parser.add_argument("out", type=Path, help="output directory of the rehearsed record")
    parser.add_argument("--only", default="", help="run only these sections, space-separated")
    args = parser.parse_args()
    python, out = args.python.absolute(), args.out.resolve()
    fallback = json.loads((python.parents[1] / "like.json").read_text())["fallback_reason"]
    if fallback:
        print(f"note: not the GPU machine's Python and torch: {fallback}", flush=True)
    manifest = pack.read_manifest(ROOT / pack.FOLDER)
    assert manifest is not None, "run make gpu-pack first"
    if damaged := pack.damaged_files(ROOT / pack.FOLDER, manifest):
        print(
            f"error: {pack.FOLDER}/ differs from its manifest: {' '.join(damaged)}: run make gpu-pack", file=sys.stderr
        )
        return 1
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="scenarioclip-fast-rehearsal-") as folder:
        work = Path(folder)
        checkout = work / "checkout"
        checkout.mkdir()
        copy_checkout(checkout)
        command = ["make", "gpu", f"PYTHON={python}", f"OUT={out}", f"ONLY={args.only}", f"FACTOR={TIME_FACTOR:g}"]
        env = environment(work, python)
        done = subprocess.run(command, cwd=checkout, env=env, stdin=subprocess.DEVNULL, check=False)
    return report(out, args.only.split() or sections.names()) or int(done.returncode != 0)


def report(out: Path, requested: Sequence[str]) -> int:
    """Print the start-up time of each section; return 1 if one did not pass."""
    try:
        with (out / "sections.csv").open() as lines:
            rows = {row["section"]: row for row in csv.DictReader(lines)}
    except OSError:
        print("error: the rehearsal left no sections.csv", file=sys.stderr)
        return 1
    expected = ["wheels", "build", "start", *requested]
    results = {name: rows[name]["result"] if name in rows else "missing" for name in expected}
    failed = [f"{name} ({result})" for name, result in results.items() if result != PASSED]
    start_up = {name: float(row["start-up seconds"]) for name, row in rows.items() if row["start-up seconds"]}
    checks = {name: start_up.pop(name) for name in sections.CHECK_PARTS if name in start_up}
    print("\nstart-up time by section, s")
    for name, seconds in (checks | start_up).items():
        print(f"  {name:20} {seconds:6.2f}{'  (parallel)' if name in checks else ''}")
    total = sum(start_up.values()) + max(checks.values(), default=0.0)
    print(
        f"  {'total':20} {total:6.2f} (target {TARGET_S} on two idle cores; parallel sections count as their slowest)"
    )
    files = ["log.txt", "all.tar.gz"]
    files += ["record.json", "README.md"] if any(name.startswith("bench_") for name in requested) else []
    failed += [f"{name} (missing)" for name in files if not (out / name).exists()]
    if failed:
        print(f"error: rehearsal failed: {', '.join(failed)}; see {out / 'log.txt'}", file=sys.stderr)
        return 1
    print(f"rehearsed {len(rows)} sections; output in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
