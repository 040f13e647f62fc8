"""Token ids of a vocabulary on the device, and the frozen features of its strings, each computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model.config import TextConfig
from scenarioclip_fast.model.encoders import Packing, TextEncoder

if TYPE_CHECKING:
    from scenarioclip_fast.data import Vocabulary

LEVELS = ("global", "object", "relation")


def check_level(level: str) -> str:
    if level not in LEVELS:
        raise ValueError(f"level: got {level!r}, expected one of {', '.join(LEVELS)}")
    return level


def truncate(texts: Sequence[Sequence[int]], config: TextConfig) -> tuple[list[list[int]], int]:
    """Cuts texts to the context as CLIP does, the last token staying end-of-text; also how many were cut."""
    context, end = config.context_length, config.end_of_text
    kept, cut = [], 0
    for ids in texts:
        if not ids or ids[-1] != end:
            raise ValueError(
                f"tokens: got a text that ends in {ids[-1] if ids else 'nothing'}, "
                f"expected {end} (end-of-text, the last "
                "id of text.vocab_size)"
            )
        if min(ids) < 0 or max(ids) > end:
            raise ValueError(f"tokens: got ids from {min(ids)} to {max(ids)}, expected 0 to {end}")
        cut += len(ids) > context
        kept.append(list(ids) if len(ids) <= context else [*ids[: context - 1], end])
    return kept, cut


def pack(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Packing]:
    """Token lists, one after another in one tensor [T], and where they lie."""
    lengths = [len(ids) for ids in texts]
    tokens = torch.tensor([token for ids in texts for token in ids], dtype=torch.long, device=device)
    packing = Packing.of_lengths(
        torch.tensor(lengths, dtype=torch.long, device=device), sum(lengths), max(lengths, default=0)
    )
    return tokens, packing


# Strings whose frozen features are computed together: a few hundred tokens.
_TOGETHER = 64


@dataclass(frozen=True)
class Distinct:
    """The distinct texts of a batch: level after level, ids ascending.

    index: per level [N_l], where each item's text is among its level's;  id: per level [U_l], vocabulary ids
    row [U]: rows of the table;  counts, totals, longest: per level, number of texts, of tokens, and longest
    text
    """

    index: list[Tensor]  # 3 x [N_l]
    id: list[Tensor]  # 3 x [U_l]
    row: Tensor  # [U]
    counts: list[int]
    totals: list[int]
    longest: list[int]


class TokenTable(nn.Module):
    """A vocabulary's token ids, packed, as buffers that move with the model and stay out of checkpoints.

    Attributes:
        truncated: per level, how many strings were longer than the context and were cut
        cache_bytes: frozen features take at most this much memory; a vocabulary that needs more gets none
        kept
    """

    tokens: Tensor  # [all tokens]
    lengths: Tensor  # [strings]
    starts: Tensor  # [strings]
    level_start: Tensor  # [3]
    level_size: Tensor  # [3]
    filled: Tensor  # [strings] bool

    def __init__(self, vocabulary: Vocabulary, config: TextConfig, cache_bytes: int = 2 << 30) -> None:
        super().__init__()
        self.truncated: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.cache_bytes = cache_bytes
        self.context_length = config.context_length
        texts: list[list[int]] = []
        for level in LEVELS:
            try:
                kept, self.truncated[level] = truncate(vocabulary.tokens(level), config)
            except ValueError as error:
                raise UserError(f"the vocabulary's {level} texts do not fit the model: {error}") from None
            self.sizes[level] = len(kept)
            texts += kept
        lengths = torch.tensor([len(ids) for ids in texts], dtype=torch.long)
        sizes = torch.tensor(list(self.sizes.values()))
        buffers = {
            "tokens": torch.tensor([token for ids in texts for token in ids], dtype=torch.long),
            "lengths": lengths,
            "starts": lengths.cumsum(0) - lengths,
            "level_start": sizes.cumsum(0) - sizes,
            "level_size": sizes,
            "filled": torch.zeros(len(texts), dtype=torch.bool),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        self._hidden: Tensor | None = None
        self._key: tuple[Any, ...] = ()
        self._missing = 0

    def describe_truncated(self) -> str | None:
        """One line on how many strings were cut, or None if none was."""
        cut = [f"{n} of {self.sizes[level]} {level} texts" for level, n in self.truncated.items() if n]
        return f"cut to the context of {self.context_length} tokens: {', '.join(cut)}" if cut else None

    def distinct(self, ids: Sequence[Tensor]) -> Distinct:
        """The distinct texts among `ids` (3 x [N_l]). Waits for the device twice, whatever the sizes."""
        # One sort serves the three levels: the level sits above the bits of any id.
        shift = 40
        keys = torch.cat([i.long() + (level << shift) for level, i in enumerate(ids)])
        keys, inverse = torch.unique(keys, return_inverse=True)
        level = (keys >> shift).clamp(0, 2)
        position = keys - (level << shift)
        known = ((position >= 0) & (position < self.level_size[level])).all()
        row = (self.level_start[level] + position).clamp(0, max(len(self.filled) - 1, 0))
        lengths = self.lengths[row]
        of_level = level == torch.arange(3, device=keys.device)[:, None]  # [3, U]
        spread = lengths * of_level
        longest = spread.amax(1) if len(keys) else spread.sum(1)
        host = torch.cat([of_level.sum(1), spread.sum(1), longest, known[None].long()]).tolist()
        if not host[9]:
            bad = [name for name, i in zip(LEVELS, ids, strict=True) if len(i) and not self._covers(name, i)]
            raise ValueError(
                f"ids of level {', '.join(bad)}: got some outside the vocabulary's {self.sizes}; "
                "the batch must come from "
                "the data set whose vocabulary the model was given"
            )
        counts = host[:3]
        index = list(inverse.split([i.shape[0] for i in ids]))
        first = [0, counts[0], counts[0] + counts[1]]
        index = [i - start for i, start in zip(index, first, strict=True)]
        return Distinct(index, list(position.split(counts)), row, counts, host[3:6], host[6:9])

    def packing(self, row: Tensor, total: int, longest: int) -> tuple[Packing, Tensor]:
        """How the strings `row` [n] lie when packed, and where in the table their tokens are: [T]."""
        packing = Packing.of_lengths(self.lengths[row], total, longest)
        return packing, self.starts[row][packing.text] + packing.position

    def frozen(self, encoder: TextEncoder, stop: int, row: Tensor, packing: Packing, source: Tensor) -> Tensor:
        """What stages 0 to `stop` of `encoder`, all frozen, make of the strings `row`: [T, W], no gradient.

        Computed once per string and kept, until the weights, the device or the precision change.
        """
        embedding = encoder.embedding.token.weight
        size = self.tokens.shape[0] * embedding.shape[1] * embedding.element_size()
        if stop == 1 or size > self.cache_bytes:
            with torch.no_grad():
                return encoder.run(self.tokens[source], packing, stop=stop)
        self._forget_if_stale(encoder, stop)
        with torch.no_grad():
            missing = row[~self.filled[row]] if self._missing else row[:0]
            # Always in the same company: the bits of a product depend on its shape, and a resumed run, whose first
            # batch is another, must find the features of the first run.
            for first in (missing // _TOGETHER * _TOGETHER).unique().tolist():
                some = torch.arange(first, min(first + _TOGETHER, len(self.filled)), device=row.device)
                some_packing = Packing.of_lengths(self.lengths[some])
                some_source = self.starts[some][some_packing.text] + some_packing.position
                hidden = encoder.run(self.tokens[some_source], some_packing, stop=stop)
                if self._hidden is None:
                    self._hidden = hidden.new_empty(self.tokens.shape[0], hidden.shape[1])
                self._hidden[some_source] = hidden
                self.filled[some] = True
                self._missing -= some.shape[0]
            if self._hidden is None:
                return embedding.new_empty(0, embedding.shape[1])
            return self._hidden[source]

    def _forget_if_stale(self, encoder: TextEncoder, stop: int) -> None:
        weights = [p for stage in encoder.stages[:stop] for p in stage.parameters()]
        kind = self.tokens.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (self.tokens.device, weights[0].dtype, autocast, stop, sum(p._version for p in weights))
        if key != self._key:
            self._key, self._hidden, self._missing = key, None, len(self.filled)
            self.filled.zero_()

    def _covers(self, level: str, ids: Tensor) -> bool:
        return bool(((ids >= 0) & (ids < self.sizes[level])).all())
