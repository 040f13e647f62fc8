"""Gradient accumulation with the loss over the whole batch: cached gradients, as in GradCache (arXiv 2101.06983).

Every microbatch is embedded without a graph; the loss over all embeddings gives their gradients; then each microbatch
is embedded again with a graph and backpropagates its rows of those gradients. The last microbatch builds its graph in
the first pass and is embedded once. A microbatch is a range of the batch's scenes with all their views, and a range
of each level's unique texts. Only the order of sums differs from a step without microbatches.

Activation memory is that of one microbatch. The pixels, the embeddings and the output of the frozen trunk (in float32
half the size of the pixels at ViT-B/32) of the whole batch stay in memory; the trunk runs once for both passes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scenarioclip_fast.data import Batch
from scenarioclip_fast.model import EMATeacher
from scenarioclip_fast.model.scenarioclip import Embeddings, TrunkOutput
from scenarioclip_fast.model.tokens import UniqueTexts
from scenarioclip_fast.train.step import Phase, StepModule


@dataclass(frozen=True)
class GradCache:
    """Backpropagate a batch in microbatches.

    The model must be deterministic (it has no dropout), so that both passes over a microbatch give equal embeddings.

    Args:
        step: model and loss.
        wrapped: `step`, or its data-parallel wrapper, which averages the gradients over the ranks once per batch.
        microbatches: the same number on every rank; those beyond the batch's scenes are empty.
        autocast: returns the context of the forward passes.
    """

    step: StepModule
    wrapped: nn.Module
    microbatches: int
    autocast: Callable[[], AbstractContextManager[Any]]

    def backward(self, batch: Batch, texts: UniqueTexts, teacher: EMATeacher | None) -> dict[str, Tensor]:
        """Accumulate the gradients of the loss of `batch` in the trained parameters.

        Args:
            texts: the unique texts of the batch.

        Returns:
            The terms of ScenarioLoss, detached.
        """
        trunks, parts = self._embed(batch, texts, teacher)
        embeddings = _concatenate(parts, batch, texts)
        rows = [x.requires_grad_() for x in (*embeddings.image, *embeddings.text)]
        scalars = [p for p in self.step.loss.parameters() if p.requires_grad]
        with self.autocast():
            terms: dict[str, Tensor] = self.step.loss(embeddings)
        gradients = torch.autograd.grad(terms["loss"], [*rows, *scalars], allow_unused=True, materialize_grads=True)
        sizes = [[len(x) for x in (*part.image, *part.text)] for part in parts]
        row_gradients = [g.split(n) for g, *n in zip(gradients[: len(rows)], *sizes, strict=True)]

        first = self.microbatches - 1  # has its graph already; gradients are averaged in the last of `order`
        order = [first, *range(first)]
        for k in order:
            is_last = k == order[-1]
            with self._averaging(is_last):
                if k == first:
                    outputs = [*parts[k].image, *parts[k].text]
                else:
                    with self.autocast():
                        outputs = self.wrapped(Phase.EMBED_AGAIN, trunks[k])
                # The loss's scalars join the last backward pass, so that the wrapper averages their gradients, too.
                torch.autograd.backward(
                    [*outputs, *(scalars if is_last else [])],
                    [*(gradient[k] for gradient in row_gradients), *(gradients[len(rows) :] if is_last else [])],
                )
        return {name: term.detach() for name, term in terms.items()}

    def _embed(
        self, batch: Batch, texts: UniqueTexts, teacher: EMATeacher | None
    ) -> tuple[list[TrunkOutput], list[Embeddings]]:
        """Embed every microbatch, only the last one with a graph."""
        trunks: list[TrunkOutput] = []
        parts: list[Embeddings] = []
        n = self.microbatches
        for k, (scenes, scene_texts) in enumerate(zip(batch.split(n), texts.split(n), strict=True)):
            with torch.set_grad_enabled(k == n - 1), self._averaging(n == 1), self.autocast():
                trunk, part = self.wrapped(Phase.EMBED, scenes, scene_texts, teacher)
            trunks.append(trunk)
            parts.append(part)
        return trunks, parts

    def _averaging(self, enabled: bool) -> AbstractContextManager[Any]:
        """Return a context in which DDP averages gradients over the ranks if `enabled`, and otherwise does not."""
        if isinstance(self.wrapped, DistributedDataParallel) and not enabled:
            return self.wrapped.no_sync()
        return nullcontext()


@torch.no_grad()
def _concatenate(parts: list[Embeddings], batch: Batch, texts: UniqueTexts) -> Embeddings:
    def concatenate_optional(rows: list[Tensor | None]) -> Tensor | None:
        return None if rows[0] is None else torch.cat([x for x in rows if x is not None])

    return Embeddings(
        image=[torch.cat(rows) for rows in zip(*(part.image for part in parts), strict=True)],
        text=[torch.cat(rows) for rows in zip(*(part.text for part in parts), strict=True)],
        text_index=texts.index,
        text_id=texts.id,
        object_scene=batch.object_scene,
        relation_scene=batch.relation_scene,
        action_scene=batch.action_scene,
        plan=texts.plan,
        teacher_image=concatenate_optional([part.teacher_image for part in parts]),
        teacher_object_text=concatenate_optional([part.teacher_object_text for part in parts]),
        teacher_relation_text=concatenate_optional([part.teacher_relation_text for part in parts]),
    )
