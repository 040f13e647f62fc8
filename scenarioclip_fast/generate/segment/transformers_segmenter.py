"""SAM and SAM 2 of transformers, with boxes as prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scenarioclip_fast.data import rle
from scenarioclip_fast.generate.config import SegmentConfig
from scenarioclip_fast.generate.models import FittingBatches, limit_aspect, load_checkpoint

KINDS = {
    "sam": ("SAM", "SamModel", "SamProcessor"),
    "sam2": ("SAM 2", "Sam2Model", "Sam2Processor"),
    "sam2_video": ("SAM 2", "Sam2Model", "Sam2Processor"),  # how the checkpoints of Meta on the hub call themselves
}
_MASK_PIXELS = 1 << 25  # of the full-size masks, in float32, that are in memory at a time


class TransformersSegmenter:
    """A segmenter of transformers; see `Segmenter`. Of three masks per box, the one with the highest predicted IoU.

    Raises:
        UserError: the checkpoint cannot be loaded.
        MissingDependencyError: transformers is not installed.
    """

    def __init__(self, config: SegmentConfig, device: torch.device) -> None:
        _, processor, self._model = load_checkpoint(config.model, "segment.model", KINDS, config.dtype, device)
        self._processor = processor.image_processor
        self._device = device
        self._batches = FittingBatches("segment.boxes_per_batch", config.boxes_per_batch)

    @torch.inference_mode()
    def segment(
        self,
        images: Sequence[Tensor],  # uint8 [H, W, 3]
        boxes: Sequence[list[list[float]]],
    ) -> list[list[tuple[dict[str, Any] | None, float]]]:
        """Find the mask of each box."""
        padded = [limit_aspect(image) for image in images]
        inputs = self._processor(
            images=[image.numpy() for image in padded], input_data_format="channels_last", return_tensors="pt"
        )
        pixels = inputs["pixel_values"]
        # SAM keeps the aspect ratio and pads; SAM 2 resizes to a square.
        resized = inputs["reshaped_input_sizes"].tolist() if "reshaped_input_sizes" in inputs else None
        embeddings = self._model.get_image_embeddings(pixels.to(self._device, self._model.dtype))
        prompts = []
        for i, of_image in enumerate(boxes):
            height, width = resized[i] if resized else pixels.shape[-2:]
            scale = np.array([width, height], np.float64) / padded[i].shape[1::-1]
            prompts += [(i, np.array(box, np.float64) * np.tile(scale, 2)) for box in of_image]
        found = iter(self._batches.run(partial(self._decode, embeddings), prompts))
        results: list[list[tuple[dict[str, Any] | None, float]]] = []
        for i, of_image in enumerate(boxes):
            low, scores = zip(*(next(found) for _ in of_image), strict=True)
            results.append(list(zip(self._full_size(low, images[i], padded[i], inputs, i), scores, strict=True)))
        return results

    def _decode(
        self,
        embeddings: Tensor | list[Tensor],  # of the images
        prompts: Sequence[tuple[int, Any]],
    ) -> list[tuple[Tensor, float]]:
        """The mask's logits and the predicted IoU of each box.

        Each box is a row with its image's embedding, so that boxes of several images share a call without padding.
        """
        rows = torch.tensor([i for i, _ in prompts], device=self._device)
        corners = torch.from_numpy(np.stack([box for _, box in prompts])).to(self._device, torch.float32)
        out = self._model(
            image_embeddings=[e[rows] for e in embeddings] if isinstance(embeddings, list) else embeddings[rows],
            input_boxes=corners[:, None],
            multimask_output=True,
        )
        scores = np.nan_to_num(out.iou_scores[:, 0].float().cpu().numpy(), nan=-np.inf)
        best = scores.argmax(1)  # the first of equals
        masks = out.pred_masks[torch.arange(len(rows)), 0, torch.from_numpy(best)].float()
        return list(zip(masks, scores.max(1).tolist(), strict=True))

    def _full_size(
        self,
        masks: Sequence[Tensor],  # [h, w] logits
        image: Tensor,
        padded: Tensor,
        inputs: Any,
        i: int,
    ) -> list[dict[str, Any]]:
        """The masks of an image as RLE, a few at a time at full size."""
        height, width = image.shape[:2]
        size = tuple(padded.shape[:2])
        sizes = [[size]] + ([inputs["reshaped_input_sizes"][i : i + 1]] if "reshaped_input_sizes" in inputs else [])
        step = max(1, _MASK_PIXELS // max(size[0] * size[1], 1 << 20))  # SAM's masks pass through 1024 x 1024
        found = []
        for start in range(0, len(masks), step):
            logits = torch.stack(list(masks[start : start + step]))[:, None]
            full = self._processor.post_process_masks([logits], *sizes)[0][:, 0, :height, :width].cpu().numpy()
            found += [rle.encode(mask) for mask in full]
        return found
