"""Who this process is among the ranks of a run."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from scenarioclip_fast.errors import TrainingFailed, UserError

_worlds = itertools.count()
_GRACE_S = 10.0  # for a rank to end by itself once another is lost


@dataclass(frozen=True)
class World:
    """One rank's place and device. Both groups are None when the run is one process.

    group: for tensors on the device;  host: for what lies in host memory, and for use by other threads
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None
    host: dist.ProcessGroup | None = None

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def mean_(self, values: Tensor) -> Tensor:
        """The mean over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
            values /= self.size
        return values

    def sum_(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in place; `values` lies on the run's device."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)


@contextmanager
def join_world(device: str, timeout_s: float = 600.0) -> Iterator[World]:
    """The world that torchrun's variables or an initialised process group describe, left again at the end.

    A rank that dies, does not appear, or is silent for `timeout_s`, ends the others: with TrainingFailed, which says
    what happened, or, where one waits for the dead rank and cannot be told, with one line and exit code 1.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, local, several=size > 1)
    if size == 1:
        # What names no device means this one: its random numbers, the wait for a checkpoint's copies.
        with torch.cuda.device(chosen) if chosen.type == "cuda" else nullcontext():
            yield World(0, 1, chosen, None)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if dist.is_initialized():  # by someone who looks after the ranks
        yield _world(chosen, timeout_s)
        return
    store, rank = _meet(size, timeout_s)
    watch = RankWatch(store, rank, size, timeout_s)
    failed = True
    try:
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=PrefixStore("collectives", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=chosen if chosen.type == "cuda" else None,
        )
        world = _world(chosen, timeout_s)
        yield world
        watch.stop()
        world.barrier()  # nobody leaves while another still listens for its heart
        failed = False
    except BaseException as error:
        if isinstance(error, RuntimeError) and not isinstance(error, TrainingFailed) and _is_of_collectives(error):
            raise TrainingFailed(f"rank {rank} cannot go on: {watch.diagnose(error)}") from error
        watch.announce(f"rank {rank} ended with {type(error).__name__}: {_first_line(error)}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # NCCL's may wait for lost ranks: under the watch, which bounds it
        watch.stop()
        if failed:
            watch.linger()


def _world(device: torch.device, timeout_s: float) -> World:
    # Groups of their own: the loss's collectives must not interleave with those of the gradients' buckets, nor
    # those of the thread that writes checkpoints with either.
    timeout = timedelta(seconds=timeout_s)
    # The loss's takes sizes and ids from host to host, so that nothing waits for the device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    groups = [dist.new_group(timeout=timeout, backend=name) for name in (backend, "gloo")]
    return World(dist.get_rank(), dist.get_world_size(), device, *groups)


def _meet(size: int, timeout_s: float) -> tuple[Store, int]:
    """The store where the ranks find one another, and this process's rank."""
    try:
        store, rank, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    except ValueError as error:  # a variable is missing
        what = _first_line(error).rpartition("rendezvous: ")[2]
        raise UserError(f"WORLD_SIZE is {size}, but {what}: start the ranks with torchrun") from None
    except dist.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise TrainingFailed(f"the {size} ranks did not meet at {address}: {_first_line(error)}") from None
    # The store may outlive a world: under torchrun it is that of the whole job.
    return PrefixStore(f"world-{next(_worlds)}", store), rank


class RankWatch:
    """Notices ranks that have died or hang, in a thread, by counters in the store that every rank keeps counting up.

    Each rank watches the next one; who finds one silent for `timeout_s`, or has a collective fail, writes down what
    happened, and all others read it. A rank whose main thread does not end on that account is ended by the thread.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # not in the stub
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._every = min(2.0, timeout_s / 8)
        self._stopped = threading.Event()
        self._told = False
        self._gone = 0
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def announce(self, news: str) -> str:
        """Tells the other ranks why this one ends; returns what was told first."""
        try:
            return str(self._store.compare_set("news", "", news).decode())
        except RuntimeError:  # the store has gone first
            return news

    def linger(self) -> None:
        """Leaves the store, which rank 0 may hold, to the others for a while: they end for the same reason."""
        try:
            self._store.add("left", 1)
            end = time.monotonic() + 4 * self._every
            others_are_there = self._rank == 0
            while others_are_there and time.monotonic() < end:
                others_are_there = self._store.add("left", 0) < self._size - self._gone
                time.sleep(0.05)
        except RuntimeError:
            return

    def diagnose(self, error: BaseException) -> str:
        """Why a collective has failed, as far as the ranks' hearts tell."""
        self._told = True
        try:
            if (news := self._news()) is None:
                before = self._beats()
                time.sleep(3 * self._every)
                news = self._news()
            if news is None:
                after = self._beats()
                silent = [str(r) for r in range(self._size) if before[r] == after[r] and r != self._rank]
                self._gone = len(silent)
                what = (
                    f"rank {', '.join(silent)} is gone" if silent else "all ranks live, but one is stuck or far behind"
                )
                news = self.announce(f"{what} ({_first_line(error)})")
        except RuntimeError:
            return self._lost_store()
        return news

    def _beats(self) -> list[int]:
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self._size)]

    def _news(self) -> str | None:
        return str(self._store.get("news").decode()) if self._store.check(["news"]) else None

    def _lost_store(self) -> str:
        return "rank 0, which holds the rendezvous, is gone"

    def _run(self) -> None:
        watched = (self._rank + 1) % self._size
        seen, since = 0, time.monotonic()
        news: str | None = None
        while news is None and not self._stopped.wait(self._every):
            try:
                self._store.add(f"beat/{self._rank}", 1)
                beat, now = self._store.add(f"beat/{watched}", 0), time.monotonic()
                if beat != seen:
                    seen, since = beat, now
                elif now - since > self._timeout_s:
                    self.announce(f"rank {watched} has not been heard of for {now - since:.0f} s")
                news = self._news()
            except RuntimeError:
                news = self._lost_store()
        # The main thread most likely waits for the lost rank: its collective fails by itself, or never.
        if news is None or self._stopped.wait(_GRACE_S):
            return
        if not self._told:
            print(f"error: rank {self._rank} cannot go on: {news}", file=sys.stderr, flush=True)
        os._exit(1)


def _is_of_collectives(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors that name its source files."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _device(name: str, local: int, several: bool) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"run.device: got {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"run.device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"run.device: got {name!r}, but torch sees no CUDA device; set run.device=cpu or auto")
        index = local if several else device.index or 0
        if index >= torch.cuda.device_count():
            raise UserError(f"run.device: wants GPU {index}, but torch sees {torch.cuda.device_count()} of them")
        device = torch.device("cuda", index)
    return device
