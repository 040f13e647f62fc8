from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scenarioclip_fast.data.parallel import Workers, ordered_map


def triple(n: int) -> int:
    return 3 * n


def raise_at_seven(n: int) -> int:
    if n == 7:
        raise ValueError("seven")
    return n


def die_at_seven(n: int) -> int:
    if n == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def blocked(n: int) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_workers_ignore_ctrl_c() -> None:
    """Terminals send it to the whole process group; a worker that is still importing would print a traceback."""
    assert list(ordered_map(blocked, range(2), 2)) == [True, True]
    assert not blocked(0)


def test_results_are_ordered() -> None:
    assert list(ordered_map(triple, range(10), 1)) == [3 * n for n in range(10)]
    taken = []

    def source() -> Iterator[int]:
        for n in range(300):
            taken.append(n)
            yield n

    results = ordered_map(triple, source(), 2)
    assert next(results) == 0
    assert len(taken) < 150, "look-ahead is bounded"
    assert list(results) == [3 * n for n in range(1, 300)]


def test_errors_propagate() -> None:
    with pytest.raises(ValueError, match="seven"):
        list(ordered_map(raise_at_seven, range(20), 2))


def process_id(n: int) -> int:
    return os.getpid()


def test_maps_share_workers() -> None:
    with Workers(2) as workers:
        first = set(ordered_map(process_id, range(20), workers, chunk=1))
        with pytest.raises(ValueError, match="seven"):
            list(workers.map(raise_at_seven, range(20)))
        second = set(workers.map(process_id, range(20), chunk=1))
        unfinished = workers.map(triple, range(1000))
        assert next(unfinished) == 0
        unfinished.close()
        assert list(workers.map(triple, range(3))) == [0, 3, 6]
        assert os.getpid() not in first | second and len(first | second) <= 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in first | second)


def test_a_dead_worker_is_detected() -> None:
    with pytest.raises(RuntimeError, match="a worker process died"):
        list(ordered_map(die_at_seven, range(20), 2))


def test_a_script_without_a_main_guard_is_a_named_cause(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from scenarioclip_fast.data.parallel import ordered_map\nprint(list(ordered_map(abs, range(20), 2)))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode != 0 and 'under `if __name__ == "__main__":`' in done.stderr


def test_workers_exit_when_the_parent_is_killed() -> None:
    code = (
        "import time\n"
        "from scenarioclip_fast.data.parallel import ordered_map\n"
        "if __name__ == '__main__':\n"
        "    results = ordered_map(abs, range(1000), 2)\n"
        "    next(results)\n"
        "    print('running', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None and parent.stdout.readline() == "running\n"
            children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        finally:
            parent.kill()
    assert len(children) >= 2
    limit = time.monotonic() + 60
    while (left := [pid for pid in children if Path(f"/proc/{pid}").exists()]) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not left, "a worker outlived its parent"
