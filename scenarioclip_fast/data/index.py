"""The index of a packed data set: where each scene lies in its shard, and which scene has a key.

`index.bin` is read through a memory map, so opening it costs the same for any number of scenes, and the ranks of a host
share its pages. Plain arrays suit that better than Arrow or SQLite: rows have a fixed size, and nothing is ever
inserted. All numbers are little-endian:

    header    see _HEADER
    blocks    one per shard: its rows (see ROW), then its keys in UTF-8, one after the other
    lookup    the scenes in buckets by the first bits of the hash of their key: where each bucket starts, in 4 bytes,
              then for each scene, sorted by hash and number, its number and 16 bits of the hash (see _LOOKUP)
    table     one entry per shard (see _ENTRY), sorted by split; the CRC-32 of each _PIECE bytes of the lookup

A scene takes 22 to 23 bytes and its key; a shard, 24 bytes. Header and table are checked when the index is opened, the
rest when it is first used. `index.json` of older packs is converted in memory.
"""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, Protocol, overload

import numpy as np
import numpy.typing as npt

from scenarioclip_fast.data.splitmix64 import hash_text, hash_texts
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import Mapped

NAME = "index.bin"
BLOCK = 512  # bytes: members of a tar start at multiples of it
ROW = np.dtype([("image", "<u4"), ("image_size", "<u4"), ("record_size", "<u4"), ("key_end", "<u4")])
"""Start of the image in blocks of 512 bytes, sizes of the image and the record in bytes, and the end of the key,
counted from the start of the shard's keys. The record follows the image and its own tar header."""

_MAGIC, _VERSION = b"SCFINDEX", 1
_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("shards", "<u4"),
        ("scenes", "<u8"),
        ("lookup", "<u8"),  # where these parts start, in bytes
        ("table", "<u8"),
        ("content", "<u4"),  # CRC-32 of the SHA-256 of all shards, in hex
        ("keys", "<u4", 3),  # CRC-32 of the keys of each split
        ("table_crc", "<u4"),
        ("crc", "<u4"),  # of the header up to here
    ]
)
_ENTRY = np.dtype([("offset", "<u8"), ("scenes", "<u4"), ("key_bytes", "<u4"), ("crc", "<u4"), ("split", "<u4")])
_LOOKUP = np.dtype([("scene", "<u4"), ("tag", "<u2")])
_TAG = 0xFFFF
_PIECE = 1 << 16
EAGER = 64 << 20
"""Bytes up to which an index is read and checked completely when it is opened, in a few hundredths of a second."""
_MOST = 1 << 32  # scenes


class Location(NamedTuple):
    """A scene: its key, the number of its shard, and the offset and size of its image and of its record in bytes."""

    key: str
    shard: int
    image: int
    image_size: int
    record: int
    record_size: int


class ShardSize(Protocol):
    """What an index knows of a shard in the manifest."""

    @property
    def sha256(self) -> str: ...
    @property
    def size(self) -> int: ...


Read = Callable[[int, int, int | None], memoryview]
"""Return the bytes from `start` to `stop` of an index. The third argument is their CRC-32; None: they are needed once,
when the index is opened. A reader with a cache uses only cached bytes that have this CRC-32."""


class IndexWriter:
    """Writes an index, shard by shard.

    Args:
        file: an empty file, open for writing. `finish` completes it.
        splits: names of the splits, in the order of the manifest.
    """

    def __init__(self, file: IO[bytes], splits: Sequence[str]) -> None:
        self._file, self._splits = file, list(splits)
        file.write(bytes(_HEADER.itemsize))
        self._offset = _HEADER.itemsize
        self._shards: list[tuple[int, Any, str, npt.NDArray[np.uint64]]] = []
        self._keys: dict[int, list[bytes]] = {i: [] for i in range(len(splits))}
        self._crc = [0] * len(splits)

    def add(self, split: str, sha256: str, rows: Iterable[Sequence[Any]]) -> None:
        """Add a shard, given as rows of key, offset and size of the image, and offset and size of the record.

        Raises:
            ValueError: the rows do not describe a shard as `pack` writes it.
        """
        keys, *columns = zip(*rows, strict=True) if (rows := list(rows)) else ((), (), (), (), ())
        image, image_size, record, record_size = (np.array(column, np.int64) for column in columns)
        if any((column < 0).any() for column in (image, image_size, record_size)):
            raise ValueError("negative offset or size")
        at = (image % BLOCK != 0) | (record != _record_offset(image, image_size))
        if at.any():
            raise ValueError(f"{keys[int(at.argmax())]}: the image and the record are not consecutive members of a tar")
        encoded = [str(key).encode() for key in keys]
        ends = np.cumsum([len(key) for key in encoded], dtype=np.int64)
        self.add_arrays(split, sha256, b"".join(encoded), ends, image // BLOCK, image_size, record_size)

    def add_arrays(
        self,
        split: str,
        sha256: str,
        keys: bytes,
        key_end: npt.NDArray[Any],  # [n]
        image: npt.NDArray[Any],  # [n], in blocks of 512 bytes
        image_size: npt.NDArray[Any],  # [n]
        record_size: npt.NDArray[Any],  # [n]
    ) -> None:
        """Add a shard, given as arrays as in ROW."""
        rows = np.empty(len(key_end), ROW)
        for name, column in (
            ("image", image),
            ("image_size", image_size),
            ("record_size", record_size),
            ("key_end", key_end),
        ):
            if len(column) and column.max() > np.iinfo(np.uint32).max:
                raise ValueError(f"{name}: got {column.max()}, expected at most {np.iinfo(np.uint32).max}")
            rows[name] = column
        block = rows.tobytes() + keys
        number = self._splits.index(split)
        entry = np.array((self._offset, len(rows), len(keys), zlib.crc32(block), number), _ENTRY)
        self._file.write(block)
        self._offset += len(block)
        self._crc[number] = zlib.crc32(keys, self._crc[number])
        self._shards.append((number, entry, sha256, hash_texts(keys, key_end)))

    def finish(self) -> None:
        """Write the lookup, the table and the header."""
        self._shards.sort(key=lambda shard: shard[0])  # stable
        hashes = np.concatenate([np.empty(0, np.uint64), *(shard[3] for shard in self._shards)])
        if len(hashes) > _MOST:
            raise ValueError(f"got {len(hashes)} scenes, expected at most {_MOST}: pack them as several data sets")
        scenes = len(hashes)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        bits = _bucket_bits(scenes)
        sizes = np.bincount((hashes >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(scenes, np.int64))
        starts = np.zeros(2**bits + 1, "<u4")
        starts[1 : len(sizes) + 1] = np.cumsum(sizes)
        starts[len(sizes) + 1 :] = scenes
        found = np.empty(scenes, _LOOKUP)
        found["scene"], found["tag"] = order, hashes & np.uint64(_TAG)
        del hashes, order
        lookup = np.concatenate([starts.view(np.uint8), found.view(np.uint8)])
        pieces = [zlib.crc32(lookup[i : i + _PIECE].data) for i in range(0, len(lookup), _PIECE)]
        entries = np.array([shard[1] for shard in self._shards], _ENTRY)
        table = entries.tobytes() + np.array(pieces, "<u4").tobytes()
        header = np.zeros((), _HEADER)
        header["magic"], header["version"] = _MAGIC, _VERSION
        header["shards"], header["scenes"] = len(entries), scenes
        header["lookup"], header["table"] = self._offset, self._offset + lookup.nbytes
        header["content"] = _crc_of(shard[2] for shard in self._shards)
        header["keys"], header["table_crc"] = self._crc, zlib.crc32(table)
        header["crc"] = zlib.crc32(header.tobytes()[:-4])
        self._file.write(lookup.data)
        self._file.write(table)
        self._file.seek(0)
        self._file.write(header.tobytes())


class Index:
    """The index of all splits of a data set.

    Args:
        read: reads parts of the file.
        size: of the file in bytes.
        splits: the shards of each split, by the manifest.
        where: name of the file for error messages.
        eager: check everything now if the index is small, so that a run does not end when it meets the damage.

    Raises:
        UserError: header or table are damaged, or belong to other shards. Every method raises it if the part that it
            reads is damaged.
    """

    def __init__(
        self, read: Read, size: int, splits: Mapping[str, Sequence[ShardSize]], where: str, *, eager: bool = True
    ) -> None:
        self._read, self._splits, self._where = read, list(splits), where
        header = self._header(size)
        shards = [shard for found in splits.values() for shard in found]
        expected = (len(shards), _crc_of(shard.sha256 for shard in shards))
        if (int(header["shards"]), int(header["content"])) != expected:
            raise self._damaged("it belongs to other shards than the manifest")
        lookup, start, scenes = int(header["lookup"]), int(header["table"]), int(header["scenes"])
        pieces = -(-(start - lookup) // _PIECE)
        if start + len(shards) * _ENTRY.itemsize + 4 * pieces != size:
            raise self._damaged(f"it is truncated, or has been extended: {size} bytes")
        table = read(start, size, None)
        if zlib.crc32(table) != header["table_crc"]:
            raise self._damaged("its table has another checksum")
        self._entries = np.frombuffer(table, _ENTRY, len(shards))
        self._pieces = np.frombuffer(table, "<u4", offset=self._entries.nbytes)
        counts = self._entries["scenes"].astype(np.int64)
        sizes = counts * ROW.itemsize + self._entries["key_bytes"]
        ends = self._entries["offset"].astype(np.int64) + sizes
        if (
            counts.sum() != scenes
            or start - lookup != 4 * (2 ** _bucket_bits(scenes) + 1) + _LOOKUP.itemsize * scenes
            or (self._entries["offset"] > lookup).any()  # before the conversion to signed numbers
            or (len(ends) and ends.max() > lookup)
            or (self._entries["split"] != np.repeat(np.arange(len(splits)), [len(s) for s in splits.values()])).any()
        ):
            raise self._damaged("its parts do not fit together")
        self._lookup, self._table = lookup, start
        self._shard_bytes = np.array([shard.size for shard in shards], np.int64)
        self.first = np.concatenate([[0], np.cumsum(counts)])
        """[shards + 1] the number of scenes before each shard."""
        self._keys_crc = [int(crc) for crc in header["keys"]]
        self._first_shard = np.concatenate([[0], np.cumsum([len(found) for found in splits.values()])])
        self._checked = np.zeros(len(shards), bool)
        self._checked_pieces = np.zeros(len(self._pieces), bool)
        if eager and size <= EAGER:
            for number in range(len(shards)):
                self._block(number)
            for number in range(len(self._pieces)):
                self._piece(number)

    def _header(self, size: int) -> Any:
        if size < _HEADER.itemsize:
            raise self._damaged(f"got {size} bytes, expected at least {_HEADER.itemsize}")
        data = self._read(0, _HEADER.itemsize, None)
        header = np.frombuffer(data, _HEADER)[0]
        if header["magic"] != _MAGIC:
            raise self._damaged("it is not an index")
        if header["version"] != _VERSION:
            raise self._damaged(f"got version {header['version']}, expected {_VERSION}")
        if zlib.crc32(data[:-4]) != header["crc"]:
            raise self._damaged("its header has another checksum")
        if not _HEADER.itemsize <= int(header["lookup"]) <= int(header["table"]):
            raise self._damaged("its parts do not fit together")
        return header

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self._where}: damaged index: {what}; copy the data set again, or pack it again")

    def numbers(self, split: str) -> range:
        """The numbers of the scenes of a split."""
        shards = self.shards(split)
        return range(int(self.first[shards.start]), int(self.first[shards.stop]))

    def shards(self, split: str) -> range:
        """The numbers of the shards of a split."""
        number = self._splits.index(split)
        return range(int(self._first_shard[number]), int(self._first_shard[number + 1]))

    def keys_crc(self, split: str) -> int:
        """CRC-32 of the keys of a split in order, which identifies its scenes."""
        return self._keys_crc[self._splits.index(split)]

    def locate(self, i: int) -> Location:
        """Return scene number `i` of the data set."""
        shard = int(self.first.searchsorted(i, "right")) - 1
        rows, keys = self._block(shard)
        k = i - int(self.first[shard])
        image, image_size, record_size, key_end = rows[k].item()
        start = int(rows["key_end"][k - 1]) if k else 0
        offset = image * BLOCK
        record = int(_record_offset(offset, image_size))
        return Location(str(keys[start:key_end], "utf-8"), shard, offset, image_size, record, record_size)

    def keys_of(self, shard: int) -> list[str]:
        """The keys of all scenes of a shard."""
        rows, keys = self._block(shard)
        ends = [0, *rows["key_end"].tolist()]
        return [str(keys[start:end], "utf-8") for start, end in itertools.pairwise(ends)]

    def find(self, key: str, within: range) -> int | None:
        """The number of the first scene with a key among these numbers; None: there is none."""
        scenes, wanted = int(self.first[-1]), _hash(key)
        bits = _bucket_bits(scenes)
        bucket = wanted >> (64 - bits)
        low, high = struct.unpack("<II", self._lookup_bytes(4 * bucket, 4 * bucket + 8))
        if not low <= high <= scenes:
            raise self._damaged("the buckets of its lookup are not in order")
        if low == high:  # it may start where the last piece ends
            return None
        entries = 4 * (2**bits + 1)
        size = _LOOKUP.itemsize
        found = self._lookup_bytes(entries + size * low, entries + size * high)
        for i, tag in struct.iter_unpack("<IH", found):
            if tag == wanted & _TAG:
                if i >= scenes:
                    raise self._damaged("its lookup names a scene that does not exist")
                if i in within and self.locate(i).key == key:
                    return int(i)
        return None

    def _lookup_bytes(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop` of the lookup, which may be in several pieces."""
        first, last = start // _PIECE, max(start, stop - 1) // _PIECE
        data = b"".join(self._piece(number) for number in range(first, last + 1))
        return data[start - first * _PIECE : stop - first * _PIECE] if len(data) > stop - start else data

    def _piece(self, number: int) -> memoryview:
        start = self._lookup + number * _PIECE
        piece = self._read(start, min(start + _PIECE, self._table), int(self._pieces[number]))
        if not self._checked_pieces[number]:
            if zlib.crc32(piece) != self._pieces[number]:
                raise self._damaged(f"piece {number} of its lookup has another checksum")
            self._checked_pieces[number] = True
        return piece

    def _block(self, shard: int) -> tuple[npt.NDArray[Any], memoryview]:
        """The rows and the keys of a shard."""
        offset, scenes, key_bytes, crc, _ = self._entries[shard].item()
        split = scenes * ROW.itemsize
        block = self._read(offset, offset + split + key_bytes, crc)
        rows, keys = np.frombuffer(block[:split], ROW), block[split:]
        if not self._checked[shard]:
            if zlib.crc32(block) != crc:
                raise self._damaged(f"its block of shard {shard} has another checksum")
            ends = rows["key_end"].astype(np.int64)
            if (np.diff(ends, prepend=0) < 0).any() or (scenes and ends[-1] != key_bytes):
                raise self._damaged(f"its block of shard {shard} is malformed")
            last = _record_offset(rows["image"].astype(np.int64) * BLOCK, rows["image_size"]) + rows["record_size"]
            if (last > self._shard_bytes[shard]).any():
                k = int((last > self._shard_bytes[shard]).argmax())
                key = str(keys[ends[k - 1] if k else 0 : ends[k]], "utf-8", "replace")
                raise self._damaged(f"{key} extends past the end of its shard")
            try:
                str(keys, "utf-8")
            except UnicodeDecodeError:
                raise self._damaged(f"the keys of shard {shard} are not UTF-8") from None
            self._checked[shard] = True
        return rows, keys


def part_of(data: Mapped) -> Read:
    """A function that returns parts of a mapped file, or of bytes in memory."""
    view = memoryview(data)
    return lambda start, stop, crc: view[start:stop]


def index_of_json(shards: Mapping[str, Any], splits: Mapping[str, Sequence[Any]]) -> bytes:
    """Convert the rows of index.json, by the name of their shard, to the bytes of an index.

    Raises:
        ValueError, TypeError, KeyError: malformed rows.
    """
    file = io.BytesIO()
    writer = IndexWriter(file, list(splits))
    for split, found in splits.items():
        for shard in found:
            try:
                writer.add(split, shard.sha256, shards[shard.name])
            except (ArithmeticError, TypeError, ValueError) as error:
                raise ValueError(f"{shard.name}: {error}") from error
    writer.finish()
    return file.getvalue()


class Keys(Sequence[str]):
    """The keys of a range of scenes, read on demand.

    Args:
        index: returns the index, which may have been closed and opened again.
        numbers: of the scenes.
    """

    def __init__(self, index: Callable[[], Index], numbers: range) -> None:
        self._index, self._numbers = index, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        found, index = self._numbers[i], self._index()
        return [index.locate(k).key for k in found] if isinstance(found, range) else index.locate(found).key

    def __iter__(self) -> Iterator[str]:
        first = self._index().first
        start, stop = self._numbers.start, self._numbers.stop
        shard = int(first.searchsorted(start, "right")) - 1
        while start < stop:
            keys = self._index().keys_of(shard)[start - int(first[shard]) : stop - int(first[shard])]
            yield from keys
            start, shard = start + len(keys), shard + 1

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.find(key) is not None

    def find(self, key: str) -> int | None:
        """The position of a key; None: it is not among these."""
        found = self._index().find(key, self._numbers)
        return None if found is None else found - self._numbers.start

    def index(self, value: str, start: int = 0, stop: int | None = None) -> int:
        if (found := self.find(value)) is None or found not in range(*slice(start, stop).indices(len(self))):
            raise ValueError(f"{value!r} is not in the list")
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Keys({len(self)})"


def _record_offset(image: Any, image_size: Any) -> Any:
    """Where the record starts: after the image, padded to a whole block, and the record's tar header."""
    return image + (image_size + np.int64(BLOCK - 1)) // BLOCK * BLOCK + BLOCK


def _bucket_bits(scenes: int) -> int:
    """How many bits of a hash choose the bucket: buckets hold 4 to 8 scenes on average."""
    return (scenes // 8).bit_length()


def _hash(key: str) -> int:
    return hash_text(key.encode("utf-8", "surrogatepass"))


def _crc_of(texts: Iterable[str]) -> int:
    crc = 0
    for text in texts:
        crc = zlib.crc32(text.encode(), crc)
    return crc
