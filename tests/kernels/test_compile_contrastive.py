"""Every configuration of the contrastive Triton kernels compiles for sm_90a, spills nothing and fits."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from conftest import Compiler, Resources

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from scenarioclip_fast.kernels.contrastive import (
    contrastive_triton,
    grouped,
    large_kernels,
    large_triton,
    mean_kernels,
)
from scenarioclip_fast.kernels.contrastive.plan import Plan, Tile

WIDTH = 512
# What Plan.of chooses: operand, precision of the products, inner block.
PLANS = {
    "bf16": Plan(torch.bfloat16, "tf32", WIDTH, 64, tma=True, folds=True),
    "tf32": Plan(torch.float32, "tf32", WIDTH, 32, tma=True, folds=False),
    "tf32x3": Plan(torch.float32, "tf32x3", WIDTH, 32, tma=True, folds=False),
}
# Besides the tiles of the plans: what benchmarks/tune_contrastive.py may choose for bfloat16.
CANDIDATES = [Tile(256, 128, 8, stages) for stages in (3, 4)]
SUM_CANDIDATES = [Tile(256, 128, 8)]
DOUBLES = ("row_lse", "column_lse", "positive", "used", "grad_row", "grad_column", "grad_positive")
LARGE_DOUBLES = ("row_lse", "text_lse", "logit", "grad_row", "grad_text", "grad_positive")


def signature(kernel: Any, operand: str, constants: dict[str, Any], /, **special: str) -> dict[str, str]:
    """Types by name: sizes and strides are numbers, `index` is int64, operands and dS have the operand's type."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in special:
            types[name] = special[name]
        elif name in ("x", "y", "unit"):
            types[name] = f"*{operand}"
        elif name in DOUBLES:
            types[name] = "*fp64"
        elif name in ("index", "order", "start"):
            types[name] = "*i64"
        elif name == "up":
            types[name] = "fp32"
        elif name in ("count", "weight"):
            types[name] = "*i32"
        elif (
            name[-1].isdigit()
            or name in ("n", "u", "others", "shift", "stride")
            or name.endswith(("_total", "_count", "_blocks", "_stride"))
        ):
            types[name] = "i32"
        else:
            types[name] = "*fp32"
    return types


def compile_for(compiler: Compiler, kernel: Any, plan: Plan, constants: dict[str, Any], **special: str) -> Resources:
    operand = "bf16" if plan.operand == torch.bfloat16 else "fp32"
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    resources = compiler.triton(kernel, signature(kernel, operand, used, **special), used, **options)
    resources.check()
    return resources


def check_products(compiler: Compiler, resources: Resources, tma: bool) -> None:
    """Products use wgmma and are not serialised; operands are loaded by TMA if and only if `tma` is set."""
    assert "wgmma.mma_async" in resources.ptx and "mma.sync" not in resources.ptx
    assert ("cp.async.bulk.tensor" in resources.ptx) == tma
    warnings = compiler.warnings(resources.ptx)
    assert "Used" in warnings and "serialized" not in warnings, warnings


def loads(ptx: str) -> list[int]:
    """The bytes of each access that reads global memory, through registers or into shared memory."""
    through = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bsuf](\d+)\s", ptx)
    found = [int(many or 1) * int(bits) // 8 for many, bits in through]
    found += [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?\], (\w+)", ptx)]
    assert len(found) == len(re.findall(r"ld\.global|cp\.async\.c[ag]\.", ptx)), "a form that is not counted"
    return found


# With a text index or the diagonal, through TMA descriptors or (before sm_90) pointers. Not at every precision: the
# diagonal takes a few registers less than an index, and pointers take the most registers in bfloat16.
FORMS = [
    *(pytest.param(plan, True, id=f"{name}-tma-texts given") for name, plan in PLANS.items()),
    pytest.param(PLANS["bf16"], False, id="bf16-tma-diagonal"),
    pytest.param(replace(PLANS["bf16"], tma=False), True, id="bf16-pointers-texts given"),
]


def test_vectors(compiler: Compiler) -> None:
    constants = {"BM": contrastive_triton.VECTOR}
    compile_for(compiler, mean_kernels.count_rows, PLANS["bf16"], constants, count="*i32")
    for positives in (False, True):
        constants |= {"HAS_COUNT": True, "POSITIVES": positives}
        compile_for(compiler, mean_kernels.mean_parts, PLANS["bf16"], constants, parts="*fp64")
        compile_for(compiler, mean_kernels.mean_loss, PLANS["bf16"], constants, parts="*fp64", blocks="i32")
        compile_for(compiler, mean_kernels.mean_gradients, PLANS["bf16"], constants, grad="*fp32")


def compile_large(compiler: Compiler, kernel: Any, plan: Plan, constants: dict[str, Any], **special: str) -> Resources:
    """Compile a kernel of one large level, where `positive` is float32."""
    special = {**dict.fromkeys(LARGE_DOUBLES, "*fp64"), "positive": "*fp32", **special}
    names = {name: kind for name, kind in special.items() if name in kernel.arg_names}
    return compile_for(compiler, kernel, plan, {**constants, **plan.constants()}, **names)


@pytest.mark.parametrize(("plan", "given"), FORMS)
def test_tiles_of_a_large_level(compiler: Compiler, plan: Plan, given: bool) -> None:
    operand = "bf16" if plan.operand == torch.bfloat16 else "fp32"
    candidates, sum_candidates = (CANDIDATES, SUM_CANDIDATES) if plan is PLANS["bf16"] and given else ([], [])
    cases = [(large_kernels.tile_sums, tile) for tile in [plan.sum_tile(), *sum_candidates]]
    cases += [(large_kernels.tile_gradients, tile) for tile in [plan.gradient_tile(), *candidates]]
    for kernel, tile in cases:
        constants = {"HAS_INDEX": given, "HAS_WEIGHT": given, "TMA": plan.tma, **tile.options()}
        sides = {"x": tile.rows, "y": tile.texts} if plan.tma else {}
        special = {name: f"tensordesc<{operand}[{side},{plan.inner}]>" for name, side in sides.items()}
        resources = compile_large(compiler, kernel, plan, constants, out=f"*{operand}", **special)
        check_products(compiler, resources, plan.tma)
        if kernel is large_kernels.tile_gradients:
            assert set(re.findall(r"st\.global\S*", resources.ptx)) == {"st.global.v4.b32"}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_vectors_of_a_large_level(compiler: Compiler, plan: Plan) -> None:
    constants = {"HAS_WEIGHT": True, "POSITIVE": True, "BM": large_triton.LOG_SUM_ROWS}
    constants |= {"PARTS": large_triton.LOG_SUM_PARTS, "num_warps": 8, "num_stages": 2}
    compile_large(compiler, large_kernels.log_sums, plan, constants, out="*fp64", positive="*fp64")
    constants = {"HAS_INDEX": True, "HAS_WEIGHT": True, "BM": large_triton.VECTOR}
    compile_large(compiler, large_kernels.factors, plan, constants)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(("width", "aligned"), [(123, False), (1024, True)])
def test_rows_of_a_large_level(compiler: Compiler, plan: Plan, width: int, aligned: bool) -> None:
    plan = replace(plan, width=-(-width // plan.inner) * plan.inner)
    operand = "bf16" if plan.operand == torch.bfloat16 else "fp32"
    constants = {"D": width, "BLOCK_D": 1 << (plan.width - 1).bit_length(), "NORMALIZE": True, "ALIGNED": aligned}
    constants |= {"num_warps": 2, "ROUND": plan.rounds}
    features = {"features": f"*{operand}"}
    for kernel in (large_kernels.inverse_norms, large_kernels.unit_rows):
        resources = compile_large(compiler, kernel, plan, constants, **features)
        assert set(loads(resources.ptx)) == {16 if aligned else plan.operand.itemsize}
    constants |= {"HAS_INDEX": True, "STORE": True}
    for by_text in (False, True):
        sides = dict.fromkeys(("operand", "other", "out"), f"*{operand}")
        constants |= {"BY_TEXT": by_text, "PARTNERS": large_triton.PARTNER_ENTRIES // constants["BLOCK_D"]}
        constants["num_warps"] = 8 if by_text else 2
        resources = compile_large(compiler, large_kernels.finish_rows, plan, constants, **sides)
        if aligned:
            assert 16 in loads(resources.ptx)


def grouped_form(name: str, width: int, positives: bool, given: bool) -> grouped.Form:
    plan = PLANS[name]
    padded = -(-width // plan.inner) * plan.inner
    constants = (plan.operand, plan.precision, width, padded, plan.inner, name == "tf32")
    return grouped.Form(*constants, positives, given, normalize=True)


def compile_grouped(
    compiler: Compiler, kernel: Any, name: str, form: grouped.Form, constants: dict[str, Any]
) -> Resources:
    """Types by name, as in `signature`. Features are float16 where they are multiplied in TF32."""
    operand = "bf16" if form.operand == torch.bfloat16 else "fp32"
    feature = {"bf16": "bf16", "tf32": "fp16", "tf32x3": "fp32"}[name]
    pointers = {"a": feature, "b": feature, "o": feature, "e": feature, "s": "fp32", "i": "i64", "w": "fp32"}
    options = {key: constants[key] for key in ("num_warps", "num_stages") if key in constants}
    used = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = {}
    for argument in kernel.arg_names:
        per_level = argument[-1].isdigit()
        if argument in used:
            types[argument] = "constexpr"
        elif per_level and argument[0] in pointers:
            types[argument] = f"*{pointers[argument[0]]}"
        elif per_level or argument in ("given", "levels", "upstream_stride", "first_block"):
            types[argument] = "i32"
        elif argument in (*DOUBLES, *LARGE_DOUBLES):
            types[argument] = "*fp64"
        else:
            types[argument] = f"*{operand}" if argument in ("units", "grad") else "*fp32"
    resources = compiler.triton(kernel, types, used, **options)
    resources.check()
    return resources


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    ("width", "positives", "given"), [(512, False, False), (123, True, False), (1000, True, False), (512, False, True)]
)
def test_grouped(compiler: Compiler, name: str, width: int, positives: bool, given: bool) -> None:
    form = grouped_form(name, width, positives, given)
    aligned = form.width % 8 == 0
    kernels = grouped.kernels
    unit = compile_grouped(compiler, kernels.prepare_levels, name, form, {**form.prepare, "ALIGNED": aligned})
    finish = compile_grouped(
        compiler, kernels.finish_levels, name, form, {**form.finish, "ALIGNED": aligned, "SIDE": 0}
    )
    itemsize = {"bf16": 2, "tf32": 2, "tf32x3": 4}[name]
    # Features are read 16 bytes at a time or one by one; the rest are numbers and vectors (text indices: 8 bytes).
    assert (16 in loads(unit.ptx)) == (16 in loads(finish.ptx)) == aligned
    assert (itemsize in loads(unit.ptx)) == (not aligned or itemsize == 4)
    check_products(compiler, compile_grouped(compiler, kernels.level_sums, name, form, form.sums), False)
    gradients = compile_grouped(compiler, kernels.level_gradients, name, form, form.gradients)
    check_products(compiler, gradients, False)
    # One exponential a logit where log-sums are close to the offset, two in the other branch; nothing else takes one.
    logits = grouped.TILE_ROWS * grouped.TILE_TEXTS // (32 * form.gradients["num_warps"])
    assert gradients.ptx.count("ex2.approx") == 3 * logits
    if given:
        compile_grouped(compiler, kernels.level_log_sums, name, form, form.log_sums)
        compile_grouped(compiler, kernels.level_factors, name, form, {"num_warps": 2})
    else:
        compile_grouped(compiler, kernels.level_losses, name, form, form.losses)
    for first_side in (0, 1):  # both products, or the second one alone
        products = compile_grouped(
            compiler, kernels.level_products, name, form, {**form.products, "FIRST_SIDE": first_side}
        )
        check_products(compiler, products, False)
        # Vectors are read 4 bytes at a time, and so are TF32 operands that are transposed: the tensor cores take them
        # only with a contiguous inner dimension.
        assert set(loads(products.ptx)) <= {4, 16} and 16 in loads(products.ptx)
