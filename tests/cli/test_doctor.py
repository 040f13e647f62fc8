"""doctor and backend dispatch report missing dependencies, which the tests simulate."""

from __future__ import annotations

import builtins
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import scenarioclip_fast as scf
from scenarioclip_fast import dispatch, env, native, requirements
from scenarioclip_fast.cli.main import main


@pytest.fixture(autouse=True)
def fresh_probes() -> Iterator[None]:
    def clear() -> None:
        for probe in (requirements.import_problem, native.build_info, native.unavailable_reason, native.host):
            probe.cache_clear()

    clear()
    yield
    clear()


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make `import package` fail as if the package were not installed."""
    for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__
    real_module = importlib.import_module

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == package or name.startswith(package + "."):
            raise ModuleNotFoundError(f"No module named {package!r}")
        return real(name, *args, **kwargs)

    def refuse_module(name: str, *args: Any) -> Any:
        if name == package or name.startswith(package + "."):
            raise ModuleNotFoundError(f"No module named {package!r}")
        return real_module(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(importlib, "import_module", refuse_module)


def row(name: str, section: str | None = None) -> tuple[str, str]:
    found = [(state, detail) for s, n, state, detail in env.collect().rows if n == name and section in (None, s)]
    assert found, name
    return found[0]


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *a, **k: None if name == "nvcc" else which(name, *a, **k))
    assert row("nvcc") == ("missing", "not on PATH: CUDA sources cannot be compiled")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "triton")
    state, detail = row("triton", "versions")
    assert state == "missing"
    assert "pip install 'scenarioclip-fast[triton]'" in detail
    assert row("triton", "backends of contrastive_loss")[0] == "no"
    with pytest.raises(scf.BackendError, match=r"contrastive_loss: backend 'triton' .* usable: "):
        dispatch.resolve("contrastive_loss", "triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(scf.BackendError, match="triton is not installed"):
        dispatch.resolve("contrastive_loss", "triton", "cpu")


@pytest.mark.parametrize(
    ("module", "distribution", "extra"),
    [
        ("nvidia.dali", "nvidia-dali-cuda130", "dali"),
        ("nvidia.nvimgcodec", "nvidia-nvimgcodec-cu13", "nvimgcodec"),
        ("torchvision", "torchvision", "torchvision"),
    ],
)
def test_without_a_decoder(module: str, distribution: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, module)
    state, detail = row(distribution)
    assert state == "missing"
    assert f"pip install 'scenarioclip-fast[{extra}]'" in detail


def test_a_package_that_fails_while_it_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As torchvision does next to a torch that it was not built for."""
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    state, detail = row("torchvision")
    assert state == "missing"
    assert "does not load (operator torchvision::nms does not exist)" in detail


@pytest.mark.parametrize(("backend", "dtype"), [("cuda", "float32"), ("triton", "float64")])
def test_the_device_comes_before_the_dtype(backend: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody should cast the input for a backend that cannot run here anyway."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(scf.BackendError, match="here: it runs on cuda tensors"):
        dispatch.resolve("contrastive_loss", backend, "cpu", dtype=dtype)
    monkeypatch.setattr(dispatch, "_missing", lambda _: "not built")
    with pytest.raises(scf.BackendError, match="here: not built"):
        dispatch.resolve("contrastive_loss", backend, "cuda", dtype=dtype)
    monkeypatch.setattr(dispatch, "_missing", lambda _: None)
    with pytest.raises(scf.BackendError, match=f"but the input is {dtype}"):
        dispatch.resolve("contrastive_loss", backend, "cuda", dtype=dtype)


def test_without_compiled_extensions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert row("cpu", "compiled extensions")[0] == "missing"
    assert "without its compiled extensions" in row("cpu", "backends of distillation_loss")[1]
    assert dispatch.resolve("distillation_loss", "auto", "cpu") == "reference"
    with pytest.raises(scf.BackendError, match="the cpu library was not built"):
        dispatch.resolve("distillation_loss", "cpu", "cpu")


def test_the_reason_for_a_skipped_extension_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = {"built": ["cpu"], "left_out": {"cuda": "nvcc is not on PATH"}, "march": ""}
    (tmp_path / "build.json").write_text(json.dumps(info))
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert row("cuda", "compiled extensions") == ("missing", "the cuda library was not built: nvcc is not on PATH")
    state, detail = row("cpu", "compiled extensions")
    assert state == "missing"
    assert "does not load" in detail


def test_an_avx2_build_on_an_older_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(native, "build_info", lambda: {"built": ["cpu"], "left_out": {}, "march": "x86-64-v3"})
    assert "SCENARIOCLIP_FAST_MARCH=x86-64" in str(native.unavailable_reason("cpu"))


def test_precedence_of_backend_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    op = "distillation_loss"
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.resolve(op, "auto", "cpu") == "reference"
    with scf.use_backend("cpu"):
        assert dispatch.resolve(op, "auto", "cpu") == "cpu"
        assert dispatch.resolve(op, "reference", "cpu") == "reference"
        with scf.use_backend("cuda"), pytest.raises(scf.BackendError, match="from use_backend"):
            dispatch.resolve(op, "auto", "cpu")
    monkeypatch.setenv(dispatch.VARIABLE, "")  # as if unset
    assert dispatch.resolve(op, "auto", "cpu") != "reference"
    monkeypatch.setenv(dispatch.VARIABLE, "quick")
    with pytest.raises(scf.UserError, match=f"{dispatch.VARIABLE}: got 'quick'"):
        dispatch.resolve(op, "auto", "cpu")


def test_what_chooses_a_backend_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert not [name for section, name, *_ in env.collect().rows if section == "environment"]
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert row(dispatch.VARIABLE) == ("reference", "")
    monkeypatch.setenv(dispatch.VARIABLE, "cud")
    state, detail = row(dispatch.VARIABLE)
    assert state == "cud" and "unknown" in detail and "auto, reference" in detail
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda *_: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert row("cuda", "backends of contrastive_loss") == (
        "yes",
        "chosen by auto from a size of 268,435,456 on, or by name",
    )
    assert row("triton", "backends of contrastive_loss") == ("yes", "")


def test_doctor_and_report_print_the_same_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    doctor = capsys.readouterr().out
    scf.env.report()
    assert capsys.readouterr().out == doctor
    for op in dispatch.BACKENDS:
        assert f"backends of {op}" in doctor


def test_import_is_light() -> None:
    """The package imports nothing heavy, and the losses import neither the trainer nor DALI."""
    code = """
import sys, scenarioclip_fast
heavy = {"torch", "triton", "nvidia", "transformers", "matplotlib"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import scenarioclip_fast.losses
heavy = {"triton", "nvidia.dali", "transformers", "matplotlib", "scenarioclip_fast.train", "scenarioclip_fast.data"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
