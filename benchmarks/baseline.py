"""The baseline: one training step as the method's published code does it, written plainly from its description.

Six whole encoders and a whole EMA teacher. Every view and every text passes its level's encoder from the first layer
to the last, texts padded to the longest of their level in the batch; the trained layernorm in front of block 0 sends
a backward pass through the frozen blocks; each contrastive term is `logits` and `logits.T`; distillation is a Python
loop with one KLDivLoss call a pair; the teacher is averaged parameter by parameter.

It is the yardstick of tests and benchmarks, so it is no straw man: attention is torch's fused one, as transformers
calls it; AdamW and the clipping of gradients are torch's defaults; token ids are given, while the published step
tokenises strings. Of the package it uses the config alone.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scenarioclip_fast.model.config import FreezeConfig, ModelConfig, TextConfig, VisionConfig

LEVELS = ("global", "object", "relation")
TEMPERATURE = 0.07
Tokens = Sequence[Sequence[int]]  # one list of ids a text, start and end included


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, causal: bool) -> Tensor:  # [n, L, W]
        n, length, width = x.shape
        q, k, v = (p(x).view(n, length, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    def __init__(self, config: VisionConfig | TextConfig) -> None:
        super().__init__()
        width = config.width
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, config.heads)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:  # [n, L, W]
        x = x + self.attention(self.norm_1(x), causal)
        h = self.expand(self.norm_2(x))
        return x + self.contract(h * torch.sigmoid(1.702 * h))


class Head(nn.Module):
    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.norm, self.out_norm = nn.LayerNorm(width), nn.LayerNorm(embed_dim)
        self.projection = nn.Linear(width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:  # [n, W]
        return self.out_norm(self.projection(self.norm(x)))


class ConvStem(nn.Module):
    """The stem of the preset "tiny": the published code has none but CLIP's patches."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        halvings = patch_size.bit_length() - 1
        channels = [3, *(width >> i for i in reversed(range(halvings)))]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(channels))
        self.norms = nn.ModuleList(nn.GroupNorm(1, c) for c in channels[1:])
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:  # [n, 3, S, S]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = norm(conv(x))
            x = h * torch.sigmoid(1.702 * h)
        return self.out(x)


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        self.stem = ConvStem(patch, width) if config.stem == "conv" else nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.zeros(config.tokens, width))
        self.pre_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(width, embed_dim)

    def forward(self, pixels: Tensor) -> Tensor:  # [n, 3, S, S]
        patches = self.stem(pixels).flatten(2).transpose(1, 2)
        first = self.class_token.to(patches.dtype).expand(len(patches), 1, -1)
        x = self.pre_norm(torch.cat([first, patches], 1) + self.position)
        for block in self.blocks:
            x = block(x, causal=False)
        return self.head(x[:, 0])

    def freeze(self, config: FreezeConfig) -> None:
        for part in (self.stem, self.class_token, self.position):
            part.requires_grad_(not config.embeddings)
        self.pre_norm.requires_grad_(not config.pre_layernorm)
        self.blocks[: config.vision_blocks].requires_grad_(False)


class TextEncoder(nn.Module):
    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.end = config.end_of_text
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.zeros(config.context_length, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config.width, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:  # [n, L], padded with end-of-text
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        last = (tokens == self.end).int().argmax(1)
        return self.head(x[torch.arange(len(x), device=x.device), last])

    def freeze(self, config: FreezeConfig) -> None:
        for part in (self.token, self.position):
            part.requires_grad_(not config.embeddings)
        self.blocks[: config.text_blocks].requires_grad_(False)


class SixEncoders(nn.Module):
    """A vision and a text encoder for each level, nothing shared."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = nn.ModuleDict({level: VisionEncoder(config.vision, config.embed_dim) for level in LEVELS})
        self.text = nn.ModuleDict({level: TextEncoder(config.text, config.embed_dim) for level in LEVELS})
        for encoder in (*self.vision.values(), *self.text.values()):
            encoder.freeze(config.freeze)

    @torch.no_grad()
    def copy_weights_of(self, model: nn.Module) -> None:
        """Takes over the weights of a ScenarioCLIP of this config, where query, key and value are one matrix."""
        theirs = dict(model.named_parameters(remove_duplicate=False))
        for name, mine in self.named_parameters():
            kind, level, rest = name.split(".", 2)
            module, _, leaf = rest.rpartition(".")
            if module.endswith((".q", ".k", ".v")):
                value = theirs[f"{kind}.{level}.{module[:-1]}qkv.{leaf}"].chunk(3)["qkv".index(module[-1])]
            else:
                first = rest.partition(".")[0]
                embedding = "embedding." if first in ("stem", "class_token", "position", "token") else ""
                value = theirs[f"{kind}.{level}.{embedding}{rest}"]
            mine.copy_(value.view_as(mine))


def padded(tokens: Tokens, config: TextConfig, device: torch.device) -> Tensor:
    """[n, L] ids, L the longest of these texts; cut to the context, end-of-text last."""
    end = config.end_of_text
    rows = [[*ids[: config.context_length - 1], end] for ids in tokens]
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [end] * (longest - len(row)) for row in rows], device=device)


def contrastive(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:  # [N, D], [N, D], []
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = logit_scale.exp().clamp(max=100) * image @ text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def target(teacher: Tensor) -> Tensor:  # [D]
    return F.softmax(teacher / TEMPERATURE, dim=-1).clamp(1e-8, 1)


def distillation(
    image: dict[str, Tensor],  # level -> [N, D]
    global_text: Tensor,  # [B, D]
    teacher_image: Tensor,  # [B, D]
    teacher_text: dict[str, Tensor],  # level -> [N, D]
    counts: dict[str, list[int]],  # level -> items of each scene, whose rows follow one another
    logit_scale: Tensor,  # [] ln(1 / T_s): takes a gradient, which the published optimiser is not given
) -> Tensor:
    """The four terms, scene by scene and pair by pair. A scene without items adds 0 (published: divides by 0).

    A pair is one KLDivLoss of 1-D rows, whose mean over the "batch" divides by D.
    """
    divergence = nn.KLDivLoss(reduction="batchmean")
    scenes = len(teacher_image)
    total = global_text.new_zeros((), dtype=torch.float32)
    for level in LEVELS[1:]:
        for i, n in enumerate(counts[level]):
            if n == 0:
                continue
            first = sum(counts[level][:i])
            students, teachers = image[level][first : first + n], teacher_text[level][first : first + n]
            temperature = 1 / logit_scale.exp().clamp(1, 100)
            p, vision = target(teacher_image[i]), 0
            for k in range(n):
                log_q = F.log_softmax(students[k] / temperature, dim=-1)
                vision = vision + divergence(log_q, p) * temperature**2
            log_q, words = F.log_softmax(global_text[i] / temperature, dim=-1), 0
            for k in range(n):
                words = words + divergence(log_q, target(teachers[k])) * temperature**2
            total = total + (vision + words) / n / scenes
    return total


class BaselineStep:
    """Model, teacher, optimiser and one step.

    Args:
        weights: a ScenarioCLIP of that config to start from.
        tokens: level -> token ids of every text of the vocabulary.
        bf16: autocast; the published run is float32 with TF32 products.
    """

    def __init__(
        self, config: ModelConfig, weights: nn.Module, tokens: dict[str, Tokens], device: str, bf16: bool = False
    ) -> None:
        with torch.device("meta"):  # all of its weights are copied: drawing others first would take seconds
            self.model = SixEncoders(config)
        self.model.to_empty(device=device).train()
        self.model.copy_weights_of(weights)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.tokens, self.device, self.bf16, self.steps = tokens, torch.device(device), bf16, 0
        start = torch.tensor(1 / TEMPERATURE, device=device).log()
        self.distillation_scale = nn.Parameter(start.clone())
        self.logit_scale = {level: nn.Parameter(start.clone()) for level in LEVELS}
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        plain = [p for n, p in trained if n.endswith(".bias") or "norm" in n]
        decayed = [p for n, p in trained if not (n.endswith(".bias") or "norm" in n)] + [*self.logit_scale.values()]
        groups = [{"params": decayed, "weight_decay": 0.2}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=2e-5, betas=(0.9, 0.999), eps=1e-8)

    def loss(self, batch: Any) -> Tensor:
        """Of a `scenarioclip_fast.data.Batch`: contrastive and distillation terms, unweighted."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self._loss(batch)

    def _loss(self, batch: Any) -> Tensor:
        ids = dict(zip(LEVELS, (batch.action_id, batch.object_id, batch.relation_id), strict=True))
        pixels = dict(zip(LEVELS, batch.pixels.split([len(i) for i in ids.values()]), strict=True))
        texts = {
            level: padded([self.tokens[level][i] for i in ids[level].tolist()], self.model.config.text, self.device)
            for level in LEVELS
        }
        image = {level: self.model.vision[level](pixels[level]) for level in LEVELS}
        text = {level: self.model.text[level](texts[level]) for level in LEVELS}
        with torch.no_grad():
            teacher_image = self.teacher.vision["global"](pixels["global"])
            teacher_text = {level: self.teacher.text[level](texts[level]) for level in LEVELS[1:]}
        total = sum(contrastive(image[level], text[level], self.logit_scale[level]) for level in LEVELS)
        scenes = len(ids["global"])
        counts = {
            level: torch.bincount(scene, minlength=scenes).tolist()
            for level, scene in zip(LEVELS[1:], (batch.object_scene, batch.relation_scene), strict=True)
        }
        return total + distillation(image, text["global"], teacher_image, teacher_text, counts, self.distillation_scale)

    def step(self, batch: Any) -> Tensor:
        """Forward, backward, clipping, AdamW, teacher; the loss before the update."""
        loss = self.loss(batch)
        loss.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.distillation_scale.grad = None
        self._average()
        return loss.detach()

    @torch.no_grad()
    def _average(self) -> None:
        """The moving average: decay 0.9995, its window growing over the first 2000 steps."""
        window = 1 + min(self.steps / 2000, 1) * (1 / (1 - 0.9995) - 1)
        decay = 1 - 1 / window
        for mine, theirs in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            if theirs.requires_grad:
                mine.mul_(decay).add_(theirs, alpha=1 - decay)
        self.steps += 1
