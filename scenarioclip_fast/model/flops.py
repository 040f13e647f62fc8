"""FLOPs that a training step requires, and a GPU's peak rate, for model FLOPs utilisation (MFU).

Matrix products are counted, at two FLOPs per multiply-add. Frozen stages run once per view, and not at all for texts,
whose frozen features are cached. The backward pass of a product costs one more product for the gradient of its input
and one for that of its weight, where each is needed. Recomputation (checkpointing, fused attention) is not counted.
Runs with FP8 products are compared with the bf16 peak, too: half of the FP8 peak on an H100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scenarioclip_fast.model.config import ModelConfig, TextConfig, VisionConfig

if TYPE_CHECKING:
    from scenarioclip_fast.data import Batch
    from scenarioclip_fast.model.tokens import TokenTable

# Dense FLOP/s from NVIDIA's data sheets; names as reported by the driver.
_PEAKS = {
    "H100 80GB HBM3": {"bf16": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
    "H200": {"bf16": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
    "A100": {"bf16": 312.0e12, "tf32": 156.0e12, "float32": 19.5e12},
}
PRECISIONS = ("bf16", "tf32", "float32")


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the peak rate of dense matrix products in FLOP/s; None for an unlisted device.

    Args:
        device_name: as `torch.cuda.get_device_name()` returns it.
        precision: "bf16", "tf32" or "float32", as in `run.precision`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}")
    return next((peaks[precision] for name, peaks in _PEAKS.items() if name in device_name), None)


def batch_flops(config: ModelConfig, batch: Batch, table: TokenTable, *, teacher: bool) -> float:
    """Return `step_flops` of a batch whose ids refer to the strings in `table`."""
    lengths = [level_lengths.tolist() for level_lengths in table.unique_texts(batch.host_ids).lengths]
    views = [len(ids) for ids in batch.host_ids]
    return step_flops(config, views, lengths, teacher=teacher, without_action=batch.num_scenes - views[0])


def step_flops(
    config: ModelConfig,
    views: Sequence[int],
    text_lengths: Sequence[Sequence[int]],
    *,
    teacher: bool,
    without_action: int = 0,
) -> float:
    """Count the FLOPs of one step: forward, backward and contrastive logits, not optimizer or elementwise operations.

    Args:
        views: number of global, object and relation views; the teacher embeds the global ones.
        text_lengths: per level, the number of tokens of each unique text.
        teacher: whether an EMA teacher embeds whole images, object texts and relation texts.
        without_action: global views that only the frozen stages and the teacher embed.
    """
    freeze, width = config.freeze, config.embed_dim
    stages = _vision_stages(config)
    frozen = [freeze.embeddings, freeze.pre_layernorm, *_frozen_blocks(config.vision.layers, freeze.vision_blocks)]
    total = sum(views) * _trained(stages, frozen)
    if teacher:
        total += (views[0] + without_action) * _forward(stages, frozen)
    total += without_action * sum(stage.forward for stage in stages[: frozen.index(False)])
    frozen = [freeze.embeddings, *_frozen_blocks(config.text.layers, freeze.text_blocks)]
    for level, (rows, lengths) in enumerate(zip(views, text_lengths, strict=True)):
        stages = _text_stages(config, lengths)
        cached = sum(stage.forward for stage in stages[: frozen.index(False)])
        total += _trained(stages, frozen) - cached
        if teacher and level > 0:
            total += _forward(stages, frozen)
        total += 3 * 2 * rows * len(lengths) * width
    return total


@dataclass(frozen=True)
class _Stage:
    """FLOPs of one stage's forward pass."""

    weights: float = 0.0  # products with weights
    from_input: float = 0.0  # those that multiply pixels, which need no gradient
    attention: float = 0.0  # products of activations with each other

    @property
    def forward(self) -> float:
        return self.weights + self.attention


def _trained(stages: Sequence[_Stage], frozen: Sequence[bool]) -> float:
    """Forward and backward passes."""
    total, reached = 0.0, False
    for stage, is_frozen in zip(stages, frozen, strict=True):
        total += stage.forward
        if not is_frozen:
            # Norms and positions precede a stage's products, so a trained stage needs both gradients.
            reached = True
            total += stage.weights
        if reached:
            total += stage.weights - stage.from_input + 2 * stage.attention
    return total


def _forward(stages: Sequence[_Stage], frozen: Sequence[bool]) -> float:
    """The teacher's forward pass, without the frozen stages that it shares with the student."""
    return sum(stage.forward for stage in stages[frozen.index(False) :])


def _frozen_blocks(layers: int, blocks: int) -> list[bool]:
    return [*(i < blocks for i in range(layers)), False]


def _vision_stages(config: ModelConfig) -> list[_Stage]:
    """The stages of one view: embedding, layernorm, blocks, head."""
    part = config.vision
    n = part.tokens
    blocks = _blocks(part, rows=1, tokens=n, pairs=n * n, read=n)
    return [_stem(part), _Stage(), *blocks, _Stage(2 * part.width * config.embed_dim)]


def _text_stages(config: ModelConfig, lengths: Sequence[int]) -> list[_Stage]:
    """The stages of all texts: embedding, blocks, head. Attention is causal."""
    part = config.text
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    blocks = _blocks(part, rows=len(lengths), tokens=sum(lengths), pairs=pairs, read=sum(lengths))
    return [_Stage(), *blocks, _Stage(len(lengths) * 2 * part.width * config.embed_dim)]


def _blocks(part: VisionConfig | TextConfig, rows: int, tokens: int, pairs: int, read: int) -> list[_Stage]:
    """The blocks' stages. `pairs`: attended pairs of tokens; `read`: those whose query is a pooled token.

    The last block computes keys and values of all tokens, and everything else for the pooled token only.
    """
    square = part.width**2
    # Per token: 8 W^2 for query, key, value and out, 16 W^2 for the MLP. Per pair: 4 W for score and weighted value.
    full = _Stage(24 * square * tokens, attention=4 * part.width * pairs)
    last = _Stage(4 * square * tokens + 20 * square * rows, attention=4 * part.width * read)
    return [full] * (part.layers - 1) + [last]


def _stem(part: VisionConfig) -> _Stage:
    patches = part.tokens - 1
    if part.stem == "linear":
        weights = patches * 2 * 3 * part.patch_size**2 * part.width
        return _Stage(weights, from_input=weights)
    # 3 x 3 convolutions that halve the side and double the channels up to the width, then a 1 x 1 convolution.
    halvings = part.patch_size.bit_length() - 1
    channels = [3, *(part.width >> i for i in reversed(range(halvings)))]
    sides = [part.image_size >> i for i in range(1, halvings + 1)]
    convs = [2 * 9 * a * b * side**2 for a, b, side in zip(channels, channels[1:], sides, strict=False)]
    return _Stage(sum(convs) + patches * 2 * part.width**2, from_input=convs[0])
