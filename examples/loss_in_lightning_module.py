"""A contrastive loss in a LightningModule, with the temperature as one of its parameters. Run:

pip install lightning
python examples/loss_in_lightning_module.py
"""

from __future__ import annotations

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from scenarioclip_fast.losses import ContrastiveLoss


class TwoTowers(L.LightningModule):
    """A linear encoder for image vectors and one for text vectors."""

    def __init__(self, meaning: Tensor, lr: float = 3e-3) -> None:  # [texts, width]
        super().__init__()
        width = meaning.shape[1]
        self.register_buffer("meaning", meaning)
        self.image_encoder, self.text_encoder = nn.Linear(width, width), nn.Linear(width, width)
        self.criterion = ContrastiveLoss(duplicates="positives")  # rows with equal texts form one class
        self.lr = lr
        self.losses: list[float] = []

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:  # compare the rows of all ranks; Lightning averages the gradients
            self.criterion.group = dist.group.WORLD

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:  # [N, width], [N] int64
        images, text = batch
        distinct, index = text.unique(return_inverse=True)  # each distinct text is embedded once
        features = self.image_encoder(images), self.text_encoder(self.meaning[distinct])
        loss = self.criterion(*features, index, text_id=distinct)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main(steps: int = 60, rows: int = 256, texts: int = 40, width: int = 64) -> list[float]:
    """Fit the module to noisy pairs of vectors; return the loss of every step."""
    torch.manual_seed(0)
    meaning = torch.randn(texts, width)
    text = torch.randint(texts, (steps * rows,))
    images = meaning[text] + 0.5 * torch.randn(len(text), width)
    module = TwoTowers(meaning)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(images, text), batch_size=rows))
    temperature = 1 / module.criterion.scale.item()
    print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}, temperature {temperature:.4f}")
    return module.losses


if __name__ == "__main__":
    main()
