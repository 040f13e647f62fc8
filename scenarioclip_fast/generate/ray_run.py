"""Runs stages on a Ray cluster: Ray Data streams the units through a pool of actors per stage.

Records go straight to the directory of the run, which all nodes must see, as one atomically renamed file per unit and
stage. A row of the dataset holds a unit and what the stages reported. Since a repeated unit that is finished is left as
it is, any worker or node may die. Errors of a stage travel in the row, so that they arrive as they were raised.
"""

from __future__ import annotations

import contextlib
import logging
import math
import pickle
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.images import Unit
from scenarioclip_fast.ray_connection import RayConnection, await_files, dump_error
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import get_logger

if TYPE_CHECKING:
    from scenarioclip_fast.generate.pipeline import Job, StageReport

Attempt = Callable[["Job", Unit], "tuple[StageReport, Exception | None]"]

_SERVER_ACTORS = 4


@dataclass(frozen=True)
class Pool:
    """The actors of a stage."""

    low: int
    high: int
    cpus: float
    gpus: float


def plan_pools(jobs: Sequence[Job], cpus: float, gpus: float, units: int) -> list[Pool]:
    """Divide a cluster between the stages of a pass.

    Stages with models get equal numbers of GPUs, and those of a stage that has finished go to the others; if there are
    fewer GPUs than stages, stages share them.

    Args:
        cpus, gpus: of the cluster.
        units: units of work, which bound the number of actors.

    Raises:
        UserError: GPUs were asked for, and the cluster has none.
    """
    options = jobs[0].config.ray
    if not gpus and any(job.uses_gpu and job.device == "cuda" for job in jobs):
        raise UserError("device: got cuda, but the nodes of the Ray cluster offer no GPUs; use auto or cpu")
    on_gpu = [job.uses_gpu and gpus > 0 for job in jobs]
    part = options.gpus or 1 / math.ceil(sum(on_gpu) / max(1, int(gpus)) or 1)
    part = math.floor(part * 100) / 100 if part < 1 else part
    slots = int(int(1 / part) * gpus if part < 1 else gpus / part)
    if any(on_gpu) and not slots:
        raise UserError(f"ray.gpus: got {options.gpus:g}, but the nodes of the Ray cluster offer {gpus:g} GPUs")
    n_gpu, n_cpu = sum(on_gpu), len(jobs) - sum(on_gpu)
    free = max(0, int(cpus / options.cpus) - (slots if n_gpu else 0))
    pools = []
    for job, gpu in zip(jobs, on_gpu, strict=True):
        if chosen := getattr(options, job.name):
            low = high = chosen
        elif gpu:
            low, high = slots // n_gpu, slots - n_gpu + 1
        else:
            low, high = free // n_cpu, free - n_cpu + 1
        if job.is_remote and not chosen:
            low = high = min(_SERVER_ACTORS, job.config.caption.concurrency)
        low = max(1, min(low, units))
        pools.append(Pool(low, max(low, min(high, units)), options.cpus, part if gpu else 0.0))
    needed = sum(pool.low * pool.cpus for pool in pools)
    if needed > cpus:  # halved, because the CPUs of a node cannot always be divided without a rest
        each = max(0.01, math.floor(50 * cpus / sum(pool.low for pool in pools)) / 100)
        pools = [replace(pool, high=pool.low, cpus=each) for pool in pools]
    return pools


class StageActor:
    """A stage in an actor, which keeps its model. Ray starts it anew, and repeats its unit, whenever its process dies.

    Args:
        job: with the id of the run as `attempt`; each process adds an id of its own.
        previous: directory of the records that another actor of this run has just written.
        attempt: runs a stage on a unit.
    """

    def __init__(self, job: Job, previous: Path | None, attempt: Attempt) -> None:
        self.run, self.previous, self.attempt = job.attempt, previous, attempt
        self.job = replace(job, attempt=self.run + uuid.uuid4().hex[:8])

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Run the stage on the unit of a row, unless a stage before could not."""
        if row["error"]:
            return row
        unit: Unit = pickle.loads(row["unit"])
        if self.previous:
            await_files([self.previous / unit.file_name])
        # A file per process and unit, which remains if the process dies: `UnitFile` appends to it.
        name = f"{unit.file_name}.partial-"
        trace = self.job.records / f"{name}{self.job.attempt}"
        died = sum(path != trace for path in self.job.records.glob(f"{name}{self.run}*"))
        if died > self.job.config.ray.retries:
            error = UserError(
                f"{self.job.name}: the worker of unit {unit.number} ({unit.items[0].name}, ...) died {died} times, for "
                "lack of memory or by a crash, see Ray's logs; nothing is lost: correct the cause and re-run the "
                "command"
            )
            return {**row, "error": dump_error(error)}
        self.job.records.mkdir(parents=True, exist_ok=True)
        trace.touch()
        report, failure = self.attempt(self.job, unit)
        if failure is None:
            trace.unlink(missing_ok=True)
        reports = pickle.dumps([*pickle.loads(row["reports"]), report])
        return {**row, "reports": reports, "error": b"" if failure is None else dump_error(failure)}


class RayCluster(RayConnection):
    """A Ray cluster that runs stages.

    Args:
        address: see `pipeline.generate`.
        directory: of the run.
        images: paths of images, which all nodes must see too if this one does.

    Raises:
        MissingDependencyError: Ray is not installed.
        UserError: there is no cluster, or a node has another version of the package or does not see the directory.
    """

    def __init__(self, address: str, directory: Path, images: Sequence[str]) -> None:
        super().__init__(address, directory, images, "the images")
        self._data = require("ray.data")

    def _prepare(self, stack: contextlib.ExitStack) -> None:
        stack.enter_context(self._quiet())

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Leave Ray Data's messages to its log file, and progress to `progress`."""
        context = self._data.DataContext.get_current()
        settings = {
            "enable_progress_bars": False,
            "print_on_execution_start": False,
            "execution_no_progress_timeout_s": -1,  # a unit may take long
            "max_consecutive_actor_init_deaths": 3,
        }
        before = {name: getattr(context, name) for name in settings if hasattr(context, name)}
        handlers = [
            (handler, handler.level)
            for handler in get_logger("ray.data").handlers
            if type(handler).__name__ == "PlainRayHandler"
        ]
        for name in before:
            setattr(context, name, settings[name])
        for handler, _ in handlers:
            handler.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(context, name, value)
            for handler, level in handlers:
                handler.setLevel(level)

    def run(
        self, jobs: Sequence[Job], units: Sequence[Unit], attempt: Attempt
    ) -> Generator[tuple[list[StageReport], Exception | None], None, None]:
        """Run stages on units; yields what they did per unit, in the order in which the units are finished.

        The last report belongs to the stage that raised the error, if there is one.

        Raises:
            UserError: the cluster is lost.
        """
        if not units:
            return
        with self.one_line():
            nodes = [node["Resources"] for node in self.nodes()]
            total = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
            pools = plan_pools(jobs, total["CPU"], total["GPU"], len(units))
            rows = [{"unit": pickle.dumps(unit), "reports": pickle.dumps([]), "error": b""} for unit in units]
            dataset = self._data.from_items(rows, override_num_blocks=len(rows))
            run, previous = uuid.uuid4().hex[:8], None
            for job, pool in zip(jobs, pools, strict=True):
                dataset = dataset.map(
                    StageActor,
                    fn_constructor_args=(replace(_share(job, pool.high), attempt=run), previous, attempt),
                    compute=self._data.ActorPoolStrategy(min_size=pool.low, max_size=pool.high),
                    num_cpus=pool.cpus,
                    num_gpus=pool.gpus,
                )
                previous = job.records
            finished = []
            with contextlib.closing(iter(dataset.iter_rows())) as done:  # stops the actors
                for row in done:
                    unit = pickle.loads(row["unit"])
                    finished += [] if row["error"] else [job.records / unit.file_name for job in jobs]
                    yield pickle.loads(row["reports"]), pickle.loads(row["error"]) if row["error"] else None
            await_files(finished)


def _share(job: Job, actors: int) -> Job:
    """Divide the requests in flight between the actors."""
    if not job.is_remote:
        return job
    caption = replace(job.config.caption, concurrency=math.ceil(job.config.caption.concurrency / actors))
    return replace(job, config=replace(job.config, caption=caption))
