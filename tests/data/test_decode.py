from __future__ import annotations

import gc
import io
import os
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from scenarioclip_fast.data.config import DecoderName
from scenarioclip_fast.data.decode import (
    DECODERS,
    DecodeError,
    Decoder,
    TorchDecoder,
    decode_checked,
    decode_with_pillow,
    make_decoder,
    probe,
)
from scenarioclip_fast.data.decode.base import thread_count
from scenarioclip_fast.data.decode.dali_decoder import DaliDecoder
from scenarioclip_fast.data.decode.nvimgcodec_decoder import NvimgcodecDecoder
from scenarioclip_fast.data.decode.run_decoder import RunDecoder
from scenarioclip_fast.data.decode.torchvision_decoder import TorchvisionDecoder
from scenarioclip_fast.errors import MissingDependencyError, UserError


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


def with_padding(data: bytes) -> bytes:
    end = data.rindex(b"\xff\xd9")
    return data[:end] + bytes(3) + data[end:]


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
    "padding before the end": with_padding(encoded(picture(40, 40))),
    "data after the end": encoded(picture(40, 40)) + b"\x00" * 100 + b"trailer",
    "PNG": encoded(picture(20, 30), "PNG"),
    "PNG palette": encoded(picture(20, 30, "P"), "PNG"),
    "PNG alpha": encoded(picture(20, 30, "RGBA"), "PNG"),
    "WebP": encoded(picture(20, 30), "WEBP", lossless=True),
}
WHOLE = encoded(picture(90, 120), subsampling=2)
NO_TABLES = WHOLE.replace(b"\xff\xdb", b"\xff\xfe")  # the quantisation tables become comments


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
    "damaged segment": (WHOLE.replace(b"\xff\xdb\0\x43", b"\xff\xdb\xff\x43"), "truncated"),
    "bomb": (with_size(WHOLE, 20000, 20000), "too_large"),
    "no height": (with_size(WHOLE, 0, 20), "corrupt"),
    "PNG bomb": (huge_png(), "too_large"),
    "PNG cut": (GOOD["PNG"][:-30], "truncated"),
}


def skip_missing(name: str) -> None:
    pytest.importorskip(DECODERS[name].module, reason=f"{DECODERS[name].library} is not installed")


@pytest.fixture(params=["torch", "torch, one thread", "dali", "nvimgcodec"])
def decoder(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    name, _, one = request.param.partition(",")
    skip_missing(name)
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
    """The header is intact, so the probe passes; libjpeg-turbo warns, the libraries fail or repair the image."""
    images = [GOOD["4:2:0"], NO_TABLES, with_a_gap(WHOLE), GOOD["odd"]]
    for _ in range(2):  # a failed run must not affect the next one
        first, broken, damaged, last = decoder.decode(images)
        assert isinstance(broken, DecodeError)
        assert broken.reason in ("corrupt", "undecodable")
        assert "Quantization table" in broken.detail or "Failed to decode" in broken.detail
        assert isinstance(damaged, DecodeError) or isinstance(decoder, RunDecoder)
        assert isinstance(first, Tensor) and torch.equal(first, pillow(GOOD["4:2:0"]))
        assert isinstance(last, Tensor) and torch.equal(last, pillow(GOOD["odd"]))


def test_results_outlive_the_next_call(decoder: Decoder) -> None:
    (first,) = decoder.decode([GOOD["4:4:4"]])
    assert isinstance(first, Tensor)
    kept = first.clone()
    for _ in range(3):
        decoder.decode([GOOD["4:2:0"], GOOD["grey"]])
    assert torch.equal(first, kept)


def test_pixel_limit_is_configurable(decoder: Decoder) -> None:
    limited = make_decoder(decoder.name, threads=1, max_pixels=48 * 64)
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


@pytest.mark.parametrize("kind", [DaliDecoder, NvimgcodecDecoder])
def test_run_size_is_bounded(kind: type[DaliDecoder] | type[NvimgcodecDecoder]) -> None:
    skip_missing(kind.name)
    decoder = kind(threads=1, run_pixels=2 * 48 * 64)
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


def test_nvimgcodec_decodes_a_damaged_image_of_a_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_missing("nvimgcodec")
    decoder = NvimgcodecDecoder(threads=1)
    runs: list[int] = []
    run = decoder._run
    monkeypatch.setattr(decoder, "_run", lambda images: (runs.append(len(images)), run(images))[1])  # type: ignore[func-returns-value]
    good, error, last = decoder.decode([WHOLE, NO_TABLES, GOOD["odd"]])
    assert isinstance(good, Tensor) and isinstance(last, Tensor) and runs == [3]
    assert str(error) == "undecodable: nvImageCodec: Failed to decode the image; stderr has the cause"
    decoder.close()
    decoder.close()


class Backend:
    """Stands for a library: decodes with Pillow, and counts its runs. Plain JPEGs only, and NO_TABLES is damaged."""

    def __init__(self, fail: int = 0) -> None:
        self.runs: list[int] = []
        self.fail = fail  # this many runs, whatever the images

    def decode(self, images: list[bytes]) -> list[Tensor | None]:
        assert images
        self.runs.append(len(images))
        self.fail -= 1
        if self.fail >= 0:
            raise RuntimeError("out of streams\nstack trace")
        return [None if data == NO_TABLES else self.pixels(data) for data in images]

    def pixels(self, data: bytes) -> Tensor:
        image = Image.open(io.BytesIO(data))
        assert image.format == "JPEG" and image.mode in ("L", "RGB"), (image.format, image.mode)
        return torch.from_numpy(np.array(image.convert("RGB")))

    def decode_or_raise(self, images: list[bytes]) -> list[Tensor]:
        decoded = [image for image in self.decode(images) if image is not None]
        if len(decoded) < len(images):
            raise RuntimeError("Error when decoding, encountered:\n\nno quantisation tables :\nstack trace")
        return decoded


def fake_dali(backend: Backend) -> ModuleType:
    """A module that imitates the part of DALI that the decoder uses."""

    class Pipeline:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.invalid = False

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...
        def build(self) -> None: ...
        def set_outputs(self, *_: Any) -> None: ...

        def feed_input(self, name: str, images: list[Any]) -> None:
            assert not self.invalid
            self.fed = [image.tobytes() for image in images]

        def run(self) -> tuple[Any]:
            self.invalid = True
            decoded = backend.decode_or_raise(self.fed)
            self.invalid = False
            return (SimpleNamespace(at=lambda i: decoded[i].numpy()),)

    fake: Any = ModuleType("nvidia.dali")
    fake.__version__, fake.Pipeline = "9.9", Pipeline
    fake.types = SimpleNamespace(UINT8=0, RGB=0)
    fake.fn = SimpleNamespace(external_source=lambda **_: 0, decoders=SimpleNamespace(image=lambda *_, **__: 0))
    fake.backend = SimpleNamespace(ReleaseUnusedMemory=lambda: None)
    return fake


def fake_nvimgcodec(backend: Backend) -> ModuleType:
    fake: Any = ModuleType("nvidia.nvimgcodec")
    fake.__version__, fake.NVIMGCODEC_DEVICE_CPU_ONLY = "9.9", -2
    fake.CodeStream = lambda data: data
    fake.Backend = fake.DecodeParams = lambda *_, **__: None
    fake.BackendKind = fake.ColorSpec = fake.SampleFormat = SimpleNamespace(CPU_ONLY=0, SRGB=0, I_RGB=0)

    class FakeDecoder:
        def __init__(self, **options: Any) -> None:
            assert "fancy_upsampling=1" in options["options"]

        def decode(self, images: list[bytes], params: Any) -> list[Any]:
            return [None if image is None else image.numpy() for image in backend.decode(images)]

    fake.Decoder = FakeDecoder
    return fake


def fake_torchvision(backend: Backend) -> ModuleType:
    def decode_jpeg(encoded: list[Tensor], *, mode: str, device: torch.device) -> list[Tensor]:
        assert mode == "RGB" and all(data.dtype == torch.uint8 and data.ndim == 1 for data in encoded)
        images = backend.decode_or_raise([data.numpy().tobytes() for data in encoded])
        return [image.permute(2, 0, 1).contiguous() for image in images]

    fake: Any = ModuleType("torchvision.io")
    fake.decode_jpeg, fake.ImageReadMode = decode_jpeg, SimpleNamespace(RGB="RGB")
    return fake


def fake_decoder(name: str, backend: Backend, monkeypatch: pytest.MonkeyPatch, **options: Any) -> RunDecoder:
    """The decoder `name` on the CPU with an imitation of its library."""
    module = {"dali": fake_dali, "nvimgcodec": fake_nvimgcodec, "torchvision": fake_torchvision}[name](backend)
    package: Any = ModuleType("torchvision")
    package.__version__ = "9.9"
    for found in (module, package):
        monkeypatch.setitem(sys.modules, found.__name__, found)
    if name != "torchvision":
        return {"dali": DaliDecoder, "nvimgcodec": NvimgcodecDecoder}[name](threads=1, **options)
    decoder = TorchvisionDecoder("cuda", **options)
    decoder.device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    return decoder


LIBRARIES = pytest.mark.parametrize("name", ["dali", "nvimgcodec", "torchvision"])


@LIBRARIES
def test_a_library_gets_only_plain_jpegs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend()
    decoder = fake_decoder(name, backend, monkeypatch)
    assert decoder.decode([]) == [] and backend.runs == []
    for (kind, data), image in zip(GOOD.items(), decoder.decode(list(GOOD.values())), strict=True):
        assert isinstance(image, Tensor), (kind, image)
        assert image.dtype == torch.uint8 and image.is_contiguous()
        assert torch.equal(image, pillow(data)), kind
    assert backend.runs == [sum(header.plain for data in GOOD.values() if (header := probe(data)))]
    decoder.close()


@LIBRARIES
def test_one_bad_image_affects_only_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend()
    decoder = fake_decoder(name, backend, monkeypatch)
    bad = [*(data for data, _ in BAD.values()), NO_TABLES]
    mixed = [image for data in bad for image in (GOOD["odd"], data, GOOD["CMYK"])]
    for _ in range(2):
        decoded = decoder.decode(mixed)
        assert all(isinstance(image, DecodeError) for image in decoded[1::3])
        assert [error.reason for error in decoded[1:-3:3]] == [reason for _, reason in BAD.values()]  # type: ignore[union-attr]
        assert "undecodable: " + DECODERS[name].library in str(decoded[-2])
        for first, last in zip(decoded[0::3], decoded[2::3], strict=True):
            assert isinstance(first, Tensor) and torch.equal(first, pillow(GOOD["odd"]))
            assert isinstance(last, Tensor) and torch.equal(last, pillow(GOOD["CMYK"]))
    # nvImageCodec reports each image; the others repeat the run image by image.
    plain = len(bad) + 1
    assert backend.runs == ([plain] if name == "nvimgcodec" else [plain] + [1] * plain) * 2
    assert all(isinstance(image, DecodeError) for image in decoder.decode(bad))
    decoder.close()


@LIBRARIES
def test_a_failed_run_is_repeated_image_by_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = fake_decoder(name, backend := Backend(fail=2), monkeypatch)
    error, image = decoder.decode([GOOD["odd"], GOOD["grey"]])
    assert str(error) == f"undecodable: {decoder.library}: out of streams"
    assert isinstance(image, Tensor) and backend.runs == [2, 1, 1]
    decoder.close()


@LIBRARIES
def test_runs_and_images_are_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = fake_decoder(name, backend := Backend(), monkeypatch, run_pixels=2 * 48 * 64, max_pixels=90 * 120)
    large = encoded(picture(90, 121))
    *images, error = decoder.decode([GOOD["4:2:0"]] * 3 + [WHOLE, large])
    assert isinstance(error, DecodeError) and error.reason == "too_large"
    assert all(isinstance(image, Tensor) for image in images) and backend.runs == [2, 1, 1]


@LIBRARIES
def test_check_decodes_a_small_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = fake_decoder(name, backend := Backend(), monkeypatch)
    decoder.check()
    backend.fail = 1
    with pytest.raises(RuntimeError, match=r"^out of streams$"):
        decoder.check()
    monkeypatch.setattr(backend, "pixels", lambda data: pillow(data).flip(-1).contiguous())
    with pytest.raises(RuntimeError, match="wrong pixels"):
        decoder.check()


def test_named_decoders_never_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in DECODERS.values():
        monkeypatch.setitem(sys.modules, kind.module, None)
        with pytest.raises(MissingDependencyError, match=rf"pip install 'scenarioclip-fast\[{extra(kind.name)}\]'"):
            make_decoder(kind.name, "cuda")
    with pytest.raises(MissingDependencyError, match="simplejpeg"):
        make_decoder("auto", "cuda")
    with pytest.raises(
        ValueError, match="decoder: got 'pil', expected one of auto, dali, nvimgcodec, torchvision, torch"
    ):
        make_decoder("pil")
    with pytest.raises(UserError, match="torchvision decodes on a GPU, got the device cpu: choose another decoder"):
        make_decoder("torchvision", "cpu")


def extra(name: str) -> str:
    return "train" if name == "torch" else name


def test_the_config_names_the_decoders() -> None:
    assert get_args(DecoderName) == ("auto", *DECODERS)


def start(monkeypatch: pytest.MonkeyPatch, **problems: Exception | None) -> Decoder:
    """The decoder "auto" of a GPU where each library raises its problem, if it has one; nothing touches the GPU."""

    def opens(self: RunDecoder) -> None:
        if (problem := problems.get(self.name)) is not None:
            raise problem

    for kind in (DaliDecoder, NvimgcodecDecoder, TorchvisionDecoder):
        monkeypatch.setattr(kind, "_open", opens)
        monkeypatch.setattr(kind, "close", lambda self: None)
        monkeypatch.setitem(sys.modules, kind.module, SimpleNamespace(__version__="9.9"))  # type: ignore[arg-type]
    monkeypatch.setattr(RunDecoder, "check", lambda self: None)
    return make_decoder("auto", "cuda", threads=2)


def missing(name: str) -> MissingDependencyError:
    error = MissingDependencyError(f"{name} is missing")
    error.__cause__ = ModuleNotFoundError(name="nvidia" if name == "dali" else DECODERS[name].module)
    return error


@pytest.mark.parametrize("name", DECODERS)
def test_threads_below_one_are_rejected(name: str) -> None:
    skip_missing(name)
    with pytest.raises(ValueError, match=r"^threads: got -1, expected at least 1"):
        make_decoder(name, threads=-1)


@pytest.mark.parametrize(("cores", "ranks", "expected"), [(64, "8", 8), (64, "", 16), (4, "8", 1), (8, "0", 8)])
def test_ranks_of_a_host_share_its_cores(
    cores: int, ranks: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert thread_count(None) == expected and thread_count(5) == 5
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert thread_count(None) == min(cores, 16)


def test_threads_share_a_decoder(decoder: Decoder) -> None:
    """DALI hangs and nvImageCodec aborts if several threads call them at a time."""
    images = [encoded(picture(20 + i, 30 + i)) for i in range(8)]
    expected = [decode_with_pillow(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        for decoded in pool.map(decoder.decode, [images] * 24):
            assert all(torch.equal(x, y) for x, y in zip(decoded, expected, strict=True))  # type: ignore[arg-type]


def test_auto_on_a_gpu_is_the_first_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {name: missing(name) for name in ("dali", "nvimgcodec", "torchvision")}
    wrong_cuda = RuntimeError("CUDA driver version is insufficient\ntrace")
    assert str(start(monkeypatch)) == "dali (DALI 9.9 on cuda)"
    decoder = start(monkeypatch, dali=absent["dali"])
    assert (
        decoder.name == "nvimgcodec" and str(decoder) == "nvimgcodec (nvImageCodec 9.9 on cuda; DALI is not installed)"
    )
    broken = {"dali": absent["dali"], "nvimgcodec": wrong_cuda}
    assert str(start(monkeypatch, **broken)) == (
        "torchvision (torchvision 9.9 on cuda; DALI is not installed; "
        "nvImageCodec does not start on cuda: CUDA driver version is insufficient)"
    )
    assert str(start(monkeypatch, **absent)) == (
        "torch (libjpeg-turbo on 2 threads; DALI, nvImageCodec and torchvision are not installed)"
    )
    unloadable = MissingDependencyError("does not load")
    unloadable.__cause__ = RuntimeError("operator torchvision::nms does not exist")
    assert str(start(monkeypatch, **absent | {"torchvision": unloadable})) == (
        "torch (libjpeg-turbo on 2 threads; DALI and nvImageCodec are not installed; "
        "torchvision does not load: operator torchvision::nms does not exist)"
    )


def test_a_named_decoder_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch)  # replaces the libraries

    closed: list[str] = []

    def fails(self: RunDecoder) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(RunDecoder, "check", fails)
    for kind in (DaliDecoder, NvimgcodecDecoder, TorchvisionDecoder):
        monkeypatch.setattr(kind, "close", lambda self: closed.append(self.name))
    for kind in (DaliDecoder, NvimgcodecDecoder, TorchvisionDecoder):
        with pytest.raises(UserError, match=f"^decoder: {kind.library} does not start on cuda:0: no kernel image$"):
            make_decoder(kind.name, "cuda:0")
    assert closed == ["dali", "nvimgcodec", "torchvision"]
    assert str(make_decoder("auto", "cuda", threads=1)).startswith("torch (libjpeg-turbo on one thread; DALI does not")


def test_auto_on_a_cpu_is_the_torch_decoder() -> None:
    decoder = make_decoder("auto", "cpu", threads=1)
    assert isinstance(decoder, TorchDecoder) and decoder.name == "torch"
    assert str(decoder) == "torch (libjpeg-turbo on one thread)"
    assert torch.equal(decode_with_pillow(GOOD["CMYK"]), pillow(GOOD["CMYK"]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_on_a_gpu(name: str) -> None:
    skip_missing(name)
    decoder = make_decoder(name, "cuda")
    decoded = decoder.decode([*GOOD.values(), *(data for data, _ in BAD.values())])
    decoder.close()
    for (kind, data), image in zip(GOOD.items(), decoded, strict=False):
        assert isinstance(image, Tensor) and image.is_cuda, kind
        apart = (image.cpu().int() - pillow(data).int()).abs()
        if name == "torchvision":  # does not interpolate chroma; without it libjpeg-turbo is off by up to 2.8 here
            assert apart.float().mean() <= 5, kind
            continue
        # nvJPEG's inverse DCT and colour conversion round differently than libjpeg-turbo's.
        assert apart.max() <= (0 if name == "torch" else 3), kind
    assert all(isinstance(x, DecodeError) for x in decoded[len(GOOD) :])


@pytest.mark.gpu
@pytest.mark.parametrize("name", DECODERS)
def test_results_on_a_gpu_outlive_the_next_calls(name: str) -> None:
    skip_missing(name)
    decoder = make_decoder(name, "cuda")
    (first,) = decoder.decode([WHOLE])
    assert isinstance(first, Tensor)
    kept = first.cpu()
    for _ in range(3):
        decoder.decode([encoded(picture(90, 120, "L"))] * 4)
    decoder.close()
    assert torch.equal(first.cpu(), kept)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dali", "nvimgcodec"])
def test_gpu_memory_is_released(name: str) -> None:
    skip_missing(name)

    def used_after(images: list[bytes]) -> int:
        decoder = make_decoder(name, "cuda")
        assert all(isinstance(image, Tensor) for image in decoder.decode(images))
        decoder.close()
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free

    before = used_after([WHOLE])  # includes the memory of the libraries
    large = encoded(picture(3000, 4000))
    assert used_after([large] * 24) - before < 12 * 3 * 3000 * 4000  # half of the pixels, with a margin
