"""Export the trained model of a run as a directory for evaluation."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from scenarioclip_fast.checksums import SUMS, write_sums
from scenarioclip_fast.data import Vocabulary
from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import TrainingFailed
from scenarioclip_fast.files import Directory
from scenarioclip_fast.losses import ScenarioLoss
from scenarioclip_fast.model import ScenarioCLIP
from scenarioclip_fast.model.pretrained import MODEL_FILES
from scenarioclip_fast.requirements import require
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.sharding import whole_tensor
from scenarioclip_fast.train.state import RunState
from scenarioclip_fast.train.weights import save_teacher

_FILES = frozenset({*MODEL_FILES, SUMS, "vocabulary.json", "config.yaml", "teacher.safetensors"})


def export(directory: Path, run: RunState, vocabulary: Vocabulary, config: TrainConfig, world: World) -> None:
    """Write everything that an evaluation needs, atomically; all ranks call it together.

    Raises:
        TrainingFailed: the directory cannot be written.
    """
    model, teacher = _whole_model(run.model, world), run.teacher
    averages = None if teacher is None else teacher.state_dict()
    if averages is not None:
        averages["tensors"] = _gather(averages["tensors"], world)
    if world.is_main_process:
        temporary = directory.with_name(f".writing-{directory.name}")
        try:
            _clear(temporary)
            temporary.mkdir()
            model.save_pretrained(temporary, learned_scales(run.loss))
            vocabulary.save(temporary / "vocabulary.json")
            config.save(temporary / "config.yaml")
            if averages is not None:
                save_teacher(averages, temporary / "teacher.safetensors")
                shutil.copymode(temporary / "config.json", temporary / "teacher.safetensors")
            write_sums(temporary, [path.name for path in temporary.iterdir()])
            _install(temporary, directory)
        except (OSError, require("safetensors").SafetensorError) as error:
            with suppress(OSError):
                _clear(temporary)
            raise TrainingFailed(
                f"{directory} not written: {error}; the last checkpoint is intact: free some space, then --resume"
            ) from error
    world.barrier()


def _install(temporary: Path, directory: Path) -> None:
    """Move the files to `directory`, whose other files stay: checksums first, so that a mixture is not loaded."""
    if not directory.exists():
        temporary.rename(directory)
        return
    for name in (SUMS, *sorted(_FILES - {SUMS})):
        if (temporary / name).exists():
            os.replace(temporary / name, directory / name)
        else:
            (directory / name).unlink(missing_ok=True)
    temporary.rmdir()


def _clear(temporary: Path) -> None:
    """Remove what a killed export left, and nothing else."""
    if temporary.is_symlink():
        temporary.unlink()
    elif temporary.exists():
        with Directory(temporary) as found:
            for name in _FILES.intersection(found.names()):
                found.unlink(name)
        temporary.rmdir()


def learned_scales(loss: ScenarioLoss) -> dict[str, float]:
    """Return the logit scale of each level, 1 / temperature; empty if the loss learns none."""
    scales = loss.learned_scalars().get("logit_scale", {})
    return {level: scale.item() for level, scale in scales.items()}


def _whole_model(model: ScenarioCLIP, world: World) -> ScenarioCLIP:
    """Return the model; if its weights are sharded, the main process gets a whole copy in host memory."""
    state = model.state_dict()
    if not any(isinstance(t, DTensor) for t in state.values()):
        return model
    gathered = _gather(state, world)
    if world.is_main_process:
        model = ScenarioCLIP(model.config)
        model.load_state_dict(gathered)
    return model


def _gather(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Return all tensors on the main process, sharded ones in host memory.

    They are gathered one at a time: together they may exceed the memory of one device.
    """
    gathered: dict[str, Tensor] = {}
    for name, t in tensors.items():
        whole = whole_tensor(t)
        if world.is_main_process:
            gathered[name] = whole.cpu() if isinstance(t, DTensor) else whole
    return gathered
