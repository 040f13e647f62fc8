"""Read SAM-style mask files (.npz) from untrusted sources.

Nothing is unpickled, and sizes in headers are checked before memory is allocated.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scenarioclip_fast.data.decode import MAX_PIXELS
from scenarioclip_fast.data.scene import mask_pixels
from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.files import NotRegularError, open_file
from scenarioclip_fast.terminal import short

MAX_MASK_BYTES = 1 << 30  # of all candidate masks of one scene
MAX_NPZ_LISTING = 1 << 20  # bytes of a zip's central directory; an npz has about three members
_ZIP_TAIL = 22 + 0xFFFF  # end-of-central-directory record plus the longest possible comment
# array -> the starts of accepted types in NumPy's notation, and their names
_TYPES = {"mask": (("b1", "u1"), "bool or uint8"), "labels": (("U",), "text"), "score": (("f",), "float")}


def read_masks(path: Path, names: list[str | None], size: tuple[int, int]) -> Iterator[Tensor]:  # bool [H, W] each
    """Yield the mask with the best score of each object.

    Args:
        names: of the objects, in order; None for an object whose name could not be read.
        size: (H, W) of the image. Masks of another size are rejected before they are read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mask file, or the masks do not match the objects.
    """
    n = len(names)
    try:
        with open_file(path) as file, zipfile.ZipFile(_checked(file)) as archive:
            labels = _read_labels(archive, n)
            scores = _read_scores(archive, n)
            mask = _read_array(archive, "mask", MAX_MASK_BYTES, (n, None, *size), (n, *size))
    except (FileNotFoundError, ValueError, MemoryError):
        raise
    except NotRegularError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # zipfile raises many types on damaged files
        raise ValueError(f"not a readable npz ({type(error).__name__}: {str(error)[:100]})") from None
    if mask.ndim == 3:
        mask = mask[:, None]
    if mask.shape[1] == 0:
        raise ValueError(f"got mask {list(mask.shape)}, expected at least one candidate per object")
    if scores is None and mask.shape[1] > 1:
        raise ValueError(f"got {mask.shape[1]} candidates per object, but no scores to choose among them")
    if scores is not None and scores.shape != mask.shape[:2]:
        raise ValueError(f"got score {list(scores.shape)}, expected {list(mask.shape[:2])}")
    rows = _rows_of(names, labels)
    best = np.zeros(n, np.int64) if scores is None else np.where(np.isnan(scores), -np.inf, scores).argmax(1)
    return (torch.from_numpy(mask_pixels(mask[row, best[row]]).copy()) for row in rows)


def _checked(file: IO[bytes]) -> IO[bytes]:
    """Reject archives with a large central directory, which zipfile reads into memory at once."""
    if (size := os.fstat(file.fileno()).st_size) > MAX_MASK_BYTES:
        raise ValueError(f"got {size} bytes, expected at most {MAX_MASK_BYTES}")
    file.seek(max(0, size - _ZIP_TAIL))
    tail = file.read()
    # Check every candidate end record, since readers differ in which one they use.
    ends = [match.start() for match in re.finditer(b"(?=PK\5\6)", tail)]
    directory = max((int.from_bytes(tail[end + 12 : end + 16], "little") for end in ends), default=0)
    if directory > MAX_NPZ_LISTING:
        raise ValueError(f"got a zip directory of {directory} bytes, expected at most {MAX_NPZ_LISTING}")
    if b"PK\6\7" in tail:
        raise ValueError("got a zip64 archive, expected a plain zip")
    return file


def _rows_of(names: list[str | None], labels: list[str] | None) -> list[int]:
    """The row of each object's masks: its index, unless the labels are in another order."""
    if labels is None or all(name in (None, label) for name, label in zip(names, labels, strict=True)):
        return list(range(len(names)))
    if None in names or sorted(labels) != sorted(str(name) for name in names):
        raise ValueError(f"the labels {short(labels)} do not match the objects")
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    return [rows[str(name)].pop(0) for name in names]


def _read_labels(archive: zipfile.ZipFile, n: int) -> list[str] | None:
    """Read the labels. None if missing or pickled: rows are then in the order of the objects."""
    if "labels.npy" not in archive.namelist():
        return None
    with _open(archive, "labels") as file:
        if _header(file, "labels")[2].hasobject:
            return None
    labels = _read_array(archive, "labels", 1 << 24, (n,))
    return [normalise(str(label)) for label in labels]


def _read_scores(archive: zipfile.ZipFile, n: int) -> NDArray[np.float64] | None:
    if "score.npy" not in archive.namelist():
        return None
    scores = _read_array(archive, "score", 1 << 24).astype(np.float64)
    return scores[:, None] if scores.ndim == 1 else scores


def _read_array(archive: zipfile.ZipFile, name: str, limit: int, *expected: tuple[int | None, ...]) -> NDArray[Any]:
    """Read an array of at most `limit` bytes and, if given, one of the shapes `expected` (None: any extent)."""
    with _open(archive, name) as file:
        shape, fortran, dtype = _header(file, name)
        starts, types = _TYPES[name]
        if not dtype.str[1:].startswith(starts) or dtype.hasobject:
            raise ValueError(f"got {name} of type {dtype}, expected {types}")
        if len(shape) > 4 or not all(0 <= extent <= MAX_PIXELS for extent in shape):
            raise ValueError(f"got {name} of shape {list(shape)}, expected at most 4 axes of at most {MAX_PIXELS}")
        size = math.prod(shape) * dtype.itemsize
        if size > limit:
            raise ValueError(f"got {name} of {size} bytes, expected at most {limit}")
        if expected and not any(_matches(shape, target) for target in expected):
            targets = (", ".join("k" if extent is None else str(extent) for extent in target) for target in expected)
            raise ValueError(f"got {name} {list(shape)}, expected {' or '.join(f'[{target}]' for target in targets)}")
        data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{name} ends after {len(data)} of {size} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _matches(shape: tuple[int, ...], target: tuple[int | None, ...]) -> bool:
    return len(shape) == len(target) and all(e in (None, s) for s, e in zip(shape, target, strict=True))


def _open(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    info = archive.getinfo(f"{name}.npy")
    # The compression methods that NumPy writes; zipfile decompresses others without a limit on the output.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"got {name} in zip compression {info.compress_type}, expected none or deflate")
    return archive.open(info)


def _header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    # Later versions only add longer headers, up to 4 GiB.
    if version != (1, 0):
        raise ValueError(f"got {name} in npy version {version}, expected 1.0")
    try:
        return np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # NumPy parses it as a Python literal: SyntaxError, RecursionError, ...
        detail = " ".join(str(error)[:100].split())
        raise ValueError(f"damaged header of {name} ({type(error).__name__}: {detail})") from None
