"""tune_views.py: groups of kernels, comparison with the predictions, and the error without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from scenarioclip_fast.benchmarks import tune_views

ROOT = Path(__file__).resolve().parents[2]


def kernels() -> list[str]:
    """The names of all kernels in views.cu."""
    source = (ROOT / "kernels" / "views" / "views.cu").read_text()
    return re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(", source)


def traced(name: str) -> list[str]:
    """The kernel's names in a trace, with argument types that must not matter."""
    arguments = "(scf::(anonymous namespace)::MaskJob const*, scf::(anonymous namespace)::BlurWeights, unsigned char*)"
    templated = f"void scf::(anonymous namespace)::{name}<__nv_bfloat16>{arguments}"
    return [f"scf::(anonymous namespace)::{name}{arguments}", templated]


def test_every_kernel_has_a_group() -> None:
    names = kernels()
    source = (ROOT / "kernels" / "views" / "views.cu").read_text()
    assert len(names) == len(re.findall(r"^__global__ ", source, re.MULTILINE)) > 0
    for name in names:
        groups = {tune_views.group_of(text) for text in traced(name)}
        assert len(groups) == 1 and tune_views.REST not in groups, f"{name}: {groups}: add it to GROUPS"
    seen = {tune_views.group_of(text) for name in names for text in traced(name)}
    assert set(tune_views.KERNEL_MS) <= seen, "a prediction without a kernel"


def test_groups() -> None:
    assert tune_views.group_of("Memcpy HtoD (Pinned -> Device)") == "copies"
    assert tune_views.group_of("Memset (Device)") == "copies"
    other = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<unsigned char>>(int)"
    assert tune_views.group_of(other) == tune_views.REST
    assert [tune_views.group_of(traced(name)[0]) for name in ("blur_images", "resize_down")] == ["blur", "down"]


def test_trace_compared_with_predictions() -> None:
    trace = [(traced("resize_down")[1], 0.5), (traced("blur_images")[0], 1.0), (traced("blur_images")[0], 2.0)]
    blur, down, whole = tune_views.by_group([*trace], views=640)
    assert (blur["kernels"], blur["launches"], blur["ms"]) == ("blur", 2, 3.0)
    assert (blur["predicted ms"], blur["measured/predicted"]) == (1.0, 3.0)  # half of the 1,280 views, half of 2 ms
    assert (down["launches"], down["measured/predicted"]) == (1, round(0.5 / 0.525, 2))
    assert (whole["launches"], whole["ms"], whole["predicted ms"]) == (3, 3.5, 3.0)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tune_views, "REHEARSAL", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune_views.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "error: torch sees no GPU: there is nothing to tune\n"
