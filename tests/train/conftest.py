from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scenarioclip_fast.data import generate_scenes, pack
from scenarioclip_fast.train.config import TrainConfig

# One block of width 32 on 32-pixel views; the token embeddings, most of the weights, are frozen and shared.
SMALL = [
    "model.preset=tiny",
    "model.embed_dim=32",
    "model.vision.image_size=32",
    "model.vision.width=32",
    "model.vision.layers=1",
    "model.text.width=32",
    "model.text.layers=1",
    "model.freeze.embeddings=true",
    "loss.teacher_decay=0.9",
    "loss.teacher_warmup=5",
    "optim.lr=1e-3",
    "data.batch_size=8",
    "data.threads=1",
    "data.decoder=torch",
    "run.device=cpu",
    "train.log_every=3",
    "train.checkpoint_every=1000",
    "train.tensorboard=false",
]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 drawn scenes of the train split, packed."""
    directory = tmp_path_factory.mktemp("shards")
    pack(generate_scenes(20, seed=0, val=0.0, test=0.0), directory)
    return directory


@pytest.fixture
def small(shards: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """small("key=value", ..., run="name"): the config of a small run in tmp_path/name."""

    def make(*overrides: str, run: str = "run") -> TrainConfig:
        return TrainConfig.of({}, [*SMALL, f"data.shards={shards}", f"run.dir={tmp_path / run}", *overrides])

    return make
