"""The sources of the backend "cuda" of the views, compiled by g++ and run on the CPU: its blur and its tables."""

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


@pytest.mark.parametrize("name", ["blur", "jobs"])
def test_program_finds_no_difference(host_compiler: HostCompiler, tmp_path: Path, name: str) -> None:
    binary = host_compiler(PROGRAMS / f"views_{name}.cpp", tmp_path / name, ROOT)
    done = subprocess.run([binary], capture_output=True, text=True, check=False, timeout=120)
    assert (done.stdout, done.returncode) == ("", 0)


# Code of blur.h and jobs.h with the expression to replace in « », and a wrong expression. The program must notice each.
MUTATIONS = [
    ("blur", "const bool inside = «tile.y >= radius» &&", "true"),
    ("blur", "&& «tile.y + kBlurRows + radius <= image.height»;", "true"),
    ("blur", "if («distance <= radius») sums[i]", "distance < radius"),
    ("blur", "source = image.pixels + 3 * «reflect(tile.x - radius + column, image.width)»;", "(tile.x + column)"),
    ("blur", "|| «tile.y + row >= window.y2») return;", "false"),
    ("blur", "int64_t{«tile.y - window.y1 + row»} * window.stride()", "tile.y + row - 2 * window.y1"),
    ("blur", "+ «(tile.x - window.x1)» + column;", "0"),
    ("blur", "return («colour * kBlurRows + row») * blur_shared_stride(radius);", "row"),
    ("blur", "blurred_once(colours[c], «weights.published»)", "true"),
    ("blur", "blurred_twice(sums[i].sum, «weights.published»)", "true"),
    ("blur", "sum += «uint64_t{value}» * weight;", "value"),
    ("jobs", "order[begin[row(view)[kImage]]«++»] = view;", ""),
    ("jobs", "++begin[row(view)[kImage] + «1»];", "0"),
    ("jobs", "job.first_run -= «run_begin_»;", "0"),
    ("jobs", "run_end_ = std::max(run_end_, «job.first_run + job.runs»);", "job.runs"),
    ("jobs", "job.ends = scratch_.allocate(job.runs * «8»);", "0"),
    ("jobs", "«scratch_ = masks_end_;»", "scratch_ = {};"),
    ("jobs", "jobs_.scratch_bytes = «std::max(jobs_.scratch_bytes, scratch_.used())»;", "scratch_.used()"),
    ("jobs", "[](const ViewJob& v) { return «v.augmented»; }", "!v.augmented"),
    ("jobs", "wave_.blur_begin = «wave_.blur_end»;", "0"),
]


@pytest.mark.parametrize(("name", "code", "wrong"), MUTATIONS, ids=range(len(MUTATIONS)))
def test_deliberate_faults_are_noticed(
    host_compiler: HostCompiler, tmp_path: Path, name: str, code: str, wrong: str
) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    header = folder / "views" / f"{name}.h"
    text = header.read_text()
    right = re.sub("[«»]", "", code)
    assert text.count(right) == 1, right
    header.write_text(text.replace(right, re.sub("«.*»", lambda _: wrong, code)))
    binary = host_compiler(PROGRAMS / f"views_{name}.cpp", tmp_path / name, tmp_path)
    done = subprocess.run([binary], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
