"""The texts of a data set, their ids and their CLIP token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import read_regular
from scenarioclip_fast.levels import LEVELS, check_level
from scenarioclip_fast.parsing import parse_json
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import short

SCHEMA = 1
START_OF_TEXT, END_OF_TEXT, CONTEXT_LENGTH = 49406, 49407, 77


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
        self._texts = {
            level: sorted(set(texts)) for level, texts in zip(LEVELS, (actions, objects, relations), strict=True)
        }
        self._ids = {level: {text: i for i, text in enumerate(texts)} for level, texts in self._texts.items()}
        counts = train_counts or {}
        self._counts = {
            level: [counts.get(level, {}).get(text, 0) for text in texts] for level, texts in self._texts.items()
        }
        self._tokens: dict[str, list[list[int]]] = {}

    @classmethod
    def merge(cls, vocabularies: Sequence[Vocabulary], weights: Sequence[float]) -> Vocabulary:
        """Return the union of the vocabularies of several data sets.

        `train_counts` become the mean occurrences per epoch of a mix of the sets: weighted sums, rounded, but at least
        1 for a text that occurs in training at all.

        Args:
            vocabularies: at least one.
            weights: how many times the scenes of each set occur in an epoch.

        Raises:
            UserError: the vocabularies disagree on the token ids of a text.
        """
        if len(vocabularies) == 1 and weights[0] == 1:
            return vocabularies[0]
        texts: list[set[str]] = []
        counts: dict[str, dict[str, int]] = {}
        tokens: dict[str, dict[str, list[int]]] = {}
        for level in LEVELS:
            texts.append(set())
            sums: dict[str, float] = {}
            tokens[level] = {}
            for vocabulary, weight in zip(vocabularies, weights, strict=True):
                texts[-1].update(vocabulary._texts[level])
                for text, count in zip(vocabulary._texts[level], vocabulary._counts[level], strict=True):
                    sums[text] = sums.get(text, 0.0) + weight * count
                for text, ids in zip(vocabulary._texts[level], vocabulary.tokens(level), strict=True):
                    if tokens[level].setdefault(text, ids) != ids:
                        raise UserError(
                            f"the data sets disagree on the token ids of the {level} text {text!r}: pack them with the "
                            "same version"
                        )
            counts[level] = {text: max(1, round(total)) if total else 0 for text, total in sums.items()}
        actions, objects, relations = texts
        merged = cls(actions, objects, relations, counts)
        merged._tokens = {level: [tokens[level][text] for text in merged._texts[level]] for level in LEVELS}
        return merged

    @property
    def actions(self) -> list[str]:
        return self._texts["global"]

    @property
    def objects(self) -> list[str]:
        return self._texts["object"]

    @property
    def relations(self) -> list[str]:
        return self._texts["relation"]

    def texts(self, level: str) -> list[str]:
        """The texts of a level in the order of their ids."""
        return self._texts[check_level(level)]

    def id(self, level: str, text: str) -> int:
        """The id of a text; UserError if it is not in the vocabulary."""
        try:
            return self._ids[check_level(level)][text]
        except KeyError:
            raise UserError(
                f"unknown {level} text {text!r}: not among the {len(self._texts[level])} in the vocabulary; "
                "pack the data set again so that its vocabulary includes it"
            ) from None

    def action_id(self, text: str) -> int:
        return self.id("global", text)

    def object_id(self, text: str) -> int:
        return self.id("object", text)

    def relation_id(self, text: str) -> int:
        return self.id("relation", text)

    def tokens(self, level: str) -> list[list[int]]:
        """CLIP token ids of every text of a level, with start and end tokens, neither padded nor truncated."""
        level = check_level(level)
        if level not in self._tokens:
            self._tokens[level] = [tokenize(text, None) for text in self._texts[level]]
        return self._tokens[level]

    def train_counts(self, level: str) -> list[int]:
        """Occurrences of each text of a level in the train split; 0: held out of training."""
        return self._counts[check_level(level)]

    def to_json(self) -> dict[str, Any]:
        levels = {
            level: {
                "texts": self._texts[level],
                "tokens": self.tokens(level),
                "train_counts": self._counts[level],
            }
            for level in LEVELS
        }
        return {"schema": SCHEMA, "tokenizer": "clip", **levels}

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json(), ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a file written by `save`; does not require the tokenizer.

        Raises:
            UserError: missing or malformed file.
        """
        path = Path(path)
        try:
            record = parse_json(read_regular(path))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; `scenarioclip-fast pack` writes it") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable vocabulary ({error})") from None
        return cls.from_json(record, str(path))

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
        try:
            counts = {
                level: dict(zip(record[level]["texts"], record[level]["train_counts"], strict=True)) for level in LEVELS
            }
            tokens = {level: [[int(t) for t in ids] for ids in record[level]["tokens"]] for level in LEVELS}
            actions, objects, relations = (record[level]["texts"] for level in LEVELS)
            "".join((*actions, *objects, *relations)).encode()  # raises ValueError on a lone surrogate
            vocabulary = cls(actions, objects, relations, counts)
        except (AttributeError, OverflowError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: malformed vocabulary ({type(error).__name__}: {error})") from None
        if any(vocabulary._texts[level] != record[level]["texts"] for level in LEVELS):
            raise UserError(f"{where}: the texts are unsorted or not distinct; pack the data set again")
        if any(len(tokens[level]) != len(vocabulary._texts[level]) for level in LEVELS):
            raise UserError(f"{where}: the numbers of texts and token lists differ; pack the data set again")
        vocabulary._tokens = tokens
        return vocabulary

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self._texts == other._texts and self._counts == other._counts

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        sizes: Sequence[int] = [len(self._texts[level]) for level in LEVELS]
        return f"Vocabulary(actions={sizes[0]}, objects={sizes[1]}, relations={sizes[2]})"
