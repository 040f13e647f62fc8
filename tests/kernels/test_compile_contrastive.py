"""Every configuration of the contrastive Triton kernels compiles for sm_90a, spills nothing and fits."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from conftest import Compiler

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from scenarioclip_fast.kernels.contrastive import contrastive_triton as kernels

WIDTH = 512
# What Plan.of chooses: operand, precision of the products, inner block.
PLANS = {
    "bf16": kernels.Plan(torch.bfloat16, "tf32", WIDTH, 64, True),
    "tf32": kernels.Plan(torch.float32, "tf32", WIDTH, 32, True),
    "tf32x3": kernels.Plan(torch.float32, "tf32x3", WIDTH, 32, True),
}
DOUBLES = ("row_lse", "column_lse", "grad_row", "grad_column", "grad_positive")


def signature(kernel: Any, operand: str, constants: dict[str, Any], **special: str) -> dict[str, str]:
    """Types by name: sizes and strides are numbers, `index` is int64, operands and dS have the operand's type."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in special:
            types[name] = special[name]
        elif name in ("x", "y", "unit", "grad", *(f"{side}{k}" for side in "ao" for k in range(kernels.LEVELS))):
            types[name] = f"*{operand}"
        elif name in DOUBLES:
            types[name] = "*fp64"
        elif name == "index":
            types[name] = "*i64"
        elif name[-1].isdigit() or name in ("n", "u") or name.split("_")[-1] in ("total", "count", "blocks"):
            types[name] = "i32"
        else:
            types[name] = "*fp32"
    return types


def compile_for(compiler: Compiler, kernel: Any, plan: kernels.Plan, constants: dict[str, Any], **options: int) -> None:
    operand = "bf16" if plan.operand == torch.bfloat16 else "fp32"
    special = {}
    if constants.get("TMA"):
        special = dict.fromkeys("xy", f"tensordesc<{operand}[{kernels.BLOCK},{plan.inner}]>")
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    compiler.triton(kernel, signature(kernel, operand, used, **special), used, **options).check()


# Texts given or on the diagonal, through descriptors or (before sm_90) pointers. The diagonal is texts given less a few
# registers, and pointers take most of them in bfloat16, so that neither is compiled with every precision.
FORMS = [
    *(pytest.param(plan, True, True, id=f"{name}-tma-texts given") for name, plan in PLANS.items()),
    pytest.param(PLANS["bf16"], True, False, id="bf16-tma-diagonal"),
    pytest.param(PLANS["bf16"], False, True, id="bf16-pointers-texts given"),
]


@pytest.mark.parametrize(("plan", "tma", "given"), FORMS)
@pytest.mark.parametrize("kernel", [kernels.tile_sums, kernels.tile_gradients], ids=lambda k: k.__name__)
def test_tiles(compiler: Compiler, kernel: Any, plan: kernels.Plan, tma: bool, given: bool) -> None:
    block = kernels.BLOCK
    constants = {"WIDTH": WIDTH, "HAS_INDEX": given, "HAS_WEIGHT": given, "BM": block, "BN": block, "BK": plan.inner}
    constants |= {"TMA": tma, "PRECISION": plan.precision}
    compile_for(compiler, kernel, plan, constants, **plan.options())


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_log_sums_and_products(compiler: Compiler, plan: kernels.Plan) -> None:
    block = kernels.PRODUCT_BLOCK
    constants = {"WIDTH": WIDTH, "HAS_WEIGHT": True, "TILE": kernels.BLOCK, "FIRST_SIDE": 0, "BM": block, "BN": block}
    constants |= {"BK": plan.inner, "PRECISION": plan.precision}
    compile_for(compiler, kernels.log_sums, plan, constants, num_warps=4, num_stages=2)
    compile_for(compiler, kernels.products, plan, constants, num_warps=4, num_stages=3)


@pytest.mark.parametrize("plan", [PLANS["bf16"], PLANS["tf32x3"]], ids=["bf16", "fp32"])
@pytest.mark.parametrize("width", [123, 1024])
def test_rows(compiler: Compiler, plan: kernels.Plan, width: int) -> None:
    whole = -(-width // plan.inner) * plan.inner
    constants = {"D": width, "WIDTH": whole, "BLOCK_D": 1 << (whole - 1).bit_length(), "SMALLEST": 1e-12}
    constants |= {"NORMALIZE": True, "POSITIVE": True}
    for kernel in (kernels.unit_rows, kernels.finish_rows):
        compile_for(compiler, kernel, plan, constants, num_warps=2)


def test_vectors(compiler: Compiler) -> None:
    for kernel in (kernels.factors, kernels.sum_levels):
        compile_for(compiler, kernel, PLANS["bf16"], {"BM": 1024})
