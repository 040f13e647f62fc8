"""A broken installation and an unsupported torch are each reported in one line, with the fix."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scenarioclip_fast import env, native, requirements

ROOT = Path(__file__).parents[1]
USE_AN_OP = "import scenarioclip_fast; scenarioclip_fast.ops.contrastive_loss"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A fresh clone, neither built nor installed."""
    folder = tmp_path / "checkout"
    copy_package(folder)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", folder)
    return folder


@pytest.fixture
def fresh_probes() -> Iterator[None]:
    native.unavailable_reason.cache_clear()
    native.build_info.cache_clear()
    yield
    native.unavailable_reason.cache_clear()
    native.build_info.cache_clear()


def copy_package(folder: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "build.json", "kernels")
    shutil.copytree(ROOT / "scenarioclip_fast", folder / "scenarioclip_fast", ignore=ignored)


def python(arguments: list[str], folder: Path, *search_path: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder` without site-packages, so that the project's own installation is invisible."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, search_path))}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def check_rejected(folder: Path, message: str, *search_path: Path) -> None:
    done = python(["-m", "scenarioclip_fast", "doctor"], folder, *search_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")
    done = python(["-c", USE_AN_OP], folder, *search_path)
    assert done.stderr.splitlines()[-1] == f"scenarioclip_fast.errors.InstallationError: {message}"


def test_a_checkout_that_is_not_installed(checkout: Path) -> None:
    check_rejected(
        checkout,
        f"the checkout {checkout} is not installed: run `pip install -e .` there, or `make install` and use .venv/bin",
    )
    assert python(["-m", "scenarioclip_fast", "--help"], checkout).returncode == 0
    assert python(["-c", "import scenarioclip_fast.bench.record"], checkout).returncode == 0


def test_a_checkout_that_hides_the_installed_package(checkout: Path, tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    copy_package(site)
    shutil.copytree(ROOT / "kernels", site / "scenarioclip_fast" / "kernels")
    for parent in (site, checkout):  # setuptools leaves metadata in the checkout, too
        metadata = parent / "scenarioclip_fast-0.1.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text("Metadata-Version: 2.1\nName: scenarioclip-fast\nVersion: 0.1.0\n")
    check_rejected(
        checkout,
        f"scenarioclip_fast was imported from the checkout {checkout} instead of the installed package in {site}: "
        "start Python in another directory, or run `pip install -e .` in the checkout",
        site,
    )
    assert python(["-c", "import scenarioclip_fast.ops"], tmp_path, site).returncode == 0


def test_a_checkout_with_the_kernels_of_another_one(checkout: Path) -> None:
    """An editable installation maps scenarioclip_fast.kernels to its own checkout, wherever the package comes from."""
    done = subprocess.run(
        [sys.executable, "-m", "scenarioclip_fast", "doctor"], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "start Python in another directory, or run `pip install -e .`" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_incomplete_installation(tmp_path: Path) -> None:
    copy_package(tmp_path)
    package = tmp_path / "scenarioclip_fast"
    check_rejected(tmp_path, f"{package} has no kernels: the installation is incomplete, reinstall scenarioclip-fast")


def test_the_supported_versions_of_torch_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert requirements.TORCH_REQUIREMENT in project["project"]["dependencies"]
    assert requirements.TORCH_REQUIREMENT in project["build-system"]["requires"]


@pytest.mark.parametrize(
    ("version", "age"), [("2.10.1", "old"), ("2.9.0+cu126", "old"), ("2.14.0a0+git1", "new"), ("3.0", "new")]
)
def test_an_unsupported_torch(
    version: str, age: str, monkeypatch: pytest.MonkeyPatch, fresh_probes: None, tmp_path: Path
) -> None:
    message = f"torch {version} is too {age}: run `pip install 'torch>=2.11,<2.14'` and reinstall scenarioclip-fast"
    monkeypatch.setattr(torch, "__version__", version)
    assert requirements.unsupported_torch() == message
    if "cpu" in native.build_info()["built"]:
        with pytest.warns(UserWarning, match=f"^torch {version.partition('+')[0]}.* is too {age}: "):
            assert native.unavailable_reason("cpu") is None  # the library was built for the real version, so it loads
    (tmp_path / "build.json").write_text(json.dumps({"built": ["cpu"], "left_out": {}, "march": ""}))
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.unavailable_reason.cache_clear()
    native.build_info.cache_clear()
    reason = native.unavailable_reason("cpu")
    assert reason is not None and reason.startswith("the cpu library does not load (") and reason.endswith(message)


def test_doctor_reports_an_unsupported_torch(monkeypatch: pytest.MonkeyPatch, fresh_probes: None) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = env.collect().rows
    assert ("versions", "torch", "2.10.1") in [row[:3] for row in rows]
    assert next(row[3] for row in rows if row[1] == "torch").startswith("torch 2.10.1 is too old: ")


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.13.0+cpu"])
def test_a_supported_torch(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert requirements.unsupported_torch() is None
