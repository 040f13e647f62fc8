"""Kernels compile for sm_90a ahead of time and fit the machine, with or without a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Compiler

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("source", sorted((ROOT / "kernels").glob("*/*.cu")), ids=lambda p: p.stem)
def test_cuda(compiler: Compiler, source: Path) -> None:
    for resources in compiler.cuda(source):
        resources.check()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("width", [512, 1024])
@pytest.mark.parametrize("learned", [False, True])
def test_triton_distillation(compiler: Compiler, dtype: str, width: int, learned: bool) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from scenarioclip_fast.kernels.distillation.distillation_triton import OPTIONS, SCAN, distillation

    constants = {"smallest": 1e-8, "with_gradient": True, "WIDTH": width, "SCAN": SCAN}
    constants |= {} if learned else {"student_temperature": None}
    signature = {
        "student": f"*{dtype}",
        "teacher": f"*{dtype}",
        "student_index": "*i64",
        "teacher_index": "*i64",
        "weight": "*fp32",
        "student_temperature": "*fp32",
        "loss_out": "*fp32",
        "derivatives_out": "*fp32",
        "shares": "*fp32",
        "finished": "*i32",
        "student_temperature_value": "fp32",
        "teacher_temperature": "fp32",
        "students": "i32",
        "pairs": "i32",
        "width": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    compiler.triton(distillation, signature, constants, **OPTIONS).check()
