from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scenarioclip_fast import native
from scenarioclip_fast.data import rle

MASKS_SHAPE = st.tuples(st.integers(1, 23), st.integers(1, 23))
MASKS = hnp.arrays(np.bool_, MASKS_SHAPE)


@pytest.fixture(params=["numpy", "native"], autouse=True, scope="module")
def codec(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every test with both codecs."""
    if request.param == "native" and native.host() is None:
        pytest.skip("scenarioclip_fast._native.host is not built")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(native, "host", lambda: None)
        yield


def coco(mask: np.ndarray) -> str:
    module = pytest.importorskip("pycocotools.mask")
    counts: bytes = module.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    return counts.decode()


@given(MASKS)
@settings(max_examples=60, deadline=None)
def test_roundtrip_and_pycocotools(codec: None, mask: np.ndarray) -> None:
    code = rle.encode(mask)
    assert code["counts"] == coco(mask)
    assert torch.equal(rle.decode(code), torch.from_numpy(mask))
    assert rle.area(code) == mask.sum()


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (480, 640), (3000, 40)])
@pytest.mark.parametrize("kind", ["empty", "full", "noise", "box", "last", "first"])
def test_shapes(shape: tuple[int, int], kind: str) -> None:
    mask = np.zeros(shape, bool)
    if kind == "full":
        mask[:] = True
    elif kind == "noise":
        mask = np.random.default_rng(0).random(shape) < 0.5
    elif kind == "box":
        mask[shape[0] // 3 : shape[0] // 2, shape[1] // 4 :] = True
    elif kind == "last":
        mask[-1, -1] = True
    elif kind == "first":
        mask[0, 0] = True
    code = rle.encode(torch.from_numpy(mask))
    assert code == {"size": list(shape), "counts": coco(mask)}
    assert torch.equal(rle.decode(code), torch.from_numpy(mask))


def test_uncompressed_and_bytes() -> None:
    mask = torch.tensor([[False, True, True], [True, True, False]])
    assert torch.equal(rle.decode({"size": [2, 3], "counts": [1, 4, 1]}), mask)
    assert torch.equal(rle.decode({"size": [2, 3], "counts": rle.encode(mask)["counts"].encode()}), mask)


def test_empty_image() -> None:
    assert rle.decode(rle.encode(np.zeros((0, 5), bool))).shape == (0, 5)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "expected"),
        ({"size": [2, 2]}, "expected"),
        ({"size": [2], "counts": "04"}, "RLE size"),
        ({"size": [True, 4], "counts": [4]}, "RLE size"),
        ({"size": [2, 2], "counts": [True, 3]}, "run lengths"),
        ({"size": [-2, -2], "counts": "04"}, "RLE size"),
        ({"size": [1 << 20, 1 << 20], "counts": "04"}, "at most"),
        ({"size": [2, 2], "counts": 7}, "of type int"),
        ({"size": [2, 2], "counts": "\u00e9"}, "ASCII"),
        ({"size": [2, 2], "counts": " "}, "characters"),
        ({"size": [2, 2], "counts": "0~"}, "characters"),
        ({"size": [2, 2], "counts": "0T"}, "truncated"),
        ({"size": [2, 2], "counts": "0ooooooooo0"}, "at most"),
        ({"size": [2, 2], "counts": "05"}, "sum to 5"),
        ({"size": [2, 2], "counts": ""}, "sum to 0"),
        ({"size": [2, 2], "counts": "O"}, "negative"),
        ({"size": [2, 2], "counts": [5, -1]}, ">= 0"),
    ],
)
def test_malformed(code: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rle.decode(code)  # type: ignore[arg-type]


@given(st.binary(max_size=12), st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_any_bytes_decode_or_raise(codec: None, counts: bytes, height: int, width: int) -> None:
    try:
        mask = rle.decode({"size": [height, width], "counts": counts})
    except ValueError:
        return
    assert mask.shape == (height, width)


@pytest.mark.parametrize("mask", [np.zeros(3, bool), np.zeros((2, 2), np.float32)])
def test_encode_rejects(mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected bool"):
        rle.encode(mask)


def segment_pixels(labels: np.ndarray) -> np.ndarray:
    return np.stack([labels >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)


# Ids that differ in one channel only.
LABELS = hnp.arrays(np.int64, MASKS_SHAPE, elements=st.sampled_from([0, 1, 256, 65536, 0xFFFFFF]))


@given(LABELS)
@settings(max_examples=60, deadline=None)
def test_segments_are_the_masks_of_their_ids(codec: None, labels: np.ndarray) -> None:
    ids = [0xFFFFFF, 1, 256, 7, 65536]
    for one, found in zip(ids, rle.encode_segments(segment_pixels(labels), ids), strict=True):
        mask = labels == one
        if not mask.any():
            assert found is None
            continue
        assert found is not None
        y, x = mask.nonzero()
        assert found == (rle.encode(mask), (x.min(), y.min(), x.max() + 1, y.max() + 1))


def test_segments_of_a_view_that_is_not_contiguous(codec: None) -> None:
    labels = np.arange(24).reshape(4, 6) % 3
    pixels = np.repeat(segment_pixels(labels), 2, axis=1)[:, ::2]
    assert not pixels.flags.c_contiguous
    ((code, _),) = rle.encode_segments(pixels, [2])  # type: ignore[misc]
    assert code == rle.encode(labels == 2)


def test_segments_of_an_empty_image(codec: None) -> None:
    assert rle.encode_segments(np.zeros((0, 5, 3), np.uint8), [0, 1]) == [None, None]


@pytest.mark.parametrize(
    ("pixels", "ids", "message"),
    [
        (np.zeros((4, 4), np.uint8), [1], r"\[4, 4\], uint8, expected uint8 \[H, W, 3\]"),
        (np.zeros((4, 4, 3), np.int64), [1], "int64, expected uint8"),
        (np.zeros((4, 4, 3), np.uint8), [1, 1], "got 2 ids with repetitions"),
    ],
)
def test_unusable_segments(codec: None, pixels: np.ndarray, ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rle.encode_segments(pixels, ids)
