"""A source that is packed in parts, and what its packs contain."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packs import read_rows

from scenarioclip_fast.data import ShardSet, generate_scenes, merge_parts, pack

SIZE = 4  # scenes per unit, and so per shard at most


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a directory by name."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


def pack_part(source: str | Path | Sequence[str], out: str | Path, i: int, n: int, **options: Any) -> Any:
    """Pack one part."""
    return pack(source, out, part=(i, n), progress=False, **{"shard_size": SIZE} | options)


def pack_in_parts(source: str | Path | Sequence[str], out: Path, n: int, **options: Any) -> dict[str, bytes]:
    """Pack all parts, in another order than theirs, and merge them."""
    for i in random.Random(n).sample(range(1, n + 1), n):
        pack_part(source, out, i, n, **options)
    merge_parts(out, progress=False)
    assert sorted(path.name for path in out.parent.glob(f"{out.name}*")) == [out.name]
    assert not (out / ".parts").exists()
    return contents(out)


def write_tar(path: Path, samples: list[tuple[str, bytes, bytes]]) -> None:
    """Write a source of (key, image, record)."""
    with tarfile.open(path, "w") as tar:
        for key, image, record in samples:
            for suffix, data in (("jpg", image), ("json", record)):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_source(folder: Path, scenes: int = 72) -> None:
    """Three splits with damaged images, a unit without a valid scene, bad boxes, and keys that occur in several units.

    The second scene of a key has an object named "copy", which no pack may contain.
    """
    packed = folder.parent / f"{folder.name}-packed"
    pack(generate_scenes(scenes, seed=2), packed, split="hash", val=0, test=0, progress=False)
    dataset = ShardSet(packed)
    samples = [(key, *read_raw(packed, key)) for key in sorted(dataset.keys)]
    shutil.rmtree(packed)
    for i in [*range(5, scenes, 11), *range(12, 16)]:  # 12 to 15 are a unit
        samples[i] = samples[i][0], samples[i][1][:300], samples[i][2]
    for i in range(2, scenes, 7):
        record = json.loads(samples[i][2])
        record["objects"].append({"name": "outside", "box": [-90, 0, -10, 5], "mask": None})
        samples[i] = *samples[i][:2], json.dumps(record).encode()
    copies = []
    for key, image, text in samples:
        record = json.loads(text)
        record["objects"].append(record["objects"][0] | {"name": "copy"})
        copies.append((key, image, json.dumps(record).encode()))
    tars = {
        "train-0": samples[:30],
        # Units of nothing but duplicates, and of some; the first of a key may be a damaged one.
        "train-1": copies[:10] + copies[20:22] + copies[24:25] + samples[30:32],
        "train-2": copies[31:32] + samples[32:50],  # the duplicate is in the unit of its first
        "train-3": copies[5:40:3],
        "val-0": samples[50:57],
        "val-1": copies[51:53],
        "test-0": samples[57:],
    }
    folder.mkdir()
    for name, members in tars.items():
        write_tar(folder / f"{name}.tar", members)


def read_raw(packed: Path, key: str) -> tuple[bytes, bytes]:
    """The image and the record of a scene."""
    for path in packed.glob("*.tar"):
        with tarfile.open(path) as tar:
            if f"{key}.jpg" in tar.getnames():
                image, record = (tar.extractfile(f"{key}.{suffix}") for suffix in ("jpg", "json"))
                assert image is not None and record is not None
                return image.read(), record.read()
    raise AssertionError(key)


def keys_of(directory: Path) -> dict[str, list[str]]:
    """The keys of each split in order, from the index; the tars must hold exactly these."""
    index = read_rows(directory)
    found: dict[str, list[str]] = {}
    for name, rows in index.items():
        keys = [row[0] for row in rows]
        with tarfile.open(directory / name) as tar:
            assert tar.getnames() == [f"{key}.{suffix}" for key in keys for suffix in ("jpg", "json")]
        found.setdefault(name.partition("-")[0], []).extend(keys)
    return found
