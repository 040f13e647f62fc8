"""The errors that the package raises on purpose."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a path, a file, a data set or a config: the command line prints it as one line and exits with 2."""


class MissingDependencyError(ImportError):
    """An optional package that is not here: the message names it, says why it is wanted and how to get it."""


class TrainingFailed(RuntimeError):
    """A run that cannot go on, and what to change: the command line prints it as one line and exits with 1."""
