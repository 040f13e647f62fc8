"""Signals that end a run cleanly."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Launchers forward signals that every process has already received: ignore repeats within this time.
_ECHO_S = 2.0


@contextmanager
def stop_on_signals(stop: Callable[[str], None]) -> Iterator[None]:
    """Call `stop` with the name of a SIGTERM, SIGUSR1 or SIGINT; a later repeat has its usual effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    received: dict[int, float] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - received.setdefault(number, now) <= _ECHO_S:
            stop(signal.Signals(number).name)
        else:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
