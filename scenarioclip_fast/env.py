"""Versions, devices and available backends of this machine: `scenarioclip-fast doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass

from scenarioclip_fast import dispatch, native
from scenarioclip_fast.requirements import OPTIONAL, import_problem, triton_interprets, unsupported_torch
from scenarioclip_fast.terminal import echo


@dataclass(frozen=True)
class Report:
    """The rows of the table: (section, name, state, detail)."""

    rows: tuple[tuple[str, str, str, str], ...]

    def __str__(self) -> str:
        lines = []
        section = ""
        width = max(len(name) for _, name, _, _ in self.rows)
        for part, name, state, detail in self.rows:
            if part != section:
                lines += ["", part] if section else [part]
                section = part
            lines.append(f"  {name:<{width}}  {state:<12}  {detail}".rstrip())
        return "\n".join(lines)


def collect() -> Report:
    """Probe versions, devices, compiled extensions and backends, with the reason for each missing one."""
    rows = [("versions", "python", platform.python_version(), sys.executable)]
    rows.append(("versions", "scenarioclip-fast", _version("scenarioclip-fast") or "not installed", ""))
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    rows.append(("versions", "torch", torch.__version__, unsupported_torch() or cuda))
    rows += [("versions", name, _version(name) or "missing", "") for name in ("numpy", "einops")]
    for module, (distribution, _, use) in OPTIONAL.items():
        problem = import_problem(module)
        version = "missing" if problem else _module_version(module, distribution)
        rows.append(("versions", distribution, version, problem or use))
    rows.append(("versions", "nvcc", *_nvcc()))
    rows.append(("devices", "cpu", f"{os.cpu_count()} cores", torch.backends.cpu.get_cpu_capability()))
    rows += _gpus()
    rows += _native_rows()
    rows += _backend_rows()
    return Report(tuple(rows))


def report() -> None:
    """Print the table of versions, devices and backends, as `scenarioclip-fast doctor` does."""
    echo(collect(), lines=True)


def _module_version(module: str, distribution: str) -> str:
    # The distributions of DALI and nvImageCodec are named after the CUDA version: the installed one may be another.
    return _version(distribution) or str(getattr(sys.modules.get(module), "__version__", "installed"))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvcc() -> tuple[str, str]:
    path = shutil.which("nvcc")
    if path is None:
        return "missing", "not on PATH: CUDA sources cannot be compiled"
    out = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    release = next((line for line in out.splitlines() if "release" in line), "")
    return release.partition("release ")[2].partition(",")[0] or "installed", path


def _gpus() -> list[tuple[str, str, str, str]]:
    import torch

    if not torch.cuda.is_available():
        reason = "no GPU is visible to torch" if torch.version.cuda else "this torch is a CPU build"
        return [("devices", "cuda", "none", reason)]
    gpus = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        gpus.append(("devices", f"cuda:{i}", f"sm_{p.major}{p.minor}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB"))
    return gpus


def _native_rows() -> list[tuple[str, str, str, str]]:
    info = native.build_info()
    rows = []
    for part in ("cpu", "host", "cuda", "hopper"):
        problem = native.unavailable_reason(part)
        target = f"built for {info['march'] or 'the default processor'}" if part == "cpu" else ""
        detail = problem or target
        rows.append(("compiled extensions", part, "missing" if problem else "loaded", detail))
    return rows


def _backend_rows() -> list[tuple[str, str, str, str]]:
    import torch

    rows = []
    if chosen := os.environ.get(dispatch.VARIABLE):
        known = ("auto", *dispatch.NAMES)
        problem = "" if chosen in known else f"unknown, so that every op will fail: expected one of {', '.join(known)}"
        rows.append(("environment", dispatch.VARIABLE, chosen, problem))
    for op, backends in dispatch.BACKENDS.items():
        for backend, implementation in backends.items():
            devices = ("cuda", "cpu") if backend in ("triton", "cuda") else ("cpu",)
            reasons = [dispatch.unavailable_reason(op, backend, device) for device in devices]
            reason = None if None in reasons else reasons[0]
            if reason is None and backend in ("triton", "cuda") and not torch.cuda.is_available():
                interpreted = backend == "triton" and triton_interprets()
                reason = None if interpreted else "no GPU is visible to torch"
            state = "yes" if reason is None else "no"
            least = implementation.automatic_from
            detail = f"chosen by auto from a size of {least:,} on, or by name" if least else ""
            rows.append((f"backends of {op}", backend, state, reason or detail))
    return rows
