"""The demo's accuracies in bf16, and with all block products in FP8, for several seeds.

Both runs of a seed see the same scenes, initial weights and augmentation, so their difference is what FP8 changes, plus
the noise of sums over threads. On a CPU FP8 is emulated, with the same rounding. A run takes several minutes on two
cores; finished runs in OUT are kept. Writes OUT/result.json and prints the table in docs/numerics.md.

Run: python benchmarks/fp8_accuracy.py [--seeds 0 1 2] [--views 120000] [--out runs/fp8]
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from math import ceil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student_t

from scenarioclip_fast.data.packing.packer import pack
from scenarioclip_fast.data.synthetic.write import generate_published_layout
from scenarioclip_fast.devices import pick_device
from scenarioclip_fast.eval.zeroshot import ZeroShotResult
from scenarioclip_fast.recipes.demo import PRETRAIN_FRACTION, DemoConfig, evaluate, train_config
from scenarioclip_fast.train.trainer import FitResult, Trainer

ARMS = {"bf16": "none", "fp8": "all"}  # name -> train.fp8
ROWS = {  # title -> level, subset, k; matched strictly
    "action, top-1": ("global", "all", 1),
    "object, top-1": ("object", "all", 1),
    "relation, top-1": ("relation", "all", 1),
    "relation, top-5": ("relation", "all", 5),
    "relation held out of training, top-1": ("relation", "held_out", 1),
    "relation held out of training, top-5": ("relation", "held_out", 5),
}


def train_arm(demo: DemoConfig, fp8: str) -> dict[str, Any]:
    """Run both training phases of the demo and evaluate: the result, as a dict for JSON."""
    shards = demo.out.parent / "shards"
    scenes = json.loads((shards / "manifest.json").read_text())["splits"]["train"]["scenes"]
    device = pick_device(demo.device)
    first = ceil(demo.views * PRETRAIN_FRACTION)

    def fit(name: str, views: int, init: Path | None = None) -> FitResult:
        sections: dict[str, dict[str, Any]] = {
            "run": {"dir": str(demo.out / name), "seed": demo.seed, "device": str(device), "precision": "bf16"},
            "data": {"shards": str(shards)},
            "model": {"init": None if init is None else str(init)},
            "train": {"views": views, "checkpoint_every": 1_000_000, "tensorboard": False, "fp8": fp8},
        }
        return Trainer(train_config(name, views, scenes, **sections)).fit()

    pretrained = fit("pretrain", first)
    trained = fit("train", demo.views - first, pretrained.model_dir)
    result, _ = evaluate(replace(demo, out=demo.out.parent), device, trained, samples=0)
    return {"seconds": pretrained.seconds + trained.seconds, "loss": trained.last_loss, "zeroshot": result.to_dict()}


def run_seed(demo: DemoConfig) -> dict[str, dict[str, Any]]:
    """Both arms on the same scenes; keeps finished ones."""
    if not (demo.out / "shards" / "manifest.json").is_file():
        generate_published_layout(demo.scenes, demo.out / "scenes", seed=demo.seed, workers=_cores())
        pack(demo.out / "scenes", demo.out / "shards")
    found = {}
    for name, fp8 in ARMS.items():
        file = demo.out / f"{name}.json"
        if not file.is_file():
            record = train_arm(replace(demo, out=demo.out / name), fp8)
            file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        found[name] = json.loads(file.read_text(encoding="utf-8"))
    return found


def interval(differences: list[float]) -> tuple[float, float]:
    """The mean of paired differences, and half the width of its 95 % interval (Student's t)."""
    n = len(differences)
    half = student_t.ppf(0.975, n - 1) * stdev(differences) / n**0.5 if n > 1 else float("nan")
    return fmean(differences), float(half)


def table(seeds: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Markdown: the accuracies per seed, in %, and the mean difference in points with its 95 % interval."""
    columns = [f"seed {seed}: bf16, fp8" for seed in seeds]
    lines = [f"| | {' | '.join(columns)} | fp8 - bf16, points |", "|---" * (len(columns) + 2) + "|"]
    for title, (level, subset, k) in ROWS.items():
        pairs = [[100 * _accuracy(arms[name], level, subset, k) for name in ARMS] for arms in seeds.values()]
        mean, half = interval([fp8 - bf16 for bf16, fp8 in pairs])
        cells = [f"{bf16:.1f}, {fp8:.1f}" for bf16, fp8 in pairs]
        lines.append(f"| {title} | {' | '.join(cells)} | {mean:+.1f} ± {half:.1f} |")
    return "\n".join(lines)


def _accuracy(record: dict[str, Any], level: str, subset: str, k: int) -> float:
    row = ZeroShotResult.from_dict(record["zeroshot"]).get(level, subset=subset)
    assert row is not None
    return row.top[k]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=3500)
    parser.add_argument("--views", type=int, default=120_000)
    parser.add_argument("--out", type=Path, default=Path("runs/fp8"))
    args = parser.parse_args()
    seeds = {}
    for seed in args.seeds:
        out = args.out / f"seed-{seed}"
        seeds[seed] = run_seed(DemoConfig(out, seed, args.scenes, args.views))
        (args.out / "result.json").write_text(json.dumps(seeds, indent=2) + "\n", encoding="utf-8")
        print(f"{table(seeds)}\n", flush=True)


if __name__ == "__main__":
    main()
