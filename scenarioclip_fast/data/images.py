"""Unannotated images of folders and tars, as batches of global views."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from scenarioclip_fast import forks
from scenarioclip_fast.data.batch import Batch
from scenarioclip_fast.data.decode import DecodeError, Decoder
from scenarioclip_fast.data.preprocess import preprocess
from scenarioclip_fast.data.tars import read_members, special_kind
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import open_file, read_regular
from scenarioclip_fast.ops.view_batch import check_renderable

T = TypeVar("T")

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class SkippedImage(NamedTuple):
    """An image that could not be read or decoded, and why."""

    key: str
    reason: str


OnSkip = Callable[[SkippedImage], None]


def find_images(source: str | Path) -> list[Path]:
    """List the image files and tars at or below `source`, sorted; hidden files are excluded.

    Links are followed. Broken links to images and named pipes are listed as well, so that reading reports them.

    Raises:
        UserError: `source` does not exist or contains no images.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source}: no such file or directory")
    paths = [source] if source.is_file() else _walk(source)
    usable = (*SUFFIXES, ".tar")
    found = sorted(p for p in paths if p.suffix.lower() in usable and not p.name.startswith("."))
    if not found:
        raise UserError(f"{source}: no images found, expected files ending in {', '.join(usable)}")
    return found


def _walk(root: Path) -> Iterator[Path]:
    """Yield everything but folders below `root`, each folder once even if links lead to it again."""
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        yield from (Path(folder, name) for name in files)


def read_images(source: str | Path, on_skip: OnSkip) -> Iterator[tuple[str, bytes]]:
    r"""Yield the key and the encoded bytes of each image at or below `source`.

    A key is the path relative to `source`, for images in a tar followed by the member's name. Bytes of a name that are
    not UTF-8 appear as \xNN.
    """
    source = Path(source)
    root = source.parent if source.is_file() else source
    for path in find_images(source):
        key = _printable(path.relative_to(root).as_posix())
        try:
            if path.suffix.lower() == ".tar":
                yield from _read_tar(path, key, on_skip)
            else:
                yield key, read_regular(path)
        except OSError as error:
            on_skip(SkippedImage(key, f"unreadable: {error}"))


def _read_tar(path: Path, key: str, on_skip: OnSkip) -> Iterator[tuple[str, bytes]]:
    with open_file(path) as file:
        for member in read_members(file, lambda detail: on_skip(SkippedImage(key, f"damaged tar: {detail}"))):
            name = Path(member.name)
            if member.isdir() or name.suffix.lower() not in SUFFIXES or name.name.startswith("."):
                continue
            here = f"{key}/{_printable(member.name)}"
            if (special := special_kind(member)) is not None:
                on_skip(SkippedImage(here, f"got a {special}, expected a regular file"))
            else:
                file.seek(member.offset_data)
                yield here, file.read(member.size)


def _printable(name: str) -> str:
    r"""Return a file name with the bytes that are not UTF-8 as \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def image_batches(
    images: Iterable[tuple[str, bytes]], decoder: Decoder, *, batch_size: int, size: int, on_skip: OnSkip
) -> Iterator[Batch]:
    """Yield batches of global views on the decoder's device, prepared one ahead; bad images are passed to `on_skip`."""
    return _one_ahead(_decoded_batches(iter(images), decoder, batch_size, size, on_skip))


def _decoded_batches(
    images: Iterator[tuple[str, bytes]], decoder: Decoder, batch_size: int, size: int, on_skip: OnSkip
) -> Iterator[Batch]:
    while chunk := list(islice(images, batch_size)):
        keys: list[str] = []
        pixels: list[Tensor] = []
        for (key, _), image in zip(chunk, decoder.decode([data for _, data in chunk]), strict=True):
            if isinstance(image, DecodeError):
                on_skip(SkippedImage(key, str(image)))
                continue
            try:
                check_renderable(*image.shape[:2])
            except ValueError as error:
                on_skip(SkippedImage(key, str(error)))
                continue
            keys.append(key)
            pixels.append(image)
        if keys:
            none = torch.empty(0, dtype=torch.int64, device=decoder.device)
            no_action = torch.full((len(keys),), -1, device=decoder.device)
            yield Batch(preprocess(pixels, size=size, device=decoder.device), keys, none, none, no_action, none, none)


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Compute the next item in a thread while the consumer works on the current one."""
    origin = forks.Origin()
    with ThreadPoolExecutor(1, "images") as pool:
        pending = pool.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = pool.submit(next, items, None)
            yield item
            origin.check("this iteration", "begin another one")
