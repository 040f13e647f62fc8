"""The process groups of a run, and a watch that ends it when a rank is lost."""

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
_GRACE_S = 10.0  # for a rank to end on its own once another is lost


@dataclass(frozen=True)
class World:
    """A process's rank and device. Both groups are None in a run of one process.

    group: for tensors on the device;  host: for data in host memory, and for use by other threads
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
        """Average over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
            values /= self.size
        return values

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place; `values` is on the run's device."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, value: Any) -> list[Any]:
        """All ranks' picklable values, on every rank."""
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
    """Join the world that torchrun's variables or an initialised process group describe; leave it at the end.

    A rank that dies, does not appear, or is silent for `timeout_s` ends the others: with TrainingFailed, which says
    what happened, or, where a rank is blocked in a collective, with one line and exit code 1.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, local, several=size > 1)
    if size == 1:
        # The current device, for calls without one: random numbers, synchronisation of a checkpoint's copies.
        with torch.cuda.device(chosen) if chosen.type == "cuda" else nullcontext():
            yield World(0, 1, chosen, None)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if dist.is_initialized():  # by a launcher that watches the ranks
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
        world.barrier()  # no rank leaves while another still watches its heartbeat
        failed = False
    except BaseException as error:
        if isinstance(error, RuntimeError) and not isinstance(error, TrainingFailed) and _is_collective_error(error):
            raise TrainingFailed(f"rank {rank} cannot continue: {watch.diagnose(error)}") from error
        watch.announce(f"rank {rank} ended with {type(error).__name__}: {_first_line(error)}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # NCCL may wait for lost ranks here; the watch bounds that
        watch.stop()
        if failed:
            watch.linger()


def _world(device: torch.device, timeout_s: float) -> World:
    # Separate groups: the loss's collectives must not interleave with those of the gradient buckets, nor those of the
    # checkpoint thread with either.
    timeout = timedelta(seconds=timeout_s)
    # The loss exchanges sizes and ids in host memory, so that nothing waits for the device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    groups = [dist.new_group(timeout=timeout, backend=name) for name in (backend, "gloo")]
    return World(dist.get_rank(), dist.get_world_size(), device, *groups)


def _meet(size: int, timeout_s: float) -> tuple[Store, int]:
    """The store of the rendezvous, and this process's rank."""
    try:
        store, rank, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    except ValueError as error:  # a variable is missing
        reason = _first_line(error).rpartition("rendezvous: ")[2]
        raise UserError(f"WORLD_SIZE is {size}, but {reason}: start the ranks with torchrun") from None
    except dist.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise TrainingFailed(f"the {size} ranks did not meet at {address}: {_first_line(error)}") from None
    # The store may outlive a world: under torchrun it belongs to the whole job.
    return PrefixStore(f"world-{next(_worlds)}", store), rank


class RankWatch:
    """A thread that detects dead and hung ranks by heartbeats: counters in the store that every rank increments.

    Each rank watches the next one. A rank that finds it silent for `timeout_s`, or has a collective fail, announces
    what happened in the store, where the others read it. If a rank's main thread does not end then, this one ends it.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # not in the stub
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._every = min(2.0, timeout_s / 8)
        self._stopped = threading.Event()
        self._reported = False
        self._gone = 0
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def announce(self, news: str) -> str:
        """Announce why this rank ends; returns the first announcement of all ranks."""
        try:
            return str(self._store.compare_set("news", "", news).decode())
        except RuntimeError:  # the store is gone already
            return news

    def linger(self) -> None:
        """Keep the store, which rank 0 may hold, available to the other ranks while they end for the same reason."""
        try:
            self._store.add("left", 1)
            end = time.monotonic() + 4 * self._every
            others_remain = self._rank == 0
            while others_remain and time.monotonic() < end:
                others_remain = self._store.add("left", 0) < self._size - self._gone
                time.sleep(0.05)
        except RuntimeError:
            return

    def diagnose(self, error: BaseException) -> str:
        """Why a collective has failed, judging by the heartbeats."""
        self._reported = True
        try:
            if (news := self._news()) is None:
                before = self._beats()
                time.sleep(3 * self._every)
                news = self._news()
            if news is None:
                after = self._beats()
                silent = [str(r) for r in range(self._size) if before[r] == after[r] and r != self._rank]
                self._gone = len(silent)
                reason = (
                    f"rank {', '.join(silent)} is gone"
                    if silent
                    else "all ranks are alive, but one is stuck or far behind"
                )
                news = self.announce(f"{reason} ({_first_line(error)})")
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
                    self.announce(f"rank {watched} has sent no heartbeat for {now - since:.0f} s")
                news = self._news()
            except RuntimeError:
                news = self._lost_store()
        # The main thread is probably blocked in a collective with the lost rank, which fails by itself or never.
        if news is None or self._stopped.wait(_GRACE_S):
            return
        if not self._reported:
            print(f"error: rank {self._rank} cannot continue: {news}", file=sys.stderr, flush=True)
        os._exit(1)


def _is_collective_error(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors that contain the names of its source files."""
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
            raise UserError(f"run.device: got GPU {index}, but torch sees {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", index)
    return device
