"""COCO run-length masks: {"size": [H, W], "counts": str}, byte-compatible with pycocotools.

A mask is stored in column-major order as lengths of alternating runs of 0s and 1s, starting with 0s (possibly of length
zero). From the fourth run on, each is stored as the difference from the run two before. Numbers are written in groups
of five bits, low group first, with bit 5 as the continuation bit, plus 48 to make them printable.
Source: the COCO API's `maskApi.c` (format only).
"""

from __future__ import annotations

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
