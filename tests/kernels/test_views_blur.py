"""The blur of the backend "cuda" of the views on the CPU: the source of its kernels, compiled by g++."""

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
PROGRAM = Path(__file__).parent / "views_blur.cpp"


def test_blur_matches_a_direct_one(host_compiler: HostCompiler, tmp_path: Path) -> None:
    binary = host_compiler(PROGRAM, tmp_path / "blur", ROOT)
    done = subprocess.run([binary], capture_output=True, text=True, check=False, timeout=120)
    assert (done.stdout, done.returncode) == ("", 0)


# Code of blur.h with the expression to replace in « », and a wrong expression. The program must notice each.
MUTATIONS = [
    ("const bool inside = «tile.y >= radius» &&", "true"),
    ("&& «tile.y + kBlurRows + radius <= image.height»;", "true"),
    ("if («distance <= radius») sums[i]", "distance < radius"),
    ("source = image.pixels + 3 * «reflect(tile.x - radius + column, image.width)»;", "(tile.x + column)"),
    ("|| «tile.y + row >= window.y2») return;", "false"),
    ("int64_t{«tile.y - window.y1 + row»} * window.stride()", "tile.y + row - 2 * window.y1"),
    ("+ «(tile.x - window.x1)» + column;", "0"),
    ("shared + row * «blur_shared_stride(radius)» + column;", "kBlurColumns"),
]


@pytest.mark.parametrize(("code", "wrong"), MUTATIONS, ids=range(len(MUTATIONS)))
def test_deliberate_faults_are_noticed(host_compiler: HostCompiler, tmp_path: Path, code: str, wrong: str) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    header = folder / "views" / "blur.h"
    text = header.read_text()
    right = re.sub("[«»]", "", code)
    assert text.count(right) == 1, right
    header.write_text(text.replace(right, re.sub("«.*»", lambda _: wrong, code)))
    binary = host_compiler(PROGRAM, tmp_path / "blur", tmp_path)
    done = subprocess.run([binary], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
