"""Times the choices inside the Triton form of contrastive_loss on this GPU, one varied at a time.

    python benchmarks/tune_contrastive.py [--rows 32768] [--width 512] [--out FILE.json]

Choices that lead belong into kernels/contrastive/contrastive_triton.py (Plan.sum_tile, Plan.gradient_tile,
Plan.block_side, GROUPED), the table into kernels/contrastive/README.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from scenarioclip_fast.kernels.contrastive import contrastive_triton
from scenarioclip_fast.kernels.contrastive.contrastive_triton import Plan, Tile
from torch import Tensor

from scenarioclip_fast.ops import contrastive_loss

SUM_TILES = [Tile(256, 128, 8), Tile(128, 128, 4), Tile(128, 128, 4, 2), Tile(128, 256, 8), Tile(128, 128, 8)]
GRADIENT_TILES = [Tile(128, 128, 4), Tile(128, 128, 8), Tile(128, 128, 4, 2)]
SIDES = [2048, 4096, 8448, 11520, 16896]


@contextmanager
def chosen(name: str, value: Any) -> Iterator[None]:
    """A method of Plan that gives `value`, or a constant of the module."""
    owner: Any = Plan if hasattr(Plan, name) else contrastive_triton
    with patch.object(owner, name, (lambda *_: value) if owner is Plan else value):
        yield


def milliseconds(run: Callable[[], Any], rounds: int = 10) -> float:
    """Median of device times, the L2 cache emptied before each."""
    flush = torch.empty(2**26, dtype=torch.int32, device="cuda")
    times = []
    for k in range(rounds + 2):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if k >= 2:
            times.append(start.elapsed_time(end))
    return sorted(times)[rounds // 2]


def features(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    text = torch.randn(rows, width, device="cuda")
    image = text + 2 * torch.randn_like(text)
    scale = torch.tensor(1 / 0.07, device="cuda")
    return image.bfloat16().requires_grad_(), text.bfloat16().requires_grad_(), scale.requires_grad_()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU: there is nothing to tune")
    leaves = features(args.rows, args.width)

    def both() -> None:
        torch.autograd.grad(contrastive_loss(*leaves, backend="triton"), leaves)

    def forward() -> None:
        with torch.no_grad():
            contrastive_loss(*leaves, backend="triton")

    x, y = leaves[0].detach(), leaves[1].detach()
    product = torch.empty(min(args.rows, 16384), min(args.rows, 16384), dtype=x.dtype, device="cuda")
    blocks = (args.rows / len(product)) ** 2
    one = milliseconds(lambda: torch.mm(x[: len(product)], y[: len(product)].T, out=product)) * blocks
    results: list[dict[str, Any]] = []

    def measure(what: str, value: Any, run: Callable[[], None], products: int) -> None:
        try:
            with chosen(what, value):
                row: dict[str, Any] = {"choice": what, "value": str(value), "ms": milliseconds(run)}
                row["share of bare products"] = products * one / row["ms"]
        except Exception as error:  # a configuration may not fit this GPU: the others still count
            row = {"choice": what, "value": str(value), "error": f"{type(error).__name__}: {str(error)[:100]}"}
        results.append(row)
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)

    print(f"{args.rows} rows, width {args.width}: one bare product takes {one:.3f} ms")
    for tile in SUM_TILES:
        measure("sum_tile", tile, forward, 1)
    for side in SIDES:
        measure("block_side", side, both, 4)
    for tile in GRADIENT_TILES:
        measure("gradient_tile", tile, both, 4)
    if args.out is not None:
        record = {"device": torch.cuda.get_device_name(), "rows": args.rows, "width": args.width}
        args.out.write_text(json.dumps({**record, "product_ms": one, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
