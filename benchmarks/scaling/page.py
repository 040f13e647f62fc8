"""The tables and the figure of docs/scaling.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scenarioclip_fast.benchmarks.readme import ROOT, replaced
from scenarioclip_fast.benchmarks.scaling.model import SMALL, Workload, loss_operations, sent_by_gloo, traffic
from scenarioclip_fast.benchmarks.scaling.network import GPUS_PER_NODE, NETWORKS, NVLINK, Network, seconds
from scenarioclip_fast.benchmarks.scaling.times import (
    FORMS,
    RECORD,
    TODAY,
    VIEWS,
    Assumptions,
    Computation,
    Step,
    exchange_bytes,
    measured,
    published,
    step,
)

from scenarioclip_fast.bench.tables import markdown_table
from scenarioclip_fast.report.style import COLOURS, CORRECT, DISTILLATION, GRID, INK, MUTED, canvas

PAGE, FIGURE = ROOT / "docs" / "scaling.md", ROOT / "docs" / "pictures" / "scaling.png"
COUNTS = Path(__file__).with_name("counts.json")
SIZES = (8, 64, 512, 4096)
TARGET_RANKS, TARGET = 512, 0.95
INFINIBAND = NETWORKS[1]
_GPU_BYTES, _STEP_BYTES = 80e9, 11.7 * 2**30  # an H100's memory, and the peak of the measured step
_LINES = {
    "ours": (COLOURS["global"], "-"),
    "ours, NCCL": (CORRECT, "--"),
    "node-wise": (DISTILLATION, ":"),
    "open_clip, local loss": (COLOURS["object"], "-"),
}


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def read_counts() -> tuple[Workload, dict[int, dict[str, list[dict[str, object]]]]]:
    """Return the counted workload, and ranks -> form -> each rank's `Counts` as a dictionary."""
    stored = json.loads(COUNTS.read_text(encoding="utf-8"))
    return replace(SMALL, parameters=stored["parameters"]), {int(k): v for k, v in stored["ranks"].items()}


def expected(form: str, work: Workload, ranks: int) -> dict[str, float]:
    """Return what the model says about the quantities of `counted`."""
    collectives = traffic(form, work, ranks)
    out: dict[str, float] = {"calls": len(collectives)}
    for op in ("all_reduce", "all_gather", "reduce_scatter"):
        out[op] = sum(c.bytes for c in collectives if c.op == op)
    return out | {"sent": sent_by_gloo(form, work, ranks), "operations": loss_operations(form, work, ranks)}


def counted(counts: dict[str, object]) -> dict[str, float]:
    """Flatten the counts of a rank."""
    calls, sizes, sent, operations = (counts[name] for name in ("calls", "bytes", "sent", "operations"))
    assert isinstance(calls, dict) and isinstance(sizes, dict) and isinstance(sent, int) and isinstance(operations, int)
    return {"calls": sum(calls.values()), **sizes, "sent": sent, "operations": operations}


def counts_table() -> list[str]:
    work, runs = read_counts()
    cells = []
    for ranks, forms in runs.items():
        for form, per_rank in forms.items():
            model = expected(form, work, ranks)
            found = [counted(counts) for counts in per_rank]
            row = [str(ranks), form]
            for name, value in model.items():
                worst = max((values[name] / value - 1 for values in found), key=abs)
                unit, scale = ("M", 1e6) if name == "operations" else ("kB", 1e3)
                shown = f"{found[0][name]:,.0f}" if name == "calls" else f"{found[0][name] / scale:,.1f} {unit}"
                row.append(f"{shown} ({100 * worst:+.1f} %)")
            cells.append(row)
    head = ["ranks", "form", "collectives", "all-reduced", "gathered", "reduce-scattered", "sent over TCP"]
    return markdown_table([*head, "operations of the loss"], cells)


def inputs_table() -> list[str]:
    t, work = measured(), published()
    texts = ", ".join(f"{work.texts(level):,.0f}" for level in work.levels)
    merged = ", ".join(f"{work.texts(level, TARGET_RANKS):,.0f}" for level in work.levels)
    record = f"record `benchmarks/records/{RECORD}`"
    rows = [
        ["kernels of a step of 128 scenes", f"{1e3 * t.step:.1f} ms", f"measured on an H200, {record}"],
        ["the same step with its host", f"{1e3 * t.launched:.1f} ms", "measured, same record"],
        ["this package's loss, per logit", f"{1e12 * t.loss:.2f} ps", "measured, same record, 32,768 rows"],
        ["open_clip's loss, compiled, per logit", f"{1e12 * t.open_clip:.2f} ps", "measured, same record"],
        ["losses of one GPU's scenes", f"{1e6 * t.small_loss:.0f} µs", "measured, same record"],
        ["trained weights", f"{work.parameters / 1e6:.1f} M, gradients in float32", "counted in the model"],
        ["rows and distinct texts of a GPU", f"128, 768, 384 and {texts}", "modelled: Zipf's law over OpenPSG's texts"],
        [f"distinct texts of {TARGET_RANKS} GPUs", merged, "modelled, the same"],
        ["NVLink, each GPU and direction", f"{NVLINK / 1e9:.0f} GB/s", "NCCL's constant; data sheet: 450 GB/s"],
        ["InfiniBand, each GPU", "50 GB/s", "data sheet: 400 Gb/s NDR"],
        ["Ethernet, each node of eight GPUs", "12.5 GB/s", "data sheet: 100 Gb/s"],
        ["latencies of NCCL's algorithms", "0.6 to 14 µs a step", "constants of NCCL's tuner for Hopper"],
        ["a step of gloo's ring over TCP", f"{1e6 * TODAY.tcp_hop:.0f} µs", "**assumed**"],
        ["launching a step takes the host", "half of the GPU's time", "**assumed**, with CUDA graphs"],
        ["merging equal ids takes the host, for each", f"{1e9 * TODAY.merge:.0f} ns", "**assumed**, one core"],
        ["a collective takes of the GPU beside it", percent(TODAY.multiprocessors), "**assumed**: 16 of 132 SMs"],
    ]
    return markdown_table(["input", "value", "source"], rows)


def efficiencies(work: Workload, networks: Sequence[Network]) -> list[str]:
    cells = []
    for network in networks:
        for form, label in FORMS.items():
            values = [step(form, ranks, network, work).efficiency for ranks in SIZES]
            cells.append([network.name, label, *map(percent, values)])
    return markdown_table(["network", "form", *(f"{ranks:,} GPUs" for ranks in SIZES)], cells)


def parts_table(ranks: int) -> list[str]:
    names = list(Step.__dataclass_fields__)
    cells = []
    for form, label in FORMS.items():
        found = step(form, ranks, INFINIBAND, published())
        cells.append([label, *(f"{1e3 * getattr(found, name):.1f}" for name in names[:-1]), f"{1e3 * found.total:.1f}"])
    return markdown_table(["ms", *names[:-1], "step"], cells)


def sensitivity_table() -> list[str]:
    t, work = measured(), published()
    larger = replace(t, step=4 * (t.step - t.optimizer) + t.optimizer)
    cases: list[tuple[str, Workload, Assumptions, Computation]] = [
        ("as above", work, TODAY, t),
        ("a step of the ring over TCP takes 10 µs", work, replace(TODAY, tcp_hop=10e-6), t),
        ("it takes 50 µs", work, replace(TODAY, tcp_hop=50e-6), t),
        ("bound by the host, as measured", work, replace(TODAY, host_bound=True), t),
        ("kernels twice as fast", work, TODAY, replace(t, step=t.step / 2, optimizer=t.optimizer / 2)),
        ("512 scenes a GPU", replace(work, scenes=512), TODAY, larger),
        ("512 scenes a GPU, all texts differ", replace(published(distinct=True), scenes=512), TODAY, larger),
        ("all texts differ", published(distinct=True), TODAY, t),
        ("scenes with unequal numbers of views", work, replace(TODAY, views=VIEWS), t),
        ("the same with `data.balance=false`", work, replace(TODAY, views=VIEWS, balance=False), t),
    ]
    forms = ("ours", "ours, between", "open_clip, local loss")
    cells = []
    for what, workload, assumed, times in cases:
        values = [step(form, TARGET_RANKS, INFINIBAND, workload, assumed, times).efficiency for form in forms]
        cells.append([what, *map(percent, values)])
    return markdown_table([f"{TARGET_RANKS} GPUs, InfiniBand", *(FORMS[form] for form in forms)], cells)


def memory_table() -> list[str]:
    rows = [
        ("ours", published(), "ours"),
        ("ours, all texts differ", published(distinct=True), "ours"),
        ("open_clip, local loss", published(), "open_clip, local loss"),
        ("open_clip", published(), "open_clip"),
    ]
    cells = []
    for label, work, form in rows:
        sizes = [exchange_bytes(form, work, ranks) for ranks in SIZES]
        fits = [
            f"{size / 2**30:,.2f}" if size < _GPU_BYTES - _STEP_BYTES else f"**{size / 2**30:,.0f}**" for size in sizes
        ]
        cells.append([label, *fits])
    return markdown_table(["GiB per GPU", *(f"{ranks:,} GPUs" for ranks in SIZES)], cells)


def rules() -> list[str]:
    """Sentences with the break-even points."""
    work, t = published(), measured()
    bare = seconds("all_gather", 0, TARGET_RANKS, INFINIBAND)
    free = bare * INFINIBAND.bandwidth(TARGET_RANKS)
    a_text = work.width * (work.item + 4)
    rows = [a_text / n.bandwidth(TARGET_RANKS) / t.loss for n in NETWORKS[1:]]
    distinct = published(distinct=True)
    full = next(r for r in range(8, 10**6, 8) if exchange_bytes("ours", distinct, r) > _GPU_BYTES - _STEP_BYTES)
    sent = sum(c.bytes for c in traffic("ours", work, TARGET_RANKS) if c.op == "reduce_scatter")
    unmerged = 4 * work.width * TARGET_RANKS * work.most(TARGET_RANKS)
    slower = [
        1 - step("ours, ring", r, INFINIBAND, work).total / step("ours", r, INFINIBAND, work).total for r in SIZES
    ]
    assert max(slower) < 0, "docs/scaling.md says that a ring never pays"
    gain = [
        step("ours", r, n, work).total / step("node-wise", r, n, work).total - 1
        for n in NETWORKS[1:]
        for r in SIZES[-2:]
    ]
    at, ms, mb = f"{TARGET_RANKS} GPUs", f"{1e3 * bare:.1f} ms", f"{free / 1e6:,.0f} MB"
    return [
        f"- A gather over {at} on InfiniBand takes at least {ms}, in which {mb} could pass "
        "at full bandwidth: smaller chunks cost more than they hide.",
        f"- The loss's products with a text take as long as its transfer, there and back, at {rows[0]:,.0f} rows of "
        f"its level per GPU on InfiniBand and {rows[1]:,.0f} on Ethernet; 128 scenes have 128, 768 and 384 rows.",
        f"- If all texts differ and are exchanged at once, they and their gradients fill an H100, beside the "
        f"{_STEP_BYTES / 2**30:.1f} GiB of the step, from {full:,} GPUs on.",
        f"- At {at} a GPU hands {sent / 1e6:,.0f} MB of text gradients to the reduce-scatter; if every GPU sent all of "
        f"its distinct texts, {unmerged / 1e6:,.0f} MB.",
        f"- Node-wise groups are faster than the exchange among all GPUs by {percent(gain[0])} at 512 and "
        f"{percent(gain[1])} at 4,096 GPUs on InfiniBand, by {percent(gain[2])} and {percent(gain[3])} on Ethernet.",
    ]


def verdict() -> str:
    """The target, and whether the model says that it is met."""
    work = published()
    ours, between, clip = (
        step(form, TARGET_RANKS, INFINIBAND, work).efficiency
        for form in ("ours", "ours, between", "open_clip, local loss")
    )
    uneven, unbalanced = (
        step("ours", TARGET_RANKS, INFINIBAND, work, replace(TODAY, views=VIEWS, balance=balance)).efficiency
        for balance in (True, False)
    )
    results = ["met" if value >= TARGET else "**missed**" for value in (ours, uneven, unbalanced, between)]
    rows = [
        ["ours", percent(ours), results[0]],
        ["ours, scenes with unequal numbers of views", percent(uneven), results[1]],
        ["the same with `data.balance=false`", percent(unbalanced), results[2]],
        ["ours, with `train.accumulate`", percent(between), results[3]],
        ["gathers as in open_clip, local loss", percent(clip), ""],
    ]
    head = [
        f"{TARGET_RANKS} H100, InfiniBand, 128 scenes a GPU",
        "efficiency",
        f"target: at least {100 * TARGET:.0f} %",
    ]
    return "\n".join(markdown_table(head, rows))


def rendered() -> str:
    """The page with its generated parts up to date."""
    blocks = {
        "verdict": verdict(),
        "counts": "\n".join(counts_table()),
        "inputs": "\n".join(inputs_table()),
        "efficiency": "\n".join(efficiencies(published(), NETWORKS)),
        "parts": "\n".join(parts_table(TARGET_RANKS)),
        "sensitivity": "\n".join(sensitivity_table()),
        "rules": "\n".join(rules()),
        "memory": "\n".join(memory_table()),
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, content in blocks.items():
        text = replaced(text, name, content)
    return text


def draw(out: Path) -> None:
    """Plot efficiency over GPUs, one panel per network."""
    ranks = [GPUS_PER_NODE << k for k in range(10)]
    work = published()
    with canvas(out, 9.6, 3.6, pad=0.08) as figure:
        panels = figure.subplots(1, len(NETWORKS), sharey=True)
        for axes, network in zip(panels, NETWORKS, strict=True):
            for form, (colour, line) in _LINES.items():
                values = [100 * step(form, r, network, work).efficiency for r in ranks]
                axes.plot(ranks, values, line, color=colour, linewidth=1.8, label=FORMS[form])
            axes.plot(TARGET_RANKS, 100 * TARGET, "o", color=INK, markersize=5, fillstyle="none", label="target")
            axes.set_xscale("log", base=2)
            axes.set_xticks(SIZES, [f"{r:,}" for r in SIZES])
            axes.set(ylim=(0, 102), title=network.name, xlabel="GPUs")
            axes.grid(color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
        panels[0].set_ylabel("efficiency, %", color=MUTED)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
