"""Choose and import the backend of each op.

Order of choice: the `backend=` argument, `with use_backend(...)`, the environment variable SCENARIOCLIP_FAST_BACKEND,
then the fastest backend that works here for the tensors' device and size. A named backend never falls back.
"""

from __future__ import annotations

import functools
import importlib
import itertools
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
        needs: its requirement besides torch ("triton", "native-cpu", "native-cuda", "native-hopper"), or "".
        float64: whether float64 input is computed in float64.
        dtypes: the dtypes of features it takes; empty for all but float64.
        automatic_from: "auto" chooses it from this much work on, as measured; the op says what it counts.
        widest: the widest rows of features that it takes; 0: any.
        uses: a requirement that makes it faster where it is met ("native-cpu"), or "".
    """

    module: str
    devices: tuple[str, ...] = ()
    needs: str = ""
    float64: bool = False
    dtypes: tuple[str, ...] = ()
    automatic_from: int = 0
    widest: int = 0
    uses: str = ""


_CPU, _CUDA = ("cpu",), ("cuda",)
_CPU_ROWS = ("float32", "bfloat16")

# op -> name -> backend, fastest first. All modules of an op define the functions of
# kernels/<op>/reference.py; some define optional ones as well (see `offers`).
BACKENDS: dict[str, dict[str, Backend]] = {
    "add_layer_norm": {
        "triton": Backend("add_layer_norm.add_layer_norm_triton", _CUDA, "triton"),
        "cpu": Backend("add_layer_norm.add_layer_norm_cpu_native", _CPU, "native-cpu", dtypes=_CPU_ROWS),
        "reference": Backend("add_layer_norm.reference", float64=True),
    },
    "contrastive_loss": {
        # Work: the logits of all levels. On an H200 it is as fast as triton at 8,192^2, and faster at 32,768^2.
        "cuda": Backend(
            "contrastive.contrastive_cuda",
            _CUDA,
            "native-hopper",
            dtypes=("bfloat16",),
            automatic_from=16384**2,
            widest=8192,
        ),
        "triton": Backend("contrastive.contrastive_triton", _CUDA, "triton"),
        "cpu": Backend("contrastive.contrastive_cpu_native", _CPU, float64=True, uses="native-cpu"),
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
    "quick_gelu": {
        "triton": Backend("quick_gelu.quick_gelu_triton", _CUDA, "triton"),
        "cpu": Backend("quick_gelu.quick_gelu_cpu_native", _CPU, "native-cpu", dtypes=_CPU_ROWS),
        "reference": Backend("quick_gelu.reference", float64=True),
    },
    "render_views": {
        "cuda": Backend("views.views_native", _CUDA, "native-cuda"),
        "cpu": Backend("views.views_native", _CPU, "native-cpu"),
        "reference": Backend("views.reference"),
    },
    "short_attention": {
        "triton": Backend("short_attention.short_attention_triton", _CUDA, "triton"),
        # torch's attention under another name, for those who ask for "cpu" everywhere.
        "cpu": Backend("short_attention.reference", _CPU, float64=True),
        "reference": Backend("short_attention.reference", float64=True),
    },
}
NAMES = tuple(dict.fromkeys(name for backends in BACKENDS.values() for name in reversed(backends)))

# In the order of entry, since contexts of several threads may overlap: the latest one that has not ended applies.
_forced: dict[int, str] = {}
_entries = itertools.count()


class BackendError(RuntimeError):
    """The named backend cannot be used here; the message gives the reason and the alternatives."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use the named backend for every op in the context; an op's `backend=` takes precedence.

    Process-wide rather than per thread, because autograd runs backward passes in its own threads.

    Args:
        name: "auto" for no preference, "reference", "cpu", "triton" or "cuda". An op that cannot run on the named
            backend raises BackendError when it is called.

    Raises:
        ValueError: the name is unknown.
    """
    entry = next(_entries)
    _forced[entry] = _validated(name, "use_backend")
    try:
        yield
    finally:
        del _forced[entry]


def requested(backend: str = "auto") -> tuple[str, str]:
    """Return the backend that is asked for ("auto" for none) and where: `backend=`, use_backend or the variable.

    Raises:
        ValueError: the name is unknown.
    """
    if _validated(backend, "backend=") != "auto":
        return backend, "backend="
    if _forced and (name := list(_forced.values())[-1]) != "auto":
        return name, "use_backend"
    return _validated(os.environ.get(VARIABLE) or "auto", VARIABLE), VARIABLE


def resolve(op: str, backend: str, device_type: str, *, dtype: str = "", work: int = 0, width: int = 0) -> str:
    """Return the name of the backend that runs `op` on `device_type`.

    Args:
        op: a key of BACKENDS.
        backend: the op's `backend=` argument.
        device_type: the device type of the input tensors.
        dtype: the dtype of the input, such as "bfloat16"; "" if it does not matter.
        work: the size of the call, for backends that are the fastest only from some size on.
        width: of the widest features; 0 if it does not matter.

    Raises:
        BackendError: the named backend cannot be used.
        ValueError: the name is unknown.
    """
    name, source = requested(backend)
    if name == "auto":
        for candidate in BACKENDS[op]:
            # The size first: it is cheaper to compare than to ask for the device.
            is_worth_it = work >= BACKENDS[op][candidate].automatic_from
            if is_worth_it and _obstacle(op, candidate, device_type, dtype, width) is None:
                return candidate
    reason = _obstacle(op, name, device_type, dtype, width)
    if reason is not None:
        usable = [b for b in BACKENDS[op] if _obstacle(op, b, device_type, dtype, width) is None]
        raise BackendError(
            f"{op}: backend {name!r} (from {source}) cannot run on {device_type} tensors here: {reason}; "
            f"usable: {', '.join(usable)}, or 'auto'"
        )
    return name


def choice(op: str, device_type: str, dtype: str = "") -> str:
    """Describe what `resolve` returns here for an op without `backend=`, for calls of any size: one name, or several.

    It tells processes apart whose environments or installations lead to other backends.
    """
    if (name := requested()[0]) != "auto":
        names = [name]
    else:
        names = [resolve(op, "auto", device_type, dtype=dtype, work=work) for work in (0, 2**62)]
    used = {name: BACKENDS[op][name].uses for name in names if name in BACKENDS[op]}
    lacking = {name for name, needed in used.items() if needed and _missing(needed) is not None}
    return ", ".join(name + f" without {used[name]}" * (name in lacking) for name in dict.fromkeys(names))


def unavailable_reason(op: str, name: str, device_type: str, dtype: str = "") -> str | None:
    """Return None if backend `name` can run `op` on `device_type`, otherwise the reason why it cannot."""
    backend = BACKENDS[op].get(name)
    if backend is None:
        return f"this op has no {name} backend"
    devices = backend.devices
    if backend.needs == "triton" and requirements.triton_interprets():
        devices = ("cpu", "cuda")
    if devices and device_type not in devices:
        hint = " (on a CPU only with TRITON_INTERPRET=1)" if backend.needs == "triton" else ""
        return f"it runs on {' and '.join(devices)} tensors{hint}"
    if backend.needs and (reason := _missing(backend.needs)) is not None:
        return reason
    # Last, so that nobody casts the input for a backend that cannot run here anyway.
    if dtype == "float64" and not backend.float64:
        return "it computes in float32 only, but the input is float64"
    if dtype and backend.dtypes and dtype not in backend.dtypes:
        return f"it takes {' and '.join(backend.dtypes)} only, but the input is {dtype}: cast it, or use autocast"
    return None


def _obstacle(op: str, name: str, device_type: str, dtype: str, width: int) -> str | None:
    """`unavailable_reason` and the width, which in a compiled graph may be symbolic, so no argument of a constant."""
    reason = unavailable_reason(op, name, device_type, dtype)
    if reason is None and 0 < BACKENDS[op][name].widest < width:
        return f"it takes rows of width up to {BACKENDS[op][name].widest}, but the input has {width}"
    return reason


@functools.cache
def implementation(op: str, name: str) -> ModuleType:
    """Return the module of backend `name` of `op`, for use inside the op's torch.library.custom_op."""
    backend = BACKENDS[op][name]
    if backend.uses:
        _missing(backend.uses)  # loads a compiled library if it can
    return importlib.import_module(f"scenarioclip_fast.kernels.{backend.module}")


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
    """Return why a requirement ("triton", "native-cpu", ...) is not met, or None if it is."""
    if requirement.startswith("native-"):
        part = requirement.removeprefix("native-")
        return native.unavailable_reason(part) or (_not_hopper() if part == "hopper" else None)
    assert requirement == "triton", requirement
    return requirements.import_problem("triton")


def _not_hopper() -> str | None:
    """Return why kernels for compute capability 9.0 alone cannot run on the current device."""
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU"
    major, minor = torch.cuda.get_device_capability()
    return None if (major, minor) == (9, 0) else f"it needs compute capability 9.0, and this GPU has {major}.{minor}"
