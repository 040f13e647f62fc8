"""Connections to a Ray cluster, for commands that run on one."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from scenarioclip_fast.errors import InstallationError, MissingDependencyError, UserError
from scenarioclip_fast.requirements import require

_VISIBLE_S = 90.0  # NFS clients may remember for 60 s that a file did not exist
_PROBE_S = 180.0  # a worker starts and imports torch


def await_files(paths: Iterable[Path]) -> None:
    """Wait until files that other nodes have written are visible on this one; at most 90 s, all together."""
    end = time.monotonic() + _VISIBLE_S
    for path in paths:
        while not path.is_file() and time.monotonic() < end:
            time.sleep(0.5)


def dump_error(error: Exception) -> bytes:
    """Pickle an error of a worker, so that it can be raised here as it was raised there."""
    if not isinstance(error, UserError | MissingDependencyError | InstallationError):
        error.add_note(f"on node {os.uname().nodename}:\n{''.join(traceback.format_exception(error))}")
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
        return data
    except Exception:  # of another package: an exception that cannot be pickled
        return pickle.dumps(RuntimeError("\n".join([str(error), *getattr(error, "__notes__", ())])))


def probe(files: Sequence[str]) -> tuple[str, list[str]]:
    """On a node: the version of the package, and which files are missing."""
    from scenarioclip_fast import __version__

    return __version__, [path for path in files if not os.path.exists(path)]


class RayConnection:
    """A connection to a Ray cluster, or one of this machine that lives as long as the context.

    Args:
        address: HOST:6379, auto (the running cluster of this machine), local (a new one), or empty (the running one,
            else a new one).
        directory: which all nodes must see; None: there is none.
        files: paths of input files, which all nodes must see too if this one does.
        inputs: what these are, for messages: "the images".

    Raises:
        MissingDependencyError: Ray is not installed.
        UserError: there is no cluster, or a node has another version of the package or does not see the directory.
    """

    def __init__(self, address: str, directory: Path | None, files: Sequence[str], inputs: str) -> None:
        self._ray = require("ray")
        self._address, self._directory, self._inputs = address, directory, inputs
        self._files = [path for path in files if os.path.exists(path)]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            if not self._ray.is_initialized():
                self._connect()
                stack.callback(self._ray.shutdown)
            self._prepare(stack)
            with self.one_line():
                self._check_nodes()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _prepare(self, stack: contextlib.ExitStack) -> None:
        """Called once connected; what is put on the stack is undone when the connection is closed."""

    def _connect(self) -> None:
        if self._address.startswith("ray://"):
            raise UserError(
                f"ray: got {self._address}, a server of Ray Client, which is not supported; run the command on a "
                "machine of the cluster, with auto or HOST:6379"
            )
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if self._address in ("", "local"):
            options["include_dashboard"] = False
        level = os.environ.get("RAY_BACKEND_LOG_LEVEL")
        # Ray Data starts actors in a way that Ray's core reports as an error (ray-project/ray#53727).
        os.environ["RAY_BACKEND_LOG_LEVEL"] = level or "fatal"
        try:
            host, colon, port = self._address.rpartition(":")
            if colon:  # Ray waits for minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            with _stderr_closed():  # to the message that this variable is set
                self._ray.init(self._address or None, **options)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            where = "on this machine" if self._address in ("", "auto", "local") else f"at {self._address}"
            raise UserError(
                f"ray: cannot connect to a Ray cluster {where} ({_first_line(error)}); start one with `ray start "
                "--head`, give its HOST:6379, or `local` to use this machine; a cluster with authentication needs the "
                "same RAY_AUTH_TOKEN here"
            ) from error
        finally:
            if level is None:
                del os.environ["RAY_BACKEND_LOG_LEVEL"]

    @contextlib.contextmanager
    def one_line(self) -> Iterator[None]:
        """Turn Ray's errors, such as a lost connection, into one line."""
        try:
            yield
        except (self._ray.exceptions.RayError, ConnectionError) as error:
            raise UserError(
                f"ray: {type(error).__name__}: {_first_line(error)}; nothing is lost: correct the cause and re-run the "
                "command"
            ) from error

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that run actors and tasks."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        return [node for node in nodes if node["Resources"].get("CPU") or node["Resources"].get("GPU")]

    def _check_nodes(self) -> None:
        from scenarioclip_fast import __version__

        on = require("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        token = None if self._directory is None else self._directory / f".{uuid.uuid4().hex}"
        files = [*([] if token is None else [str(token)]), *self._files]
        if token is not None:
            token.touch()
        try:
            task = self._ray.remote(num_cpus=0, max_retries=2)(probe)
            answers = [
                (node["NodeManagerAddress"], task.options(scheduling_strategy=on(node["NodeID"], False)))
                for node in self.nodes()
            ]
            refs = [(address, one.remote(files)) for address, one in answers]
            end = time.monotonic() + _PROBE_S
            for address, ref in refs:
                try:
                    version, missing = self._ray.get(ref, timeout=max(0.0, end - time.monotonic()))
                except self._ray.exceptions.GetTimeoutError:
                    raise UserError(f"ray: node {address} did not answer within {_PROBE_S:.0f} s") from None
                except self._ray.exceptions.RayError as error:
                    cause = str(error).strip().splitlines()[-1]
                    raise UserError(
                        f"ray: node {address} cannot run the command ({cause}); every node needs "
                        f"`pip install 'scenarioclip-fast[generate-ray]=={__version__}'`"
                    ) from error
                if version != __version__:
                    raise UserError(f"ray: node {address} has scenarioclip-fast {version}, expected {__version__}")
                if missing:
                    what = self._directory if missing[0] == str(token) else missing[0]
                    raise UserError(
                        f"ray: node {address} does not see {what}; DIR and {self._inputs} must be on storage "
                        "that all nodes see at the same path"
                    )
        finally:
            if token is not None:
                token.unlink(missing_ok=True)


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    """Discard what native code writes to standard error."""
    sys.stderr.flush()
    before, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(null)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
