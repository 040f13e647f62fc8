"""The stage `ground`."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_detectors
import torch
from generate_works import SIZES, caption, make_works, run
from tiny_detectors import one_thread  # noqa: F401

from scenarioclip_fast.errors import MissingDependencyError, UserError
from scenarioclip_fast.generate.config import GenerateConfig
from scenarioclip_fast.generate.ground.boxes import Box
from scenarioclip_fast.generate.ground.stage import Detector, GroundStage, make


class Fixed:
    """A detector that finds a box with the first name, or what `answer` returns."""

    calls: list[list[tuple[int, ...]]]
    answer: Any = None

    def __init__(self, config: Any, device: torch.device) -> None:
        assert device.type == "cpu"
        self.config = config
        type(self).calls = []

    def detect(self, images: Sequence[torch.Tensor], names: Sequence[Sequence[str]]) -> list[list[Box]]:
        self.calls.append([tuple(image.shape) for image in images])
        assert all(image.dtype == torch.uint8 and image.shape[2] == 3 for image in images)
        if type(self).answer is not None:
            found: list[list[Box]] = type(self).answer(images, names)
            return found
        return [[Box(asked[0], (1.0, 2.0, 30.0, 40.0), 0.5)] for asked in names]


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> type[Fixed]:
    """The class `Fixed`, and a module of that name."""
    monkeypatch.setattr(Fixed, "answer", None)
    monkeypatch.setitem(sys.modules, "fixed_detector", sys.modules[__name__])
    return Fixed


def stage(model: str = "fixed_detector:Fixed", device: str = "cpu", **options: Any) -> GroundStage:
    return make(GenerateConfig.of({"ground": {"model": model, **options}}), device)


def test_images_without_names_are_rejected_unread(tmp_path: Path, fixed: type[Fixed]) -> None:
    works = make_works(tmp_path, [caption(), caption("dog", relations=False), caption(" "), caption("dog", "dog")])
    for work in works[:3]:
        Path(work.item.path).unlink()
    found = run(stage(), works)
    reasons = [found[work.key].reason for work in works]
    assert reasons == ["no_objects", "no_relations", "no_objects", ""]
    assert found["image3"].result == {"objects": [{"name": "dog", "box": [1.0, 2.0, 30.0, 40.0], "score": 0.5}]}


def test_unreadable_images_are_rejected(tmp_path: Path, fixed: type[Fixed]) -> None:
    works = make_works(tmp_path, [caption("dog")] * 3)
    Path(works[0].item.path).unlink()
    data = bytearray(Path(works[1].item.path).read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    Path(works[1].item.path).write_bytes(data)
    found = run(stage(), works)
    assert [found[work.key].reason for work in works][::2] == ["image_changed", ""]
    assert found["image1"].reason.startswith("image_") and found["image0"].retry


def test_boxes_without_an_asked_name_are_listed(tmp_path: Path, fixed: type[Fixed]) -> None:
    fixed.answer = lambda images, names: [
        [
            Box("dog", (0, 0, 50, 50), 0.5),
            Box("dog", (0, 1, 50, 50), 0.9),  # overlaps
            Box("unicorn", (0, 0, 50, 50), 0.99),
            Box("unicorn", (0, 0, 20, 50), 0.99),
            Box("", (0, 0, 20, 20), 0.5),
            Box("cat", (70, 70, 90, 90), 0.2),  # below the threshold
        ]
        for _ in images
    ]
    outcome = run(stage(), make_works(tmp_path, [caption("dog", "cat")]))["image0"]
    detail = "the detector's phrase is none of the names that were asked for"
    assert outcome.result == {
        "objects": [{"name": "dog", "box": [0.0, 1.0, 50.0, 50.0], "score": 0.9}],
        "rejected": [
            {"part": "1 box ()", "reason": "unnamed", "detail": detail},
            {"part": "2 boxes (unicorn)", "reason": "unnamed", "detail": detail},
        ],
    }
    fixed.answer = lambda images, names: [[Box("unicorn", (0, 0, 50, 50), 0.99)] for _ in images]
    outcome = run(stage(), make_works(tmp_path, [caption("dog", "cat")]))["image0"]
    assert (outcome.reason, outcome.detail) == (
        "no_boxes",
        "asked for 'dog, cat', threshold 0.25; without a name: 1 box",
    )


def test_images_of_one_size_share_batches(tmp_path: Path, fixed: type[Fixed]) -> None:
    works = make_works(tmp_path, [caption("dog")] * len(SIZES))
    tested = stage(batch_size=3)
    run(tested, works)
    assert fixed.calls == [[(96, 128, 3)] * 3, [(64, 64, 3)] * 2 + [(120, 90, 3)], [(200, 4, 3), (70, 128, 3)]]
    assert tested.counts == {"boxes": len(SIZES)}


def test_inversion(tmp_path: Path, fixed: type[Fixed]) -> None:
    seen: list[torch.Tensor] = []

    def answer(images: Sequence[torch.Tensor], names: Any) -> list[list[Box]]:
        seen.extend(images)
        return [[] for _ in images]

    fixed.answer = answer
    for invert in (False, True):
        run(stage(invert=invert), make_works(tmp_path, [caption("dog")]))
    assert seen[1].dtype == torch.uint8 and torch.equal(seen[0] + seen[1], torch.full_like(seen[0], 255))


def test_batches_are_halved_when_the_memory_is_exhausted(
    tmp_path: Path, fixed: type[Fixed], caplog: pytest.LogCaptureFixture
) -> None:
    def answer(images: Sequence[Any], names: Any) -> list[list[Box]]:
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [[Box(asked[0], (1.0, 2.0, 30.0, 40.0), 0.5)] for asked in names]

    most = 2
    fixed.answer = answer
    works = make_works(tmp_path, [caption("dog")] * 8, [(40, 40)] * 8)
    assert not any(outcome.reason for outcome in run(stage(batch_size=8), works).values())
    assert [len(call) for call in fixed.calls] == [8, 4, 2, 2, 2, 2]
    assert "ground.batch_size: 4 do not fit into the memory; continuing with 2" in caplog.text
    most = 0
    with pytest.raises(UserError, match="does not fit into the memory with one image of 40 x 40; choose a smaller"):
        run(stage(batch_size=8), works)


def scored(score: float, corners: Any = (1, 2, 3, 4)) -> list[list[Box]]:
    return [[Box("dog", corners, score)]] * 2


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda images, names: [], "detect returned 0 lists for 2 images, expected one list of boxes per image"),
        (lambda images, names: 3, "detect returned 3 for 2 images"),
        (lambda images, names: [[("dog", (1, 2, 3), 0.5)]] * 2, r"expected Box\(name, \(x1, y1, x2, y2\), score\)"),
        (lambda images, names: [[("dog", (1, 2, 3, 4))]] * 2, "expected Box"),
        (lambda images, names: [[(7, (1, 2, 3, 4), 0.5)]] * 2, "the name is 7"),
        (lambda images, names: [None] * 2, "expected Box"),
        (lambda images, names: scored(1.5), "got a score of 1.5, expected 0 to 1"),
        (lambda images, names: scored(-0.1), "got a score of -0.1, expected 0 to 1"),
        (lambda images, names: scored(math.nan), "got a score of nan, expected 0 to 1"),
        (lambda images, names: scored(0.5, (1, 2, math.inf, 4)), r"corners of 'dog' are \[1.0, 2.0, inf, 4.0\]"),
    ],
)
def test_wrong_results_of_a_detector(tmp_path: Path, fixed: type[Fixed], answer: Any, text: str) -> None:
    fixed.answer = answer
    with pytest.raises(UserError, match=text) as caught:
        run(stage(), make_works(tmp_path, [caption("dog")] * 2))
    assert str(caught.value).startswith("ground.model: fixed_detector:Fixed")


def test_scores_a_rounding_above_1_are_1(tmp_path: Path, fixed: type[Fixed]) -> None:
    fixed.answer = lambda images, names: [[Box("dog", (1, 2, 30, 40), 1 + 1e-6)]]  # a softmax in float32
    assert run(stage(), make_works(tmp_path, [caption("dog")]))["image0"].result["objects"][0]["score"] == 1


def fails(*_: Any) -> Any:
    raise RuntimeError("mat1 and mat2\n shapes \x1b[2J")


@pytest.mark.parametrize("where", ["answer", "__init__"])
def test_a_detector_that_raises(
    tmp_path: Path, fixed: type[Fixed], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fixed, where, fails)
    with pytest.raises(UserError) as caught:
        run(stage(), make_works(tmp_path, [caption("dog")]))
    what = "detect" if where == "answer" else "its constructor"
    text = f"{what} raised RuntimeError: mat1 and mat2 shapes \\x1b[2J (test_ground.py, line "
    assert str(caught.value).startswith(f"ground.model: fixed_detector:Fixed: {text}") and "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError) and "traceback" in str(caught.value)


def test_a_detector_that_does_not_fit_into_the_memory(
    tmp_path: Path, fixed: type[Fixed], monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fixed, "__init__", large)
    with pytest.raises(UserError, match=r"ground.model: fixed_detector:Fixed does not fit into the memory of cpu"):
        run(stage(), make_works(tmp_path, [caption("dog")]))


def test_a_detector_may_be_false(tmp_path: Path, fixed: type[Fixed], monkeypatch: pytest.MonkeyPatch) -> None:
    """As one with a length of 0 is."""
    monkeypatch.setattr(fixed, "__len__", lambda self: 0, raising=False)
    assert not run(stage(), make_works(tmp_path, [caption("dog")]))["image0"].reason


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("no_such_module:Class", "ground.model: cannot import no_such_module:Class"),
        ("fixed_detector:nothing", "ground.model: cannot import fixed_detector:nothing"),
        ("collections:Counter", "ground.model: collections:Counter has no method detect"),
        ("json:dumps", "ground.model: json:dumps is no class with a method detect"),
    ],
)
def test_classes_that_are_no_detectors(tmp_path: Path, fixed: type[Fixed], model: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        run(stage(model), make_works(tmp_path, [caption("dog")]))


def test_no_such_device(tmp_path: Path, fixed: type[Fixed]) -> None:
    with pytest.raises(UserError, match="device: got 'cuda:99'"):
        run(stage(device="cuda:99"), make_works(tmp_path, [caption("dog")]))


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"transformers .*pip install 'scenarioclip-fast\[generate\]'"):
        run(stage("some/model"), make_works(tmp_path, [caption("dog")]))


def test_abandoned_runs_stop_their_threads(tmp_path: Path, fixed: type[Fixed]) -> None:
    import threading

    before = set(threading.enumerate())
    outcomes = stage(batch_size=1).run(iter(make_works(tmp_path, [caption("dog")] * 8)))
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before


def test_with_a_checkpoint(tmp_path: Path) -> None:
    """The whole stage: the same records, whatever the batch size."""
    path = tiny_detectors.grounding_dino(tmp_path / "dino")
    works = make_works(tmp_path / "images", [caption("a red ball", "dog"), caption("ball")] * 4)
    found = []
    for size in (1, 3, 8):
        tested = pickle.loads(pickle.dumps(stage(str(path), batch_size=size, box_threshold=0.1)))
        found.append(run(tested, works))
        assert tested.counts["boxes"] == sum(len(o.result.get("objects", ())) for o in found[-1].values())
    assert sum(outcome.reason == "" for outcome in found[0].values()) >= 7
    for key, outcome in found[0].items():
        for other in found[1:]:
            assert other[key].reason == outcome.reason
            got, expected = other[key].result.get("objects", []), outcome.result.get("objects", [])
            assert [o["name"] for o in got] == [o["name"] for o in expected]
            for a, b in zip(got, expected, strict=True):
                # Float32 sums of another order differ by less than 0.01 and 1e-4, to which records are rounded.
                assert a["box"] == pytest.approx(b["box"], abs=0.011)
                assert a["score"] == pytest.approx(b["score"], abs=1.1e-4)
                width, height = SIZES[int(key[-1])][::-1]
                assert 0 <= a["box"][0] < a["box"][2] <= width and 0 <= a["box"][1] < a["box"][3] <= height


def test_the_protocol_is_met() -> None:
    """mypy checks the signatures of the assignments."""
    from scenarioclip_fast.generate.ground.transformers_detector import TransformersDetector

    detectors: list[type[Detector]] = [Fixed, TransformersDetector]
    assert all(hasattr(one, "detect") for one in detectors)
