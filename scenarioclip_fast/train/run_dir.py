"""The directory of a run: locked for one run, with a checkpoint folder."""

from __future__ import annotations

import fcntl
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from scenarioclip_fast.data.shards import is_packed
from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.train.checkpoint import Checkpoints
from scenarioclip_fast.train.config import TrainConfig

_PROBE = ".shared-"
_SEEN_WITHIN_S = 5.0  # network file systems may show a new file late


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
    run_dir = Path(config.run.dir)
    probe = run_dir / f"{_PROBE}{world.gather(uuid.uuid4().hex)[0]}"
    with ExitStack() as stack:
        if world.is_main_process:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                directory = os.open(config.run.dir, os.O_RDONLY | os.O_DIRECTORY)
                stack.callback(os.close, directory)
                _lock(directory, config.run.dir)
                checkpoints.sweep()
                for left in run_dir.glob(f"{_PROBE}*"):
                    with suppress(OSError):
                        left.unlink()
                if world.size > 1:
                    probe.touch()
            except OSError as error:
                raise UserError(f"run.dir: cannot write to {config.run.dir}: {error.strerror}") from None
        world.barrier()
        if world.size > 1:
            _check_shared(probe, world)
        yield


def _check_shared(probe: Path, world: World) -> None:
    """Raise UserError, on every rank, if a rank does not see the file that rank 0 has created in run.dir."""
    end = time.monotonic() + _SEEN_WITHIN_S
    while not (seen := probe.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    hosts = world.gather(None if seen else socket.gethostname())
    if world.is_main_process:
        probe.unlink(missing_ok=True)
    if blind := [rank for rank, host in enumerate(hosts) if host is not None]:
        more = f" (nor do {len(blind) - 1} more ranks)" if len(blind) > 1 else ""
        raise UserError(
            f"run.dir: rank {blind[0]} on {hosts[blind[0]]} does not see what rank 0 writes to {probe.parent}{more}: "
            "expected a directory on a file system shared by all hosts"
        )


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
