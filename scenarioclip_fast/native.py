"""Find and load the compiled extensions of the package.

Two libraries for the libtorch stable ABI (separate, so that the CPU library loads without CUDA) and one pybind11 module
(`host`) for work on Python objects. setup.py writes them and build.json to `_native`.
"""

from __future__ import annotations

import functools
import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from scenarioclip_fast import forks, requirements  # noqa: F401  # forks: OpenMP must survive them

FOLDER = Path(__file__).parent / "_native"
REBUILD = "reinstall from a source tree (`make install`)"


@functools.cache
def build_info() -> dict[str, Any]:
    """Return what setup.py recorded: {"built": [...], "left_out": {part: reason}, "march": ...}."""
    path = FOLDER / "build.json"
    if not path.exists():
        return {"built": [], "left_out": {}, "march": ""}
    info: dict[str, Any] = json.loads(path.read_text())
    return info


@functools.cache
def unavailable_reason(part: str) -> str | None:
    """Load `part`; return None on success, otherwise the reason for the failure.

    Args:
        part: "cpu", "cuda", "host", or "hopper": the part of the cuda library for compute capability 9.0, whose build
            needs the headers of CUTLASS.
    """
    info = build_info()
    if part == "hopper" and (part in info["built"] or "cuda" not in info["built"]):
        return unavailable_reason("cuda")
    if part not in info["built"]:
        reason = info["left_out"].get(part, "the package was installed without its compiled extensions")
        name = "part of the cuda library for compute capability 9.0" if part == "hopper" else f"{part} library"
        return f"the {name} was not built: {reason}"
    problem = None if part == "host" else requirements.unsupported_torch()
    if part != "cuda" and info["march"] == "x86-64-v3":
        import torch

        # An AVX2 build on an older processor would crash with an illegal instruction.
        if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
            return "it was built for AVX2, which this processor lacks: rebuild with SCENARIOCLIP_FAST_MARCH=x86-64"
    try:
        if part == "host":
            importlib.import_module("scenarioclip_fast._native.host")
        else:
            import torch

            if part == "cuda" and torch.version.cuda is None:
                return "this torch is a CPU build: install a CUDA build of torch"
            if part == "cuda" and (obstacle := unavailable_reason("cpu")):
                return f"the cpu library, which holds the schemas of the ops, is missing: {obstacle}"
            torch.ops.load_library(FOLDER / f"libscenarioclip_fast_{part}.so")
    except (ImportError, OSError) as error:
        # torch names only the file; the cause is in the loader's message.
        reason = str(error.__cause__ or error).splitlines()[0]
        return f"the {part} library does not load ({reason}): {problem or REBUILD}"
    if problem:
        warnings.warn(problem, stacklevel=2)
    return None


@functools.cache
def host() -> ModuleType | None:
    """Return the pybind11 module, or None if it does not load."""
    return None if unavailable_reason("host") else importlib.import_module("scenarioclip_fast._native.host")
