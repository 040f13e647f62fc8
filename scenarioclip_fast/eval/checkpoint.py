"""Opens what is to be evaluated: a run's directory, or a directory that `save_pretrained` wrote."""

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
class Trained:
    """A model in evaluation mode, its files, and how it saw data (where that is not known, as by default)."""

    model: ScenarioCLIP
    directory: Path
    files: tuple[Path, ...]
    data: DataSection = field(default_factory=DataSection)
    scales: dict[str, float] = field(default_factory=dict)  # factors of the cosines, as far as they are known


def open_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", weights: Literal["student", "teacher"] = "student"
) -> Trained:
    """Reads RUN/model of a run, or a `save_pretrained` directory. Raises UserError where neither is there.

    weights: "teacher" takes the EMA teacher's, of a run with loss.teacher_scope=all.
    """
    path = Path(path)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}; expected a run's directory, or one that `save_pretrained` wrote")
    directory = path / "model" if (path / "model" / "model.safetensors").is_file() else path
    if not (directory / "model.safetensors").is_file():
        unfinished = (path / "checkpoints").is_dir()
        why = "is a run that has not finished: go on with `train --resume`" if unfinished else "holds no trained model"
        raise UserError(f"{path} {why}; expected RUN/model or a directory with model.safetensors and config.json")
    config = directory / "config.yaml"
    data = TrainConfig.load(config).data if config.is_file() else DataSection()
    model = ScenarioCLIP.from_pretrained(directory)
    files = [directory / "model.safetensors", directory / "config.json"]
    if weights == "teacher":
        from scenarioclip_fast.train.weights import load_teacher

        files.append(directory / "teacher.safetensors")
        load_teacher(model, files[-1])
    return Trained(model.to(device).eval(), directory, tuple(files), data, read_scales(directory))


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: got {name!r}, but torch sees no GPU here; use cpu")
    return device
