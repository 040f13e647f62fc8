"""The generated tables and the chart show what the records hold, and nothing else."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from scenarioclip_fast.benchmarks import readme

from scenarioclip_fast.bench.record import FILE, Part, Record, Result
from scenarioclip_fast.dispatch import BACKENDS


def record(name: str, started: str, theirs: float, ours: float | None, kind: str = "cpu") -> Record:
    results = [Result("t", "views, 480 px", "step by step", [theirs], extra={"views": 2})]
    if ours is not None:
        results.append(Result("o", "views, 480 px", "ours: cpu", [ours], extra={"views": 4}))
    part = Part("views", "pytest", "c", started, 1.0, 0, {}, {}, results)
    return Record({"device": f"machine {name}", "kind": kind, "versions": {}}, [part], name)


CLAIM = readme.Claim("a view", "views, *", "step by step", "Pillow", "ours: cpu", 4)


def test_generated_text_is_up_to_date() -> None:
    for path, text in readme.rendered().items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is out of date: run python benchmarks/readme.py"


def test_newest_record_with_both_sides_is_used() -> None:
    records = [
        record("old", "2026-01-01T08:00:00", 1.0, 1.0),
        record("new", "2026-01-01T09:00:00", 4.0, 1.0),
        record("half", "2026-01-02T00:00:00", 9.0, None),
    ]
    found = readme.find(CLAIM, records)
    assert found is not None and found.record.name == "new"
    assert found.ratio == 8.0  # 2 s a view against a quarter
    assert readme.rows([CLAIM], records)[-1] == "| a view | Pillow | 2 s | 250 ms | **8.00 x** |"


def test_unmeasured_claims_are_omitted() -> None:
    assert len(readme.rows([CLAIM], [record("half", "2026-01-02", 9.0, None)])) == 2  # the head alone
    assert readme.tables([]) == "Nothing has been measured yet."
    measured = [readme.read_record(path) for path in readme.RECORDS.glob(f"*/{FILE}")]
    assert "GPU" not in readme.tables([record for record in measured if record.kind == "cpu"])


def test_a_claim_as_launched_counts_the_hosts_time() -> None:
    """A baseline of a thousand launches is bound by its host: comparing it with a kernel's time would be unfair."""
    measured = [readme.read_record(path) for path in readme.RECORDS.glob(f"*/{FILE}")]
    claims = [claim for claim in readme.GPU if claim.as_launched]
    found = [readme.find(claim, measured) for claim in claims]
    assert found
    for each in found:
        assert each is not None
        launched = [result.extra["as launched, ms"] for result in (each.baseline, each.ours)]
        assert each.ratio == pytest.approx(launched[0] / launched[1])


def test_chart_has_a_bar_per_measured_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "CHART", [CLAIM, readme.Claim("absent", "no group", "a", "a", "b")])
    svg = readme.chart([record("new", "2026-01-01T09:00:00", 4.0, 1.0)])
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")]
    assert "a view" in texts and "8.00 x" in texts and "absent" not in texts


def test_every_bar_of_the_chart_is_measured() -> None:
    records = [readme.read_record(path) for path in readme.RECORDS.glob(f"*/{FILE}")]
    assert all(readme.find(claim, records) is not None for claim in readme.CHART)


def test_missed_target_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "CPU", [CLAIM])
    record("x", "2026-01-01T09:00:00", 1.0, 1.0).write(tmp_path)
    (tmp_path / "sections.csv").write_text("section,result,seconds\nbuild,passed,61\n")
    text = readme.record_readme(tmp_path)
    assert "| a view | Pillow | at least 4 x | 2.00 x (500 ms, this package 250 ms) | **missed** |" in text
    assert "| build | passed | 61 |" in text
    # Text around the markers is kept.
    (tmp_path / "README.md").write_text(text + "\nA second core was busy.\n")
    record("x", "2026-01-01T10:00:00", 4.0, 1.0).write(tmp_path)
    (tmp_path / "sections.csv").write_text("section,result,seconds\nbuild,passed,61\nbench_x,timed out,9\n")
    again = readme.record_readme(tmp_path)
    assert "| build | passed | 61 |\n| bench_x | timed out | 9 |\n<!-- end" in again
    assert "| 8.00 x (2 s, this package 250 ms) | met |" in again and again.endswith("A second core was busy.\n")
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(SystemExit, match="no markers <!-- generated: targets and results -->"):
        readme.record_readme(tmp_path)


def test_gpu_targets_name_existing_benchmark_groups() -> None:
    """With groups and forms as the benchmarks write them, the first GPU record decides every target."""
    from scenarioclip_fast.benchmarks import bench_contrastive, bench_end_to_end, bench_step

    groups = [f"contrastive, forward + backward, {n} x {n} x 512, cuda" for n in bench_contrastive.ROWS["cuda"]]
    groups += [f"contrastive, forward + backward, levels of {bench_contrastive.LEVELS} rows, width 512, cuda"]
    groups += ["training step, vit-b-32, 128 scenes (random pixels), cuda", "end to end, whole loop, vit-b-32, x, cuda"]
    forms = {*bench_contrastive.FORMS, "four bare products", *bench_step.GPU_FORMS}
    forms |= {*bench_end_to_end.FORMS["vit-b-32 on a GPU"]}
    results = [Result("t", group, form, [1.0], extra={"scenes": 1}) for group in groups for form in forms]
    part = Part("all", "pytest", "c", "2026-01-01T08:00:00", 1.0, 0, {}, {}, results)
    record = Record({"device": "a GPU", "kind": "cuda", "versions": {}}, [part], "here")
    targets = [claim for claim in [*readme.GPU, *readme.GPU_TARGETS] if claim.target is not None]
    assert len(targets) == 9
    for claim in targets:
        assert readme.find(claim, [record]) is not None, claim
    assert readme.targets_and_results(record).count("**missed**") == 7  # as fast as four products is enough


def test_contrastive_claims_name_what_auto_takes() -> None:
    """The largest levels have the form of the first backend, the small ones that of the first without a least size."""
    backends = BACKENDS["contrastive_loss"]
    large, small = next(iter(backends)), next(name for name, b in backends.items() if not b.automatic_from)
    assert backends[large].automatic_from <= 32768**2
    claims = [c for c in [*readme.GPU, *readme.GPU_TARGETS] if c.group.startswith("contrastive")]
    assert {(c.ours, "levels" in c.group) for c in claims} == {(f"ours: {large}", False), (f"ours: {small}", True)}


def test_committed_records_are_complete() -> None:
    for path in readme.RECORDS.glob(f"*/{FILE}"):
        found = readme.read_record(path)
        assert list(found.results()) and all(r.samples for r in found.results())
        assert not any(part.failed for part in found.parts)
