"""Describes the measurement environment: device, driver, clocks, versions, commit."""

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
_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "scipy",
    "pillow",
    "simplejpeg",
    "torchvision",
    "pytest-benchmark",
    "scenarioclip-fast",
)
_THIRD_PARTY_LOSSES = ("cut-cross-entropy", "inf-cl", "liger-kernel", "memeff", "quack-kernels", "siglip-kernel")
_CLOCK_FIELDS = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"


def describe(device: str) -> dict[str, Any]:
    """Describe what stays fixed during a run. `device`: "cpu" or "cuda"."""
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
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "versions": {"python": platform.python_version(), **_versions()},
    }
    if (origin := native.build_info().get("prebuilt_from")) is not None:
        out["compiled_parts"] = f"built on another machine, from commit {origin}"
    if device == "cuda":
        out["driver"] = _nvidia_smi("driver_version")
        out["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        out["versions"]["cuda"] = str(torch.version.cuda)
    return out


def describe_rehearsal() -> dict[str, Any]:
    """Like `describe`, with kind "rehearsal", so that a rehearsal is never mistaken for a measurement."""
    host = describe("cpu")
    return host | {"device": f"rehearsal on {host['device']}", "kind": "rehearsal"}


def state(device: str) -> dict[str, Any]:
    """Describe what varies during a run: load and clock frequencies."""
    out: dict[str, Any] = {"load": round(os.getloadavg()[0], 2)}
    if device == "cuda":
        values = _nvidia_smi(_CLOCK_FIELDS).split(", ")
        out["gpu"] = dict(zip(_CLOCK_FIELDS.split(","), values, strict=False))
    elif clocks := re.findall(r"cpu MHz\s*:\s*([\d.]+)", _read_text("/proc/cpuinfo")):
        out["mhz"] = round(max(map(float, clocks)))
    return out


def commit(folder: Path) -> str:
    """The commit of the checkout, with "+ changes" appended if tracked files that affect measurements are modified.

    SCENARIOCLIP_FAST_COMMIT takes precedence: `make gpu` sets it for files that were copied from a checkout, after
    comparing them with the digests in gpu-pack/. Returns "unknown" without it and without .git.
    """
    if given := os.environ.get(COMMIT_VARIABLE):
        return given

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", folder, *args], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # The package may be installed inside the repository of another project.
    head = git("rev-parse", "HEAD") if git("rev-parse", "--show-toplevel") == str(folder.resolve()) else None
    if head is None:
        return "unknown"
    generated = (":(top,exclude)*.md", ":(top,exclude)benchmarks/records")  # rewritten by the benchmarks themselves
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *generated)
    return head + (" + changes" if changed else "")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", _read_text("/proc/cpuinfo"))
    return found[1].strip() if found else platform.processor() or platform.machine()


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _versions() -> dict[str, str]:
    # Their names end with the CUDA version.
    decoders = ("nvidia-dali-", "nvidia-nvimgcodec-")
    installed = [d.name for d in importlib.metadata.distributions() if d.name.startswith(decoders)]
    out = {}
    for name in (*_PACKAGES, *_THIRD_PARTY_LOSSES, *installed):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def _nvidia_smi(fields: str) -> str:
    command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=5)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
