from __future__ import annotations

import gc
import io
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from scenarioclip_fast.data.decode import (
    DecodeError,
    Decoder,
    TorchDecoder,
    decode_checked,
    decode_with_pillow,
    make_decoder,
    probe,
)
from scenarioclip_fast.errors import MissingDependencyError


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Smooth colour with edges and noise, sensitive to chroma upsampling and the inverse DCT."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(height * 1000 + width)
    channels = [128 + 90 * np.sin(x / 7 + c) * np.cos(y / (5 + c)) + 60 * ((x // 9 + y // 6) % 2) for c in range(3)]
    array = np.stack(channels, -1) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(array.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pillow(data: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def rotated_by_exif(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed rotated by 90 degrees
    return encoded(image, exif=exif.tobytes())


def with_extra_bytes(data: bytes) -> bytes:
    end = data.rindex(b"\xff\xd9")
    return data[:end] + b"\x00\x11\x22" + data[end:]


GOOD = {
    "4:2:0": encoded(picture(48, 64), subsampling=2),
    "4:2:2": encoded(picture(48, 64), subsampling=1),
    "4:4:4": encoded(picture(48, 64), subsampling=0, quality=95),
    "odd": encoded(picture(37, 53), subsampling=2),
    "one pixel": encoded(picture(1, 1)),
    "one row": encoded(picture(1, 65), subsampling=2),
    "grey": encoded(picture(33, 31, "L")),
    "progressive": encoded(picture(41, 39), progressive=True, subsampling=2),
    "restarts": encoded(picture(40, 56), restart_marker_blocks=2),
    "CMYK": encoded(picture(24, 40, "CMYK")),
    "EXIF rotation": rotated_by_exif(picture(30, 50)),
    "extra bytes before the end": with_extra_bytes(encoded(picture(40, 40))),
    "data after the end": encoded(picture(40, 40)) + b"\x00" * 100 + b"trailer",
    "PNG": encoded(picture(20, 30), "PNG"),
    "PNG palette": encoded(picture(20, 30, "P"), "PNG"),
    "PNG alpha": encoded(picture(20, 30, "RGBA"), "PNG"),
    "WebP": encoded(picture(20, 30), "WEBP", lossless=True),
}
WHOLE = encoded(picture(90, 120), subsampling=2)


def with_a_gap(data: bytes) -> bytes:
    """Remove entropy-coded data in the middle; the header and end marker stay intact."""
    middle = len(data) // 2
    return data[:middle] + data[middle + 400 :]


def with_size(data: bytes, height: int, width: int) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :]


def huge_png() -> bytes:
    data = bytearray(encoded(picture(4, 4), "PNG"))
    data[16:24] = (20000).to_bytes(4, "big") * 2
    return bytes(data)


BAD = {
    "empty": (b"", "not_an_image"),
    "text": (b"hello, I am a picture", "not_an_image"),
    "start only": (b"\xff\xd8\xff", "truncated"),
    "truncated in the header": (WHOLE[:100], "truncated"),
    "truncated in the data": (WHOLE[: len(WHOLE) // 2], "truncated"),
    "truncated before the end marker": (WHOLE[:-2], "truncated"),
    "second half zeroed": (WHOLE[: len(WHOLE) // 2] + bytes(len(WHOLE) // 2), "truncated"),
    "damaged segment": (WHOLE[:20] + b"\0" * 20 + WHOLE[40:], "corrupt"),
    "bomb": (with_size(WHOLE, 20000, 20000), "too_large"),
    "no height": (with_size(WHOLE, 0, 20), "corrupt"),
    "PNG bomb": (huge_png(), "too_large"),
    "PNG cut": (GOOD["PNG"][:-30], "truncated"),
}


@pytest.fixture(params=["torch", "torch, one thread", "dali"])
def decoder(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    name, _, one = request.param.partition(",")
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    decoder = make_decoder(name, "cpu", threads=1 if one else 2)
    yield decoder
    decoder.close()


def test_pixels_equal_pillows(decoder: Decoder) -> None:
    decoded = decoder.decode(list(GOOD.values()))
    for name, data, image in zip(GOOD, GOOD.values(), decoded, strict=True):
        assert isinstance(image, Tensor), (name, image)
        assert image.dtype == torch.uint8 and image.is_contiguous()
        assert torch.equal(image, pillow(data)), name


def test_bad_images_are_reported_and_do_not_affect_others(decoder: Decoder) -> None:
    good = list(GOOD.values())
    for name, (data, reason) in BAD.items():
        before, error, after = decoder.decode([good[0], data, good[3]])
        assert isinstance(error, DecodeError), name
        assert error.reason == reason, (name, error)
        assert isinstance(before, Tensor) and torch.equal(before, pillow(good[0])), name
        assert isinstance(after, Tensor) and torch.equal(after, pillow(good[3])), name
    assert decoder.decode([]) == []


def test_damage_that_only_the_decoder_detects(decoder: Decoder) -> None:
    """The header is intact, so the probe passes; libjpeg-turbo warns, DALI fails or repairs the image."""
    no_tables = WHOLE.replace(b"\xff\xdb", b"\xff\xfe")  # the quantisation tables become comments
    images = [GOOD["4:2:0"], no_tables, with_a_gap(WHOLE), GOOD["odd"]]
    for _ in range(2):  # a failed run must not affect the next one
        first, broken, damaged, last = decoder.decode(images)
        assert isinstance(broken, DecodeError)
        assert broken.reason in ("corrupt", "undecodable")
        assert "Quantization table" in broken.detail or "Failed to decode" in broken.detail
        assert isinstance(damaged, DecodeError) or isinstance(decoder, dali_decoder())
        assert isinstance(first, Tensor) and torch.equal(first, pillow(GOOD["4:2:0"]))
        assert isinstance(last, Tensor) and torch.equal(last, pillow(GOOD["odd"]))


def dali_decoder() -> type:
    from scenarioclip_fast.data.decode.dali_decoder import DaliDecoder

    return DaliDecoder


def test_results_outlive_the_next_call(decoder: Decoder) -> None:
    (first,) = decoder.decode([GOOD["4:4:4"]])
    assert isinstance(first, Tensor)
    kept = first.clone()
    for _ in range(3):
        decoder.decode([GOOD["4:2:0"], GOOD["grey"]])
    assert torch.equal(first, kept)


def test_pixel_limit_is_configurable(decoder: Decoder) -> None:
    limited = make_decoder("dali" if isinstance(decoder, dali_decoder()) else "torch", threads=1, max_pixels=48 * 64)
    fits, large, grown = limited.decode([GOOD["4:2:0"], WHOLE, encoded(picture(60, 60), "WEBP")])
    limited.close()
    assert isinstance(fits, Tensor)
    for error in (large, grown):
        assert isinstance(error, DecodeError) and error.reason == "too_large" and "3072" in error.detail


def test_a_decompression_bomb_is_rejected_before_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = BAD["bomb"][0]
    with pytest.raises(DecodeError, match="20000 x 20000 pixels"):
        probe(bomb)
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *a, **k: pytest.fail("decoded"))
    decoder = TorchDecoder(threads=1)
    (error,) = decoder.decode([bomb])
    assert isinstance(error, DecodeError)


def test_decode_checked_raises_for_a_bad_image(decoder: Decoder) -> None:
    assert torch.equal(decode_checked(decoder, GOOD["odd"]), pillow(GOOD["odd"]))
    with pytest.raises(DecodeError, match="truncated"):
        decode_checked(decoder, BAD["truncated in the data"][0])


def test_only_supported_formats_are_opened(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats are detected by content, and Pillow would run Ghostscript on EPS."""
    from PIL import EpsImagePlugin

    eps = encoded(picture(20, 30), "EPS")
    others = [encoded(picture(20, 30), kind) for kind in ("PPM", "PCX", "ICO")]
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was run"))
    for error in decoder.decode([eps, *others]):
        assert isinstance(error, DecodeError)
        assert str(error) == "not_an_image: none of JPEG, PNG, WEBP, BMP, GIF, TIFF"
    kinds = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
    assert all(isinstance(image, Tensor) for image in decoder.decode([encoded(picture(20, 30), k) for k in kinds]))


def test_a_bomb_rejected_by_pillow_is_too_large() -> None:
    bomb = bytearray(encoded(picture(4, 4), "BMP"))
    bomb[18:26] = (20000).to_bytes(4, "little") * 2
    with pytest.raises(DecodeError, match=r"too_large: .*400000000 pixels"):
        decode_with_pillow(bytes(bomb))


def test_probe_skips_thumbnails_and_fill_bytes() -> None:
    thumbnail = encoded(picture(16, 16))
    comment = b"\xff\xfe" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    data = WHOLE[:2] + comment + b"\xff\xff" + WHOLE[2:]
    header = probe(data)
    assert header is not None and (header.height, header.width, header.plain) == (90, 120, True)
    # The thumbnail's end marker is not the image's.
    with pytest.raises(DecodeError, match="without an end"):
        probe(data[:-40])
    assert probe(b"RIFF....WEBP") is None


def test_dali_run_size_is_bounded() -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from scenarioclip_fast.data.decode.dali_decoder import DaliDecoder

    decoder = DaliDecoder(threads=1, run_pixels=2 * 48 * 64)
    runs: list[int] = []
    run = decoder._run

    def counted(images: list[bytes]) -> list[Tensor]:
        runs.append(len(images))
        return run(images)

    decoder._run = counted  # type: ignore[method-assign]
    same = [GOOD["4:2:0"]] * 5
    for data, image in zip([*same, WHOLE], decoder.decode([*same, WHOLE]), strict=True):
        assert isinstance(image, Tensor) and torch.equal(image, pillow(data))
    assert runs == [2, 2, 1, 1]
    decoder.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_dali_memory_is_bounded_and_released() -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from scenarioclip_fast.data.decode.dali_decoder import DaliDecoder

    images = [encoded(picture(450 + 20 * i, 600)) for i in range(4)]
    pixels = 3 * sum((450 + 20 * i) * 600 for i in range(4))
    warm, rounds = 20, 60
    decoder = DaliDecoder(threads=2)
    for k in range(warm + rounds):
        if k == warm:  # by now, the allocator has created one pool per thread
            before = resident_bytes()
        decoder.decode(images[k % 4 :] + images[: k % 4])
    # A leaked run would keep all its pixels; a third of that is allowed for the rest of the process.
    assert resident_bytes() - before < rounds * pixels / 3
    pipeline = weakref.ref(decoder._pipeline)
    decoder.close()
    decoder.close()
    gc.collect()
    assert pipeline() is None


def test_named_decoders_never_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("nvidia.dali", "simplejpeg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match="dali"):
        make_decoder("dali")
    with pytest.raises(MissingDependencyError, match="simplejpeg"):
        make_decoder("torch")
    with pytest.raises(ValueError, match="decoder: got 'pil'"):
        make_decoder("pil")


def test_auto_on_a_cpu_is_the_torch_decoder() -> None:
    decoder = make_decoder("auto", "cpu", threads=1)
    assert isinstance(decoder, TorchDecoder)
    assert torch.equal(decode_with_pillow(GOOD["CMYK"]), pillow(GOOD["CMYK"]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "dali"])
def test_decoders_on_a_gpu(name: str) -> None:
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    decoder = make_decoder(name, "cuda")
    decoded = decoder.decode([*GOOD.values(), *(data for data, _ in BAD.values())])
    decoder.close()
    for (kind, data), image in zip(GOOD.items(), decoded, strict=False):
        assert isinstance(image, Tensor) and image.is_cuda, kind
        # nvJPEG's inverse DCT and colour conversion round differently than libjpeg-turbo's.
        limit = 0 if name == "torch" else 3
        assert (image.cpu().int() - pillow(data).int()).abs().max() <= limit, kind
    assert all(isinstance(x, DecodeError) for x in decoded[len(GOOD) :])


@pytest.mark.gpu
def test_dali_releases_gpu_memory() -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")

    def used_after(images: list[bytes]) -> int:
        decoder = make_decoder("dali", "cuda")
        assert all(isinstance(image, Tensor) for image in decoder.decode(images))
        decoder.close()
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free

    before = used_after([WHOLE])  # includes the memory of the libraries
    large = encoded(picture(3000, 4000))
    assert used_after([large] * 24) - before < 12 * 3 * 3000 * 4000  # half of the pixels, with a margin
