"""Choose and import the backend of each op.

Order of choice: the `backend=` argument, `with use_backend(...)`, the environment variable SCENARIOCLIP_FAST_BACKEND,
then the fastest backend that works here for the tensors' device. A named backend never falls back.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from scenarioclip_fast import native, requirements
from scenarioclip_fast.errors import UserError

VARIABLE = "SCENARIOCLIP_FAST_BACKEND"


@dataclass(frozen=True)
class Backend:
    """An implementation of an op.

    Attributes:
        module: path under scenarioclip_fast.kernels; imported on first use.
        devices: device types it supports; empty for any.
        needs: its requirement besides torch ("triton", "native-cpu", "native-cuda"), or "".
        float64: whether float64 input is computed in float64.
    """

    module: str
    devices: tuple[str, ...] = ()
    needs: str = ""
    float64: bool = False


_CPU, _CUDA = ("cpu",), ("cuda",)

# op -> name -> backend, fastest first. All modules of an op define the same functions (see kernels/<op>/reference.py).
BACKENDS: dict[str, dict[str, Backend]] = {
    "contrastive_loss": {
        "triton": Backend("contrastive.contrastive_triton", _CUDA, "triton"),
        "cpu": Backend("contrastive.contrastive_cpu", _CPU, float64=True),
        "reference": Backend("contrastive.reference", float64=True),
    },
    "distillation_loss": {
        "cuda": Backend("distillation.distillation_native", _CUDA, "native-cuda"),
        "triton": Backend("distillation.distillation_triton", _CUDA, "triton"),
        "cpu": Backend("distillation.distillation_native", _CPU, "native-cpu"),
        "reference": Backend("distillation.reference", float64=True),
    },
    "focused_region": {
        "cuda": Backend("views.views_native", _CUDA, "native-cuda"),
        "cpu": Backend("views.views_native", _CPU, "native-cpu"),
        "reference": Backend("views.reference"),
    },
    "render_views": {
        "cuda": Backend("views.views_native", _CUDA, "native-cuda"),
        "cpu": Backend("views.views_native", _CPU, "native-cpu"),
        "reference": Backend("views.reference"),
    },
}
NAMES = tuple(dict.fromkeys(name for backends in BACKENDS.values() for name in reversed(backends)))

_forced: str | None = None


class BackendError(RuntimeError):
    """The named backend cannot be used here; the message gives the reason and the alternatives."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use the named backend for every op in the context ("auto": no preference); an op's `backend=` takes precedence.

    Process-wide rather than per thread, because autograd runs backward passes in its own threads.
    """
    global _forced
    before, _forced = _forced, _validated(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def resolve(op: str, backend: str, device_type: str, *, float64: bool = False) -> str:
    """Return the name of the backend that runs `op` on `device_type`.

    Args:
        op: a key of BACKENDS.
        backend: the op's `backend=` argument.
        device_type: the device type of the input tensors.
        float64: whether the input is float64.

    Raises:
        BackendError: the named backend cannot be used.
        ValueError: the name is unknown.
    """
    name, source = _validated(backend, "backend="), "backend="
    if name == "auto" and _forced is not None:
        name, source = _forced, "use_backend"
    if name == "auto":
        name, source = _validated(os.environ.get(VARIABLE) or "auto", VARIABLE), VARIABLE
    if name == "auto":
        for candidate in BACKENDS[op]:
            if unavailable_reason(op, candidate, device_type, float64) is None:
                return candidate
    reason = unavailable_reason(op, name, device_type, float64)
    if reason is not None:
        usable = [b for b in BACKENDS[op] if unavailable_reason(op, b, device_type, float64) is None]
        raise BackendError(
            f"{op}: backend {name!r} (from {source}) cannot run on {device_type} tensors here: {reason}; "
            f"usable: {', '.join(usable)}, or 'auto'"
        )
    return name


def unavailable_reason(op: str, name: str, device_type: str, float64: bool = False) -> str | None:
    """Return None if backend `name` can run `op` on `device_type`, otherwise the reason why it cannot."""
    backend = BACKENDS[op].get(name)
    if backend is None:
        return f"this op has no {name} backend"
    if float64 and not backend.float64:
        return "it computes in float32 only, but the input is float64"
    devices = backend.devices
    if backend.needs == "triton" and requirements.triton_interprets():
        devices = ("cpu", "cuda")
    if devices and device_type not in devices:
        hint = " (on a CPU only with TRITON_INTERPRET=1)" if backend.needs == "triton" else ""
        return f"it runs on {' and '.join(devices)} tensors{hint}"
    return _missing(backend.needs) if backend.needs else None


@functools.cache
def implementation(op: str, name: str) -> ModuleType:
    """Return the module of backend `name` of `op`, for use inside the op's torch.library.custom_op."""
    return importlib.import_module(f"scenarioclip_fast.kernels.{BACKENDS[op][name].module}")


def offers(op: str, name: str, function: str) -> bool:
    """Whether backend `name` of `op` defines an optional function, such as the fused means of contrastive_loss."""
    return hasattr(implementation(op, name), function)


# Both results are constant for the life of the process, so a compiled graph may hold them as constants: otherwise
# torch.compile would trace into code that imports modules and loads libraries. This sets the attribute directly,
# because calling torch.compiler.assume_constant_result would import the compiler, which takes a second.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
offers._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _validated(name: str, source: str) -> str:
    if name not in (*NAMES, "auto"):
        raise UserError(f"{source}: got {name!r}, expected one of auto, {', '.join(NAMES)}")
    return name


def _missing(requirement: str) -> str | None:
    """Return why a requirement ("triton", "native-cpu", "native-cuda") is not met, or None if it is."""
    if requirement.startswith("native-"):
        return native.unavailable_reason(requirement.removeprefix("native-"))
    assert requirement == "triton", requirement
    return requirements.import_problem("triton")
