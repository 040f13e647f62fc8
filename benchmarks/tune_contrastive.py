"""Times the tuning parameters of contrastive_loss's Triton backend on this GPU, varied one at a time, and the parts of
a call, compared with predictions.

    python benchmarks/tune_contrastive.py [--quick] [--rows 32768] [--width 512] [--out FILE.json]

--quick takes about 15 s of an H100: the parts of a call, and the most promising variants.

The predictions are estimates made without a device: from the code compiled for sm_90a (instructions, registers, blocks
per multiprocessor), the bytes moved, and published ceilings of an H100 SXM. A ratio far from 1 shows which estimate is
wrong, and thus where to look.

Put the best parameters into kernels/contrastive (sum_tile and gradient_tile in plan.py, block_side in large.py), and
the table into its README.md.
"""

from __future__ import annotations

import argparse
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
from scenarioclip_fast.kernels.contrastive import large
from scenarioclip_fast.kernels.contrastive.plan import Plan, Tile
from torch import Tensor

DEVICE = "cuda"
OURS = "ours: triton"
# Rows and texts per tile, warps, stages. The first is the code's choice for a large level.
SUM_TILES = [(128, 128, 4, 3), (256, 128, 8, 3), (128, 128, 4, 2), (128, 256, 8, 3), (128, 128, 8, 3)]
GRADIENT_TILES = [(128, 128, 4, 3), (256, 128, 8, 3), (256, 128, 8, 4), (128, 128, 8, 3), (128, 128, 4, 2)]
SIDES = [8448, 2048, 4224, 11520, 16896]
DEFAULTS: dict[str, Any] = {"gradient_tile": GRADIENT_TILES[0], "block_side": SIDES[0], "sum_tile": SUM_TILES[0]}
# A new tile compiles for 2 s, a new side does not.
QUICK: dict[str, list[Any]] = {
    "gradient_tile": [(256, 128, 8, 3), (256, 128, 8, 4)],
    "block_side": [4224, 11520, 16896],
    "sum_tile": [(256, 128, 8, 3), (128, 128, 4, 2)],
}
FULL: dict[str, list[Any]] = {"gradient_tile": GRADIENT_TILES[1:], "block_side": SIDES[1:], "sum_tile": SUM_TILES[1:]}
TOLERANCE = 0.02  # relative difference from the default result: bfloat16 gradients, other summation order

Span = tuple[float, float]  # lower and upper estimate, milliseconds

# An H100 SXM: dense bfloat16 operations/s, multiprocessors, operations per cycle of each.
PEAK, PROCESSORS, OPERATIONS = 989e12, 132, 4096
BANDWIDTH = 3.0e12  # bytes/s of a copy, reads plus writes
CUBLAS = (650e12, 730e12)  # operations/s at K = 512
L2 = (32, 39)  # bytes per cycle and multiprocessor
ONE_BLOCK = (0.65, 0.70)  # share of the peak if one block fills a multiprocessor: nothing hides its epilogue
CUBLAS_TILE = (128, 256)  # the likely one


def total(*spans: Span) -> Span:
    return sum(low for low, _ in spans), sum(high for _, high in spans)


def memory_time(bytes_: float, slowdown: float = 1.0) -> Span:
    """Time at full bandwidth, and `slowdown` times as long."""
    ms = 1e3 * bytes_ / BANDWIDTH
    return ms, ms * slowdown


@dataclass(frozen=True)
class Predictions:
    """Estimates in milliseconds for N = U = rows."""

    rows: int
    width: int

    @property
    def operations(self) -> float:
        """Operations of one matrix product."""
        return 2.0 * self.rows**2 * self.width

    def product(self, share: Span) -> Span:
        """Time of one matrix product at a share of the peak."""
        one = 1e3 * self.operations / PEAK
        return one / share[1], one / share[0]

    def cublas(self) -> Span:
        one = 1e3 * self.operations
        return one / CUBLAS[1], one / CUBLAS[0]

    def peak_share(self, tile: Sequence[int], written: int) -> Span:
        """Share of the peak that the L2 cache and the epilogue allow. `written`: bytes written per logit."""
        high, wide = tile[:2]
        cycles = high * wide * self.width * 2 / OPERATIONS  # of the tile, at full rate
        demand = (2 * (high + wide) * self.width + written * high * wide) / cycles  # bytes per cycle
        cache_limit = tuple(b / demand for b in L2)
        limits = [cache_limit, ONE_BLOCK if high * wide > 128 * 128 else (1.0, 1.0)]
        return min(low for low, _ in limits), min(high for _, high in limits)

    def forward_tiles(self, tile: Sequence[int]) -> Span:
        return self.product(self.peak_share(tile, written=0))

    def gradient_tiles(self, tile: Sequence[int]) -> Span:
        return self.product(self.peak_share(tile, written=2))

    def products(self, side: int) -> Span:
        """Both gradient products, block by block: the last wave of tiles may be partial, and accumulators are read and
        written once per block row."""
        high, wide = CUBLAS_TILE
        blocks = [min(side, self.rows - start) for start in range(0, self.rows, side)]
        waves = 0.0
        for block in blocks:
            tiles = math.ceil(block / high) * math.ceil(self.width / wide)
            waves += block * math.ceil(tiles / PROCESSORS) * PROCESSORS / tiles
        low, high_ms = (2 * t * waves / self.rows for t in self.cublas())
        accumulation = memory_time(4.0 * self.rows * self.width * 2 * (len(blocks) - 1))
        return low, high_ms + accumulation[1]

    def four(self, side: int) -> Span:
        one = self.cublas()
        return total(one, one, self.products(side))

    def inverse_norms(self) -> Span:
        """Of images and texts in bfloat16, in the forward pass only. Narrow loads may take 1.5 x as long."""
        return memory_time(2 * self.rows * self.width * 2.0, slowdown=1.5)

    def finish_rows(self) -> Span:
        return memory_time(2 * self.rows * self.width * 8.0, slowdown=1.5)

    def forward(self, tile: Sequence[int]) -> Span:
        return total(
            self.forward_tiles(tile), self.inverse_norms(), self.partial_sums(tile), self.vectors(), self.vectors()
        )

    def partial_sums(self, tile: Sequence[int]) -> Span:
        parts = self.rows / tile[0] + self.rows / tile[1]
        return memory_time(4.0 * self.rows * parts, slowdown=2.0)

    @staticmethod
    def vectors() -> Span:
        """Kernels over N numbers, which take as long as a launch."""
        return 0.005, 0.02

    def both(self, sum_tile: Sequence[int], gradient_tile: Sequence[int], block_side: int) -> Span:
        backward = [self.gradient_tiles(gradient_tile), self.products(block_side)]
        return total(self.forward(sum_tile), *backward, self.finish_rows(), self.vectors())


def parts(predicted: Predictions) -> list[tuple[str, str, Span]]:
    """The parts of a call, forward and backward: name, pattern of its kernels' names, and estimate."""
    side = DEFAULTS["block_side"]
    return [
        ("inverse_norms", r"inverse_norms", predicted.inverse_norms()),
        ("tile_sums", r"tile_sums", predicted.forward_tiles(DEFAULTS["sum_tile"])),
        ("sums of partial sums", r"reduce_kernel|aten::sum", predicted.partial_sums(DEFAULTS["sum_tile"])),
        ("log_sums", r"log_sums", predicted.vectors()),
        ("mean_parts, mean_loss", r"mean_parts|mean_loss", predicted.vectors()),
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
    measured_over_predicted: float | None = None  # relative to the middle of the range
    share_of_bare_products: float | None = None
    error: str = ""
    after_s: float = 0.0  # since the script started

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
    """Prints each row as it is added, and rewrites the JSON file atomically."""

    def __init__(self, header: dict[str, Any], out: Path | None) -> None:
        self.header, self.out = header, out
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
            partial.write_text(json.dumps({**self.header, "rows": [asdict(r) for r in self.rows]}, indent=1) + "\n")
            os.replace(partial, self.out)


@contextmanager
def override(name: str, value: Any) -> Iterator[None]:
    """Make a method of Plan, or block_side, return `value`."""
    result = Tile(*value) if isinstance(value, tuple) else value
    with patch.object(large if name == "block_side" else Plan, name, lambda *_, **__: result):
        yield


def milliseconds(run: Callable[[], Any]) -> float:
    return 1e3 * median_seconds(run, DEVICE, rounds=1 if WARM else sized(10, 1), warmup_rounds=sized(2, 0))


def host_milliseconds(run: Callable[[], Any]) -> float:
    """Time until the last launch is queued."""
    times = []
    for _ in range(sized(5, 1)):
        synchronize(DEVICE)
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    synchronize(DEVICE)
    return 1e3 * min(times)


def kernel_milliseconds(run: Callable[[], Any], calls: int = 5) -> dict[str, float]:
    """Time of each kernel of a call, by name; in a rehearsal, of each operator."""
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
    """One row per part of a call, and one for the remaining kernels."""
    rest = {kernel: ms for kernel, ms in kernels.items() if ms > 0}
    for name, pattern, span in parts(predicted):
        own = [kernel for kernel in rest if re.search(pattern, kernel)]
        yield Row("part of one call", name, span, sum(rest.pop(kernel) for kernel in own))
    longest = sorted(rest, key=lambda kernel: -rest[kernel])[:3]
    names = ", ".join(re.sub(r"^void |<.*|\(.*", "", kernel)[:30] for kernel in longest)
    yield Row("part of one call", f"others: {names}" if longest else "others", None, sum(rest.values()))


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(
        ((f.double() - e.double()).norm() / e.double().norm()).item() for f, e in zip(found, expected, strict=True)
    )


class Tuner:
    """Times the parts of a call and variants of the tuning parameters, adding rows to a table."""

    def __init__(self, rows: int, width: int, table: Table) -> None:
        # Imported here because it imports pytest.
        from scenarioclip_fast.benchmarks.bench_contrastive import FORMS, Products, features

        self.width, self.table, self.loss = width, table, FORMS[OURS]
        self.predicted = Predictions(rows, width)
        self.leaves = features(rows, width, DEVICE)
        self.products = Products(*(t.detach() for t in self.leaves[:2]))
        self.product_ms: dict[str, float] = {}

    def both(self) -> list[Tensor]:
        loss = self.loss(*self.leaves)
        return [loss.detach(), *torch.autograd.grad(loss, self.leaves)]

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            return [self.loss(*self.leaves)]

    def time_products(self) -> None:
        from scenarioclip_fast.benchmarks.bench_contrastive import FOUR, PRODUCTS

        low, high = self.predicted.products(DEFAULTS["block_side"])
        spans = {FOUR: self.predicted.four(DEFAULTS["block_side"]), "K = width": self.predicted.cublas()}
        for kind in PRODUCTS:
            form, run, _ = self.products.named(kind)
            self.product_ms[kind] = milliseconds(run)
            self.table.add(Row("bare products", form, spans.get(kind, (low / 2, high / 2)), self.product_ms[kind]))

    def time_call(
        self, what: str, variant: str, run: Callable[[], list[Tensor]], product: str, span: Span
    ) -> list[Tensor] | None:
        """Time a call and return its result; None if it fails, as a configuration may not fit this GPU."""
        try:
            result = run()
            ms = milliseconds(run)
        except Exception as error:
            self.table.add(Row(what, variant, span, error=describe_error(error)))
            return None
        self.table.add(Row(what, variant, span, ms, share_of_bare_products=self.product_ms[product] / ms))
        return result

    def time_parts(self) -> None:
        """Time each part of a call, by the profiler, and the host."""
        # The profiler's times are with a warm L2 cache: their sum differs slightly from the time of a call.
        try:
            for row in split(kernel_milliseconds(self.both), self.predicted):
                self.table.add(row)
        except Exception as error:  # the other rows do not need the profiler
            self.table.add(Row("part of one call", "all", error=describe_error(error)))
        self.table.add(Row("host time of a call", "one level", (2.35, 2.35), host_milliseconds(self.both)))

    def time_levels(self) -> None:
        from scenarioclip_fast.benchmarks.bench_contrastive import level_call

        leaves, loss = level_call(OURS, False, self.width, DEVICE)

        def levels() -> Any:
            return torch.autograd.grad(loss().sum(), leaves)

        # Estimated at 78 us with narrow loads of G, 20 to 30 us less with wide ones.
        self.table.add(Row("forward + backward", "three levels", (0.048, 0.078), milliseconds(levels)))
        self.table.add(Row("host time of a call", "three levels", (1.35, 1.35), host_milliseconds(levels)))


def tune(rows: int, width: int, variants: dict[str, list[Any]], table: Table) -> None:
    from scenarioclip_fast.benchmarks.bench_contrastive import FOUR

    tuner = Tuner(rows, width, table)
    predicted = tuner.predicted
    tuner.time_products()
    span = predicted.both(**DEFAULTS)
    default_both = tuner.time_call("forward + backward", "current defaults", tuner.both, FOUR, span)
    span = predicted.forward(DEFAULTS["sum_tile"])
    default_forward = tuner.time_call("forward", "current defaults", tuner.forward, "K = width", span)
    if default_both is None or default_forward is None:
        raise SystemExit("error: the loss fails with its default parameters")
    tuner.time_parts()
    tuner.time_levels()
    for name, values in variants.items():
        for value in values:
            is_tile = isinstance(value, tuple)
            label = "{} x {}, {} warps, {} stages".format(*value) if is_tile else f"{value}"
            with override(name, value):
                if name == "sum_tile":
                    expected, span = default_forward, predicted.forward(value)
                    result = tuner.time_call(name, label, tuner.forward, "K = width", span)
                else:
                    expected, span = default_both, predicted.both(**{**DEFAULTS, name: value})
                    result = tuner.time_call(name, label, tuner.both, FOUR, span)
            if result is not None and not (deviation := difference(result, expected)) < TOLERANCE:
                table.add(Row(name, label, error=f"relative error {deviation:.1e}"))


def describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:100]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="time the parts of a call and a few variants")
    parser.add_argument("--rows", type=int, default=sized(32768, 128))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--out", type=Path, help="JSON file, rewritten after each row")
    args = parser.parse_args(arguments)
    if not REHEARSAL and not torch.cuda.is_available():
        parser.error("torch sees no GPU: there is nothing to tune")
    name = torch.cuda.get_device_name() if on_gpu(DEVICE) else device_for(DEVICE)
    print(f"{args.rows} rows, width {args.width}, {name}. Predictions are estimates for an H100 SXM.")
    header = {
        "device": name,
        "rows_of_a_side": args.rows,
        "width": args.width,
        "rehearsal": REHEARSAL,
        "predictions": "estimates for an H100 SXM from compiled code, bytes and ceilings, made without a device",
    }
    tune(args.rows, args.width, QUICK if args.quick else FULL, Table(header, args.out))


if __name__ == "__main__":
    main()
