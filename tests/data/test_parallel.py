from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from scenarioclip_fast.data.parallel import ordered_map


def triple(n: int) -> int:
    return 3 * n


def refuse_seven(n: int) -> int:
    if n == 7:
        raise ValueError("seven")
    return n


def die_at_seven(n: int) -> int:
    if n == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def test_results_are_in_order() -> None:
    assert list(ordered_map(triple, range(10), 1)) == [3 * n for n in range(10)]
    taken = []

    def source() -> Iterator[int]:
        for n in range(300):
            taken.append(n)
            yield n

    results = ordered_map(triple, source(), 2)
    assert next(results) == 0
    assert len(taken) < 150, "it reads only a little ahead"
    assert list(results) == [3 * n for n in range(1, 300)]


def test_an_error_comes_through() -> None:
    with pytest.raises(ValueError, match="seven"):
        list(ordered_map(refuse_seven, range(20), 2))


def test_a_process_that_dies_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="a worker process died"):
        list(ordered_map(die_at_seven, range(20), 2))
