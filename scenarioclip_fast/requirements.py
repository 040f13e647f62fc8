"""Optional packages and compiled parts: what is here, and why the rest is not."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

from scenarioclip_fast.errors import MissingDependencyError

# module -> (distribution, extra that brings it, what it is for)
OPTIONAL = {
    "triton": ("triton", "triton", "the Triton kernels"),
    "nvidia.dali": ("nvidia-dali-cuda130", "dali", "decoding JPEGs with DALI"),
    "simplejpeg": ("simplejpeg", "train", "decoding JPEGs on the CPU"),
    "PIL": ("pillow", "train", "writing pictures and reading odd image formats"),
    "instant_clip_tokenizer": ("instant-clip-tokenizer", "train", "turning texts into CLIP's token ids"),
    "safetensors": ("safetensors", "train", "reading and writing weights"),
    "yaml": ("pyyaml", "train", "reading configs"),
    "tqdm": ("tqdm", "train", "progress bars"),
    "matplotlib": ("matplotlib", "train", "plots and reports"),
    "fsspec": ("fsspec", "remote", "reading shards that are not on this machine"),
    "sklearn": ("scikit-learn", "eval", "t-SNE maps"),
    "pyarrow": ("pyarrow", "parquet", "writing Parquet files"),
    "pytest": ("pytest", "test", "running tests and benchmarks"),
    "tensorboard": ("tensorboard", "tensorboard", "TensorBoard logs"),
}


def require(module: str) -> ModuleType:
    """Imports an optional package, or raises MissingDependencyError that names it, its use and how to get it."""
    distribution, extra, use = OPTIONAL[module.split(".")[0] if module not in OPTIONAL else module]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{distribution} is not installed or does not load ({error}); it is needed for {use}: "
            f"pip install 'scenarioclip-fast[{extra}]'"
        ) from error


def triton_interprets() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def missing(need: str) -> str | None:
    """Why a backend's need ("triton", "native-cpu", "native-cuda") is not met here, or None when it is."""
    if need.startswith("native-"):
        from scenarioclip_fast import native

        return native.why_not(need.removeprefix("native-"))
    if need == "triton":
        return import_problem("triton")
    raise AssertionError(f"unknown need {need!r}")


@functools.cache
def import_problem(module: str) -> str | None:
    """What `require` would say of an optional package, or None when it loads."""
    try:
        require(module)
    except MissingDependencyError as error:
        return str(error)
    return None
