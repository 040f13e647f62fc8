"""Sound but odd JPEGs decode to Pillow's pixels, and damaged entropy-coded data is rejected."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from scenarioclip_fast import native
from scenarioclip_fast.data.decode import DecodeError, Decoder, TorchDecoder, decode_with_pillow, make_decoder, probe
from scenarioclip_fast.data.decode.base import check_jpeg

HEIGHT, WIDTH = 61, 83  # no multiple of a block
END = b"\xff\xd9"
MARKER = re.compile(rb"\xff[^\x00\xff]")


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if native.host() is None:
        pytest.skip("scenarioclip_fast._native.host is not built")


def encoded(mode: str = "RGB", size: tuple[int, int] = (HEIGHT, WIDTH), **options: Any) -> bytes:
    y, x = np.mgrid[: size[0], : size[1]]
    rng = np.random.default_rng(0)
    wave = [128 + 90 * np.sin(x / 7 + c) * np.cos(y / (5 + c)) + 60 * ((x // 9 + y // 6) % 2) for c in range(3)]
    pixels = (np.stack(wave, -1) + rng.normal(0, 8, (*size, 3))).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def pillow(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of every segment; entropy-coded data between its restart markers has the marker 0."""
    at = 2
    while True:
        marker, end = data[at + 1], at + 2
        if 0xD0 <= marker <= 0xD7:
            yield marker, at, end
        elif marker == 0xD9:
            yield marker, at, end
            return
        else:
            end += int.from_bytes(data[end : end + 2], "big")
            yield marker, at, end
        if marker == 0xDA or 0xD0 <= marker <= 0xD7:
            found = MARKER.search(data, end)
            assert found is not None
            yield 0, end, found.start()
            end = found.start()
        at = end


def rebuild(data: bytes, change: Callable[[int, bytes], bytes]) -> bytes:
    """Replace every segment by change(marker, segment)."""
    return data[:2] + b"".join(change(marker, data[start:end]) for marker, start, end in segments(data))


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2, "big") + body


def before(data: bytes, wanted: int, extra: bytes) -> bytes:
    return rebuild(data, lambda marker, old: extra + old if marker == wanted else old)


def replaced(data: bytes, wanted: int, at: int, new: bytes) -> bytes:
    """Overwrite bytes of the body of the segments with the marker `wanted`."""
    at += 4
    return rebuild(data, lambda marker, old: old[:at] + new + old[at + len(new) :] if marker == wanted else old)


class BitWriter:
    def __init__(self) -> None:
        self.bits: list[str] = []

    def put(self, value: int, count: int) -> None:
        self.bits.append(format(value, f"0{count}b") if count else "")

    def flush(self) -> bytes:
        text = "".join(self.bits)
        self.bits = []
        text += "1" * (-len(text) % 8)
        return int(text or "0", 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")


def huffman_codes(data: bytes) -> dict[int, dict[int, tuple[int, int]]]:
    """{class and index of a table: {symbol: (code, length)}}."""
    tables: dict[int, dict[int, tuple[int, int]]] = {}
    for marker, start, end in segments(data):
        body = data[start + 4 : end] if marker == 0xC4 else b""
        while body:
            counts, code, at = body[1:17], 0, 17
            table = tables.setdefault(body[0], {})
            for length, count in enumerate(counts, 1):
                for _ in range(count):
                    table[body[at]] = (code, length)
                    code, at = code + 1, at + 1
                code <<= 1
            body = body[at:]
    return tables


def with_sampling(factors: list[tuple[int, int]], interleaved: bool = True, interval: int = 0) -> bytes:
    """A sequential JPEG of random coefficients with any sampling factors, (horizontal, vertical) per component."""
    base = encoded()
    codes = huffman_codes(base)
    rng, writer = random.Random(0), BitWriter()
    across, down = (max(f[i] for f in factors) for i in (0, 1))

    def block(chroma: int) -> None:
        for size, table in ((rng.randrange(4), codes[chroma]), (None, codes[0x10 | chroma])):
            symbols = [size] if size is not None else [rng.randrange(3) << 4 | 1 for _ in range(rng.randrange(3))] + [0]
            for symbol in symbols:
                writer.put(*table[symbol])
                writer.put(rng.getrandbits(symbol & 15) if symbol & 15 else 0, symbol & 15)

    def scan(components: list[int]) -> bytes:
        first = factors[components[0]]
        unit, per_unit = (first, [1]) if len(components) == 1 else ((across, down), [a * b for a, b in factors])
        columns, rows = -(-WIDTH * unit[0] // (8 * across)), -(-HEIGHT * unit[1] // (8 * down))
        if len(components) > 1:
            columns, rows = -(-WIDTH // (8 * across)), -(-HEIGHT // (8 * down))
        body = bytes([len(components)]) + b"".join(bytes((c + 1, 0x11 if c else 0)) for c in components) + b"\0\x3f\0"
        out, restarts = segment(0xDA, body), 0
        for mcu in range(columns * rows):
            if interval and mcu and mcu % interval == 0:
                out += writer.flush() + bytes((0xFF, 0xD0 + restarts % 8))
                restarts += 1
            for component, count in zip(components, per_unit, strict=True):
                for _ in range(count):
                    block(int(component > 0))
        return out + writer.flush()

    tables = b"".join(base[start:end] for marker, start, end in segments(base) if marker in (0xDB, 0xC4))
    size = HEIGHT.to_bytes(2, "big") + WIDTH.to_bytes(2, "big")
    entries = b"".join(bytes((i + 1, a << 4 | b, int(i > 0))) for i, (a, b) in enumerate(factors))
    frame = segment(0xC0, b"\x08" + size + bytes([len(factors)]) + entries)
    everything = list(range(len(factors)))
    scans = [everything] if interleaved else [[i] for i in everything]
    restart = segment(0xDD, interval.to_bytes(2, "big")) if interval else b""
    return b"\xff\xd8" + tables + frame + restart + b"".join(map(scan, scans)) + END


BASES = {
    f"{mode} {sampling} {'progressive ' if progressive else ''}{f'restart {restart}' if restart else ''}": encoded(
        mode, subsampling=sampling, progressive=progressive, restart_marker_blocks=restart, optimize=restart == 0
    )
    for mode, samplings in (("RGB", (0, 1, 2)), ("L", (0,)), ("CMYK", (0,)))
    for sampling in samplings
    for progressive in (False, True)
    for restart in (0, 4)
}
ONE = (1, 1)
SAMPLINGS: list[list[tuple[int, int]]] = [
    [(4, 1), ONE, ONE],  # 4:1:1
    [(1, 2), ONE, ONE],  # 4:4:0
    [(1, 4), ONE, ONE],
    [(4, 2), ONE, ONE],  # 4:1:0
    [(2, 2), (2, 1), (2, 1)],  # 4:2:1
    [(2, 2), (2, 1), ONE],
    [(2, 2), (1, 2), (1, 2)],
    [(3, 1), ONE, ONE],
    [(3, 2), ONE, ONE],
    [(1, 3), ONE, ONE],
    [(2, 2), ONE, (2, 2)],
    [ONE, (2, 2), (2, 2)],
    [(2, 2)],
    [(4, 4)],
    [(1, 3)],
]
SPARE = (b"\0", b"\x11\x22\x33", b"\xff\xff\xff", b"\xff\x00\x07", bytes(40))
THUMBNAIL = encoded(size=(16, 16))


def odd_jpegs() -> dict[str, bytes]:
    odd = dict(BASES)
    for factors in SAMPLINGS:
        for interleaved in (True, False):
            for interval in (0, 3):
                odd[f"{factors} {interleaved=} {interval=}"] = with_sampling(factors, interleaved, interval)
    for name, data in BASES.items():
        odd |= {
            f"{name}, fill bytes before markers": rebuild(
                data, lambda marker, old: (b"\xff\xff" if marker else b"") + old
            ),
            f"{name}, bytes after the end": data + b"\x11\xff\xd8\xff trailer",
            f"{name}, an image after the end": data + THUMBNAIL,
            f"{name}, a thumbnail": before(data, 0xDB, segment(0xEC, THUMBNAIL)),
            f"{name}, zeros before the end": before(data, 0xD9, bytes(5)),
            f"{name}, ones before the end": before(data, 0xD9, b"\xff\x00\xff\x00"),
            f"{name}, JFIF 3.7": replaced(data, 0xE0, 5, b"\x03\x07"),
            f"{name}, JFIF of density 0": replaced(data, 0xE0, 7, bytes(5)),
            f"{name}, half an ICC profile": before(data, 0xDB, segment(0xE2, b"ICC_PROFILE\0\x02\x02" + bytes(9))),
            f"{name}, an unknown APP14": before(data, 0xDB, segment(0xEE, b"Other")),
            f"{name}, spare bytes": before(data, 0xDB, SPARE[len(odd) % len(SPARE)]),
        }
        if "progressive" not in name:
            odd[f"{name}, odd parameters of the scan"] = rebuild(
                data, lambda marker, old: old[:-3] + b"\x01\x05\x21" if marker == 0xDA else old
            )
            odd[f"{name}, extended sequential"] = rebuild(
                data, lambda marker, old: b"\xff\xc1" + old[2:] if marker == 0xC0 else old
            )
    base = BASES["RGB 2 restart 4"]
    count = sum(0xD0 <= marker <= 0xD7 for marker, _, _ in segments(base))
    standard = encoded(subsampling=2)
    odd |= {
        f"spare {extra!r} before {marker:#x}": before(base, marker, extra) for extra in SPARE for marker in (0xC0, 0xDA)
    }
    odd |= {
        "a restart marker at the end": before(base, 0xD9, bytes((0xFF, 0xD0 + count % 8))),
        "Adobe, unknown transform": before(base, 0xDB, segment(0xEE, b"Adobe\0\x64\0\0\0\0\x07")),
        "Adobe, RGB": before(base, 0xDB, segment(0xEE, b"Adobe\0\x64\0\0\0\0\x00")),
        "DNL": before(base, 0xD9, segment(0xDC, HEIGHT.to_bytes(2, "big"))),
        "no Huffman tables, as in Motion JPEG": rebuild(standard, lambda marker, old: b"" if marker == 0xC4 else old),
        "Huffman tables that are not used": before(base, 0xDA, segment(0xC4, b"\x03" + bytes(16))),
        "zero bits as padding": zero_padded(standard),
    }
    return odd


def zero_padded(data: bytes) -> bytes:
    """Add a byte of ones, cut it to the padding, and fill with zeros: find the padding by what remains decodable."""
    end = len(data) - 2
    for k in range(7, 0, -1):
        padded = data[: end - 1] + bytes((data[end - 1] & 0xFF << k & 0xFF,)) + END
        if data[end - 1] & ((1 << k) - 1) == (1 << k) - 1 and torch.equal(pillow(padded), pillow(data)):
            return padded
    raise AssertionError("the last byte has no padding")


def test_sound_jpegs_decode_to_pillows_pixels() -> None:
    odd = odd_jpegs()
    assert len(odd) >= 100
    for decoder in (TorchDecoder(threads=2), make_decoder("torch", threads=2)):  # as in `pack` and as in the loader
        for (name, data), image in zip(odd.items(), decoder.decode(list(odd.values())), strict=True):
            assert isinstance(image, Tensor), (name, image)
            assert torch.equal(image, pillow(data)), name
            assert torch.equal(decode_with_pillow(data), image), name
        decoder.close()


def test_the_first_image_of_an_mpo_is_decoded() -> None:
    first, second = (Image.open(io.BytesIO(encoded(quality=quality))) for quality in (90, 40))
    out = io.BytesIO()
    first.save(out, "MPO", save_all=True, append_images=[second])
    (image,) = TorchDecoder(threads=1).decode([out.getvalue()])
    assert Image.open(out).n_frames == 2 and isinstance(image, Tensor)
    assert torch.equal(image, pillow(out.getvalue()))


def corrupted(data: bytes, rng: random.Random) -> bytes:
    """Damage entropy-coded data, and nothing else."""
    pieces = [(start, end) for marker, start, end in segments(data) if marker == 0]
    restarts = [start for marker, start, _ in segments(data) if 0xD0 <= marker <= 0xD7]
    ((first, last),) = rng.choices(pieces, [end - start for start, end in pieces])
    at, changed = rng.randrange(first, last), bytearray(data)
    end = min(at + rng.randrange(1, 40), last)
    kinds = ["flip", "flips", "byte", "cut", "repeat", "zero", "insert"] + ["restart", "no restart"] * bool(restarts)
    match rng.choice(kinds):
        case "flip":
            changed[at] ^= 1 << rng.randrange(8)
        case "flips":
            for _ in range(4):
                changed[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
        case "byte":
            changed[at] = rng.randrange(256)
        case "cut":
            del changed[at:end]
        case "repeat":
            changed[at:at] = changed[at:end]
        case "zero":
            changed[at:end] = bytes(end - at)
        case "insert":
            changed[at:at] = rng.randbytes(end - at)
        case "restart":
            changed[rng.choice(restarts) + 1] = 0xD0 + rng.randrange(8)
        case "no restart":
            at = rng.choice(restarts)
            del changed[at : at + 2]
    return bytes(changed)


def libjpeg_complains(data: bytes, space: str) -> bool:
    try:
        simplejpeg.decode_jpeg(data, space)
    except ValueError:
        return True
    return False


def leaves_a_trace(data: bytes, space: str) -> bool:
    """Whether libjpeg-turbo warns or fails, or does without the last byte, padding aside, of a scan or interval."""
    if libjpeg_complains(data, space):
        return True
    for marker, start, end in segments(data):
        kept = data[start:end].rstrip(b"\0").removesuffix(b"\xff")
        if marker == 0 and not libjpeg_complains(data[:start] + kept[:-1].rstrip(b"\xff") + data[end:], space):
            return True
    return False


def is_rejected(decoder: Decoder, data: bytes) -> bool:
    return isinstance(decoder.decode([data])[0], DecodeError)


def test_damage_that_leaves_a_trace_is_rejected() -> None:
    rng = random.Random(0)
    strict, loader = TorchDecoder(threads=1), make_decoder("torch", threads=1)
    traced, rejected, by_loader = 0, 0, 0
    whole = {name: pillow(data) for name, data in BASES.items()}
    for _ in range(700):
        name = rng.choice(list(BASES))
        damaged = corrupted(BASES[name], rng)
        try:
            changed = (pillow(damaged) != whole[name]).any(-1).float().mean()
        except OSError:
            continue  # Pillow rejects it, too
        if changed <= 0.005 or not leaves_a_trace(damaged, "CMYK" if "CMYK" in name else "RGB"):
            continue
        traced += 1
        rejected += is_rejected(strict, damaged)
        by_loader += is_rejected(loader, damaged)
    assert traced >= 300
    assert rejected >= 0.95 * traced, (rejected, traced)
    # libjpeg-turbo's warnings alone, which do not include a few bytes left over, nor runs past the end of a block.
    assert by_loader >= 0.95 * traced, (by_loader, traced)


def pieces(data: bytes, change: Callable[[int, bytes], bytes]) -> bytes:
    """Replace every piece of entropy-coded data by change(number, piece)."""
    number = iter(range(1 << 30))
    return rebuild(data, lambda marker, old: old if marker else change(next(number), old))


PLAIN, RESTARTS, PROGRESSIVE = BASES["RGB 2 "], BASES["RGB 2 restart 4"], BASES["RGB 2 progressive "]
SAMPLED = with_sampling([(3, 1), ONE, ONE])
FIRST_SCAN = PROGRESSIVE[
    PROGRESSIVE.index(b"\xff\xda") : next(end for marker, _, end in segments(PROGRESSIVE) if not marker)
]
DAMAGE = {
    "a byte left over": (before(PLAIN, 0xD9, b"\x5a"), "scan 1: data is left over at MCU 24 of 24"),
    "a byte left over in an interval": (
        pieces(RESTARTS, lambda i, old: old + b"\x5a" * (i == 2)),
        "scan 1: data is left over at MCU 12 of 24",
    ),
    "a byte left over in a scan": (
        pieces(PROGRESSIVE, lambda i, old: old + b"\x5a" * (i == 2)),
        "scan 3: data is left over at MCU 24 of 24",
    ),
    "zeros and a byte": (before(PLAIN, 0xD9, b"\0\0\0\x5a"), "scan 1: data is left over at MCU 24 of 24"),
    "a byte missing": (pieces(PLAIN, lambda i, old: old[:-1]), "scan 1: the data ends early at MCU 23 of 24"),
    "a byte missing in an interval": (
        pieces(RESTARTS, lambda i, old: old[: len(old) - (i == 2)]),
        "scan 1: the data ends early at MCU 11 of 24",
    ),
    "a restart marker missing": (
        rebuild(RESTARTS, lambda marker, old: old if marker != 0xD1 else b""),
        "scan 1: data is left over at MCU 8 of 24",
    ),
    "restart markers swapped": (
        rebuild(RESTARTS, lambda marker, old: {0xD1: b"\xff\xd2", 0xD2: b"\xff\xd1"}.get(marker, old)),
        "scan 1: a missing, misplaced or unexpected restart marker at MCU 8 of 24",
    ),
    "restart markers without an interval": (
        rebuild(RESTARTS, lambda marker, old: old if marker != 0xDD else b""),
        "scan 1: the data ends early at MCU 4 of 24",
    ),
    "ones, which are no code": (
        pieces(PLAIN, lambda i, old: old[:40] + b"\xff\x00" * 9 + old[40:]),
        "scan 1: an invalid Huffman code at MCU 0 of 24",
    ),
    "a header of a scan zeroed": (
        rebuild(PROGRESSIVE, lambda marker, old: bytes(len(old)) if old[4:6] == b"\x01\x02" else old),
        "spare bytes between scans",
    ),
    "a scan twice": (
        PROGRESSIVE.replace(FIRST_SCAN, FIRST_SCAN * 2),
        "a scan that does not continue the progression",
    ),
    "truncated before another image": (PLAIN[: len(PLAIN) // 2] + THUMBNAIL, "scan 1: the data ends early at MCU "),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_damage_is_named(kind: str) -> None:
    data, cause = DAMAGE[kind]
    (error,) = TorchDecoder(threads=1).decode([data])
    assert isinstance(error, DecodeError) and error.reason == "corrupt" and cause in error.detail, error


# 16 x 8 pixels of grey in arithmetic coding, and 6 x 4 in lossless coding: both written by libjpeg-turbo.
ARITHMETIC = bytes.fromhex(
    "ffd8ffe000104a46494600010100000100010000ffdb00430006040506050406060506070706080a100a0a09090a140e0f0c101714181817"
    "1416161a1d251f1a1b231c1616202c20232627292a29191f2d302d283025282928ffc9000b080008001001011100ffcc000600101005ffda"
    "0008010100003f00ff00ca789e7f0efa3a1df5a864eab8c3444ae1e0aa2c93bfe3fde0c3789681343c411276692b991d71a43a23981fbb4a"
    "2f33f3760b48ffd9"
)
LOSSLESS = bytes.fromhex(
    "ffd8ffe000104a46494600010100000100010000ffc3000b080004000601011100ffc400160001010100000000000000000000000000060208"
    "ffda0008010100010000cfea142850a2d42850a145a850a1428b50a142851fffd9"
)


@pytest.mark.parametrize("data", [ARITHMETIC, LOSSLESS], ids=["arithmetic", "lossless"])
def test_other_coding_than_huffmans_is_left_to_libjpeg(data: bytes) -> None:
    assert not check_jpeg(data) and check_jpeg(PLAIN)
    (image,) = TorchDecoder(threads=1).decode([data])
    assert isinstance(image, Tensor) and torch.equal(image, pillow(data))


def test_without_the_extension_libjpegs_warnings_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "host", lambda: None)
    decoder = TorchDecoder(threads=1)
    for data in (before(PLAIN, 0xDA, b"\x11"), SAMPLED):
        (image,) = decoder.decode([data])
        assert isinstance(image, Tensor) and torch.equal(image, pillow(data))
    (error,) = decoder.decode([DAMAGE["a byte missing"][0]])
    assert str(error) == "corrupt: libjpeg-turbo: Corrupt JPEG data: premature end of data segment"


def test_12_bit_jpegs_are_rejected_by_name() -> None:
    data = rebuild(PLAIN, lambda marker, old: b"\xff\xc1" + old[2:4] + b"\x0c" + old[5:] if marker == 0xC0 else old)
    with pytest.raises(DecodeError, match=r"^undecodable: JPEG of 12 bits per sample: convert the image to 8 bits$"):
        probe(data)


def test_any_damage_gives_an_image_or_an_error() -> None:
    rng = random.Random(1)
    host = native.host()
    assert host is not None
    decoder = TorchDecoder(threads=1)
    for data in BASES.values():
        assert all(host.jpeg_damage(data[:n]) for n in range(0, len(data), 7))
        for _ in range(40):
            damaged = bytearray(data)
            for _ in range(rng.randrange(1, 20)):
                damaged[rng.randrange(2, len(data))] = rng.choice((0, 0xFF, rng.randrange(256)))
            (image,) = decoder.decode([bytes(damaged)])
            assert isinstance(image, (Tensor, DecodeError))
