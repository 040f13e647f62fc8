"""A factory of stages without models, for `generate(factory="stand_in_stages")`: results depend on keys alone.

Files beside the folder of images steer them, in any process: "slow" holds the seconds per image; "kill-STAGE" makes the
first process that sees it kill itself, and "fail-STAGE" makes the stage give up. "trace" lists what was done where.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from simplejpeg import encode_jpeg

from scenarioclip_fast.devices import pick_device
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.config import RECORDED, GenerateConfig
from scenarioclip_fast.generate.records import all_outcomes
from scenarioclip_fast.generate.stages import Outcome, Work

MODELS = {"caption": {"model": "none"}, "ground": {"model": "none"}, "segment": {"model": "none"}}


def write_images(folder: Path, count: int) -> Path:
    """Small images, each of another grey."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(count):
        (images / f"{number:03d}.jpg").write_bytes(encode_jpeg(np.full((8, 8, 3), number, np.uint8)))
    return images


def read_trace(folder: Path) -> list[dict[str, Any]]:
    path = folder / "trace"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def read_records(out: Path) -> dict[str, bytes]:
    """Every file of records, finished or not."""
    files = [path for stage in RECORDED if (out / stage).is_dir() for path in (out / stage).iterdir()]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


# What the pages at the end of a run read.
RECORDS: dict[str, dict[str, Any]] = {
    "caption": {"size": [8, 8], "action": None, "caption": None, "objects": [], "relations": []},
    "ground": {"objects": []},
    "segment": {"objects": []},
    "curate": {"scene": {"size": [8, 8], "action": None, "objects": [], "relations": []}, "rejected": []},
}


class StandIn:
    def __init__(self, name: str, device: str, context: Any) -> None:
        self.name, self.device, self.context = name, device, context
        self.counts: Counter[str] = Counter()

    def run(self, works: Iterator[Work]) -> Iterator[Outcome]:
        device = str(pick_device(self.device))
        for work in works:
            folder = Path(work.item.path).parent.parent
            node = ""
            if (ray := sys.modules.get("ray")) and ray.is_initialized():
                node = ray.get_runtime_context().get_node_id()
            step = {"stage": self.name, "key": work.key, "pid": os.getpid(), "node": node, "device": device}
            step["visible"] = os.environ.get("CUDA_VISIBLE_DEVICES")
            with open(folder / "trace", "a") as file:
                file.write(json.dumps(step) + "\n")
            if (folder / "slow").exists():
                time.sleep(float((folder / "slow").read_text()))
            if (folder / f"fail-{self.name}").exists():
                raise UserError(f"{self.name}: the server is down\n{work.key[:0]}")
            try:
                (folder / f"kill-{self.name}").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            except FileNotFoundError:
                pass
            self.counts["tokens"] += 1
            number = int(work.key[:3])
            if self.name == "caption" and number % 10 == 7:
                yield Outcome(work.key, reason="no_objects", detail=f"of {number}")
            else:
                seen = {"of": self.name, "before": sorted(work.records), "context": self.context}
                yield Outcome(work.key, {**seen, **RECORDS[self.name]})

    def close(self) -> None:
        pass


def needs_context(name: str, config: GenerateConfig) -> bool:
    return name == "curate"


def check_stage(name: str, config: GenerateConfig) -> None:
    pass


def prepare_context(name: str, config: GenerateConfig, directory: Path) -> Any:
    return sum(1 for _ in all_outcomes(directory / "segment")) if name == "curate" else None


def make_stage(name: str, config: GenerateConfig, device: str, context: Any = None) -> StandIn:
    return StandIn(name, device, context)
