"""Read masks from PNGs: a folder with one for each object, or a map of labels.

    sam_results/ID_grounding_sam/K.png  or  sam_results/ID/K.png   the mask of object K: 0, and one other value
    sam_results/ID_grounding_sam.png    or  sam_results/ID.png     K + 1 where object K is, 0 where none is

The folder `ID` also holds the PNGs of relations, under other names, which are not read.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scenarioclip_fast.data.sources.files import read_file
from scenarioclip_fast.data.sources.masks_npz import MAX_MASK_BYTES
from scenarioclip_fast.data.sources.panoptic import decode_png
from scenarioclip_fast.terminal import short

# Modes of Pillow; I: 16 bits in its older versions.
_MASK, _LABELS = ("1", "L"), ("L", "P", "I;16", "I")
_DEPTH, _COLOUR_TYPE = 24, 25  # bytes of a PNG: the bits per value; 0 for grey


def find_png_masks(directory: Path, scene: str) -> list[Path] | Path | None:
    """The numbered PNGs in the folder of a scene, or else its label map; None if there are neither.

    Args:
        directory: of the masks.
        scene: id of the scene; None is returned if it is not the name of a file.
    """
    if scene in ("", ".", "..") or "/" in scene or "\0" in scene:
        return None
    places = [directory / f"{scene}_grounding_sam", directory / scene]
    for folder in places:
        try:
            found = sorted(path for path in folder.iterdir() if re.fullmatch(r"[0-9]+\.png", path.name))
        except (OSError, UnicodeEncodeError):  # no such folder, mostly
            continue
        if found:
            return found
    for folder in places:
        path = folder.with_name(f"{folder.name}.png")
        try:
            if path.is_file():
                return path
        except (OSError, UnicodeEncodeError):
            continue
    return None


def read_png_masks(found: list[Path] | Path, n: int, size: tuple[int, int]) -> list[Tensor]:  # bool [H, W] each
    """Read the masks of `n` objects from what `find_png_masks` found.

    Args:
        size: (H, W) of the image.

    Raises:
        ValueError: not PNGs of this size, or the files or values do not match the objects.
    """
    if (total := n * size[0] * size[1]) > MAX_MASK_BYTES:
        raise ValueError(f"got {n} masks of {total} pixels together, expected at most {MAX_MASK_BYTES}")
    masks = _of_labels(found, n, size) if isinstance(found, Path) else _of_folder(found, n, size)
    return [torch.from_numpy(mask) for mask in masks]


def _of_folder(paths: list[Path], n: int, size: tuple[int, int]) -> list[NDArray[np.bool_]]:
    by_number = sorted(paths, key=lambda path: int(path.stem))
    if [int(path.stem) for path in by_number] != list(range(n)):
        names = short([path.name for path in by_number])
        raise ValueError(f"got {names}, expected 0.png to {n - 1}.png, one for each of the {n} objects")
    masks = []
    for path in by_number:
        data = _read(path)
        try:
            pixels = decode_png(data, size, _MASK)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
        mask = pixels != 0
        values = pixels[mask]
        if values.size and values.min() != values.max():
            raise ValueError(f"{path.name}: got values {_values(pixels)}, expected 0 and one other value")
        masks.append(mask)
    return masks


def _of_labels(path: Path, n: int, size: tuple[int, int]) -> list[NDArray[np.bool_]]:
    # With several objects, one bit per pixel is a mask of something else.
    labels = decode_png(data := _read(path), size, (*_LABELS, "1") if n == 1 else _LABELS)
    if n == 1 and (labels.dtype == np.bool_ or np.isin(labels, (0, 255)).all()):
        return [labels != 0]
    if data[_COLOUR_TYPE] == 0 and data[_DEPTH] < 8:  # Pillow scales these to 0 to 255
        raise ValueError(f"got a grey PNG of {data[_DEPTH]} bits per pixel, expected 8 or 16")
    if labels.min() < 0 or labels.max() > n:
        also = ", or 0 and 255" * (n == 1)
        raise ValueError(
            f"got values {_values(labels)}, expected 0 to {n}: k + 1 for object k of {n}, 0 for none{also}"
        )
    return [labels == k + 1 for k in range(n)]


def _read(path: Path) -> bytes:
    return read_file(path, path.name, missing="bad_masks", too_large="bad_masks")


def _values(pixels: NDArray[np.generic]) -> str:
    return short(np.unique(pixels).tolist())
