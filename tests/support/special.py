"""Files that are no regular files, and a limit on the time that reading them takes."""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


def make_special(path: Path, kind: str, target: Path) -> None:
    """Create a file of a kind; links lead to `target`, or to nothing."""
    if kind == "symbolic link":
        path.symlink_to(target)
    elif kind == "broken link":
        path.symlink_to(target.with_name("nothing"))
    elif kind == "named pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")  # creating one requires root; endless where it is read
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = Path.cwd()
            os.chdir(path.parent)  # the path of a socket has at most 107 bytes
            try:
                server.bind(path.name)
            finally:
                os.chdir(here)
    elif kind == "directory":
        path.mkdir()
        (path / "kept.txt").write_text("kept")
    else:
        assert kind == "regular file"
        path.write_text("of somebody else")


def snapshot(root: Path) -> dict[str, object]:
    """The kind and content of everything below a directory; of links, where they lead."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        content: object = os.readlink(path) if path.is_symlink() else path.read_bytes() if stat.S_ISREG(mode) else None
        found[str(path.relative_to(root))] = (stat.S_IFMT(mode), content)
    return found


@contextmanager
def bounded(seconds: float = 30.0, *pipes: Path) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so many seconds, and wake the threads that wait for a pipe."""

    def stop(_: int, __: FrameType | None) -> None:
        for pipe in pipes:
            os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
