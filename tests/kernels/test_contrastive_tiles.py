"""The arithmetic of the backend "cuda" of contrastive_loss on the CPU: the source of its kernels, compiled by g++."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import HostCompiler

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent


def test_hostile_arguments(host_compiler: HostCompiler, tmp_path: Path) -> None:
    program = host_compiler(PROGRAMS / "contrastive_arguments.cpp", tmp_path / "arguments", ROOT)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.parametrize("program", ["contrastive_tiles", "contrastive_rows"])
def test_kernels_match_float64(host_compiler: HostCompiler, tmp_path: Path, program: str) -> None:
    binary = host_compiler(PROGRAMS / f"{program}.cpp", tmp_path / program, ROOT, cutlass=True)
    done = subprocess.run([binary], capture_output=True, text=True, check=False, timeout=120)
    assert (done.stdout, done.returncode) == ("", 0)


# File, code with the expression to replace in « », and a wrong expression. The programs must notice each.
TILE, ARITHMETIC, ROWS = "hopper/tile.h", "arithmetic.h", "contrastive.cu"
MUTATIONS = [
    # Sums.
    (TILE, "if («first_row >= rows» || first_column >= texts) return;", "false"),
    (TILE, "if (first_row >= rows || «first_column >= texts») return;", "false"),
    (TILE, "row_data = make_float4(0.0f, «INFINITY», -1.0f, 0.0f);", "0.0f"),
    (TILE, "row_data = make_float4(0.0f, INFINITY, «-1.0f», 0.0f);", "0.0f"),
    (TILE, "read(operands.inv_x + staged_row) * «k2», offset", "1.0f"),
    (TILE, "offset = «sum_offset(k2)»;", "0.0f"),
    (TILE, "summed_weight(«read_weight(p.weight, staged_column)»));", "1.0f"),
    (ARITHMETIC, "return weight <= «kHeaviest» ? weight", "INFINITY"),
    (TILE, "any |= «row.z >= 0»;", "row.z > 0"),
    (TILE, "const bool hit = «get<1>(at(r, j))» == static_cast<int>(own[r]);", "get<1>(at(r, j)) + 1"),
    (TILE, "fmaf(found * «inverse», row_factor[r], -shift[r]);", "1.0f"),
    (TILE, "fmaf(found * inverse, row_factor[r], «-shift[r]»);", "0.0f"),
    (TILE, "fast_exp2(fmaf(acc(r, j + 1) * «staged.z», row_factor[r]", "staged.x"),
    (TILE, "fmaf(right, «staged.w», j == 0", "staged.y"),
    (TILE, "j == 0 ? left * staged.y : fmaf(left, staged.y, «row_sum[r]»)", "0.0f"),
    (TILE, "column_sum.x = r == 0 ? left : «column_sum.x» + left;", "0.0f"),
    (TILE, "low = («odd» ? row_sum[1]", "!odd"),
    (TILE, "__shfl_xor_sync(kAll, upper ? low : high, «2»)", "1"),
    (TILE, "at((odd ? 1 : 0) + («upper» ? 2 : 0), 0)", "!upper"),
    (TILE, "p.row_parts[«tile_column» * operands.rows", "(tile_column > 0 ? tile_column - 1 : 0)"),
    (TILE, "p.column_parts[«tile_row» * operands.texts", "(tile_row > 0 ? tile_row - 1 : 0)"),
    (TILE, "part < «scratch.kParts»; part += 4", "scratch.kParts - 4"),
    # The place of the positives, in both.
    (TILE, "int64_t column = «positives.first» - first_column;", "0"),
    (TILE, "column += «positives.index != nullptr» ?", "false"),
    (TILE, "static_cast<uint64_t>(column) < «static_cast<uint64_t>(width)» ?", "static_cast<uint64_t>(width - 1)"),
    (TILE, "static_cast<uint64_t>(column) < «static_cast<uint64_t>(width)» ?", "static_cast<uint64_t>(width + 1)"),
    # Gradients.
    (TILE, "bool apart = «row_data.w != 0» ||", "false"),
    (TILE, "|| «text_data.w != 0»;", "false"),
    (TILE, "apart |= «scratch.apart[w] != 0»;", "false"),
    (TILE, "own[r] = «row[r].w»;", "-1.0f"),
    (TILE, "row[r].x, «-row[r].y»)", "0.0f"),
    (TILE, "fmaf(row[r].z, text.y, «text.z»)", "0.0f"),
    (TILE, "fmaf(row[r].z, «text.y», text.z)", "text.x"),
    (TILE, "scratch.columns[thread].z = «rest.y»;", "text_data.z"),
    (TILE, "scratch.columns[thread].w = «rest.x»;", "0.0f"),
    (TILE, "row[r].w = «factor»;", "1.0f"),
    (TILE, "by_row = «text.y == 0» ? 0.0f", "false"),
    (TILE, "fast_exp2(logit - «row[r].x») * row[r].y", "text.w"),
    (TILE, "fast_exp2(logit - text.w), «text.z», by_row)", "1.0f"),
    (TILE, "by_row) * «row[r].z»;", "1.0f"),
    (TILE, "== static_cast<int>(own[r]) ? «0.0f» :", "acc(r, j)"),
    (TILE, "pairs(i) = bfloat16_pair(«accumulators(2 * i)», accumulators(2 * i + 1));", "accumulators(2 * i + 1)"),
    # Rows and numbers.
    (ARITHMETIC, "shift = offset - «log2f(inverse)»;", "0.0f"),
    (ARITHMETIC, "near = fabsf(shift - gain.log_sum) <= «kSpread»;", "2 * kSpread"),
    (ARITHMETIC, "&& «weight * inverse <= kHeavy»;", "true"),
    (ARITHMETIC, "static_cast<float>(scaled * «exp2(error)»)", "1.0"),
    (ARITHMETIC, "error = «rounded == -INFINITY» ? 0", "false"),
    (ARITHMETIC, "counts = «weight > 0 || weight != weight || logit != logit»;", "true"),
    (ARITHMETIC, "shift = «higher == -INFINITY» ? 0", "false"),
    (ARITHMETIC, "terms * exp2f(«top - shift») +", "0.0f"),
    (ARITHMETIC, "if («!any_nonzero») return 1e12f;", "squares == 0"),
    (ARITHMETIC, "squares >= 0x1p-40f && «squares <= 0x1p40f» ?", "true"),
    (ARITHMETIC, "if (text < 0 || «text >= p.texts») return 0;", "false"),
    (ARITHMETIC, "by_row = «weight == 0» ? 0", "true"),
    (ARITHMETIC, "by_column + «p.grad_positive[row]») * inverse", "0.0"),
    (ARITHMETIC, "feature * inverse * («inverse» * dot)", "1.0f"),
    (ARITHMETIC, "(word + 0x7fff + «(word >> 16 & 1)»)", "1"),
    (ROWS, "const bool vector = both && «first + kVector <= width»;", "true"),
    (ROWS, "entries[i] = «first + i < width» ?", "true"),
    (ROWS, "nonzero |= «a != 0»;", "false"),
    (ROWS, "part = warp; part < «p.count»;", "p.count - 1"),
    (ROWS, "slice = 1; slice < «kSumSlices»; ++slice) sum +=", "kSumSlices - 1"),
    (ROWS, "in_range[lane] = row >= operands.rows || «sum_in_range(sum)»;", "true"),
    (ROWS, "offsets[lane] = «sum_offset(k2)»;", "0.0f"),
    (ROWS, "operands.y + text * «operands.y_stride»", "operands.width"),
    (ROWS, "operands.inv_x[own] * «k2»;", "1.0f"),
    (ROWS, "terms.add(warp_sum(dot) * «operands.inv_y[text]» *", "1.0f"),
    (ROWS, "row_factor, «weight_of(p.weight, text)»);", "1.0f"),
    (ROWS, "terms.merge(«running[slice]»);", "running[0]"),
    (ROWS, "offsets[i] = «terms.top»;", "0.0f"),
    (ROWS, "blockIdx.x - (of_rows ? 0 : «row_blocks»)", "0"),
    (ROWS, "begin = p.order != nullptr ? «p.offsets[row]» : 0", "p.offsets[0]"),
    (ROWS, "exists = partner >= 0 && «partner < p.partner_rows»;", "partner <= p.partner_rows"),
    (ROWS, "exists = «partner >= 0» && partner", "partner > 0"),
    (ROWS, "position = begin + «threadIdx.y»; position", "0"),
    (ROWS, "for (int group = «1»; group < kGroups", "2"),
    (ROWS, "p.gain[«p.gain_of_partner» ? partner : row]", "false"),
    (ROWS, "exists ? fmaf(«gain», entries[i], gradient[i])", "1.0f"),
    (ROWS, "p.partners + partner * «p.partner_stride» :", "p.feature_stride"),
    (ROWS, "warp < «blockDim.x / 32»; ++warp) dot +=", "1"),
    (ROWS, "p.dots[row] = ldexpf(dot, «-p.exponent»);", "0"),
    (ROWS, "factor = ldexpf(*p.scale, «-p.exponent»);", "0"),
    (ROWS, "words[i / 2] |= bits << «16»;", "15"),
    (ROWS, "static_cast<uint16_t>(words[i / 2] >> («i % 2 * 16»));", "0"),
    (ROWS, "launch(finish_sums, blocks(p.operands.rows, «kSumRows»)", "2 * kSumRows"),
]


@pytest.mark.parametrize(
    ("program", "files"), [("contrastive_tiles", (TILE, ARITHMETIC)), ("contrastive_rows", (ROWS,))]
)
def test_every_mutation_is_noticed(
    host_compiler: HostCompiler, tmp_path: Path, program: str, files: tuple[str, ...]
) -> None:
    """One compilation for all of a program: each mutation stands behind a test of its number."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("*.py", "*.md"))
    numbered = [(number, *m) for number, m in enumerate(MUTATIONS, 1) if m[0] in files]
    for name in files:
        path = tmp_path / "kernels" / "contrastive" / name
        text = path.read_text()
        places: dict[tuple[int, int], str] = {}
        for number, file, code, wrong in numbered:
            if file == name:
                place = find(code, text)
                places[place] = f"(mutation == {number} ? ({wrong}) : ({places.get(place, text[slice(*place)])}))"
        for (start, end), expression in sorted(places.items(), reverse=True):
            text = text[:start] + expression + text[end:]
        path.write_text(text)
    binary = host_compiler(PROGRAMS / f"{program}.cpp", tmp_path / "mutants", tmp_path, cutlass=True)

    def failures(number: int) -> int:
        done = subprocess.run([binary, str(number)], capture_output=True, text=True, check=False, timeout=120)
        return done.returncode

    assert failures(0) == 0
    survivors = [(code, wrong) for number, _, code, wrong in numbered if failures(number) == 0]
    assert not survivors


def find(code: str, text: str) -> tuple[int, int]:
    """Where the expression in « » stands in the text, up to spacing."""
    before, expression, after = (
        r"\s*".join(re.escape(word) for word in re.findall(r"\w+|\S", part)) for part in re.split("[«»]", code)
    )
    matches = list(re.finditer(rf"{before}\s*(?P<expression>{expression})\s*{after}", text))
    assert len(matches) == 1, f"{code} occurs {len(matches)} times"
    return matches[0].span("expression")
