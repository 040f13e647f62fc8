"""README's tables say what the records say, and nothing that they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenarioclip_fast.benchmarks import readme

from scenarioclip_fast.bench.record import FILE, Part, Record, Result


def record(name: str, started: str, theirs: float, ours: float | None, kind: str = "cpu") -> Record:
    results = [Result("t", "views, 480 px", "step by step", [theirs], extra={"views": 2})]
    if ours is not None:
        results.append(Result("o", "views, 480 px", "ours: cpu", [ours], extra={"views": 4}))
    part = Part("views", "pytest", "c", started, 1.0, 0, {}, {}, results)
    return Record({"device": f"machine {name}", "kind": kind, "versions": {}}, [part], name)


CLAIM = readme.Claim("a view", "views, *", "step by step", "Pillow", "ours: cpu", 4)


def test_readme_is_in_step_with_the_records() -> None:
    for path, text in readme.rendered().items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is out of step: run python benchmarks/readme.py"


def test_the_newest_record_with_both_sides_counts() -> None:
    records = [
        record("old", "2026-01-01T08:00:00", 1.0, 1.0),
        record("new", "2026-01-01T09:00:00", 4.0, 1.0),
        record("half", "2026-01-02T00:00:00", 9.0, None),
    ]
    found = readme.find(CLAIM, records)
    assert found is not None and found.record.name == "new"
    assert found.ratio == 8.0  # 2 s a view against a quarter
    assert readme.rows([CLAIM], records)[-1] == "| a view | Pillow | 2 s | 250 ms | **8.00 x** |"


def test_what_no_record_has() -> None:
    row = "| a view | Pillow | not yet measured | not yet measured |  |"
    assert readme.rows([CLAIM], [record("half", "2026-01-02", 9.0, None)])[-1] == row
    text = readme.benchmarks([])
    assert text.count("Not yet measured.") == 2 and " x**" not in text
    # What was measured on a CPU says nothing of a GPU.
    gpu = readme.benchmarks([record("here", "2026-01-01", 1.0, 1.0)]).partition("**GPU**")[2]
    assert gpu and " x**" not in gpu


def test_a_missed_target_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "CPU", [CLAIM])
    record("x", "2026-01-01T09:00:00", 1.0, 1.0).write(tmp_path)
    (tmp_path / "sections.csv").write_text("section,result,seconds\nbuild,passed,61\n")
    text = readme.record_readme(tmp_path)
    assert "| a view | Pillow | at least 4 x | 2.00 x (500 ms, ours 250 ms) | **missed** |" in text
    assert "| build | passed | 61 |" in text
    # Words around the markers stay.
    (tmp_path / "README.md").write_text(text + "\nA second core was busy.\n")
    record("x", "2026-01-01T10:00:00", 4.0, 1.0).write(tmp_path)
    (tmp_path / "sections.csv").write_text("section,result,seconds\nbuild,passed,61\nbench_x,timed out,9\n")
    again = readme.record_readme(tmp_path)
    assert "| build | passed | 61 |\n| bench_x | timed out | 9 |\n<!-- end" in again
    assert "| 8.00 x (2 s, ours 250 ms) | met |" in again and again.endswith("A second core was busy.\n")
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(SystemExit, match="no markers <!-- generated: asked and measured -->"):
        readme.record_readme(tmp_path)


def test_what_is_asked_of_a_gpu_names_what_is_measured() -> None:
    """Groups and forms as the benchmarks write them, so that the first record of a GPU has a verdict on each."""
    from scenarioclip_fast.benchmarks import bench_contrastive, bench_end_to_end, bench_step

    groups = [f"contrastive, forward + backward, {n} x {n} x 512, cuda" for n in bench_contrastive.ROWS["cuda"]]
    groups += [f"contrastive, forward + backward, levels of {bench_contrastive.LEVELS} rows, width 512, cuda"]
    groups += ["training step, vit-b-32, 128 scenes (random pixels), cuda", "end to end, whole loop, vit-b-32, x, cuda"]
    forms = {*bench_contrastive.FORMS, "four bare products", *bench_step.GPU_FORMS}
    forms |= {*bench_end_to_end.FORMS["vit-b-32 on a GPU"]}
    results = [Result("t", group, form, [1.0], extra={"scenes": 1}) for group in groups for form in forms]
    part = Part("all", "pytest", "c", "2026-01-01T08:00:00", 1.0, 0, {}, {}, results)
    record = Record({"device": "a GPU", "kind": "cuda", "versions": {}}, [part], "here")
    asked = [claim for claim in [*readme.GPU, *readme.GPU_ASKED] if claim.asked is not None]
    assert len(asked) == 9
    for claim in asked:
        assert readme.find(claim, [record]) is not None, claim
    assert readme.asked_and_measured(record).count("**missed**") == 7  # as fast as four products is enough


def test_every_committed_record_is_whole() -> None:
    for path in readme.RECORDS.glob(f"*/{FILE}"):
        found = readme.read_record(path)
        assert list(found.results()) and all(r.samples for r in found.results())
        assert not any(part.failed for part in found.parts)
