"""GroundingDINO, MM-GroundingDINO and OWLv2 of transformers.

Names become token ids here, not in the processors: a prompt never exceeds the limit of the text model, and a box is
traced back to its name by position, which "ball" and "a red ball" in one prompt need.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scenarioclip_fast.generate.config import GroundConfig
from scenarioclip_fast.generate.ground.boxes import Box
from scenarioclip_fast.generate.models import limit_aspect, load_checkpoint

KINDS = {
    "grounding-dino": ("GroundingDINO", "GroundingDinoForObjectDetection", "GroundingDinoProcessor"),
    "mm-grounding-dino": ("MM-GroundingDINO", "MMGroundingDinoForObjectDetection", "GroundingDinoProcessor"),
    "owlv2": ("OWLv2", "Owlv2ForObjectDetection", "Owlv2Processor"),
}
_THREADS = 4  # that resize and normalise images
_NONE = -1

Ids = NDArray[np.int64]
Array = NDArray[np.float32]


class Prompt(NamedTuple):
    """Names of an image as the text model reads them.

    Attributes:
        ids: token ids; a row per query of OWLv2.
        owners: of each token, or of each query of OWLv2, the number of its name, or -1.
    """

    ids: Ids  # [tokens] or [queries, tokens]
    owners: Ids  # [tokens] or [queries]


class TransformersDetector:
    """A detector of transformers; see `Detector`.

    Raises:
        UserError: the checkpoint cannot be loaded.
        MissingDependencyError: transformers is not installed.
    """

    def __init__(self, config: GroundConfig, device: torch.device) -> None:
        kind, processor, self._model = load_checkpoint(config.model, "ground.model", KINDS, config.dtype, device)
        self._processor = processor.image_processor
        self._device, self._threshold = device, config.box_threshold
        self._texts: _Phrases | _Queries
        if kind == "owlv2":
            self._texts = _Queries(processor.tokenizer, self._model.config.text_config.max_position_embeddings)
        else:
            self._texts = _Phrases(processor.tokenizer, self._model.config.max_text_len, config.text_threshold)

    @torch.inference_mode()
    def detect(
        self,
        images: Sequence[Tensor],  # uint8 [H, W, 3]
        names: Sequence[Sequence[str]],
    ) -> list[list[Box]]:
        """Find boxes; images that the processor brings to the same size share a batch, so that none is padded."""
        images = [limit_aspect(image) for image in images]
        with ThreadPoolExecutor(_THREADS) as pool:
            pixels = list(pool.map(self._preprocess, images))
        groups: dict[torch.Size, list[tuple[int, Prompt]]] = {}
        for i, asked in enumerate(names):
            for prompt in self._texts.prompts(asked):
                groups.setdefault(pixels[i].shape, []).append((i, prompt))
        found: list[list[Box]] = [[] for _ in images]
        for rows in groups.values():
            for start in range(0, len(rows), len(images)):
                part = rows[start : start + len(images)]
                texts = self._texts.inputs([prompt for _, prompt in part])
                out = self._model(
                    pixel_values=torch.stack([pixels[i] for i, _ in part]).to(self._device, self._model.dtype),
                    **{key: torch.from_numpy(value).to(self._device) for key, value in texts.items()},
                )
                scores = out.logits.float().sigmoid().cpu().numpy()
                boxes = out.pred_boxes.float().cpu().numpy()
                for (i, prompt), score, box in zip(part, scores, boxes, strict=True):
                    found[i] += self._boxes(names[i], prompt, score, box, images[i].shape)
        return found

    def _preprocess(self, image: Tensor) -> Tensor:  # [H, W, 3] -> [3, H', W']
        found = self._processor(images=[image.numpy()], input_data_format="channels_last", return_tensors="pt")
        pixels: Tensor = found["pixel_values"][0]
        return pixels

    def _boxes(
        self,
        names: Sequence[str],
        prompt: Prompt,
        scores: Array,  # [boxes, tokens] or [boxes, queries]
        boxes: Array,  # [boxes, 4]: centre, width and height as fractions
        shape: Sequence[int],
    ) -> list[Box]:
        height, width = shape[:2]
        best = scores.max(1)
        keep = best > self._threshold  # False for NaN
        owners = self._texts.match(prompt, scores[keep])
        # OWLv2's processor pads images to squares.
        scale = (max(height, width),) * 2 if isinstance(self._texts, _Queries) else (width, height)
        centre, half = boxes[keep, :2].astype(np.float64), boxes[keep, 2:].astype(np.float64) / 2
        corners = np.concatenate([centre - half, centre + half], 1) * np.tile(scale, 2)
        return [
            Box(names[owner] if owner != _NONE else self._texts.phrase(prompt, row), tuple(box), float(score))
            for owner, row, box, score in zip(owners, scores[keep], corners.tolist(), best[keep], strict=True)
        ]


class _Tokens:
    """Names as token ids, without the special ones that a name may spell."""

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
        unknown = {tokenizer.unk_token_id} - special - {tokenizer.pad_token_id}
        self._dropped = set(tokenizer.all_special_ids) - unknown

    def pieces(self, names: Sequence[str], size: int, dropped: Sequence[int] = ()) -> list[tuple[int, list[int]]]:
        """Number and ids of each name; longer names than `size` tokens are several pieces."""
        found = []
        for number, name in enumerate(names):
            ids = self.tokenizer(name.lower(), add_special_tokens=False, verbose=False)["input_ids"]
            ids = [i for i in ids if i not in self._dropped and i not in dropped]
            found += [(number, ids[start : start + size]) for start in range(0, len(ids), size)]
        return found


class _Phrases(_Tokens):
    """The prompts of GroundingDINO, "[CLS] a red ball. dog. [SEP]"; each token has a score."""

    def __init__(self, tokenizer: Any, limit: int, threshold: float) -> None:
        super().__init__(tokenizer, limit)
        self._threshold = threshold
        self._stop, self._question = tokenizer.convert_tokens_to_ids([".", "?"])  # the model ends phrases at both

    def prompts(self, names: Sequence[str]) -> list[Prompt]:
        """As few prompts as possible with the names in order; none if no name has a token."""
        space = self.limit - 2
        rows: list[list[tuple[int, int]]] = []
        for number, ids in self.pieces(names, space - 1, (self._stop, self._question)):
            phrase = [*((i, number) for i in ids), (self._stop, _NONE)]
            if not rows or len(rows[-1]) + len(phrase) > space:
                rows.append([])
            rows[-1] += phrase
        ends = (self.tokenizer.cls_token_id, _NONE), (self.tokenizer.sep_token_id, _NONE)
        return [Prompt(*np.array([ends[0], *row, ends[1]], np.int64).T) for row in rows]

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Ids]:
        ids = np.full((len(prompts), max(len(p.ids) for p in prompts)), self.tokenizer.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for row, seen, prompt in zip(ids, mask, prompts, strict=True):
            row[: len(prompt.ids)], seen[: len(prompt.ids)] = prompt.ids, 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}

    def match(self, prompt: Prompt, scores: Array) -> list[int]:
        return match_phrases(prompt.owners, scores, self._threshold)

    def phrase(self, prompt: Prompt, scores: Array) -> str:
        """The words of a box without a name, as published."""
        words = prompt.ids[scores[: len(prompt.ids)] > self._threshold].tolist()
        text: str = self.tokenizer.decode(words, skip_special_tokens=True)
        return text.strip(" .")


def match_phrases(
    owners: Ids,  # [tokens]
    scores: Array,  # [boxes, at least tokens]
    threshold: float,
) -> list[int]:
    """The name of each box: the one with the most tokens of a score above the threshold.

    Among equals, the name of which they are the larger part, then the one with the highest score, then the first one.

    Args:
        owners: the number of each token's name, or -1.

    Returns:
        The number of each box's name; -1 if no token of a name is above the threshold.
    """
    numbers = np.unique(owners[owners != _NONE])
    tokens = owners == numbers[:, None]  # [names, tokens]
    scores = scores[:, : len(owners)]
    matching = (scores > threshold).astype(np.int64) @ tokens.T  # [boxes, names]
    highest = np.where(tokens, scores[:, None], 0).max(2)
    found = []
    for count, high in zip(matching, highest, strict=True):
        order = np.lexsort((numbers, -high, -count / tokens.sum(1), -count))
        found.append(int(numbers[order[0]]) if count[order[0]] else _NONE)
    return found


class _Queries(_Tokens):
    """The queries of OWLv2, one per name; each has a score."""

    def prompts(self, names: Sequence[str]) -> list[Prompt]:
        pieces = self.pieces(names, self.limit - 2)
        if not pieces:
            return []
        ids = np.full((len(pieces), self.limit), self.tokenizer.pad_token_id, np.int64)
        for row, (_, piece) in zip(ids, pieces, strict=True):
            row[: len(piece) + 2] = [self.tokenizer.bos_token_id, *piece, self.tokenizer.eos_token_id]
        return [Prompt(ids, np.array([number for number, _ in pieces], np.int64))]

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Ids]:
        count = max(len(p.ids) for p in prompts)
        ids = np.zeros((len(prompts), count, self.limit), np.int64)  # the model ignores queries that start with 0
        mask = np.ones_like(ids)
        for row, seen, prompt in zip(ids, mask, prompts, strict=True):
            row[: len(prompt.ids)] = prompt.ids
            # Up to the end of the text, as the tokenizer marks it; a mask of zeros would give NaN.
            seen[: len(prompt.ids)] = np.cumsum(prompt.ids == self.tokenizer.eos_token_id, 1).cumsum(1) <= 1
        return {"input_ids": ids.reshape(-1, self.limit), "attention_mask": mask.reshape(-1, self.limit)}

    def match(self, prompt: Prompt, scores: Array) -> list[int]:
        owners: list[int] = prompt.owners[scores[:, : len(prompt.owners)].argmax(1)].tolist()
        return owners

    def phrase(self, prompt: Prompt, scores: Array) -> str:
        raise AssertionError("every query has a name")
