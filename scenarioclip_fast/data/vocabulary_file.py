"""vocabulary.bin: the texts of the three levels, their CLIP token ids and their train counts, mapped into memory.

    header     magic, version (uint32), 0 (uint32); per level: number of texts n, bytes of text b, token ids t (uint64)
    per level  ends of the texts in bytes, uint64 [n]; ends of the token ids, uint64 [n]; train counts, int64 [n];
               the texts in ascending order as UTF-8, uint8 [b]; token ids, uint16 [t]; padded to 8 bytes each
    trailer    SHA-256 of everything before it

Numbers are little-endian. The order of UTF-8 bytes is that of code points, so it is also the order of Python's strings.
The processes of a host that map the same file share its memory.
"""

from __future__ import annotations

import codecs
import hashlib
import heapq
import operator
import struct
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from io import BytesIO
from itertools import groupby, repeat
from operator import itemgetter
from pathlib import Path
from tempfile import SpooledTemporaryFile, TemporaryFile
from typing import IO, Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import Mapped, map_descriptor
from scenarioclip_fast.levels import LEVELS

MAGIC, VERSION = b"\x93SCVOCAB", 1
_HEADER = struct.Struct(f"<8sII{3 * len(LEVELS)}Q")
HEADER_BYTES, _TRAILER_BYTES = _HEADER.size, hashlib.sha256().digest_size
# Of a level; in the order of the file.
_DTYPES: dict[str, Any] = {"text_ends": "<u8", "token_ends": "<u8", "counts": "<i8", "text": "u1", "tokens": "<u2"}
_BLOCK = 1 << 14  # rows per step of an iteration
_CHECKED = 1 << 16  # texts checked at once: a few MiB of private memory
_WORDS_BYTES = 128  # texts that are alike further are compared one by one
_THREADS = 4  # that check texts; NumPy does not hold the interpreter's lock
_DICT_TEXTS = 1 << 17  # up to here, a level keeps a dict of all ids: about 25 MB
_CACHED_IDS = 1 << 17
_STRIDE = 64  # of the texts that a search starts from
_SPOOL = 1 << 20  # bytes of a section from which a temporary file holds it
_COPIED = 1 << 20

BINARY, JSON = "vocabulary.bin", "vocabulary.json"  # file names in a pack

T = TypeVar("T")


class LazySequence(Sequence[T], Generic[T]):
    """A read-only sequence whose items are made when they are read. A slice is a list; it equals lists of its items."""

    @abstractmethod
    def _one(self, i: int) -> T: ...

    @abstractmethod
    def _some(self, start: int, stop: int) -> list[T]: ...

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> list[T]: ...
    def __getitem__(self, i: int | slice) -> T | list[T]:
        if isinstance(i, slice):
            start, stop, step = i.indices(len(self))
            return (
                self._some(start, max(start, stop)) if step == 1 else [self._one(k) for k in range(start, stop, step)]
            )
        i, n = operator.index(i), len(self)
        if not -n <= i < n:
            raise IndexError(f"got index {i}, expected one of {n} items")
        return self._one(i + n if i < 0 else i)

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), _BLOCK):
            yield from self._some(start, min(start + _BLOCK, len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:5]))
        return f"<{len(self)} items: {shown}{', ...' if len(self) > 5 else ''}>"


class _Ragged(LazySequence[T]):
    """Items that are parts of one array `data`, up to their `ends` [n]."""

    def __init__(self, data: NDArray[Any], ends: NDArray[np.uint64]) -> None:
        self.data, self.ends = data, ends
        self._data, self._ends = data.data, ends.data  # whose items are Python's: fast one by one

    def __len__(self) -> int:
        return len(self._ends)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.data, self.ends)

    def part(self, i: int) -> memoryview:
        """The data of item `i`, which is not negative."""
        return self._data[self._ends[i - 1] if i else 0 : self._ends[i]]

    def bytes_from(self, start: int, stop: int) -> list[bytes]:
        """The bytes of the items from `start` to `stop`."""
        if start >= stop:
            return []
        first = self._ends[start - 1] if start else 0
        size = self._data.itemsize
        block = bytes(self._data[first : self._ends[stop - 1]])
        ends = ((self.ends[start:stop] - np.uint64(first)) * np.uint64(size)).tolist()
        return [block[a:b] for a, b in zip([0, *ends], ends, strict=False)]


class Texts(_Ragged[str]):
    """Texts as UTF-8."""

    def _one(self, i: int) -> str:
        return str(self.part(i), "utf-8")

    def _some(self, start: int, stop: int) -> list[str]:
        return [text.decode() for text in self.bytes_from(start, stop)]


class TokenLists(_Ragged[list[int]]):
    """Lists of token ids."""

    def _one(self, i: int) -> list[int]:
        return self.part(i).tolist()

    def _some(self, start: int, stop: int) -> list[list[int]]:
        return [list(array("H", ids)) for ids in self.bytes_from(start, stop)]

    @classmethod
    def of(cls, lists: Iterable[Iterable[int]]) -> TokenLists:
        """Store lists; raises OverflowError for ids that are not from 0 to 65535, and TypeError."""
        return cls(*_join([array("H", ids).tobytes() for ids in lists], np.dtype("<u2")))


class Counts(LazySequence[int]):
    """Integers of an array."""

    def __init__(self, data: NDArray[np.int64]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def _one(self, i: int) -> int:
        return int(self.data[i])

    def _some(self, start: int, stop: int) -> list[int]:
        return self.data[start:stop].tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.data, dtype)


def _join(parts: list[bytes], dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[np.uint64]]:
    lengths = np.fromiter(map(len, parts), np.uint64, len(parts))
    ends = np.cumsum(lengths, dtype=np.uint64) // np.uint64(dtype.itemsize)
    return np.frombuffer(b"".join(parts), dtype), ends


class Level:
    """The texts of a level, sorted and distinct.

    Attributes:
        tokens: None, if they have not been computed.
        find: returns the id of a text; None: there is no such text.
    """

    def __init__(self, texts: Texts, tokens: TokenLists | None, counts: Counts) -> None:
        self.texts, self.tokens, self.counts = texts, tokens, counts

    @classmethod
    def of(cls, texts: Sequence[str], counts: Sequence[int], tokens: Iterable[Iterable[int]] | None = None) -> Level:
        """Store sorted, distinct texts.

        Raises:
            ValueError: a text contains a lone surrogate, or a count is negative.
            TypeError, OverflowError: a count or token id is no integer, or out of range.
        """
        stored = Texts(*_join([text.encode() for text in texts], np.dtype("u1")))
        numbers = np.array(array("q", counts), np.int64)
        if len(numbers) and numbers.min() < 0:
            raise ValueError(f"train_counts: got {numbers.min()}, expected at least 0")
        return cls(stored, None if tokens is None else TokenLists.of(tokens), Counts(numbers))

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Level:
        texts = Texts(arrays["text"], arrays["text_ends"])
        return cls(texts, TokenLists(arrays["tokens"], arrays["token_ends"]), Counts(arrays["counts"]))

    def __len__(self) -> int:
        return len(self.texts)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "find"}

    def rows(self, k: int) -> Iterator[tuple[bytes, int, bytes, int]]:
        """Yield the rows in order: text as UTF-8, the given `k`, token ids as uint16 (none if not computed), count."""
        for start in range(0, len(self), _BLOCK):
            stop = min(start + _BLOCK, len(self))
            ids = repeat(b"") if self.tokens is None else self.tokens.bytes_from(start, stop)
            yield from zip(self.texts.bytes_from(start, stop), repeat(k), ids, self.counts[start:stop], strict=False)

    @cached_property
    def find(self) -> Callable[[str], int | None]:
        # A dict of ten million texts would take 2 GB in every process.
        if len(self) <= _DICT_TEXTS:
            return {text: i for i, text in enumerate(self.texts)}.get
        return lru_cache(_CACHED_IDS)(self._searcher())

    def _searcher(self) -> Callable[[str], int | None]:
        part, n = self.texts.part, len(self)
        firsts = [bytes(part(i)) for i in range(0, n, _STRIDE)]

        def search(text: str) -> int | None:
            key = text.encode("utf-8", "surrogatepass")  # no text of the level has a surrogate
            low = (bisect_right(firsts, key) - 1) * _STRIDE
            if low < 0:
                return None
            high = min(low + _STRIDE, n)
            while high - low > 1:
                middle = (low + high) // 2
                if bytes(part(middle)) <= key:
                    low = middle
                else:
                    high = middle
            return low if part(low) == key else None

        return search


class LevelBuilder:
    """Stores the rows of a level as they come, sorted by text, in temporary files of `folder` if they are many."""

    def __init__(self, folder: Path | None) -> None:
        self.sections: dict[str, IO[bytes]] = {
            name: SpooledTemporaryFile(_SPOOL, dir=None if folder is None else str(folder))  # noqa: SIM115
            for name in _DTYPES
        }
        self.sizes = [0, 0, 0]  # texts, bytes of text, token ids
        self._rows: tuple[list[bytes], list[bytes], list[int]] = ([], [], [])

    def add(self, text: bytes, tokens: bytes, count: int) -> None:
        """Append a row: a text as UTF-8, and token ids as uint16."""
        texts, ids, counts = self._rows
        texts.append(text)
        ids.append(tokens)
        counts.append(count)
        if len(texts) == _BLOCK:
            self.flush()

    def flush(self) -> None:
        """Write the rows added last."""
        texts, ids, counts = self._rows
        text, text_ends = _join(texts, np.dtype("u1"))
        tokens, token_ends = _join(ids, np.dtype("<u2"))
        ends = {"text_ends": text_ends + np.uint64(self.sizes[1]), "token_ends": token_ends + np.uint64(self.sizes[2])}
        arrays = {**ends, "counts": np.array(counts, "<i8"), "text": text, "tokens": tokens}
        for name, found in arrays.items():
            self.sections[name].write(found.tobytes())
        for k, added in enumerate((len(texts), len(text), len(tokens))):
            self.sizes[k] += added
        for column in self._rows:
            column.clear()

    def close(self) -> None:
        for file in self.sections.values():
            file.close()


def file_size(sizes: Sequence[int]) -> int:
    """Bytes of a file with these numbers of texts, bytes of text and token ids per level."""
    return HEADER_BYTES + sum(_padded(size) for level in _sections(sizes) for size in level.values()) + _TRAILER_BYTES


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _sections(sizes: Sequence[int]) -> list[dict[str, int]]:
    """Bytes of each section, without padding."""
    found = []
    for k in range(0, len(sizes), 3):
        n, b, t = sizes[k : k + 3]
        items = {"text_ends": n, "token_ends": n, "counts": n, "text": b, "tokens": t}
        found.append({name: items[name] * np.dtype(dtype).itemsize for name, dtype in _DTYPES.items()})
    return found


def write_levels(file: IO[bytes], builders: Sequence[LevelBuilder]) -> None:
    """Write a vocabulary.bin, and close the builders."""
    digest = hashlib.sha256()

    def put(data: bytes) -> None:
        digest.update(data)
        file.write(data)

    for builder in builders:
        builder.flush()
    put(_HEADER.pack(MAGIC, VERSION, 0, *(n for builder in builders for n in builder.sizes)))
    for builder in builders:
        for section in builder.sections.values():
            size = section.tell()
            section.seek(0)
            while data := section.read(_COPIED):
                put(data)
            put(bytes(_padded(size) - size))
        builder.close()
    file.write(digest.digest())


def stored(builders: Sequence[LevelBuilder], folder: Path | None) -> list[Level]:
    """Return what the builders hold, in memory or in a mapped temporary file of `folder`, and close them."""
    for builder in builders:
        builder.flush()
    if file_size([n for builder in builders for n in builder.sizes]) < _SPOOL:
        held = BytesIO()
        write_levels(held, builders)
        return _parse(held.getvalue(), "")
    with TemporaryFile(dir=folder) as file:
        write_levels(file, builders)
        file.flush()
        return _parse(map_descriptor(file.fileno()), "")


def merged_rows(levels: Sequence[Level]) -> Iterator[tuple[bytes, list[tuple[bytes, int, bytes, int]]]]:
    """Yield the distinct texts of several levels in order, and the rows of each: see `Level.rows`."""
    rows = heapq.merge(*(level.rows(k) for k, level in enumerate(levels)))
    for text, found in groupby(rows, itemgetter(0)):
        yield text, [*found]


def declared_size(header: bytes, where: str) -> int:
    """Size in bytes of the file that begins with `header`, its first HEADER_BYTES.

    Raises:
        UserError: not the header of a vocabulary.bin of this version.
    """
    return file_size(_read_header(header, where))


def _read_header(data: Any, where: str) -> Sequence[int]:
    if len(data) < HEADER_BYTES:
        raise UserError(f"{where}: damaged: got {len(data)} bytes, expected at least {HEADER_BYTES}; {_AGAIN}")
    magic, version, zero, *sizes = _HEADER.unpack(bytes(data[:HEADER_BYTES]))
    if magic != MAGIC:
        raise UserError(f"{where}: got a file that begins with {magic!r}, expected a vocabulary.bin ({MAGIC!r})")
    if (version, zero) != (VERSION, 0):
        raise UserError(f"{where}: got version {version}, expected {VERSION}; pack the data set again")
    return sizes


_AGAIN = "copy the data set again, or pack it again"


def read_levels(data: Mapped, where: str, sha256: str | None = None) -> list[Level]:
    """Use the levels in the bytes of a vocabulary.bin, which must not change.

    Args:
        where: file name for error messages.
        sha256: SHA-256 of the file in hex, if known; it is then compared instead of the one in the file.

    Raises:
        UserError: damaged, or malformed.
    """
    levels, view = _parse(data, where), memoryview(data)
    with ThreadPoolExecutor(1) as pool:  # hashing does not hold the interpreter's lock
        body = view if sha256 else view[:-_TRAILER_BYTES]
        digest = pool.submit(lambda: hashlib.sha256(body).digest())
        problem = next(filter(None, map(_problem, LEVELS, levels)), None)
    if digest.result() != (bytes.fromhex(sha256) if sha256 else bytes(view[-_TRAILER_BYTES:])):
        expected = "the manifest's" if sha256 else "the one at its end"
        raise UserError(f"{where}: damaged: the checksum differs from {expected}; {_AGAIN}")
    if problem is not None:
        raise UserError(f"{where}: malformed vocabulary: {problem}; pack the data set again")
    return levels


def _parse(data: Mapped, where: str) -> list[Level]:
    view = memoryview(data)
    sizes = _read_header(view, where)
    size = file_size(sizes)
    if len(view) != size:
        raise UserError(f"{where}: damaged: got {len(view)} bytes, expected {size} by its header; {_AGAIN}")
    levels: list[Level] = []
    at = HEADER_BYTES
    for sections in _sections(sizes):
        arrays = {}
        for name, length in sections.items():
            arrays[name] = np.frombuffer(view[at : at + length], _DTYPES[name])
            at += _padded(length)
        levels.append(Level.from_arrays(arrays))
    return levels


def _problem(name: str, level: Level) -> str | None:
    """What makes a level unusable, in the words of an error message, or None."""
    texts, tokens, counts = level.texts, level.tokens, level.counts.data
    assert tokens is not None
    for what, ragged in (("texts", texts), ("token ids", tokens)):
        last = 0
        for i in range(0, len(ragged), _CHECKED):
            ends = ragged.ends[i : i + _CHECKED]
            if ends[0] < last or (ends[1:] < ends[:-1]).any():
                return f"the ends of the {name} {what} are out of order"
            last = ends[-1]
        if last != len(ragged.data):
            return f"the {name} {what} end at {last}, expected {len(ragged.data)}"
    if any(counts[i : i + _CHECKED].min() < 0 for i in range(0, len(counts), _CHECKED)):
        return f"a train count of the {name} texts is negative"
    blocks = range(0, len(texts.data), _COPIED)
    if all(texts.data[i : i + _COPIED].tobytes().isascii() for i in blocks):  # ten times faster
        blocks = range(0)
    decode = codecs.getincrementaldecoder("utf-8")().decode
    try:
        for i in blocks:
            decode(texts.data[i : i + _COPIED].data)
        decode(b"", True)
    except UnicodeDecodeError as error:
        return f"the {name} texts are not UTF-8 ({error.reason})"
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda i: _misplaced(texts, i), range(0, len(texts), _CHECKED))
        problem = next(filter(None, found), None)
    return problem and f"{name} level: {problem}"


def _misplaced(texts: Texts, i: int) -> str | None:
    """Check the texts from `i` on, and the next one after them."""
    ends = texts.ends[i : i + _CHECKED + 1].astype(np.int64)
    starts = np.concatenate([[int(texts.ends[i - 1]) if i else 0], ends[:-1]])
    inside = starts[starts < len(texts.data)]
    if ((texts.data[inside] & 0xC0) == 0x80).any():
        return "a text begins inside a character"
    return None if _ascending(texts.data, starts, ends - starts) else "the texts are unsorted or not distinct"


def _ascending(data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> bool:
    """Whether the texts at `starts`, which are adjacent, are strictly ascending, compared by words of eight bytes."""
    block = np.concatenate([data[starts[0] : starts[-1] + lengths[-1]], np.zeros(8, np.uint8)])
    words = np.ndarray((len(block) - 7,), "<u8", block, strides=(1,))  # the one that begins at each byte
    shorter = np.minimum(lengths[:-1], lengths[1:])
    equal = np.zeros(len(shorter), np.int64)  # bytes at the beginnings of neighbours, in whole words
    at = starts - starts[0]
    alike = np.ones(len(shorter), bool)
    for offset in range(8, min(_WORDS_BYTES, int(shorter.max(initial=0))) + 1, 8):
        found = words[at]
        alike &= (found[:-1] == found[1:]) & (shorter >= offset)
        if not alike.any():
            break
        equal += 8 * alike
        at = np.minimum(at + 8, len(words) - 1)
    at = starts - starts[0]
    long = alike & (shorter > _WORDS_BYTES)
    for i in np.flatnonzero(long).tolist():
        this, following = (bytes(block[at[k] : at[k] + lengths[k]]) for k in (i, i + 1))
        if this >= following:
            return False
    left, right = lengths[:-1] - equal, lengths[1:] - equal
    first, second = _in_order(words[at[:-1] + equal], left), _in_order(words[at[1:] + equal], right)
    return bool((long | (first < second) | ((first == second) & (left < right))).all())


def _in_order(words: NDArray[np.uint64], length: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Words as numbers in the order of their first `length` bytes."""
    half = (32 - 4 * np.minimum(length, 8)).astype(np.uint64)  # shifts by 64 bits are undefined
    return words.byteswap() >> half >> half << half << half
