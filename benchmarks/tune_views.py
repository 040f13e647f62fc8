"""Times render_views on this GPU, as whole calls and kernel by kernel, compared with predictions; then varies options.

    python benchmarks/tune_views.py [--quick] [--out FILE.json]

All views of 128 scenes, as in bench_views.py, which also checks them. The predictions are estimates made without a
device, from the instructions of the compiled kernels (SASS for sm_90a) and the bytes moved, for 1,280 views of 128
scenes of 640 x 480, scaled to the actual number of views. Kernel times come from the profiler's trace, times of whole
calls from device events with a cold L2.

--quick takes fewer samples, profiles one case instead of four and skips the slow variants. Put the best parameters
into kernels/views/jobs.h (bytes of a wave) and views.cu (rows and tiles of a block), measured times into
kernels/views/README.md.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from scenarioclip_fast.benchmarks.bench_views import GPU_SCENES, GPU_SIDE, GPU_SIZE, MixedViews
from scenarioclip_fast.benchmarks.timing import (
    REHEARSAL,
    DeviceTimer,
    backend_for,
    device_for,
    median_seconds,
    on_gpu,
    sized,
    synchronize,
)

from scenarioclip_fast.dispatch import unavailable_reason

# Estimates for 1,280 views of 128 scenes.
VIEWS = 1280
DEVICE_MS = 6.0
KERNEL_MS = {"blur": 2.0, "across": 1.7, "down": 1.05, "masks": 0.5}
HOST_MS_PER_SCENE, HOST_MS = 0.028, 0.9  # planning: in Python, and in C++ for the batch
VIEWS_PER_S = 105_000  # as launched
PREDICTION_SOURCE = "estimates from SASS and bytes, made without a device"

# Group of kernels -> pattern of their names; the first match counts.
GROUPS = {
    "blur": "blur",
    "across": "across",
    "down": "down",
    "masks": "mask|centre|runs",  # run lengths to bits; sums of the masks, for their centres
    "weights": "weigh",  # of the resize
    "augmentation": "augment|grey",
    "region": "region",  # of focused_region
    "copies": "^Mem(cpy|set)",
}
REST = "rest"

CASES = [(objects, train) for objects in ("masked", "crop") for train in (False, True)]
PROFILED = ("masked", True)
# Scenes, dtype and memory format, varied one at a time; the last slow variant is float32 training's.
VARIANTS = [
    (sized(32, 2), torch.bfloat16, torch.channels_last),
    (GPU_SCENES, torch.float32, torch.channels_last),
    (GPU_SCENES, torch.bfloat16, torch.contiguous_format),
]
SLOW_VARIANTS = [
    (sized(512, 8), torch.bfloat16, torch.channels_last),
    (GPU_SCENES, torch.float32, torch.contiguous_format),
]
Row = dict[str, Any]


def group_of(kernel: str) -> str:
    """The group of a kernel by its name in a trace: "void scf::(anonymous namespace)::down<float>(...)"."""
    name = re.split(r"[<(]", kernel.replace("(anonymous namespace)::", ""), maxsplit=1)[0].strip()
    name = name if name.startswith("Mem") else re.split(r"::|\s", name)[-1]
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), REST)


def by_group(kernels: Iterable[tuple[str, float]], views: int) -> list[Row]:
    """Launches and time of each group, with the prediction; `kernels`: (name, ms) of every launch."""
    times: dict[str, list[float]] = {}
    for name, ms in kernels:
        times.setdefault(group_of(name), []).append(ms)
    rows = []
    for group in sorted(times, key=[*GROUPS, REST].index):
        row = {"kernels": group, "launches": len(times[group])}
        rows.append(measured(row, sum(times[group]), KERNEL_MS.get(group), views / VIEWS))
    total = [ms for group in times.values() for ms in group]
    return [*rows, measured({"kernels": "all", "launches": len(total)}, sum(total), DEVICE_MS, views / VIEWS)]


def measured(row: Row, ms: float, predicted: float | None, scale: float) -> Row:
    """Add the time to `row` and, if there is a prediction, the prediction and the ratio."""
    row |= {"ms": round(ms, 4)}
    if predicted is not None:
        row |= {"predicted ms": round(predicted * scale, 3), "measured/predicted": round(ms / (predicted * scale), 2)}
    return row


def profiled(run: Callable[[], Any], calls: int) -> list[tuple[str, float]]:
    """(name, ms) of every kernel and copy of a call of `run`; in a rehearsal, of every operator."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    activity, kind = (
        (ProfilerActivity.CUDA, DeviceType.CUDA) if on_gpu("cuda") else (ProfilerActivity.CPU, DeviceType.CPU)
    )
    run()
    synchronize("cuda")
    with profile(activities=[activity], acc_events=True) as trace:
        for _ in range(calls):
            run()
        synchronize("cuda")
    events = [event for event in trace.events() if event.device_type == kind]
    events.sort(key=lambda event: event.time_range.start)
    launches = len(events) // calls  # calls are alike: take the last one's kernels
    return [(event.name, event.time_range.elapsed_us() / 1e3) for event in events[len(events) - launches :]]


def call_times(mixed: MixedViews, rounds: int, **options: Any) -> Row:
    """Device and host times of a call, and the corresponding views/s."""

    def run() -> Any:
        return mixed.render(**options)

    views, scenes = len(mixed.views), len(mixed.scenes)
    if on_gpu("cuda"):
        timer = DeviceTimer(run)
        device = 1e3 * timer.median(rounds)
        launched = 1e3 * statistics.median(timer.sample(hide_host=False) for _ in range(min(rounds, 5)))
    else:
        device = launched = 1e3 * median_seconds(run, "cuda", rounds, 1)
    row = measured({"views": views}, device, DEVICE_MS, views / VIEWS)
    return row | {
        "host ms": round(mixed.host_ms(), 3),
        "predicted host ms": round(HOST_MS_PER_SCENE * scenes + HOST_MS, 2),
        "plan_views ms": round(mixed.planning_ms(), 3),
        "as launched ms": round(launched, 3),
        "views/s": round(1e3 * views / launched),
        "views/s, device alone": round(1e3 * views / device),
    }


def table(rows: Sequence[Row]) -> str:
    head = list(dict.fromkeys(key for row in rows for key in row))
    cells = [head, *([str(row.get(key, "")) for key in head] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(head))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="take eight seconds instead of half a minute")
    parser.add_argument("--out", type=Path, help="JSON file for all results")
    args = parser.parse_args(arguments)
    if not (REHEARSAL or torch.cuda.is_available()):
        print("error: torch sees no GPU: there is nothing to tune", file=sys.stderr)
        return 2
    if reason := unavailable_reason("render_views", backend_for("cuda"), device_for("cuda")):
        print(f"error: render_views cannot run on the GPU: {reason}", file=sys.stderr)
        return 2
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu("cuda") else "none: a rehearsal on the CPU",
        "inputs": f"{GPU_SCENES} scenes, {GPU_SIZE[0]} x {GPU_SIZE[1]} to {GPU_SIDE}",
        "predictions": PREDICTION_SOURCE,
    }
    rounds = sized(8 if args.quick else 20, 2)

    def keep(part: str, rows: list[Row]) -> None:
        record[part] = rows
        if args.out is not None:  # after each part, so that an aborted run keeps the earlier ones
            args.out.write_text(json.dumps(record, indent=1) + "\n")

    print(f"{record['device']}; {record['inputs']}, bf16, channels last; predictions are {PREDICTION_SOURCE}")
    rows = []
    for case in CASES:
        rows.append({"case": title(*case)} | call_times(MixedViews.of("cuda", *case), rounds))
        keep("calls", rows)
    print("\nwhole calls (ms: on the device; host ms: until the call returns; views/s: as launched, planning included)")
    print(f"({VIEWS_PER_S:,} views/s predicted)\n{table(rows)}", flush=True)

    for case in [PROFILED] if args.quick else CASES:
        mixed = MixedViews.of("cuda", *case)
        try:
            kernels = profiled(mixed.render, sized(3, 1))
        except Exception as error:  # the other results do not need the profiler
            print(f"\nkernels of {title(*case)}: the profiler failed: {error}", flush=True)
            continue
        if not kernels:
            print(f"\nkernels of {title(*case)}: the profiler recorded none", flush=True)
            continue
        rows = by_group(kernels, len(mixed.views))
        keep(f"kernels, {title(*case)}", rows)
        print(f"\nkernels of a call, {title(*case)}\n{table(rows)}", flush=True)

    rows = []
    for scenes, dtype, layout in VARIANTS if args.quick else [*VARIANTS, *SLOW_VARIANTS]:
        row = {"variant": f"{scenes} scenes, {str(dtype)[6:]}, {str(layout)[6:]}"}
        try:
            rows.append(
                row | call_times(MixedViews.of("cuda", *PROFILED, scenes), rounds, dtype=dtype, memory_format=layout)
            )
        except torch.OutOfMemoryError as error:
            rows.append(row | {"error": str(error).splitlines()[0]})
        keep("variants", rows)
    print(f"\nvariants, {title(*PROFILED)}\n{table(rows)}", flush=True)
    return 0


def title(objects: str, train: bool) -> str:
    return f"{objects}, {'training' if train else 'evaluation'}"


if __name__ == "__main__":
    sys.exit(main())
