"""`scenarioclip_fast.preprocess`: all kinds of input give the loader's global views; errors are one line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import scenarioclip_fast as scf
from scenarioclip_fast.data import ShardSet, generate_scenes, pack, scene_loader
from scenarioclip_fast.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pixels_equal_the_global_views_of_the_loader(device: str, tmp_path: Path) -> None:
    pack(generate_scenes(8, seed=0, val=0.25, test=0.5), tmp_path / "shards")
    shards = ShardSet(tmp_path / "shards", "test")
    images = [shards.read(i).image for i in range(len(shards))]
    options: dict[str, Any] = {"augment": False, "shuffle": False, "drop_last": False}
    with scene_loader(
        tmp_path / "shards", 3, split="test", device=device, decoder="torch", size=32, **options
    ) as loader:
        found = [batch.pixels[: batch.num_scenes] for batch in loader]
    assert torch.equal(scf.preprocess(images, size=32, device=device), torch.cat(found))
    # Independent of the batch.
    assert torch.equal(scf.preprocess(images[1], size=32, device=device), torch.cat(found)[1:2])


def test_all_kinds_of_input_give_the_same_pixels(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    data = encoded(image)
    path = tmp_path / "image.png"
    path.write_bytes(data)
    expected = scf.preprocess(torch.from_numpy(PIXELS), size=16)
    assert expected.shape == (1, 3, 16, 16) and expected.dtype == torch.float32
    read_only = PIXELS.copy()
    read_only.setflags(write=False)
    flipped = np.ascontiguousarray(PIXELS[::-1])[::-1]  # negative strides
    many = [path, str(path), data, bytearray(data), image, PIXELS, read_only, flipped, torch.from_numpy(PIXELS)]
    for one in many:
        assert torch.equal(scf.preprocess(one, size=16), expected)
    assert torch.equal(scf.preprocess(many, size=16), expected.expand(len(many), -1, -1, -1))
    assert scf.preprocess([], size=16).shape == (0, 3, 16, 16)
    assert torch.equal(scf.preprocess(image, size=np.int64(16)), expected)  # type: ignore[arg-type]
    assert scf.preprocess(image, size=16, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_gray_alpha_and_rotation_are_handled_as_when_packing() -> None:
    gray = Image.fromarray(PIXELS[..., 0])
    stacked = np.repeat(PIXELS[..., :1], 3, axis=2)
    assert torch.equal(scf.preprocess([gray, encoded(gray)], size=16), scf.preprocess([stacked, stacked], size=16))
    rgba = Image.fromarray(np.dstack([PIXELS, PIXELS[..., :1]]))
    assert torch.equal(scf.preprocess(encoded(rgba), size=16), scf.preprocess(PIXELS, size=16))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: ignored
    plain, tagged = (encoded(Image.fromarray(PIXELS), "JPEG", exif=exif) for exif in (Image.Exif(), rotated))
    assert torch.equal(scf.preprocess(plain, size=16), scf.preprocess(tagged, size=16))


def test_sixteen_bit_grey_is_scaled() -> None:
    wide = PIXELS[..., 0].astype(np.uint16) * 257
    for image in (Image.fromarray(wide), Image.fromarray(wide.astype(">u2"))):
        for given in (image, encoded(image), encoded(image, "TIFF")):
            assert torch.equal(
                scf.preprocess(given, size=16), scf.preprocess(np.repeat(PIXELS[..., :1], 3, 2), size=16)
            )
    for mode, kind in (("I", "32-bit integer"), ("F", "float")):
        image = Image.fromarray(PIXELS[..., 0]).convert(mode)
        for given in (image, encoded(image, "TIFF")):
            with pytest.raises(UserError, match=rf"images\[0\]: undecodable: {kind} pixels"):
                scf.preprocess(given, size=16)


@pytest.mark.parametrize("size", [0, -1, 16.0, "16", (16, 16), True])
def test_an_invalid_size_is_named(size: Any) -> None:
    with pytest.raises(UserError, match=r"size: got .*, expected the side of the output in pixels"):
        scf.preprocess(PIXELS, size=size)


def test_devices_are_named_as_everywhere() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert scf.preprocess(PIXELS, size=16, device="auto").device.type == device
    with pytest.raises(UserError, match="device: got 'gpu', expected auto, cpu, cuda or cuda:N"):
        scf.preprocess(PIXELS, size=16, device="gpu")


def test_errors_name_the_image(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    good = tmp_path / "good.png"
    good.write_bytes(encoded(Image.fromarray(PIXELS)))
    for images, error, message in (
        (tmp_path / "gone.jpg", UserError, r"gone\.jpg: no such file"),
        (tmp_path, UserError, r": got a directory, expected a regular file"),
        ([good, tmp_path / "text.jpg"], UserError, r"text\.jpg: not_an_image: "),
        ([good, b"\xff\xd8\xff"], UserError, r"images\[1\]: truncated: "),
        ([good, Image.open(io.BytesIO(good.read_bytes()[:-60]))], UserError, r"images\[1\]: .*truncated"),
        (
            [good, np.zeros((1, 1025, 3), np.uint8)],
            UserError,
            r"images\[1\]: got an image of 1025 x 1, expected a ratio",
        ),
        (
            [encoded(Image.new("L", (1, 40_000)))],
            UserError,
            r"images\[0\]: got an image of 1 x 40000, expected sides of",
        ),
        ([good, 3], TypeError, r"images\[1\]: got a int, expected a path, "),
        (PIXELS[..., 0], ValueError, r"images\[0\]: got uint8 \[40, 61\], expected uint8 \[H, W, 3\]"),
        (PIXELS.astype(np.float32), ValueError, r"got float32 \[40, 61, 3\], expected uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError, r"got torch.uint8 \[3, 8, 8\], expected uint8"),
    ):
        with pytest.raises(error, match=message) as caught:
            scf.preprocess(images, size=16)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="too_large: 61 x 40 pixels, the limit is 100"):
        scf.preprocess(good, max_pixels=100)
