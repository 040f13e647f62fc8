"""Save the state of a run to checkpoints, and restore it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import TrainingFailed, UserError
from scenarioclip_fast.model.config import flat
from scenarioclip_fast.train.checkpoint import (
    BadCheckpoint,
    Checkpoint,
    Checkpoints,
    NotWritten,
    PendingSave,
    examine,
    load,
    share,
)
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.random_state import random_state, set_random_state
from scenarioclip_fast.train.run_dir import checkpoints_of
from scenarioclip_fast.train.state import Progress, RunState

Resume = bool | str | Path  # True or "auto", "best", or a checkpoint's path
_META_TYPES = {"step": int, "ranks": int, "teacher_step": int | None, "progress": dict, "config": dict}


class Saver:
    """Save and restore `state`. Every rank creates one, and all ranks call it together.

    Args:
        total_steps: the run's budget.
        log: logs a line on the main process.
    """

    def __init__(
        self, config: TrainConfig, world: World, state: RunState, total_steps: int, log: Callable[[str], None]
    ) -> None:
        self.config, self.world, self.state = config, world, state
        self.total_steps, self._log = total_steps, log
        self.checkpoints = checkpoints_of(config, world)
        self._pending: PendingSave | None = None
        self._saved: int | None = None
        self._saved_at = time.monotonic()

    def due(self) -> bool:
        """Whether train.checkpoint_minutes have passed on the main process; False on other ranks."""
        minutes = self.config.train.checkpoint_minutes
        return self.world.is_main_process and minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, last: bool = False) -> None:
        """Start writing a checkpoint in the background; with `last`, wait for it.

        A failed write is logged and the run continues.

        Raises:
            TrainingFailed: with `last`, the checkpoint cannot be written.
        """
        step, run = self.state.progress.step, self.state
        self._finish()  # the checkpoint of an earlier step, or of this one
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
        tensors = run.tensors() | run.optimizer_tensors()
        state: dict[str, Any] = {**share(tensors, self.world.rank, self.world.size)}
        state[_rank_key(self.world.rank)] = json.dumps({"random": random_state(), "loader": run.loader.state_dict()})
        self._pending = self.checkpoints.save(step, state, meta)
        self._saved, self._saved_at = step, time.monotonic()
        if last:
            self._finish(last=True)

    def poll(self) -> None:
        """Log a failure of the checkpoint being written, without waiting."""
        if self._pending is not None and self._pending.done():
            self._finish()

    def close(self) -> None:
        """Wait for the checkpoint being written."""
        self._finish("")

    def restore(self, resume: Resume) -> list[str]:
        """Load the checkpoint to resume from; return log lines."""
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
            notes += [f"skipping a damaged checkpoint: {problem}" for problem in problems]
            if not found.digests:
                notes.append(f"{found.path} is of an earlier version, without checksums: damage cannot be detected")
            return [*notes, f"resumed from {found.path} at step {self.state.progress.step}"]
        if not paths:
            return [f"nothing to resume in {self.config.run.dir}: starting from step 0"]
        remedy = "set another run.dir to start over" if _is_auto(resume) else "use auto, best or another checkpoint"
        raise UserError(f"--resume: no readable checkpoint: {'; '.join(problems)}; {remedy}")

    def _finish(self, consequence: str = "; training continues", last: bool = False) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.wait()
        except NotWritten as error:
            self._saved = None
            if last:
                newest = next(iter(self.checkpoints.paths()), "none")
                raise TrainingFailed(f"{error}; the newest complete checkpoint is {newest}") from error
            self._log(f"{error}{consequence}")

    def _candidates(self, resume: Resume) -> list[Path]:
        """List the checkpoints to try, on the main process, so that all ranks resume from the same one."""
        if _is_auto(resume):
            paths = self.checkpoints.paths()
        elif resume == "best":
            best = self.checkpoints.best()
            paths = [] if best is None else [best]
        else:
            path = Path(os.path.abspath(str(resume)))  # ranks may have other working directories
            paths = Checkpoints(path / "checkpoints", 1).paths() or [path]
        return self.world.gather(paths)[0]

    def _examine(self, path: Path) -> Checkpoint:
        """Run `examine` on the main process and share the result with all ranks."""
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
        for name, kind in _META_TYPES.items():
            if not isinstance(found.meta.get(name), kind):
                raise BadCheckpoint(f"{path}: {name}: got {found.meta.get(name)!r}, expected {kind}")
        try:
            Progress().load_dict(found.meta["progress"])
        except TypeError as error:
            raise BadCheckpoint(f"{path}: {error}") from None
        return found

    def _load(self, found: Checkpoint) -> None:
        run, meta = self.state, found.meta
        if meta["step"] > self.total_steps:
            raise UserError(
                f"{found.path} is at step {meta['step']}, beyond the budget of {self.total_steps} steps: raise it"
            )
        tensors = run.tensors()
        if meta["teacher_step"] is None:
            tensors = {name: t for name, t in tensors.items() if not name.startswith("teacher/")}
        if missing := sorted(tensors.keys() - found.tensors.keys()):
            raise UserError(
                f"{found.path} lacks {len(missing)} tensors of this run, such as {missing[0]}: resume with the "
                "settings it was saved with"
            )
        sizes = {name: (list(found.tensors[name][0]), list(t.shape)) for name, t in tensors.items()}
        if differing := [name for name, (saved, own) in sizes.items() if saved != own]:
            saved, own = sizes[differing[0]]
            raise UserError(
                f"{found.path}: {differing[0]} is {saved}, but {own} in this run ({len(differing)} tensors differ): "
                "resume with the settings it was saved with"
            )
        moments = run.empty_optimizer_tensors(found.tensors)
        # With a different number of ranks, the order of scenes continues from rank 0's position.
        same_ranks = meta["ranks"] == self.world.size
        key = _rank_key(self.world.rank if same_ranks else 0)
        state: dict[str, Any] = {**tensors, **moments, key: ""}
        load(found, state, self.checkpoints.group)
        try:
            rank_state = json.loads(state[key])
            loader, random = rank_state["loader"], rank_state["random"]
        except (ValueError, KeyError, TypeError) as error:  # only possible without checksums
            raise BadCheckpoint(f"{found.path}: {key}: malformed ({type(error).__name__}: {error})") from None
        run.load_optimizer_tensors(moments)
        try:
            run.loader.load_state_dict(loader)
            if same_ranks:
                set_random_state(random)
        except UserError:
            raise
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise BadCheckpoint(f"{found.path}: {key}: malformed ({type(error).__name__}: {error})") from None
        if run.teacher is not None and meta["teacher_step"] is not None:
            run.teacher.step = meta["teacher_step"]
        elif run.teacher is not None:  # new in this run: start from the loaded model
            run.teacher.restart(run.model)
        run.progress.load_dict(meta["progress"])
        self._saved = run.progress.step

    def _compare(self, found: Checkpoint) -> list[str]:
        """Return a line if the run's settings changed; raise UserError for a different model or optimizer."""
        before = {**flat(TrainConfig().to_dict()), **flat(found.meta["config"])}  # an earlier version may lack keys
        now = flat(self.config.to_dict())
        changed = {
            key: f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
            for key in {**before, **now}
            if before.get(key) != now.get(key) and not key.startswith("run.") and key != "model.init"
        }
        model_changes = [text for key, text in changed.items() if key.startswith("model.") and key != "model.preset"]
        if model_changes:
            raise UserError(f"{found.path} contains a different model: {'; '.join(model_changes)}")
        if "optim.name" in changed:
            raise UserError(f"{found.path} contains the state of a different optimizer: {changed['optim.name']}")
        return [f"settings changed since the checkpoint: {'; '.join(changed.values())}"] if changed else []


def _is_auto(resume: Resume) -> bool:
    return resume is True or resume == "auto"


def _rank_key(rank: int) -> str:
    return f"rank/{rank}"
