"""Functions that torch.compile calls without tracing them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Like torch.compiler.disable, but without importing Dynamo, and with it Triton, before something is compiled."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            disabled: Callable[P, R] = torch.compiler.disable(function)  # breaks the graph, and runs outside of it
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return call
