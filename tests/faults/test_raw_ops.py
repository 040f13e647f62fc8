"""Ops called directly with anything raise a clear error; they neither crash nor read or write out of bounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from campaign import SEED, trials
from scenarioclip_fast.kernels.views import reference
from torch import Tensor

from scenarioclip_fast import native
from scenarioclip_fast.ops.view_batch import ViewBatch
from scenarioclip_fast.ops.views import focused_region, lower_views, render_views

if TYPE_CHECKING:
    from conftest import HostCompiler

ROOT = Path(__file__).parents[2]
FAST = pytest.param("cpu", marks=pytest.mark.skipif(native.unavailable_reason("cpu") is not None, reason="not built"))
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
# Of falloffs: the squares underflow or overflow in float32, or in float64 as well.
SIGMAS = (5e-324, 1e-200, 1e-45, 1e-30, 1e-3, 1e4, 1e30, 1e200)


def test_hostile_calls_raise_clear_errors() -> None:
    for part in ("cpu", "host"):
        if reason := native.unavailable_reason(part):
            pytest.skip(reason)
    command = [sys.executable, ROOT / "tests" / "support" / "hostile.py", str(SEED), str(trials(600, 100_000))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *failures, summary = (json.loads(line) for line in done.stdout.splitlines())
    assert failures == [], summary
    assert summary["certain"] > 1300 and summary["ops"] >= 28  # as of writing: no op is left out


def test_a_crash_of_a_call_is_counted() -> None:
    """The campaign itself: a fenced tensor ends where memory ends, and a crash or hang ends only its fork."""
    code = """
import ctypes, os, time, torch, hostile
hostile.SECONDS = 1
end = lambda x: x.data_ptr() + x.nbytes
x = hostile.fenced(torch.ones(3, 5))
assert x.equal(torch.ones(3, 5))
read = lambda address: ctypes.string_at(address, 1)
bodies = [lambda: None, lambda: read(end(x)), lambda: time.sleep(9), lambda: read(end(x) - 1)]
hostile.call = lambda name, arguments: bodies[int(name)]()
calls = [hostile.Call(str(k), "", dict, False) for k in (0, 1, 2, 3)] + [hostile.Call("0", "", dict, True)]
assert list(hostile.outcomes(calls)) == ["", "crashes with SIGSEGV", "hangs for 1 s", "", "raises no error"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests" / "support")
    assert done.returncode == 0, done.stderr


def scene(backend: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """An image [23, 31, 3] and two masks that overlap."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (23, 31, 3), generator=g, dtype=torch.uint8)
    masks = torch.rand(2, 23, 31, generator=g) < torch.tensor([0.3, 0.6])[:, None, None]
    return tuple(t.to(backend if backend == "cuda" else "cpu") for t in (image, *masks))  # type: ignore[return-value]


def with_bytes(mask: Tensor, seed: int) -> Tensor:
    """The same mask with any bytes but 0 where it is true."""
    g = torch.Generator().manual_seed(seed)
    high = torch.randint(1, 256, mask.shape, generator=g, dtype=torch.uint8).to(mask.device)
    return torch.where(mask, high, 0).to(torch.uint8).view(torch.bool)


@pytest.mark.parametrize("backend", ["reference", FAST, GPU])
def test_masks_with_any_bytes_are_masks(backend: str) -> None:
    for seed in range(trials(3, 100)):
        image, *masks = scene(backend, seed)
        odd = [with_bytes(mask, seed + k) for k, mask in enumerate(masks)]
        assert int(odd[0].view(torch.uint8).max()) > 1
        for blur in ("rgb", "reference"):
            expected = focused_region(image, *masks, sigma=5.0, blur=blur, backend=backend)
            assert torch.equal(focused_region(image, *odd, sigma=5.0, blur=blur, backend=backend), expected)
            same = focused_region(image, odd[0].T.contiguous().T, odd[1], sigma=5.0, blur=blur, backend=backend)
            assert torch.equal(same, expected)


def one_relation(first: Tensor, second: Tensor) -> ViewBatch:  # [H, W] bool each
    height, width = first.shape
    runs = []
    for mask in (first, second):
        flat = np.concatenate([[False], mask.cpu().numpy().T.ravel(), [False]])
        edges = np.flatnonzero(flat[1:] != flat[:-1])
        runs.append(np.diff(np.concatenate([[0], edges, [height * width]])))
    fields: dict[str, Any] = {
        "kind": torch.tensor([reference.RELATION], dtype=torch.int32), "image": torch.tensor([0]),
        "source": torch.tensor([[0, 0, width, height]], dtype=torch.int32), "stretch": torch.tensor([True]),
        "box": torch.zeros(1, 4, dtype=torch.float64), "mask": torch.tensor([[0, 1]]),
        "augment": torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]]),
        "mask_runs": torch.from_numpy(np.concatenate(runs)).int(),
        "mask_start": torch.tensor([0, len(runs[0]), len(runs[0]) + len(runs[1])]),
        "mask_size": torch.tensor([[height, width]] * 2, dtype=torch.int32),
    }  # fmt: skip
    return ViewBatch(**fields)


@pytest.mark.parametrize("byte", [2, 128, 255])
def test_stretch_with_any_byte_is_stretch(byte: int) -> None:
    image, *masks = scene("cpu")
    views = one_relation(*masks)
    expected = lower_views([image], views.tensors, 16)[0]
    views.stretch.view(torch.uint8).fill_(byte)
    assert torch.equal(lower_views([image], views.tensors, 16)[0], expected)


def exact_region(image: Tensor, masks: list[Tensor], sigma: float) -> Tensor:
    """The definition, in float64 without squares of sigma; the background is black."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    distance, falloff = [], []
    for mask in masks:
        inside = mask.cpu().numpy()
        distance.append(np.hypot(y - y[inside].mean(), x - x[inside].mean()))
        with np.errstate(over="ignore"):
            falloff.append(np.exp(-0.5 * (distance[-1] / sigma) ** 2) * inside)
    total = np.maximum(distance[0] + distance[1], 1e-300)
    weight = (falloff[0] * distance[1] + falloff[1] * distance[0]) / total
    return torch.from_numpy(np.floor(image.cpu().numpy() * weight[..., None]).astype(np.uint8))


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("backend", ["reference", FAST, GPU])
def test_any_sigma_gives_the_weights_of_the_definition(backend: str, sigma: float) -> None:
    image, *masks = scene(backend)
    centred = torch.zeros_like(masks[0])
    centred[4:9, 6:13] = True  # a pixel is its exact centre, where the weight is 1 however small sigma is
    near = torch.zeros_like(centred)
    near[2:20, 3:28] = True  # the centre lies between pixels
    for pair in ([centred, near], [centred, masks[1]], [near, near]):
        inside = (pair[0] | pair[1]).cpu()
        expected = exact_region(image, pair, sigma)
        got = focused_region(image, *pair, sigma=sigma, backend=backend).cpu()
        # float32 weights: a product next to an integer may fall on its other side, as with weights just below 1.
        difference = (got.int() - expected.int()).abs()[inside]
        assert difference.max() <= 1 and (difference > 0).float().mean() <= (0.05 if sigma == 1e4 else 0.01)
        views = one_relation(*pair)
        view = render_views([image], views, size=16, sigma=sigma, backend=backend).cpu()
        whole = render_views([image.cpu()], views, size=16, sigma=sigma, backend="reference")
        assert view.isfinite().all()
        # A level of the source, through a bicubic filter that overshoots, and one of rounding, at the smallest std.
        assert (view - whole).abs().max() <= 3 / 255 / 0.26


def test_the_centre_of_a_large_mask_keeps_its_fraction() -> None:
    """1000 + 1/40400 is 1000 in float32, where a pixel at 1000 would get the whole weight of a tiny sigma."""
    image = torch.full((202, 1402, 3), 200, dtype=torch.uint8)
    mask = torch.zeros(202, 1402, dtype=torch.bool)
    mask[:201, 900:1101] = True  # centre (1000, 100)
    backends = ["reference"] if native.unavailable_reason("cpu") else ["reference", "cpu"]
    for backend in backends:
        assert focused_region(image, mask, mask, sigma=1e-30, backend=backend)[100, 1000, 0] == 200
    mask[100, 1101] = True
    for backend in backends:
        region = focused_region(image, mask, mask, sigma=1e-30, backend=backend)
        assert not region[mask].any()


PROGRAM = r"""
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "kernels/views/pixel.h"

int main() {
  for (const double sigma : {5e-324, 1e-200, 1e-45, 1e-30, 1e-3, 1.0, 100.0, 1e30, 1e200}) {
    const float falloff = scf::falloff_of(sigma);
    const scf::MaskSums sums[2] = {{3, 3 * 1000, 3 * 7}, {40401, 40400 * 1000 + 1100, 40401 * 100}};
    const scf::Centre first = scf::centre_of(sums[0]), second = scf::centre_of(sums[1]);
    for (const int x : {0, 999, 1000, 1001}) {
      for (const int y : {7, 100}) {
        const float px = static_cast<float>(x), py = static_cast<float>(y);
        const double dx = x - (40400 * 1000.0 + 1100) / 40401;
        const double d1 = std::hypot(x - 1000, y - 7), d2 = std::hypot(dx, y - 100);
        const double s1 = d1 / sigma, s2 = d2 / sigma, r1 = std::exp(-0.5 * s1 * s1), r2 = std::exp(-0.5 * s2 * s2);
        const double expected = (r1 * d2 + r2 * d1) / (d1 + d2);
        const float got = scf::region_weight(first.x.distance(px), first.y.distance(py), 1, second.x.distance(px),
                                             second.y.distance(py), 1, falloff);
        // Floats: a few roundings of 6e-8, and distances to a part in 10^5 of the smallest.
        if (!(std::abs(got - expected) <= 2e-5)) {
          std::printf("sigma %g at (%d, %d): got %.9g, expected %.9g\n", sigma, x, y, got, expected);
          return 1;
        }
      }
    }
  }
  return 0;
}
"""


def test_the_arithmetic_of_the_kernels_takes_any_sigma(host_compiler: HostCompiler, tmp_path: Path) -> None:
    """Of pixel.h, which the backends "cpu" and "cuda" share."""
    source = tmp_path / "sigma.cpp"
    source.write_text(PROGRAM)
    done = subprocess.run(
        [host_compiler(source, tmp_path / "sigma", ROOT)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("", 0)


def test_no_kernel_reads_a_byte_of_a_mask_as_bool() -> None:
    """As bool, a byte above 1 is undefined behaviour; the CUDA sources cannot run here."""
    sources = [p for p in (ROOT / "kernels").glob("**/*") if p.suffix in (".h", ".cpp", ".cu")]
    sources += (ROOT / "csrc").glob("**/*.*")
    assert len(sources) > 40
    assert [p.name for p in sources if "const bool*" in p.read_text() or "data_ptr<bool>" in p.read_text()] == []
