"""The token ids of a vocabulary on the device, and a cache of its strings' frozen features."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scenarioclip_fast.data.vocabulary_file import TokenLists
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.model.config import TextConfig
from scenarioclip_fast.model.encoders import Packing, TextEncoder

if TYPE_CHECKING:
    from scenarioclip_fast.data import Vocabulary
    from scenarioclip_fast.ops.contrastive import ExchangePlan


def truncate(texts: Sequence[Sequence[int]], config: TextConfig) -> tuple[list[list[int]], int]:
    """Truncate texts to the context as CLIP does, ending in end-of-text; also return how many were truncated."""
    context, end = config.context_length, config.end_of_text
    kept, cut = [], 0
    for ids in texts:
        if not ids or ids[-1] != end:
            raise ValueError(
                f"tokens: got a text that ends in {ids[-1] if ids else 'nothing'}, expected {end} (end-of-text, the "
                "last id of text.vocab_size)"
            )
        if min(ids) < 0 or max(ids) > end:
            raise ValueError(f"tokens: got ids from {min(ids)} to {max(ids)}, expected 0 to {end}")
        cut += len(ids) > context
        kept.append(list(ids) if len(ids) <= context else [*ids[: context - 1], end])
    return kept, cut


def pack(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Packing]:
    """Concatenate token lists into one tensor [T]; also return their packing."""
    lengths = [len(ids) for ids in texts]
    tokens = torch.tensor([token for ids in texts for token in ids], dtype=torch.long, device=device)
    return tokens, Packing.of_lengths(np.array(lengths, np.int64), device)


_CHECKED = 1 << 17  # texts checked at once
_CHUNK = 64  # strings whose frozen features are computed together: a few hundred tokens


@dataclass(frozen=True)
class UniqueTexts:
    """The unique texts of a batch at each level, in ascending order of their ids.

    index: per level [N_l], each item's index into its level's texts
    id: per level [U_l], vocabulary ids, on the CPU
    row, lengths: per level [U_l], in host memory: table rows, and numbers of tokens
    plan: for the loss over several ranks, if their exchange has begun
    """

    index: list[Tensor]  # 3 x [N_l]
    id: list[Tensor]  # 3 x [U_l]
    row: list[NDArray[np.int64]]  # 3 x [U_l]
    lengths: list[NDArray[np.int64]]  # 3 x [U_l]
    plan: ExchangePlan | None = None

    def split(self, parts: int) -> list[UniqueTexts]:
        """Split each level's texts into `parts` contiguous chunks, without `index`, which points into all of them."""
        ids = [of_level.tensor_split(parts) for of_level in self.id]
        rows, lengths = ([np.array_split(a, parts) for a in of_levels] for of_levels in (self.row, self.lengths))
        return [
            UniqueTexts([], [level[k] for level in ids], [row[k] for row in rows], [length[k] for length in lengths])
            for k in range(parts)
        ]


@dataclass(frozen=True)
class _LevelTokens:
    """The token ids of a level's texts: those of text i end before `ends[i]` in `data`."""

    data: NDArray[Any]  # [all tokens]
    ends: NDArray[Any]  # [texts]

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> _LevelTokens:
        if isinstance(texts, TokenLists):
            return cls(texts.data, texts.ends)
        ends = np.cumsum([len(ids) for ids in texts], dtype=np.int64)
        return cls(np.array([token for ids in texts for token in ids], np.int64), ends)

    def starts(self, i: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where(i > 0, self.ends[i - 1], 0).astype(np.int64)

    def lengths(self, i: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.ends[i].astype(np.int64) - self.starts(i)

    def check(self, config: TextConfig) -> int:
        """Return how many texts are longer than the context; ValueError as in `truncate`."""
        cut = 0
        for first in range(0, len(self.ends), _CHECKED):
            i = np.arange(first, min(first + _CHECKED, len(self.ends)))
            starts, lengths = self.starts(i), self.lengths(i)
            cut += int((lengths > config.context_length).sum())
            tokens = self.data[starts[0] : starts[0] + lengths.sum()]
            if lengths.min() == 0 or (tokens < 0).any() or (tokens > config.end_of_text).any():
                break
            if (self.data[starts + lengths - 1] != config.end_of_text).any():
                break
        else:
            return cut
        truncate([self.data[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)], config)
        raise AssertionError


class TokenTable(nn.Module):
    """A vocabulary's packed token ids, as buffers that move with the model and are not saved.

    The ids of a large vocabulary stay where they are, in a mapped file, and those of a batch are copied to the device.

    Args:
        vocabulary: provides the token ids.
        cache_bytes: memory limit of the cached frozen features; a vocabulary that needs more is not cached.
        device_bytes: memory limit of the token ids on the device, 8 bytes each.

    Attributes:
        truncated: per level, how many strings were longer than the context and truncated.
    """

    tokens: Tensor  # [all tokens]; a large vocabulary's is empty

    def __init__(
        self,
        vocabulary: Vocabulary,
        config: TextConfig,
        cache_bytes: int = 2 << 30,
        device_bytes: int = 128 << 20,
    ) -> None:
        super().__init__()
        self.truncated: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.cache_bytes = cache_bytes
        self.context_length, self._end = config.context_length, config.end_of_text
        self._levels: list[_LevelTokens] = []
        for level in LEVELS:
            texts = _LevelTokens.of(vocabulary.tokens(level))
            try:
                self.truncated[level] = texts.check(config)
            except ValueError as error:
                raise UserError(f"the vocabulary's {level} texts do not fit the model: {error}") from None
            self.sizes[level] = len(texts.ends)
            self._levels.append(texts)
        self._first_rows = np.cumsum([0, *self.sizes.values()])
        self.on_demand = 8 * sum(len(texts.data) for texts in self._levels) > device_bytes
        self._filled = np.zeros(0 if self.on_demand else self._first_rows[-1], bool)
        # In host memory: reading them does not synchronise with the device.
        self._host_lengths = self._host_starts = np.zeros(0, np.int64)
        tokens = np.zeros(0, np.int64)
        if not self.on_demand:
            rows = np.arange(len(self._filled))
            self._host_lengths = self._lengths(rows)
            self._host_starts = np.cumsum(self._host_lengths) - self._host_lengths
            tokens = self._gather(rows)
        self.register_buffer("tokens", torch.from_numpy(tokens), persistent=False)
        self._hidden: Tensor | None = None
        self._key: tuple[Any, ...] = ()

    def _by_level(self, row: NDArray[np.int64]) -> Iterator[tuple[_LevelTokens, NDArray[np.bool_], NDArray[np.int64]]]:
        """For each level that has any of the strings `row` [n]: its texts, which [n] they are, and their ids."""
        number = np.searchsorted(self._first_rows, row, "right") - 1
        for k in np.unique(number).tolist():
            yield self._levels[k], number == k, row[number == k] - self._first_rows[k]

    def _lengths(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of tokens, truncated to the context."""
        if len(self._host_lengths):
            return self._host_lengths[row]
        lengths = np.zeros(len(row), np.int64)
        for texts, here, i in self._by_level(row):
            lengths[here] = np.minimum(texts.lengths(i), self.context_length)
        return lengths

    def _gather(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """The token ids of the strings `row` [n], truncated: [T]."""
        lengths = self._lengths(row)
        ends = np.cumsum(lengths)
        tokens = np.empty(ends[-1] if len(ends) else 0, np.int64)
        for texts, here, i in self._by_level(row):
            n = lengths[here]
            within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
            tokens[np.repeat((ends - lengths)[here], n) + within] = texts.data[np.repeat(texts.starts(i), n) + within]
        tokens[ends - 1] = self._end  # of those truncated; all others end in it
        return tokens

    def describe_truncated(self) -> str | None:
        """Return one line with the number of truncated strings, or None."""
        cut = [f"{n} of {self.sizes[level]} {level} texts" for level, n in self.truncated.items() if n]
        return f"truncated to the context of {self.context_length} tokens: {', '.join(cut)}" if cut else None

    def unique_texts(self, ids: Sequence[Tensor]) -> UniqueTexts:
        """Return the unique texts among `ids` (3 x [N_l]); no device synchronisation if `ids` are on the CPU."""
        ids = [i.cpu() for i in ids]
        bad = [name for name, i in zip(LEVELS, ids, strict=True) if len(i) and not self._covers(name, i)]
        if bad:
            raise ValueError(
                f"ids of level {', '.join(bad)}: got ids outside the vocabulary's {self.sizes}; expected a batch of "
                "the data set whose vocabulary was passed to set_vocabulary"
            )
        # On the host: torch.unique on the device would synchronise to learn its output's size.
        found = [torch.unique(i, return_inverse=True) for i in ids]
        id, index = [list(x) for x in zip(*found, strict=True)]
        start = itertools.accumulate(self.sizes.values(), initial=0)
        row = [i.numpy() + s for i, s in zip(id, start, strict=False)]
        lengths = [self._lengths(r) for r in row]
        return UniqueTexts(self._upload(index), id, row, lengths)

    def _upload(self, parts: list[Tensor]) -> list[Tensor]:  # 3 x [n_l]
        """Copy to the table's device in one asynchronous transfer."""
        if not self.tokens.is_cuda:
            return parts
        whole = torch.cat(parts).pin_memory().to(self.tokens.device, non_blocking=True)
        return list(whole.split([len(part) for part in parts]))

    def packing(self, row: NDArray[np.int64]) -> tuple[Packing, Tensor]:
        """Return the packing of the strings `row` [n], and what `ids` needs: [T]."""
        lengths = self._lengths(row)
        if self.on_demand:
            return Packing.with_rows(lengths, self.tokens.device, self._gather(row))
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        places = np.repeat(self._host_starts[row], lengths) + within
        return Packing.with_rows(lengths, self.tokens.device, places)

    def ids(self, source: Tensor) -> Tensor:
        """The token ids [T] of a packing with this `source`: the places in the table, or the ids themselves."""
        return source if self.on_demand else self.tokens[source]

    def frozen_features(
        self, encoder: TextEncoder, stop: int, row: NDArray[np.int64], packing: Packing, source: Tensor
    ) -> Tensor:
        """Return frozen stages 0 to `stop` of `encoder` applied to the strings `row` [n]: [T, W], no gradient.

        Cached per string until the weights, the device or the precision change.
        """
        embedding = encoder.embedding.token.weight
        size = self.tokens.shape[0] * embedding.shape[1] * embedding.element_size()
        if stop == 1 or self.on_demand or size > self.cache_bytes:
            with torch.no_grad():
                return encoder.run(self.ids(source), packing, stop=stop)
        # Not in inference mode: a training step must be able to use and extend what an evaluation cached.
        with torch.inference_mode(False), torch.no_grad():
            self._invalidate_if_stale(encoder, stop)
            missing = row[~self._filled[row]]
            # Fixed chunks: the bits of a matrix product depend on its shape, and a resumed run, which starts with a
            # different batch, must reproduce the features of the first run.
            for first in np.unique(missing // _CHUNK * _CHUNK).tolist():
                some_packing, some_source = self.packing(np.arange(first, min(first + _CHUNK, len(self._filled))))
                hidden = encoder.run(self.ids(some_source), some_packing, stop=stop)
                if self._hidden is None:
                    self._hidden = hidden.new_empty(self.tokens.shape[0], hidden.shape[1])
                self._hidden[some_source] = hidden
                self._filled[first : first + _CHUNK] = True
            if self._hidden is None:
                return embedding.new_empty(0, embedding.shape[1])
            return self._hidden[source]

    def _invalidate_if_stale(self, encoder: TextEncoder, stop: int) -> None:
        weights = [p for stage in encoder.stages[:stop] for p in stage.parameters()]
        kind = self.tokens.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # Identity and version of the weights; tensors made in inference mode have no version.
        state = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in weights)
        key = (self.tokens.device, weights[0].dtype, autocast, stop, state)
        if key != self._key:
            self._key, self._hidden = key, None
            self._filled = np.zeros(len(self._filled), bool)

    def _covers(self, level: str, ids: Tensor) -> bool:
        return bool(((ids >= 0) & (ids < self.sizes[level])).all())
