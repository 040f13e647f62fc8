"""Kernels compile for sm_90a ahead of time and fit the machine, with or without a GPU."""

from __future__ import annotations

import os
import re
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


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["quick_gelu_forward", "quick_gelu_backward"])
def test_triton_quick_gelu(compiler: Compiler, name: str, dtype: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from scenarioclip_fast.kernels.quick_gelu import quick_gelu_triton as kernels

    constants = {"SLOPE": 1.702, "BLOCK": kernels.BLOCK}
    tensors = ("grad", "x", "out") if name.endswith("backward") else ("x", "out")
    signature = {**dict.fromkeys(tensors, f"*{dtype}"), "size": "i32", **dict.fromkeys(constants, "constexpr")}
    compiler.triton(getattr(kernels, name), signature, constants, num_warps=kernels.WARPS).check()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("width", [123, 2048, 3072])
@pytest.mark.parametrize("form", ["forward", "backward", "backward without sums"])
def test_triton_quick_gelu_with_a_bias(compiler: Compiler, form: str, width: int, dtype: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from scenarioclip_fast.kernels.quick_gelu import quick_gelu_triton as kernels

    direction = form.split()[0]
    constants = {"width": width, "SLOPE": 1.702, "ROWS": kernels.ROWS, "COLUMNS": kernels.COLUMNS}
    types = {"x": dtype, "bias": "fp32", "out": dtype}
    if direction == "backward":
        types = {"grad": dtype, **types, "parts": "fp32"}
        constants |= {"parts": None} if form.endswith("sums") else {}
    signature = {name: f"*{of}" for name, of in types.items()} | {"rows": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    kernel = getattr(kernels, f"quick_gelu_bias_{direction}")
    resources = compiler.triton(kernel, signature, constants, num_warps=kernels.WARPS)
    resources.check()
    if width % 16 == 0 and dtype != "fp32":
        assert "ld.global.b16" not in resources.ptx, "narrow loads"
        programs = kernels.FORWARD_PROGRAMS if direction == "forward" else kernels.BACKWARD_PROGRAMS
        resources.check_resident(programs, kernels.WARPS)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process")
@pytest.mark.parametrize("rows", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [123, 512, 768, 8192])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_sum", [True, False])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_triton_add_layer_norm(
    compiler: Compiler, direction: str, with_sum: bool, with_bias: bool, width: int, rows: str
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from scenarioclip_fast.kernels.add_layer_norm import add_layer_norm_triton as kernels

    options = kernels._options(width)
    constants = {"width": width, "WIDTH": options.pop("WIDTH")}
    if direction == "forward":
        types = {"x": rows, "branch": rows, "weight": "fp32", "bias": "fp32", "branch_bias": "fp32"}
        types |= {"total": rows, "normed": rows}
        rest = {"statistics": "*fp32", "rows": "i32", "eps": "fp32"}
        constants |= {} if with_sum else {"branch": None}
        constants |= {} if with_sum and with_bias else {"branch_bias": None}
    else:
        types = {"d_total": rows, "d_normed": rows, "total": rows, "weight": "fp32", "statistics": "fp32", "dx": rows}
        rest = {"parts": "*fp32", "rows": "i32"}
        constants |= {"SUMS": 3 if with_bias else 2}
        constants |= {} if with_sum else {"d_total": None}
    signature = {name: f"*{dtype}" for name, dtype in types.items()} | rest | dict.fromkeys(constants, "constexpr")
    resources = compiler.triton(getattr(kernels, f"add_layer_norm_{direction}"), signature, constants, **options)
    resources.check()
    if direction == "backward" and width in (512, 768) and rows == "bf16":
        programs = kernels.BACKWARD_PROGRAMS_WITH_BIAS if with_bias else kernels.BACKWARD_PROGRAMS
        resources.check_resident(programs, options["num_warps"])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process")
@pytest.mark.parametrize(
    ("dtype", "heads", "width", "longest"),
    [
        *(
            ("bf16", heads, width, length)
            for heads, width in ((12, 64), (3, 16), (2, 128))
            for length in (9, 32, 50, 128)
        ),
        ("bf16", 16, 80, 50),
        ("fp16", 12, 64, 50),
        ("fp32", 8, 64, 9),
        ("fp32", 12, 64, 32),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_triton_short_attention(
    compiler: Compiler, direction: str, packed: bool, dtype: str, heads: int, width: int, longest: int
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    import torch
    from scenarioclip_fast.kernels.short_attention import limits
    from scenarioclip_fast.kernels.short_attention import short_attention_triton as kernels

    qkv = torch.empty(0, 3 * heads * width, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype))
    assert limits.takes(longest, width, qkv.dtype)
    constants = kernels._options(qkv, heads, longest) | {"causal": packed}
    warps = constants.pop("num_warps")
    constants |= {} if packed else {"starts": None}
    signature = {"qkv": f"*{dtype}", "starts": "*i64", "out": f"*{dtype}", "length": "i32", "factor": "fp32"}
    if direction == "backward":
        signature = {"grad": f"*{dtype}", **signature, "scale": "fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    kernel = getattr(kernels, f"short_attention_{direction}")
    resources = compiler.triton(kernel, signature, constants, num_warps=warps)
    resources.check()
    # Rows are read and written 16 bytes at once.
    assert "ld.global.v4.b32" in resources.ptx and "st.global.v4.b32" in resources.ptx
    assert not re.search(r"(ld|st)\.global\.(v2\.)?(b8|b16|b32)", resources.ptx)
