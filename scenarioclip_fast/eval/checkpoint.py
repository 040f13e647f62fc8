"""Open a model for evaluation: a run directory, or a directory that `save_pretrained` wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model import ScenarioCLIP
from scenarioclip_fast.model.pretrained import read_scales
from scenarioclip_fast.train.config import DataSection, TrainConfig


@dataclass(frozen=True)
class OpenedCheckpoint:
    """An opened checkpoint.

    Attributes:
        model: in evaluation mode.
        directory: holds model.safetensors.
        files: the files that determine the weights.
        data: data settings of the training run; the defaults if they are unknown.
        scales: logit scale per level, where known.
    """

    model: ScenarioCLIP
    directory: Path
    files: tuple[Path, ...]
    data: DataSection = field(default_factory=DataSection)
    scales: dict[str, float] = field(default_factory=dict)


def open_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", weights: Literal["student", "teacher"] = "student"
) -> OpenedCheckpoint:
    """Read RUN/model of a finished run, or a `save_pretrained` directory.

    Args:
        path: the directory.
        device: where to put the model.
        weights: "teacher" loads the EMA teacher's weights, which runs with loss.teacher_scope=all save.

    Raises:
        UserError: no model there, or no teacher weights.
    """
    path = Path(path)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}; expected a run directory, or one that `save_pretrained` wrote")
    directory = path / "model" if (path / "model" / "model.safetensors").is_file() else path
    if not (directory / "model.safetensors").is_file():
        unfinished = (path / "checkpoints").is_dir()
        why = "is an unfinished run: resume it with `train --resume`" if unfinished else "has no trained model"
        raise UserError(f"{path} {why}; expected RUN/model or a directory with model.safetensors and config.json")
    config = directory / "config.yaml"
    data = TrainConfig.load(config).data if config.is_file() else DataSection()
    model = ScenarioCLIP.from_pretrained(directory)
    files = [directory / "model.safetensors", directory / "config.json"]
    if weights == "teacher":
        from scenarioclip_fast.train.weights import load_teacher

        files.append(directory / "teacher.safetensors")
        load_teacher(model, files[-1])
    return OpenedCheckpoint(model.to(device).eval(), directory, tuple(files), data, read_scales(directory))


def pick_device(name: str) -> torch.device:
    """Parse a device name; "auto" is the GPU if there is one.

    Raises:
        UserError: no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: got {name!r}, but torch sees no GPU; use cpu")
    return device
