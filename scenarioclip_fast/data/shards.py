"""Random access to a packed data set."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from scenarioclip_fast import forks
from scenarioclip_fast.data.index import EAGER, Index, Keys, Location, index_of_json, part_of
from scenarioclip_fast.data.index import NAME as INDEX
from scenarioclip_fast.data.open_files import OPEN_FILES, File, exhausted_error, is_exhausted
from scenarioclip_fast.data.remote import CACHE_GIB, NoRanges, RemoteShard, RemoteShards, Store, fetch, read_large
from scenarioclip_fast.data.remote_index import CachedIndex
from scenarioclip_fast.data.scene import READABLE, Scene, scene_from_json
from scenarioclip_fast.data.shard_cache import ShardCache, default_cache_dir
from scenarioclip_fast.data.views_file import NAME as VIEWS
from scenarioclip_fast.data.views_file import parse_views
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.data.vocabulary_file import BINARY, HEADER_BYTES, JSON, declared_size
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import Mapped, NotRegularError, is_url, map_file, read_regular
from scenarioclip_fast.parsing import parse_json
from scenarioclip_fast.terminal import get_logger, printable, short

SPLITS = ("train", "val", "test")
# What other data sets call them.
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
IN_MEMORY = 8 << 20  # bytes up to which a remote vocabulary is not worth a file in the shard cache
_COUNTS = ("scenes", "actions", "objects", "relations", "masked_relations")  # of a split in the manifest
_MOST_BYTES = 1 << 48  # of a file in the manifest
_log = get_logger(__name__)
_SPLIT_OF_NAME = {name: split for split, names in _SPLIT_NAMES.items() for name in names}


class BadSample(ValueError):
    """A scene of a shard is unusable.

    `reason` is a short identifier, by which loaders count; `source` the path of the data set, if a loader has several.
    """

    def __init__(self, key: str, reason: str, detail: str, source: str | None = None) -> None:
        super().__init__(key, reason, detail, source)
        self.key, self.reason, self.detail, self.source = key, reason, detail, source

    def __str__(self) -> str:
        where = self.key if self.source is None else f"{self.key} of {self.source}"
        return printable(f"{where}: {self.reason}: {self.detail}")


def words_of(name: str) -> list[str]:
    """Split a file name at "_", "-" and "."."""
    return [word for word in re.split(r"[-_.]", name) if word]


def split_named(word: str) -> str | None:
    """The split that a word names, in any case and with or without a year: "Validation" or "train2017"; None: none.

    >>> split_named("dev"), split_named("test2015"), split_named("trainval")
    ('val', 'test', None)
    """
    return _SPLIT_OF_NAME.get(re.sub(r"(19|20)\d\d$", "", word.lower()))


def is_sha256(value: Any) -> bool:
    """Whether a value is a SHA-256 in hex."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_packed(directory: str | Path) -> bool:
    """Whether `directory` is a local packed data set."""
    return (Path(directory) / "manifest.json").is_file()


def digest(keys: Iterable[str]) -> int:
    """Checksum of keys in order."""
    return functools.reduce(lambda crc, key: zlib.crc32(key.encode(), crc), keys, 0)


class ShardSet:
    """The scenes of one split, in the order of the index.

    Reads are positioned (`pread`), so threads may share a ShardSet; a pickled copy opens its own files. Remote shards
    are read by byte ranges and, as far as they fit, fetched into a disk cache (see `remote`). Fetching starts with the
    first read of a scene: reading only the keys or the vocabulary fetches no shards.

    Args:
        source: output directory of `scenarioclip-fast pack`, or its URL: "s3://...", "https://..." or any other
            protocol of fsspec; "file://..." caches a slow mount.
        split: "train", "val" or "test".
        shard_cache_dir: local cache of remote shards, which processes may share. None:
            ~/.cache/scenarioclip-fast/shards.
        shard_cache_gib: size limit of the cache in GiB; 0 disables it.
        verify: hash each local shard when its first scene is read, and each cached shard before it is used, in every
            process. The scenes of a local shard with another SHA-256 than in the manifest are BadSamples with the
            reason "damaged_shard".

    Raises:
        UserError: no packed data set, or no such split, or the data set cannot be reached; at the first read, the cache
            directory is not writable.
        MissingDependencyError: fsspec, or its package for this kind of storage, is not installed.
    """

    def __init__(
        self,
        source: str | Path,
        split: str = "train",
        *,
        shard_cache_dir: str | Path | None = None,
        shard_cache_gib: float = CACHE_GIB,
        verify: bool = False,
    ) -> None:
        self.source, self.split, self._verify = str(source), split, verify
        if split not in SPLITS:
            raise UserError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
        if not 0 <= shard_cache_gib < math.inf:
            raise UserError(f"shard_cache_gib: got {shard_cache_gib:g}, expected a finite number of at least 0")
        self.is_remote = is_url(source)
        if not self.is_remote and not Path(source).is_dir():
            problem = "is a file" if Path(source).exists() else "no such directory"
            raise UserError(
                f"{source}: {problem}; `scenarioclip-fast pack SOURCE --out DIR` creates a directory of shards"
            )
        self._cache = (Path(shard_cache_dir or default_cache_dir()), int(shard_cache_gib * 2**30))
        store = Store(self.source) if self.is_remote else None
        self.manifest = self._read_json("manifest.json", store)
        if store is not None:
            self._check_ranges(store)
        self._has_binary_index = "index" in self.manifest
        self._splits = self._parse_manifest()
        self._shards = self._splits[split]
        self._vocabulary: Vocabulary | None = None
        self._vocabulary_cache: ShardCache | None = None
        self._files, self._owner = OPEN_FILES, OPEN_FILES.new_owner()
        self._fetching: RemoteShards | None = None
        self._checks: dict[int, _Check] = {}
        self._lock = forks.Lock()
        self._converted: bytes | None = None  # from index.json
        self._index_file: CachedIndex | None = None
        self._opened: Index | None = self._open_index(store)
        self._range = self._opened.numbers(split)
        forks.register(self)

    def _parse_manifest(self) -> dict[str, list[RemoteShard]]:
        try:
            self.manifest["splits"][self.split]["shards"]
            shards = {
                split: [
                    RemoteShard(str(shard["name"]), str(shard["sha256"]), int(shard["bytes"]))
                    for shard in self.manifest["splits"].get(split, {"shards": ()})["shards"]
                ]
                for split in SPLITS
            }
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._malformed(error) from None
        for shard in itertools.chain.from_iterable(shards.values()):  # names and digests become file names
            if os.path.basename(shard.name) != shard.name:
                raise UserError(f"{self._where('manifest.json')}: shard name {shard.name!r} escapes the directory")
            if not shard.name.isprintable():  # a null byte, or a lone surrogate
                raise UserError(f"{self._where('manifest.json')}: shard name {shard.name!r} is no name of a file")
            if not is_sha256(shard.sha256):
                raise UserError(
                    f"{self._where('manifest.json')}: {shard.name} has no valid SHA-256; pack the data set again"
                )
            if not 0 <= shard.size < _MOST_BYTES:
                raise UserError(
                    f"{self._where('manifest.json')}: {shard.name}: got a size of {short(shard.size)} bytes, expected "
                    f"at least 0 and less than {_MOST_BYTES}; pack the data set again"
                )
        for name in _COUNTS:
            count = self.manifest["splits"][self.split].get(name, 0)
            if type(count) is not int or count < 0:
                raise UserError(
                    f"{self._where('manifest.json')}: {name} of {self.split}: got {short(count)}, expected a number of "
                    "at least 0; pack the data set again"
                )
        return shards

    def _malformed(self, error: Exception) -> UserError:
        return UserError(f"{self.source}: malformed index ({type(error).__name__}: {error}); pack the data set again")

    @property
    def _index(self) -> Index:
        return self.open_index()

    def open_index(self) -> Index:
        """Return the index, opened again after `close` or a fork, and in a pickled copy."""
        with self._lock:
            if self._opened is None:
                self._opened = self._open_index(Store(self.source) if self.is_remote else None)
            return self._opened

    def _open_index(self, store: Store | None) -> Index:
        name = INDEX if self._has_binary_index else "index.json"
        try:
            if not self._has_binary_index:
                if self._converted is None:
                    rows = self._read_json(name, store).get("shards")
                    self._converted = index_of_json(cast(dict[str, Any], rows), self._splits)
                read, size = part_of(self._converted), len(self._converted)
            elif store is None:
                with self._reading(name):
                    data = map_file(Path(self.source, name))
                if len(data) <= EAGER:  # a copy over a mapped file would end the process
                    data = bytes(data)
                read, size = part_of(data), len(data)
            else:
                size, sha256 = int(self.manifest["index"]["bytes"]), self._sha256(name)
                if sha256 is None:  # it becomes a file name
                    raise KeyError(f"sha256 of {name}")
                self._index_file = CachedIndex(store, sha256, size, *self._cache)
                read = self._index_file.read
        except UserError:
            raise
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._malformed(error) from None
        return Index(read, size, self._splits, self._where(name), eager=store is None)

    def __len__(self) -> int:
        return len(self._range)

    @property
    def keys(self) -> Keys:
        """The keys of all scenes, which are read on demand."""
        return Keys(self.open_index, self._range)

    def find(self, key: str) -> int | None:
        """The position of the scene with a key; None: the split has none."""
        return self.keys.find(key)

    @property
    def converted_index(self) -> bytes | None:
        """The content of index.bin if the data set has index.json instead, as written by earlier versions."""
        return self._converted

    @property
    def shard_scenes(self) -> npt.NDArray[np.int64]:  # [shards]
        """The number of scenes of each shard, in the order of the scenes."""
        shards = self._index.shards(self.split)
        return np.diff(self._index.first[shards.start : shards.stop + 1])

    def _locate(self, i: int) -> Location:
        """Where scene `i` is; the number of the shard is that among those of the split."""
        found = self._index.locate(self._range[i])
        return found._replace(shard=found.shard - self._index.shards(self.split).start)

    def count(self, name: str) -> int:
        """A count of the split from the manifest: "actions", "objects", "relations" or "masked_relations"."""
        # Packs of schema 1 have an action for every scene and masks for every relation.
        found = self.manifest["splits"][self.split]
        old = {"actions": "scenes", "masked_relations": "relations"}
        return int(found.get(name, found.get(old.get(name), 0)))

    @functools.cached_property
    def digest(self) -> int:
        """Checksum of the keys in order, which identifies the scenes of the split."""
        return self._index.keys_crc(self.split)

    @functools.cached_property
    def content_digest(self) -> int:
        """Checksum of the shards of the split, by the manifest."""
        return digest(shard.sha256 for shard in self._shards)

    @property
    def vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            self._vocabulary = self.read_vocabulary()
        return self._vocabulary

    @functools.cached_property
    def views(self) -> npt.NDArray[np.uint8] | None:  # [scenes]
        """How many objects and relations each scene has, at most 255; None: the data set was packed without.

        Raises:
            UserError: the file is damaged, or cannot be read.
        """
        if (sha256 := self._sha256(VIEWS)) is None:
            return None
        scenes = int(self._index.first[-1])
        if self.is_remote:
            with self._reading(VIEWS):
                data: Mapped = read_large(Store(self.source), RemoteShard(VIEWS, sha256, scenes))
        else:
            with self._reading(VIEWS):
                data = map_file(Path(self.source, VIEWS))
            if len(data) <= EAGER:  # a copy over a mapped file would end the process
                data = bytes(data)
        return parse_views(data, scenes, sha256, self._where(VIEWS))[self._range.start : self._range.stop]

    def read_vocabulary(self) -> Vocabulary:
        """Read the vocabulary without keeping it."""
        store = Store(self.source) if self.is_remote else None
        if (sha256 := self._sha256(BINARY)) is None:  # an older pack
            return Vocabulary.from_json(self._read_json(JSON, store), self._where(JSON))
        with self._reading(BINARY):
            data = self._fetch_vocabulary(store, sha256) if store else map_file(Path(self.source, BINARY))
        return Vocabulary.from_bytes(data, self._where(BINARY), sha256)

    def _fetch_vocabulary(self, store: Store, sha256: str) -> Mapped:
        """Map a large remote vocabulary from the shard cache, or hold it in memory."""
        size = declared_size(store.read(BINARY, 0, HEADER_BYTES), self._where(BINARY))
        file = RemoteShard(BINARY, sha256, size)
        if size > IN_MEMORY and (cache := fetch(store, file, *self._cache)) is not None:
            with self._lock:
                before, self._vocabulary_cache = self._vocabulary_cache, cache  # its claim: until `close`
            if before is not None:
                before.close()
            return map_file(cache.path(sha256), follow=False)
        if size > IN_MEMORY:
            _log.warning(
                "%s: not in the shard cache: each process holds its %d MiB in memory; enlarge the cache to share it",
                self._where(BINARY),
                size >> 20,
            )
        return read_large(store, file)

    def locations(self) -> Iterator[tuple[str, str, int, int, tuple[int, int]]]:
        """Yield the key of each scene, the name of its shard, offset and size of its image, and those of its record."""
        for i in range(len(self)):
            found = self._locate(i)
            shard = self._shards[found.shard].name
            yield found.key, shard, found.image, found.image_size, (found.record, found.record_size)

    def read(self, i: int) -> Scene:
        """Read scene `i`: `image` holds JPEG bytes, masks are RLE.

        Raises:
            BadSample: the scene is missing, truncated or malformed, or its shard is not the one in the manifest.
        """
        at = self._locate(i)
        shard = at.shard
        try:
            file = self._open(shard)
        except OSError as error:
            raise self._unreadable(at, error) from error
        if file is None or not self.is_remote:
            if file is not None and self._verify and not self._is_intact(at, file):
                detail = "its checksum differs from the manifest's; copy the shard again, or pack the data set again"
                raise BadSample(at.key, "damaged_shard", f"{self._shards[shard].name}: {detail}")
            return self._read(at, file)
        problem: BadSample | None = None
        try:
            scene = self._read(at, file)
        except BadSample as error:
            problem = error
        changed = not self._remote().is_unchanged(shard, file.status())
        if problem is None and not changed:
            return scene
        if not self._remote().suspect(shard, certain=changed) and problem is not None:
            raise problem
        self._files.forget(self._owner, shard, file)
        return self._read(at, None)

    def _read(self, at: Location, file: File | None) -> Scene:
        """Read a scene from the open file of its shard, or with a byte range from the store."""
        key, shard, jpg_offset, jpg_size, json_offset, json_size = at
        try:
            if file is not None:
                image, record = file.read(jpg_offset, jpg_size), file.read(json_offset, json_size)
            else:  # one request, since `pack` writes them next to each other
                data = self._remote().read(shard, jpg_offset, json_offset + json_size)
                image, record = data[:jpg_size], data[json_offset - jpg_offset :]
        except OSError as error:
            raise self._unreadable(at, error) from error
        for member, offset, size in ((image, jpg_offset, jpg_size), (record, json_offset, json_size)):
            if len(member) != size:
                name = self._shards[shard].name
                raise BadSample(key, "short_shard", f"{name}: got {len(member)} of {size} bytes at {offset}")
        try:
            scene = scene_from_json(key, image, parse_json(record, strict=False))
        except ValueError as error:
            raise BadSample(key, "bad_json", str(error)) from error
        scene.split = self.split
        return scene

    def _unreadable(self, at: Location, error: OSError) -> Exception:
        name = self._shards[at.shard].name
        if is_exhausted(error):  # no fault of the scene
            return exhausted_error(self._where(name))
        return BadSample(at.key, "unreadable_shard", f"{name}: {error.strerror or error}")

    def _is_intact(self, at: Location, file: File) -> bool:
        """Whether the shard of a scene has the SHA-256 of the manifest; hashed by the first thread that reads it."""
        shard = at.shard
        with self._lock:
            check = self._checks.setdefault(shard, _Check())
        with check.lock:
            if check.intact is None:
                try:
                    check.intact = file.sha256() == self._shards[shard].sha256
                except OSError as error:
                    raise self._unreadable(at, error) from error
            return check.intact

    def _after_fork(self) -> None:
        self._fetching = None  # its threads are the parent's, and so are its claims in the cache
        if self._index_file is not None:
            self._index_file = self._opened = None

    def close(self) -> None:
        """Close the shard files and stop fetching; the next read reopens them."""
        with self._lock:
            fetching, self._fetching = self._fetching, None
            index, self._index_file = self._index_file, None
            cache, self._vocabulary_cache = self._vocabulary_cache, None
            if index is not None:
                self._opened = None
        self._files.close(self._owner)
        for used in (fetching, index, cache):
            if used is not None:
                used.close()

    def _open(self, shard: int) -> File | None:
        """The open file of a shard; None if it is not on this machine yet."""
        path = self._remote().path(shard) if self.is_remote else Path(self.source, self._shards[shard].name)
        if path is None:
            return None
        try:
            return self._files.open(self._owner, shard, path, follow=not self.is_remote)
        except OSError as error:
            if not self.is_remote or is_exhausted(error):
                raise
            if isinstance(error, FileNotFoundError | NotRegularError):  # removed or replaced
                self._remote().suspect(shard, certain=True)
            return None

    def _check_ranges(self, store: Store) -> None:
        try:
            store.read("manifest.json", 0, 1)
        except NoRanges as error:
            raise UserError(
                f"{self.source}: the server does not support byte ranges ({error}), which are required to read single "
                "scenes; use another server, or copy the shards to a local disk"
            ) from None
        except OSError as error:
            raise UserError(f"{self.source}: not readable ({error})") from None

    def _remote(self) -> RemoteShards:
        with self._lock:
            if self._fetching is None:
                self._fetching = RemoteShards(Store(self.source), self._shards, *self._cache, rehash=self._verify)
            return self._fetching

    def _where(self, name: str) -> str:
        return f"{self.source.rstrip('/')}/{name}"

    def _read_file(self, name: str, store: Store | None) -> bytes:
        """Read a small file; if it is remote, verify it against the manifest."""
        with self._reading(name):
            if store is None:
                return read_regular(Path(self.source, name))
            data = store.read(name)
        if name != "manifest.json" and hashlib.sha256(data).hexdigest() != self._sha256(name):
            raise UserError(f"{self._where(name)}: the checksum differs from the manifest's; copy the data set again")
        return data

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise UserError(
                f"{self._where(name)}: no such file; expected the output of `scenarioclip-fast pack`"
            ) from None
        except OSError as error:
            raise UserError(f"{self._where(name)}: not readable ({error.strerror or error})") from None

    def _sha256(self, name: str) -> str | None:
        """The SHA-256 of a file by the manifest; None if it does not list the file."""
        sums = self.manifest.get("sha256")
        if not isinstance(sums, dict) or name not in sums:
            return None
        if not is_sha256(sums[name]):
            raise UserError(f"{self._where('manifest.json')}: {name} has no valid SHA-256; pack the data set again")
        return str(sums[name])

    def _read_json(self, name: str, store: Store | None) -> dict[str, Any]:
        try:
            record = parse_json(self._read_file(name, store), strict=name != "index.json")
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{self._where(name)}: not readable as JSON ({error}); pack the data set again") from None
        got = record.get("schema") if isinstance(record, dict) else type(record).__name__
        if got not in READABLE:
            expected = " or ".join(map(str, READABLE))
            raise UserError(
                f"{self._where(name)}: got schema {short(got)}, expected {expected}; pack the data set again"
            )
        return dict(record)

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        # The index and the vocabulary, which may be mapped files, are opened again.
        own = {"_files", "_owner", "_fetching", "_checks", "_lock", "_opened", "_index_file"}
        own |= {"_vocabulary", "_vocabulary_cache", "views"}
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files, self._owner = OPEN_FILES, OPEN_FILES.new_owner()
        self._fetching, self._checks, self._lock = None, {}, forks.Lock()
        self._opened = self._index_file = self._vocabulary = self._vocabulary_cache = None
        forks.register(self)


class _Check:
    """Whether a shard is intact; None if it has not been hashed."""

    def __init__(self) -> None:
        self.lock = forks.Lock()
        self.intact: bool | None = None
