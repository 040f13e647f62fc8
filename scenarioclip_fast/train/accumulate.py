"""A step's backward pass in pieces, with the loss still over the whole batch: cached representations.

As in GradCache (arXiv 2101.06983): every piece is embedded without a graph; the loss over all embeddings gives their
gradients; each piece is embedded again, now with a graph, and takes its share of them back to the weights. The last
piece has its graph from the start and is embedded once. A piece is a run of the batch's scenes with all their views,
and a run of each level's distinct texts. Only the order of sums differs from the step in one piece. The activations in
memory are those of one piece; of the whole batch there are the pixels, the embeddings, and what the frozen stages make
of the views (in float32 half the size of their pixels at ViT-B/32), which is computed once and serves both passes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scenarioclip_fast.data import Batch
from scenarioclip_fast.losses import ScenarioLoss
from scenarioclip_fast.model import EMATeacher, ScenarioCLIP
from scenarioclip_fast.model.scenarioclip import Embeddings, TrunkOutput
from scenarioclip_fast.model.tokens import UniqueTexts

T = TypeVar("T")


class StepModule(nn.Module):
    """Model and loss as one module. A pass is a call with what to do, so that wrappers for several ranks, which hook
    `forward`, see each of them."""

    def __init__(self, model: ScenarioCLIP, loss: ScenarioLoss) -> None:
        super().__init__()
        self.model = model
        self.loss: nn.Module = loss

    def forward(self, run: Callable[[StepModule], T]) -> T:
        return run(self)


def backward_in_pieces(
    step: StepModule,
    wrapped: nn.Module,
    batch: Batch,
    distinct: UniqueTexts,
    teacher: EMATeacher | None,
    pieces: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, Tensor]:
    """Leaves the gradients of the loss of `batch` in the trained parameters; returns the terms of ScenarioLoss.

    The model draws no random numbers, so that both passes over a piece give the same embeddings.

    Args:
        wrapped: `step`, or its data-parallel wrapper, which then averages the gradients over the ranks once.
        distinct: the batch's distinct texts.
        pieces: how many; the same on every rank. Pieces beyond the batch's scenes are empty.
        autocast: makes the context of the forward passes.
    """
    begun: list[TrunkOutput] = []
    parts: list[Embeddings] = []
    for k, (some, texts) in enumerate(zip(batch.split(pieces), distinct.split(pieces), strict=True)):
        # The last piece keeps its graph; its backward pass comes first, so that another one's averages.
        with torch.set_grad_enabled(k == pieces - 1), _averaging(wrapped, pieces == 1), autocast():
            start, part = wrapped(partial(_embed, batch=some, distinct=texts, teacher=teacher))
        begun.append(start)
        parts.append(part)

    whole = _joined(parts, batch, distinct)
    leaves = [x.requires_grad_() for x in (*whole.image, *whole.text)]
    temperatures = [p for p in step.loss.parameters() if p.requires_grad]
    with autocast():
        terms = step.loss(whole)
    gradients = torch.autograd.grad(terms["loss"], [*leaves, *temperatures], allow_unused=True, materialize_grads=True)
    rows = [[len(x) for x in (*part.image, *part.text)] for part in parts]
    shares = [gradient.split(sizes) for gradient, *sizes in zip(gradients[: len(leaves)], *rows, strict=True)]

    order = [pieces - 1, *range(pieces - 1)]
    for k in order:
        last = k == order[-1]
        with _averaging(wrapped, last):
            if k == pieces - 1:
                outputs = [*parts[k].image, *parts[k].text]
            else:
                with autocast():
                    outputs = wrapped(partial(_embed_again, begun=begun[k]))
            # The temperatures' gradients are known; with the last backward pass the wrapper averages them, too.
            torch.autograd.backward(
                [*outputs, *(temperatures if last else [])],
                [*(share[k] for share in shares), *(gradients[len(leaves) :] if last else [])],
            )
    return {name: term.detach() for name, term in terms.items()}


def _embed(
    step: StepModule, batch: Batch, distinct: UniqueTexts, teacher: EMATeacher | None
) -> tuple[TrunkOutput, Embeddings]:
    begun = step.model.begin(batch, distinct)
    return begun, step.model.finish(begun, teacher)


def _embed_again(step: StepModule, begun: TrunkOutput) -> list[Tensor]:
    embeddings = step.model.finish(begun)
    return [*embeddings.image, *embeddings.text]


@torch.no_grad()
def _joined(parts: list[Embeddings], batch: Batch, distinct: UniqueTexts) -> Embeddings:
    def teachers(rows: list[Tensor | None]) -> Tensor | None:
        return None if rows[0] is None else torch.cat([x for x in rows if x is not None])

    return Embeddings(
        image=[torch.cat(rows) for rows in zip(*(part.image for part in parts), strict=True)],
        text=[torch.cat(rows) for rows in zip(*(part.text for part in parts), strict=True)],
        text_index=distinct.index,
        text_id=distinct.id,
        object_scene=batch.object_scene,
        relation_scene=batch.relation_scene,
        teacher_image=teachers([part.teacher_image for part in parts]),
        teacher_object_text=teachers([part.teacher_object_text for part in parts]),
        teacher_relation_text=teachers([part.teacher_relation_text for part in parts]),
    )


def _averaging(wrapped: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not wanted else nullcontext()
