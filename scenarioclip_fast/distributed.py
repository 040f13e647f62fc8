"""The process groups of a run, a comparison of their settings, and a watchdog for lost ranks."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.rendezvous import rendezvous

from scenarioclip_fast import __version__, forks
from scenarioclip_fast.devices import pick_device
from scenarioclip_fast.errors import TrainingFailed, UserError
from scenarioclip_fast.terminal import warn

_worlds = itertools.count()
_GRACE_S = 10.0  # time for a rank to exit by itself after another is lost
_POLL_S = 0.3  # at most, between looks at what other ranks have published
_NAMED = 3  # disagreements in a message
_LOST_STORE = "rank 0, which hosts the rendezvous store, is gone"
_SAME_COMMAND = "start all ranks with the same command and the same installation"


@dataclass(frozen=True)
class World:
    """This process's rank, device and process groups, which are None in a single-process run.

    group: for device tensors;  host: for data in host memory and for other threads
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None
    host: dist.ProcessGroup | None = None
    comparison: RankComparison | None = None

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

    def check_same(self, values: Mapping[str, Any], remedy: str = _SAME_COMMAND) -> None:
        """Compare values that must be the same on all ranks; all ranks call it, in the same order.

        Args:
            values: name -> value, of types that JSON knows; others are compared as text.
            remedy: what to do about a disagreement.

        Raises:
            UserError: a value differs between ranks. Every rank raises the same error.
            TrainingFailed: another rank has failed.
        """
        if self.comparison is not None:
            self.comparison.check(values, remedy)


def world_size() -> int:
    """The number of ranks that torchrun started; 1 without it.

    Raises:
        UserError: WORLD_SIZE is not a number above 0.
    """
    size = _from_environment("WORLD_SIZE", 1)
    if not size:
        raise UserError("WORLD_SIZE: got 0, expected a number above 0, as torchrun sets it")
    return size


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise UserError(f"{name}: got {value!r}, expected a number, as torchrun sets it")
    return int(value)


@contextmanager
def join_world(
    device: str, timeout_s: float = 600.0, *, setting: str = "device", same: Mapping[str, Any] | None = None
) -> Iterator[World]:
    """Join the world described by torchrun's variables or an initialised process group; leave it on exit.

    If a rank dies, never joins or is silent for `timeout_s`, the other ranks end: with TrainingFailed, which gives the
    cause, or, if blocked in a collective, with one error line and exit code 1.

    Args:
        device: see `pick_device`; on several ranks "cuda" is the GPU numbered LOCAL_RANK.
        timeout_s: as above, in seconds.
        setting: what an error calls the device.
        same: values that must be the same on all ranks (see `World.check_same`), compared before the first collective.

    Raises:
        UserError: no such device, ranks that disagree, or two processes with the same RANK.
        TrainingFailed: another rank has failed or never joined.
    """
    size = dist.get_world_size() if dist.is_initialized() else world_size()
    if size == 1:
        target = _own_device(device, setting, size)
        # Random numbers and the synchronisation of checkpoint copies use the current device.
        with torch.cuda.device(target) if target.type == "cuda" else nullcontext():
            yield World(0, 1, target, None)
        return
    if dist.is_initialized():  # by a launcher that monitors the ranks itself
        target = _own_device(device, setting, size)
        store = PrefixStore(f"world-{next(_worlds)}", _get_default_store())
        comparison = RankComparison(store, dist.get_rank(), size, timeout_s)
        comparison.check(_identity(size, target) | dict(same or {}), _SAME_COMMAND)
        yield _world(target, timeout_s, comparison)
        return
    shared, rank = _rendezvous(size, timeout_s)
    store = _store_of_this_start(PrefixStore(f"world-{next(_worlds)}", shared), rank, timeout_s)
    watchdog = RankWatchdog(store, rank, size, timeout_s)
    failed = True
    origin = forks.Origin()
    try:
        if not 0 <= rank < size:
            given = os.environ["RANK"]
            raise UserError(f"RANK: got {given}, expected 0 to {size - 1}, as WORLD_SIZE is {size}")
        if store.add(f"joined/{rank}", 1) > 1:
            raise UserError(f"two processes have RANK={rank}: start the ranks with torchrun")
        target = _own_device(device, setting, size)  # in here, so that its error reaches the other ranks
        comparison = RankComparison(store, rank, size, timeout_s)
        comparison.check(_identity(size, target) | dict(same or {}), _SAME_COMMAND)
        dist.init_process_group(
            "nccl" if target.type == "cuda" else "gloo",
            store=PrefixStore("collectives", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=target if target.type == "cuda" else None,
        )
        world = _world(target, timeout_s, comparison)
        yield world
        watchdog.stop()
        world.barrier()  # no rank leaves while another still monitors its heartbeat
        failed = False
    except BaseException as error:
        if not origin.is_here:  # the failure of a forked process is not this rank's
            raise
        if isinstance(error, RuntimeError) and not isinstance(error, TrainingFailed) and _is_collective_error(error):
            raise TrainingFailed(f"rank {rank} cannot continue: {watchdog.diagnose(error)}") from error
        watchdog.announce(f"rank {rank} ended with {type(error).__name__}: {_first_line(error)}")
        raise
    finally:
        if origin.is_here:
            if dist.is_initialized():
                dist.destroy_process_group()  # NCCL may wait for lost ranks here; the watchdog bounds the wait
            watchdog.stop()
            if failed:
                watchdog.linger()


def _own_device(device: str, setting: str, size: int) -> torch.device:
    """Return this rank's device; a GPU becomes the current one if there are several ranks."""
    target = pick_device(device, setting)
    if target.type == "cuda":
        local = _from_environment("LOCAL_RANK", 0)
        target = pick_device(f"cuda:{local if size > 1 else target.index or 0}", setting)
        if size > 1:
            torch.cuda.set_device(target)
    return target


def _identity(size: int, device: torch.device) -> dict[str, Any]:
    """What any two ranks must have in common.

    The minor version of Python counts because ranks exchange pickles, whose contents depend on it.
    """
    return {
        "WORLD_SIZE": size,
        "scenarioclip-fast": __version__,
        "torch": str(torch.__version__),
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "the type of the device": device.type,
    }


def _world(device: torch.device, timeout_s: float, comparison: RankComparison) -> World:
    # Separate groups: collectives of the loss, of the gradient buckets and of the checkpoint thread must not
    # interleave.
    timeout = timedelta(seconds=timeout_s)
    # The loss exchanges sizes and ids in host memory, so that nothing waits for the device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    groups = [dist.new_group(timeout=timeout, backend=name) for name in (backend, "gloo")]
    return World(dist.get_rank(), dist.get_world_size(), device, groups[0], groups[1], comparison)


def _rendezvous(size: int, timeout_s: float) -> tuple[Store, int]:
    """Return the store of the rendezvous and this process's rank; -1 if RANK is not a number."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"WORLD_SIZE is {size}, but {name} is not set: start the ranks with torchrun")
    if _from_environment("MASTER_PORT", 0) >= 2**16:
        raise UserError(f"MASTER_PORT: got {os.environ['MASTER_PORT']}, expected at most {2**16 - 1}")
    try:
        rank = int(os.environ["RANK"])
    except ValueError:
        rank = -1  # which `join_world` rejects once the other ranks can learn of it
    try:
        # Not to wait for the other ranks here: `RankComparison` does, and notices ranks with another WORLD_SIZE.
        store, *_ = next(rendezvous(f"env://?world_size=1&rank={rank}", timeout=timedelta(seconds=timeout_s)))
    except dist.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise TrainingFailed(f"the rendezvous of {size} ranks at {address} failed: {_first_line(error)}") from None
    return store, rank


def _store_of_this_start(shared: Store, rank: int, timeout_s: float) -> PrefixStore:
    """Return a part of the store that only the ranks started together use.

    A store that torchrun hosts survives a restart of the ranks, with the keys of those that have ended. Nothing that
    torchrun tells a rank identifies the restart on all nodes: each node counts its own. So rank 0 publishes a random
    prefix, and the others recognise that of a running rank 0 by its heartbeat.
    """
    if rank == 0:
        start = uuid.uuid4().hex
        shared.set("start", start)
        return PrefixStore(start, shared)
    beats: dict[str, int] = {}  # of each prefix, when it was first seen
    end = time.monotonic() + timeout_s
    try:
        while time.monotonic() < end:
            if shared.check(["start"]):
                start = shared.get("start").decode()
                store = PrefixStore(start, shared)
                beat = store.add("beat/0", 0)
                if beat > beats.setdefault(start, beat):
                    return store
            time.sleep(_POLL_S / 3)
    except RuntimeError:
        raise TrainingFailed(f"rank {rank} cannot continue: {_LOST_STORE}") from None
    raise TrainingFailed(f"rank {rank} cannot continue: rank 0 has not joined after {timeout_s:g} s")


class RankComparison:
    """Compares values between the ranks through their store, before there is any process group.

    Every rank publishes JSON and its digest, and reads the digests of all ranks; values are read only if these differ.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self._store, self._rank, self._size, self._timeout_s = store, rank, size, timeout_s
        self._round = 0

    def check(self, values: Mapping[str, Any], remedy: str) -> None:
        """See `World.check_same`."""
        # Plain JSON, so that ranks with different versions of the package understand one another.
        record = json.dumps(values, sort_keys=True, default=str)
        prefix = f"compared-{self._round}"
        self._store.set(f"{prefix}/values/{self._rank}", json.dumps(values, default=str))
        self._store.set(f"{prefix}/digest/{self._rank}", hashlib.sha256(record.encode()).hexdigest())
        end = time.monotonic() + self._timeout_s
        first = self._read(f"{prefix}/digest", 0, end)
        for rank in range(1, self._size):
            # Rank by rank, since with different values of WORLD_SIZE some may never come.
            if self._read(f"{prefix}/digest", rank, end) != first:
                ours, theirs = (json.loads(self._read(f"{prefix}/values", r, end)) for r in (0, rank))
                raise UserError(f"ranks disagree: {_differences(ours, theirs, rank)}: {remedy}")
        self._round += 1

    def _read(self, prefix: str, rank: int, end: float) -> str:
        key, pause = f"{prefix}/{rank}", 0.001
        while True:  # not Store.wait, whose every timeout torch logs in two lines
            failed = self._store.check(["cause"])  # by the RankWatchdog of another rank, which may have published first
            if self._store.check([key]):
                return str(self._store.get(key).decode())
            if failed:
                cause = self._store.get("cause").decode()
            elif time.monotonic() > end:
                late = "has not joined" if self._round == 0 else "has not finished its preparations"
                cause = f"rank {rank} {late} after {self._timeout_s:g} s"
            else:
                time.sleep(pause)
                pause = min(1.5 * pause, _POLL_S)
                continue
            raise TrainingFailed(f"rank {self._rank} cannot continue: {cause}")


def _differences(first: Mapping[str, Any], other: Mapping[str, Any], rank: int) -> str:
    """Name the values of rank 0 that differ on another rank."""
    absent = object()

    def shown(values: Mapping[str, Any], key: str) -> str:
        value = values.get(key, absent)
        return "absent" if value is absent else value if isinstance(value, str) else json.dumps(value)

    keys = [key for key in {**first, **other} if first.get(key, absent) != other.get(key, absent)]
    named = [f"{key} is {shown(first, key)} on rank 0 and {shown(other, key)} on rank {rank}" for key in keys[:_NAMED]]
    more = len(keys) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more else "")


class RankWatchdog:
    """A thread that detects dead and hung ranks by heartbeats: counters in the store that every rank increments.

    Each rank monitors the next one. A rank that finds it silent for `timeout_s`, or whose collective fails, announces
    the cause in the store, where the others read it. If a rank's main thread does not exit then, this thread ends the
    process.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # not in the stub
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._interval_s = min(2.0, timeout_s / 8)
        self._stopped = threading.Event()
        self._diagnosed = False
        self._dead = 0
        self._thread = threading.Thread(target=self._run, name="rank watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def announce(self, cause: str) -> str:
        """Announce why this rank ends; return the first announcement made by any rank."""
        try:
            return str(self._store.compare_set("cause", "", cause).decode())
        except RuntimeError:  # the store is already closed
            return cause

    def linger(self) -> None:
        """Keep the store, which rank 0 may host, available while the other ranks end for the same reason."""
        try:
            self._store.add("left", 1)
            end = time.monotonic() + 4 * self._interval_s
            others_remain = self._rank == 0
            while others_remain and time.monotonic() < end:
                self._store.add("beat/0", 1)  # for ranks that start late
                others_remain = self._store.add("left", 0) < self._size - self._dead
                time.sleep(0.05)
        except RuntimeError:
            return

    def diagnose(self, error: BaseException) -> str:
        """Determine from the heartbeats why a collective failed."""
        self._diagnosed = True
        try:
            if (cause := self._cause()) is None:
                before = self._heartbeats()
                time.sleep(3 * self._interval_s)
                cause = self._cause()
            if cause is None:
                after = self._heartbeats()
                silent = [str(r) for r in range(self._size) if before[r] == after[r] and r != self._rank]
                self._dead = len(silent)
                reason = (
                    f"rank {', '.join(silent)} is gone"
                    if silent
                    else "all ranks are alive, but one is stuck or far behind"
                )
                cause = self.announce(f"{reason} ({_first_line(error)})")
        except RuntimeError:
            return _LOST_STORE
        return cause

    def _heartbeats(self) -> list[int]:
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self._size)]

    def _cause(self) -> str | None:
        return str(self._store.get("cause").decode()) if self._store.check(["cause"]) else None

    def _run(self) -> None:
        watched = (self._rank + 1) % self._size
        seen, since = 0, time.monotonic()
        cause: str | None = None
        # By the first beats of rank 0, the others find their part of the store.
        interval_s = self._interval_s if self._rank else min(self._interval_s, _POLL_S)
        while cause is None and not self._stopped.wait(interval_s):
            try:
                self._store.add(f"beat/{self._rank}", 1)
                beat, now = self._store.add(f"beat/{watched}", 0), time.monotonic()
                if beat != seen:
                    seen, since = beat, now
                elif now - since > self._timeout_s:
                    joined = self._store.check([f"joined/{watched}"])
                    late = "sent no heartbeat for" if joined else "not joined in"
                    self.announce(f"rank {watched} has {late} {now - since:.0f} s")
                cause = self._cause()
            except RuntimeError:
                cause = _LOST_STORE
        # The main thread is probably blocked in a collective with the lost rank, which may never fail by itself.
        if cause is None or self._stopped.wait(_GRACE_S):
            return
        if not self._diagnosed:
            warn(f"error: rank {self._rank} cannot continue: {cause}")
        os._exit(1)


def _is_collective_error(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors that contain the names of its source files."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
