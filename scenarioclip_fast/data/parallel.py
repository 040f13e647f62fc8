"""A map over processes that keeps the order, runs only a little ahead, and notices a process that died."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

_CHUNK = 8
_AHEAD = 4  # chunks per worker whose results may wait


def ordered_map(job: Callable[[A], B], items: Iterable[A], workers: int, chunk: int = _CHUNK) -> Iterator[B]:
    """`map(job, items)` in `workers` processes, `chunk` items at a time; in this one if it is a single worker.

    The processes end with this one, however it ends.

    Raises:
        RuntimeError: a process died without saying why.
    """
    if workers <= 1:
        yield from map(job, items)
        return
    source = iter(items)
    chunks = iter(lambda: list(itertools.islice(source, chunk)), [])
    # spawn: a fork of a process that has used torch's threads can hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    waiting: deque[tuple[list[A], Future[list[B]]]] = deque()
    try:
        for some in chunks:
            with _without_interrupts():
                waiting.append((some, pool.submit(partial(_run, job), some)))
            if len(waiting) > _AHEAD * workers:
                yield from _result(job, *waiting.popleft())
        while waiting:
            yield from _result(job, *waiting.popleft())
    except BrokenProcessPool as error:
        raise RuntimeError("a worker process died, killed or out of memory; fewer workers need less memory") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _run(job: Callable[[A], B], chunk: Sequence[A]) -> list[B]:
    return [job(item) for item in chunk]


def _result(job: Callable[[A], B], chunk: list[A], future: Future[list[B]]) -> list[B]:
    try:
        return future.result()
    except RecursionError:  # an item is nested too deeply to be sent to a process
        return _run(job, chunk)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that start in it never see Ctrl-C, which a terminal sends to all: it is this process's to handle."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    # Runs before the job, and with it torch, is imported.
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A pool's process holds both ends of the pipe that it reads from, so that it would wait for ever for a parent that
    # was killed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
