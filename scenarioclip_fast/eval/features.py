"""Embeddings of a split's views, gathered from all ranks and optionally cached on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scenarioclip_fast.data.batch import Batch
from scenarioclip_fast.distributed import World
from scenarioclip_fast.eval.encoding import Encoder, check_finite, evaluating, level_views
from scenarioclip_fast.eval.loading import EvaluationLoader
from scenarioclip_fast.eval.session import Session
from scenarioclip_fast.files import replacing
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.ops.collectives import exchange, gather_rows
from scenarioclip_fast.parsing import parse_json
from scenarioclip_fast.progress import progress
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import warn

_CHUNK = 256  # views embedded at once
_ROWS = 1 << 16  # rows of each rank per exchange
_FIELDS = ("image", "text_id", "scene")


@dataclass(frozen=True)
class LevelFeatures:
    """The views of one level.

    Attributes:
        image: float32 [n, D], encoder outputs, not normalised.
        text_id: int64 [n], ids in the vocabulary; -1 for scenes without an action.
        scene: int64 [n], indices into the `keys` of the split.
    """

    image: Tensor  # [n, D]
    text_id: Tensor  # [n]
    scene: Tensor  # [n]

    def __len__(self) -> int:
        return self.image.shape[0]


@dataclass(frozen=True)
class Features:
    """The views of one split, or of a rank's share of it; `levels` omits levels without views."""

    keys: list[str]
    levels: dict[str, LevelFeatures]


@torch.no_grad()
def embed_views(
    model: Encoder,
    batches: Iterable[Batch],
    levels: Sequence[str] = LEVELS,
    *,
    labelled: bool = True,
    desc: str = "embedding",
    show_progress: bool = True,
) -> Features:
    """Embed the views of `batches`; batches and result are on the model's device.

    Args:
        labelled: leave out the global views of scenes without an action; otherwise their text id is -1.

    Raises:
        UserError: the embeddings are not finite.
    """
    parts: dict[str, list[LevelFeatures]] = {level: [] for level in levels}
    keys: list[str] = []
    with evaluating(model):
        for batch in progress(batches, desc=desc, unit="batches") if show_progress else batches:
            for level, (pixels, ids, scene) in level_views(batch, labelled=labelled).items():
                if level in parts and len(ids):
                    image = torch.cat([model.encode_image(x, level).float() for x in pixels.split(_CHUNK)])
                    parts[level].append(LevelFeatures(image, ids, scene + len(keys)))
            keys += batch.keys
    # pop frees the parts of each level after concatenation, which halves peak memory
    features = Features(keys, {level: _concatenate(parts.pop(level)) for level in levels if parts[level]})
    for level, found in features.levels.items():
        check_finite(found.image.isfinite().all(1), level)
    return features


def _concatenate(parts: Sequence[LevelFeatures]) -> LevelFeatures:
    return LevelFeatures(*(torch.cat([getattr(part, name) for part in parts]) for name in _FIELDS))


def gather_features(features: Features, world: World, levels: Sequence[str] = LEVELS) -> Features:
    """Gather the shares of all ranks on rank 0's CPU, sorted by scene key; other ranks get only the keys.

    The order does not depend on the number of ranks. Shares may differ in size, and may be empty.
    """
    keys_of_rank = world.gather(features.keys)
    keys = [key for rank_keys in keys_of_rank for key in rank_keys]
    first = sum(len(rank_keys) for rank_keys in keys_of_rank[: world.rank])
    order = sorted(range(len(keys)), key=keys.__getitem__)
    rank_of = torch.empty(len(keys), dtype=torch.int64)
    rank_of[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(keys))
    width = max(world.gather(max((f.image.shape[1] for f in features.levels.values()), default=0)))
    out = {}
    for level in levels:
        own = features.levels.get(level)
        if own is None:
            none = torch.empty(0, dtype=torch.int64, device=world.device)
            own = LevelFeatures(torch.empty(0, width, device=world.device), none, none)
        image, text_id, scene = (_to_main_process(t, world) for t in (own.image, own.text_id, own.scene + first))
        if len(image):
            by_key = rank_of[scene].argsort(stable=True)  # preserves the order of a scene's views
            out[level] = LevelFeatures(image[by_key], text_id[by_key], rank_of[scene][by_key])
    return Features([keys[i] for i in order], out)


def _to_main_process(
    rows: Tensor,  # [n, ...], n differs among ranks
    world: World,
) -> Tensor:
    """Gather rows on rank 0's CPU, with the blocks of ranks interleaved; other ranks get none."""
    if world.group is None:
        return rows.cpu()
    sizes = [size for (size,) in exchange([len(rows)], world.device, world.group)]
    found = [rows[:0].cpu()]
    for start in range(0, max(sizes), _ROWS):  # device memory: this rank's share and one block
        block_sizes = [min(max(size - start, 0), _ROWS) for size in sizes]
        blocks = gather_rows(rows[start : start + _ROWS], block_sizes, world.group)
        if world.is_main_process:
            found += [block.cpu() for block in blocks]
    return torch.cat(found)


def split_features(
    session: Session,
    split: str,
    levels: Sequence[str] = LEVELS,
    cache: str | Path | None = None,
    *,
    labelled: bool = True,
) -> Features:
    """Load or compute the features of a split, on rank 0's CPU (other ranks may get none).

    Args:
        session: the model and data.
        split: "train", "val" or "test".
        levels: subset of "global", "object" and "relation".
        cache: directory of cached features; None: no cache. File names contain a hash of the weights, the data set and
            the view settings, so stale files are never read. Splits with skipped scenes are not cached, since the
            scenes may become readable.
        labelled: as in `embed_views`.
    """
    world = session.world
    with session.loader(split) as loader:
        path = None if cache is None else _cache_file(session, loader, split, levels, labelled, Path(cache))
        kept = None if path is None or not world.is_main_process else _load(path)
        # Rank 0 decides for all ranks.
        if world.gather(kept is not None)[0]:
            return kept or Features([], {})
        own = embed_views(
            session.model,
            loader,
            levels,
            labelled=labelled,
            desc=f"embedding, {split}",
            show_progress=world.is_main_process,
        )
    features = gather_features(own, world, levels)
    if path is not None and world.is_main_process and not any(scene.split == split for scene in session.skipped):
        _save(features, path)
    return features


def _cache_file(
    session: Session, loader: EvaluationLoader, split: str, levels: Sequence[str], labelled: bool, directory: Path
) -> Path:
    digest = hashlib.sha256()
    data = session.data
    settings: list[object] = [session.model.config.vision.image_size, data.object_view, data.relation_view, data.blur]
    settings += [loader.decoder.name, labelled, *levels]
    # A manifest contains the SHA-256 of every shard.
    digest.update(json.dumps([settings, *(shards.manifest for shards in loader.shards.sets)], sort_keys=True).encode())
    for path in session.trained.files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return directory / f"{split}-{digest.hexdigest()[:16]}.safetensors"


def _save(features: Features, path: Path) -> None:
    tensors = {
        f"{level}.{name}": getattr(rows, name).contiguous()
        for level, rows in features.levels.items()
        for name in _FIELDS
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        keys = json.dumps(features.keys)
        # One entry: safetensors writes several in random order, and equal features should be equal files.
        metadata = {"features": json.dumps({"keys": keys, "sha256": _digest(keys, tensors)})}
        with replacing(path) as partial:
            require("safetensors.torch").save_file(tensors, partial, metadata=metadata)
    except (OSError, require("safetensors").SafetensorError) as error:  # the cache is optional
        warn(f"warning: {path}: features not cached: {error}")


def _digest(keys: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(keys.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.numpy().data if value.numel() else b"")
    return digest.hexdigest()


def _load(path: Path) -> Features | None:
    """Read features written by `_save`; None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with require("safetensors").safe_open(path, "pt") as file:
            record = parse_json(file.metadata()["features"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if record["sha256"] != _digest(record["keys"], tensors):
            raise ValueError("damaged: its contents differ from their checksum")
        keys = parse_json(record["keys"])
    except Exception as error:  # damaged files can raise anything
        warn(f"warning: {path}: not readable ({error}); recomputing the features")
        return None
    warn(f"features read from {path}")
    found = [level for level in LEVELS if f"{level}.image" in tensors]
    return Features(keys, {level: LevelFeatures(*(tensors[f"{level}.{name}"] for name in _FIELDS)) for level in found})
