"""Open a model for evaluation, from a run directory or a directory written by `save_pretrained`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from scenarioclip_fast.checksums import verify_sums
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model import ScenarioCLIP
from scenarioclip_fast.model.pretrained import read_scales
from scenarioclip_fast.train.config import DataSection, TrainConfig

Weights = Literal["student", "teacher"]


@dataclass(frozen=True)
class OpenedCheckpoint:
    """An opened checkpoint.

    Attributes:
        model: in evaluation mode.
        directory: directory of model.safetensors.
        files: the files that determine the weights.
        data: data settings of the training run; the defaults if unknown.
        scales: level -> logit scale, if known.
    """

    model: ScenarioCLIP
    directory: Path
    files: tuple[Path, ...]
    data: DataSection = field(default_factory=DataSection)
    scales: dict[str, float] = field(default_factory=dict)


def open_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", weights: Weights = "student"
) -> OpenedCheckpoint:
    """Read RUN/model of a finished run, or a `save_pretrained` directory.

    Args:
        path: the directory.
        device: device of the model.
        weights: "teacher" loads the weights of the EMA teacher, saved by runs with loss.teacher_scope=all.

    Raises:
        UserError: the directory has no model, or no teacher weights; or unknown `weights`.
    """
    if weights not in get_args(Weights):
        raise UserError(f"weights: got {weights!r}, expected one of {', '.join(get_args(Weights))}")
    path = Path(path)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}; expected a run directory, or one written by `save_pretrained`")
    directory = path / "model" if (path / "model" / "model.safetensors").is_file() else path
    if not (directory / "model.safetensors").is_file():
        unfinished = (path / "checkpoints").is_dir()
        why = "is an unfinished run: resume it with `train --resume`" if unfinished else "has no trained model"
        raise UserError(f"{path} {why}; expected RUN/model or a directory with model.safetensors and config.json")
    config = directory / "config.yaml"
    verify_sums(directory, ["config.yaml", "vocabulary.json", *["teacher.safetensors"] * (weights == "teacher")])
    try:
        data = TrainConfig.load(config).data if config.is_file() else DataSection()
    except UserError as error:
        raise UserError(str(error) if str(config) in str(error) else f"{config}: {error}") from None
    model = ScenarioCLIP.from_pretrained(directory)
    files = [directory / "model.safetensors", directory / "config.json"]
    if weights == "teacher":
        from scenarioclip_fast.train.weights import load_teacher

        files.append(directory / "teacher.safetensors")
        load_teacher(model, files[-1])
    return OpenedCheckpoint(model.to(device).eval(), directory, tuple(files), data, read_scales(directory))
