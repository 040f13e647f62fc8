"""From your own annotations to a trained model: build Scenes, pack them, train, embed texts. Run:

    python examples/train_on_your_own_scenes.py OUT_DIR

This script generates its scenes; replace `my_scenes` with a reader of your files. A Scene has the encoded image (or its
pixels), a short caption of the whole (the action), named boxes with masks, and subject-predicate-object triples.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import scenarioclip_fast as scf
from scenarioclip_fast.data import Relation, Scene, SceneObject, pack


def my_scenes(count: int) -> Iterator[Scene]:
    """A red and a blue square, one beside or above the other."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        beside = i % 2 == 0
        image = torch.full((96, 96, 3), 200, dtype=torch.uint8)
        offset = int(torch.randint(20, (1,), generator=generator))
        corners = [(8 + offset, 10), (8 + offset, 56)] if beside else [(8, 10 + offset), (54, 10 + offset)]
        objects = []
        for name, colour, (y, x) in zip(("red square", "blue square"), (0, 2), corners, strict=True):
            mask = torch.zeros(96, 96, dtype=torch.bool)
            mask[y : y + 30, x : x + 30] = True
            image[mask] = 255 * torch.eye(3, dtype=torch.uint8)[colour]
            objects.append(SceneObject(name, (x, y, x + 30, y + 30), mask))
        predicate = "left of" if beside else "above"
        yield Scene(f"scene{i:04d}", image, f"standing {predicate}", objects, [Relation(0, predicate, 1)])


def main(out: Path, count: int = 64, steps: int = 30) -> float:
    """Pack, train, and return the ratio of the last loss to the first."""
    pack(my_scenes(count), out / "shards")
    config = scf.TrainConfig.of(
        {
            "run": {"dir": str(out / "run"), "device": "cpu"},
            "data": {"shards": str(out / "shards"), "batch_size": 16, "object_view": "crop"},
            "model": {"preset": "tiny", "vision": {"layers": 2}, "text": {"layers": 2}},
            "loss": {"duplicates": "positives", "teacher_decay": 0.99, "teacher_warmup": 20},
            "optim": {"lr": 1e-3},
            "train": {"steps": steps},
        }
    )
    result = scf.Trainer(config).fit()
    print(result.summary())
    assert result.model_dir is not None
    model = scf.ScenarioCLIP.from_pretrained(result.model_dir)
    print("text embeddings:", list(model.encode_text(["red square", "blue square"], "object").shape))
    return result.last_loss / result.first_loss


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/train_on_your_own_scenes.py OUT_DIR")
    main(Path(sys.argv[1]))
