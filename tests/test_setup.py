"""setup.py: the installed packages, the CUDA architectures, and one-line errors for missing tools."""

from __future__ import annotations

import importlib.metadata
import json
import re
import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The globals of setup.py, and its arguments to setuptools under "arguments"."""
    arguments: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: arguments.update(kwargs))
    return {**runpy.run_path(str(ROOT / "setup.py")), "arguments": arguments}


def test_every_package_is_installed(setup: dict[str, Any]) -> None:
    folders = {path.parent for path in (ROOT / "scenarioclip_fast").rglob("*.py")}
    folders |= {path.parent for path in (ROOT / "kernels").rglob("*.py")} | {ROOT / "benchmarks", ROOT / "configs"}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    names = {name if name.startswith("scenarioclip_fast") else f"scenarioclip_fast.{name}" for name in names}
    assert set(setup["arguments"]["packages"]) == names


def test_data_files_are_installed(setup: dict[str, Any]) -> None:
    """What the package reads from beside its modules."""
    patterns = setup["arguments"]["package_data"]
    files = {path for path in (ROOT / "scenarioclip_fast").rglob("*.json") if path.name != "build.json"}
    assert ROOT / "scenarioclip_fast" / "generate" / "curate" / "antonyms.json" in files
    for path in files:
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert any(path.match(pattern) for pattern in patterns.get(package, [])), path


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([], "cmake is not on PATH: run pip install cmake ninja, or set SCENARIOCLIP_FAST_BUILD=none"),
        (["cmake"], "ninja is not on PATH"),
        (["cmake", "ninja"], r"no C\+\+ compiler found \(looked for c\+\+, g\+\+, clang\+\+\): install g\+\+"),
        (["cmake", "ninja", "g++"], None),
    ],
)
def test_missing_tools(
    setup: dict[str, Any], tools: list[str], message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    for name in tools:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    if message is None:
        setup["check_tools"](str(tmp_path))
        return
    with pytest.raises(SystemExit, match=f"^error: {message}") as error:
        setup["check_tools"](str(tmp_path))
    assert "\n" not in str(error.value)


def test_missing_compiler_named_by_CXX(setup: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cmake", "ninja", "g++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("CXX", "nowhere++ -O3")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler found \(looked for nowhere\+\+\)"):
        setup["check_tools"](str(tmp_path))


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0+cu130", "3.0.0"])
def test_unsupported_torch(setup: dict[str, Any], version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(
        SystemExit, match=f"^error: got torch {re.escape(version)}, expected torch>=2.11,<2.14: run pip"
    ):
        setup["torch_folder"]()


def test_supported_torch_matches_pyproject(setup: dict[str, Any]) -> None:
    assert (ROOT / "pyproject.toml").read_text().count(f'"{setup["TORCH"]}"') == 2


def test_cutlass_version_is_the_same_everywhere(setup: dict[str, Any]) -> None:
    assert (ROOT / "Makefile").read_text().count(f"CUTLASS := {setup['CUTLASS']}\n") == 1
    assert (ROOT / "benchmarks" / "gpu" / "pack.py").read_text().count(f'"{setup["CUTLASS"]}"') == 1


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "holds no CUTLASS headers"), ("4 3", "holds the headers of CUTLASS 4.3: run pip"), ("4 2", None)],
)
def test_cutlass_headers(
    setup: dict[str, Any], version: str | None, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCENARIOCLIP_FAST_CUTLASS", str(tmp_path))
    if version is not None:
        (tmp_path / "cutlass").mkdir()
        major, minor = version.split()
        text = f"#define CUTLASS_MAJOR {major}\n#define CUTLASS_MINOR {minor}\n"
        (tmp_path / "cutlass" / "version.h").write_text(text)
    folder, reason = setup["cutlass_headers"]()
    if message is None:
        assert (folder, reason) == (tmp_path, None)
    else:
        assert folder is None and message in reason and setup["CUTLASS"] in reason


def test_without_cutlass(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCENARIOCLIP_FAST_CUTLASS", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder, reason = setup["cutlass_headers"]()
    assert folder is None and "the CUTLASS headers were not found: run pip install --no-deps nvidia-cutlass" in reason


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_ptx_for_later_devices(setup: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCENARIOCLIP_FAST_ARCHS", raising=False)
    architectures = setup["cuda_architectures"]()
    *_, last = architectures.removesuffix("+PTX").split(";")
    assert architectures.endswith("+PTX")
    defines = {
        "SCF_TORCH": setup["torch_folder"](),
        "SCF_OUTPUT": tmp_path,
        "SCF_PYBIND11": tmp_path,
        "SCF_PYTHON_INCLUDE": sysconfig.get_path("include"),
        "SCF_PYTHON_SUFFIX": ".so",
        "SCF_CUDA": "ON",
        "SCF_CUDA_ARCHITECTURES": architectures,
    }
    cmake = shutil.which("cmake", path=f"{sysconfig.get_path('scripts')}:/usr/bin") or "cmake"
    arguments = [f"-D{key}={value}" for key, value in defines.items()]
    path = {"PATH": f"{sysconfig.get_path('scripts')}:{Path(shutil.which('nvcc') or '').parent}:/usr/bin:/bin"}
    subprocess.run([cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *arguments], env=path, check=True)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    kernels = [entry["command"] for entry in commands if entry["file"].endswith(".cu")]
    assert len(kernels) == len(list((ROOT / "kernels").glob("*/*.cu")))
    virtual = last.rstrip("a")
    for command in kernels:
        assert f"-gencode=arch=compute_{last},code=sm_{last}" in command
        assert (
            command.count("code=compute_") == 1 and f"-gencode=arch=compute_{virtual},code=compute_{virtual}" in command
        )
