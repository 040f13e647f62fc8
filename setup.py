"""Builds the compiled parts with CMake and Ninja into scenarioclip_fast/_native.

SCENARIOCLIP_FAST_BUILD   auto (default): what this machine can build; cpu; cuda: CUDA too, or fail; none
SCENARIOCLIP_FAST_MARCH   -march of the CPU library (default x86-64-v3 on x86-64)
SCENARIOCLIP_FAST_ARCHS   CUDA architectures (default "80;90a", and "100" where the toolkit knows it)
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def torch_folder() -> Path | None:
    # Found without importing it: importing torch takes a second, and its version is in its metadata.
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def cuda_obstacle() -> str | None:
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    if "+cpu" in importlib.metadata.version("torch"):
        return (
            "torch is a CPU build, which cannot load CUDA code (SCENARIOCLIP_FAST_BUILD=cuda compiles it all the same)"
        )
    return None


def cuda_architectures() -> str:
    if chosen := os.environ.get("SCENARIOCLIP_FAST_ARCHS"):
        return chosen
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return ";".join(arch for arch in ("80", "90a", "100") if f"compute_{arch.rstrip('a')}" in known)


def pybind11_include(torch: Path) -> Path:
    # torch ships the headers too, for machines where nothing can be installed.
    spec = importlib.util.find_spec("pybind11")
    return Path(spec.origin).parent / "include" if spec and spec.origin else torch / "include"


class Build(build_ext):
    """One CMake build for all parts; leaves build.json, which says what was left out and why."""

    def run(self) -> None:
        mode = os.environ.get("SCENARIOCLIP_FAST_BUILD", "auto")
        if mode not in ("auto", "cpu", "cuda", "none"):
            sys.exit(f"SCENARIOCLIP_FAST_BUILD: got {mode!r}, expected auto, cpu, cuda or none")
        base = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        output = base / "scenarioclip_fast" / "_native"
        output.mkdir(parents=True, exist_ok=True)
        march = os.environ.get("SCENARIOCLIP_FAST_MARCH", self.default_march())
        built: list[str] = []
        left_out: dict[str, str] = {}
        if mode == "none":
            left_out = dict.fromkeys(("cpu", "host", "cuda"), "SCENARIOCLIP_FAST_BUILD=none")
        elif (torch := torch_folder()) is None:
            sys.exit(
                "torch is not in the build environment: pip install 'torch>=2.11,<2.14', then use --no-build-isolation"
            )
        else:
            obstacle = "SCENARIOCLIP_FAST_BUILD=cpu" if mode == "cpu" else cuda_obstacle()
            if mode == "cuda" and shutil.which("nvcc") is None:
                sys.exit("SCENARIOCLIP_FAST_BUILD=cuda, but nvcc is not on PATH: install the CUDA toolkit, or use auto")
            with_cuda = mode == "cuda" or obstacle is None
            self.cmake(torch, output, with_cuda, march)
            built = ["cpu", "host"] + (["cuda"] if with_cuda else [])
            if not with_cuda:
                left_out["cuda"] = obstacle or ""
                print(f"scenarioclip-fast: CUDA library left out: {obstacle}", file=sys.stderr)
        info = {"built": built, "left_out": left_out, "march": march}
        (output / "build.json").write_text(json.dumps(info, indent=1) + "\n")

    @staticmethod
    def default_march() -> str:
        return "x86-64-v3" if platform.machine() in ("x86_64", "AMD64") else ""

    def cmake(self, torch: Path, output: Path, with_cuda: bool, march: str) -> None:
        build = Path(os.environ.get("SCENARIOCLIP_FAST_BUILD_DIR", ROOT / "build" / sysconfig.get_platform()))
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "SCF_TORCH": torch,
            "SCF_OUTPUT": output,
            "SCF_PYBIND11": pybind11_include(torch),
            "SCF_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "SCF_PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "SCF_MARCH": march,
            "SCF_CUDA": "ON" if with_cuda else "OFF",
            "SCF_CUDA_ARCHITECTURES": cuda_architectures() if with_cuda else "",
        }
        defines = [f"-D{key}={value}" for key, value in options.items()]
        # The CMake and Ninja that pip installed beside this Python come before the system's older ones.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        commands: list[list[str | Path]] = [
            ["-S", ROOT, "-B", build, "-G", "Ninja", *defines],
            ["--build", build],
        ]
        for command in commands:
            tool = shutil.which("cmake", path=path) or sys.exit("cmake is not on PATH: pip install cmake ninja")
            if subprocess.run([tool, *command], env={**os.environ, "PATH": path}).returncode != 0:
                sys.exit("the build failed: the compiler's messages stand above")

    def get_outputs(self) -> list[str]:
        return []


def version() -> str:
    text = (ROOT / "scenarioclip_fast" / "__init__.py").read_text()
    found = re.search(r'__version__ = "(.+)"', text)
    assert found is not None
    return found[1]


setup(
    version=version(),
    # The name makes setuptools run build_ext and mark the wheel as platform-specific; CMake does the work.
    ext_modules=[Extension("scenarioclip_fast._native", sources=[])],
    cmdclass={"build_ext": Build},
)
