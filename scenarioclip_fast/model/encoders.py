"""CLIP's vision and text transformers, of any width and depth.

The architecture is CLIP's (arXiv 2103.00020): pre-norm blocks, quick-GELU, images pooled at the class token and texts
at their end-of-text token; then ScenarioCLIP's projection (Linear with bias, LayerNorm). Three optimisations do not
change the result: query, key and value are one product; the last block computes only the pooled token, besides keys
and values; and texts of different lengths are packed without padding, since a causal model never attends past the
end-of-text token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scenarioclip_fast.model.config import TextConfig, VisionConfig
from scenarioclip_fast.model.layers import AddLayerNorm, LayerNorm, Linear, autocast_dtype
from scenarioclip_fast.ops import quick_gelu, short_attention
from scenarioclip_fast.ops.attention import attention, attention_backend


@dataclass(frozen=True)
class Packing:
    """The layout of n texts with T tokens in total: packed into T rows, and padded to an [n, longest] grid.

    slot [T]: each row's cell in the grid;  cell [n * longest]: each cell's row, for padding that of the last token
    position [T]: each row's place in its text;  last [n]: the row of each text's end-of-text token
    starts [n + 1]: the first row of each text, then T
    """

    slot: Tensor  # [T]
    cell: Tensor  # [n * longest]
    position: Tensor  # [T]
    last: Tensor  # [n]
    starts: Tensor  # [n + 1]
    longest: int

    @classmethod
    def of_lengths(cls, lengths: NDArray[np.int64], device: torch.device) -> Packing:
        """Pack texts of these lengths [n]: computed on the host, copied in one transfer."""
        return cls.with_rows(lengths, device)[0]

    @classmethod
    def with_rows(
        cls, lengths: NDArray[np.int64], device: torch.device, rows: NDArray[np.int64] | None = None
    ) -> tuple[Packing, Tensor]:
        """Pack texts; also copy `rows` [T], one number of each row, to the device; default: the row's own number."""
        longest = int(lengths.max()) if len(lengths) else 0
        end = np.cumsum(lengths)
        text = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(len(text)) - (end - lengths)[text]
        cell = (end - lengths)[:, None] + np.minimum(np.arange(longest), lengths[:, None] - 1)
        rows = np.arange(len(text)) if rows is None else rows
        parts = [text * longest + position, cell.ravel(), position, end - 1, np.concatenate([[0], end]), rows]
        whole = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        if device.type == "cuda":
            whole = whole.pin_memory()
        on_device = whole.to(device, non_blocking=True)
        slot, cells, positions, last, first, copied = on_device.split([len(part) for part in parts])
        return cls(slot, cells, positions, last, first, longest), copied


class _ToGrid(torch.autograd.Function):
    """Rows [T, *] to cells [n * longest, *]; a cell of padding gets the row of the text's last token.

    No gradient flows back from padding: causal attention does not let a text's tokens see it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slot: Tensor, cell: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return rows.index_select(0, cell)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slot,) = ctx.saved_tensors
        return grad.index_select(0, slot), None, None


class Attention(nn.Module):
    """Multi-head self-attention: bidirectional over dense rows, causal over packed texts."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, packing: Packing | None, pooled: bool) -> Tensor:  # [n, L, W] or [T, W]
        """The attention's output, which lacks the bias of `out`: for every token, or the pooled ones only: [n, W]."""
        if packing is not None:
            return self._packed(x, packing, pooled)
        n, length, width = x.shape
        if pooled:
            # The query of the class token only; keys and values of all tokens.
            query, pair = self.qkv.parts([x[:, 0], x], [width, 2 * width])
            shape = (self.heads, width // self.heads)
            y = attention(query.view(n, 1, 1, *shape), pair.view(n, length, 2, *shape))
            return self.out.product(y.reshape(n, width))
        qkv = self.qkv(x).view(n * length, 3 * width)
        backend = attention_backend(qkv, self.heads, length)
        return self.out.product(short_attention(qkv, self.heads, length=length, backend=backend).view(n, length, width))

    def _packed(self, x: Tensor, packing: Packing, pooled: bool) -> Tensor:  # [T, W]
        qkv = self.qkv(x)
        backend = attention_backend(qkv, self.heads, packing.longest)
        if backend == "reference":
            return self.out.product(self._on_grid(qkv, packing, pooled))
        y = short_attention(
            qkv, self.heads, starts=packing.starts, longest=packing.longest, causal=True, backend=backend
        )
        return self.out.product(y.index_select(0, packing.last) if pooled else y)

    def _on_grid(self, qkv: Tensor, packing: Packing, pooled: bool) -> Tensor:  # [T, 3 W]
        n, longest, width = packing.last.shape[0], packing.longest, qkv.shape[1] // 3
        grid = cast(Tensor, _ToGrid.apply(qkv, packing.slot, packing.cell))
        rows = grid.view(n, longest, 3, self.heads, width // self.heads)
        # Padding follows a text's tokens, so causal attention ignores it. Products with weights have no padding; the
        # two products here are 0.2 % of a block's FLOPs, with 1.1 to 1.6 cells per token for texts of 3 to 9 tokens.
        y = attention(rows, is_causal=True).transpose(1, 2).reshape(n * longest, width)
        return y.index_select(0, packing.slot[packing.last] if pooled else packing.slot)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionConfig | TextConfig) -> None:
        super().__init__()
        width = config.width
        self.norm_1 = AddLayerNorm(width)
        self.attention = Attention(width, config.heads)
        self.norm_2 = AddLayerNorm(width)
        self.expand = Linear(width, 4 * width)
        self.contract = Linear(4 * width, width)
        self.quick = config.activation == "quick_gelu"
        # CLIP's initialisation: the variance of the residual sum does not grow with depth.
        depth_scale = (2 * config.layers) ** -0.5
        for linear, std in (
            (self.attention.qkv, width**-0.5),
            (self.attention.out, width**-0.5 * depth_scale),
            (self.expand, (2 * width) ** -0.5),
            (self.contract, width**-0.5 * depth_scale),
        ):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, branch: Tensor | None = None, packing: Packing | None = None, pooled: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Run the block on dense rows [n, L, W] or packed rows [T, W].

        Args:
            x: the residual stream.
            branch: the previous block's output, still to be added to x, so that one kernel adds and normalises.
            pooled: output only the pooled tokens, [n, W].

        Returns:
            The residual stream, and the output of this block that is still to be added to it.
        """
        x, y = self.norm_1(x, branch)
        y = self.attention(y, packing, pooled)
        if pooled:
            x = x[:, 0] if packing is None else x.index_select(0, packing.last)
        # What reads a product next adds its bias, so that the gradients of biases take no passes of their own. That of
        # `contract` stays in its product: another stage reads it, and with FSDP a stage has only its own weights.
        x, y = self.norm_2(x, y, self.attention.out.bias)
        y = quick_gelu(self.expand.product(y), self.expand.bias) if self.quick else F.gelu(self.expand(y))
        return x, self.contract(y)


class VisionBlock(Block):
    """A block with its own `forward`, because Dynamo limits the number of compiled versions per function."""

    def forward(
        self, x: Tensor, branch: Tensor | None = None, packing: Packing | None = None, pooled: bool = False
    ) -> tuple[Tensor, Tensor]:
        return super().forward(x, branch, packing, pooled)


class TextBlock(Block):
    """Like VisionBlock, for texts."""

    def forward(
        self, x: Tensor, branch: Tensor | None = None, packing: Packing | None = None, pooled: bool = False
    ) -> tuple[Tensor, Tensor]:
        return super().forward(x, branch, packing, pooled)


class Head(nn.Module):
    """LayerNorm of the pooled token, Linear with bias, LayerNorm."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.norm = AddLayerNorm(width)
        self.projection = Linear(width, embed_dim)
        self.out_norm = LayerNorm(embed_dim)

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor:  # [n, W], [n, W]
        """Embed the pooled tokens x + branch: [n, D], in at least float32."""
        _, y = self.norm(x, branch)
        y = self.projection(y)
        return self.out_norm(y, torch.promote_types(y.dtype, torch.float32))


class LinearStem(nn.Module):
    """CLIP's patch embedding: a linear projection of raw patches, without bias."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(width, 3 * patch_size**2))
        nn.init.normal_(self.weight, std=(3 * patch_size**2) ** -0.5)

    def forward(self, pixels: Tensor) -> Tensor:  # [n, 3, S, S]
        n, p, side = pixels.shape[0], self.patch_size, pixels.shape[-1] // self.patch_size
        patches = pixels.view(n, 3, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(n, side * side, 3 * p * p)
        return F.linear(patches, self.weight)


def _conv(before: int, after: int) -> nn.Conv2d:
    conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class ConvStem(nn.Module):
    """Strided 3 x 3 convolutions, channels doubling to `width` as the side halves, then a 1 x 1 convolution.

    GroupNorm normalises each view as a whole, so that a view's embedding does not depend on its batch.
    """

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        halvings = patch_size.bit_length() - 1
        channels = [3, *(width >> i for i in reversed(range(halvings)))]
        self.convs = nn.ModuleList(_conv(before, after) for before, after in itertools.pairwise(channels))
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in channels[1:])
        self.out = Linear(width, width)

    def forward(self, pixels: Tensor) -> Tensor:  # [n, 3, S, S]
        x = pixels.to(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = quick_gelu(norm(conv(x)))
        return self.out(x.flatten(2).transpose(1, 2))


class VisionEmbedding(nn.Module):
    """Map pixels to tokens: the class token, then the patches in row-major order, plus positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.stem = (ConvStem if config.stem == "conv" else LinearStem)(config.patch_size, config.width)
        self.class_token = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.position = nn.Parameter(torch.randn(config.tokens, config.width) * config.width**-0.5)

    def forward(self, pixels: Tensor) -> Tensor:  # [n, 3, S, S]
        if pixels.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"pixels: got shape {list(pixels.shape)}, expected [n, 3, {self.image_size}, {self.image_size}]"
            )
        if not pixels.is_floating_point():
            raise TypeError(f"pixels: got {pixels.dtype}, expected normalised floats, as preprocess returns them")
        patches = self.stem(pixels)
        class_token = self.class_token.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return torch.cat([class_token, patches], 1) + self.position.to(patches.dtype)


class TextEmbedding(nn.Module):
    """Map packed token ids to vectors, plus positions."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.randn(config.context_length, config.width) * 0.01)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens: Tensor, packing: Packing) -> Tensor:  # [T]
        x = self.token(tokens) + self.position[packing.position]
        return x.to(autocast_dtype(x.device.type) or x.dtype)


class Encoder(nn.Module):
    """Base of both encoders: a sequence of stages; any contiguous range of them can be run.

    `stages`: the embedding, the vision encoder's layernorm before block 0, the blocks, and the head.
    `first`: the number of stages before the blocks.
    """

    first: int
    blocks: nn.ModuleList
    head: Head

    def __init__(self, config: VisionConfig | TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        block = VisionBlock if isinstance(config, VisionConfig) else TextBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.layers))
        self.head = Head(config.width, embed_dim)
        self.checkpointing = False
        nn.init.normal_(self.head.projection.weight, std=config.width**-0.5)
        nn.init.zeros_(self.head.projection.bias)

    @property
    def stages(self) -> list[nn.Module]:
        raise NotImplementedError

    def run(self, x: Tensor, packing: Packing | None = None, *, start: int = 0, stop: int | None = None) -> Tensor:
        """Run stages `start` to `stop` (exclusive); the last block outputs only the pooled tokens."""
        return self.run_stages(x, packing, start=start, stop=stop)

    def run_stages(
        self, x: Tensor, packing: Packing | None = None, *, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """`run` itself, which subclasses may replace by a replay of what this launches."""
        stages = self.stages
        checkpointing = self.checkpointing and torch.is_grad_enabled()
        branch: Tensor | None = None
        for i in range(start, len(stages) if stop is None else stop):
            stage = stages[i]
            if isinstance(stage, Block):
                pooled = i == len(stages) - 2
                if checkpointing:
                    x, branch = checkpoint(stage, x, branch, packing, pooled, use_reentrant=False)
                else:
                    x, branch = stage(x, branch, packing, pooled)
            elif isinstance(stage, Head):
                x, branch = stage(x, branch), None
            elif i == 0 and packing is not None:
                x = stage(x, packing)
            else:
                x = stage(x)
        return x if branch is None else x + branch


class VisionEncoder(Encoder):
    """Pixels [n, 3, S, S] to embeddings [n, D].

    `replay`: runs stages in training steps, such as `graphs.StageGraphs`; None: they are launched one by one.
    """

    first = 2
    replay: Callable[[Tensor, int, int | None], Tensor] | None = None

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__(config, embed_dim)
        self.embedding = VisionEmbedding(config)
        self.pre_norm = LayerNorm(config.width)

    @property
    def stages(self) -> list[nn.Module]:
        return [self.embedding, self.pre_norm, *self.blocks, self.head]

    def run(self, x: Tensor, packing: Packing | None = None, *, start: int = 0, stop: int | None = None) -> Tensor:
        """Run stages `start` to `stop`, like `Encoder.run`."""
        if self.replay is not None and self.training and len(x) and not x.requires_grad:
            return self.replay(x, start, stop)
        return self.run_stages(x, packing, start=start, stop=stop)

    def forward(self, pixels: Tensor) -> Tensor:  # [n, 3, S, S]
        return self.run(pixels)


class TextEncoder(Encoder):
    """Packed token ids [T] to embeddings [n, D]."""

    first = 1

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__(config, embed_dim)
        self.embedding = TextEmbedding(config)

    @property
    def stages(self) -> list[nn.Module]:
        return [self.embedding, *self.blocks, self.head]

    def forward(self, tokens: Tensor, packing: Packing) -> Tensor:  # [T]
        return self.run(tokens, packing)
