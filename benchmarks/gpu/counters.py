"""Runs the largest kernels once, between the profiler's start and stop, for Nsight Compute.

Run: export PYTHONPATH=benchmarks
     ncu --profile-from-start off --clock-control none --csv --page raw ... python -m gpu.counters
`make gpu` does so with METRICS, and prints `table` of the output.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

# Metric of Nsight Compute -> column of the table.
METRICS = {
    "gpu__time_duration.sum": "us",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor %",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": "L2 %",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed": "L1 %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
}
# Function names, without namespaces and template arguments. Kernels of cuBLAS and PyTorch are left out.
KERNELS = "regex:^(?!.*(nvjet|gemm|splitK|elementwise|reduce_kernel|multi_tensor|CatArray|distribution)).*"


def command(output: str, python: str) -> list[str]:
    """The call of ncu that writes the counters to the file `output`."""
    options = ["--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw"]
    options += ["--metrics", ",".join(METRICS), "--kernel-name", KERNELS, "--launch-count", "200"]
    return ["ncu", *options, "--log-file", output, python, "-m", "gpu.counters"]


def short_name(kernel: str) -> str:
    """The name of a kernel without template arguments; a CUTLASS kernel by its epilogue."""
    if "cutlass" in kernel:
        words = re.findall(r"scf::(?:[a-z_]+::)*([A-Za-z]+)", kernel)
        return "cutlass " + " ".join(dict.fromkeys(words))[:40]
    return re.split(r"[<(]", kernel.replace("(anonymous namespace)::", ""), maxsplit=1)[0].split("::")[-1][-44:]


def table(lines: Iterable[str]) -> list[str]:
    """One line per kernel: the values of its longest launch, longest kernel first."""
    rows = csv.reader(line for line in lines if line.startswith('"'))
    header = next(rows, [])
    if not header:
        return ["ncu wrote no counters"]
    launches: dict[str, list[list[float]]] = defaultdict(list)
    columns = [header.index(metric) if metric in header else None for metric in METRICS]
    name = header.index("Kernel Name")
    unit = ""
    for row in rows:
        if not row[name]:  # the line of units
            unit = row[columns[0]] if columns[0] is not None else ""
            continue
        launches[short_name(row[name])].append([float("nan") if c is None else _number(row[c]) for c in columns])
    factor = {"ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}.get(unit, 1.0)
    lines_out = [f"{'kernel':46}{'launches':>9}" + "".join(f"{column:>10}" for column in METRICS.values())]
    for kernel, values in sorted(launches.items(), key=lambda item: -max(v[0] for v in item[1])):
        longest = max(values, key=lambda v: v[0])
        longest[0] *= factor
        lines_out.append(f"{kernel:46}{len(values):>9}" + "".join(f"{value:>10.1f}" for value in longest))
    return lines_out


def _number(text: str) -> float:
    with suppress(ValueError):
        return float(text.replace(",", ""))
    return float("nan")


def calls() -> Iterable[Callable[[], Any]]:
    import torch
    from scenarioclip_fast.benchmarks.bench_contrastive import FORMS, features
    from scenarioclip_fast.benchmarks.bench_views import MixedViews
    from scenarioclip_fast.benchmarks.timing import device_for, sized

    from scenarioclip_fast.dispatch import unavailable_reason
    from scenarioclip_fast.ops import add_layer_norm, quick_gelu, short_attention

    device = device_for("cuda")
    mixed = MixedViews.of("cuda", "masked", True)
    yield mixed.render
    x, branch = (torch.randn(sized(64000, 64), 768, device=device).bfloat16().requires_grad_() for _ in range(2))
    wide = torch.randn(sized(64000, 64), 3072, device=x.device).bfloat16().requires_grad_()
    qkv = torch.randn(sized(64000, 64), 3 * 768, device=x.device).bfloat16().requires_grad_()
    weight, bias, out = (torch.ones(768, device=x.device, requires_grad=True) for _ in range(3))
    expand = torch.ones(3072, device=x.device, requires_grad=True)

    def layers() -> Any:  # with biases, as in a block
        total, normed = add_layer_norm(x, branch, weight, bias, branch_bias=out)
        y = short_attention(qkv, 12, length=sized(50, 8))
        leaves = (x, weight, out, wide, expand, qkv)
        outputs = (total, normed, quick_gelu(wide, expand), y)
        return torch.autograd.grad(outputs, leaves, (total, normed, wide.detach(), y.detach()))

    yield layers
    leaves = features(sized(32768, 128), 512, "cuda")
    for form in ("ours: cuda", "ours: triton"):
        if unavailable_reason("contrastive_loss", form.removeprefix("ours: "), leaves[0].device.type, "bfloat16"):
            continue

        def both(form: str = form) -> Any:
            return torch.autograd.grad(FORMS[form](*leaves), leaves)

        yield both


def main() -> None:
    import torch

    for run in calls():
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
