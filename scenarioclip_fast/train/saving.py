"""A run's state to its checkpoints and back, and the trained model out of it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from scenarioclip_fast.data import SceneLoader, Vocabulary
from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import TrainingFailed, UserError
from scenarioclip_fast.losses import ScenarioLoss
from scenarioclip_fast.model import EMATeacher, ScenarioCLIP
from scenarioclip_fast.model.config import flat
from scenarioclip_fast.requirements import require
from scenarioclip_fast.train.checkpoint import (
    BadCheckpoint,
    Checkpoint,
    Checkpoints,
    NotWritten,
    PendingSave,
    examine,
    load,
    random_state,
    set_random_state,
    share,
)
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.sharding import whole_tensor
from scenarioclip_fast.train.weights import save_teacher

Resume = bool | str | Path  # True or "auto", "best", or a checkpoint's path

FEW = 10  # losses in the means that people read
# Losses in the mean that tells the best checkpoint: of one step they are noise, and as many for each compares like
# with like, however far apart checkpoints are.
_JUDGED_OVER = 100


@dataclass
class Progress:
    """How far a run is, over all its processes."""

    step: int = 0
    scenes: int = 0
    views: int = 0
    skipped: int = 0  # steps without an update
    skipped_in_row: int = 0
    bad_samples: int = 0  # met on the way, over all ranks
    first_losses: list[float] = field(default_factory=list)
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=_JUDGED_OVER))

    @property
    def last_losses(self) -> list[float]:
        return list(self.recent_losses)[-FEW:]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {**asdict(self), "recent_losses": list(self.recent_losses)}

    def take(self, values: dict[str, Any]) -> None:
        """Takes over what `to_dict` gave."""
        for name, value in values.items():
            setattr(self, name, deque(value, _JUDGED_OVER) if name == "recent_losses" else value)


@dataclass
class RunState:
    """All that a run goes on from."""

    model: ScenarioCLIP
    loss: ScenarioLoss
    teacher: EMATeacher | None
    optimizer: Optimizer
    loader: SceneLoader
    progress: Progress

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the ranks share, under names that neither optimiser groups nor wrappers change."""
        found = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        found |= {f"loss/{name}": t for name, t in self.loss.state_dict().items()}
        if self.teacher is not None:
            found |= {f"teacher/{name}": t for name, t in self.teacher.state_dict()["tensors"].items()}
        for part, module in (("model", self.model), ("loss", self.loss)):
            for name, p in module.named_parameters():
                if p.requires_grad:
                    found |= {f"optimizer/{part}/{name}/{key}": t for key, t in self._moments(p).items()}
        return found

    def _moments(self, p: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a parameter, made here as AdamW does in its first step."""
        state = self.optimizer.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


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
        self.checkpoints = checkpoints_of(config, world)
        self._pending: PendingSave | None = None
        self._saved: int | None = None
        self._saved_at = time.monotonic()

    def due(self) -> bool:
        """Whether train.checkpoint_minutes have passed: the leading rank's clock, for it to tell the others."""
        minutes = self.config.train.checkpoint_minutes
        return self.world.is_main_process and minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, last: bool = False) -> None:
        """Begins a checkpoint, and with `last` waits for it.

        A disk that refuses does not end the run, unless this is the last chance to save: TrainingFailed.
        """
        step, run = self.state.progress.step, self.state
        self._finish()  # of an earlier step, or of this one
        if self._saved == step:
            return
        losses = run.progress.recent_losses
        meta = {
            "loss": sum(losses) / len(losses) if losses else None,
            "ranks": self.world.size,
            "total_steps": self.total_steps,
            "teacher_step": None if run.teacher is None else run.teacher.step,
            "progress": run.progress.to_dict(),
            "config": self.config.to_dict(),
        }
        state: dict[str, Any] = {**share(run.tensors(), self.world.rank, self.world.size)}
        mine = {"random": random_state(), "loader": run.loader.state_dict()}
        state[_of_rank(self.world.rank)] = json.dumps(mine)
        self._pending = self.checkpoints.save(step, state, meta)
        self._saved, self._saved_at = step, time.monotonic()
        if last:
            self._finish(last=True)

    def poll(self) -> None:
        """Says so if the checkpoint under way has failed; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self._finish()

    def close(self) -> None:
        """Waits for the checkpoint under way."""
        self._finish("")

    def restore(self, resume: Resume) -> list[str]:
        """Puts the state of the checkpoint to resume from in place; returns what to tell."""
        notes: list[str] = []
        if not resume:
            return notes
        problems: list[str] = []
        paths = self._candidates(resume)
        for path in paths:
            try:
                found = self._examine(path)
                notes = self._compare(found)
                self._load(found)
            except BadCheckpoint as error:
                problems.append(str(error))
                continue
            notes += [f"passing over a damaged checkpoint: {problem}" for problem in problems]
            return [*notes, f"resumed from {found.path} at step {self.state.progress.step}"]
        if not paths:
            return [f"nothing to resume in {self.config.run.dir}: starting from step 0"]
        way_out = (
            "set another run.dir to start anew" if _is_auto(resume) else "expected auto, best, or a checkpoint's path"
        )
        raise UserError(f"--resume: nothing that can be read: {'; '.join(problems)}; {way_out}")

    def _finish(self, then: str = "; the run goes on", last: bool = False) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.wait()
        except NotWritten as error:
            self._saved = None
            if last:
                newest = next(iter(self.checkpoints.paths()), "none")
                raise TrainingFailed(f"{error}; the newest one left is {newest}") from error
            self._say(f"{error}{then}")

    def _candidates(self, resume: Resume) -> list[Path]:
        """What to try, in this order; the leading rank chooses, so that all ranks resume from the same one."""
        if _is_auto(resume):
            paths = self.checkpoints.paths()
        elif resume == "best":
            best = self.checkpoints.best()
            paths = [] if best is None else [best]
        else:
            path = Path(str(resume))
            paths = Checkpoints(path / "checkpoints", 1).paths() or [path]
        return self.world.gather(paths)[0]

    def _examine(self, path: Path) -> Checkpoint:
        """The leading rank reads, and all hear what it found."""
        found: Checkpoint | BadCheckpoint | None = None
        if self.world.is_main_process:
            try:
                found = examine(path)
            except BadCheckpoint as error:
                found = error
        found = self.world.gather(found)[0]
        if isinstance(found, BadCheckpoint):
            raise found
        assert found is not None
        return found

    def _load(self, found: Checkpoint) -> None:
        run, meta = self.state, found.meta
        if meta["step"] > self.total_steps:
            raise UserError(
                f"{found.path} is at step {meta['step']}, beyond the budget of {self.total_steps} steps: raise it"
            )
        state: dict[str, Any] = {**run.tensors()}
        if meta["teacher_step"] is None:
            state = {name: t for name, t in state.items() if not name.startswith("teacher/")}
        if missing := sorted(state.keys() - found.names):
            raise UserError(
                f"{found.path} lacks {len(missing)} tensors of this run, such as {missing[0]}: resume with the "
                "settings that it was written with"
            )
        # On another number of ranks, the order of scenes goes on where the leading rank was.
        same = meta["ranks"] == self.world.size
        mine = _of_rank(self.world.rank if same else 0)
        state[mine] = ""
        load(found, state, self.checkpoints.group)
        saved = json.loads(state[mine])
        run.loader.load_state_dict(saved["loader"])
        if same:
            set_random_state(saved["random"])
        if run.teacher is not None and meta["teacher_step"] is not None:
            run.teacher.step = meta["teacher_step"]
        elif run.teacher is not None:  # the run was without one: it starts from the model that was loaded
            run.teacher.restart(run.model)
        run.progress.take(meta["progress"])
        self._saved = run.progress.step

    def _compare(self, found: Checkpoint) -> list[str]:
        """UserError when the checkpoint holds another model; otherwise one line if the run's settings changed."""
        before, now = flat(found.meta["config"]), flat(self.config.to_dict())
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
        """All that an evaluation needs, in one directory that appears whole; else TrainingFailed."""
        model, teacher = self._whole_model(), self.state.teacher
        averages = None if teacher is None else teacher.state_dict()
        if averages is not None:
            averages["tensors"] = self._whole(averages["tensors"])
        if self.world.is_main_process:
            temporary = directory.with_name(f".writing-{directory.name}")
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                scales = self.state.loss.learned_scalars().get("logit_scale", {})
                model.save_pretrained(temporary, {level: scale.item() for level, scale in scales.items()})
                vocabulary.save(temporary / "vocabulary.json")
                self.config.save(temporary / "config.yaml")
                if averages is not None:
                    save_teacher(averages, temporary / "teacher.safetensors")
                shutil.rmtree(directory, ignore_errors=True)
                temporary.rename(directory)
            except (OSError, require("safetensors").SafetensorError) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                raise TrainingFailed(
                    f"{directory} not written: {error}; the run's last checkpoint is whole: make room, then --resume"
                ) from error
        self.world.barrier()

    def _whole_model(self) -> ScenarioCLIP:
        """The model; where its weights are spread over the ranks, on the leading one a copy in host memory."""
        model = self.state.model
        state = model.state_dict()
        if not any(isinstance(t, DTensor) for t in state.values()):
            return model
        whole = self._whole(state)
        if self.world.is_main_process:
            model = ScenarioCLIP(model.config)
            model.load_state_dict(whole)
        return model

    def _whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """All of them on the leading rank, those that were spread over the ranks in host memory; one at a time, for
        together they may be more than one device holds."""
        whole: dict[str, Tensor] = {}
        for name, t in tensors.items():
            gathered = whole_tensor(t)
            if self.world.is_main_process:
                whole[name] = gathered.cpu() if isinstance(t, DTensor) else gathered
        return whole


def checkpoints_of(config: TrainConfig, world: World) -> Checkpoints:
    """The folder of a run's checkpoints."""
    return Checkpoints(Path(config.run.dir) / "checkpoints", config.train.keep_checkpoints, world.host)


@contextmanager
def run_dir_of(config: TrainConfig, world: World, resume: Resume) -> Iterator[None]:
    """run.dir, made, kept for this run alone, and rid of what writers that died have left there."""
    checkpoints = checkpoints_of(config, world)
    if not resume and checkpoints.paths():
        raise UserError(
            f"{config.run.dir} holds the checkpoints of an earlier run: go on with --resume, or set another run.dir"
        )
    with ExitStack() as stack:
        if world.is_main_process:
            try:
                Path(config.run.dir).mkdir(parents=True, exist_ok=True)
                directory = os.open(config.run.dir, os.O_RDONLY | os.O_DIRECTORY)
                stack.callback(os.close, directory)
                _lock(directory, config.run.dir)
                checkpoints.sweep()
            except OSError as error:
                raise UserError(f"run.dir: cannot write to {config.run.dir}: {error.strerror}") from None
        world.barrier()
        yield


def _lock(directory: int, name: str) -> None:
    """Until the descriptor is closed: two runs would mix their metrics and sweep each other's checkpoints."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"run.dir: another process trains into {name}: wait for it, or set another run.dir") from None
    except OSError:  # some network file systems have no locks
        return


def _is_auto(resume: Resume) -> bool:
    return resume is True or resume == "auto"


def _of_rank(rank: int) -> str:
    return f"rank/{rank}"
