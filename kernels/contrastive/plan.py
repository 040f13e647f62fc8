"""How the Triton kernels multiply features: operand types, tiles, precision."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """A tile of S: rows, texts, warps and stages."""

    rows: int
    texts: int
    warps: int
    stages: int = 3

    def count(self, rows: int, texts: int) -> int:
        """How many tiles a matrix of this size has."""
        return -(-rows // self.rows) * -(-texts // self.texts)

    def options(self) -> dict[str, int]:
        return {"BM": self.rows, "BN": self.texts, "num_warps": self.warps, "num_stages": self.stages}


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def exact(features: Tensor) -> bool:
    """Whether products need the precision of float32."""
    return features.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


def operands(dtype: torch.dtype, is_exact: bool) -> tuple[torch.dtype, str, int]:
    """The type of the operands, the precision of their products, and the block of the inner dimension."""
    if dtype == torch.bfloat16 and not _interprets():
        return torch.bfloat16, "tf32", 64
    # float16 has the mantissa of TF32, not its range. The interpreter has no TF32, and its bfloat16 is wrong.
    return torch.float32, "tf32x3" if is_exact else "tf32", 32


@functools.lru_cache
def _plan(dtype: torch.dtype, width: int, is_exact: bool, device: torch.device) -> Plan:
    operand, precision, inner = operands(dtype, is_exact)
    # Devices of capability 12 have TMA too, but less shared memory than the tall tiles need.
    tma = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return Plan(operand, precision, -(-width // inner) * inner, inner, tma, folds=dtype == torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """How features of one dtype and width are multiplied on one device."""

    operand: torch.dtype
    precision: str
    width: int  # D rounded up to the blocks of the inner dimension, so that no load needs a mask
    inner: int
    tma: bool
    folds: bool  # whether a large level's features are multiplied as they are

    @property
    def rounds(self) -> bool:
        """Whether unit rows are rounded to TF32. The interpreter multiplies in float32."""
        return self.operand == torch.float32 and self.precision == "tf32" and not _interprets()

    @staticmethod
    def of(features: Tensor) -> Plan:
        return _plan(features.dtype, features.shape[1], exact(features), features.device)

    def sum_tile(self) -> Tile:
        """The tile of a large level's forward pass.

        In bfloat16 two blocks per multiprocessor, so that one's epilogue hides behind the other's products: on an H200
        2.31 ms at 32,768 rows, where tall tiles of 256 x 128, which read less, take 2.72.
        """
        return Tile(128, 128, 4 if self.operand == torch.bfloat16 else 8)

    def gradient_tile(self) -> Tile:
        """The tile of a large level's backward pass."""
        return Tile(128, 128, 4 if self.operand == torch.bfloat16 and self.tma else 8)

    def constants(self) -> dict[str, int | str]:
        return {"WIDTH": self.width, "BK": self.inner, "PRECISION": self.precision}


def are_aligned(rows: Sequence[Tensor]) -> bool:  # tensors [N, D]
    """Whether every row begins and ends at a multiple of 16 bytes, so that kernels may use 16-byte accesses."""
    for t in rows:
        (n, d), size = t.shape, t.itemsize
        if n and (t.data_ptr() % 16 or d * size % 16 or (n > 1 and t.stride()[0] * size % 16)):
            return False
    return True
