"""The detectors of transformers, with tiny random checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_detectors
import torch
from generate_works import SIZES, make_images
from tiny_detectors import one_thread  # noqa: F401

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.config import GroundConfig
from scenarioclip_fast.generate.ground.boxes import Box
from scenarioclip_fast.generate.ground.transformers_detector import TransformersDetector, match_phrases

CPU = torch.device("cpu")
NAMES = [["a red ball", "dog", "ball"], ["ball"], ["dog", "cat", "bus"], ["tree"], ["the car", "dog"], ["mat"], ["a"]]
NAMES.append(["person on the bus", "blue car"])

# Float32 sums of another order: 1e-6 relative in the logits of tiny models, which the sigmoid does not amplify, and in
# boxes of up to 200 pixels.
PIXELS, SCORE = 2e-2, 1e-4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("detectors")
    return {
        "dino": tiny_detectors.grounding_dino(folder / "dino"),
        "mm": tiny_detectors.grounding_dino(folder / "mm", mm=True),
        "owl": tiny_detectors.owlv2(folder / "owl"),
    }


def make(path: Path, **options: Any) -> TransformersDetector:
    return TransformersDetector(GroundConfig(model=str(path), **{"box_threshold": 0.1, **options}), CPU)


def assert_close(got: list[Box], expected: list[Box]) -> None:
    assert [box.name for box in got] == [box.name for box in expected]
    for one, other in zip(got, expected, strict=True):
        assert one.box == pytest.approx(other.box, abs=PIXELS)
        assert one.score == pytest.approx(other.score, abs=SCORE)


@pytest.mark.parametrize("kind", ["dino", "mm", "owl"])
def test_boxes_are_those_of_the_processor(checkpoints: dict[str, Path], kind: str) -> None:
    """Image by image, against the processor's own prompts and conversion of boxes."""
    import transformers as tf

    detector = make(checkpoints[kind])
    found = detector.detect(make_images(), NAMES)
    names = "Owlv2Processor" if kind == "owl" else "GroundingDinoProcessor"
    processor = getattr(tf, names).from_pretrained(checkpoints[kind])
    compared = 0
    for image, asked, boxes in zip(make_images(), NAMES, found, strict=True):
        if image.shape[0] > 16 * image.shape[1]:
            continue  # padded first
        text = [asked] if kind == "owl" else ". ".join(asked) + "."
        inputs = processor(images=image.numpy(), text=text, return_tensors="pt")
        with torch.inference_mode():
            out = detector._model(**inputs)
        options = {"threshold": 0.1, "target_sizes": [tuple(image.shape[:2])]}
        if kind == "owl":
            (expected,) = processor.post_process_grounded_object_detection(out, text_labels=[asked], **options)
        else:
            (expected,) = processor.post_process_grounded_object_detection(
                out, inputs.input_ids, text_threshold=0.25, **options
            )
        labels, scores = expected["text_labels"], expected["scores"].tolist()
        assert len(boxes) == len(labels)
        for box, label, corners, score in zip(boxes, labels, expected["boxes"].tolist(), scores, strict=True):
            assert box.box == pytest.approx(corners, abs=PIXELS)
            assert box.score == pytest.approx(score, abs=SCORE)
            if kind == "owl":
                assert box.name == label
            elif box.name in asked:
                words = label.replace(".", " ").split()
                assert set(words) & set(box.name.split()), f"{label!r} is called {box.name!r}"
            else:
                assert not set(label.replace(".", " ").split()) & set(tiny_detectors.WORDS)
            compared += box.name in asked
    assert compared > 5 or kind == "mm"  # whose scores are those of delimiters, with these weights


@pytest.mark.parametrize("kind", ["dino", "mm", "owl"])
def test_boxes_are_those_of_the_image(checkpoints: dict[str, Path], kind: str) -> None:
    """With these weights, scores depend on the image by far more than rounding, so that the other tests can tell."""
    first, _, other = make_images()[:3]
    found = make(checkpoints[kind], box_threshold=0.0).detect([first, other], [["dog"]] * 2)
    scores = [np.array([box.score for box in boxes]) for boxes in found]
    assert len(scores[0]) == len(scores[1]) and np.abs(scores[0] - scores[1]).max() > 10 * SCORE


@pytest.mark.parametrize("kind", ["dino", "mm", "owl"])
def test_results_do_not_depend_on_the_batch(checkpoints: dict[str, Path], kind: str) -> None:
    detector = make(checkpoints[kind], text_threshold=0.1)
    alone = [detector.detect([image], [asked])[0] for image, asked in zip(make_images(), NAMES, strict=True)]
    assert sum(map(len, alone)) > 10
    for size in (3, 8):
        for start in range(0, len(SIZES), size):
            part = slice(start, start + size)
            for got, expected in zip(detector.detect(make_images()[part], NAMES[part]), alone[part], strict=True):
                assert_close(got, expected)


@pytest.mark.parametrize("kind", ["dino", "mm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_precisions_run(checkpoints: dict[str, Path], kind: str, dtype: Any) -> None:
    detector = make(checkpoints[kind], dtype=dtype, box_threshold=0.0)
    assert detector._model.dtype == getattr(torch, dtype)
    assert all(len(boxes) > 0 for boxes in detector.detect(make_images()[:2], NAMES[:2]))


def test_long_prompts_are_split(tmp_path: Path) -> None:
    """Every name is asked for once, whole, in prompts of at most the limit."""
    limit = 12
    detector = make(tiny_detectors.grounding_dino(tmp_path / "short", max_text_len=limit))
    names = ["a red ball", "dog", "the blue car on grass", "cat", "mat", "a person on the bus", "tree"]
    prompts = detector._texts.prompts(names)
    assert len(prompts) > 1
    tokens: list[list[int]] = [[] for _ in names]
    for prompt in prompts:
        assert len(prompt.ids) == len(prompt.owners) <= limit
        assert (prompt.ids[0], prompt.ids[-1]) == (101, 102)
        assert (prompt.ids[np.isin(prompt.ids, [101, 102, 1012])] >= 0).all()
        for token, owner in zip(prompt.ids, prompt.owners, strict=True):
            if owner >= 0:
                tokens[owner].append(int(token))
    tokenizer = detector._texts.tokenizer
    assert [tokenizer.decode(ids) for ids in tokens] == names
    (boxes,) = detector.detect(make_images()[:1], [names])
    for name, prompt in [(names[0], prompts[0]), (names[-1], prompts[-1])]:
        alone = [names[i] for i in sorted(set(prompt.owners.tolist()) - {-1})]
        (expected,) = detector.detect(make_images()[:1], [alone])
        assert_close([b for b in boxes if b.name == name], [b for b in expected if b.name == name])


@pytest.mark.parametrize("limit", range(6, 30))
def test_no_prompt_exceeds_the_limit(checkpoints: dict[str, Path], limit: int) -> None:
    phrases = make(checkpoints["dino"])._texts
    phrases.limit = limit
    names = [name for names in NAMES for name in names]
    prompts = phrases.prompts(names)
    lengths = [len(prompt.ids) for prompt in prompts]
    assert max(lengths) <= limit
    assert {int(n) for p in prompts for n in p.owners} == {-1, *range(len(names))}
    for length, after in zip(lengths, prompts[1:], strict=False):  # the next name would not have fitted
        first = after.owners[1]
        assert length + (after.owners == first).sum() + 1 > limit


def test_images_of_one_size_share_a_batch(checkpoints: dict[str, Path]) -> None:
    detector, sizes = make(checkpoints["dino"]), []
    detector._model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["pixel_values"].shape)), with_kwargs=True
    )
    detector.detect(make_images(), NAMES)
    assert sizes[0] == (3, 3, 64, 85) and sizes[1] == (2, 3, 64, 64) and len(sizes) == 5


@pytest.mark.parametrize("kind", ["dino", "owl"])
def test_a_name_longer_than_the_limit_is_asked_for_in_pieces(checkpoints: dict[str, Path], kind: str) -> None:
    detector = make(checkpoints[kind])
    name = " ".join(["red", "ball"] * 40)
    prompts = detector._texts.prompts([name, "dog"])
    owners = np.concatenate([p.owners for p in prompts])
    assert (owners == 0).sum() >= (80 if kind == "dino" else 2)
    assert all(p.ids.shape[-1] <= detector._texts.limit for p in prompts)
    (boxes,) = detector.detect(make_images()[:1], [[name, "dog"]])
    assert {box.name for box in boxes} <= {name, "dog", ""}
    assert name in {box.name for box in boxes}


def test_prompts_are_those_of_the_processors(checkpoints: dict[str, Path]) -> None:
    import transformers as tf

    for kind in ("dino", "owl"):
        detector = make(checkpoints[kind])
        inputs = detector._texts.inputs([p for names in NAMES for p in detector._texts.prompts(names)])
        if kind == "dino":
            tokenizer = tf.GroundingDinoProcessor.from_pretrained(checkpoints[kind]).tokenizer
            expected = tokenizer([". ".join(names) + "." for names in NAMES], padding=True, return_tensors="np")
            for key, value in inputs.items():
                np.testing.assert_array_equal(value, expected[key])
        else:
            tokenizer = tf.Owlv2Processor.from_pretrained(checkpoints[kind]).tokenizer
            most = max(map(len, NAMES))
            for i, names in enumerate(NAMES):
                expected = tokenizer(names, padding="max_length", max_length=16, return_tensors="np")
                for key, value in inputs.items():
                    rows = value.reshape(len(NAMES), most, 16)[i]
                    np.testing.assert_array_equal(rows[: len(names)], expected[key])
                    if key == "input_ids":
                        assert (rows[len(names) :, 0] == 0).all()  # ignored by the model


@pytest.mark.parametrize("kind", ["dino", "owl"])
def test_names_cannot_spell_special_tokens(checkpoints: dict[str, Path], kind: str) -> None:
    detector = make(checkpoints[kind])
    if kind == "dino":
        (prompt,) = detector._texts.prompts(["[SEP] dog. cat? [PAD]", "?", "ball"])
        assert [int((prompt.ids == token).sum()) for token in (0, 101, 102, 1012, 1029)] == [0, 1, 1, 2, 0]
        assert sorted(set(prompt.owners.tolist())) == [-1, 0, 2]
    else:
        (prompt,) = detector._texts.prompts(["<|endoftext|> dog", "<|startoftext|>", "ball"])
        end = detector._texts.tokenizer.eos_token_id
        assert (prompt.ids == end).sum(1).tolist() == [1, 1]
        assert prompt.owners.tolist() == [0, 2]
    assert detector.detect(make_images()[:2], [["?", "."] if kind == "dino" else ["<|endoftext|>"], ["dog"]])[0] == []


# "[CLS] a red ball . ball . dog . [SEP]"
OWNERS = np.array([-1, 0, 0, 0, -1, 1, -1, 2, -1, -1])


@pytest.mark.parametrize(
    ("scores", "name"),
    [
        ([0, 0, 0.5, 0.6, 0, 0.6, 0, 0, 0, 0], 0),  # "red ball ball": two words of "a red ball"
        ([0, 0, 0.1, 0.6, 0, 0.5, 0, 0, 0, 0], 1),  # "ball ball": one word of each, which is all of "ball"
        ([0, 0, 0, 0.6, 0, 0.1, 0, 0, 0, 0], 0),  # "ball", the one of "a red ball"
        ([0, 0, 0, 0, 0, 0.5, 0, 0.6, 0, 0], 2),  # "ball dog": the higher score
        ([0, 0, 0, 0, 0, 0.5, 0, 0.5, 0, 0], 1),  # equal: the first one
        ([0, 0.3, 0.3, 0.3, 0, 0, 0, 0.9, 0, 0], 0),  # "a red ball dog": the most words
        ([0.9, 0, 0, 0, 0.9, 0, 0.9, 0, 0.9, 0.9], -1),  # delimiters only
        ([0, 0.25, 0, 0, 0, 0, 0, 0, 0, 0], -1),  # not above the threshold
    ],
)
def test_phrases_are_matched_by_position(scores: list[float], name: int) -> None:
    padded = np.array([scores + [0.99] * 5], np.float32)  # scores beyond the prompt do not count
    assert match_phrases(OWNERS, padded, 0.25) == [name]


def test_no_boxes_no_names() -> None:
    assert match_phrases(OWNERS, np.zeros((0, 64), np.float32), 0.25) == []


def test_thresholds(checkpoints: dict[str, Path]) -> None:
    def found(**options: float) -> list[Box]:
        return make(checkpoints["dino"], **options).detect(make_images()[:1], NAMES[:1])[0]

    low, high = found(box_threshold=0.1), found(box_threshold=0.99)
    assert high == [box for box in low if box.score > 0.99] and 0 < len(high) < len(low)
    assert {box.name for box in found(text_threshold=1.0)} == {""}


def test_unknown_checkpoints(tmp_path: Path) -> None:
    for model, text in [
        (str(tmp_path / "missing"), "no such directory"),
        ("nobody/no-such-model", "cannot load nobody/no-such-model"),
        (str(tmp_path), "cannot load"),
    ]:
        with pytest.raises(UserError, match=text) as caught:
            make(Path(model))
        assert str(caught.value).startswith("ground.model: ")
        assert "GroundingDINO, MM-GroundingDINO, OWLv2" in str(caught.value) and "\\n" not in str(caught.value)


def test_checkpoint_of_another_class(tmp_path: Path) -> None:
    path = tiny_detectors.sam(tmp_path / "sam")
    with pytest.raises(UserError, match="is a checkpoint of sam, expected GroundingDINO, MM-GroundingDINO, OWLv2"):
        make(path)


def test_damaged_and_incomplete_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny_detectors.grounding_dino(tmp_path / "dino")
    weights = path / "model.safetensors"
    state = load_file(weights)
    lost = "model.text_projection.weight"
    save_file({key: value for key, value in state.items() if key != lost}, weights, {"format": "pt"})
    make(path)
    assert "lacks 1 weights" in caplog.text and lost in caplog.text
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"ground.model: cannot load .*dino"):
        make(path)
    weights.unlink()
    with pytest.raises(UserError, match=r"ground.model: cannot load .*dino"):
        make(path)
