"""PNG masks in the published layout, where there is no npz."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from scenarioclip_fast.data import load_reference, pack
from scenarioclip_fast.data.check import Rejection
from scenarioclip_fast.data.sources.published import PublishedSource

HEIGHT, WIDTH = 40, 60
BOXES = {"cat": (5, 5, 25, 25), "mat": (0, 25, 60, 40), "dog": (40, 2, 58, 24)}  # apart, as in a label map


def masks() -> list[NDArray[np.bool_]]:
    found = []
    for x1, y1, x2, y2 in BOXES.values():
        found.append(mask := np.zeros((HEIGHT, WIDTH), bool))
        mask[y1:y2, x1:x2] = True
    return found


def labels() -> NDArray[np.int64]:
    return sum((k + 1) * mask.astype(np.int64) for k, mask in enumerate(masks()))  # type: ignore[return-value]


class Dataset:
    """One scene of three objects, or only the first `objects`; `sam` is the directory of its masks."""

    def __init__(self, directory: Path, objects: int = 3) -> None:
        self.directory, self.sam = directory, directory / "sam_results"
        (directory / "images").mkdir()
        self.sam.mkdir()
        Image.new("RGB", (WIDTH, HEIGHT)).save(directory / "images" / "a.jpg")
        entry = {
            "id": "a",
            "image_path": "images/a.jpg",
            "action": "sitting",
            "objects": [[name, list(box)] for name, box in [*BOXES.items()][:objects]],
            "relations": [["sam_results/a/a_relations_0.png", ["cat", "on", "mat"]]] if objects > 1 else [],
        }
        (directory / "metadata.json").write_text(json.dumps({"data": [entry]}))

    def png(self, name: str, pixels: NDArray[Any], mode: str | None = None) -> None:
        path = self.sam / name
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(pixels)
        if mode == "P":
            image = Image.fromarray(pixels, "L")
            image.putpalette(np.random.default_rng(0).permutation(768).astype(np.uint8).tobytes())
        image.save(path)

    def folder(self, name: str, scale: int = 255) -> None:
        for k, mask in enumerate(masks()):
            self.png(f"{name}/{k}.png", mask if scale == 0 else mask.astype(np.uint8) * scale)

    def load(self) -> tuple[list[Any], list[Rejection]]:
        rejected: list[Rejection] = []
        (scene,) = load_reference(self.directory, rejected.append)
        return [item.mask for item in scene.objects], rejected


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    (tmp_path / "set").mkdir()
    return Dataset(tmp_path / "set")


def assert_good(data: Dataset, expected: list[NDArray[np.bool_]] | None = None) -> None:
    found, rejected = data.load()
    assert not rejected
    for mask, other in zip(found, expected or masks(), strict=True):
        assert torch.equal(mask, torch.from_numpy(other))


@pytest.mark.parametrize("name", ["a_grounding_sam", "a"])
@pytest.mark.parametrize("scale", [0, 1, 7, 255])
def test_a_folder_with_a_png_for_each_object(data: Dataset, name: str, scale: int) -> None:
    data.folder(name, scale)
    data.png("a/a_relations_0.png", np.zeros((3, 3), np.uint8))  # of a relation: not read
    assert_good(data)


@pytest.mark.parametrize("name", ["a_grounding_sam", "a"])
@pytest.mark.parametrize(("kind", "mode"), [(np.uint8, None), (np.uint8, "P"), (np.uint16, None)])
def test_a_label_map(data: Dataset, name: str, kind: Any, mode: str | None) -> None:
    data.png(f"{name}.png", labels().astype(kind), mode)
    data.png("a/a_relations_0.png", np.zeros((3, 3), np.uint8))  # makes a folder without masks
    assert_good(data)


@pytest.mark.parametrize("scale", [0, 1, 255])
def test_a_label_map_of_a_single_object(tmp_path: Path, scale: int) -> None:
    data = Dataset(tmp_path, objects=1)
    data.png("a.png", masks()[0] if scale == 0 else masks()[0].astype(np.uint8) * scale)
    assert_good(data, masks()[:1])


def test_precedence(data: Dataset) -> None:
    """npz, folder, label map; of two with the longer name first."""
    sources: list[Callable[[NDArray[np.bool_]], None]] = [
        lambda mask: np.savez(data.sam / "a_grounding_sam.npz", mask=np.stack([mask] * 3)),
        lambda mask: [data.png(f"a_grounding_sam/{k}.png", mask) for k in range(3)] and None,
        lambda mask: [data.png(f"a/{k}.png", mask) for k in range(3)] and None,
    ]
    data.png("a.png", labels().astype(np.uint8))
    data.png("a_grounding_sam.png", labels().T.copy().T.astype(np.uint8))
    assert_good(data)
    for k, write in enumerate(reversed(sources)):
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[k, k] = True
        write(mask)
        assert_good(data, [mask] * 3)


def test_an_object_without_pixels_loses_only_its_mask(data: Dataset) -> None:
    data.png("a.png", np.where(labels() == 3, 0, labels()).astype(np.uint8))
    found, rejected = data.load()
    assert [mask is None for mask in found] == [False, False, True]
    assert [r.reason for r in rejected] == ["empty_mask"]


def four_bits(data: Dataset) -> None:
    """A valid grey PNG of four bits per pixel, which Pillow cannot write."""
    pixels = labels().astype(np.uint8)
    packed = pixels[:, ::2] << 4 | pixels[:, 1::2]
    rows = np.pad(packed, ((0, 0), (1, 0))).tobytes()  # each after the number of its filter, 0
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 4, 0, 0, 0, 0)
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    (data.sam / "a.png").write_bytes(content)


def text(data: Dataset) -> None:
    (data.sam / "a.png").write_text("no PNG")


# What is wrong, how it is made, and the detail of the rejection.
BAD: dict[str, tuple[Callable[[Dataset], Any], str]] = {
    "missing number": (
        lambda data: [data.folder("a"), (data.sam / "a" / "1.png").unlink()],
        "sam_results/a: got ['0.png', '2.png'], expected 0.png to 2.png, one for each of the 3 objects",
    ),
    "too many": (
        lambda data: [data.folder("a"), data.png("a/3.png", masks()[0])],
        "sam_results/a: got ['0.png', '1.png', '2.png', '3.png'], expected 0.png to 2.png",
    ),
    "repeated number": (
        lambda data: [data.folder("a"), data.png("a/01.png", masks()[0])],
        "expected 0.png to 2.png",
    ),
    "other size": (
        lambda data: [data.folder("a"), data.png("a/1.png", masks()[0][:, 1:])],
        "sam_results/a: 1.png: got a PNG of 59 x 40, expected the image's 60 x 40",
    ),
    "several values": (
        lambda data: [data.folder("a"), data.png("a/2.png", labels().astype(np.uint8))],
        "sam_results/a: 2.png: got values [0, 1, 2, 3], expected 0 and one other value",
    ),
    "colours": (
        lambda data: [data.folder("a"), data.png("a/2.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))],
        "sam_results/a: 2.png: got a PNG in mode RGB, expected 1 or L",
    ),
    "label beyond the objects": (
        lambda data: data.png("a.png", (labels() + 1).astype(np.uint8)),
        "sam_results/a.png: got values [1, 2, 3, 4], expected 0 to 3: k + 1 for object k of 3, 0 for none",
    ),
    "0 and 255 for several objects": (
        lambda data: data.png("a_grounding_sam.png", (labels() > 0).astype(np.uint8) * 255),
        "sam_results/a_grounding_sam.png: got values [0, 255], expected 0 to 3",
    ),
    "one bit for several objects": (
        lambda data: data.png("a.png", masks()[0]),
        "sam_results/a.png: got a PNG in mode 1, expected L or P or I;16",
    ),
    "label map of another size": (
        lambda data: data.png("a.png", labels().T.astype(np.uint8).copy()),
        "sam_results/a.png: got a PNG of 40 x 60, expected the image's 60 x 40",
    ),
    "scaled labels": (four_bits, "sam_results/a.png: got a grey PNG of 4 bits per pixel, expected 8 or 16"),
    "no PNG": (text, "sam_results/a.png: not a PNG"),
    "a pipe": (
        lambda data: [data.folder("a"), (data.sam / "a/1.png").unlink(), os.mkfifo(data.sam / "a/1.png")],
        "sam_results/a: 1.png: got a named pipe, expected a regular file",
    ),
    "nothing": (lambda data: None, "no sam_results/a_grounding_sam.npz, and no PNGs"),
    "only relations": (
        lambda data: data.png("a/a_relations_0.png", masks()[0]),
        "no sam_results/a_grounding_sam.npz, and no PNGs",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_match_is_rejected(data: Dataset, case: str) -> None:
    make, detail = BAD[case]
    make(data)
    found, rejected = data.load()
    assert found == [None] * 3
    reason = "missing_masks" if "no PNGs" in detail else "bad_masks"
    assert [r.reason for r in rejected] == [reason, "relation_without_mask"]
    assert detail in rejected[0].detail


@pytest.mark.parametrize("name", ["..", ".", "x/../a"])
def test_an_id_that_is_no_name_has_no_pngs(data: Dataset, name: str) -> None:
    data.folder("a")
    data.folder("..")
    for k, mask in enumerate(masks()):
        data.png(f"{k}.png", mask)
    entry = json.loads((data.directory / "metadata.json").read_text())["data"][0] | {"id": name}
    (data.directory / "metadata.json").write_text(json.dumps({"data": [entry]}))
    rejected: list[Rejection] = []
    for scene in load_reference(data.directory, rejected.append):
        assert all(item.mask is None for item in scene.objects)
    assert rejected[0].reason in ("missing_masks", "unsafe_id")


def test_changed_pngs_change_the_fingerprint(data: Dataset, tmp_path: Path) -> None:
    def fingerprint() -> str:
        return PublishedSource(data.directory).fingerprint()

    seen = [fingerprint()]
    data.png("a.png", labels().astype(np.uint8))
    seen.append(fingerprint())
    pack(data.directory, tmp_path / "out", progress=False)
    assert pack(data.directory, tmp_path / "out", progress=False).up_to_date
    os.utime(data.sam / "a.png", ns=(1, 1))
    seen.append(fingerprint())
    data.folder("a")
    seen.append(fingerprint())
    os.utime(data.sam / "a" / "2.png", ns=(1, 1))
    seen.append(fingerprint())
    (data.sam / "a" / "2.png").rename(data.sam / "a" / "3.png")
    seen.append(fingerprint())
    np.savez(data.sam / "a_grounding_sam.npz", mask=np.stack(masks()))
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)
    assert not pack(data.directory, tmp_path / "out", progress=False).up_to_date


def test_pngs_are_not_looked_for_beside_an_npz(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(data.sam / "a_grounding_sam.npz", mask=np.stack(masks()))
    monkeypatch.setattr("scenarioclip_fast.data.sources.published.find_png_masks", None)
    PublishedSource(data.directory).fingerprint()
    assert_good(data)
