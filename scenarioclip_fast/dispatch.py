"""The only place that chooses a backend.

Order of choice: the `backend=` argument, then `with use_backend(...)`, then the environment variable
SCENARIOCLIP_FAST_BACKEND, then the fastest backend that works here for the tensors' device. A backend that was named
never falls back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from scenarioclip_fast import requirements
from scenarioclip_fast.errors import UserError

VARIABLE = "SCENARIOCLIP_FAST_BACKEND"
NAMES = ("reference", "cpu", "triton", "cuda")

# op -> backend -> what it needs ("" for nothing beyond torch), fastest first for the devices it runs on.
BACKENDS: dict[str, dict[str, str]] = {
    "contrastive_loss": {"triton": "triton", "cpu": "", "reference": ""},
    "distillation_loss": {"cuda": "native-cuda", "triton": "triton", "cpu": "native-cpu", "reference": ""},
    "focused_region": {"cuda": "native-cuda", "cpu": "native-cpu", "reference": ""},
    "render_views": {"cuda": "native-cuda", "cpu": "native-cpu", "reference": ""},
}
_DEVICES: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}

_forced: str | None = None


class BackendError(RuntimeError):
    """A named backend that cannot serve: why not, and the way out."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes every op below take the named backend ("auto" to choose freely) unless its own argument says otherwise.

    Process-wide rather than per thread, because autograd runs backward passes in threads of its own.
    """
    global _forced
    before, _forced = _forced, _checked(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def resolve(op: str, backend: str, device_type: str, cannot: Mapping[str, str] | None = None) -> str:
    """The concrete backend of `op` for tensors on `device_type`; BackendError when the one asked for cannot serve.

    cannot: backends that do not know the arguments at hand, each with the reason.
    """
    cannot = cannot or {}
    name, source = _checked(backend, "backend="), "backend="
    if name == "auto" and _forced is not None:
        name, source = _forced, "use_backend"
    if name == "auto":
        name, source = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE), VARIABLE
    if name == "auto":
        for candidate in BACKENDS[op]:
            if candidate not in cannot and why_not(op, candidate, device_type) is None:
                return candidate
    reason = cannot.get(name) or why_not(op, name, device_type)
    if reason is not None:
        usable = [b for b in BACKENDS[op] if b not in cannot and why_not(op, b, device_type) is None]
        raise BackendError(
            f"{op}: backend {name!r} (from {source}) cannot serve {device_type} tensors here: {reason}; "
            f"usable: {', '.join(usable)}, or 'auto'"
        )
    return name


def why_not(op: str, backend: str, device_type: str) -> str | None:
    """None when `backend` can run `op` on `device_type`, otherwise the reason why it cannot."""
    if backend not in BACKENDS[op]:
        return f"there is no {backend} form of this op"
    devices = _DEVICES.get(backend)
    if backend == "triton" and requirements.triton_interprets():
        devices = ("cpu", "cuda")
    if devices is not None and device_type not in devices:
        hint = " (on a CPU only with TRITON_INTERPRET=1)" if backend == "triton" else ""
        return f"it runs on {' and '.join(devices)} tensors{hint}"
    need = BACKENDS[op][backend]
    return requirements.missing(need) if need else None


# The answer cannot change while the process lives, so a compiled graph may hold it as a constant: without this,
# torch.compile would trace into the probes, which import modules and load libraries. It is all that
# torch.compiler.assume_constant_result does, but for importing the compiler, which takes a second.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _checked(name: str, source: str) -> str:
    if name not in (*NAMES, "auto"):
        raise UserError(f"{source}: got {name!r}, expected one of auto, {', '.join(NAMES)}")
    return name
