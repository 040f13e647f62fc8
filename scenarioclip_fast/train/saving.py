"""A run's state to its checkpoints and back, and the trained model out of it."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from scenarioclip_fast.data import SceneLoader, Vocabulary
from scenarioclip_fast.errors import TrainingFailed, UserError
from scenarioclip_fast.model import EMATeacher, ScenarioCLIP
from scenarioclip_fast.train.checkpoint import (
    BadCheckpoint,
    Checkpoint,
    Checkpoints,
    load,
    random_state,
    set_random_state,
)
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.distributed import World
from scenarioclip_fast.train.weights import save_teacher

FEW = 10  # losses in a mean


@dataclass
class Progress:
    """How far a run is, over all its processes."""

    step: int = 0
    scenes: int = 0
    views: int = 0
    skipped: int = 0  # steps without an update
    skipped_in_row: int = 0
    first_losses: list[float] = field(default_factory=list)
    last_losses: deque[float] = field(default_factory=lambda: deque(maxlen=FEW))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {**asdict(self), "last_losses": list(self.last_losses)}

    def take(self, values: dict[str, Any]) -> None:
        """Takes over what `to_dict` gave."""
        for name, value in values.items():
            setattr(self, name, deque(value, FEW) if name == "last_losses" else value)


@dataclass
class RunState:
    """All that a run goes on from."""

    model: ScenarioCLIP
    loss: nn.Module
    teacher: EMATeacher | None
    optimizer: Optimizer
    loader: SceneLoader
    progress: Progress


class Saver:
    """Saves `state` and restores it. Every rank makes one, and all ranks call it together.

    Args:
        total_steps: the run's budget.
        say: tells people one line, on the leading rank.
    """

    def __init__(
        self, config: TrainConfig, world: World, state: RunState, total_steps: int, say: Callable[[str], None]
    ) -> None:
        self.config, self.world, self.state = config, world, state
        self.total_steps, self._say = total_steps, say
        self.checkpoints = checkpoints_of(config)
        self._saved: int | None = None

    def save(self, last: bool = False) -> None:
        """A checkpoint; a disk that refuses does not end the run, unless this is the last chance to save."""
        run, step = self.state, self.state.progress.step
        if self._saved == step:
            return
        ranks = self.world.gather({"random": random_state(), "loader": run.loader.state_dict()})
        if self.world.leads:
            state = {
                "model": run.model.state_dict(),
                "loss": run.loss.state_dict(),
                "teacher": None if run.teacher is None else run.teacher.state_dict(),
                "optimizer": run.optimizer.state_dict()["state"],
                "ranks": ranks,
            }
            meta = {
                "config": self.config.to_dict(),
                "total_steps": self.total_steps,
                "progress": run.progress.to_dict(),
            }
            try:
                self.checkpoints.save(step, state, meta)
            except OSError as error:
                message = f"checkpoint of step {step} not written: {error}"
                if last:
                    raise TrainingFailed(f"{message}; the newest one left is {self._newest()}") from error
                self._say(f"{message}; the run goes on")
        self._saved = step

    def restore(self, resume: bool | str | Path) -> list[str]:
        """Puts the state of the checkpoint to resume from in place; returns what to tell."""
        if not resume:
            return []
        found, notes = self._find(resume)
        if found is None:
            return [*notes, f"nothing to resume in {self.config.run.dir}: starting from step 0"]
        notes += self._compare(found)
        if found.meta["step"] > self.total_steps:
            raise UserError(
                f"{found.path} is at step {found.meta['step']}, beyond the budget of {self.total_steps} steps: raise it"
            )
        run, state = self.state, found.state
        run.model.load_state_dict(state["model"])
        run.loss.load_state_dict(state["loss"])
        if run.teacher is not None and state["teacher"] is not None:
            run.teacher.load_state_dict(state["teacher"])
        # The moments only: rates, decay and the like are those of the config at hand.
        run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state["optimizer"]})
        # On another number of ranks, the order of scenes goes on where the leading rank was.
        same = len(state["ranks"]) == self.world.size
        rank = state["ranks"][self.world.rank if same else 0]
        run.loader.load_state_dict(rank["loader"])
        if same:
            set_random_state(rank["random"])
        run.progress.take(found.meta["progress"])
        self._saved = run.progress.step
        return [*notes, f"resumed from {found.path} at step {run.progress.step}"]

    def _newest(self) -> str:
        paths = self.checkpoints.paths()
        return str(paths[0]) if paths else "none"

    def _find(self, resume: bool | str | Path) -> tuple[Checkpoint | None, list[str]]:
        """The leading rank chooses, so that all ranks resume from the same one."""
        if not isinstance(resume, bool):
            try:
                return load(Path(resume)), []
            except BadCheckpoint as error:
                raise UserError(f"--resume: {error}") from None
        notes: list[str] = []
        choice: Path | None = None
        found: Checkpoint | None = None
        if self.world.leads:
            for path in self.checkpoints.paths():
                try:
                    found = load(path)
                    choice = path
                    break
                except BadCheckpoint as error:
                    notes.append(f"passing over a damaged checkpoint: {error}")
        choice = self.world.gather(choice)[0]
        if choice is not None and found is None:
            found = load(choice)
        return found, notes

    def _compare(self, found: Checkpoint) -> list[str]:
        """UserError when the checkpoint holds another model; otherwise one line if the run's settings changed."""
        before, now = _flat(found.meta["config"]), _flat(self.config.to_dict())
        changed = {
            key: f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
            for key in {**before, **now}
            if before.get(key) != now.get(key) and not key.startswith("run.") and key != "model.init"
        }
        other = [text for key, text in changed.items() if key.startswith("model.") and key != "model.preset"]
        if other:
            raise UserError(f"{found.path} holds another model: {'; '.join(other)}")
        return [f"settings changed since the checkpoint: {'; '.join(changed.values())}"] if changed else []

    def export(self, directory: Path, vocabulary: Vocabulary) -> None:
        """All that an evaluation needs, in one directory that appears whole."""
        if self.world.leads:
            temporary = directory.with_name(f".writing-{directory.name}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            self.state.model.save_pretrained(temporary)
            vocabulary.save(temporary / "vocabulary.json")
            self.config.save(temporary / "config.yaml")
            if self.state.teacher is not None:
                save_teacher(self.state.teacher, temporary / "teacher.safetensors")
            shutil.rmtree(directory, ignore_errors=True)
            temporary.rename(directory)
        self.world.barrier()


def checkpoints_of(config: TrainConfig) -> Checkpoints:
    """The folder of a run's checkpoints."""
    return Checkpoints(Path(config.run.dir) / "checkpoints", config.train.keep_checkpoints)


def prepare_run_dir(config: TrainConfig, world: World, resume: bool | str | Path) -> None:
    """Makes run.dir, and clears away what writers that died have left there."""
    checkpoints = checkpoints_of(config)
    if not resume and checkpoints.paths():
        raise UserError(
            f"{config.run.dir} holds the checkpoints of an earlier run: go on with --resume, or set another run.dir"
        )
    if world.leads:
        try:
            Path(config.run.dir).mkdir(parents=True, exist_ok=True)
            checkpoints.sweep()
        except OSError as error:
            raise UserError(f"run.dir: cannot write to {config.run.dir}: {error.strerror}") from None
    world.barrier()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
