"""`make gpu`: measures a record on a GPU machine in a few minutes, with or without a package index.

Run: make gpu [OUT=DIR] [ONLY="bench_step tests"] [TOTAL=480] [PREBUILT=1] [PYTHON=python3]
     or, without make: PYTHONPATH=benchmarks python3 -m gpu.run --out DIR

In order: probe the machine; install the wheels of gpu-pack/ and build the extensions, or use those of gpu-pack/ if the
build fails; run tests, sanitizers and compiler warm-ups in parallel; then the timed sections, headline figures first. A
failure, a hang or a missing package affects only its own section. After each section OUT holds the results so far:
record.json, README.md, sections.csv, log.txt, and all.tar.gz at the end.

Only this first part runs in the machine's own Python, with only the standard library. The rest is measure.py, in a
virtual environment on top of that Python, which is left unchanged.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu import sections
from gpu.jobs import PASSED, shortened
from gpu.pack import FOLDER, Manifest, commit_here, headers, read_manifest
from gpu.processes import Spawned

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "scenarioclip_fast" / "_native"
WHEELS = ["--no-index", "--no-deps", "--no-compile"]
EDITABLE = ["--no-index", "--no-build-isolation", "--no-deps", "--editable", "."]
# The virtual environment uses the cmake and ninja of this Python.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

PROBE = """
import json, sys
out = {"python": sys.version.split()[0]}
try:
    import torch
    out["torch"] = torch.__version__
    out["cuda"] = torch.cuda.is_available()
    if out["cuda"]:
        out["device"] = torch.cuda.get_device_name()
        out["capability"] = "%d%d" % torch.cuda.get_device_capability()
except Exception as error:
    out["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(out))
"""


class SetupError(Exception):
    """A one-line message about what the machine lacks."""


def probe() -> dict[str, Any]:
    """The Python, torch and GPU of this machine. Raises SetupError without torch or a GPU."""
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        raise SetupError("torch did not report within a minute whether a GPU is present") from None
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise SetupError(f"{sys.executable} cannot import torch: {done.stderr.strip()[-300:]}") from None
    if "torch" not in found:
        raise SetupError(
            f"{sys.executable} has no torch ({found.get('error')}): make gpu uses the installed torch "
            "(set PYTHON=... to use another interpreter)"
        )
    if not found["cuda"] and not sections.REHEARSAL:
        raise SetupError(f"torch {found['torch']} sees no GPU: make gpu needs one (to rehearse: make gpu-rehearse)")
    return found


def environment(folder: Path) -> Path:
    """Create a virtual environment that sees this Python's packages; return its interpreter.

    `venv --system-site-packages` would see only the base installation, not an environment that this Python belongs to.
    """
    import site
    import venv

    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    purelib = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    site_packages = dict.fromkeys(
        [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    )
    lines = [f"import site; site.addsitedir({path!r})" for path in site_packages if os.path.isdir(path)]
    (purelib / "machine.pth").write_text("\n".join(lines) + "\n")
    python = folder / "bin" / "python"
    subprocess.run([python, "-c", "import importlib.util as u; assert u.find_spec('torch')"], check=True, timeout=20)
    return python


def start(command: list[str | Path], log: Path, **env: str) -> Spawned:
    with log.open("ab") as output:
        return Spawned([str(word) for word in command], output.fileno(), ROOT, env)


def finish(process: Spawned, seconds: float) -> int | None:
    """Wait for the exit code; kill the process after `seconds` and return None."""
    try:
        return process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.end()
        return None


class Preparation:
    """Installs wheels and extensions. `notes` collects their rows (name, result, seconds) of the sections table."""

    def __init__(self, work: Path, python: Path, found: dict[str, Any], pack: Manifest | None, deadline: float) -> None:
        self.work, self.python, self.found, self.pack, self.deadline = work, python, found, pack, deadline
        self.notes: list[tuple[str, str, float]] = []

    def run(self, prebuilt: bool = False) -> None:
        """Install the wheels, then build the extensions, or with `prebuilt` use those of gpu-pack/."""
        begin = time.time()
        wheels = sorted((ROOT / FOLDER / "wheels").glob("*.whl"))
        installing = None
        if wheels:
            installing = start(self._pip(*WHEELS, *wheels), self.work / "wheels.txt")
        building = None if prebuilt else start(self._pip(*EDITABLE), self.work / "build.txt", **self._build())
        if installing is None:
            self.notes.append(("wheels", f"none in {FOLDER}/: run make gpu-pack", 0))
        else:
            self._finish_wheels(installing, wheels, begin)
        if building is None:
            self._use_prebuilt("", begin)
            return
        code = finish(building, self.deadline - time.time())
        if code == 0:
            self.notes.append(("build", PASSED, time.time() - begin))
        else:
            self._use_prebuilt("timed out" if code is None else f"exit {code}", begin)

    def _pip(self, *arguments: str | Path) -> list[str | Path]:
        return [self.python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]

    def _build(self) -> dict[str, str]:
        capability = self.found.get("capability", "90")
        archs = {"90": "90a"}.get(capability, capability)  # for this device only
        return {
            "SCENARIOCLIP_FAST_BUILD": "cuda" if self.found["cuda"] else "auto",
            "SCENARIOCLIP_FAST_ARCHS": os.environ.get("SCENARIOCLIP_FAST_ARCHS", archs),
            "PATH": PATH,
            **headers(ROOT / FOLDER, self.work / "headers"),
        }

    def _finish_wheels(self, installing: Spawned, wheels: list[Path], begin: float) -> None:
        if finish(installing, 20) == 0:
            self.notes.append(("wheels", PASSED, time.time() - begin))
            return
        failed = []
        for wheel in wheels:
            one = start(self._pip(*WHEELS, wheel), self.work / "wheels.txt")
            if finish(one, min(10, self.deadline - time.time())) != 0:
                failed.append(wheel.name.partition("-")[0])
        result = f"failed to install: {' '.join(failed)}" if failed else PASSED
        self.notes.append(("wheels", result, time.time() - begin))

    def _tail(self, log: str) -> str:
        path = self.work / log
        return "\n".join(shortened(path).splitlines()[-20:]) if path.exists() else ""

    def _use_prebuilt(self, reason: str, begin: float) -> None:
        """Install with the extensions of gpu-pack/, or without any. `reason`: why the build failed; "" if by choice."""
        if reason:
            print(self._tail("build.txt"), flush=True)
        done = start(self._pip(*EDITABLE), self.work / "install.txt", SCENARIOCLIP_FAST_BUILD="none")
        if finish(done, 60) != 0:
            print(self._tail("install.txt"), file=sys.stderr)
            raise SetupError("the package cannot be installed")
        prebuilt = ROOT / FOLDER / "native"
        parts = sorted(prebuilt.glob("*.so"))
        failed = f"failed ({reason})" if reason else "not asked for"
        if self.pack is None or not parts:
            result = f"{failed}, and {FOLDER}/native is empty: Triton and PyTorch backends only"
        else:
            NATIVE.mkdir(exist_ok=True)
            for part in parts:
                shutil.copy2(part, NATIVE / part.name)
            info = json.loads((prebuilt / "build.json").read_text())
            (NATIVE / "build.json").write_text(json.dumps({**info, "prebuilt_from": self.pack.commit}, indent=1) + "\n")
            result = f"{failed}: using the prebuilt extensions of {FOLDER}" if reason else PASSED
        self.notes.append(("build", result, time.time() - begin))


def create_output_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.txt.partial").touch()
        (out / "log.txt.partial").unlink()
    except OSError as error:
        raise SetupError(f"--out {out}: is not writable ({error.strerror})") from None


def load_pack() -> tuple[Manifest | None, str | None]:
    """The manifest of gpu-pack/ and the commit of these files; None without a usable pack."""
    try:
        pack = read_manifest(ROOT / FOLDER)
        return pack, None if pack is None else commit_here(ROOT, pack)
    except (SystemExit, OSError) as error:
        print(f"== {FOLDER}: {error}", flush=True)
        return None, None


def main() -> int:
    started = time.time()
    parser = argparse.ArgumentParser(description="Measure this machine's GPU and write a record.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="output directory (default: runs/gpu)")
    names = ", ".join(sections.names())
    parser.add_argument("--only", default="", help=f"run only these sections, space-separated: {names}")
    parser.add_argument("--total", type=float, default=sections.TOTAL_S, help="time limit in seconds (default: 480)")
    parser.add_argument(
        "--prebuilt", action="store_true", help="use the extensions of gpu-pack/: saves the half minute of the build"
    )
    parser.add_argument("--factor", type=float, default=1.0, help="multiply every time budget, for a slow rehearsal")
    args = parser.parse_args()
    only = args.only.split()
    if unknown := [name for name in only if name not in sections.names()]:
        parser.error(f"ONLY: got {' '.join(unknown)}, expected some of: {' '.join(sections.names())}")
    if args.total < 10:
        parser.error(f"TOTAL: got {args.total:g}, expected at least 10 seconds")
    try:
        found = probe()
        probed = time.time() - started
        create_output_folder(args.out)
        pack, commit = load_pack()
        work = Path(tempfile.mkdtemp(prefix="scenarioclip-fast-gpu-"))
        device = found.get("device", "no GPU (rehearsal)")
        print(f"== {device}, Python {found['python']}, torch {found['torch']}", flush=True)
        try:
            python = environment(work / "venv")
        except Exception as error:  # fall back to the machine's own
            print(
                f"== no virtual environment ({type(error).__name__}: {error}): wheels go into {sys.prefix}", flush=True
            )
            python = Path(sys.executable)
        deadline = started + min(args.factor * sections.PREPARE.maximum, args.total / 2)
        preparation = Preparation(work, python, found, pack, deadline)
        preparation.run(args.prebuilt)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, result, seconds in preparation.notes:
        print(f"== {name}: {result}, {seconds:.1f} s", flush=True)
    state = {
        "started": started,
        "total": args.total * args.factor,
        "factor": args.factor,
        "only": only,
        "out": str(args.out.resolve()),
        "work": str(work),
        "notes": [("probe", PASSED, probed, probed), *preparation.notes],
        "commit": commit,
    }
    (work / "state.json").write_text(json.dumps(state))
    env = {**os.environ, "PATH": os.pathsep.join([str(python.parent), PATH]), "PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    # A fixed place, where measure.py finds the autotuning results to discard; reused by later runs on this machine.
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "scenarioclip-fast-inductor"))
    # Lets Inductor cache quick-GELU's graphs with their backward passes, so that the timed sections find them.
    env.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")
    if (ROOT / FOLDER / "photos").is_dir():
        env.setdefault("SCENARIOCLIP_FAST_PHOTOS", str(ROOT / FOLDER / "photos"))
    sys.stdout.flush()
    os.execve(python, [str(python), "-m", "gpu.measure", str(work / "state.json")], env)


if __name__ == "__main__":
    sys.exit(main())
