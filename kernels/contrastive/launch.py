"""Launches that take the host less time.

A JITFunction looks for the compiled form of a kernel by the type, size and alignment of every argument, at each launch:
10 to 35 us for 10 to 40 arguments, three quarters of a launch. Here the caller names what can differ between its
launches.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from triton.runtime.jit import JITFunction

# (kernel, key) -> its compiled form, and the values of its constants in the order of the kernel's arguments
Compiled = dict[tuple[str, Hashable], tuple[Any, tuple[Any, ...]]]


def launch(
    compiled: Compiled,
    kernel: Any,
    key: Hashable,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    constants: Mapping[str, Any],  # and options
) -> None:
    """Run `kernel`, whose constants come last.

    Args:
        compiled: the forms found so far, one dictionary for whatever else the launches have in common.
        key: with `compiled`, this decides the device, `constants`, the types of all arguments, and the alignment of
            pointers where the kernel is specialised on it. It is not specialised on any size: do_not_specialize lists
            all numbers.
    """
    found = compiled.get((kernel.__name__, key))
    if found is not None:
        found[0][grid](*arguments, *found[1])
        return
    form = kernel.run(*arguments, grid=grid, **{"warmup": False, **constants})
    if form is None or not isinstance(kernel, JITFunction):  # None without a driver; no JITFunction in the interpreter
        return
    last = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
    compiled[kernel.__name__, key] = form, last
