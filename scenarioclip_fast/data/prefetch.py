"""Run an iterator ahead of its consumer, in background threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from scenarioclip_fast import forks

T = TypeVar("T")
R = TypeVar("R")

_JOIN_TIMEOUT_S = 1.0


class Prefetcher(Generic[T, R]):
    """Iterate over `steps` in one thread and call each step's function in another.

    A context manager that returns an iterator over the same values, in the same order; exiting it stops both threads.

    Args:
        steps: pairs of a value and a function. The function is called in the background; the consumer receives a
            function that waits for the result.
        depth: maximum number of steps ahead of the consumer.
        interrupt: makes a blocked `next(steps)` fail; called on exit if the thread does not stop within a second.
    """

    def __init__(self, steps: Iterator[tuple[T, Callable[[], R]]], depth: int, interrupt: Callable[[], None]) -> None:
        self._interrupt = interrupt
        self._ready: queue.Queue[tuple[T, Callable[[], R]] | BaseException | None] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._renderer = ThreadPoolExecutor(1, "render")
        self._origin = forks.Origin()
        self._thread = threading.Thread(target=self._run, args=(steps,), name="load", daemon=True)
        self._thread.start()

    def _run(self, steps: Iterator[tuple[T, Callable[[], R]]]) -> None:
        try:
            for value, call in steps:
                if not self._put((value, self._renderer.submit(call).result)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: tuple[T, Callable[[], R]] | BaseException | None) -> bool:
        if not self._stopped.is_set():
            self._ready.put(item)
        return not self._stopped.is_set()

    def __iter__(self) -> Iterator[tuple[T, Callable[[], R]]]:
        return self

    def __next__(self) -> tuple[T, Callable[[], R]]:
        self._origin.check("this iteration", "begin another one")
        while True:
            try:
                item = self._ready.get(timeout=1.0)
                break
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("the loader thread died without an error") from None
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def __enter__(self) -> Iterator[tuple[T, Callable[[], R]]]:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._origin.is_here:
            return
        self._stopped.set()
        while not self._ready.empty():  # unblocks a thread that waits on a full queue
            self._ready.get_nowait()
        self._thread.join(_JOIN_TIMEOUT_S)
        if self._thread.is_alive():
            self._interrupt()
            self._thread.join()
        self._renderer.shutdown(cancel_futures=True)
