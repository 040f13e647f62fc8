"""Sample scenes: predictions match their views, and pictures show the model's input."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from scenarioclip_fast.data import Batch, Vocabulary
from scenarioclip_fast.eval.samples import predict_samples, to_picture
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.ops.views import CLIP_MEAN, CLIP_STD

VOCABULARY = Vocabulary(
    ["eat", "run"], ["cat", "dog", "tree"], ["cat on tree", "dog on cat"], {"relation": {"cat on tree": 3}}
)


class Colours:
    """Class `i` is encoded as a red channel of `i` / 4, and embedded along axis `i`."""

    def encode_image(self, pixels: Tensor, level: str) -> Tensor:
        red = pixels[:, 0, 0, 0] * CLIP_STD[0] + CLIP_MEAN[0]
        return 5 * torch.eye(4)[(red * 4).round().long()] + 0.1

    def encode_text(self, texts: list[list[int]], level: str) -> Tensor:
        return torch.eye(4)[[VOCABULARY.tokens(level).index(tokens) for tokens in texts]]


def make_batch(actions: list[int], objects: list[list[int]], relations: list[list[int]], start: int = 0) -> Batch:
    ids = {"global": actions, "object": list(chain(*objects)), "relation": list(chain(*relations))}
    red = torch.tensor([i for level in LEVELS for i in ids[level]]) / 4
    rgb = torch.stack([red, torch.full_like(red, 0.25), torch.full_like(red, 0.75)], 1)
    pixels = ((rgb - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD))[:, :, None, None].expand(-1, 3, 2, 2)
    homes = [
        torch.tensor([i for i, own in enumerate(lists) for _ in own], dtype=torch.int64)
        for lists in (objects, relations)
    ]
    keys = [f"scene {start + i}" for i in range(len(actions))]
    return Batch(pixels, keys, *homes, *(torch.tensor(ids[level], dtype=torch.int64) for level in LEVELS))


def test_predictions_and_pictures() -> None:
    batch = make_batch([0, 1], [[2], [0, 1]], [[], [0, 1]])
    second, first = predict_samples(Colours(), [batch], VOCABULARY, scenes=2, topk=2)
    assert (first.key, second.key) == ("scene 0", "scene 1")  # scenes with relations come first
    assert [prediction.truth for prediction in second.objects] == ["cat", "dog"]
    assert [prediction.truth for prediction in second.relations] == ["cat on tree", "dog on cat"]
    assert [prediction.held_out for prediction in second.relations] == [False, True]
    assert first.relations == []
    for prediction in (first.action, second.action, *first.objects, *second.objects, *second.relations):
        assert prediction.correct
        assert len(prediction.top_texts) == 2
        assert prediction.top_texts[0][1] > 0.9 > prediction.top_texts[1][1]
    # 3 / 4 and 1 / 4 as bytes; the red value of class 1 is 1 / 4.
    assert second.objects[1].picture[0, 0].tolist() == [64, 64, 191]


def test_ties_rank_before_the_truth() -> None:
    class Blind(Colours):
        def encode_image(self, pixels: Tensor, level: str) -> Tensor:
            return torch.ones(len(pixels), 4)

    (found,) = predict_samples(Blind(), [make_batch([0], [[0, 1, 2]], [[]])], VOCABULARY, topk=1)
    assert [prediction.truth_rank for prediction in found.objects] == [3, 3, 3]


def test_picture_undoes_the_normalisation() -> None:
    picture = torch.randint(0, 256, (5, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = ((picture / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(2, 0, 1)
    assert torch.equal(to_picture(pixels), picture)


def test_actions_are_mixed() -> None:
    batches = [make_batch([0] * 4, [[0]] * 4, [[0]] * 4), make_batch([1, 1], [[1]] * 2, [[1], []], start=4)]
    chosen = predict_samples(Colours(), batches, VOCABULARY, scenes=3)
    assert [sample.key for sample in chosen] == ["scene 0", "scene 4", "scene 1"]
    assert len(predict_samples(Colours(), batches, VOCABULARY, scenes=9)) == 6
