"""The scaling model against counts of real runs, hand-made cases, and the page made from it."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from scenarioclip_fast.benchmarks.scaling import __main__ as command
from scenarioclip_fast.benchmarks.scaling import page, runs
from scenarioclip_fast.benchmarks.scaling.model import Collective, Level, Workload, buckets, largest, logits, traffic
from scenarioclip_fast.benchmarks.scaling.network import NETWORKS, NVLINK, seconds
from scenarioclip_fast.benchmarks.scaling.times import (
    FORMS,
    TODAY,
    VIEWS,
    Step,
    excess,
    measured,
    published,
    ring_seconds,
    step,
)

WITHIN = 0.05  # of the counts: the requirement
RANKS = [8 << k for k in range(10)]
INFINIBAND = NETWORKS[1]


def check(work: Workload, ranks: int, form: str, counts: dict[str, object]) -> None:
    found, model = page.counted(counts), page.expected(form, work, ranks)
    assert found.keys() == model.keys()
    assert found["calls"] == model["calls"]
    for name, value in model.items():
        assert found[name] == pytest.approx(value, rel=WITHIN), (ranks, form, name)


@pytest.mark.parametrize("ranks", [2, 4])
def test_model_agrees_with_a_real_run(ranks: int) -> None:
    work, found = runs.small_workload(), runs.run(ranks)
    for form, per_rank in found.items():
        assert len(per_rank) == ranks
        for counts in per_rank:
            check(work, ranks, form, vars(counts))
    # The three forms compute one loss; equal texts are negatives in all of them. Features are rounded to bfloat16
    # before (open_clip) or after the gather, and the logits of open_clip are bfloat16: 1 % of a loss of about 5.
    losses = [counts.loss for per_rank in found.values() for counts in per_rank]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-2)


def test_model_agrees_with_the_committed_counts() -> None:
    work, found = page.read_counts()
    assert work == runs.small_workload() and tuple(found) == command.RANKS
    for ranks, forms in found.items():
        assert tuple(forms) == runs.FORMS
        for form, per_rank in forms.items():
            assert len(per_rank) == ranks
            for counts in per_rank:
                check(work, ranks, form, counts)


def test_traffic_of_a_small_case() -> None:
    """Two ranks, one scene each with one action, two objects and one relation; all texts differ; D = 8, bfloat16."""
    work = Workload(1, (Level(1, 0), Level(2, 0), Level(1, 0)), width=8, item=2, parameters=10)
    ours = [(c.phase, c.op, c.bytes) for c in traffic("ours", work, 2)]
    text = 8 * 2
    assert ours == [
        ("gradients", "all_reduce", 40),
        ("metrics", "all_reduce", 32),  # 8 terms
        ("batch", "all_gather", 256 + 8 * 16),  # sizes, and room for 16 ids a scene
        ("forward", "all_gather", 4 * text),
        ("backward", "reduce_scatter", 2 * 2 * 4 * text),  # of two ranks, in float32
        ("forward", "all_reduce", 8 * 8),  # eight texts of both ranks
        ("forward", "all_reduce", 8 * 8),
        ("forward", "all_reduce", 8 * (8 + 3)),
        ("backward", "all_reduce", 8 * (8 + 3)),
    ]
    clip = traffic("open_clip", work, 2)
    assert sum(c.bytes for c in clip if c.op == "all_gather") == 2 * 4 * text  # images and texts
    assert sum(c.bytes for c in clip if c.op == "reduce_scatter") == 2 * 2 * 4 * text
    # Rows times texts: (1, 2, 1) x (2, 4, 2); open_clip all rows of both ranks, or two matrices of own rows.
    assert logits("ours", work, 2) == 2 + 8 + 2
    assert logits("open_clip", work, 2) == 4 + 16 + 4
    assert logits("open_clip, local loss", work, 2) == 2 * (2 + 8 + 2)


def test_bytes_sent_in_a_ring() -> None:
    assert Collective("", "all_reduce", 100).sent(4) == 150  # three quarters, twice
    assert Collective("", "all_gather", 100).sent(4) == 300
    assert Collective("", "reduce_scatter", 100).sent(4) == 75
    assert all(Collective("", op, 100).sent(1) == 0 for op in ("all_reduce", "all_gather", "reduce_scatter"))


def test_buckets_are_those_of_ddp() -> None:
    mib = 2**20
    assert buckets(30 * mib // 4) == [mib, 25 * mib, 4 * mib]
    assert buckets(mib // 8) == [mib / 2]
    assert buckets(26 * mib // 4) == [mib, 25 * mib]


def test_distinct_texts() -> None:
    assert Level(1, 2).distinct(2)[0] == pytest.approx(2 - (2 / 3) ** 2 - (1 / 3) ** 2)
    assert Level(1, 1).distinct(9) == (1, 0)
    assert Level(1, 0).distinct(9) == (9, 0)
    level, rng = Level(1, 200), np.random.default_rng(0)
    draws = rng.choice(200, size=(4000, 150), p=level.probabilities())
    found = np.array([len(np.unique(row)) for row in draws])
    mean, deviation = level.distinct(150)
    # Four standard errors of 4,000 trials; the variance is an approximation for many draws, within 5 %.
    assert mean == pytest.approx(found.mean(), abs=4 * found.std() / math.sqrt(len(found)))
    assert deviation == pytest.approx(found.std(), rel=0.05)


def test_kept_texts() -> None:
    """Each text is kept by one rank, found by simulation; two ranks with one text each of two."""
    # Text 0 with probability 2/3, text 1 with 1/3: 1 + 4/9 distinct texts of both ranks.
    assert Level(1, 2).kept(1, 2)[0] == pytest.approx((1 + 4 / 9) / 2)
    assert Level(1, 0).kept(9, 4) == (9, 0)
    level, ranks, rng = Level(1, 400), 4, np.random.default_rng(0)
    found = []
    for _ in range(1000):
        holders = np.zeros((ranks, 400), bool)
        for rank in range(ranks):
            holders[rank, rng.choice(400, size=100, p=level.probabilities())] = True
        turned = np.stack([np.roll(holders[:, u], -u) for u in range(400)], axis=1)
        keeper = (turned.argmax(axis=0) + np.arange(400)) % ranks
        found.append(np.bincount(keeper[holders.any(axis=0)], minlength=ranks))
    mean, deviation = level.kept(100, ranks)
    # Four standard errors of 1,000 trials. Draws are taken as independent: a few percent of the deviation.
    assert mean == pytest.approx(np.mean(found), abs=4 * np.std(found) / math.sqrt(1000))
    assert deviation == pytest.approx(np.std(found), rel=0.1)


def test_largest_of_normal_values() -> None:
    found = np.random.default_rng(0).standard_normal((20_000, 8)).max(axis=1).mean()
    assert largest(3.0, 2.0, 8) == pytest.approx(3 + 2 * found, rel=0.01)  # Blom's approximation: 1 % of this
    assert largest(3.0, 2.0, 1) == 3.0


def test_times_of_collectives() -> None:
    gib = 2**30
    # Latency alone, LL: a ring of 14 steps in a node; a tree over 64 nodes, up and down.
    assert seconds("all_reduce", 0, 8, INFINIBAND) == pytest.approx(6.6e-6 + 14 * 0.6e-6)
    assert seconds("all_reduce", 0, 512, INFINIBAND) == pytest.approx(6.8e-6 + 2 * (7 * 0.6e-6 + 6 * 5e-6))
    assert seconds("all_gather", 0, 512, INFINIBAND) == pytest.approx(6.6e-6 + 448 * 1e-6 + 63 * 2.7e-6)
    # Bandwidth alone: both ways in a ring; over Ethernet a node's port carries everything.
    assert seconds("all_reduce", gib, 8, INFINIBAND) == pytest.approx(2 * gib * 7 / 8 / NVLINK, rel=0.03)
    assert seconds("reduce_scatter", gib, 16, NETWORKS[2]) == pytest.approx(gib * 15 / 16 / 12.5e9, rel=0.01)
    assert seconds("all_gather", gib / 16, 16, NETWORKS[2]) == seconds("reduce_scatter", gib, 16, NETWORKS[2])
    assert all(seconds(op, gib, 1, INFINIBAND) == 0 for op in ("all_reduce", "all_gather", "reduce_scatter"))


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_efficiency_falls_with_the_number_of_gpus(network: page.Network, distinct: bool) -> None:
    work = published(distinct)
    for form in FORMS:
        values = [step(form, ranks, network, work).efficiency for ranks in RANKS]
        assert values[0] < 1 and values[-1] > 0 and values == sorted(values, reverse=True), form


def test_a_step_is_the_sum_of_its_parts() -> None:
    found = step("ours", 1024, INFINIBAND, published(), replace(TODAY, views=0.4))
    parts = [getattr(found, f.name) for f in fields(Step)]
    assert min(parts) > 0 and found.total == pytest.approx(sum(parts))
    assert found.computation == measured().step == pytest.approx(0.0532, rel=0.01)  # 53 ms in the record's README
    alone = step("ours", 1, INFINIBAND, published())
    assert alone.efficiency == 1.0


def test_a_slower_network_is_not_faster() -> None:
    for form in FORMS:
        times = [step(form, 512, network, published()).total for network in NETWORKS]
        assert times == sorted(times), form


def test_unequal_numbers_of_views() -> None:
    """What docs/scaling.md and docs/data.md say of random and of balanced batches."""
    assumed = replace(TODAY, views=VIEWS)
    plain = [excess(replace(assumed, balance=False), 128, ranks, True) for ranks in (8, 64, 512)]
    assert plain == pytest.approx([0.05, 0.09, 0.12], abs=0.006)
    assert [excess(assumed, 128, ranks, True) for ranks in (8, 64, 512)] == pytest.approx([4e-4, 7e-4, 2e-3], rel=0.1)
    assert excess(assumed, 128, 8, ours=False) == plain[0] and excess(TODAY, 128, 8, True) == 0


def test_statements_of_the_page() -> None:
    """What docs/scaling.md says in words."""
    work = published()
    times = {(form, r): step(form, r, INFINIBAND, work) for form in FORMS for r in RANKS}
    assert times["ours", 64].efficiency > 0.95
    assert times["ours", 1024].batch > 0 == times["ours", 512].batch
    assert times["ours, NCCL", 1024].efficiency > 0.94 > 0.6 > times["ours, NCCL", 2048].efficiency
    assert all(times["ours", r].total < times["ours, between", r].total for r in RANKS if r < 2048)
    assert all(times["ours, ring", r].total > times["ours", r].total for r in RANKS)
    # Chunks begin beyond 1,024 GPUs; if all texts differ, beyond 64.
    assert [r for r in RANKS if work.chunks(r)] == [2048, 4096]
    assert [r for r in RANKS if published(distinct=True).chunks(r)] == [128, 256, 512, 1024, 2048, 4096]
    assert times["node-wise", 512].efficiency - times["ours", 512].efficiency < 0.02
    for ranks in RANKS[:7]:
        uneven = step("ours", ranks, INFINIBAND, work, replace(TODAY, views=VIEWS, balance=False))
        assert uneven.waiting > uneven.total - uneven.waiting - uneven.computation
        balanced = step("ours", ranks, INFINIBAND, work, replace(TODAY, views=VIEWS))
        assert 0 < balanced.waiting < 0.01 * balanced.computation
    on_ethernet = step("node-wise", 16, NETWORKS[2], work)
    assert on_ethernet.gradients > on_ethernet.total / 2
    assert all(step("node-wise", r, NETWORKS[2], work).efficiency < 0.45 for r in RANKS[1:])
    gains = [times["node-wise", r].efficiency - times["ours", r].efficiency for r in (256, 512, 1024)]
    assert max(gains[:2]) < 0.02 < 0.3 < gains[2]
    # What limits: nothing up to 512 GPUs, sizes and ids from 1,024 on, merging them from 2,048 on.
    assert all(times["ours", r].efficiency > 0.95 for r in RANKS if r <= 512)
    assert times["ours", 1024].batch > times["ours", 1024].total / 4
    assert times["ours, NCCL", 2048].batch > 0 == times["ours, NCCL", 1024].batch
    large = replace(published(distinct=True), scenes=512)
    assert ring_seconds(large, 512, INFINIBAND, measured()) > ring_seconds(published(True), 512, INFINIBAND, measured())


def test_page_is_up_to_date() -> None:
    assert command.main(["--check"]) == 0, "run python -m scenarioclip_fast.benchmarks.scaling"


def test_an_outdated_page_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "scaling.md"
    copy.write_text(page.PAGE.read_text(encoding="utf-8").replace("%", "percent"), encoding="utf-8")
    monkeypatch.setattr(page, "PAGE", copy)
    monkeypatch.setattr(page, "FIGURE", tmp_path / "scaling.png")
    assert command.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert command.main([]) == 0 and command.main(["--check"]) == 0
    assert page.FIGURE.stat().st_size > 10_000
