"""Hostile calls of the compiled ops and of the host module, each in a fork of its own.

`python hostile.py SEED CALLS` makes each call of `certain()`, which must raise an error, and CALLS random ones, which
may raise or return; it prints one line of JSON per call that failed, and a summary. A call fails if its process
crashes, hangs, or raises anything but a clear error. Arguments lie between two pages without access, so that reading or
writing a byte past the end of one is a crash.
"""

from __future__ import annotations

import collections
import ctypes
import io
import itertools
import json
import math
import mmap
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from scenarioclip_fast.kernels.views import reference
from torch import Tensor

from scenarioclip_fast import native
from scenarioclip_fast.data import rle

Arguments = dict[str, Any]
OPS = torch.ops.scenarioclip_fast_C
SECONDS = 20  # a call that takes longer hangs
BATCH = 500  # random calls of which the arguments exist at the same time
MEMORY = 6 << 30  # bytes of address space beyond those of this process; a call that needs more must say so
ERRORS = (RuntimeError, ValueError, TypeError, MemoryError, IndexError, OverflowError, NotImplementedError)
INT64 = (-(2**63), 2**63 - 1, 2**62, -1, 0, 1, 2**31, 2**24 + 1)
NUMBERS = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-45, 1e-300, 1e300, 3.4e38)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int32, torch.int64,
          torch.bool, torch.complex64)  # fmt: skip

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def fenced(value: Any) -> Any:
    """Copies of tensors that end where memory without access begins."""
    if isinstance(value, list):
        return [fenced(v) for v in value]
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not plain or not value.is_contiguous() or value.untyped_storage().nbytes() != value.nbytes or not value.nbytes:
        return value
    page = mmap.PAGESIZE
    size = -(-value.nbytes // page) * page
    begin = libc.mmap(None, size + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANON, -1, 0)
    assert begin not in (None, ctypes.c_void_p(-1).value)
    for fence in (begin, begin + page + size):
        assert libc.mprotect(fence, page, 0) == 0
    memory = (ctypes.c_ubyte * value.nbytes).from_address(begin + page + size - value.nbytes)
    copy = torch.frombuffer(memory, dtype=value.dtype).view(value.shape)
    return copy.copy_(value)


# Valid arguments, small and of odd sizes.


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64).add_(0.5).to(dtype)


def doubles(*shape: int) -> Tensor:
    return floats(*shape, dtype=torch.float64)


def mask(height: int, width: int) -> Tensor:
    found = torch.rand(height, width) < 0.4
    found[height // 2, width // 2] = True
    return found


def tile() -> Arguments:
    return {"by_row": floats(5), "by_text": floats(7), "index": torch.randint(7, (5,)), "first_row": 1, "first_text": 2}


def exponentials() -> Arguments:
    sums = {"row_sum": doubles(5), "col_sum": doubles(7), "positive": doubles(5)}
    return {"values": floats(3, 4), **tile(), "weight": floats(7), "scale": 5.0, "offset": 1.0, **sums}


def factors() -> Arguments:
    names = {"row_lse": 5, "col_lse": 7, "grad_row": 5, "grad_col": 7, "grad_logit": 5}
    by = {"by_row": floats(5), "by_text": floats(7)}
    return {**{name: doubles(n) for name, n in names.items()}, **by, "weight": floats(7), "offset": 1.0}


def gradients() -> Arguments:
    matrices = {"source": floats(3, 4), "out": floats(3, 4)}
    return {**matrices, "kept": False, "factors": floats(36), **tile(), "scale": 5.0, "offset": 1.0}


def distillation() -> Arguments:
    pairs = {"student_index": torch.randint(5, (9,)), "teacher_index": torch.randint(4, (9,)), "weight": floats(9)}
    temperatures = {"student_temperature": torch.tensor(0.07), "student_temperature_value": 0.07}
    rest = {"teacher_temperature": 0.07, "with_gradient": True, "finished": None}
    return {"student": floats(5, 19), "teacher": floats(4, 19), **pairs, **temperatures, **rest}


def layer_norm() -> Arguments:
    return {"x": floats(5, 19), "branch": floats(5, 19), "weight": floats(19), "bias": floats(19),
            "branch_bias": floats(19), "eps": 1e-5, "dtype": torch.float32}  # fmt: skip


def layer_norm_backward() -> Arguments:
    rows = {name: floats(5, 19) for name in ("d_total", "d_normed", "total")}
    return {**rows, "weight": floats(19), "statistics": floats(2, 5), "sums": 3}


def region() -> Arguments:
    image = torch.randint(256, (13, 17, 3), dtype=torch.uint8)
    masks = {"subject_mask": mask(13, 17), "object_mask": mask(13, 17)}
    return {"image": image, **masks, "sigma": 4.0, "weights": reference.blur_weights(1.0), "published": False}


def views() -> Arguments:
    shapes = ((13, 17), (9, 6))
    images = [torch.randint(256, (*shape, 3), dtype=torch.uint8) for shape in shapes]
    runs = [torch.from_numpy(rle.mask_runs(mask(*shapes[m // 2]).numpy())).int() for m in range(4)]
    rows = []
    for i, (height, width) in enumerate(shapes):
        for kind in range(4):
            masks = (2 * i, 2 * i + 1) if kind == reference.RELATION else (-1, -1)
            rows.append([kind, i, 0, 0, width, height, 12, 11, 2, 1, 1, 2, 5, 6, *masks])
    augment = torch.tensor([1.1, 0.9, 1.2, 0.1, 0.8]).repeat(len(rows), 1)
    augment[::2] = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    start = torch.tensor([0, *(len(r) for r in runs)]).cumsum(0)
    colours = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    blur = {"sigma": 4.0, "weights": reference.blur_weights(1.0), "published": False}
    plan = torch.tensor(rows, dtype=torch.int32)
    return {"images": images, "plan": plan, "augment": augment, "mask_runs": torch.cat(runs), "mask_start": start,
            **colours, **blur, "channels_last": False, "out": torch.empty(len(rows), 3, 10, 10)}  # fmt: skip


def cuda(name: str) -> Callable[[], Arguments]:
    """Arguments of an op of the backend "cuda", on the CPU, where it must not run."""

    def arguments() -> Arguments:
        types = {"Tensor": floats(3, 3), "Optional[Tensor]": None, "bool": True, "int": 0}
        schema = getattr(OPS, name).default._schema
        return {a.name: types[str(a.type)] for a in schema.arguments}

    return arguments


def lowering() -> Arguments:
    given = views()
    plan, count = given["plan"], len(given["plan"])
    sizes = torch.tensor([[13, 17], [13, 17], [9, 6], [9, 6]], dtype=torch.int32)
    arrays = {
        "kind": plan[:, 0].contiguous(), "image": plan[:, 1].long(), "source": plan[:, 2:6].contiguous(),
        "stretch": torch.ones(count, dtype=torch.bool), "box": plan[:, 10:14].double(), "mask": plan[:, 14:].long(),
        "mask_runs": given["mask_runs"], "mask_start": given["mask_start"], "mask_size": sizes,
    }  # fmt: skip
    shapes = [tuple(image.shape) for image in given["images"]]
    return {**{name: tensor.numpy() for name, tensor in arrays.items()}, "shapes": shapes, "size": 10}


def jpeg() -> Arguments:
    from PIL import Image

    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(256, size=(24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", progressive=True)
    return {"data": stream.getvalue()}


def masks() -> Arguments:
    found = [rle.encode(mask(9, 6)), rle.encode(mask(4, 5))]
    return {"masks": found, "sizes": np.array([[9, 6], [4, 5]])}


BUILDERS: dict[str, Callable[[], Arguments]] = {
    "contrastive_cpu_inverse": lambda: {"matrices": [floats(3, 8), floats(5, 8)], "normalize": True},
    "contrastive_cpu_exponentials": exponentials,
    "contrastive_cpu_factors": factors,
    "contrastive_cpu_gradients": gradients,
    "contrastive_cpu_finish": lambda: {
        "x": floats(5, 19), "inverse": floats(5), "factor": 2.0, "normalize": True, "d": floats(5, 19),
    },
    "contrastive_cpu_large_pages": lambda: {"memory": floats(1 << 20)},
    "distillation_forward": distillation,
    "quick_gelu_forward": lambda: {"x": floats(5, 19), "bias": floats(19)},
    "quick_gelu_backward": lambda: {
        "grad": floats(5, 19), "x": floats(5, 19), "bias": floats(19), "with_sums": True,
    },
    "add_layer_norm_forward": layer_norm,
    "add_layer_norm_backward": layer_norm_backward,
    "focused_region": region,
    "render_views": views,
    "host.rle_compress": lambda: {"runs": np.array([3, 4, 5, 6, 7])},
    "host.rle_decompress": lambda: {"counts": rle.encode(mask(9, 6))["counts"].encode()},
    "host.segment_masks": lambda: {
        "pixels": np.random.default_rng(0).integers(3, size=(9, 6, 3), dtype=np.uint8), "ids": [0, 1, 257, 9],
    },
    "host.mask_table": masks,
    "host.lower_views": lowering,
    "host.jpeg_header": jpeg,
    "host.jpeg_damage": jpeg,
    "host.build_info": dict,
}  # fmt: skip


def op_names() -> list[str]:
    """All ops of the namespace and all functions of the host module."""
    schemas = torch._C._jit_get_all_schemas()
    found = [s.name.partition("::")[2] for s in schemas if s.name.startswith("scenarioclip_fast_C::")]
    host = native.host()
    return sorted([*found, *(f"host.{name}" for name, f in vars(host).items() if callable(f))])


# Hostile variants of an argument: (what, value, whether the call must raise an error).
Variant = tuple[str, Any, bool]


def tensor_variants(x: Tensor, others: dict[str, Tensor]) -> Iterator[Variant]:
    for dtype in DTYPES:
        if dtype != x.dtype:
            yield str(dtype), x.to(dtype), True
    yield "meta", x.to("meta"), True
    yield "sparse", x.float().to_sparse() if x.dim() else x.unsqueeze(0).float().to_sparse(), True
    yield "no storage", released(x, 0), x.numel() > 0
    yield "short storage", released(x, max(x.nbytes - x.itemsize, 0)), x.numel() > 0
    yield "another dimension", x.unsqueeze(0), True
    yield "an empty one", x.new_empty(0), x.numel() > 0
    if x.dim():
        yield "no dimension", x.flatten()[0] if x.numel() else x.new_empty(()), True
        yield "expanded", x[:1].expand(x.shape), x.numel() > 0 and x.shape[0] > 1
        yield "every other", x.repeat_interleave(2, dim=-1)[..., ::2], x.shape[-1] > 1
        for dim in range(x.dim()):
            yield f"one more in {dim}", torch.cat([x, x.narrow(dim, 0, 1)], dim), True
            yield f"one less in {dim}", x.narrow(dim, 0, x.shape[dim] - 1).contiguous(), True
            yield f"none in {dim}", x.narrow(dim, 0, 0), True
        if x.dim() > 1:
            yield "huge without elements", x.new_empty([2**62, *[0] * (x.dim() - 1)]), True
            yield "transposed", x.transpose(0, 1).contiguous().transpose(0, 1), min(x.shape[:2]) > 1
    for name, other in others.items():
        yield f"the memory of {name}", ("alias", name), False
        yield f"{name}", other, False


def released(x: Tensor, size: int) -> Tensor:
    copy = x.clone(memory_format=torch.contiguous_format)
    copy.untyped_storage().resize_(size)
    return copy


def poisoned(x: Any, rng: random.Random) -> Any:
    """A copy with a few extreme numbers."""
    copy = x.clone() if isinstance(x, Tensor) else torch.from_numpy(x.copy())
    flat = copy.view(-1)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if flat.numel() == 0:
            break
        place = rng.randrange(flat.numel())
        if copy.dtype.is_floating_point:
            flat[place] = torch.tensor(rng.choice(NUMBERS), dtype=torch.float64).to(flat.dtype)
        elif copy.dtype == torch.bool:
            flat.view(torch.uint8)[place] = rng.choice([2, 128, 255])
        else:
            info = torch.iinfo(copy.dtype)
            extremes = [info.min, info.max, info.max - 1, -1, 0, 1, 1 << 24, (1 << 24) + 1, 7, 5, int(flat[place]) + 1]
            flat[place] = max(min(rng.choice(extremes), info.max), info.min)
    return copy if isinstance(x, Tensor) else copy.numpy()


def bytes_variant(x: bytes, rng: random.Random) -> bytes:
    data = bytearray(x)
    for _ in range(rng.choice([1, 1, 3, 10])):
        kind = rng.randrange(4)
        at = rng.randrange(len(data) + 1)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 8, 100])))
        elif kind == 2:
            del data[at : at + rng.choice([1, 8, 100])]
        elif at < len(data):
            data[at] = rng.choice([0, 255, 127, rng.randrange(256)])
    return bytes(data)


def random_variant(value: Any, others: dict[str, Tensor], rng: random.Random) -> tuple[str, Any]:
    if isinstance(value, Tensor):
        if rng.random() < 0.5:
            return "extreme values", poisoned(value, rng)
        what, found, _ = rng.choice(list(tensor_variants(value, others)))
        return what, found
    if isinstance(value, np.ndarray):
        if rng.random() < 0.6:
            return "extreme values", poisoned(value, rng)
        found = rng.choice([value[:0], value[..., :-1], np.broadcast_to(value[:1], value.shape), value.T, value[::2],
                            value.astype(np.float64) * 1e300, np.concatenate([value, value])])  # fmt: skip
        return f"an array {found.shape}", found
    if isinstance(value, bool):
        return "the other", not value
    if isinstance(value, int):
        found = rng.choice(INT64)
        return str(found), found
    if isinstance(value, float):
        found = rng.choice(NUMBERS)
        return str(found), found
    if isinstance(value, torch.dtype):
        found = rng.choice(DTYPES)
        return str(found), found
    if isinstance(value, bytes):
        return "damaged bytes", bytes_variant(value, rng)
    if isinstance(value, list):
        changed = list(value)
        kind = rng.randrange(4)
        if kind == 0 or not value:
            return "an empty list", []
        if kind == 1:
            return "a longer list", value * rng.choice([2, 300])
        place = rng.randrange(len(value))
        what, changed[place] = random_variant(value[place], {}, rng)
        return f"[{place}]: {what}", changed
    if isinstance(value, dict):
        name = rng.choice(list(value))
        what, found = random_variant(value[name], {}, rng)
        return f"{name}: {what}", {**value, name: found}
    if isinstance(value, str):
        return "damaged text", bytes_variant(value.encode(), rng).decode("latin1")
    if isinstance(value, tuple):
        what, found = random_variant(list(value), {}, rng)
        return what, tuple(found)
    return "None", None


def resolve(arguments: Arguments) -> Arguments:
    """Fence all tensors, then let those that should share memory do so."""
    found = {k: v if isinstance(v, tuple) and v[:1] == ("alias",) else fenced(v) for k, v in arguments.items()}
    for name, value in found.items():
        if isinstance(value, tuple) and value[:1] == ("alias",):
            found[name] = found[value[1]]
    return found


def call(name: str, arguments: Arguments) -> Any:
    if name.startswith("host."):
        return getattr(native.host(), name[5:])(**arguments)
    return getattr(OPS, name)(**resolve(arguments))


def tensors_of(arguments: Arguments, but: str) -> dict[str, Tensor]:
    return {k: v for k, v in arguments.items() if isinstance(v, Tensor) and k != but}


OPTIONAL = {"weight", "index", "bias", "branch", "branch_bias", "student_temperature", "d_total"}


class Call(NamedTuple):
    op: str
    what: str
    build: Callable[[], Arguments]
    must_raise: bool


def certain_calls() -> Iterator[Call]:
    """Calls that must raise an error."""
    for name in op_names():
        if name not in BUILDERS:
            yield Call(name, "tensors on the CPU", cuda(name), True)
    for name, build in BUILDERS.items():
        if name.startswith("host."):
            continue
        given = build()
        for key, value in given.items():
            if not isinstance(value, Tensor):
                continue
            for what, changed, raises in tensor_variants(value, {}):
                if raises and not exempt(name, key, what):
                    yield Call(name, f"{key}: {what}", partial(edited, name, key, changed), True)
    for name, key, what, change in wrong_values():
        yield Call(name, f"{key}: {what}", partial(edited, name, key, change), True)


def exempt(name: str, key: str, what: str) -> bool:
    """Variants that are valid after all."""
    if key == "memory":  # of any shape
        return "dimension" in what or what.startswith(("one", "none", "an empty", "huge"))
    return (name, key, what) in VALID


COUNTS = ("one more", "one less", "none")
VALID = {
    *(("contrastive_cpu_exponentials", "values", f"{what} in {dim}") for what in COUNTS for dim in (0, 1)),
    ("contrastive_cpu_gradients", "source", "expanded"),
    ("distillation_forward", "student", "one more in 0"),
    ("distillation_forward", "teacher", "one more in 0"),
    *(("quick_gelu_forward", "x", f"{what} in 0") for what in COUNTS),
    ("quick_gelu_forward", "x", "another dimension"),
    ("quick_gelu_forward", "x", "torch.bfloat16"),
    ("render_views", "out", "torch.bfloat16"),
    ("render_views", "out", "torch.float16"),
}  # fmt: skip


def edited(name: str, key: str, change: Any) -> Arguments:
    """Valid arguments of an op, but for one that is set or, with a function, changed; a dict sets several."""
    arguments = BUILDERS[name]()
    if callable(change):
        change(arguments[key])
    elif isinstance(change, dict):
        arguments.update(change)
    else:
        arguments[key] = change
    return arguments


def put(place: Any, number: float) -> Callable[[Tensor], None]:
    def change(x: Tensor) -> None:
        x[place] = number

    return change


def wrong_values() -> Iterator[tuple[str, str, str, Any]]:
    for bad in (-1, 7, -(2**63), 2**63 - 1):
        for name in ("contrastive_cpu_exponentials", "contrastive_cpu_gradients"):
            yield name, "index", f"{bad} of 7 texts", put(2, bad)
    for bad in (-1, 3, 2**63 - 1, -(2**63), 2**62):
        for name in ("contrastive_cpu_exponentials", "contrastive_cpu_gradients"):
            yield name, "first_row", str(bad), bad
            yield name, "first_text", str(bad + 1), min(bad + 1, 2**63 - 1) if bad != -1 else -1
    for key, size in (("student_index", 5), ("teacher_index", 4)):
        for bad in (-1, size, -(2**63), 2**63 - 1, 2**40):
            yield "distillation_forward", key, f"{bad} of {size} rows", put(3, bad)
    for key in ("student_temperature_value", "teacher_temperature"):
        for bad in (0.0, -1.0, math.nan, math.inf):
            yield "distillation_forward", key, str(bad), {"student_temperature": None, key: bad}
    for bad in (0.0, -1.0):
        yield "distillation_forward", "student_temperature", str(bad), torch.tensor(bad)
    yield "distillation_forward", "finished", "a counter", torch.zeros((), dtype=torch.int32)
    huge = torch.empty(2**62, 0)
    yield "contrastive_cpu_inverse", "matrices", "more rows than an int64 counts", [huge, huge, huge, huge]
    yield "contrastive_cpu_inverse", "matrices", "none", []
    for bad in (-1, 1, 4, 2**62):
        yield "add_layer_norm_backward", "sums", str(bad), bad
    for bad in (torch.uint8, torch.float64, torch.float16, torch.complex64):
        yield "add_layer_norm_forward", "dtype", str(bad), bad
    yield "add_layer_norm_forward", "branch", "None with its bias", None
    for name in ("focused_region", "render_views"):
        for bad in (0.0, -1.0, math.nan, math.inf):
            yield name, "sigma", str(bad), bad
        for bad in ([], [-1, 1 << 23], [1 << 24, 1], [2**62] * 4, [2**24] + [0] * 300, [-(2**63)]):
            yield name, "weights", str(bad[:4]), bad
    for key in ("subject_mask", "object_mask"):
        yield "focused_region", key, "without a pixel", Tensor.zero_
    for key in ("mean", "std"):
        for bad in ([], [0.5] * 2, [0.5, math.nan, 0.5], [0.5, math.inf, 0.5]):
            yield "render_views", key, str(bad), bad
    for bad in (0.0, -1.0, 1e-60):
        yield "render_views", "std", str(bad), [0.5, bad, 0.5]
    columns = {
        reference.KIND: (-1, 4), reference.IMAGE: (-1, 2), reference.X1: (17, 2**24 + 1, -(2**24) - 1),
        reference.Y1: (13,), reference.X2: (0, -1, 2**24 + 1), reference.Y2: (0,), reference.WIDTH: (0, -1, 11, 2**30),
        reference.HEIGHT: (0, 10, 2**30), reference.LEFT: (-1, 3), reference.TOP: (-1, 2),
        reference.MASK_1: (-1, 4, 2), reference.MASK_2: (-2, 4, 3),
    }  # fmt: skip
    for column, numbers in columns.items():
        for bad in (*numbers, -(2**31), 2**31 - 1):
            yield "render_views", "plan", f"{bad} in column {column}", put((3, column), bad)
    for column, numbers in (
        (0, (math.nan,)),
        (1, (math.inf,)),
        (2, (-math.inf,)),
        (3, (math.nan, 1e30)),
        (4, (math.inf,)),
    ):
        for bad in numbers:
            yield "render_views", "augment", f"{bad} in column {column}", put((1, column), bad)
    for bad in (-1, 2**31 - 1, -(2**31), 300):
        yield "render_views", "mask_runs", f"a run of {bad}", put(1, bad)
    for place, bad in ((0, 1), (0, -1), (1, 2**62), (2, -(2**63)), (4, 10**6), (4, 3), (1, 0)):
        yield "render_views", "mask_start", f"{bad} at {place}", put(place, bad)
    yield "render_views", "images", "none for the views", []
    yield "render_views", "images", "an empty one", [torch.empty(0, 5, 3, dtype=torch.uint8)] * 2
    yield "render_views", "images", "one on meta", [torch.empty(13, 17, 3, dtype=torch.uint8, device="meta")] * 2
    yield "render_views", "channels_last", "for another layout", True
    for name, key, other in ALIASES:
        yield name, key, f"the memory of {other}", ("alias", other)


# (op, argument that is written, another in the same memory)
ALIASES = [
    ("contrastive_cpu_exponentials", "row_sum", "positive"), ("contrastive_cpu_finish", "d", "x"),
]  # fmt: skip


def random_call(rng: random.Random) -> Call:
    torch.manual_seed(rng.randrange(1 << 30))
    name = rng.choice([n for n in BUILDERS if n != "host.build_info"])
    given = BUILDERS[name]()
    changes: Arguments = {}
    words = []
    for key in rng.sample(list(given), k=min(rng.choice([1, 1, 1, 2, 3]), len(given))):
        if key in OPTIONAL and rng.random() < 0.15:
            what, changes[key] = "None", None
        else:
            what, changes[key] = random_variant(given[key], tensors_of(given, key), rng)
        words.append(f"{key}: {what}")
    aliases = [c[1] for c in changes.values() if isinstance(c, tuple) and c[:1] == ("alias",)]
    if any(isinstance(changes.get(a), tuple) for a in aliases):  # of each other
        return random_call(rng)
    return Call(name, ", ".join(words), lambda: {**given, **changes}, False)


def behaviour(name: str, build: Callable[[], Arguments], must_raise: bool) -> str:
    """Make the call; return what is wrong with how it ended, or an empty string."""
    torch.manual_seed(0)
    try:
        call(name, build())
    except ERRORS as error:
        return "" if str(error).strip() or isinstance(error, MemoryError) else "raises an error without a message"
    except BaseException as error:
        return f"raises {type(error).__name__}"
    return "raises no error" if must_raise else ""


def child(calls: list[Call], to: int) -> NoReturn:
    """Make calls; write one line for each."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for each in calls:
        signal.alarm(SECONDS)
        os.write(to, (behaviour(each.op, each.build, each.must_raise) + "\n").encode())
    os._exit(0)


def outcomes(calls: list[Call]) -> Iterator[str]:
    """For each call, "" if it behaves, else what happens; a crash or a hang ends only the fork that makes the call."""
    while calls:
        source, to = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(calls, to)
        os.close(to)
        with os.fdopen(source) as lines:
            found = [line[:-1] for line in lines]
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        yield from found
        calls = calls[len(found) :]
        if calls:
            assert code != 0
            hang = code == -signal.SIGALRM
            yield f"hangs for {SECONDS} s" if hang else f"crashes with {signal.Signals(-code).name}"
            calls = calls[1:]


def main(seed: str, count: int) -> None:
    torch.set_num_threads(1)  # a fork has no other threads
    reason = native.unavailable_reason("cpu") or native.unavailable_reason("host")
    assert reason is None, reason
    unknown = [name for name in op_names() if name.startswith("host.") and name not in BUILDERS]
    assert not unknown, f"without arguments to try: {unknown}"
    rng = random.Random(seed)
    torch.manual_seed(0)
    valid = [Call(name, "valid", build, False) for name, build in BUILDERS.items()]
    for each in valid:
        call(each.op, each.build())  # raises no error
    certain = list(certain_calls())
    failures: collections.Counter[str] = collections.Counter()
    made, ops = 0, set()
    rest = (random_call(rng) for _ in range(count))
    calls = [*valid, *certain]
    while calls:
        for each, failure in zip(calls, outcomes(calls), strict=True):
            made, ops = made + 1, ops | {each.op}
            if failure:
                failures[failure] += 1
                print(json.dumps({"op": each.op, "call": each.what, "failure": failure}), flush=True)
        calls = list(itertools.islice(rest, BATCH))
    print(json.dumps({"certain": len(certain), "calls": made, "ops": len(ops), "failures": failures}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
