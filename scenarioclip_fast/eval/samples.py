"""A model's predictions for a few sample scenes: views, true texts and top predictions, for plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scenarioclip_fast.data.batch import Batch
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.eval.encoding import Encoder, class_embeddings, evaluating, level_views, score_blocks
from scenarioclip_fast.ops.views import CLIP_MEAN, CLIP_STD

_CANDIDATES = 10  # scenes considered per scene shown


@dataclass(frozen=True)
class Prediction:
    """One view as seen by the model, its true text, and the top texts with their cosine similarities, best first.

    `truth_score` is the similarity of the true text, `truth_rank` its rank among all texts, from 1; ties count against
    it.
    """

    picture: Tensor  # uint8 [S, S, 3]
    truth: str
    top_texts: list[tuple[str, float]]
    held_out: bool = False
    truth_score: float = float("nan")
    truth_rank: int = 0

    @property
    def correct(self) -> bool:
        return self.top_texts[0][0] == self.truth


@dataclass(frozen=True)
class SampleScene:
    """The predictions for the views of one scene; `action` is None if the scene has none."""

    key: str
    action: Prediction | None
    objects: list[Prediction] = field(default_factory=list)
    relations: list[Prediction] = field(default_factory=list)


def to_picture(
    pixels: Tensor,  # [3, S, S], normalised with CLIP's mean and deviation
) -> Tensor:  # uint8 [S, S, 3]
    """Undo the normalisation of a view."""
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return ((pixels.float() * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu()


@torch.inference_mode()
def predict_samples(
    model: Encoder, batches: Iterable[Batch], vocabulary: Vocabulary, *, scenes: int = 6, topk: int = 3
) -> list[SampleScene]:
    """Collect the model's top predictions for `scenes` scenes among the first ones of `batches`.

    Scenes with relations precede those without; within each group, actions that are not shown yet come first.
    """
    found: list[SampleScene] = []
    with evaluating(model):
        texts = class_embeddings(model, vocabulary)
        for batch in batches:
            found += _predict_batch(model, batch, vocabulary, texts, topk)
            if len(found) >= _CANDIDATES * scenes:
                break
    shown: Counter[tuple[bool, str]] = Counter()
    rank = []
    for sample in found:
        kind = (not sample.relations, "" if sample.action is None else sample.action.truth)
        rank.append((kind[0], shown[kind]))
        shown[kind] += 1
    order = sorted(range(len(found)), key=rank.__getitem__)
    return [found[i] for i in order[:scenes]]


def _predict_batch(
    model: Encoder, batch: Batch, vocabulary: Vocabulary, texts: dict[str, Tensor], topk: int
) -> list[SampleScene]:
    predictions: dict[str, list[list[Prediction]]] = {}
    for level, (pixels, ids, scene) in level_views(batch).items():
        predictions[level] = [[] for _ in range(batch.num_scenes)]
        if len(ids) == 0:
            continue
        names, counts = vocabulary.texts(level), vocabulary.train_counts(level)
        for some, scores in score_blocks(model, pixels, texts[level], level):
            best = scores.topk(min(topk, len(names)))
            own = scores.gather(1, ids[some][:, None])
            rank = (~(scores < own)).sum(1)
            columns = (ids[some], scene[some], best.indices, best.values, own[:, 0], rank)
            rows = zip(pixels[some], *(column.tolist() for column in columns), strict=True)
            for view, truth, i, top, cosines, score, position in rows:
                ranked = [(names[j], cosine) for j, cosine in zip(top, cosines, strict=True)]
                held_out = counts[truth] == 0
                prediction = Prediction(to_picture(view), names[truth], ranked, held_out, score, position)
                predictions[level][i].append(prediction)
    per_scene = zip(batch.keys, predictions["global"], predictions["object"], predictions["relation"], strict=True)
    return [
        SampleScene(key, action[0] if action else None, objects, relations)
        for key, action, objects, relations in per_scene
    ]
