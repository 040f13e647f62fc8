"""A contrastive loss in a plain PyTorch loop, without the trainer or the data pipeline of this package.

Image rows point into the distinct texts of the batch, so a name that occurs 300 times is embedded once. Run:

    python examples/loss_in_plain_pytorch.py
"""

from __future__ import annotations

import torch
from torch import nn

from scenarioclip_fast.losses import ContrastiveLoss


def main(steps: int = 60, rows: int = 256, texts: int = 40, width: int = 64) -> list[float]:
    """Fit two small encoders to noisy pairs of vectors; return the loss of every step."""
    torch.manual_seed(0)
    meaning = torch.randn(texts, width)
    image_encoder, text_encoder = nn.Linear(width, width), nn.Linear(width, width)
    # Rows with equal texts form one class; by default they are each other's negatives.
    criterion = ContrastiveLoss(duplicates="positives")
    parameters = [p for m in (image_encoder, text_encoder, criterion) for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for _ in range(steps):
        text, text_index = torch.randint(texts, (rows,)).unique(return_inverse=True)
        images = meaning[text][text_index] + 0.5 * torch.randn(rows, width)
        loss = criterion(image_encoder(images), text_encoder(meaning[text]), text_index)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, temperature {1 / criterion.scale.item():.4f}")
    return losses


if __name__ == "__main__":
    main()
