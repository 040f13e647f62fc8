"""`make gpu-rehearse`: runs `make gpu` on a machine without a GPU, as far as that goes.

The tracked files and gpu-pack/ are copied into an empty directory without .git, and `make gpu` runs there in the
environment of like_machine.py, with no package index: wheels, build, tests, benchmarks, tuning, demo, record. Tests run
to their first use of the device; benchmarks run on the CPU at toy sizes. Prints what each section took to start.
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
from gpu.jobs import DONE

ROOT = Path(__file__).resolve().parents[2]
TARGET_S = 40  # start-up of all sections together, on two idle cores
SLOWER = 6.0  # two cores, against a machine's sixteen and its GPU


def unpacked(folder: Path) -> None:
    """The checkout as it travels: what git tracks or would track, and the pack."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(ROOT / pack.FOLDER, folder / pack.FOLDER)


def environment(work: Path, python: Path) -> dict[str, str]:
    """Without a package index, and without what an earlier run has compiled."""
    ours = ("SCENARIOCLIP_FAST_", "PIP_", "TRITON_", "PYTEST_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
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
    parser = argparse.ArgumentParser(description="Rehearses make gpu without a GPU.")
    parser.add_argument("python", type=Path, help="of an environment made by like_machine.py")
    parser.add_argument("out", type=Path, help="where the rehearsed record goes")
    parser.add_argument("--only", default="", help="run these sections alone")
    args = parser.parse_args()
    python, out = args.python.absolute(), args.out.resolve()
    fallback = json.loads((python.parents[1] / "like.json").read_text())["fallback_reason"]
    if fallback:
        print(f"note: not the GPU machine's Python and torch: {fallback}", flush=True)
    manifest = pack.read_manifest(ROOT / pack.FOLDER)
    assert manifest is not None, "make gpu-pack comes first"
    if bad := pack.damaged(ROOT / pack.FOLDER, manifest):
        print(f"error: {pack.FOLDER}/ differs from its manifest: {' '.join(bad)}: run make gpu-pack", file=sys.stderr)
        return 1
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="scenarioclip-fast-rehearsal-") as folder:
        work = Path(folder)
        checkout = work / "checkout"
        checkout.mkdir()
        unpacked(checkout)
        command = ["make", "gpu", f"PYTHON={python}", f"OUT={out}", f"ONLY={args.only}", f"FACTOR={SLOWER:g}"]
        env = environment(work, python)
        done = subprocess.run(command, cwd=checkout, env=env, stdin=subprocess.DEVNULL, check=False)
    return report(out, args.only.split() or sections.names()) or int(done.returncode != 0)


def report(out: Path, wanted: Sequence[str]) -> int:
    """Prints the start-up time of each section; 1 where one of them did not pass."""
    try:
        with (out / "sections.csv").open() as lines:
            rows = {row["section"]: row for row in csv.DictReader(lines)}
    except OSError:
        print("error: the rehearsal left no sections.csv", file=sys.stderr)
        return 1
    expected = ["wheels", "build", "start", *wanted]
    results = {name: rows[name]["result"] if name in rows else "missing" for name in expected}
    bad = [f"{name} ({result})" for name, result in results.items() if result != DONE]
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
    files += ["record.json", "README.md"] if any(name.startswith("bench_") for name in wanted) else []
    bad += [f"{name} (missing)" for name in files if not (out / name).exists()]
    if bad:
        print(f"error: rehearsal failed: {', '.join(bad)}; see {out / 'log.txt'}", file=sys.stderr)
        return 1
    print(f"rehearsed: {len(rows)} sections; {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
