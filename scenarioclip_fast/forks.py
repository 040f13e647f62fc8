"""What forked processes do about threads, locks and descriptors of their parent.

A fork copies only the thread that calls it. In the child, work that was queued for a pool is never done, a lock that
another thread held is never released, and a `flock` is shared with the parent. So:

- an object that owns such things is registered here, and its `_after_fork` replaces them in the child;
- what cannot be replaced (an iteration under way, the threads of a library) has an `Origin`, whose `check` raises
  ForkedError at once in the child;
- OpenMP's threads, which PyTorch and the kernels on a CPU use, are ended before a fork and start again when needed, in
  parent and child: GNU's OpenMP waits for them forever otherwise;
- a fork waits for imports in other threads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

_OMP_PAUSE_HARD = 2  # omp_pause_hard of omp.h: end the threads
_IMPORT_S = 10.0  # at most; an import may itself wait for the thread that forks

_generation = 0  # forks between the first process that imported this and this one


class ForkedError(RuntimeError):
    """Something that a fork does not survive was used in the child."""


class _Owner(Protocol):
    def _after_fork(self) -> None:
        """Replace threads and locks, without waiting for anything; called in the child, which has one thread."""


_owners: weakref.WeakSet[Any] = weakref.WeakSet()


def register(owner: _Owner) -> None:
    """Call `owner._after_fork()` in forked processes, as long as the owner exists."""
    _owners.add(owner)


class Lock:
    """A lock that is free in forked processes, whichever thread held it."""

    def __init__(self) -> None:
        self._after_fork()
        register(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


class Origin:
    """The process that created an object."""

    def __init__(self) -> None:
        self._generation = _generation

    @property
    def is_here(self) -> bool:
        """Whether it is this process."""
        return self._generation == _generation

    def check(self, what: str, remedy: str) -> None:
        """Raise ForkedError in a fork of that process."""
        if not self.is_here:
            raise ForkedError(f"{what} was started before this process was forked and lost its threads: {remedy}")


def keep(thing: object) -> None:
    """Never destroy an object: the destructors of some libraries wait for their threads."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


@functools.cache
def _end_openmp_threads() -> Callable[[int], int] | None:
    """Return OpenMP's function that ends the threads of the calling thread; None without it (before OpenMP 5)."""
    import torch

    try:
        found: Callable[[int], int] = ctypes.CDLL(
            str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")
        ).omp_pause_resource_all
    except (OSError, AttributeError):
        return None
    return found


def _wait_for_imports() -> None:
    """Wait until no other thread imports a module: in the child, its lock would be held forever.

    PyTorch imports its compiler, which takes a second, at the first call of an op. CPython frees only the global import
    lock in the child; the locks of modules are private to importlib.
    """
    locks = getattr(importlib._bootstrap, "_module_locks", {})
    end = time.monotonic() + _IMPORT_S
    while time.monotonic() < end:
        owners = {getattr(reference(), "owner", None) for reference in list(locks.values())}
        if owners <= {None, threading.get_ident()}:
            return
        time.sleep(0.001)


def _before_fork() -> None:
    _wait_for_imports()
    if "torch._C" in sys.modules and (end := _end_openmp_threads()) is not None:
        end(_OMP_PAUSE_HARD)


def _after_fork_in_child() -> None:
    global _generation
    _generation += 1
    for owner in list(_owners):
        owner._after_fork()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
