"""Token ids of a vocabulary on the device, and the frozen features of its strings, each computed once."""

from __future__ import annotations

import itertools
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

    index: per level [N_l], where each item's text is among its level's;  row: per level [U_l], rows of the table
    id, host_row, lengths: per level [U_l], on the CPU, vocabulary ids, the rows again, and the texts' numbers of tokens
    """

    index: list[Tensor]  # 3 x [N_l]
    id: list[Tensor]  # 3 x [U_l]
    row: list[Tensor]  # 3 x [U_l]
    host_row: list[Tensor]  # 3 x [U_l]
    lengths: list[Tensor]  # 3 x [U_l]

    def split(self, parts: int) -> list[Distinct]:
        """The texts of each level in `parts` runs; `index` points into no single run and is left out."""
        split = [[t.tensor_split(parts) for t in ts] for ts in (self.id, self.row, self.host_row, self.lengths)]
        return [Distinct([], *([runs[k] for runs in levels] for levels in split)) for k in range(parts)]


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
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        # Stay on the host, where they are asked for without a wait for the device.
        self._host_lengths = lengths
        self._filled = torch.zeros(len(texts), dtype=torch.bool)
        self._hidden: Tensor | None = None
        self._key: tuple[Any, ...] = ()

    def describe_truncated(self) -> str | None:
        """One line on how many strings were cut, or None if none was."""
        cut = [f"{n} of {self.sizes[level]} {level} texts" for level, n in self.truncated.items() if n]
        return f"cut to the context of {self.context_length} tokens: {', '.join(cut)}" if cut else None

    def distinct(self, ids: Sequence[Tensor]) -> Distinct:
        """The distinct texts among `ids` (3 x [N_l]). Ids on the CPU cost no wait for the device."""
        ids = [i.cpu() for i in ids]
        bad = [name for name, i in zip(LEVELS, ids, strict=True) if len(i) and not self._covers(name, i)]
        if bad:
            raise ValueError(
                f"ids of level {', '.join(bad)}: got some outside the vocabulary's {self.sizes}; "
                "the batch must come from "
                "the data set whose vocabulary the model was given"
            )
        # On the host: a few thousand numbers, and nothing waits for the device to count them.
        found = [torch.unique(i, return_inverse=True) for i in ids]
        id, index = [list(x) for x in zip(*found, strict=True)]
        start = itertools.accumulate(self.sizes.values(), initial=0)
        row = [i + s for i, s in zip(id, start, strict=False)]
        lengths = [self._host_lengths[r] for r in row]
        return Distinct(self._upload(index), id, self._upload(row), row, lengths)

    def _upload(self, parts: list[Tensor]) -> list[Tensor]:  # 3 x [n_l]
        """To the table's device in one copy that the host does not wait for."""
        if not self.tokens.is_cuda:
            return parts
        whole = torch.cat(parts).pin_memory().to(self.tokens.device, non_blocking=True)
        return list(whole.split([len(part) for part in parts]))

    def packing(self, row: Tensor, total: int, longest: int) -> tuple[Packing, Tensor]:
        """How the strings `row` [n] lie when packed, and where in the table their tokens are: [T]."""
        packing = Packing.of_lengths(self.lengths[row], total, longest)
        return packing, self.starts[row][packing.text] + packing.position

    def frozen(self, encoder: TextEncoder, stop: int, host_row: Tensor, packing: Packing, source: Tensor) -> Tensor:
        """What stages 0 to `stop` of `encoder`, all frozen, make of the strings `host_row` [n]: [T, W], no gradient.

        Computed once per string and kept, until the weights, the device or the precision change.
        """
        embedding = encoder.embedding.token.weight
        size = self.tokens.shape[0] * embedding.shape[1] * embedding.element_size()
        if stop == 1 or size > self.cache_bytes:
            with torch.no_grad():
                return encoder.run(self.tokens[source], packing, stop=stop)
        # What an evaluation in inference mode leaves here must serve, and grow in, a training step.
        with torch.inference_mode(False), torch.no_grad():
            self._forget_if_stale(encoder, stop)
            missing = host_row[~self._filled[host_row]]
            # Always in the same company: the bits of a product depend on its shape, and a resumed run, whose first
            # batch is another, must find the features of the first run.
            for first in (missing // _TOGETHER * _TOGETHER).unique().tolist():
                some = torch.arange(first, min(first + _TOGETHER, len(self._filled)), device=self.tokens.device)
                lengths = self._host_lengths[first : first + _TOGETHER]
                some_packing = Packing.of_lengths(self.lengths[some], int(lengths.sum()), int(lengths.max()))
                some_source = self.starts[some][some_packing.text] + some_packing.position
                hidden = encoder.run(self.tokens[some_source], some_packing, stop=stop)
                if self._hidden is None:
                    self._hidden = hidden.new_empty(self.tokens.shape[0], hidden.shape[1])
                self._hidden[some_source] = hidden
                self._filled[first : first + _TOGETHER] = True
            if self._hidden is None:
                return embedding.new_empty(0, embedding.shape[1])
            return self._hidden[source]

    def _forget_if_stale(self, encoder: TextEncoder, stop: int) -> None:
        weights = [p for stage in encoder.stages[:stop] for p in stage.parameters()]
        kind = self.tokens.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # Which tensors, and how often they were written; those made in inference mode do not count that.
        state = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in weights)
        key = (self.tokens.device, weights[0].dtype, autocast, stop, state)
        if key != self._key:
            self._key, self._hidden = key, None
            self._filled = torch.zeros(len(self._filled), dtype=torch.bool)

    def _covers(self, level: str, ids: Tensor) -> bool:
        return bool(((ids >= 0) & (ids < self.sizes[level])).all())
