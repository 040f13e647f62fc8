"""Breaks a training step's time on this GPU down by part, compared with predictions.

    python benchmarks/tune_step.py [--quick] [--out FILE.json]

The step is that of bench_step.py in bf16, eager and with CUDA graphs (without --quick also compiled, which takes
minutes, and at other batch sizes). Each is timed, then profiled for one step. The predictions are computed from bytes
and operations, without a device; a large difference means that either the estimate or a kernel is wrong.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from scenarioclip_fast.benchmarks import timing

ROOT = Path(__file__).resolve().parents[1]

EAGER, GRAPHS, COMPILED = "ours, bf16", "ours, bf16, cuda graphs", "ours, bf16, compiled"
PARTS = {
    "products": "vision: matrix products",
    "attention": "vision: attention",
    "elementwise": "vision: elementwise, norms, copies",
    "weights": "weight casts, gradient norm, AdamW, EMA",
    "rest": "text towers, losses, other",
}
NOTE = (
    "Predictions: estimates from bytes and operations, made without a device; all matrix products, including those of "
    "texts, at 600 TFLOP/s.\nThe bytes of attention are predicted under elementwise: compare the sum of the two."
)


@dataclass(frozen=True)
class Predicted:
    """Predictions for a step of 128 scenes on an H100."""

    ms: dict[str, float]
    scenes_per_s: float
    host_ms: str = "20-25"
    kernels: int | None = None
    casts: int | None = None


PREDICTED = {
    EAGER: Predicted(
        {"products": 34, "attention": 5, "elementwise": 45, "weights": 3, "rest": 3.5}, 1420, kernels=2150, casts=766
    ),
    COMPILED: Predicted({"products": 34, "attention": 5, "elementwise": 23, "weights": 3, "rest": 3}, 1880),
}
PREDICTED_SCENES = 128

# Analysing a profile

VISION = "step: vision"  # profiler range of the vision encoders
_BACKWARD = "autograd::engine::evaluate_function: "
_KINDS = [
    # Fused kernels are named after all their operators and may mention adjacent products and attention.
    ("elementwise", r"^triton_(?!tem_)"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("weights", r"multi_tensor_apply|lpnorm|fused_?adam|_foreach_"),
    ("products", r"gemm|gemv|nvjet|xmma|cutlass|wgmma|splitk|convol|^triton_tem_|aten::(addmm|mm|bmm|baddbmm)\b"),
]
# Only a cast and shape changes: Inductor fuses casts of activations into their producers or consumers.
_ONLY_CAST = re.compile(r"^triton_poi_fused__to_copy(_(_to_copy|t|view|transpose|permute))*_\d+$")


@functools.cache
def own_kernels() -> frozenset[str]:
    """The names of this package's kernels, from their sources."""
    found: set[str] = set()
    for path in (ROOT / "kernels").rglob("*.py"):
        found.update(re.findall(r"^@triton\.jit.*?\ndef (\w+)\(", path.read_text(encoding="utf-8"), re.M | re.S))
    for path in (ROOT / "kernels").rglob("*.cu*"):
        declared = r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\("
        found.update(re.findall(declared, path.read_text(encoding="utf-8")))
    return frozenset(found)


def kind_of(name: str) -> str:
    """Classify a kernel by name: "products", "attention", "weights" (optimizer, EMA), "own" or "elementwise"."""
    plain = re.sub(r"\(anonymous namespace\)::|^void ", "", name)
    if not plain.startswith(("at::", "aten::")) and re.split(r"[<(]", plain)[0].split("::")[-1] in own_kernels():
        return "own"
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.I)), "elementwise")


@dataclass(frozen=True)
class Launch:
    """A kernel, copy or fill on the device; on a CPU, an operator's self time."""

    name: str
    us: float
    is_kernel: bool
    vision: bool
    of_weights: bool  # cast of a weight or its gradient, or accumulation into .grad
    cast: bool

    @property
    def part(self) -> str:
        kind = kind_of(self.name)
        if kind == "weights" or self.of_weights:
            return "weights"
        return kind if self.vision and kind != "own" else "rest"


class Event:
    """A span on a host thread, linked to the enclosing span."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.name, self.category = record["name"], record["cat"]
        self.start, self.us = float(record["ts"]), float(record["dur"])
        self.args = record.get("args", {})
        self.parent: Event | None = None
        self.children_us = 0.0

    @property
    def end(self) -> float:
        return self.start + self.us

    def enclosing(self) -> Iterator[Event]:
        """This event and the enclosing ones, innermost first."""
        event: Event | None = self
        while event is not None:
            yield event
            event = event.parent

    @property
    def sequence(self) -> int | None:
        """The number shared by a forward operator and its backward node."""
        number = self.args.get("Sequence number", -1)
        return number if 0 <= number < 2**62 else None


def nested(records: Iterable[dict[str, Any]]) -> dict[Any, list[Event]]:
    """The spans of each thread by start, linked to their parents."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for record in records:
        if record.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            threads[record["tid"]].append(Event(record))
    for events in threads.values():
        events.sort(key=lambda e: (e.start, -e.us))
        stack: list[Event] = []
        for event in events:
            while stack and event.start >= stack[-1].end:
                stack.pop()
            if stack:
                event.parent = stack[-1]
                if event.category == "cpu_op":
                    event.parent.children_us += event.us
            stack.append(event)
    return threads


def launches(records: Sequence[dict[str, Any]], weights: set[tuple[int, ...]]) -> list[Launch]:
    """The device's work in a Chrome trace of torch.profiler. `weights`: shapes of the model's parameters."""
    records = [r for r in records if r.get("ph") == "X"]
    threads = nested(records)
    all_events = [event for events in threads.values() for event in events]
    # Sequence number -> the forward operator, the last with that number in time order.
    forward: dict[int, Event] = {}
    for event in sorted(all_events, key=lambda e: e.start):
        if event.sequence is not None and not any(e.name.startswith(_BACKWARD) for e in event.enclosing()):
            forward[event.sequence] = event

    def in_vision(event: Event) -> bool:
        for e in event.enclosing():
            if e.name == VISION:
                return True
            if e.name.startswith(_BACKWARD):
                made_by = forward.get(e.sequence) if e.sequence is not None else None
                return made_by is not None and any(f.name == VISION for f in made_by.enclosing())
        return False

    def launch(name: str, us: float, is_kernel: bool, event: Event | None) -> Launch:
        if event is None:
            return Launch(name, us, is_kernel, False, False, False)
        enclosing = list(event.enclosing())
        copies = [e for e in enclosing if e.name == "aten::_to_copy"]
        shapes = [tuple(dims[0]) for e in copies if (dims := e.args.get("Input Dims"))]
        only_cast = bool(_ONLY_CAST.match(name))
        accumulated = any("AccumulateGrad" in e.name for e in enclosing)
        of_weights = accumulated or only_cast or any(shape in weights for shape in shapes)
        return Launch(name, us, is_kernel, in_vision(event), of_weights, bool(copies) or only_cast)

    on_device = [r for r in records if r.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not on_device:
        return [
            launch(e.name, us, True, e)
            for e in all_events
            if e.category == "cpu_op" and (us := e.us - e.children_us) > 0
        ]
    launched = {e.args["correlation"]: e for e in all_events if "correlation" in e.args}
    return [
        launch(r["name"], float(r["dur"]), r["cat"] == "kernel", launched.get(r["args"].get("correlation")))
        for r in on_device
    ]


# Measuring


@dataclass
class Row:
    part: str
    measured_ms: float
    launches: int
    predicted_ms: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.measured_ms / self.predicted_ms if self.predicted_ms else None


@dataclass
class Result:
    """The result of one form at one batch size."""

    form: str
    scenes: int
    step_ms: float = 0.0  # without the profiler
    host_ms: float = 0.0
    host_few_ms: float | None = None
    needed_tflop: float = 0.0
    memory_gib: float | None = None
    kernels: int = 0
    casts: int = 0
    rows: list[Row] = field(default_factory=list)
    longest: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    @property
    def predicted(self) -> Predicted | None:
        return PREDICTED.get(self.form) if self.scenes == PREDICTED_SCENES or timing.REHEARSAL else None


def mark_vision(step: Any) -> None:
    """Mark the vision encoders of student and teacher in profiles."""
    encoders = [*step.model.vision.values(), step.teacher.encoders["vision.global"]]
    for encoder in dict.fromkeys(encoders):
        encoder.run = _ranged(encoder.run)


def _ranged(run: Callable[..., Any]) -> Callable[..., Any]:
    def ranged(*args: Any, **options: Any) -> Any:
        with torch.profiler.record_function(VISION):
            return run(*args, **options)

    return ranged


def trace_of(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Profile one call, after a warm-up call of the profiler."""
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if timing.on_gpu("cuda") else [])]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "trace.json")
        with profile(
            activities=activities,
            record_shapes=True,
            schedule=schedule(wait=0, warmup=1, active=1),
            acc_events=True,
            on_trace_ready=lambda p: p.export_chrome_trace(path),
        ) as profiler:
            for _ in range(2):
                run()
                timing.synchronize("cuda")
                profiler.step()
        return json.loads(Path(path).read_text(encoding="utf-8", errors="replace"))["traceEvents"]


def times_of(run: Callable[[], Any], rounds: int, warmup: int) -> tuple[float, float]:
    """Median ms of a call, and until the call returns on the host."""
    whole, host = [], []
    for i in range(-warmup, rounds):
        timing.synchronize("cuda")
        start = time.perf_counter()
        run()
        returned = time.perf_counter()
        timing.synchronize("cuda")
        if i >= 0:
            host.append(1e3 * (returned - start))
            whole.append(1e3 * (time.perf_counter() - start))
    return statistics.median(whole), statistics.median(host)


def summarise(result: Result, found: Sequence[Launch]) -> None:
    """Fill in the rows of `result` from a profile."""
    ms: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    by_name: dict[tuple[str, str], list[float]] = defaultdict(list)
    for launch in found:
        ms[launch.part] += launch.us / 1e3
        counts[launch.part] += 1
        by_name[launch.name, launch.part].append(launch.us / 1e3)
    predicted = result.predicted.ms if result.predicted is not None else {}
    result.rows = [Row(part, ms[part], counts[part], predicted.get(part)) for part in PARTS]
    result.kernels = sum(launch.is_kernel for launch in found)
    result.casts = sum(launch.cast and launch.is_kernel for launch in found)
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    result.longest = [
        {"kernel": name[:200], "part": part, "ms": round(sum(times), 4), "launches": len(times)}
        for (name, part), times in ranked[:40]
    ]


def table(result: Result) -> str:
    """Format the result as a text table."""
    predicted, device = result.predicted, sum(row.measured_ms for row in result.rows)

    def line(what: str, expected: float | None, measured: float | int, launched: int | None = None) -> str:
        columns = [
            "" if expected is None else f"{expected:g}",
            f"{measured:.2f}" if isinstance(measured, float) else str(measured),
        ]
        columns += [f"{measured / expected:.2f}" if expected else "", "" if launched is None else str(launched)]
        return f"  {what:46}" + "".join(f"{column:>11}" for column in columns)

    lines = [f"{result.form}, {result.scenes} scenes"]
    if result.error is not None:
        return f"{lines[0]}: {result.error}"
    lines.append(f"  {'times in ms':46}" + "".join(f"{c:>11}" for c in ("predicted", "measured", "ratio", "launches")))
    lines += [line(PARTS[row.part], row.predicted_ms, row.measured_ms, row.launches) for row in result.rows]
    total = None if predicted is None else sum(predicted.ms.values())
    lines.append(line("device total", total, device))
    lines.append(line("step, without the profiler", total, result.step_ms))
    lines.append(line("scenes/s", predicted.scenes_per_s if predicted else None, 1e3 * result.scenes / result.step_ms))
    lines.append(line("kernels, count", predicted.kernels if predicted else None, result.kernels))
    lines.append(line("casts, count", predicted.casts if predicted else None, result.casts))
    host = f"  host: {result.host_ms:.1f} ms until the step is launched"
    if result.host_few_ms is not None:
        host += f", {result.host_few_ms:.1f} ms with few scenes, when the launch queue never fills"
    lines.append(host + (f"; predicted {predicted.host_ms} ms" if predicted is not None else ""))
    if products := result.rows[0].measured_ms:
        rate = 1e3 * result.needed_tflop / products
        lines.append(
            f"  {result.needed_tflop:.2f} TFLOP of model operations: {rate:.0f} TFLOP/s during matrix products"
        )
    return "\n".join(lines)


def measure(form: str, sizes: Sequence[int], quick: bool) -> Iterator[Result]:
    """One result per batch size, on one model."""
    from scenarioclip_fast.benchmarks.bench_step import build, matmul_precision, release, synthetic

    from scenarioclip_fast.model import TokenTable
    from scenarioclip_fast.model.flops import batch_flops

    device, size = timing.device_for("cuda"), timing.sized(224, 64)
    step = None
    release()
    with matmul_precision("high"):
        for scenes in sizes:
            result = Result(form, scenes)
            try:
                inputs = synthetic(scenes, size, device)
                if step is None:
                    step = build(form, "vit-b-32", inputs.vocabulary, device)
                    mark_vision(step)
                    weights = {tuple(p.shape) for p in step.model.parameters()}
                run = functools.partial(step.step, inputs.batch)
                if timing.on_gpu("cuda"):
                    torch.cuda.reset_peak_memory_stats()
                rounds, warmup = timing.sized((5 if quick else 10, 3), (1, 1))
                result.step_ms, result.host_ms = times_of(run, rounds, warmup)
                if timing.on_gpu("cuda"):
                    result.memory_gib = torch.cuda.max_memory_allocated() / 2**30
                vocabulary: Any = inputs.vocabulary
                tokens = TokenTable(vocabulary, step.model.config.text).to(device)
                result.needed_tflop = batch_flops(step.model.config, inputs.batch, tokens, teacher=True) / 1e12
                summarise(result, launches(trace_of(run), weights))
                if form == EAGER:  # as many launches, but the device never falls behind
                    few = synthetic(timing.sized(8, 3), size, device).batch
                    result.host_few_ms = times_of(functools.partial(step.step, few), rounds, 1)[1]
            except Exception as error:  # other forms and sizes can still run
                result.error = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            yield result


def record(results: Sequence[Result], path: Path) -> None:
    device = torch.cuda.get_device_name() if timing.on_gpu("cuda") else "a rehearsal on the CPU"
    forms = []
    for result in results:
        rows = [{**asdict(row), "ratio": row.ratio} for row in result.rows]
        forms.append({**asdict(result), "rows": rows, "predicted": result.predicted and asdict(result.predicted)})
    text = json.dumps({"device": device, "torch": torch.__version__, "note": NOTE, "forms": forms}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only 128 scenes, not compiled")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(arguments)
    if not timing.REHEARSAL and not torch.cuda.is_available():
        print("error: torch sees no GPU: there is nothing to measure", file=sys.stderr)
        return 2
    forms = [EAGER, GRAPHS] if args.quick else [EAGER, GRAPHS, COMPILED]
    sizes = timing.sized([128] if args.quick else [128, 64, 256], [3] if args.quick else [3, 4])
    results: list[Result] = []
    print(NOTE)
    for form in forms:
        for result in measure(form, sizes, args.quick):
            results.append(result)
            print(table(result), flush=True)
            if args.out is not None:
                record(results, args.out)
    return int(any(result.error is not None for result in results))


if __name__ == "__main__":
    sys.exit(main())
