"""A training step as in open_clip, with ClipLoss in place of open_clip's class of that name. Run:

python examples/loss_in_open_clip_loop.py
torchrun --nproc-per-node 2 examples/loss_in_open_clip_loop.py
"""

from __future__ import annotations

import math
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scenarioclip_fast.losses import ClipLoss


class TwoTowers(nn.Module):
    """Returns what open_clip's CLIP does: normalised features and the scale of their cosines."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.visual, self.text = nn.Linear(width, width), nn.Linear(width, width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [N, D], [N, D]
        features = (nn.functional.normalize(tower(x), dim=-1) for tower, x in ((self.visual, image), (self.text, text)))
        return *features, self.logit_scale.exp()


def main(steps: int = 60, batch_size: int = 128, width: int = 64) -> list[float]:
    """Fit two towers to noisy pairs of vectors; return the loss of every step."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if world_size > 1 else 0
    torch.manual_seed(0)
    model: nn.Module = TwoTowers(width)
    if world_size > 1:
        model = DistributedDataParallel(model)
    torch.manual_seed(1 + rank)
    loss_fn = ClipLoss(local_loss=False, gather_with_grad=True, rank=rank, world_size=world_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        texts = torch.randn(batch_size, width)
        images = texts + 0.5 * torch.randn(batch_size, width)
        image_features, text_features, logit_scale = model(images, texts)
        loss = loss_fn(image_features, text_features, logit_scale, output_dict=True)["contrastive_loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if rank == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    if world_size > 1:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
