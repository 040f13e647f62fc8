"""Builds the compiled extensions with CMake and Ninja into scenarioclip_fast/_native, and lists the packages.

SCENARIOCLIP_FAST_BUILD   auto (default: CPU, and CUDA if nvcc and a CUDA build of torch are found), cpu, cuda or none
SCENARIOCLIP_FAST_MARCH   -march of the CPU library (default: x86-64-v3 on x86-64, else the compiler's default)
SCENARIOCLIP_FAST_ARCHS   CUDA architectures, as in TORCH_CUDA_ARCH_LIST without dots; "+PTX" adds PTX for newer
                          devices (default: those of 80, 90a, 100 that nvcc supports, the last with PTX)
SCENARIOCLIP_FAST_CUTLASS the include folder of CUTLASS 4.2, for kernels that need 90a (default: that of the installed
                          package nvidia-cutlass; without it they are left out)
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

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGE = "scenarioclip_fast"
TORCH = "torch>=2.11,<2.14"
# Installed with --no-deps: only its headers are used, at build time.
CUTLASS = "nvidia-cutlass==4.2.0.0"
# Top-level folders that are installed as subpackages: their names are too general for top-level packages (`kernels` is
# already taken).
SUBPACKAGES = ("kernels", "benchmarks", "configs")
COMPILERS = ("c++", "g++", "clang++")


def packages() -> list[str]:
    found = find_packages(str(ROOT), include=[PACKAGE, f"{PACKAGE}.*"])
    for folder in SUBPACKAGES:
        # benchmarks/gpu and benchmarks/scaling work only in a checkout.
        inner = find_packages(str(ROOT / folder), exclude=["gpu", "gpu.*", "scaling"])
        found += [f"{PACKAGE}.{folder}", *(f"{PACKAGE}.{folder}.{name}" for name in inner)]
    return found


def torch_folder() -> Path:
    # Importing torch would take a second; its version is in its metadata.
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(
            f"error: torch is not in the build environment: run pip install '{TORCH}', then install with "
            "--no-build-isolation"
        )
    version = importlib.metadata.version("torch")
    major, minor = (int(part) for part in version.split(".")[:2])
    lowest, excluded = (tuple(map(int, bound.split("."))) for bound in re.findall(r"[\d.]+", TORCH))
    if not lowest <= (major, minor) < excluded:
        sys.exit(f"error: got torch {version}, expected {TORCH}: run pip install '{TORCH}'")
    return Path(spec.origin).parent


def check_tools(path: str) -> None:
    """Exit with a one-line error if a build tool is missing."""
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=path) is None:
            sys.exit(
                f"error: {tool} is not on PATH: run pip install cmake ninja, or set SCENARIOCLIP_FAST_BUILD=none for "
                "only the PyTorch and Triton backends"
            )
    chosen = os.environ.get("CXX", "").split()[:1]
    if not any(shutil.which(name, path=path) for name in chosen or COMPILERS):
        sys.exit(
            f"error: no C++ compiler found (looked for {', '.join(chosen or COMPILERS)}): install g++ 11 or later (apt "
            "install g++), or set SCENARIOCLIP_FAST_BUILD=none for only the PyTorch and Triton backends"
        )


def cuda_obstacle() -> str | None:
    """Why the CUDA library cannot be built; None if it can."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    if "+cpu" in importlib.metadata.version("torch"):
        return "torch is a CPU build, which cannot load CUDA code: install one for CUDA, then build again"
    return None


def cuda_architectures() -> str:
    if chosen := os.environ.get("SCENARIOCLIP_FAST_ARCHS"):
        return chosen
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True)
    archs = [arch for arch in ("80", "90a", "100") if f"compute_{arch.rstrip('a')}" in listed.stdout]
    if listed.returncode != 0 or not archs:
        sys.exit(
            f"error: {shutil.which('nvcc')} --list-gpu-arch names none of sm_80, sm_90 and sm_100: repair the toolkit, "
            "set SCENARIOCLIP_FAST_ARCHS, or set SCENARIOCLIP_FAST_BUILD=cpu to build without CUDA"
        )
    return ";".join(archs) + "+PTX"


def cutlass_headers() -> tuple[Path | None, str | None]:
    """The folder of the CUTLASS headers; or None, and why the kernels that need them cannot be built."""
    install = f"run pip install --no-deps {CUTLASS}, then reinstall"
    if chosen := os.environ.get("SCENARIOCLIP_FAST_CUTLASS"):
        folder = Path(chosen).resolve()
    else:
        spec = importlib.util.find_spec("cutlass_library")
        if spec is None or spec.origin is None:
            return None, f"the CUTLASS headers were not found: {install}"
        folder = Path(spec.origin).parent / "source" / "include"
    header = folder / "cutlass" / "version.h"
    if not header.is_file():
        return None, f"{folder} holds no CUTLASS headers: {install}"
    found = [re.search(rf"define CUTLASS_{part}\s+(\d+)", header.read_text()) for part in ("MAJOR", "MINOR")]
    version = ".".join(match[1] if match else "?" for match in found)
    if version != ".".join(re.findall(r"\d+", CUTLASS)[:2]):
        return None, f"{folder} holds the headers of CUTLASS {version}: {install}"
    return folder, None


def pybind11_include(torch: Path) -> Path:
    # Fall back to the headers that torch ships, for machines where nothing can be installed.
    spec = importlib.util.find_spec("pybind11")
    return Path(spec.origin).parent / "include" if spec and spec.origin else torch / "include"


class Build(build_ext):
    """Runs one CMake build for all libraries and writes build.json: what was built, and why the rest was not."""

    def run(self) -> None:
        mode = os.environ.get("SCENARIOCLIP_FAST_BUILD") or "auto"
        if mode not in ("auto", "cpu", "cuda", "none"):
            sys.exit(f"error: SCENARIOCLIP_FAST_BUILD: got {mode!r}, expected auto, cpu, cuda or none")
        base = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        output = base / PACKAGE / "_native"
        output.mkdir(parents=True, exist_ok=True)
        march = os.environ.get("SCENARIOCLIP_FAST_MARCH", self.default_march())
        built: list[str] = []
        left_out: dict[str, str] = {}
        if mode == "none":
            left_out = dict.fromkeys(("cpu", "host", "cuda", "hopper"), "SCENARIOCLIP_FAST_BUILD=none")
        else:
            obstacle = "SCENARIOCLIP_FAST_BUILD=cpu" if mode == "cpu" else cuda_obstacle()
            if mode == "cuda" and shutil.which("nvcc") is None:
                sys.exit(
                    "error: SCENARIOCLIP_FAST_BUILD=cuda, but nvcc is not on PATH: install the CUDA toolkit or use auto"
                )
            with_cuda = mode == "cuda" or obstacle is None
            archs = cuda_architectures() if with_cuda else ""
            cutlass, missing = cutlass_headers()
            if "90a" not in archs.replace("+PTX", "").split(";"):
                cutlass, missing = None, f"90a is not among the CUDA architectures ({archs})"
            self.cmake(torch_folder(), output, archs, cutlass, march)
            built = ["cpu", "host"] + (["cuda"] if with_cuda else [])
            if not with_cuda:
                left_out["cuda"] = left_out["hopper"] = obstacle or ""
                print(f"scenarioclip-fast: CUDA library not built: {obstacle}", file=sys.stderr)
            elif missing:
                left_out["hopper"] = missing
                print(f"scenarioclip-fast: kernels for compute capability 9.0 not built: {missing}", file=sys.stderr)
            else:
                built.append("hopper")
        info = {"built": built, "left_out": left_out, "march": march}
        (output / "build.json").write_text(json.dumps(info, indent=1) + "\n")

    @staticmethod
    def default_march() -> str:
        return "x86-64-v3" if platform.machine() in ("x86_64", "AMD64") else ""

    def cmake(self, torch: Path, output: Path, archs: str, cutlass: Path | None, march: str) -> None:
        build = Path(os.environ.get("SCENARIOCLIP_FAST_BUILD_DIR") or ROOT / "build" / sysconfig.get_platform())
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "SCF_TORCH": torch,
            "SCF_OUTPUT": output,
            "SCF_PYBIND11": pybind11_include(torch),
            "SCF_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "SCF_PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "SCF_MARCH": march,
            "SCF_CUDA": "ON" if archs else "OFF",
            "SCF_CUDA_ARCHITECTURES": archs,
            "SCF_CUTLASS": cutlass or "",
        }
        defines = [f"-D{key}={value}" for key, value in options.items()]
        # Prefer the CMake and Ninja installed beside this Python to older ones of the system.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        check_tools(path)
        cmake = shutil.which("cmake", path=path) or "cmake"
        commands: list[list[str | Path]] = [
            [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *defines],
            [cmake, "--build", build],
        ]
        for command in commands:
            if subprocess.run(command, env={**os.environ, "PATH": path}).returncode != 0:
                sys.exit("error: the build failed: the compiler's messages are above")

    def get_outputs(self) -> list[str]:
        return []


def version() -> str:
    text = (ROOT / PACKAGE / "__init__.py").read_text()
    found = re.search(r'__version__ = "(.+)"', text)
    assert found is not None
    return found[1]


setup(
    version=version(),
    packages=packages(),
    package_dir={f"{PACKAGE}.{folder}": folder for folder in SUBPACKAGES},
    package_data={
        PACKAGE: ["py.typed"],
        f"{PACKAGE}._native": ["*.so", "build.json"],
        f"{PACKAGE}.configs": ["*.yaml"],
        f"{PACKAGE}.generate.curate": ["*.json"],
        f"{PACKAGE}.generate": ["review.*"],
    },
    include_package_data=False,
    # An extension makes setuptools run build_ext and tag the wheel as platform-specific; CMake builds it.
    ext_modules=[Extension(f"{PACKAGE}._native", sources=[])],
    cmdclass={"build_ext": Build},
)
