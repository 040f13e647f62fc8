from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scenarioclip_fast.data import Batch, Vocabulary
from scenarioclip_fast.levels import LEVELS

DIM = 24


def text_vector(level: str, tokens: list[int]) -> Tensor:
    """A random vector, determined by the level and the text."""
    return torch.randn(DIM, generator=torch.Generator().manual_seed(zlib.crc32(repr((level, tokens)).encode())))


class LookupModel(nn.Module):
    """A lookup model: a view's first pixel is its row in a table of embeddings; texts have fixed random vectors."""

    def __init__(self, vocabulary: Vocabulary, images: dict[str, Tensor]) -> None:
        super().__init__()
        self.images = images
        self.texts = {
            level: torch.stack([text_vector(level, tokens) for tokens in vocabulary.tokens(level)])
            for level in LEVELS
            if vocabulary.texts(level)
        }
        self.modes: set[bool] = set()

    def encode_image(self, pixels: Tensor, level: str) -> Tensor:
        self.modes.add(self.training)
        return self.images[level][pixels[:, 0, 0, 0].long()]

    def encode_text(self, texts: list[list[int]], level: str) -> Tensor:
        self.modes.add(self.training)
        return 3.0 * torch.stack([text_vector(level, tokens) for tokens in texts])


def make_vocabulary() -> Vocabulary:
    relations = [f"{a} {p} {b}" for a in ("cat", "dog") for p in ("on", "under") for b in ("box", "tree", "car")]
    counts = {
        "global": {f"action {i}": 5 for i in range(6)},
        "object": {name: 2 for name in ("cat", "dog", "box", "tree", "car", *(f"thing {i}" for i in range(10)))},
        "relation": {text: 1 for text in sorted(relations)[::2]},
    }
    return Vocabulary(counts["global"], counts["object"], relations, counts)


def make_scenes(scenes: int, seed: int, noise: float = 1.2) -> tuple[LookupModel, list[Batch], Vocabulary]:
    """Ragged scenes, some without relations, and a model that embeds views near their texts."""
    vocabulary = make_vocabulary()
    rng = random.Random(seed)
    rows: dict[str, list[int]] = {level: [] for level in LEVELS}
    batches = []
    for start in range(0, scenes, 4):
        count = min(4, scenes - start)
        homes: dict[str, list[int]] = {"global": list(range(count)), "object": [], "relation": []}
        for scene in range(count):
            homes["object"] += [scene] * rng.randint(1, 5)
            homes["relation"] += [scene] * rng.choice((0, 0, 1, 3))
        ids, pixels = {}, []
        for level in LEVELS:
            ids[level] = torch.tensor(
                [rng.randrange(len(vocabulary.texts(level))) for _ in homes[level]], dtype=torch.int64
            )
            first = len(rows[level])
            rows[level] += ids[level].tolist()
            numbers = torch.arange(first, first + len(ids[level]), dtype=torch.float32)
            pixels.append(numbers.view(-1, 1, 1, 1).expand(-1, 3, 2, 2))
        batches.append(
            Batch(
                torch.cat(pixels),
                [f"scene {start + i}" for i in range(count)],
                torch.tensor(homes["object"], dtype=torch.int64),
                torch.tensor(homes["relation"], dtype=torch.int64),
                *(ids[level] for level in LEVELS),
            )
        )
    model = LookupModel(vocabulary, {})
    generator = torch.Generator().manual_seed(seed)
    for level in LEVELS:
        model.images[level] = model.texts[level][rows[level]]
        model.images[level] += noise * torch.randn(len(rows[level]), DIM, generator=generator)
    return model, batches, vocabulary


@pytest.fixture
def lookup_model() -> type[LookupModel]:
    return LookupModel


@pytest.fixture
def synthetic() -> Callable[..., tuple[Any, list[Batch], Vocabulary]]:
    """synthetic(scenes, seed, noise=1.2): a model, batches of four scenes, their vocabulary."""
    return make_scenes
