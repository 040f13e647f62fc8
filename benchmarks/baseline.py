"""The baseline: one training step as in the method's published code, reimplemented from its description.

Six complete encoders and a complete EMA teacher. Every view and every text runs through all layers of its level's
encoder, texts padded to the longest of their level in the batch; the trainable layernorm before block 0 makes the
backward pass run through the frozen blocks; each contrastive term uses `logits` and `logits.T`; distillation is a
Python loop with one KLDivLoss call per pair; the teacher is updated parameter by parameter.

Tests and benchmarks compare against it, so it is not made artificially slow: attention is PyTorch's fused attention, as
in transformers; AdamW and gradient clipping use PyTorch's defaults; token ids are inputs, while the published step
tokenizes strings. From the package it uses only the config.
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
Tokens = Sequence[Sequence[int]]  # one list of ids per text, with start and end tokens


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
    """The stem of the preset "tiny"; the published code has only CLIP's patch embedding."""

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
    """A vision and a text encoder per level, without sharing."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = nn.ModuleDict({level: VisionEncoder(config.vision, config.embed_dim) for level in LEVELS})
        self.text = nn.ModuleDict({level: TextEncoder(config.text, config.embed_dim) for level in LEVELS})
        for encoder in (*self.vision.values(), *self.text.values()):
            encoder.freeze(config.freeze)  # type: ignore[operator]

    @torch.no_grad()
    def copy_weights_of(self, model: nn.Module) -> None:
        """Copy the weights of a ScenarioCLIP of the same config, which fuses query, key and value into one matrix."""
        source = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in self.named_parameters():
            kind, level, rest = name.split(".", 2)
            module, _, leaf = rest.rpartition(".")
            if module.endswith((".q", ".k", ".v")):
                value = source[f"{kind}.{level}.{module[:-1]}qkv.{leaf}"].chunk(3)["qkv".index(module[-1])]
            else:
                first = rest.partition(".")[0]
                embedding = "embedding." if first in ("stem", "class_token", "position", "token") else ""
                value = source[f"{kind}.{level}.{embedding}{rest}"]
            parameter.copy_(value.view_as(parameter))


def pad(tokens: Tokens, config: TextConfig, device: torch.device) -> Tensor:
    """[n, L] ids, truncated to the context length and padded to the longest text with end-of-text."""
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
    counts: dict[str, list[int]],  # level -> number of items per scene; rows are ordered by scene
    logit_scale: Tensor,  # [] ln(1 / T_s); the published optimizer does not update it
) -> Tensor:
    """The four terms, scene by scene and pair by pair. A scene without items adds 0 (the published code divides by 0).

    Each pair is one KLDivLoss of 1-D rows, whose "batchmean" divides by D.
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
            log_q, language = F.log_softmax(global_text[i] / temperature, dim=-1), 0
            for k in range(n):
                language = language + divergence(log_q, target(teachers[k])) * temperature**2
            total = total + (vision + language) / n / scenes
    return total


class BaselineStep:
    """Model, teacher, optimizer and one step.

    Args:
        config: of the model.
        weights: a ScenarioCLIP of that config with the initial weights.
        tokens: level -> token ids of every text in the vocabulary.
        device: of the model.
        bf16: use autocast; the published run is float32 with TF32 matrix products.
    """

    def __init__(
        self, config: ModelConfig, weights: nn.Module, tokens: dict[str, Tokens], device: str, bf16: bool = False
    ) -> None:
        with torch.device("meta"):  # skips initialisation, which takes seconds: all weights are copied
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
        """Unweighted sum of contrastive and distillation terms of a `scenarioclip_fast.data.Batch`.

        Raises:
            ValueError: a scene has no action, which the published code requires.
        """
        if len(batch.host_ids[0]) < batch.num_scenes:
            raise ValueError("batch: got scenes without an action, expected scenes with one, as the published code")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self._loss(batch)

    def _loss(self, batch: Any) -> Tensor:
        ids = dict(zip(LEVELS, (batch.action_id, batch.object_id, batch.relation_id), strict=True))
        pixels = dict(zip(LEVELS, batch.pixels.split([len(i) for i in ids.values()]), strict=True))
        texts = {
            level: pad([self.tokens[level][i] for i in ids[level].tolist()], self.model.config.text, self.device)
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
        """Run forward, backward, clipping, AdamW and the teacher update; return the loss before the update."""
        loss = self.loss(batch)
        loss.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.distillation_scale.grad = None
        self._update_teacher()
        return loss.detach()

    @torch.no_grad()
    def _update_teacher(self) -> None:
        """EMA with decay 0.9995, whose window grows over the first 2000 steps."""
        window = 1 + min(self.steps / 2000, 1) * (1 / (1 - 0.9995) - 1)
        decay = 1 - 1 / window
        for average, weight in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            if weight.requires_grad:
                average.mul_(decay).add_(weight, alpha=1 - decay)
        self.steps += 1
