"""COCO run-length masks: {"size": [H, W], "counts": str}, byte-compatible with pycocotools.

A mask is stored in column-major order as lengths of alternating runs of 0s and 1s, starting with 0s (possibly of length
zero). From the fourth run on, each is stored as the difference from the run two before. Numbers are written in groups
of five bits, low group first, with bit 5 as the continuation bit, plus 48 to make them printable.
Source: the COCO API's `maskApi.c` (format only).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scenarioclip_fast import native

MAX_PIXELS = 1 << 28  # 268 megapixels; bounds the memory that a malformed size can allocate
MAX_GROUPS = 7  # 35 bits hold every run up to MAX_PIXELS and every difference


def encode(mask: Tensor | NDArray[Any]) -> dict[str, Any]:
    """Encode a bool [H, W] mask.

    Raises:
        ValueError: wrong shape or dtype.
    """
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.ndim != 2 or array.dtype not in (np.bool_, np.uint8):
        raise ValueError(f"got a mask of shape {list(array.shape)}, {array.dtype}, expected bool [H, W]")
    height, width = array.shape
    return {"size": [height, width], "counts": compress(mask_runs(array))}


def decode(rle: dict[str, Any]) -> Tensor:  # bool [H, W]
    """Decode a mask.

    Raises:
        ValueError: malformed RLE, or the run lengths do not match the size.
    """
    height, width, runs = read_runs(rle)
    values = np.arange(len(runs), dtype=np.uint8) & 1
    flat = np.repeat(values, runs).view(np.bool_)
    return torch.from_numpy(np.ascontiguousarray(flat.reshape(width, height).T))


def area(rle: dict[str, Any]) -> int:
    """Count the set pixels without decoding the mask."""
    return int(read_runs(rle)[2][1::2].sum())


def bounds(
    mask: Tensor | NDArray[Any] | dict[str, Any],  # bool [H, W], or RLE
    size: tuple[int, int],
) -> list[int] | None:
    """The smallest box around the set pixels, x1, y1, x2, y2, the last two exclusive; None if there are none.

    Raises:
        ValueError: malformed RLE, or a mask of another size than `size` = (H, W).
    """
    if isinstance(mask, dict):
        height, width, runs = read_runs(mask)
        if (height, width) == size:
            return run_bounds(height, runs)
    else:
        array = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        height, width = array.shape if array.ndim == 2 else (-1, -1)
        if (height, width) == size and array.any():
            columns, rows = np.flatnonzero(array.any(0)), np.flatnonzero(array.any(1))
            return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
    if (height, width) != size:
        raise ValueError(f"got a mask of {width} x {height}, expected {size[1]} x {size[0]}")
    return None


def run_bounds(height: int, runs: NDArray[np.int64]) -> list[int] | None:  # [runs]
    """`bounds` of run lengths, of a mask of `height` rows."""
    end = np.cumsum(runs)[: len(runs) // 2 * 2].reshape(-1, 2)
    filled = runs[1::2] > 0
    if not filled.any():
        return None
    first, last = end[:, 0][filled], end[:, 1][filled] - 1
    wraps = first // height != last // height  # covers whole columns, or the end of one and the start of the next
    top = np.where(wraps, 0, first % height).min()
    bottom = np.where(wraps, height - 1, last % height).max()
    return [int(first[0] // height), int(top), int(last[-1] // height) + 1, int(bottom) + 1]


def shared_area(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:  # [runs] each
    """Count the pixels that are set in both of two masks of one size, given as run lengths."""
    end, count = np.cumsum(a), np.cumsum(np.where(np.arange(len(a)) & 1, a, 0))
    # Set pixels of `a` before each edge of `b`: linear within a run, with slope 0 or 1, hence exact in float64.
    edges = np.interp(np.cumsum(b), np.concatenate([[0], end]), np.concatenate([[0], count]))
    return int(np.diff(edges)[::2].sum())


def read_runs(rle: dict[str, Any]) -> tuple[int, int, NDArray[np.int64]]:
    """Read (H, W, run lengths) of an RLE; the lengths are >= 0 and sum to H * W.

    Raises:
        ValueError: malformed RLE.
    """
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise ValueError(f'got {_short(rle)} as RLE, expected {{"size": [H, W], "counts": str}}')
    size, counts = rle["size"], rle["counts"]
    if (
        not isinstance(size, (list, tuple))
        or len(size) != 2
        or not all(type(n) is int and 0 <= n <= MAX_PIXELS for n in size)
    ):
        raise ValueError(f"got {_short(size)} as RLE size, expected [H, W]")
    height, width = size
    if height * width > MAX_PIXELS:
        raise ValueError(f"got an RLE of size {height} x {width}, expected at most {MAX_PIXELS} pixels")
    if isinstance(counts, (list, tuple)):  # COCO's uncompressed form
        if not all(type(n) is int and 0 <= n <= MAX_PIXELS for n in counts):
            raise ValueError("got invalid run lengths in RLE counts, expected integers >= 0")
        runs = np.array(counts, dtype=np.int64)
    elif isinstance(counts, (str, bytes)):
        runs = decompress(counts)
    else:
        raise ValueError(f"got RLE counts of type {type(counts).__name__}, expected str")
    if (total := int(runs.sum())) != height * width:
        raise ValueError(f"got RLE runs that sum to {total}, expected {height} x {width} = {height * width}")
    return height, width, runs


def mask_runs(
    mask: NDArray[Any],  # bool [H, W]
) -> NDArray[np.int64]:  # [runs]
    """Compute the run lengths of a mask in column order, starting with a run of zeros."""
    flat = mask.T.astype(np.bool_).ravel()
    if flat.size == 0:
        return np.zeros(1, np.int64)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0, 0] if flat[0] else [0]
    return np.diff(np.concatenate([first, edges, [flat.size]]).astype(np.int64))


def encode_segments(
    pixels: NDArray[np.uint8],  # [H, W, 3]
    ids: Sequence[int],
) -> list[tuple[dict[str, Any], tuple[int, int, int, int]] | None]:
    """Encode segments of a panoptic image, whose pixels hold the segment's id as R + 256 G + 65536 B.

    Args:
        ids: of the segments, distinct.

    Returns:
        The RLE and the bounding box (x1, y1, x2, y2, the last two exclusive) of each segment; None if it has no pixels.

    Raises:
        ValueError: wrong shape or dtype, or repeated ids.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"got pixels of shape {list(pixels.shape)}, {pixels.dtype}, expected uint8 [H, W, 3]")
    if len(set(ids)) != len(ids):
        raise ValueError(f"got {len(ids)} ids with repetitions, expected distinct ids")
    size = list(pixels.shape[:2])
    if (host := native.host()) is not None:
        found = host.segment_masks(pixels, list(ids))
        return [None if one is None else ({"size": list(size), "counts": one[0]}, one[1]) for one in found]
    height = size[0]
    labels = pixels.transpose(1, 0, 2).reshape(-1, 3).astype(np.int64) @ [1, 256, 65536]  # in column order
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    ends = np.append(starts[1:], labels.size)
    masks: list[tuple[dict[str, Any], tuple[int, int, int, int]] | None] = []
    for segment in ids:
        mine = labels[starts] == segment
        if not mine.any():
            masks.append(None)
            continue
        first, last = starts[mine], ends[mine] - 1  # of the segment's runs of ones
        runs = np.diff(np.stack([first, last + 1], 1).ravel(), prepend=0)
        runs = np.append(runs, labels.size - last[-1] - 1) if last[-1] + 1 < labels.size else runs
        one_column = first // height == last // height
        top = int(np.where(one_column, first % height, 0).min())
        bottom = int(np.where(one_column, last % height, height - 1).max()) + 1
        box = (int(first[0] // height), top, int(last[-1] // height) + 1, bottom)
        masks.append(({"size": list(size), "counts": compress(runs)}, box))
    return masks


def compress(runs: NDArray[np.int64]) -> str:
    """Encode run lengths as a COCO string."""
    if (host := native.host()) is not None:
        return str(host.rle_compress(runs))
    delta = runs.copy()
    delta[3:] -= runs[1:-2]
    groups = delta[:, None] >> (5 * np.arange(MAX_GROUPS))
    low = groups & 31
    # A number ends with the first group whose bit 4 equals the sign and after which only sign bits remain.
    last = (groups >> 5) == -(low >> 4)
    length = last.argmax(1) + 1
    position = np.arange(MAX_GROUPS)
    low += 48 + 32 * (position < length[:, None] - 1)
    return low[position < length[:, None]].astype(np.uint8).tobytes().decode("ascii")


def decompress(counts: str | bytes) -> NDArray[np.int64]:
    """Decode the run lengths of a COCO string.

    Raises:
        ValueError: malformed string.
    """
    try:
        data = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError as error:
        raise ValueError(f"got {_short(counts)} as RLE counts, expected ASCII") from error
    if (host := native.host()) is not None:
        return np.asarray(host.rle_decompress(data), dtype=np.int64)
    codes = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    if codes.size == 0:
        return np.zeros(0, np.int64)
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError(f"got {_short(counts)} as RLE counts, expected characters from '0' to 'o'")
    end = np.flatnonzero(codes < 32)
    if end.size == 0 or end[-1] != codes.size - 1:
        raise ValueError("got truncated RLE counts, expected a complete string")
    start = np.concatenate([[0], end[:-1] + 1])
    length = end - start + 1
    if length.max() > MAX_GROUPS:
        raise ValueError(f"got a number of {length.max()} characters in RLE counts, expected at most {MAX_GROUPS}")
    shift = 5 * (np.arange(codes.size) - np.repeat(start, length))
    runs = np.add.reduceat((codes & 31) << shift, start)
    runs -= ((codes[end] >> 4) & 1) << (5 * length)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if runs.min() < 0 or runs.max() > MAX_PIXELS:
        raise ValueError("got a negative or huge run in RLE counts, expected 0 to 2^28")
    return runs


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
