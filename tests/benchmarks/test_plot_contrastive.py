"""The plot of the contrastive benchmark, from a record."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from scenarioclip_fast.benchmarks import bench_contrastive, plot_contrastive

from scenarioclip_fast.bench.record import Part, Record, Result


def record(*results: Result) -> Record:
    part = Part("contrastive", "pytest", "c", "2026-01-01", 1.0, 0, {}, {}, list(results))
    return Record({"device": "here", "kind": "cuda", "versions": {}}, [part])


def result(form: str, rows: int, samples: list[float], phase: str = "forward + backward") -> Result:
    return Result("t", "g", form, samples, extra={"phase": phase, "rows": rows, "width": 512, "device": "cuda"})


@pytest.mark.parametrize("sizes", [(128, 4096), (4096,)])  # the second has no launch-bound sizes
def test_record_becomes_a_plot(sizes: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        *(result("ours: triton", n, [0.003, 0.002]) for n in sizes),
        result("logits.T compiled", sizes[0], [0.004]),
        result("four bare products", 4096, [0.001]),
        result("inf_cl", 1178, [0.01], "levels"),
    ]
    plotted = plot_contrastive.series(results, "forward + backward", "cuda", 512)
    assert plotted["ours: triton"] == dict.fromkeys(sizes, 2.0)
    record(*results).write(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot_contrastive.py", str(tmp_path), str(tmp_path / "out.png")])
    plot_contrastive.main()
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_every_form_has_its_own_style() -> None:
    styles = {form: plot_contrastive.style(form) for form in (*bench_contrastive.FORMS, bench_contrastive.FOUR)}
    ours = ("ours: triton", "ours: cpu")  # never in the same plot
    assert all(styles[a] != styles[b] for a in styles for b in styles if a != b and {a, b} != {*ours})


@pytest.mark.parametrize("exists", [False, True])
def test_unusable_record_is_an_error(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if exists:
        record().write(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot_contrastive.py", str(tmp_path), "out.png"])
    with pytest.raises(SystemExit):
        plot_contrastive.main()
    expected = "no run of bench_contrastive.py in this record" if exists else "no record here"
    assert expected in capsys.readouterr().err
