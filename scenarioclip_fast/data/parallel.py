"""An ordered map over worker processes, with bounded look-ahead and detection of dead workers."""

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
_AHEAD = 4  # chunks in flight per worker


class Workers:
    """Worker processes that serve several maps; the first map starts them. They exit with this process, even if it is
    killed.

    Args:
        count: at least 1. With one worker, maps run in this process.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the processes when they have finished what they are doing."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _submit(self, job: Callable[[A], B], items: list[A]) -> Future[list[B]]:
        if self._pool is None:
            # Spawn, because forking a process that has used torch's threads may hang the child. This starts Python's
            # resource tracker, which unblocks interrupts.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, mp_context=context, initializer=_initialise)
        with _block_interrupts():  # the first call starts the processes
            return self._pool.submit(partial(_run, job), items)

    def map(self, job: Callable[[A], B], items: Iterable[A], chunk: int = _CHUNK) -> Iterator[B]:
        """Like `map(job, items)`, `chunk` items at a time.

        Raises:
            RuntimeError: a worker process died; the workers can no longer be used.
        """
        if self.count <= 1:
            yield from map(job, items)
            return
        source = iter(items)
        waiting: deque[tuple[list[A], Future[list[B]]]] = deque()
        try:
            for items_ in iter(lambda: list(itertools.islice(source, chunk)), []):
                waiting.append((items_, self._submit(job, items_)))
                if len(waiting) > _AHEAD * self.count:
                    yield from _result(job, *waiting.popleft())
            while waiting:
                yield from _result(job, *waiting.popleft())
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died: it was killed, ran out of memory (try fewer workers), or imported the calling "
                'script, which must start workers under `if __name__ == "__main__":`'
            ) from error
        finally:
            for _, future in waiting:
                future.cancel()


def ordered_map(job: Callable[[A], B], items: Iterable[A], workers: int | Workers, chunk: int = _CHUNK) -> Iterator[B]:
    """Like `map(job, items)`, in worker processes, `chunk` items at a time; in this process with one worker.

    Args:
        workers: how many are started, and stopped at the end; or those to use.

    Raises:
        RuntimeError: a worker process died.
    """
    if isinstance(workers, Workers):
        yield from workers.map(job, items, chunk)
        return
    with Workers(workers) as pool:
        yield from pool.map(job, items, chunk)


def _run(job: Callable[[A], B], chunk: Sequence[A]) -> list[B]:
    return [job(item) for item in chunk]


def _result(job: Callable[[A], B], chunk: list[A], future: Future[list[B]]) -> list[B]:
    try:
        return future.result()
    except RecursionError:  # an item is nested too deeply to be pickled
        return _run(job, chunk)


@contextmanager
def _block_interrupts() -> Iterator[None]:
    """Make processes started in this context ignore Ctrl-C, which terminals send to the whole process group.

    This process handles a Ctrl-C when the context ends, because one while a worker starts would leave it half started.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by the workers
    received: list[int] = []
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if handler is not None:  # the signal may be delivered to another thread, and is then handled in this one
        signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if received:
        signal.raise_signal(signal.SIGINT)


def _initialise() -> None:
    # Runs before the job is unpickled, which imports torch.
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # A pool worker holds both ends of its input pipe, so it would never see EOF after the parent is killed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
