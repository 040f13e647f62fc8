"""Interrupt packing at a chosen point."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from scenarioclip_fast.data.decode import TorchDecoder


class Decoded:
    """Counts decoded images, and raises KeyboardInterrupt after `limit` of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
        self.count, self.limit = 0, limit
        decode = TorchDecoder.decode

        def counted(decoder: TorchDecoder, images: Any) -> Any:
            if self.count == self.limit:
                raise KeyboardInterrupt
            self.count += 1
            return decode(decoder, images)

        monkeypatch.setattr(TorchDecoder, "decode", counted)


def kill_at(n: int) -> None:
    """Make this process kill itself right before its `n`-th disk operation."""
    count = 0

    def counted(step: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        return wrapped

    for name in ("fsync", "replace", "unlink", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
