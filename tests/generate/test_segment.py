"""The stage `segment` and the segmenters of transformers, with tiny random checkpoints."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_detectors
import torch
from generate_works import SIZES, grounded, make_images, make_works, run
from tiny_detectors import one_thread  # noqa: F401

from scenarioclip_fast.data import rle
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.config import GenerateConfig, SegmentConfig
from scenarioclip_fast.generate.segment import transformers_segmenter
from scenarioclip_fast.generate.segment.stage import SegmentStage, make
from scenarioclip_fast.generate.segment.transformers_segmenter import TransformersSegmenter
from scenarioclip_fast.requirements import import_problem

CPU = torch.device("cpu")
BOXES = [
    [[1.0, 2.0, 30.0, 40.0], [50.0, 10.0, 100.0, 90.0]],
    [[5.0, 5.0, 60.0, 60.0]],
    [[1.0, 2.0, 30.0, 40.0], [0.0, 0.0, 128.0, 96.0], [60.0, 60.0, 70.0, 70.0]],
    [[10.0, 20.0, 70.0, 110.0]],
    [[0.0, 0.0, 64.0, 64.0], [20.0, 20.0, 40.0, 60.0]],
    [[100.0, 3.0, 120.0, 90.0]],
    [[0.0, 10.0, 4.0, 60.0]],
    [[3.0, 3.0, 120.0, 60.0]],
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("segmenters")
    return {"sam": tiny_detectors.sam(folder / "sam"), "sam2": tiny_detectors.sam2(folder / "sam2")}


@pytest.fixture(autouse=True)
def processor_of_sam2(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for SAM 2's processor, which needs torchvision."""
    import transformers as tf

    if "without" not in request.node.name:
        stand_in = classmethod(lambda cls, name: tiny_detectors.Sam2Images())
        monkeypatch.setattr(tf.Sam2Processor, "from_pretrained", stand_in)


def load(path: Path, **options: Any) -> TransformersSegmenter:
    return TransformersSegmenter(SegmentConfig(model=str(path), **options), CPU)


def assert_same_masks(got: Sequence[tuple[Any, float]], expected: Sequence[tuple[Any, float]]) -> None:
    for (mask, score), (other, expected_score) in zip(got, expected, strict=True):
        # Float32 sums of another order; the weights are 8 times those of the initialisation.
        assert score == pytest.approx(expected_score, abs=1e-4)
        # Logits that are 0 up to rounding may change sign.
        assert (rle.decode(mask) != rle.decode(other)).float().mean() < 1e-3


@pytest.mark.parametrize("step", [1, 1 << 25])
@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_masks_are_those_of_the_model(
    checkpoints: dict[str, Path], kind: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image by image, from the pixels, against the processor's coordinates and the best of the full-size masks."""
    import transformers as tf

    monkeypatch.setattr(transformers_segmenter, "_MASK_PIXELS", step)
    segmenter = load(checkpoints[kind])
    found = segmenter.segment(make_images(), BOXES)
    different = set()
    for image, boxes, masks in zip(make_images(), BOXES, found, strict=True):
        height, width = image.shape[:2]
        assert len(masks) == len(boxes)
        if height > 16 * width:
            assert all(mask is not None and mask["size"] == [height, width] for mask, _ in masks)
            continue
        if kind == "sam":
            processor = tf.SamProcessor.from_pretrained(checkpoints[kind])
            inputs = processor(images=image.numpy(), input_boxes=[boxes], return_tensors="pt")
            sizes = [inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")]
            inputs["input_boxes"] = inputs["input_boxes"].float()
        else:
            processor = tiny_detectors.Sam2Images()
            inputs = processor([image.numpy()], "channels_last", "pt")
            inputs["input_boxes"] = torch.tensor([boxes]) * torch.tensor([64 / width, 64 / height] * 2)
            sizes = [[(height, width)]]
        with torch.inference_mode():
            out = segmenter._model(**inputs)
        (full,) = processor.post_process_masks(out.pred_masks, *sizes)
        best = out.iou_scores[0].argmax(-1)
        different |= set(best.tolist())
        expected = [(rle.encode(full[i, k]), out.iou_scores[0, i, k].item()) for i, k in enumerate(best)]
        assert_same_masks(masks, expected)
    assert len(different) > 1 or kind == "sam2"  # the best mask is not always the first


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_masks_are_those_of_the_image(checkpoints: dict[str, Path], kind: str) -> None:
    """With these weights, masks depend on the image by far more than rounding, so that the other tests can tell."""
    first, _, other = make_images()[:3]
    found = load(checkpoints[kind]).segment([first, other], [BOXES[0]] * 2)
    for (a, _), (b, _) in zip(*found, strict=True):
        assert (rle.decode(a) != rle.decode(b)).float().mean() > 0.01


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_results_do_not_depend_on_the_batch(checkpoints: dict[str, Path], kind: str) -> None:
    alone = [load(checkpoints[kind]).segment([i], [b])[0] for i, b in zip(make_images(), BOXES, strict=True)]
    for size, boxes_per_batch in [(3, 64), (3, 2), (8, 5), (1, 1)]:
        segmenter = load(checkpoints[kind], boxes_per_batch=boxes_per_batch)
        for start in range(0, len(SIZES), size):
            part = slice(start, start + size)
            for got, expected in zip(segmenter.segment(make_images()[part], BOXES[part]), alone[part], strict=True):
                assert_same_masks(got, expected)


def test_images_are_encoded_once(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = load(checkpoints["sam"], boxes_per_batch=4)
    encoded, decoded = [], []
    encoder, decoder = segmenter._model.vision_encoder, segmenter._model.mask_decoder
    encoder.register_forward_hook(lambda module, args, out: encoded.append(len(args[0])))
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: decoded.append(len(kwargs["image_embeddings"])), with_kwargs=True
    )
    segmenter.segment(make_images(), BOXES)
    assert (encoded, decoded) == ([8], [4, 4, 4])  # 12 boxes of 8 images


def test_the_first_of_equal_masks_is_taken(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = load(checkpoints["sam"])
    scores = torch.tensor([[0.5, 0.7, 0.7], [math.nan, 0.1, 0.2], [math.nan] * 3])
    low = torch.arange(9.0).reshape(3, 1, 3, 1, 1).expand(3, 1, 3, 2, 2)
    out = type("Out", (), {"iou_scores": scores[:, None], "pred_masks": low})
    monkeypatch.setattr(segmenter, "_model", lambda **inputs: out)
    found = segmenter._decode(torch.zeros(1, 2, 2, 2), [(0, np.zeros(4))] * 3)
    assert [(mask.unique().item(), score) for mask, score in found] == [
        (1.0, pytest.approx(0.7)),
        (5.0, pytest.approx(0.2)),
        (6.0, -math.inf),
    ]


@pytest.mark.parametrize("kind", ["sam", "sam2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_precisions_run(checkpoints: dict[str, Path], kind: str, dtype: Any) -> None:
    segmenter = load(checkpoints[kind], dtype=dtype)
    assert segmenter._model.dtype == getattr(torch, dtype)
    assert [len(masks) for masks in segmenter.segment(make_images(), BOXES)] == [len(boxes) for boxes in BOXES]


class Fixed:
    """A segmenter that fills the boxes, or what `answer` returns."""

    answer: Any = None
    calls: list[int]

    def __init__(self, config: Any, device: torch.device) -> None:
        type(self).calls = []

    def segment(self, images: Sequence[torch.Tensor], boxes: Sequence[list[list[float]]]) -> Any:
        self.calls.append(len(images))
        return (
            [[filled(image, box) for box in each] for image, each in zip(images, boxes, strict=True)]
            if (type(self).answer is None)
            else type(self).answer(images, boxes)
        )


def filled(image: torch.Tensor, box: list[float]) -> tuple[dict[str, Any], float]:
    x1, y1, x2, y2 = map(int, box)
    mask = torch.zeros(image.shape[:2], dtype=torch.bool)
    mask[y1:y2, x1:x2] = True
    return rle.encode(mask), 0.987654321


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> type[Fixed]:
    """The class `Fixed`, and a module of that name."""
    monkeypatch.setattr(Fixed, "answer", None)
    monkeypatch.setitem(sys.modules, "fixed_segmenter", sys.modules[__name__])
    return Fixed


def stage(model: str = "fixed_segmenter:Fixed", **options: Any) -> SegmentStage:
    return make(GenerateConfig.of({"segment": {"model": model, **options}}), "cpu")


def test_masks_without_pixels_are_null(tmp_path: Path, fixed: type[Fixed]) -> None:
    works = make_works(tmp_path, [grounded((1, 2, 3, 5), (7, 7, 7, 9)), grounded((4, 4, 4, 4)), grounded()])
    tested = stage()
    found = run(tested, works)
    mask = {"size": [96, 128], "counts": found["image0"].result["objects"][0]["mask"]["counts"]}
    assert found["image0"].result == {"objects": [{"mask": mask, "score": 0.9877}, {"mask": None, "score": 0.9877}]}
    dense = torch.zeros(96, 128, dtype=torch.bool)
    dense[2:5, 1:3] = True
    assert torch.equal(rle.decode(mask), dense)
    assert [found[f"image{i}"].reason for i in range(3)] == ["", "no_masks", "no_objects"]
    assert tested.counts == {"masks": 1}


@pytest.mark.parametrize(("score", "kept"), [(math.nan, 0.0), (-math.inf, 0.0), (1.0312345, 1.0312)])
def test_scores_of_checkpoints(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: float, kept: float
) -> None:
    """SAM predicts IoUs above 1, and in half precision, what is no number."""
    answer = lambda self, images, boxes: [[(filled(images[0], boxes[0][0])[0], score)]]  # noqa: E731
    monkeypatch.setattr(TransformersSegmenter, "segment", answer)
    found = run(stage(str(checkpoints["sam"]), batch_size=1), make_works(tmp_path, [grounded((1, 2, 3, 5))]))
    assert found["image0"].result["objects"][0]["score"] == kept


def test_a_segmenter_that_raises(tmp_path: Path, fixed: type[Fixed]) -> None:
    def fails(images: Any, boxes: Any) -> Any:
        return {}[boxes[0][0][0]]

    fixed.answer = fails
    text = r"^segment.model: fixed_segmenter:Fixed: segment raised KeyError: 1 \(test_segment.py, line \d+\); for"
    with pytest.raises(UserError, match=text) as caught:
        run(stage(), make_works(tmp_path, [grounded((1, 2, 3, 5))]))
    assert isinstance(caught.value.__cause__, KeyError)


MASK = {"size": [96, 128], "counts": [96 * 128]}


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda images, boxes: [], "segment returned 0 lists for 1 images, expected one list of masks per image"),
        (lambda images, boxes: None, "segment returned None for 1 images"),
        (lambda images, boxes: [[]], r"segment returned 0 masks for 2 boxes, expected one \(mask, score\) per box"),
        (lambda images, boxes: [[(MASK, 0.5)] * 3], "segment returned 3 masks for 2 boxes"),
        (lambda images, boxes: [[(MASK | {"size": [128, 96]}, 0.5)] * 2], "a mask of 96 x 128 in an image of 128 x 96"),
        (lambda images, boxes: [[(MASK | {"counts": [5]}, 0.5)] * 2], r"expected \(COCO RLE or None, score\)"),
        (lambda images, boxes: [[MASK, MASK]], "a malformed mask"),
        (lambda images, boxes: [[(MASK, 1.2)] * 2], "got a score of 1.2, expected 0 to 1"),
        (lambda images, boxes: [[(None, -1)] * 2], "got a score of -1, expected 0 to 1"),
        (lambda images, boxes: [[(MASK, math.nan)] * 2], "got a score of nan, expected 0 to 1"),
        (lambda images, boxes: [[(torch.zeros(96, 128), 0.5)] * 2], "a malformed mask"),
    ],
)
def test_wrong_results_of_a_segmenter(tmp_path: Path, fixed: type[Fixed], answer: Any, text: str) -> None:
    fixed.answer = answer
    with pytest.raises(UserError, match=text) as caught:
        run(stage(), make_works(tmp_path, [grounded((1, 2, 3, 5), (7, 7, 8, 9))]))
    assert str(caught.value).startswith("segment.model: fixed_segmenter:Fixed: ")


def test_class_without_the_method(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"segment.model: collections:Counter has no method segment"):
        run(stage("collections:Counter"), make_works(tmp_path, [grounded((1, 2, 3, 5))]))


def test_boxes_are_halved_before_images(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    expected = run(stage(str(checkpoints["sam"])), make_works(tmp_path, [grounded(*boxes) for boxes in BOXES]))
    decode, encoded = TransformersSegmenter._decode, []

    def limited(self: TransformersSegmenter, embeddings: Any, prompts: Any) -> Any:
        encoded.append(len(embeddings))
        if len(prompts) > 2 or len(embeddings) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, embeddings, prompts)

    monkeypatch.setattr(TransformersSegmenter, "_decode", limited)
    works = make_works(tmp_path, [grounded(*boxes) for boxes in BOXES])
    found = run(stage(str(checkpoints["sam"]), batch_size=8), works)
    assert {key: outcome.reason for key, outcome in found.items()} == {
        key: outcome.reason for key, outcome in expected.items()
    }
    assert encoded[-1] == 4
    assert "segment.batch_size: 8 do not fit" in caplog.text and "segment.boxes_per_batch: 12 do not fit" in caplog.text

    def never(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TransformersSegmenter, "_decode", never)
    with pytest.raises(UserError, match=r"segment.model: .*sam does not fit into the memory with one image of 128"):
        run(stage(str(checkpoints["sam"])), works)


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_with_a_checkpoint(checkpoints: dict[str, Path], kind: str, tmp_path: Path) -> None:
    works = make_works(tmp_path, [grounded(*boxes) for boxes in BOXES])
    found = [run(stage(str(checkpoints[kind]), batch_size=size), works) for size in (1, 3, 8)]
    for i, boxes in enumerate(BOXES):
        for other in found[1:]:
            expected, got = found[0][f"image{i}"], other[f"image{i}"]
            assert got.reason == expected.reason
            if not expected.reason:
                pairs = zip(got.result["objects"], expected.result["objects"], strict=True)
                assert len(got.result["objects"]) == len(boxes)
                for a, b in pairs:
                    assert (a["mask"] is None) == (b["mask"] is None)
                    if a["mask"] is not None:
                        assert_same_masks([(a["mask"], a["score"])], [(b["mask"], b["score"])])


def test_inversion_changes_the_masks(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    works = make_works(tmp_path, [grounded(*boxes) for boxes in BOXES])
    plain, inverted = (run(stage(str(checkpoints["sam2"]), invert=invert), works) for invert in (False, True))
    assert plain != inverted


@pytest.mark.skipif(import_problem("torchvision") is None, reason="torchvision loads here")
def test_sam2_without_torchvision(checkpoints: dict[str, Path]) -> None:
    text = r"segment.model: the image processor of .*sam2 needs torchvision, .*pip install 'scenarioclip-fast\[torchvis"
    with pytest.raises(UserError, match=text):
        load(checkpoints["sam2"])


def test_checkpoint_of_another_class(tmp_path: Path) -> None:
    path = tiny_detectors.owlv2(tmp_path / "owl")
    with pytest.raises(UserError, match=r"segment.model: .*owl is a checkpoint of owlv2, expected SAM, SAM 2$"):
        load(path)
