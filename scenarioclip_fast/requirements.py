"""Check the installation of the package and its dependencies; errors state what is missing, why, and the fix."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

from scenarioclip_fast.errors import InstallationError, MissingDependencyError

# The first supported and the first unsupported version, as in pyproject.toml.
TORCH = ((2, 11), (2, 14))
TORCH_REQUIREMENT = "torch>={}.{},<{}.{}".format(*TORCH[0], *TORCH[1])

# module -> (distribution, extra that installs it, use)
OPTIONAL = {
    "triton": ("triton", "triton", "the Triton kernels"),
    "nvidia.dali": ("nvidia-dali-cuda130", "dali", "decoding JPEGs with DALI"),
    "nvidia.nvimgcodec": ("nvidia-nvimgcodec-cu13", "nvimgcodec", "decoding JPEGs with nvImageCodec"),
    "torchvision": ("torchvision", "torchvision", "decoding JPEGs on a GPU with torchvision"),
    "simplejpeg": ("simplejpeg", "train", "decoding JPEGs on the CPU"),
    "PIL": ("pillow", "train", "writing pictures and reading less common image formats"),
    "instant_clip_tokenizer": ("instant-clip-tokenizer", "train", "tokenizing texts for CLIP"),
    "safetensors": ("safetensors", "train", "reading and writing weights"),
    "yaml": ("pyyaml", "train", "reading configs"),
    "tqdm": ("tqdm", "train", "progress bars"),
    "matplotlib": ("matplotlib", "train", "plots and reports"),
    "fsspec": ("fsspec", "remote", "shards on a URL"),
    "sklearn": ("scikit-learn", "eval", "t-SNE maps"),
    "pyarrow": ("pyarrow", "parquet", "writing Parquet files"),
    "transformers": ("transformers", "generate", "the models of the generation pipeline"),
    "openai": ("openai", "generate", "requests to a vision-language model on a server"),
    "inflect": ("inflect", "generate", "singular forms of names"),
    "rapidfuzz": ("rapidfuzz", "generate", "similar names"),
    "scipy": ("scipy", "generate", "the detector of drawn scenes"),
    "ray": ("ray", "generate-ray", "running on a Ray cluster"),
    "pytest": ("pytest", "bench", "running benchmarks"),
    "shtab": ("shtab", "train", "shell completion"),
    "tensorboard": ("tensorboard", "tensorboard", "TensorBoard logs"),
}


def require(module: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingDependencyError: it cannot be imported; the message gives its use and how to install it.
    """
    distribution, extra, use = OPTIONAL[module.split(".")[0] if module not in OPTIONAL else module]
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # torchvision raises RuntimeError next to another torch
        raise MissingDependencyError(
            f"{distribution} is not installed or does not load ({error}); it is needed for {use}: "
            f"pip install 'scenarioclip-fast[{extra}]'"
        ) from error


@functools.cache
def import_problem(module: str) -> str | None:
    """Return the error message of `require` for an optional package, or None if it can be imported."""
    try:
        require(module)
    except MissingDependencyError as error:
        return str(error)
    return None


def missing_dependency(error: ModuleNotFoundError) -> str | None:
    """Return the one-line message for a missing required package, or None for any other module."""
    requirement = {"torch": TORCH_REQUIREMENT, "numpy": "numpy", "einops": "einops"}.get(error.name or "")
    return requirement and f"{error.name} is not installed: run `pip install '{requirement}'`"


def triton_interprets() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unsupported_torch() -> str | None:
    """Return why the installed torch is not supported, or None if it is."""
    import torch

    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if TORCH[0] <= version < TORCH[1]:
        return None
    age = "old" if version < TORCH[0] else "new"
    return (
        f"torch {torch.__version__} is too {age}: run `pip install '{TORCH_REQUIREMENT}'` "
        "and reinstall scenarioclip-fast"
    )


@functools.cache
def check_installed() -> None:
    """Check that the package was imported from an installation, editable or not.

    Only an installation maps the checkout's folder kernels/ to scenarioclip_fast.kernels. Python started in a checkout
    imports the package from there, whatever is installed elsewhere.

    Raises:
        InstallationError: it was not; the message gives the fix.
    """
    package = Path(__file__).resolve().parent
    checkout = package.parent
    spec = importlib.util.find_spec("scenarioclip_fast.kernels")
    if spec is not None and spec.origin is not None:
        kernels = Path(spec.origin).resolve().parent
        candidates = (package / "kernels", checkout / "kernels")
        if any(folder.is_dir() and folder.samefile(kernels) for folder in candidates):
            return
        raise InstallationError(
            f"scenarioclip_fast was imported from {package}, but the installed package is that of {kernels.parent}: "
            "start Python in another directory, or run `pip install -e .` in the checkout you use"
        )
    if not (checkout / "setup.py").is_file() or not (checkout / "kernels").is_dir():
        raise InstallationError(
            f"{package} has no kernels: the installation is incomplete, reinstall scenarioclip-fast"
        )
    if (other := _installed_package()) is not None:
        raise InstallationError(
            f"scenarioclip_fast was imported from the checkout {checkout} instead of the installed package in {other}: "
            "start Python in another directory, or run `pip install -e .` in the checkout"
        )
    raise InstallationError(
        f"the checkout {checkout} is not installed: run `pip install -e .` there, or `make install` and use .venv/bin"
    )


def _installed_package() -> Path | None:
    import importlib.metadata

    # setuptools leaves metadata in the checkout too, so look for the package behind each.
    for distribution in importlib.metadata.distributions(name="scenarioclip-fast"):
        folder = Path(str(distribution.locate_file("scenarioclip_fast"))).resolve()
        if folder != Path(__file__).resolve().parent and (folder / "__init__.py").is_file():
            return folder.parent
    return None
