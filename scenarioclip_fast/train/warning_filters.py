"""Filters for torch warnings about things that training does on purpose."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

_EXPECTED = (
    # Checkpoints of a single process.
    "torch.distributed is disabled, unavailable or uninitialized",
    # The loss terms are views; nothing writes to them in place.
    "FSDP2-wrapped module .* returned a view tensor",
)


@contextlib.contextmanager
def expected_warnings_ignored() -> Iterator[None]:
    """Ignore the expected warnings for the duration of a run.

    Filters are process-wide, which is necessary because checkpoints are written in a torch thread. Enter once per run,
    not once per step.
    """
    with warnings.catch_warnings():
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message, UserWarning)
        yield
