"""Embeddings of images, written as .npz or Parquet."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from scenarioclip_fast.data.decode import make_decoder
from scenarioclip_fast.data.images import SkippedImage, find_images, image_batches, read_images
from scenarioclip_fast.data.shards import is_packed
from scenarioclip_fast.devices import pick_device
from scenarioclip_fast.distributed import world_size
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.checkpoint import Weights, open_checkpoint
from scenarioclip_fast.eval.features import Features, embed_views, split_features
from scenarioclip_fast.eval.session import open_session
from scenarioclip_fast.files import is_url, replacing
from scenarioclip_fast.levels import check_level
from scenarioclip_fast.output import prepare_file
from scenarioclip_fast.progress import progress
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import warn

_MAX_LISTED = 10  # skipped images in the warning


@dataclass(frozen=True)
class EmbeddingTable:
    """N embeddings of one level.

    Attributes:
        level: "global", "object" or "relation".
        keys: N paths or scene keys; object and relation embeddings of a scene share its key.
        embeddings: float32 [N, D] on the CPU, encoder outputs, not normalised.
        text_ids: int64 [N], class text of each row, -1 for a scene without an action; only for packed shards.
        texts: class texts of the level, indexed by `text_ids`.
        skipped: images without an embedding.
        seconds: time spent on reading, decoding and embedding.
    """

    level: str
    keys: list[str]
    embeddings: Tensor  # [N, D]
    text_ids: Tensor | None = None  # [N]
    texts: list[str] | None = None
    skipped: list[SkippedImage] = field(default_factory=list)
    seconds: float = 0.0

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the table atomically.

        `.npz`: arrays `keys`, `embeddings` and `level`; for shards also `text_ids` and `texts`. `.parquet` (requires
        pyarrow): columns `key` and `embedding`; for shards also `text_id` and `text`.

        Raises:
            UserError: unsupported suffix, `path` exists and `force` is False, or it cannot be written.
            MissingDependencyError: pyarrow is not installed.
        """
        path = Path(path)
        write = self._writer(path, force)
        with replacing(path) as partial, partial.open("xb") as file:
            write(self, file)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _writer(path: Path, force: bool) -> Callable[[EmbeddingTable, BinaryIO], None]:
        """Choose the function that writes `path`, and create its directory; raises the errors of `save`."""
        if path.suffix not in (".npz", ".parquet"):
            raise UserError(f"{path}: got suffix {path.suffix!r}, expected .npz or .parquet")
        prepare_file(path, "out")
        if path.exists() and not force:
            raise UserError(f"{path} exists: pass --force to overwrite it, or choose another file")
        if path.suffix == ".npz":
            return _write_npz
        require("pyarrow")
        return _write_parquet


def embed(
    checkpoint: str | Path,
    images: str | Path,
    out: str | Path | None = None,
    *,
    level: str = "global",
    split: str | None = None,
    weights: Weights = "student",
    batch_size: int = 64,
    device: str = "auto",
    decoder: str | None = None,
    force: bool = False,
) -> EmbeddingTable:
    """Embed images with one vision encoder of a trained model.

    Packed shards can be embedded under torchrun; rank 0 then writes and returns all rows, the other ranks none.

    Args:
        checkpoint: a run directory, or a directory written by `save_pretrained`.
        images: an image, a folder of images and tars (searched recursively), a tar, or a directory or URL of packed
            shards.
        out: the .npz or .parquet file to write; None writes no file.
        level: "global", "object" or "relation"; the latter two require the annotations of packed shards.
        split: split of packed shards: "train", "val" or "test" (the default).
        weights: "student", or "teacher" for the EMA weights of a run with loss.teacher_scope=all.
        batch_size: images (for shards: scenes) per batch.
        device: auto, cpu, cuda or cuda:N.
        decoder: see `LoaderConfig.decoder`; None: as in training.
        force: overwrite `out`.

    Raises:
        UserError: no such checkpoint, images, split or device; the level requires annotations; no usable images; or
            `out` exists and `force` is False.
    """
    check_level(level)
    if batch_size < 1:
        raise UserError(f"batch size: got {batch_size}, expected at least 1")
    if out is not None:
        EmbeddingTable._writer(Path(out), force)
    if is_url(images) or is_packed(images):
        options = {"weights": weights, "batch_size": batch_size, "device": device, "decoder": decoder}
        if level != "relation":  # their views are not embedded, and need no masks then
            options["relation_view"] = "scene"
        with open_session(checkpoint, images, **options) as session:  # type: ignore[arg-type]
            session.world.check_same({"--level": level, "--split": split})
            start = time.monotonic()
            features = split_features(session, split or "test", [level], labelled=False)
            seconds = time.monotonic() - start
            skipped = [SkippedImage(scene.scene, f"{scene.reason}: {scene.detail}") for scene in session.skipped]
            table = _of_shards(features, level, [*session.vocabulary.texts(level)], skipped, seconds)
            if session.world.is_main_process:
                _finish(table, images, out, force)
            return table
    if split is not None:
        raise UserError(f"split: got {split!r}, but {images} has no splits: only packed shards do")
    if level != "global":
        raise UserError(
            f"level {level!r} requires annotations, which {images} does not have: embed packed shards "
            "(`scenarioclip-fast pack`), or use level 'global'"
        )
    table = _embed_files(checkpoint, images, weights, batch_size, device, decoder)
    _finish(table, images, out, force)
    return table


def _embed_files(
    checkpoint: str | Path,
    images: str | Path,
    weights: Weights,
    batch_size: int,
    device: str,
    decoder: str | None,
) -> EmbeddingTable:
    if world_size() > 1:
        raise UserError(f"{images}: folders and tars are embedded in one process; pack the images to use torchrun")
    on = pick_device(device)
    paths = find_images(images)
    trained = open_checkpoint(checkpoint, on, weights)
    total = None if any(path.suffix.lower() == ".tar" for path in paths) else len(paths)
    skipped: list[SkippedImage] = []
    start = time.monotonic()
    reader = make_decoder(decoder or trained.data.decoder, on, max_pixels=trained.data.max_pixels)
    try:
        encoded = progress(read_images(images, skipped.append), total, "embedding", "images")
        size = trained.model.config.vision.image_size
        batches = image_batches(encoded, reader, batch_size=batch_size, size=size, on_skip=skipped.append)
        features = embed_views(trained.model, batches, ["global"], labelled=False, show_progress=False)
    finally:
        reader.close()
    seconds = time.monotonic() - start
    if skipped:
        listed = ", ".join(f"{image.key} ({image.reason})" for image in skipped[:_MAX_LISTED])
        more = f" and {len(skipped) - _MAX_LISTED} more" if len(skipped) > _MAX_LISTED else ""
        warn(f"warning: unusable images skipped ({len(skipped)}): {listed}{more}")
    rows = features.levels.get("global")
    image = torch.empty(0, trained.model.config.embed_dim) if rows is None else rows.image.cpu()
    return EmbeddingTable("global", features.keys, image, skipped=skipped, seconds=seconds)


def _of_shards(
    features: Features, level: str, texts: list[str], skipped: list[SkippedImage], seconds: float
) -> EmbeddingTable:
    rows = features.levels.get(level)
    if rows is None:
        none = torch.empty(0, dtype=torch.int64)
        return EmbeddingTable(level, [], torch.empty(0, 0), none, texts, skipped, seconds)
    keys = [features.keys[i] for i in rows.scene.tolist()]
    return EmbeddingTable(level, keys, rows.image.cpu(), rows.text_id.cpu(), texts, skipped, seconds)


def _finish(table: EmbeddingTable, images: str | Path, out: str | Path | None, force: bool) -> None:
    if not table.keys:
        raise UserError(f"{images}: nothing to embed at level {table.level!r} ({len(table.skipped)} images skipped)")
    if out is not None:
        table.save(out, force=force)


def _write_npz(table: EmbeddingTable, file: BinaryIO) -> None:
    arrays = {
        "keys": np.array(table.keys, dtype=np.str_),
        "embeddings": table.embeddings.numpy(),
        "level": np.array(table.level),
    }
    if table.text_ids is not None and table.texts is not None:
        arrays |= {"text_ids": table.text_ids.numpy(), "texts": np.array(table.texts, dtype=np.str_)}
    np.savez(file, **arrays)  # type: ignore[arg-type]


def _write_parquet(table: EmbeddingTable, file: BinaryIO) -> None:
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    values = arrow.array(table.embeddings.numpy().reshape(-1))
    columns = {
        "key": arrow.array(table.keys, arrow.string()),
        "embedding": arrow.FixedSizeListArray.from_arrays(values, table.embeddings.shape[1]),
    }
    if table.text_ids is not None and table.texts is not None:
        ids = table.text_ids.tolist()
        texts = [table.texts[i] if i >= 0 else None for i in ids]
        columns |= {"text_id": arrow.array(ids, arrow.int64()), "text": arrow.array(texts, arrow.string())}
    parquet.write_table(arrow.table(columns).replace_schema_metadata({"level": table.level}), file)
