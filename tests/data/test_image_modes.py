"""Every mode in which Pillow opens a supported format is converted by its range, or rejected by name."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms

from scenarioclip_fast.data.decode import DecodeError, decode_with_pillow, pillow_to_rgb

HEIGHT, WIDTH = 6, 8
_ramp = np.linspace(0, 65535, HEIGHT * WIDTH).round().astype(np.uint16).reshape(HEIGHT, WIDTH)
GREY16 = _ramp  # from black to white
RGB16 = np.stack([_ramp, _ramp[::-1], 65535 - _ramp], -1)
ALPHA16 = _ramp[:, ::-1, None]
GREY8, RGB8, ALPHA8 = ((x >> 8).astype(np.uint8) for x in (GREY16, RGB16, ALPHA16))
LITTLE, BIG = "<", ">"
COMPRESSION, PHOTOMETRIC, EXTRA, FORMAT, SUBSAMPLING = 259, 262, 338, 339, 530  # TIFF tags
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK, YCBCR, LAB = 0, 1, 2, 5, 6, 8  # photometric interpretations


def grey(pixels: NDArray[Any]) -> NDArray[Any]:
    return np.repeat(pixels[..., None], 3, -1)


def by_range(pixels: NDArray[Any], top: int = 65535) -> NDArray[np.uint8]:
    return np.rint(pixels.astype(np.float64) * 255 / top).astype(np.uint8)


def packed12(pixels: NDArray[np.uint16]) -> bytes:
    return b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in (pixels >> 4).reshape(-1, 2))


def tiff(
    pixels: NDArray[Any] | bytes, bits: int, tags: dict[int, Any], *, order: str = LITTLE, planar: bool = False
) -> bytes:
    """A TIFF of one strip, or of one per plane, deflated if the tags say so. `pixels`: [H, W], [H, W, C] or packed."""
    samples = 1
    if not isinstance(pixels, bytes):
        samples = pixels.shape[2] if pixels.ndim == 3 else 1
        pixels = pixels.astype(pixels.dtype.newbyteorder(order))  # type: ignore[arg-type]
    planes = [pixels[..., c] for c in range(samples)] if planar else [pixels]  # type: ignore[call-overload]
    strips = [plane if isinstance(plane, bytes) else np.ascontiguousarray(plane).tobytes() for plane in planes]
    if tags.get(COMPRESSION) == 8:
        strips = [zlib.compress(strip) for strip in strips]
    at = np.cumsum([8, *map(len, strips)])
    body = b"".join(strips).ljust(at[-1] - 8 + at[-1] % 2, b"\0")
    entries = {256: WIDTH, 257: HEIGHT, 258: [bits] * samples, COMPRESSION: 1, 273: at[:-1].tolist(), 277: samples}
    entries |= {278: HEIGHT, 279: [*map(len, strips)], 284: 2 if planar else 1} | tags
    ifd, tail = struct.pack(order + "H", len(entries)), b""
    after = 8 + len(body) + 6 + 12 * len(entries)
    for tag, value in sorted(entries.items()):
        values = value if isinstance(value, list) else [value]
        raw = struct.pack(f"{order}{len(values)}H", *values)
        if len(raw) > 4:
            raw, tail = struct.pack(order + "I", after + len(tail)), tail + raw
        ifd += struct.pack(order + "HHI", tag, 3, len(values)) + raw.ljust(4, b"\0")
    start = b"II*\0" if order == LITTLE else b"MM\0*"
    return start + struct.pack(order + "I", 8 + len(body)) + body + ifd + bytes(4) + tail


def png(pixels: NDArray[Any], bits: int, colour: int, extra: bytes = b"") -> bytes:
    """`pixels`: [H, W] or [H, W, C]; fewer than 8 bits are packed."""
    if bits < 8:
        unpacked = np.unpackbits(pixels.astype(np.uint8)[..., None], axis=-1)[..., -bits:]
        pixels = np.packbits(unpacked.reshape(HEIGHT, -1), axis=-1)
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(HEIGHT, -1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def low(bits: int) -> NDArray[np.uint8]:
    return (GREY8 >> (8 - bits)).astype(np.uint8)


def with_alpha(pixels: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate(
        [pixels if pixels.ndim == 3 else pixels[..., None], ALPHA8 if pixels.itemsize == 1 else ALPHA16], -1
    )


PALETTE = np.random.default_rng(0).integers(0, 256, (16, 3), dtype=np.uint8)
PLTE, TRNS = chunk(b"PLTE", PALETTE.tobytes()), chunk(b"tRNS", bytes(range(16)))
INVERTED = np.concatenate([255 - RGB8, np.zeros_like(ALPHA8)], -1)  # CMYK without black
DEFLATED = {COMPRESSION: 8}
IMAGE, OTHER = Image.fromarray(RGB8), Image.fromarray(RGB8[::-1].copy())
FRAMES = {"save_all": True, "append_images": [OTHER]}
PALETTED = Image.fromarray(low(4), "P")
PALETTED.putpalette(PALETTE.tobytes())

# 16-bit grey is rounded to the nearest level; of 16-bit colour, Pillow drops the low byte.
EXACT: dict[str, tuple[bytes, NDArray[Any]]] = {
    **{f"PNG grey {bits}": (png(low(bits), bits, 0), grey(by_range(low(bits), 2**bits - 1))) for bits in (1, 2, 4, 8)},
    "PNG grey 16": (png(GREY16, 16, 0), grey(by_range(GREY16))),
    "PNG grey 16, transparent": (png(GREY16, 16, 0, chunk(b"tRNS", b"\0\0")), grey(by_range(GREY16))),
    "PNG grey, transparent": (png(GREY8, 8, 0, chunk(b"tRNS", b"\0\0")), grey(GREY8)),
    "PNG grey, alpha": (png(with_alpha(GREY8), 8, 4), grey(GREY8)),
    "PNG grey 16, alpha": (png(with_alpha(GREY16), 16, 4), grey(GREY16 >> 8)),
    "PNG RGB": (png(RGB8, 8, 2), RGB8),
    "PNG RGB, transparent": (png(RGB8, 8, 2, chunk(b"tRNS", bytes(6))), RGB8),
    "PNG RGB 16": (png(RGB16, 16, 2), RGB16 >> 8),
    "PNG RGBA": (png(with_alpha(RGB8), 8, 6), RGB8),
    "PNG RGBA 16": (png(with_alpha(RGB16), 16, 6), RGB16 >> 8),
    **{f"PNG palette {bits}": (png(low(bits), bits, 3, PLTE), PALETTE[low(bits)]) for bits in (1, 2, 4)},
    "PNG palette 8": (png(low(4), 8, 3, PLTE), PALETTE[low(4)]),
    "PNG palette 8, transparent": (png(low(4), 8, 3, PLTE + TRNS), PALETTE[low(4)]),
    "APNG": (saved(IMAGE, "PNG", **FRAMES), RGB8),
    **{
        f"TIFF {name}{order}": (tiff(pixels, bits, tags, order=order, planar=planar), expected)
        for order in (LITTLE, BIG)
        for name, pixels, bits, tags, planar, expected in (
            ("grey", GREY8, 8, {PHOTOMETRIC: BLACK_IS_ZERO}, False, grey(GREY8)),
            ("grey, white is zero", GREY8, 8, {PHOTOMETRIC: WHITE_IS_ZERO}, False, grey(255 - GREY8)),
            ("grey 16", GREY16, 16, {PHOTOMETRIC: BLACK_IS_ZERO}, False, grey(by_range(GREY16))),
            ("grey, spare", with_alpha(GREY8), 8, {PHOTOMETRIC: 1, EXTRA: 0}, False, grey(GREY8)),
            ("grey, alpha", with_alpha(GREY8), 8, {PHOTOMETRIC: 1, EXTRA: 2}, False, grey(GREY8)),
            ("RGB", RGB8, 8, {PHOTOMETRIC: RGB}, False, RGB8),
            ("RGB planes", RGB8, 8, {PHOTOMETRIC: RGB}, True, RGB8),
            ("RGB 16", RGB16, 16, {PHOTOMETRIC: RGB}, False, RGB16 >> 8),
            ("RGBA", with_alpha(RGB8), 8, {PHOTOMETRIC: RGB, EXTRA: 2}, False, RGB8),
            ("RGBA 16", with_alpha(RGB16), 16, {PHOTOMETRIC: RGB, EXTRA: 2}, False, RGB16 >> 8),
            ("RGB, spare", with_alpha(RGB8), 8, {PHOTOMETRIC: RGB, EXTRA: 0}, False, RGB8),
            ("CMYK", INVERTED, 8, {PHOTOMETRIC: CMYK}, False, RGB8),
            ("CMYK 16", INVERTED * np.uint16(257), 16, {PHOTOMETRIC: CMYK}, False, RGB8),
            ("RGB 16 planes, deflated", RGB16, 16, {PHOTOMETRIC: RGB} | DEFLATED, True, RGB16 >> 8),
        )
    },
    # Pillow opens these in little-endian TIFFs only.
    "TIFF grey 16, white is zero": (tiff(GREY16, 16, {PHOTOMETRIC: WHITE_IS_ZERO}), grey(by_range(65535 - GREY16))),
    "TIFF grey 16, white is zero, deflated": (
        tiff(GREY16, 16, {PHOTOMETRIC: WHITE_IS_ZERO} | DEFLATED),
        grey(by_range(65535 - GREY16)),
    ),
    "TIFF grey 12": (tiff(packed12(GREY16), 12, {PHOTOMETRIC: BLACK_IS_ZERO}), grey(by_range(GREY16 >> 4, 4095))),
    "TIFF pages": (saved(IMAGE, "TIFF", **FRAMES), RGB8),
    "TIFF palette": (saved(PALETTED, "TIFF"), PALETTE[low(4)]),
    "TIFF bilevel": (saved(Image.fromarray(low(1) * 255).convert("1"), "TIFF"), grey(low(1) * 255)),
    "BMP": (saved(IMAGE, "BMP"), RGB8),
    "BMP grey": (saved(Image.fromarray(GREY8), "BMP"), grey(GREY8)),
    "BMP bilevel": (saved(Image.fromarray(low(1) * 255).convert("1"), "BMP"), grey(low(1) * 255)),
    "BMP palette": (saved(PALETTED, "BMP"), PALETTE[low(4)]),
    "BMP RGBA": (saved(Image.fromarray(with_alpha(RGB8)), "BMP"), RGB8),
    "GIF": (saved(PALETTED, "GIF"), PALETTE[low(4)]),
    "GIF, transparent": (saved(PALETTED, "GIF", transparency=3), PALETTE[low(4)]),
    "GIF grey": (saved(Image.fromarray(GREY8), "GIF"), grey(GREY8)),
    "GIF frames": (saved(PALETTED, "GIF", save_all=True, append_images=[PALETTED.rotate(180)]), PALETTE[low(4)]),
    "WebP": (saved(IMAGE, "WEBP", lossless=True), RGB8),
    "WebP RGBA": (saved(Image.fromarray(with_alpha(RGB8)), "WEBP", lossless=True, exact=True), RGB8),
    "WebP frames": (saved(IMAGE, "WEBP", lossless=True, **FRAMES), RGB8),
}
REJECTED = {
    "TIFF signed 8": (tiff(GREY8, 8, {PHOTOMETRIC: 1, FORMAT: 2}), "signed pixels"),
    "TIFF signed 16": (
        tiff(GREY16, 16, {PHOTOMETRIC: 1, FORMAT: 2}),
        r"32-bit integer pixels of unknown range \(Pillow mode I\)",
    ),
    "TIFF 32": (
        tiff(GREY16.astype(np.uint32), 32, {PHOTOMETRIC: 1}),
        "32-bit integer pixels of unknown range",
    ),
    "TIFF float": (
        tiff((GREY16 / 65535).astype(np.float32), 32, {PHOTOMETRIC: 1, FORMAT: 3}),
        "float pixels of unknown",
    ),
    "TIFF RGB 16 planes": (tiff(RGB16, 16, {PHOTOMETRIC: RGB}, planar=True), "16-bit colour in planes"),
    "TIFF CMYK 16 planes": (
        tiff(INVERTED * np.uint16(257), 16, {PHOTOMETRIC: CMYK}, planar=True),
        "16-bit colour in planes",
    ),
    "TIFF YCbCr": (
        tiff(RGB8, 8, {PHOTOMETRIC: YCBCR, SUBSAMPLING: [2, 1]}),
        "uncompressed YCbCr with subsampled chroma",
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_pixels_are_converted_by_their_range(name: str) -> None:
    data, expected = EXACT[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_with_pillow(data)
    assert torch.equal(decoded, torch.from_numpy(expected.astype(np.uint8)))


@pytest.mark.parametrize("name", REJECTED)
def test_pixels_of_unknown_range_are_rejected_by_name(name: str) -> None:
    data, cause = REJECTED[name]
    with pytest.raises(DecodeError, match=rf"^undecodable: {cause}.*: convert the image to unsigned 8-bit pixels$"):
        decode_with_pillow(data)


@pytest.mark.parametrize(
    "mode", ["L", "LA", "La", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "P", "PA"]
)
def test_images_of_every_mode_are_converted(mode: str) -> None:
    """As `preprocess` gets them, besides files."""
    image = Image.fromarray(RGB8 // 2 + np.uint8(64))  # in the gamut of LAB
    expected = np.array((image.convert("L") if mode in ("L", "LA", "La") else image).convert("RGB"))
    if mode == "LAB":
        profiles = (ImageCms.createProfile(space) for space in ("sRGB", "LAB"))
        image = ImageCms.profileToProfile(image, *profiles, outputMode=mode)  # type: ignore[arg-type, assignment]
    elif mode in ("P", "PA"):
        image, expected = PALETTED.convert(mode), PALETTE[low(4)]
    else:
        image = {"La": image.convert("LA"), "RGBa": image.convert("RGBA")}.get(mode, image).convert(mode)
    assert image.mode == mode
    # The channels of these modes have 256 steps, coarser than RGB's: one of LAB's is up to 8 levels of these colours.
    tolerance = {"YCbCr": 3, "HSV": 4, "LAB": 8}.get(mode, 0)
    assert np.abs(pillow_to_rgb(image).astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("kind", ["L", "I;16", "I;16B"])
def test_16_bit_images_of_either_byte_order(kind: str) -> None:
    pixels = {"L": GREY8, "I;16": GREY16.astype("<u2"), "I;16B": GREY16.astype(">u2")}[kind]
    image = Image.fromarray(pixels)
    assert image.mode == kind
    assert np.array_equal(pillow_to_rgb(image), grey(GREY8 if kind == "L" else by_range(GREY16)))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG"])
def test_max_pixels_is_the_only_limit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns of images above its own limit, and rejects those of twice its size."""
    data, pixels = saved(IMAGE, kind), HEIGHT * WIDTH
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", pixels // 3)
        assert decode_with_pillow(data, pixels).shape == (HEIGHT, WIDTH, 3)
        assert pixels == PIL.Image.MAX_IMAGE_PIXELS
        with pytest.raises(DecodeError, match=f"^too_large: .* limit is {pixels - 1}$"):
            decode_with_pillow(data, pixels - 1)
        assert pixels == PIL.Image.MAX_IMAGE_PIXELS  # never lowered
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
        decode_with_pillow(data, pixels)
        assert PIL.Image.MAX_IMAGE_PIXELS is None


def test_damaged_pixels_of_a_png_are_rejected() -> None:
    """Pillow stops at the last pixel, before it reaches the checksum of the compressed data."""
    data = png(RGB8, 8, 2)
    at = data.index(b"IDAT")
    size = int.from_bytes(data[at - 4 : at], "big")
    for i in range(at, at + 4 + size + 4):
        damaged = bytearray(data)
        damaged[i] ^= 0x10
        with pytest.raises(DecodeError):
            decode_with_pillow(bytes(damaged))
    with pytest.raises(DecodeError, match="corrupt: PNG: the checksum of IDAT does not match"):
        decode_with_pillow(data[: at + 4 + size] + b"\0\0\0\0" + data[at + 8 + size :])
