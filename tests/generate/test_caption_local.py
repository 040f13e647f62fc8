"""Captions by models in this process: tiny random checkpoints, and a stub in place of their answers."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.caption import local
from scenarioclip_fast.generate.caption.local import LocalCaptions
from scenarioclip_fast.generate.config import CaptionConfig
from scenarioclip_fast.generate.images import Item
from scenarioclip_fast.generate.stages import Outcome, Work

pytest.importorskip("transformers", reason="transformers is not installed")
from tiny_models import write_qwen

SIZES = [(90, 120), (56, 56), (200, 60), (64, 180), (112, 112)]
ANSWER = json.dumps(
    {"action": "Running", "caption": "A dog.", "objects": ["dog", "mat"], "relations": [["dog", "on", "mat"]]}
)


def write_works(folder: Path, sizes: list[tuple[int, int]]) -> list[Work]:
    works = []
    for i, (height, width) in enumerate(sizes):
        pixels = torch.randint(
            0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)
        )
        buffer = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(buffer, "JPEG")
        path = folder / f"{i}.jpg"
        path.write_bytes(buffer.getvalue())
        works.append(Work(Item(f"{i}", path.name, str(path), -1, path.stat().st_size)))
    return works


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp(request.param), request.param)


def answers_of(config: CaptionConfig, works: list[Work]) -> list[Any]:
    """Answers of the model itself, batch by batch."""
    model = local._Model(config, torch.device("cpu"))
    images = [Image.open(work.item.path) for work in works]
    size = config.batch_size
    return [one for i in range(0, len(images), size) for one in model.answer(images[i : i + size])]


def test_answers_do_not_depend_on_the_batch(checkpoint: Path, tmp_path: Path) -> None:
    """Prompts of other lengths in the batch are padded on the left, and have their own positions."""
    works = write_works(tmp_path, SIZES)
    base = {"model": str(checkpoint), "max_tokens": 12, "max_objects": 3}
    alone = answers_of(CaptionConfig(**base, batch_size=1), works)
    together = answers_of(CaptionConfig(**base, batch_size=3), works)
    assert alone == together
    assert len({prompt for _, _, prompt, _ in alone}) > 2  # their lengths differ
    assert len({text for text, *_ in alone}) > 1  # the answers depend on the image


def test_the_answer_follows_the_image_and_stops_at_its_end(checkpoint: Path, tmp_path: Path) -> None:
    works = write_works(tmp_path, SIZES[:2])
    config = CaptionConfig(model=str(checkpoint), max_tokens=6)
    model = local._Model(config, torch.device("cpu"))
    image = Image.open(works[0].item.path)
    _, truncated, prompt, tokens = model.answer([image])[0]
    assert (truncated, tokens) == (True, 6)
    inputs = model._processor(text=[model._prompt], images=[image], padding=True, return_tensors="pt")
    assert prompt == inputs["input_ids"].shape[1]
    row = model._model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, prompt:]
    model._ends = row[3:4]  # as if the fourth token were the end
    first = int((row == row[3]).nonzero()[0])
    assert model.answer([image])[0] == (model._processor.tokenizer.decode(row[:first]), False, prompt, first)


def test_the_image_tokens_match_the_patches(checkpoint: Path, tmp_path: Path) -> None:
    model = local._Model(CaptionConfig(model=str(checkpoint)), torch.device("cpu"))
    images = [Image.open(work.item.path) for work in write_works(tmp_path, SIZES[:3])]
    inputs = model._processor(text=[model._prompt] * 3, images=images, padding=True, return_tensors="pt")
    per_image = inputs["image_grid_thw"].prod(1) // 4
    assert inputs["mm_token_type_ids"].sum(1).tolist() == per_image.tolist()
    assert inputs["input_ids"][:, -1].unique().numel() == 1  # padded on the left
    assert "<|vision_start|><|image_pad|><|vision_end|>" in model._prompt


def test_the_inputs_are_those_of_the_whole_processor(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torchvision, the class can be created only with its check of the part for videos left out."""
    import transformers
    from transformers.processing_utils import ProcessorMixin

    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: object)
    model = local._Model(CaptionConfig(model=str(checkpoint)), torch.device("cpu"))
    name = "Qwen3VLProcessor" if "qwen3" in checkpoint.name else "Qwen2_5_VLProcessor"
    whole = getattr(transformers, name)(model._processor.image_processor, model._processor.tokenizer, None)
    images = [Image.open(work.item.path) for work in write_works(tmp_path, SIZES)]
    options = {"text": [model._prompt] * len(images), "images": images, "padding": True, "return_tensors": "pt"}
    found = local._ImageTextProcessor(
        model._processor.image_processor, model._processor.tokenizer, model._model.config.image_token_id
    )(**options)
    expected = whole(**options)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    # Used as it is where it loads.
    model._processor = whole
    answers = model.answer(images[:2])
    assert all(not isinstance(one, ValueError) for one in answers)


def test_the_stage_with_a_random_model(checkpoint: Path, tmp_path: Path) -> None:
    works = write_works(tmp_path, SIZES)
    Path(works[1].item.path).write_bytes(b"x" * works[1].item.size)
    stage = LocalCaptions(CaptionConfig(model=str(checkpoint), max_tokens=4, batch_size=2), "cpu")
    pickle.dumps(stage)
    found = {one.key: one for one in stage.run(iter(works))}
    assert found.keys() == {work.key for work in works}
    assert found["1"].reason == "image_not_an_image"
    assert {one.reason for key, one in found.items() if key != "1"} <= {"answer_truncated", "answer_not_json"}
    assert stage.counts["answer tokens"] <= 16 and stage.counts["prompt tokens"] > 1000
    stage.close()


class StubModel:
    """Answers right, with memory for `capacity` images."""

    capacity = 100

    def __init__(self, config: CaptionConfig, device: torch.device) -> None:
        self.batches: list[int] = []

    def answer(self, pictures: list[Any]) -> list[Any]:
        self.batches.append(len(pictures))
        if len(pictures) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return [(ANSWER, False, 10, 5) for _ in pictures]


def test_memory_halves_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_Model", StubModel)
    monkeypatch.setattr(StubModel, "capacity", 2)
    works = write_works(tmp_path, SIZES * 2)
    stage = LocalCaptions(CaptionConfig(model="m", batch_size=8), "cpu")
    found = list(stage.run(iter(works)))
    assert [one.key for one in found] == [work.key for work in works]
    assert found[0] == Outcome(
        "0",
        {"size": [90, 120], "action": "running", "caption": "A dog.", "objects": ["dog", "mat"]}
        | {"relations": [["dog", "on", "mat"]]},
    )
    assert stage._model is not None and stage._model.batches == [8, 4, 2, 2, 2, 2, 2]  # type: ignore[attr-defined]
    assert stage.counts == {"prompt tokens": 100, "answer tokens": 50}


def test_no_memory_for_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_Model", StubModel)
    monkeypatch.setattr(StubModel, "capacity", 0)
    stage = LocalCaptions(CaptionConfig(model="m", batch_size=4), "cpu")
    with pytest.raises(UserError, match=r"caption\.batch_size: out of memory even at 1, .*\(CUDA out of memory\.\)"):
        list(stage.run(iter(write_works(tmp_path, SIZES))))


def test_an_image_that_the_model_cannot_take(checkpoint: Path, tmp_path: Path) -> None:
    """The processor refuses ratios above 200; the other images of the batch are answered."""
    works = write_works(tmp_path, [(56, 56), (2, 900), (64, 64)])
    found = list(LocalCaptions(CaptionConfig(model=str(checkpoint), max_tokens=2), "cpu").run(iter(works)))
    assert [one.reason == "request_refused" for one in found] == [False, True, False]
    assert "ratio" in found[1].detail


def test_no_such_checkpoint(tmp_path: Path) -> None:
    works = write_works(tmp_path, SIZES[:1])
    stage = LocalCaptions(CaptionConfig(model=str(tmp_path / "none")), "cpu")
    with pytest.raises(UserError, match=r"caption\.model: cannot load .*none .*; expected a path or hub id") as caught:
        list(stage.run(iter(works)))
    assert "\n" not in str(caught.value)


def test_another_kind_of_model(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "clip"}))
    stage = LocalCaptions(CaptionConfig(model=str(tmp_path / "clip")), "cpu")
    with pytest.raises(UserError, match=r"caption\.model: cannot load .*CLIPConfig.*Qwen"):
        list(stage.run(iter(write_works(tmp_path, SIZES[:1]))))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path: Path) -> None:
    stage = LocalCaptions(CaptionConfig(model="m"), "cuda")
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        list(stage.run(iter(write_works(tmp_path, SIZES[:1]))))


def test_sampling_needs_a_server(tmp_path: Path) -> None:
    stage = LocalCaptions(CaptionConfig(model="m", temperature=0.7), "cpu")
    with pytest.raises(UserError, match=r"caption\.temperature: got 0\.7, expected 0"):
        list(stage.run(iter(write_works(tmp_path, SIZES[:1]))))
