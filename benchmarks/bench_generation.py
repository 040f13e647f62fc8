"""All stages of the generation pipeline on drawn scenes: a local server in place of a vision-language model, and the
classical detector and segmenter of `generate.drawn` in place of networks.

This measures what the pipeline itself costs: reading and decoding, requests, records, curation and packing. The times
include starting the worker processes, and the server runs in the same process. The shards must be the same for every
number of workers.

extra_info["stages"] has the images/s of each stage in the last round.

Run: make bench, or: pytest benchmarks/bench_generation.py
Peak memory: python benchmarks/bench_generation.py [--images 5000] [--workers 1]
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from scenarioclip_fast.benchmarks.timing import WARM, sized

from scenarioclip_fast.checksums import file_digest
from scenarioclip_fast.generate.drawn.vlm_server import StubServer
from scenarioclip_fast.generate.pipeline import GenerateReport, generate
from scenarioclip_fast.recipes.generation_demo import CORRUPT, answers, draw, settings
from scenarioclip_fast.requirements import import_problem

IMAGES, UNIT = sized((1024, 128), (24, 6))  # the pages at the end take seconds for any number
PACKAGES = ("simplejpeg", "PIL", "scipy", "openai", "inflect", "rapidfuzz")
FEWER = 1000  # images of the run that the peak memory is compared with

_CHILD = """
import resource, sys
from scenarioclip_fast.generate.pipeline import generate
from scenarioclip_fast.recipes.generation_demo import settings
if __name__ == "__main__":
    images, out, url, model, workers = sys.argv[1:]
    generate(images, out, settings(url, model), device="cpu", workers=int(workers), progress=False)
    print(*(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


class Drawn(NamedTuple):
    """Pictures in a folder, and the server that describes them."""

    root: Path
    server: StubServer


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drawn]:
    for package in PACKAGES:
        if problem := import_problem(package):
            pytest.skip(problem)
    root = tmp_path_factory.mktemp("generation")
    drawings = draw(IMAGES, root / "images")
    with StubServer(answers(drawings), corrupt=CORRUPT, vary=True) as server:
        yield Drawn(root, server)


def digests(shards: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(shards.iterdir())}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_all_stages(benchmark: Any, drawn: Drawn, workers: int) -> None:
    rounds = itertools.count()
    last: list[tuple[Path, GenerateReport]] = []

    def run() -> None:
        out = drawn.root / f"{workers} workers, round {next(rounds)}"
        models = settings(drawn.server.url, drawn.server.model)
        report = generate(
            drawn.root / "images", out, models, device="cpu", workers=workers, unit_size=UNIT, progress=False
        )
        last[:] = [(out, report)]

    benchmark.group = f"generation, {IMAGES} drawn scenes"
    benchmark.extra_info["form"] = f"{workers} worker" + "s" * (workers > 1)
    few = WARM or workers > 2  # more workers than a small machine has cores: for the check
    benchmark.pedantic(run, rounds=1 if few else sized(2, 1), warmup_rounds=0 if few else sized(1, 0))
    out, report = last[0]
    assert sum(stage.rejected.total() for stage in report.stages) < IMAGES / 2, report
    found, expected = digests(out / "shards"), drawn.root / "expected"
    if not expected.exists():
        expected.symlink_to(out / "shards")
    assert found == digests(expected), "the shards depend on the number of workers"
    stages = {stage.name: round(stage.images / stage.seconds, 1) for stage in report.stages}
    benchmark.extra_info |= {"images": IMAGES, "stages": stages}
    if benchmark.stats is not None:  # None with --benchmark-disable
        rate = IMAGES / benchmark.stats.stats.median
        rates = ", ".join(f"{name} {value:.0f}" for name, value in stages.items())
        print(f"\n{benchmark.name}: {rate:.0f} images/s ({rates})")


def peak_memory(images: Path, out: Path, server: StubServer, workers: int) -> list[float]:
    """The peak resident sets of a run in a process of its own, MiB: of that process, and of its largest child."""
    command = [sys.executable, "-c", _CHILD, str(images), str(out), server.url, server.model, str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return [int(kib) / 1024 for kib in done.stdout.split()[-2:]]


def main(argv: list[str] | None = None) -> int:
    """Compare the peak memory of FEWER images with that of more, which should be the same."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--images", type=int, default=5000, help=f"more than {FEWER} (default: 5000)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    args = parser.parse_args(argv)
    if args.images <= FEWER:
        parser.error(f"argument --images: got {args.images}, expected more than {FEWER}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        drawings = draw(args.images, root / "images", workers=args.workers)
        peaks = []
        with StubServer(answers(drawings), corrupt=CORRUPT, vary=True) as server:
            for n in (FEWER, args.images):
                listed = root / f"{n}.txt"
                listed.write_text("".join(f"images/{one.key}.jpg\n" for one in drawings[:n]))
                peaks.append(peak_memory(listed, root / f"{n} images", server, args.workers))
                print(f"{n:>7,} images: {peaks[-1][0]:.0f} MiB, children {peaks[-1][1]:.0f} MiB", flush=True)
        growth = (max(peaks[1]) - max(peaks[0])) * 1024 / (args.images - FEWER)
        print(f"{growth:.2f} KiB per image")
    return 0


if __name__ == "__main__":
    sys.exit(main())
