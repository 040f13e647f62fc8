"""The compiled extensions: the reason why a library does not load, and that every backend is usable on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from scenarioclip_fast import dispatch, native


def test_the_reason_includes_the_loaders_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libscenarioclip_fast_cpu.so").write_text("not a library")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "build_info", lambda: {"built": ["cpu"], "left_out": {}, "march": ""})
    reason = native.unavailable_reason.__wrapped__("cpu")
    assert reason is not None and "file too short" in reason and "reinstall" in reason


@pytest.mark.parametrize(
    ("built", "reason"),
    [
        (["cpu", "cuda"], "the part of the cuda library for compute capability 9.0 was not built: no headers"),
        (["cpu"], "the cuda library was not built: no nvcc"),
    ],
)
def test_part_for_hopper(built: list[str], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = {"hopper": "no headers", "cuda": "no nvcc"}
    monkeypatch.setattr(native, "build_info", lambda: {"built": built, "left_out": left_out, "march": ""})
    monkeypatch.setattr(native, "unavailable_reason", native.unavailable_reason.__wrapped__)
    assert native.unavailable_reason("hopper") == reason


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, name) for op, backends in dispatch.BACKENDS.items() for name in backends if name in ("cuda", "triton")],
)
def test_every_backend_is_usable_on_a_gpu(op: str, backend: str) -> None:
    """The tests of an unusable backend are skipped, so this one must fail."""
    assert dispatch.unavailable_reason(op, backend, "cuda") is None
