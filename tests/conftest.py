"""Shared fixtures: the folder of real photos, and compiling kernels for sm_90a without a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SHARED_MEMORY_LIMIT = 232_448  # bytes per thread block, sm_90


@dataclass(frozen=True)
class Resources:
    """The resources of a kernel, as reported by the assembler."""

    registers: int
    stack: int
    shared: int
    ptx: str = field(default="", repr=False)  # only for Triton kernels

    def check(self) -> None:
        assert self.stack == 0, f"register spills or a local array: {self}"
        assert self.shared <= SHARED_MEMORY_LIMIT, f"too much shared memory: {self}"

    def check_resident(self, programs: int, warps: int) -> None:
        """The registers of a multiprocessor suffice for so many programs; a warp gets them in units of 8 per thread."""
        assert programs * warps * 32 * (-(-self.registers // 8) * 8) <= 65536, f"too many registers: {self}"


class Compiler:
    """Compiles for sm_90a without a GPU and reads the resources from the machine code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def triton(self, kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: int) -> Resources:
        """Compile a Triton kernel.

        Args:
            kernel: the jitted function.
            signature: the type of each argument ("*fp32", "i32", "constexpr").
            constants: the values of constexpr arguments.
            options: num_warps, num_stages.
        """
        triton = pytest.importorskip("triton", reason="Triton is not installed")
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        # As at run time, buffers are aligned to 16 bytes, which allows wide and asynchronous loads. Arguments that may
        # be slices are marked do_not_specialize_on_alignment.
        pointers = [
            p.num for p in kernel.params if signature[p.name].startswith("*") and not p.do_not_specialize_on_alignment
        ]
        aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        cubin = self.folder / f"{kernel.__name__}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (resources,) = self._read(cubin)
        return Resources(resources.registers, resources.stack, compiled.metadata.shared, compiled.asm["ptx"])

    def warnings(self, ptx: str) -> str:
        """The assembler's warnings."""
        (self.folder / "kernel.ptx").write_text(ptx)
        command = [_tool("ptxas"), "-arch=sm_90a", "-v", self.folder / "kernel.ptx", "-o", self.folder / "kernel.cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def cuda(self, source: Path) -> list[Resources]:
        """Compile all kernels of a .cu file."""
        if shutil.which("nvcc") is None:
            pytest.skip("nvcc is not on PATH")
        cubin = self.folder / f"{source.stem}.cubin"
        command = [
            "nvcc",
            "-cubin",
            "-O3",
            "-std=c++20",
            "-gencode=arch=compute_90a,code=sm_90a",
            f"-I{ROOT}",
        ]
        done = subprocess.run([*command, source, "-o", cubin], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return self._read(cubin)

    @staticmethod
    def _read(cubin: Path) -> list[Resources]:
        command = [_tool("cuobjdump"), "--dump-resource-usage", cubin]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = [
            Resources(*(int(m[key]) for key in ("registers", "stack", "shared")))
            for m in re.finditer(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)", text)
        ]
        assert found, text
        return found


def _tool(name: str) -> Path:
    triton = pytest.importorskip("triton", reason=f"{name} comes with Triton, which is not installed")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


class HostCompiler:
    """Compiles C++ tests of the kernels' sources with g++."""

    def __call__(self, source: Path, program: Path, include: Path, cutlass: bool = False) -> Path:
        """Compile `source` with the headers below `include`; with `cutlass`, those of CUTLASS and CUDA as well."""
        if shutil.which("g++") is None:
            pytest.skip("g++ is not on PATH")
        system = [cutlass_headers(), *_cuda_headers()] if cutlass else []
        options = [f"-I{include}", *(option for folder in system for option in ("-isystem", folder))]
        command = ["g++", "-std=c++20", "-O1", *options, source, "-o", program, "-pthread"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return program


def cutlass_headers() -> Path:
    """The folder of the CUTLASS headers."""
    if chosen := os.environ.get("SCENARIOCLIP_FAST_CUTLASS"):
        return Path(chosen)
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        pytest.skip("the CUTLASS headers are missing: pip install --no-deps nvidia-cutlass==4.2.0.0")
    return Path(spec.origin).parent / "source" / "include"


def _cuda_headers() -> list[str]:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    command = ["nvcc", "--dryrun", "-x", "cu", os.devnull]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    folders = re.findall(r'"(?:-I)?(/[^"]*include[^"]*)"', text)
    assert folders, text
    return list(dict.fromkeys(folders))


@pytest.fixture(scope="session")
def host_compiler() -> HostCompiler:
    return HostCompiler()


@pytest.fixture(scope="session")
def hopper_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """The assembler's messages and the machine code of kernels/*/hopper/*.cu, compiled once, as CMakeLists.txt does."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    folder = tmp_path_factory.mktemp("hopper")
    command = ["nvcc", "-cubin", "-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas=-v"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT}", "-isystem", str(cutlass_headers())]
    running = {
        source.stem: subprocess.Popen(
            [*command, str(source), "-o", str(folder / f"{source.stem}.cubin")], stderr=subprocess.PIPE, text=True
        )
        for source in sorted(ROOT.glob("kernels/*/hopper/*.cu"))
    }
    code = {}
    for name, process in running.items():
        log = process.communicate()[1]
        assert process.returncode == 0, log
        dump = [_tool("cuobjdump"), "-sass", folder / f"{name}.cubin"]
        code[name] = log, subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    return code


@pytest.fixture
def compiler(tmp_path: Path) -> Compiler:
    """Ahead-of-time compilation for sm_90a."""
    return Compiler(tmp_path)


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of real photos with human masks, in the published layout; skips the test without it."""
    folder = Path(os.environ.get("SCENARIOCLIP_FAST_PHOTOS", ROOT.parent / "shared" / "data" / "photos"))
    if not (folder / "metadata.json").exists():
        pytest.skip("no real photos: set SCENARIOCLIP_FAST_PHOTOS to a folder in the published layout")
    return folder
