"""Log-sums over the texts of all ranks, exchanged chunk by chunk.

The next chunk of texts is gathered while the rows are compared with this one, and in the backward pass the gradients of
a chunk are reduce-scattered to their owners while those of the next are computed. So the gradients of at most two
chunks exist at a time. The gathered texts, in the features' dtype, are kept for the backward pass: gathering them again
would add half of the backward pass's bytes where the network is the limit, and they take less than half of what the
float32 gradients of all texts would.

Each chunk goes through the ops of op.py. They require a text for each row, so a row whose text is in another chunk is
given one of this chunk's, with a gradient of 0 for its logit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scenarioclip_fast.devices import to_device
from scenarioclip_fast.kernels.contrastive import reference
from scenarioclip_fast.ops import collectives
from scenarioclip_fast.ops.contrastive.levels import PreparedLevel, arange
from scenarioclip_fast.ops.contrastive.op import contrastive_backward, contrastive_forward
from scenarioclip_fast.ops.untraced import untraced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Texts of all ranks per exchange. Its transfer and its compute both grow with its texts, so their ratio depends on a
# rank's N rows only. On an H100 with bfloat16 features, 650 TFLOP/s in products (kernels/contrastive/README.md) and
# 400 Gb/s = 50 GB/s of network:
#   forward   2 D bytes and 2 N D operations a text: the transfer is hidden from N = 650e12 / 50e9 = 13,000 rows on;
#   backward  4 D bytes and 6 N D operations a text: from N = 650e12 * 4 / (6 * 50e9) = 8,667 rows on.
# With fewer rows (128 scenes have up to 700 in a level) the network is the limit whatever the chunk: at D = 512, 65,536
# texts take 1.3 ms to gather, 2.7 ms to reduce-scatter, and 0.3 ms of products at N = 700. So a chunk must be long
# enough to spend little time on latency (a ring over 64 machines at an assumed 10 us a hop: 0.6 ms) and on launches,
# and otherwise small: its float32 gradients are 128 MiB, of which there are two. The kernels are efficient from 16,384
# texts on: a block of their backward pass is 8,448 wide.
CHUNK = 65536


@dataclass(frozen=True, slots=True)
class Chunk:
    """Texts `own` of each rank, as far as it has them."""

    columns: slice  # of the level
    own: slice  # of this rank's texts
    padded: int  # rows that each rank sends
    is_full: bool  # every rank has as many texts in it as it sends rows


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """The order of a level's columns: chunk by chunk, and in a chunk rank by rank."""

    chunks: list[Chunk]
    column: Tensor  # [V] int64: the column of each text, texts ordered by rank
    row: Tensor  # [V] int64: where each column's text is in its gathered chunk

    @staticmethod
    @untraced
    def of(kept: list[int], chunk: int, rank: int, device: torch.device) -> ChunkLayout:
        """Divide `kept[r]` texts of each rank r into chunks with an equal slice of every rank's texts."""
        texts = torch.tensor(kept)
        step = max(chunk // len(kept), 1)
        first = torch.arange(0, max(kept), step)  # [chunks]
        sizes = (texts - first[:, None]).clamp(0, step)  # [chunks, ranks]
        padded, totals = sizes.amax(1), sizes.sum(1)
        stops = totals.cumsum(0)
        chunks = [
            Chunk(
                columns=slice(stop - total, stop),
                own=slice(min(start, kept[rank]), min(start + step, kept[rank])),
                padded=rows,
                is_full=total == rows * len(kept),
            )
            for start, rows, total, stop in zip(*(t.tolist() for t in (first, padded, totals, stops)), strict=True)
        ]
        # The first column of a rank in a chunk, and the number of the rank's first text.
        starts = to_device((stops - totals)[:, None] + sizes.cumsum(1) - sizes, device)
        texts, padded, before = (to_device(t, device) for t in (texts, padded, texts.cumsum(0) - texts))
        ranks = torch.repeat_interleave(arange(texts), texts, output_size=sum(kept))
        number = torch.arange(sum(kept), device=device) - before[ranks]
        of_chunk, within = number // step, number % step
        column = starts[of_chunk, ranks] + within
        row = torch.empty_like(column).scatter_(0, column, ranks * padded[of_chunk] + within)
        return ChunkLayout(chunks, column, row)


@dataclass(frozen=True, slots=True)
class _Call:
    """What all chunks of a call share besides features and scales, by level."""

    layouts: list[ChunkLayout]
    indices: list[Tensor]  # each [N] int64
    weights: list[Tensor | None]  # each [V]
    normalize: bool
    backend: str
    group: ProcessGroup
    has_backward: bool

    def chunks(self) -> list[tuple[int, Chunk]]:  # with the level of each
        return [(k, chunk) for k, layout in enumerate(self.layouts) for chunk in layout.chunks]

    def row(self, k: int, chunk: Chunk) -> Tensor:  # [texts of the chunk]
        return self.layouts[k].row[chunk.columns]

    def weight(self, k: int, chunk: Chunk) -> Tensor | None:  # [texts of the chunk]
        weight = self.weights[k]
        return None if weight is None else weight[chunk.columns]

    def index(self, k: int, chunk: Chunk) -> tuple[Tensor, Tensor]:  # [N] int64 into the chunk, [N] bool
        """The text of each row, and whether it is in the chunk; others get any, evenly, as a text's rows are a loop."""
        index, start, stop = self.indices[k], chunk.columns.start, chunk.columns.stop
        inside = (index >= start) & (index < stop)
        return torch.where(inside, index - start, arange(index) % (stop - start)), inside


# Dynamo does not trace asynchronous collectives. The exchange of sizes breaks the graph of calls with a group anyway.
@untraced
def chunked_log_sums(
    levels: list[PreparedLevel],  # with layouts, and this rank's texts
    backend: str,
    normalize: bool,
    group: ProcessGroup,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return row log-sums over all texts, column log-sums over this rank's rows, and positive logits of each level."""
    call = _Call(
        layouts=[level.layout for level in levels if level.layout is not None],
        indices=[level.text_index for level in levels if level.text_index is not None],
        weights=[level.weight for level in levels],
        normalize=normalize,
        backend=backend,
        group=group,
        has_backward=torch.is_grad_enabled(),
    )
    scale = torch.stack([level.scale for level in levels])
    out = _ChunkedLogSums.apply(call, scale, *[v.image for v in levels], *[v.text for v in levels])
    n = len(levels)
    return list(out[:n]), list(out[n : 2 * n]), list(out[2 * n :])


def _gathered(call: _Call, text: tuple[Tensor, ...]) -> Iterator[Tensor]:  # [texts of the chunk, D] each
    """Gather chunk after chunk, each while the caller works on the one before."""
    chunks = call.chunks()

    def start(k: int, chunk: Chunk) -> collectives.InFlight:
        return collectives.start_gather(text[k][chunk.own], chunk.padded, call.group)

    following = start(*chunks[0])
    for i, (k, chunk) in enumerate(chunks):
        this = following
        if i + 1 < len(chunks):
            following = start(*chunks[i + 1])
        rows = this.wait()
        yield rows if chunk.is_full else rows.index_select(0, call.row(k, chunk))


class _TextGradients:
    """The gradients of this rank's texts; those of one chunk are on their way to their owners."""

    def __init__(self, call: _Call, own: list[Tensor]) -> None:
        self.own = own  # each [this rank's texts, D]; written here
        self.call = call
        self.sent: tuple[Tensor, collectives.InFlight] | None = None

    def send(self, k: int, chunk: Chunk, grad: Tensor) -> None:  # [texts of the chunk, D]
        self.receive()  # before more memory is taken
        # Sum over ranks in float32: low-precision partial sums lose one bit per doubling of the ranks.
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if not chunk.is_full:
            padded = wide.new_zeros(chunk.padded * self.call.group.size(), grad.shape[1])
            wide = padded.index_copy_(0, self.call.row(k, chunk), wide)
        self.sent = self.own[k][chunk.own], collectives.start_reduce_scatter(wide, self.call.group)

    def receive(self) -> None:
        if self.sent is not None:
            own, in_flight = self.sent
            own.copy_(in_flight.wait()[: len(own)])
            self.sent = None


class _ChunkedLogSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, scale: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        levels = len(call.layouts)
        image, text = features[:levels], features[levels:]
        dtype = reference.sums_dtype(scale.device)
        rows = [scale.new_full((len(x),), -torch.inf, dtype=dtype) for x in image]
        columns = [scale.new_empty(len(layout.column), dtype=dtype) for layout in call.layouts]
        positives = [scale.new_zeros(len(x), dtype=dtype) for x in image]
        saved: list[Tensor] = []
        for (k, chunk), gathered in zip(call.chunks(), _gathered(call, text), strict=True):
            index, inside = call.index(k, chunk)
            row, column, positive, inverse, kept = contrastive_forward(
                [image[k]],
                [gathered],
                scale[k : k + 1],
                index,
                call.weight(k, chunk),
                call.normalize,
                0,  # exponentials of many texts would not fit into a budget
                call.backend,
            )
            rows[k] = torch.logaddexp(rows[k], row)
            columns[k][chunk.columns] = column
            positives[k] = torch.where(inside, positive, positives[k])
            if call.has_backward:
                saved += [gathered, positive, inverse, kept]
        if call.has_backward:
            ctx.save_for_backward(scale, *image, *rows, *columns, *saved)
            ctx.call, ctx.text = call, [t.shape for t in text]
        return *rows, *columns, *positives

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        call: _Call = ctx.call
        levels = len(call.layouts)
        scale, *rest = ctx.saved_tensors
        image, rows, columns = (rest[k * levels : (k + 1) * levels] for k in range(3))
        by_chunk = rest[3 * levels :]
        grad_row, grad_column, grad_positive = (grads[k * levels : (k + 1) * levels] for k in range(3))
        needed = ctx.needs_input_grad[2:]
        need_image, need_text = any(needed[:levels]), any(needed[levels:])
        d_scale = torch.zeros_like(scale)
        d_image = [torch.zeros_like(x, dtype=reference.compute_dtype(x.dtype)) for x in image] if need_image else []
        texts = _TextGradients(call, [image[k].new_empty(ctx.text[k]) for k in range(levels)]) if need_text else None

        def gradients(k: int, chunk: Chunk, gathered: Tensor, positive: Tensor, *saved: Tensor) -> Tensor:
            """Add the gradients of images and scale, and return those of the texts."""
            index, inside = call.index(k, chunk)
            dx, dy, ds = contrastive_backward(
                [image[k]],
                [gathered],
                scale[k : k + 1],
                index,
                call.weight(k, chunk),
                rows[k],
                columns[k][chunk.columns],
                positive,
                *saved,
                grad_row[k].contiguous(),
                grad_column[k][chunk.columns].contiguous(),
                grad_positive[k].masked_fill(inside.logical_not(), 0),
                call.normalize,
                need_image,
                need_text,
                call.backend,
            )
            d_scale[k] += ds[0]
            if need_image:
                d_image[k] += dx[0]
            return dy[0]

        for i, (k, chunk) in enumerate(call.chunks()):
            if texts is None:
                gradients(k, chunk, *by_chunk[4 * i : 4 * i + 4])
            else:
                # Not held in a variable, which would outlive the call.
                texts.send(k, chunk, gradients(k, chunk, *by_chunk[4 * i : 4 * i + 4]))
        if texts is not None:
            texts.receive()
        nothing = [None] * levels
        return (
            None,
            d_scale,
            *([d.to(x.dtype) for d, x in zip(d_image, image, strict=True)] if need_image else nothing),
            *(nothing if texts is None else texts.own),
        )
