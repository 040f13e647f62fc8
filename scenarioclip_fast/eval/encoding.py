"""Embeddings of class texts and of a batch's views, checked to be finite; shared by all evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from scenarioclip_fast.data.batch import Batch
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.levels import LEVELS

SINGLE_PROCESS = World(0, 1, torch.device("cpu"), None)  # a single process; its tensors may be on any device
_BLOCK = 1 << 24  # scores per block: 64 MiB
_CHUNK = 256  # views embedded at once


class Encoder(Protocol):
    """The model interface that evaluations use."""

    def encode_image(self, pixels: Tensor, level: str) -> Tensor: ...  # [V, 3, S, S] -> [V, D]

    def encode_text(self, texts: Sequence[list[int]], level: str) -> Tensor: ...  # n lists of token ids -> [n, D]


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Put an `nn.Module` in evaluation mode, and restore its mode on exit; ignores other objects."""
    if not isinstance(model, torch.nn.Module):
        yield
        return
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def class_embeddings(model: Encoder, vocabulary: Vocabulary, levels: Sequence[str] = LEVELS) -> dict[str, Tensor]:
    """Compute unit-length embeddings [classes, D] of all class texts, for each level with texts.

    Raises:
        UserError: the embeddings are not finite.
    """
    return {level: embed_texts(model, tokens, level) for level in levels if (tokens := vocabulary.tokens(level))}


def embed_texts(model: Encoder, tokens: Sequence[list[int]], level: str) -> Tensor:  # [n, D], unit length
    """Embed n tokenized texts.

    Raises:
        UserError: the embeddings are not finite.
    """
    text = F.normalize(model.encode_text(tokens, level).float(), dim=-1)
    check_finite(text.isfinite().all(1), f"{level} text")
    return text


def check_finite(
    finite: Tensor,  # bool [n]
    what: str,
) -> None:
    """Raise UserError if any embedding is not finite: scores computed from it would look valid."""
    if bad := int((~finite).sum()):
        raise UserError(
            f"{bad} of {len(finite)} {what} embeddings are not finite: training diverged, or the weights are damaged"
        )


def level_views(batch: Batch, *, labelled: bool = True) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Split a batch into, per level, pixels [n, 3, S, S], class ids [n] and the scene of each view [n].

    labelled: leave out the global views of scenes without an action; otherwise their id is -1.
    """
    pixels = torch.split(batch.pixels, [batch.num_scenes, batch.num_objects, batch.num_relations])
    ids = (batch.action_id, batch.object_id, batch.relation_id)
    scenes = (
        torch.arange(batch.num_scenes, device=batch.action_id.device),
        batch.object_scene,
        batch.relation_scene,
    )
    views = dict(zip(LEVELS, zip(pixels, ids, scenes, strict=True), strict=True))
    if labelled and (rows := batch.action_scene) is not None:
        views["global"] = (pixels[0][rows], ids[0][rows], rows)
    return views


def score_blocks(
    model: Encoder,
    pixels: Tensor,  # [V, 3, S, S]
    classes: Tensor,  # [C, D], unit length
    level: str,
) -> Iterator[tuple[slice, Tensor]]:  # rows of V, their cosines [rows, C]
    """Yield cosine similarities of views with all class texts, in blocks of bounded size."""
    step = max(1, _BLOCK // len(classes))
    for start in range(0, len(pixels), _CHUNK):
        image = F.normalize(model.encode_image(pixels[start : start + _CHUNK], level).float(), dim=-1)
        for first in range(0, len(image), step):
            part = image[first : first + step]
            yield slice(start + first, start + first + len(part)), part @ classes.T
