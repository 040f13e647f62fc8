"""Times the tuning choices of the Triton form of contrastive_loss on this GPU, one varied at a time, and the parts of
one call, measured against predictions.

    python benchmarks/tune_contrastive.py [--quick] [--rows 32768] [--width 512] [--out FILE.json]

--quick takes about 15 s of an H100: the parts of a call, and the most promising variants.

The predictions are estimates, and no device was involved: arithmetic on what the compiler makes of the kernels for
sm_90a (instructions, registers, blocks of a multiprocessor), on the bytes that they move, and on ceilings of an H100
SXM as others have measured them. A ratio far from 1 names the estimate that was wrong, and so where to look.

Put winning choices into kernels/contrastive/contrastive_triton.py (Plan.sum_tile, Plan.gradient_tile,
Plan.block_side), and the table into kernels/contrastive/README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from scenarioclip_fast.benchmarks.timing import REHEARSAL, WARM, device_for, median_seconds, on_gpu, sized, synchronize
from torch import Tensor

DEVICE = "cuda"
# Rows and texts of a tile, warps, stages. The first is what the code takes for a large level.
SUM_TILES = [(256, 128, 8, 3), (128, 128, 4, 3), (128, 128, 4, 2), (128, 256, 8, 3), (128, 128, 8, 3)]
GRADIENT_TILES = [(128, 128, 4, 3), (256, 128, 8, 3), (256, 128, 8, 4), (128, 128, 8, 3), (128, 128, 4, 2)]
SIDES = [8448, 2048, 4224, 11520, 16896]
DEFAULTS = {"gradient_tile": GRADIENT_TILES[0], "block_side": SIDES[0], "sum_tile": SUM_TILES[0]}
# A tile is compiled first, in 2 s; a side is not.
QUICK = {
    "gradient_tile": [(256, 128, 8, 3), (256, 128, 8, 4)],
    "block_side": [4224, 11520, 16896],
    "sum_tile": [(128, 128, 4, 3), (128, 128, 8, 3)],
}
FULL = {"gradient_tile": GRADIENT_TILES[1:], "block_side": SIDES[1:], "sum_tile": SUM_TILES[1:]}
WRONG = 0.02  # relative difference from the usual result: gradients in bfloat16, summed in another order

Span = tuple[float, float]  # milliseconds: least and most

# An H100 SXM: dense bfloat16, multiprocessors, operations a cycle of each.
PEAK, PROCESSORS, OPERATIONS = 989e12, 132, 4096
BANDWIDTH = 3.0e12  # bytes/s of a copy, read and written
LIBRARY = (650e12, 730e12)  # operations/s of the matrix library at K = 512
L2 = (32, 39)  # bytes a cycle that a multiprocessor gets
ALONE = (0.65, 0.70)  # share of the peak where one block fills a multiprocessor: nothing hides its epilogue
PRODUCT_TILE = (128, 256)  # of the matrix library, the likely one


def total(*spans: Span) -> Span:
    return sum(low for low, _ in spans), sum(high for _, high in spans)


def moved(bytes_: float, slowest: float = 1.0) -> Span:
    """Time at full bandwidth, and at a slowest-th of it."""
    ms = 1e3 * bytes_ / BANDWIDTH
    return ms, ms * slowest


@dataclass(frozen=True)
class Predictions:
    """Estimates in milliseconds for N = U = rows."""

    rows: int
    width: int

    @property
    def operations(self) -> float:
        """Of one product."""
        return 2.0 * self.rows**2 * self.width

    def product(self, share: Span) -> Span:
        """One product at a share of the peak."""
        one = 1e3 * self.operations / PEAK
        return one / share[1], one / share[0]

    def library(self) -> Span:
        one = 1e3 * self.operations
        return one / LIBRARY[1], one / LIBRARY[0]

    def share(self, tile: Sequence[int], written: int) -> Span:
        """Of the peak: what the L2 cache allows, and the epilogue. `written`: bytes of each logit."""
        high, wide = tile[:2]
        cycles = high * wide * self.width * 2 / OPERATIONS  # of the tile, at full rate
        asked = (2 * (high + wide) * self.width + written * high * wide) / cycles  # bytes a cycle
        of_cache = tuple(b / asked for b in L2)
        limits = [of_cache, ALONE if high * wide > 128 * 128 else (1.0, 1.0)]
        return min(low for low, _ in limits), min(high for _, high in limits)

    def forward_tiles(self, tile: Sequence[int]) -> Span:
        return self.product(self.share(tile, written=0))

    def gradient_tiles(self, tile: Sequence[int]) -> Span:
        return self.product(self.share(tile, written=2))

    def products(self, side: int) -> Span:
        """Both of the backward pass by blocks: the library's last wave of tiles may be a part of one, and what blocks
        are added to is read and written once a block row."""
        high, wide = PRODUCT_TILE
        blocks = [min(side, self.rows - start) for start in range(0, self.rows, side)]
        waves = 0.0
        for block in blocks:
            tiles = math.ceil(block / high) * math.ceil(self.width / wide)
            waves += block * math.ceil(tiles / PROCESSORS) * PROCESSORS / tiles
        low, most = (2 * t * waves / self.rows for t in self.library())
        again = moved(4.0 * self.rows * self.width * 2 * (len(blocks) - 1))
        return low, most + again[1]

    def four(self, side: int) -> Span:
        one = self.library()
        return total(one, one, self.products(side))

    def unit_rows(self) -> Span:
        """Both sides, forward and again backward: bfloat16 in and out. Narrow loads were estimated at half as much
        again."""
        return moved(4 * self.rows * self.width * 4.0, slowest=1.5)

    def finish_rows(self) -> Span:
        return moved(2 * self.rows * self.width * 8.0, slowest=1.5)

    def means(self) -> Span:
        """mean_losses and sum_levels: one block each."""
        ms = 0.075 * self.rows / 32768
        return ms, ms

    def forward(self, tile: Sequence[int]) -> Span:
        low, high = self.unit_rows()
        return total(
            self.forward_tiles(tile), (low / 2, high / 2), self.partial_sums(tile), self.vectors(), self.means()
        )

    def partial_sums(self, tile: Sequence[int]) -> Span:
        parts = self.rows / tile[0] + self.rows / tile[1]
        return moved(4.0 * self.rows * parts, slowest=2.0)

    @staticmethod
    def vectors() -> Span:
        """Kernels over N numbers: as long as a launch."""
        return 0.005, 0.02

    def both(self, sum_tile: Sequence[int], gradient_tile: Sequence[int], block_side: int) -> Span:
        low, high = self.unit_rows()
        backward = [(low / 2, high / 2), self.gradient_tiles(gradient_tile), self.products(block_side)]
        return total(self.forward(sum_tile), *backward, self.finish_rows(), self.vectors())


def parts(predicted: Predictions) -> list[tuple[str, str, Span]]:
    """Of one call, forward and backward: name, what the names of its kernels match, and the estimate."""
    side = DEFAULTS["block_side"]
    return [
        ("unit_rows", r"unit_rows", predicted.unit_rows()),
        ("tile_sums", r"tile_sums", predicted.forward_tiles(DEFAULTS["sum_tile"])),
        ("sums of partial sums", r"reduce_kernel|aten::sum", predicted.partial_sums(DEFAULTS["sum_tile"])),
        ("log_sums", r"log_sums", predicted.vectors()),
        ("mean_losses, sum_levels", r"mean_losses|sum_levels", predicted.means()),
        ("mean_gradients, factors", r"mean_gradients|factors", predicted.vectors()),
        ("tile_gradients", r"tile_gradients", predicted.gradient_tiles(DEFAULTS["gradient_tile"])),
        ("the two products", r"gemm|nvjet|cutlass|cublas|aten::(add)?mm", predicted.products(side)),
        ("finish_rows", r"finish_rows", predicted.finish_rows()),
    ]


@dataclass
class Row:
    what: str
    variant: str
    predicted_ms: Span | None = None
    measured_ms: float | None = None
    measured_over_predicted: float | None = None  # the middle of the range
    share_of_bare_products: float | None = None
    error: str = ""
    after_s: float = 0.0  # since the start of the script

    def line(self) -> str:
        span = "" if self.predicted_ms is None else "{:.3f}-{:.3f}".format(*self.predicted_ms)
        cells = [self.what, self.variant, span, self.error or number(self.measured_ms)]
        cells += ["" if self.error else number(self.measured_over_predicted), number(self.share_of_bare_products)]
        return columns(cells)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def columns(cells: Sequence[str]) -> str:
    widths = (18, 58, 15, 12, 21, 10)
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


HEAD = columns(["what", "variant", "predicted ms", "measured ms", "measured / predicted", "share of bare products"])


class Table:
    """Rows, printed as they come and kept in a file that is whole after each."""

    def __init__(self, about: dict[str, Any], out: Path | None) -> None:
        self.about, self.out = about, out
        self.rows: list[Row] = []
        self.start = time.monotonic()
        print(HEAD, flush=True)

    def add(self, row: Row) -> None:
        if row.predicted_ms is not None and row.measured_ms is not None:
            row.measured_over_predicted = row.measured_ms / (sum(row.predicted_ms) / 2)
        row.after_s = round(time.monotonic() - self.start, 2)
        self.rows.append(row)
        print(row.line(), flush=True)
        if self.out is not None:
            partial = self.out.with_suffix(".partial")
            partial.write_text(json.dumps({**self.about, "rows": [asdict(r) for r in self.rows]}, indent=1) + "\n")
            os.replace(partial, self.out)


@contextmanager
def chosen(name: str, value: Any) -> Iterator[None]:
    """A method of Plan that gives `value`; without effect in a rehearsal, which needs no Triton."""
    if REHEARSAL and importlib.util.find_spec("triton") is None:
        yield
        return
    from scenarioclip_fast.kernels.contrastive.contrastive_triton import Plan, Tile

    given = Tile(*value) if isinstance(value, tuple) else value
    with patch.object(Plan, name, lambda *_, **__: given):
        yield


def milliseconds(run: Callable[[], Any]) -> float:
    return 1e3 * median_seconds(run, DEVICE, rounds=1 if WARM else sized(10, 1), warmup_rounds=sized(2, 0))


def host_milliseconds(run: Callable[[], Any]) -> float:
    """Until the last launch is queued."""
    times = []
    for _ in range(sized(5, 1)):
        synchronize(DEVICE)
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    synchronize(DEVICE)
    return 1e3 * min(times)


def kernel_milliseconds(run: Callable[[], Any], calls: int = 5) -> dict[str, float]:
    """Time of each kernel, by name, in one call. In a rehearsal, of each operator."""
    kind = "CUDA" if on_gpu(DEVICE) else "CPU"
    with torch.profiler.profile(
        activities=[getattr(torch.profiler.ProfilerActivity, kind)], acc_events=True
    ) as profile:
        for _ in range(calls):
            run()
        synchronize(DEVICE)
    attribute = "self_device_time_total" if on_gpu(DEVICE) else "self_cpu_time_total"
    return {event.key: getattr(event, attribute) / calls / 1e3 for event in profile.key_averages()}


def split(kernels: dict[str, float], predicted: Predictions) -> Iterator[Row]:
    """The parts of a call, and what belongs to none of them."""
    left = {kernel: ms for kernel, ms in kernels.items() if ms > 0}
    for name, pattern, span in parts(predicted):
        own = [kernel for kernel in left if re.search(pattern, kernel)]
        yield Row("part of one call", name, span, sum(left.pop(kernel) for kernel in own))
    most = sorted(left, key=lambda kernel: -left[kernel])[:3]
    names = ", ".join(re.sub(r"^void |<.*|\(.*", "", kernel)[:30] for kernel in most)
    yield Row("part of one call", f"others: {names}" if most else "others", None, sum(left.values()))


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return max(
        ((f.double() - w.double()).norm() / w.double().norm()).item() for f, w in zip(found, wanted, strict=True)
    )


def tune(rows: int, width: int, variants: dict[str, list[Any]], table: Table) -> None:
    # Imported here: it brings pytest, and the features and products of the benchmark.
    from scenarioclip_fast.benchmarks.bench_contrastive import FOUR, PRODUCTS, WAYS, Products, features, level_call

    predicted = Predictions(rows, width)
    way = "ours: triton"
    leaves = features(rows, width, DEVICE)

    def both() -> list[Tensor]:
        loss = WAYS[way](*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [WAYS[way](*leaves)]

    products = Products(*(t.detach() for t in leaves[:2]))
    side = DEFAULTS["block_side"]
    bare: dict[str, float] = {}
    halves = tuple(t / 2 for t in predicted.products(side))
    spans = {FOUR: predicted.four(side), "K = width": predicted.library()}
    for kind in PRODUCTS:
        form, run, _ = products.named(kind)
        bare[kind] = milliseconds(run)
        table.add(Row("bare products", form, spans.get(kind, halves), bare[kind]))

    def measure(what: str, variant: str, run: Callable[[], list[Tensor]], kind: str, span: Span) -> list[Tensor] | None:
        try:
            result = run()
            ms = milliseconds(run)
        except Exception as error:  # a configuration may not fit this GPU: the others still count
            table.add(Row(what, variant, span, error=f"{type(error).__name__}: {str(error)[:100]}"))
            return None
        table.add(Row(what, variant, span, ms, share_of_bare_products=bare[kind] / ms))
        return result

    whole = measure("forward + backward", "current defaults", both, FOUR, predicted.both(**DEFAULTS))
    once = measure("forward", "current defaults", forward, "K = width", predicted.forward(DEFAULTS["sum_tile"]))
    if whole is None or once is None:
        raise SystemExit("error: the loss itself fails here, and so would its variants")
    # The profiler's own time of each kernel, with a warm L2 cache: their sum is not quite the whole above.
    try:
        for row in split(kernel_milliseconds(both), predicted):
            table.add(row)
    except Exception as error:  # the rest needs no profiler
        table.add(Row("part of one call", "all", error=f"{type(error).__name__}: {str(error)[:100]}"))
    table.add(Row("host time of a call", "one level", (2.35, 2.35), host_milliseconds(both)))
    level_leaves, level_loss = level_call(way, False, width, DEVICE)

    def levels() -> Any:
        return torch.autograd.grad(level_loss().sum(), level_leaves)

    # Estimated at 78 us with narrow loads of G, at 20 to 30 less with wide ones.
    table.add(Row("forward + backward", "three levels", (0.048, 0.078), milliseconds(levels)))
    table.add(Row("host time of a call", "three levels", (1.35, 1.35), host_milliseconds(levels)))

    for name, values in variants.items():
        for value in values:
            if name == "sum_tile":
                run, wanted, kind = forward, once, "K = width"
                span = predicted.forward(value)
            else:
                run, wanted, kind = both, whole, FOUR
                span = predicted.both(**{**DEFAULTS, name: value})
            tile = isinstance(value, tuple)
            label = "{} x {}, {} warps, {} stages".format(*value) if tile else f"{value}"
            with chosen(name, value):
                result = measure(name, label, run, kind, span)
            if result is not None and not (off := difference(result, wanted)) < WRONG:
                table.add(Row(name, label, error=f"relative error {off:.1e}"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="the parts of a call, and few variants")
    parser.add_argument("--rows", type=int, default=sized(32768, 128))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--out", type=Path, help="JSON file, written anew after each row")
    args = parser.parse_args(arguments)
    if not REHEARSAL and not torch.cuda.is_available():
        parser.error("torch sees no GPU: there is nothing to tune")
    name = torch.cuda.get_device_name() if on_gpu(DEVICE) else device_for(DEVICE)
    print(f"{args.rows} rows, width {args.width}, {name}. Predictions: estimates for an H100 SXM, without a device.")
    about = {
        "device": name,
        "rows_of_a_side": args.rows,
        "width": args.width,
        "rehearsal": REHEARSAL,
        "predictions": "estimates for an H100 SXM from compiled code, bytes and ceilings; no device was involved",
    }
    tune(args.rows, args.width, QUICK if args.quick else FULL, Table(about, args.out))


if __name__ == "__main__":
    main()
