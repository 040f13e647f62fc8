"""The directory of a run: locked for one run, with a checkpoint folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from scenarioclip_fast.data.shards import is_packed
from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.train.checkpoint import Checkpoints
from scenarioclip_fast.train.config import TrainConfig


def checkpoints_of(config: TrainConfig, world: World) -> Checkpoints:
    """Return the checkpoint folder of a run."""
    return Checkpoints(Path(config.run.dir) / "checkpoints", config.train.keep_checkpoints, world.host)


@contextmanager
def open_run_dir(config: TrainConfig, world: World, resume: bool) -> Iterator[None]:
    """Create run.dir, lock it for this run and remove what killed writers left there."""
    checkpoints = checkpoints_of(config, world)
    if not resume and checkpoints.paths():
        raise UserError(
            f"{config.run.dir} contains checkpoints of an earlier run: continue with --resume, or set another run.dir"
        )
    if is_packed(config.run.dir):
        raise UserError(f"run.dir: {config.run.dir} is a packed data set: choose another directory")
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
    """Hold a lock until the descriptor is closed: two runs would mix metrics and delete each other's checkpoints."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"run.dir: another process is training in {name}: wait for it, or set another run.dir"
        ) from None
    except OSError:  # some network file systems do not support locks
        return
