"""The time of a training step on many GPUs: measured computation, and modelled collectives beside or between it."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from scenarioclip_fast.benchmarks.scaling.model import (
    PUBLISHED,
    Workload,
    buckets,
    largest,
    logits,
    traffic,
)
from scenarioclip_fast.benchmarks.scaling.network import GPUS_PER_NODE, NETWORKS, Network, seconds

from scenarioclip_fast.bench.record import read_record
from scenarioclip_fast.data.shares import assign
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.model import ModelConfig, ScenarioCLIP
from scenarioclip_fast.model.config import FreezeConfig
from scenarioclip_fast.model.flops import step_flops

RECORD = "2026-11-27-nvidia-h200"
RECORDS = Path(__file__).resolve().parents[1] / "records"
FORMS = {
    "ours": "ours",
    "ours, between": "ours, texts between towers and loss",
    "ours, ring": "ours, texts in a ring",
    "ours, NCCL": "ours, sizes and ids by NCCL",
    "node-wise": "node-wise groups (another loss)",
    "open_clip, local loss": "open_clip, local loss",
}
OPEN_CLIP = ("open_clip", "open_clip, local loss")
BESIDE = ("ours", "ours, NCCL", "node-wise")  # texts travel beside the vision towers
EXCHANGES = ("all_gather", "reduce_scatter")  # of the forward and of the backward pass
SHARES = (0.25, 0.75)  # of the loss's products in the forward and in the backward pass
# Lengths of the texts in bench_step.py: tokens of an action, an object and a relation, in the mean.
_TOKENS = (4, 4, 6)
MEAN_VIEWS, VIEWS = 8.7, 0.43  # of a scene in 128 annotated photos, and their standard deviation over the mean
_BATCHES = 4  # random ones whose mean is taken


@dataclass(frozen=True)
class Computation:
    """Measured on one H200, in seconds; an H100 has the same tensor cores and less bandwidth.

    step: kernels of a step of 128 scenes, one after another;  launched: the same step with its host
    optimizer: weight copies, gradient norm, AdamW and moving averages, a part of `step`
    loss: this package's contrastive loss, for each logit, forward and backward;  open_clip: the same of open_clip's,
        compiled;  product: one product for each logit;  small_loss: the losses of 128 scenes on one GPU
    """

    step: float
    launched: float
    optimizer: float
    loss: float
    open_clip: float
    product: float
    small_loss: float

    @property
    def open_clip_local(self) -> float:
        """For each pair of a row and another rank's row, which has two logits: three products more."""
        return self.open_clip + 3 * self.product


@functools.cache
def measured() -> Computation:
    """Read the record of the H200."""
    folder = RECORDS / RECORD
    tuned = json.loads((folder / "tune_step.json").read_text(encoding="utf-8"))["forms"][0]
    parts = {row["part"]: row["measured_ms"] / 1e3 for row in tuned["rows"]}
    results = read_record(folder).results()
    times = {(r.group, r.form): median(r.extra.get("device_seconds") or r.samples) for r in results}
    square, levels = (
        f"contrastive, forward + backward, {inputs}, cuda"
        for inputs in ("32768 x 32768 x 512", "levels of (128, 700, 350) rows and (39, 73, 289) texts, width 512")
    )
    return Computation(
        step=sum(parts.values()),
        launched=times["training step, vit-b-32, 128 scenes (random pixels), cuda", "ours, bf16"],
        optimizer=parts["weights"],
        loss=times[square, "ours: cuda"] / 32768**2,
        open_clip=times[square, "open_clip compiled"] / 32768**2,
        product=times[square, "four bare products"] / 4 / 32768**2,
        small_loss=times[levels, "ours: triton"],
    )


@functools.cache
def published(distinct: bool = False) -> Workload:
    """The published model, ViT-B/32, with 128 scenes a GPU."""
    with torch.device("meta"):
        model = ScenarioCLIP(ModelConfig.preset("vit-b-32"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    levels = PUBLISHED
    if distinct:
        a, b, c = (replace(level, vocabulary=0) for level in levels)
        levels = a, b, c
    return Workload(128, levels, width=512, item=2, parameters=trained + len(LEVELS))


@functools.cache
def forward_share(work: Workload) -> float:
    """Return the share of the forward pass in the operations of a step."""
    config = ModelConfig.preset("vit-b-32")
    frozen = replace(config, freeze=FreezeConfig(config.vision.layers, config.text.layers))
    forward, whole = (step_flops(c, *_sizes(work), teacher=True) for c in (frozen, config))
    return forward / whole


@functools.cache
def late_share(work: Workload) -> float:
    """Return the share of the last vision encoder's trained blocks, forward, in the operations of a step.

    They run beside the gather of the texts, and their backward pass, of twice the operations, beside the
    reduce-scatter.
    """
    config = ModelConfig.preset("vit-b-32")
    blocks, layers = config.freeze.vision_blocks, config.vision.layers
    trunk = replace(config, vision=replace(config.vision, layers=blocks), freeze=FreezeConfig(blocks))
    whole = replace(config, freeze=FreezeConfig(layers))
    last = work.rows(work.levels[-1])
    late, before = (step_flops(c, [0, 0, last], [[], [], []], teacher=False) for c in (whole, trunk))
    return (late - before) / step_flops(config, *_sizes(work), teacher=True)


def _sizes(work: Workload) -> tuple[list[int], list[list[int]]]:
    """Views of each level, and the lengths of its texts."""
    lengths = [[n] * round(work.texts(level)) for level, n in zip(work.levels, _TOKENS, strict=True)]
    return [work.rows(level) for level in work.levels], lengths


@dataclass(frozen=True)
class Assumptions:
    """What was neither measured nor is in a data sheet.

    tcp_hop: seconds of one step of a ring of processes over TCP;  tcp_bandwidth: of such a step, bytes/s
    merge: seconds of a host to merge equal ids, for each
    launching: how long the host takes to launch a step, as a share of the GPU's time
    multiprocessors: share of the GPU that a collective takes from the computation beside it: 16 channels of 132
    host_bound: the step takes as long as measured with its host
    views: standard deviation of a scene's views over their mean; 0: all scenes have the same number
    balance: whether this package distributes the scenes of a step by their views
    """

    tcp_hop: float = 25e-6
    tcp_bandwidth: float = 1e9
    merge: float = 30e-9
    launching: float = 0.5
    multiprocessors: float = 16 / 132
    host_bound: bool = False
    views: float = 0.0
    balance: bool = True


TODAY = Assumptions()


@dataclass(frozen=True)
class Step:
    """Seconds of a step, by cause: the sum is its time.

    computation: of one GPU alone;  loss: of the logits with other ranks' texts;  batch: waiting for sizes and ids
    exchange: waiting for texts and their gradients;  gradients: waiting for those of the weights
    shared: slower computation while collectives run beside it;  waiting: for the rank that has most views
    """

    computation: float
    loss: float
    batch: float
    exchange: float
    gradients: float
    shared: float
    waiting: float

    @property
    def total(self) -> float:
        return float(sum(getattr(self, f.name) for f in fields(self)))

    @property
    def efficiency(self) -> float:
        """Scenes per second and GPU, relative to one GPU alone."""
        return self.computation / self.total


def step(
    form: str,
    ranks: int,
    network: Network,
    work: Workload,
    assumed: Assumptions = TODAY,
    times: Computation | None = None,
) -> Step:
    """Predict a step of a form of FORMS; `times` replaces the measured computation."""
    times = times or measured()
    computation = times.launched if assumed.host_bound else times.step
    towers = computation - times.optimizer
    forward = towers * forward_share(work)
    backward = towers - forward
    # The group whose rows and texts are compared, and what connects it.
    group, link = (min(ranks, GPUS_PER_NODE), NETWORKS[0]) if form == "node-wise" else (ranks, network)
    collectives = traffic("open_clip" if form in OPEN_CLIP else "ours", work, group)
    loss = _loss_seconds(form, work, group, times)

    batch = [c for c in collectives if c.phase == "batch"]
    ring = sum((group - 1) * (assumed.tcp_hop + c.bytes / assumed.tcp_bandwidth) for c in batch)
    merging = assumed.merge * group * work.most(group) if group > 1 else 0.0
    # From the launch of a step's forward pass until the texts of the next one travel, less the launches in between: the
    # host is ahead of the GPU by what remains.
    late = towers * late_share(work) if form in BESIDE else 0.0
    launching = 1.0 if assumed.host_bound else assumed.launching
    available = computation * (1 - launching * (1 - (forward - late) / towers))
    waited = max(ring + merging - available, 0.0)
    gathers, scatters = ([c for c in collectives if c.op == op and c.phase != "batch"] for op in EXCHANGES)
    gather, scatter = (sum(seconds(c.op, c.bytes, group, link) for c in part) for part in (gathers, scatters))
    small = sum(
        seconds(c.op, c.bytes, group, link) for c in collectives if c.op == "all_reduce" and c.phase != "gradients"
    )
    exchange = gather + scatter + small
    hidden = queued = 0.0
    if form == "ours, NCCL":  # by the same collectives as everything else, while the step before runs
        waited, hidden = max(merging - available, 0.0), sum(seconds(c.op, c.bytes, group, link) for c in batch)
    if form not in OPEN_CLIP and (chunks := work.chunks(group)):
        # All but the first chunk's gather and the last chunk's reduce-scatter run beside the loss's products.
        parts, products = (gather, scatter), times.small_loss + loss
        exposed = [max(p - s * products, p / sum(chunks)) for p, s in zip(parts, SHARES, strict=True)]
        exchange, hidden = sum(exposed) + small, hidden + sum(parts) - sum(exposed)
    elif form in BESIDE:
        beside = min(gather, late) + min(scatter, 2 * late)
        exchange, hidden, queued = gather + scatter - beside + small, hidden + beside, min(scatter, 2 * late)
    if form == "ours, ring":
        exchange, loss = ring_seconds(work, ranks, network, times) + small, 0.0

    finish = spent = queued
    sizes = buckets(work.parameters)
    for k, size in enumerate(sizes, 1):
        ready = backward * sum(sizes[:k]) / sum(sizes)
        spent += (took := seconds("all_reduce", size, ranks, network))
        finish = max(finish, ready) + took
    gradients = max(finish - backward, 0.0)
    hidden += max(spent - gradients, 0.0)
    return Step(
        computation,
        loss,
        0.0 if form in OPEN_CLIP else waited,
        exchange,
        gradients,
        assumed.multiprocessors * hidden,
        towers * excess(assumed, work.scenes, ranks, form not in OPEN_CLIP),
    )


def excess(assumed: Assumptions, scenes: int, ranks: int, ours: bool) -> float:
    """Return by how much the most views of a rank exceed the mean, as a share of it."""
    if ours and assumed.balance and assumed.views:
        return _balanced_excess(assumed.views, scenes, ranks)
    return largest(0.0, assumed.views / math.sqrt(scenes), ranks)


@functools.cache
def _balanced_excess(deviation: float, scenes: int, ranks: int) -> float:
    """The same in random batches, gamma-distributed, that the loader's function has distributed."""
    rng, found = np.random.default_rng(0), []
    for _ in range(_BATCHES):
        views = rng.gamma(1 / deviation**2, MEAN_VIEWS * deviation**2, scenes * ranks).round().clip(1, 255)
        loads = np.bincount(assign(views.astype(np.uint8), ranks), weights=views)
        found.append(loads.max() / loads.mean() - 1)
    return float(np.mean(found))


def _loss_seconds(form: str, work: Workload, ranks: int, times: Computation) -> float:
    """The logits beyond those of one GPU."""
    if form in OPEN_CLIP:
        return times.open_clip_local * (ranks - 1) * sum(work.rows(level) ** 2 for level in work.levels)
    return times.loss * (logits("ours", work, ranks) - logits("ours", work, 1))


def ring_seconds(work: Workload, ranks: int, network: Network, times: Computation) -> float:
    """The loss with texts that travel around all GPUs, beyond the GPU's own texts: each block is sent on and used.

    A block is the texts that another GPU keeps; in the backward pass their gradients travel along. A step of the ring
    takes as long as the loss with a block, which the launches of its kernels bound below, or as the slowest link if
    longer.
    """
    texts = [work.kept(ranks, [level]) for level in work.levels]
    products = times.loss * sum(work.rows(level) * u for level, u in zip(work.levels, texts, strict=True))
    block = max(times.small_loss, products)
    bandwidth, latency = network.hop(ranks)
    hops = [latency + sum(texts) * work.width * item / bandwidth for item in (work.item, work.item + 4)]
    return (ranks - 1) * sum(max(share * block, hop) for share, hop in zip(SHARES, hops, strict=True))


def exchange_bytes(form: str, work: Workload, ranks: int) -> float:
    """Return the memory for other ranks' features, their gradients and, for open_clip, the logits."""
    if form in OPEN_CLIP:
        features = 2 * ranks * sum(map(work.rows, work.levels)) * work.width * 2 * work.item
        # As measured at 32,768 rows: 8 bytes a logit. A level's logits live until its backward pass.
        return features + 8 * logits(form, work, ranks)
    gathered = ranks * work.kept(ranks)
    merged = sum(work.texts(level, ranks) for level in work.levels)
    return (gathered + merged) * work.width * (work.item + 4)
