"""What several test files share: where real photos lie, and compiling kernels for a GPU that is not here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
# sm_90: what one thread block may have, and the registers of one thread.
SHARED_LIMIT = 232_448


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of one multiprocessor, as the assembler reports it."""

    registers: int
    stack: int
    shared: int
    ptx: str = field(default="", repr=False)  # of a Triton kernel

    def check(self) -> None:
        assert self.stack == 0, f"spills or a local array: {self}"
        assert self.shared <= SHARED_LIMIT, f"more shared memory than a block may have: {self}"


class Compiler:
    """Compiles for sm_90a without a GPU and reads the resources off the machine code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def triton(self, kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: int) -> Resources:
        """`signature`: the type of each argument ("*fp32", "i32", "constexpr"); `options`: num_warps, num_stages."""
        triton = pytest.importorskip("triton", reason="Triton is not installed")
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        # As at run time, where buffers begin at multiples of 16 bytes: loads are wide, and can be asynchronous. Those
        # that may be slices of buffers are named by do_not_specialize_on_alignment.
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
        """What the assembler says besides."""
        (self.folder / "kernel.ptx").write_text(ptx)
        command = [_tool("ptxas"), "-arch=sm_90a", "-v", self.folder / "kernel.ptx", "-o", self.folder / "kernel.cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def cuda(self, source: Path) -> list[Resources]:
        """Every kernel of a .cu file."""
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


@pytest.fixture
def compiler(tmp_path: Path) -> Compiler:
    """Ahead-of-time compilation for sm_90a."""
    return Compiler(tmp_path)


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of real photographs with human masks, in the published layout; skips where it is absent."""
    folder = Path(os.environ.get("SCENARIOCLIP_FAST_PHOTOS", ROOT.parent / "shared" / "data" / "photos"))
    if not (folder / "metadata.json").exists():
        pytest.skip("no real photos here: set SCENARIOCLIP_FAST_PHOTOS to a folder in the published layout")
    return folder
