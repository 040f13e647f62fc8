"""The exceptions that the package raises for its users; the command line prints each as one line."""

from __future__ import annotations

from scenarioclip_fast.terminal import printable

_MAX_MESSAGE = 4000  # characters; a file of others may hold a value of any length


def _message(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _MAX_MESSAGE else f"{text[:3000]} ... {text[-900:]}"


class UserError(ValueError):
    """An invalid path, file, data set, config, backend name or workspace size. Exit code 2.

    `str` gives one line of bounded length, without the control characters that foreign text may contain.
    """

    def __str__(self) -> str:
        return _message(super().__str__())


class MissingDependencyError(ImportError):
    """An optional package is not installed: the message names it, its use and how to install it. Exit code 2."""


class InstallationError(ImportError):
    """The package itself is not installed, or only incompletely. Exit code 2."""


class TrainingFailed(RuntimeError):
    """The run cannot continue; the message names the setting to change. Exit code 1."""

    def __str__(self) -> str:
        return _message(super().__str__())
