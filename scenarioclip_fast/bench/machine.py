"""What the numbers were measured on: device, driver, clocks, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

COMMIT_VARIABLE = "SCENARIOCLIP_FAST_COMMIT"
REHEARSAL_VARIABLE = "SCENARIOCLIP_FAST_REHEARSAL"
_PACKAGES = ("torch", "triton", "numpy", "scipy", "pillow", "simplejpeg", "pytest-benchmark", "scenarioclip-fast")
_RIVALS = ("cut-cross-entropy", "inf-cl", "liger-kernel", "memeff", "quack-kernels", "siglip-kernel")
_CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"


def describe(device: str) -> dict[str, Any]:
    """What stays as it is while a record is made. `device`: "cpu" or "cuda"."""
    import torch

    from scenarioclip_fast import native

    cores, memory = _cores(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {cores} cores"
    out: dict[str, Any] = {
        "device": name,
        "kind": device,
        "processor": _processor(),
        "cores": cores,
        "memory_gib": round(memory, 1),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), **_versions()},
    }
    if (origin := native.build_info().get("prebuilt_from")) is not None:
        out["compiled_parts"] = f"built on another machine, from commit {origin}"
    if device == "cuda":
        out["driver"] = _smi("driver_version")
        out["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        out["versions"]["cuda"] = str(torch.version.cuda)
    return out


def describe_rehearsal() -> dict[str, Any]:
    """As `describe`, of a kind of its own: a rehearsal must never be mistaken for a record."""
    found = describe("cpu")
    return found | {"device": f"rehearsal on {found['device']}", "kind": "rehearsal"}


def state(device: str) -> dict[str, Any]:
    """What changes: how busy the machine is, and its clocks."""
    out: dict[str, Any] = {"load": round(os.getloadavg()[0], 2)}
    if device == "cuda":
        values = _smi(_CLOCKS).split(", ")
        out["gpu"] = dict(zip(_CLOCKS.split(","), values, strict=False))
    elif clocks := re.findall(r"cpu MHz\s*:\s*([\d.]+)", _text("/proc/cpuinfo")):
        out["mhz"] = round(max(map(float, clocks)))
    return out


def commit(folder: Path) -> str:
    """Of the checkout, with "+ changes" where tracked files that matter to a measurement differ from it.

    Outside of a checkout, where the files were copied without .git: SCENARIOCLIP_FAST_COMMIT, or else "unknown".
    """

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", folder, *args], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie in the repository of another project.
    head = git("rev-parse", "HEAD") if git("rev-parse", "--show-toplevel") == str(folder.resolve()) else None
    if head is None:
        return os.environ.get(COMMIT_VARIABLE) or "unknown"
    texts = (":(top,exclude)*.md", ":(top,exclude)benchmarks/records")  # what measuring itself rewrites
    return head + (" + changes" if git("status", "--porcelain", "--untracked-files=no", "--", ":/", *texts) else "")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", _text("/proc/cpuinfo"))
    return found[1].strip() if found else platform.processor() or platform.machine()


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _versions() -> dict[str, str]:
    dali = [d.name for d in importlib.metadata.distributions() if d.name.startswith("nvidia-dali-")]
    out = {}
    for name in (*_PACKAGES, *_RIVALS, *dali):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def _smi(fields: str) -> str:
    command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=5)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
