"""The texts of a data set, their ids and their CLIP token ids."""

from __future__ import annotations

import json
import math
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.data.vocabulary_file import (
    MAGIC,
    Counts,
    Level,
    LevelBuilder,
    Texts,
    TokenLists,
    merged_rows,
    read_levels,
    stored,
    write_levels,
)
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import Mapped, map_file
from scenarioclip_fast.levels import LEVELS, check_level
from scenarioclip_fast.parsing import parse_json
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import short

SCHEMA = 1
START_OF_TEXT, END_OF_TEXT, CONTEXT_LENGTH = 49406, 49407, 77
_JSON_ITEMS = 1 << 14  # written at once
_RUN_TEXTS = 1 << 20  # distinct texts that a VocabularyWriter holds: about 150 MB
_MAX_RUNS = 64


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return require("instant_clip_tokenizer").Tokenizer()


def tokenize(text: str, context_length: int | None = CONTEXT_LENGTH) -> list[int]:
    """Tokenize a text for CLIP, with start and end tokens.

    The ids are those of the CLIPTokenizer of transformers 5 (the one backed by `tokenizers`), except for:

    - control and format characters, which CLIPTokenizer keeps, and lone surrogates, which it cannot encode: `normalise`
      removes them;
    - special tokens spelled out in a text: "<|endoftext|>" is text here and does not end it (CLIPTokenizer has the
      option split_special_tokens for that);
    - a capital sigma at the end of a word, which is lower-cased to a final one, as by OpenAI's tokenizer;
    - letters and digits that are newer than Unicode 15.0, which instant-clip-tokenizer treats as symbols.

    Like CLIPTokenizer and unlike OpenAI's tokenizer, HTML entities and wrongly decoded text are left as they are.

    Args:
        text: any string; see `normalise` for what is done to it.
        context_length: truncate to this many tokens, the end token included; None: all tokens.
    """
    ids = _tokenizer().encode(normalise(text))
    return [START_OF_TEXT, *(ids if context_length is None else ids[: context_length - 2]), END_OF_TEXT]


class Vocabulary:
    """Sorted distinct texts of the three levels; the id of a text is its position.

    Its sequences are lazy: a vocabulary that was read from a vocabulary.bin stays in the file, which is mapped into
    memory, and only the items that are used become Python objects.

    Args:
        actions, objects, relations: texts of the levels "global", "object" and "relation".
        train_counts: per level, occurrences of each text in the train split; missing texts count 0.
    """

    def __init__(
        self,
        actions: Iterable[str],
        objects: Iterable[str],
        relations: Iterable[str],
        train_counts: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        counts = train_counts or {}
        self._levels: dict[str, Level] = {}
        for level, texts in zip(LEVELS, (actions, objects, relations), strict=True):
            kept = sorted(set(texts))
            self._levels[level] = Level.of(kept, [counts.get(level, {}).get(text, 0) for text in kept])

    @classmethod
    def _of(cls, levels: Iterable[Level]) -> Vocabulary:
        vocabulary = cls.__new__(cls)
        vocabulary._levels = dict(zip(LEVELS, levels, strict=True))
        return vocabulary

    @classmethod
    def merge(cls, vocabularies: Sequence[Vocabulary], weights: Sequence[float]) -> Vocabulary:
        """Return the union of the vocabularies of several data sets; their order makes no difference.

        `train_counts` become the mean occurrences per epoch of a mix of the sets: weighted sums, rounded, but at least
        1 for a text that occurs in training at all. A large union is written to a temporary file.

        Args:
            vocabularies: at least one.
            weights: how many times the scenes of each set occur in an epoch.

        Raises:
            UserError: the vocabularies disagree on the token ids of a text, or there is no space for temporary files.
        """
        if len(vocabularies) == 1 and weights[0] == 1:
            return vocabularies[0]
        for vocabulary in vocabularies:
            for level in LEVELS:
                vocabulary.tokens(level)
        builders = [LevelBuilder(None) for _ in LEVELS]
        try:
            for level, builder in zip(LEVELS, builders, strict=True):
                for row in _union(level, [vocabulary._levels[level] for vocabulary in vocabularies], weights):
                    builder.add(*row)
            return cls._of(stored(builders, None))
        except OSError as error:
            raise UserError(
                f"temporary files of the merged vocabulary: {error.strerror or error}; set TMPDIR to a directory with "
                "more space"
            ) from None

    @property
    def actions(self) -> Texts:
        return self._levels["global"].texts

    @property
    def objects(self) -> Texts:
        return self._levels["object"].texts

    @property
    def relations(self) -> Texts:
        return self._levels["relation"].texts

    def texts(self, level: str) -> Texts:
        """The texts of a level in the order of their ids."""
        return self._levels[check_level(level)].texts

    def id(self, level: str, text: str) -> int:
        """The id of a text; UserError if it is not in the vocabulary."""
        try:
            found = self._levels[level].find(text)
        except KeyError:
            check_level(level)
            raise
        if found is None:
            raise UserError(
                f"unknown {level} text {text!r}: not among the {len(self._levels[level])} in the vocabulary; "
                "pack the data set again so that its vocabulary includes it"
            )
        return found

    def action_id(self, text: str) -> int:
        return self.id("global", text)

    def object_id(self, text: str) -> int:
        return self.id("object", text)

    def relation_id(self, text: str) -> int:
        return self.id("relation", text)

    def tokens(self, level: str) -> TokenLists:
        """CLIP token ids of every text of a level, with start and end tokens, neither padded nor truncated."""
        found = self._levels[check_level(level)]
        if found.tokens is None:
            found.tokens = TokenLists.of(tokenize(text, None) for text in found.texts)
        return found.tokens

    def train_counts(self, level: str) -> Counts:
        """Occurrences of each text of a level in the train split; 0: held out of training."""
        return self._levels[check_level(level)].counts

    def checksum(self) -> int:
        """CRC-32 of the texts and their token ids."""
        crc = 0
        for level in LEVELS:
            for ragged in (self.texts(level), self.tokens(level)):
                for part in (len(ragged).to_bytes(8, "little"), ragged.ends.data, ragged.data.data):
                    crc = zlib.crc32(part, crc)
        return crc

    def to_json(self) -> dict[str, Any]:
        levels = {
            level: {
                "texts": [*self.texts(level)],
                "tokens": [*self.tokens(level)],
                "train_counts": [*self.train_counts(level)],
            }
            for level in LEVELS
        }
        return {"schema": SCHEMA, "tokenizer": "clip", **levels}

    def save(self, path: str | Path) -> None:
        """Write a file for `load`: binary, to be mapped into memory, if the name ends in ".bin"; otherwise JSON."""
        if Path(path).suffix == ".bin":
            with open(path, "wb") as binary:
                self.write(binary)
            return
        with open(path, "w", encoding="utf-8") as file:  # bit by bit: there may be millions of texts
            file.write(f'{{"schema":{SCHEMA},"tokenizer":"clip"')
            for level in LEVELS:
                columns: dict[str, Sequence[Any]] = {"texts": self.texts(level), "tokens": self.tokens(level)}
                opening = f',"{level}":{{'
                for name, items in {**columns, "train_counts": self.train_counts(level)}.items():
                    file.write(f'{opening}"{name}":[')
                    for i in range(0, len(items), _JSON_ITEMS):
                        some = json.dumps(items[i : i + _JSON_ITEMS], ensure_ascii=False, separators=(",", ":"))
                        file.write("," * (i > 0) + some[1:-1])
                    file.write("]")
                    opening = ","
                file.write("}")
            file.write("}\n")

    def write(self, file: IO[bytes]) -> None:
        """Write a vocabulary.bin: see `vocabulary_file`."""
        builders = [LevelBuilder(None) for _ in LEVELS]
        for level, builder in zip(LEVELS, builders, strict=True):
            self.tokens(level)
            for row in _union(level, [self._levels[level]], [1]):
                builder.add(*row)
        write_levels(file, builders)

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a file written by `save`; does not require the tokenizer.

        A binary file must stay as it is while the vocabulary is in use.

        Raises:
            UserError: missing or malformed file.
        """
        path = Path(path)
        try:
            data = map_file(path)
            binary = data[: len(MAGIC)] == MAGIC or path.suffix == ".bin"
            record = None if binary else parse_json(bytes(data))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; `scenarioclip-fast pack` writes it") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable vocabulary ({error})") from None
        return cls.from_bytes(data, str(path)) if binary else cls.from_json(record, str(path))

    @classmethod
    def from_bytes(cls, data: Mapped, where: str, sha256: str | None = None) -> Vocabulary:
        """Use the content of a vocabulary.bin: see `vocabulary_file.read_levels`."""
        return cls._of(read_levels(data, where, sha256))

    @classmethod
    def from_json(cls, record: Any, where: str) -> Vocabulary:
        """Invert `to_json`.

        Args:
            where: file name for error messages.

        Raises:
            UserError: malformed record.
        """
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            got = record.get("schema") if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{where}: got schema {short(got)}, expected {SCHEMA}; pack the data set again")
        levels = []
        try:
            for level in LEVELS:
                texts, tokens, counts = (record[level][name] for name in ("texts", "tokens", "train_counts"))
                if any(first >= second for first, second in pairwise(texts)):
                    raise ValueError("the texts are unsorted or not distinct")
                if not len(texts) == len(tokens) == len(counts):
                    raise ValueError("the numbers of texts, token lists and train counts differ")
                levels.append(Level.of(texts, counts, tokens))
        except (AttributeError, OverflowError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: malformed vocabulary ({type(error).__name__}: {error})") from None
        return cls._of(levels)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        pairs = [(self._levels[level], other._levels[level]) for level in LEVELS]
        return all(
            np.array_equal(a.texts.ends, b.texts.ends)
            and np.array_equal(a.texts.data, b.texts.data)
            and np.array_equal(a.counts.data, b.counts.data)
            for a, b in pairs
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        sizes = [len(self._levels[level]) for level in LEVELS]
        return f"Vocabulary(actions={sizes[0]}, objects={sizes[1]}, relations={sizes[2]})"


def _union(level: str, parts: Sequence[Level], weights: Sequence[float]) -> Iterator[tuple[bytes, bytes, int]]:
    """Yield the rows of `Vocabulary.merge`: text, token ids and count, see `LevelBuilder.add`."""
    for text, rows in merged_rows(parts):
        ids = rows[0][2]
        if any(row[2] != ids for row in rows):
            raise UserError(
                f"the data sets disagree on the token ids of the {level} text {text.decode()!r}: pack them with the "
                "same version"
            )
        # fsum: the same in any order.
        total = math.fsum(weights[k] * count for _, k, _, count in rows)
        yield text, ids, max(1, round(total)) if total else 0


class VocabularyWriter:
    """Collects the texts of a pack, shard by shard, and writes its vocabulary.bin.

    The file depends only on the texts and their numbers, not on their order or their division into shards. Memory is
    bounded: many texts are kept as sorted runs in temporary files, which are merged at the end.

    Args:
        folder: of the temporary files, which have no names.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._counts: dict[str, dict[str, int]] = {level: {} for level in LEVELS}
        self._runs: list[list[Level]] = []

    def add(self, split: str, texts: Mapping[str, Mapping[str, int]]) -> None:
        """Count texts of a split: level -> text -> occurrences."""
        in_train = split == "train"
        for level, counts in self._counts.items():
            for text, n in texts[level].items():
                counts[text] = counts.get(text, 0) + n * in_train
        if sum(map(len, self._counts.values())) >= _RUN_TEXTS:
            self._end_run()

    def write(self, file: IO[bytes], classes: Mapping[str, Iterable[str]] | None = None) -> dict[str, int]:
        """Tokenize the texts, write the file and return the number of texts of each level.

        Args:
            classes: the "actions", "objects" and "relations" that the file contains, whether they occur or not; None:
                all texts that occur.
        """
        self._end_run()
        builders = [LevelBuilder(self._folder) for _ in LEVELS]
        for k, name in enumerate(("actions", "objects", "relations")):
            parts = [run[k] for run in self._runs]
            if classes is not None:
                known = sorted(set(classes[name]))
                parts.append(Level.of(known, [0] * len(known)))
            for text, rows in merged_rows(parts):
                if classes is None or rows[-1][1] == len(self._runs):
                    ids = array("H", tokenize(text.decode(), None)).tobytes()
                    builders[k].add(text, ids, sum(count for *_, count in rows))
        write_levels(file, builders)
        return {level: builder.sizes[0] for level, builder in zip(LEVELS, builders, strict=True)}

    def _end_run(self) -> None:
        builders = [LevelBuilder(self._folder) for _ in LEVELS]
        for builder, counts in zip(builders, self._counts.values(), strict=True):
            for known in sorted(counts):
                builder.add(known.encode(), b"", counts[known])
            counts.clear()
        self._runs.append(stored(builders, self._folder))
        if len(self._runs) == _MAX_RUNS:  # each holds a descriptor
            builders = [LevelBuilder(self._folder) for _ in LEVELS]
            for k, builder in enumerate(builders):
                for text, rows in merged_rows([run[k] for run in self._runs]):
                    builder.add(text, b"", sum(count for *_, count in rows))
            self._runs = [stored(builders, self._folder)]
