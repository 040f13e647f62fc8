"""Build the fuzz targets with AddressSanitizer and UndefinedBehaviorSanitizer, and run them.

    python tests/fuzz/fuzz.py --seconds 60

Exits with another code than 0 on a failure, after the sanitizer's report, the file of the input and the command that
reproduces the failure. Everything is written to build/fuzz.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "fuzz"
KERNELS = [
    ROOT / "kernels" / op / f"{op}_cpu.cpp"
    for op in ("add_layer_norm", "contrastive", "distillation", "quick_gelu", "views")
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fsanitize-coverage=trace-pc"]
# Integer overflow in a cast of a float is left out: conversions of NaN and infinity are well defined on the processors
# that are supported.
OPTIONS = ["-std=c++20", "-O1", "-g1", "-fno-omit-frame-pointer", "-fopenmp-simd", "-Wall", "-Wno-unknown-pragmas"]


def march() -> list[str]:
    """AVX2 where the processor has it: the vectors of kernels/views/simd.h."""
    flags = Path("/proc/cpuinfo")
    return ["-march=x86-64-v3"] if flags.exists() and " avx2 " in flags.read_text() else []


def build(compiler: str = "g++") -> Path:
    """Compile what has changed; return the program."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    headers = [*ROOT.glob("kernels/**/*.h"), *ROOT.glob("csrc/host/*.h"), *Path(__file__).parent.glob("*.h")]
    newest = max(path.stat().st_mtime for path in [*headers, Path(__file__)])

    def compile_one(source: Path) -> Path:
        out = FOLDER / f"{source.stem}.o"
        if not out.exists() or out.stat().st_mtime < max(newest, source.stat().st_mtime):
            sanitize = [] if source.stem == "driver" else SANITIZE
            fresh = out.with_suffix(f".{os.getpid()}.o")
            options = [*OPTIONS, *march(), *sanitize, f"-I{ROOT}", f"-I{ROOT / 'tests' / 'fuzz'}"]
            subprocess.run([compiler, *options, "-c", source, "-o", fresh], check=True)
            fresh.replace(out)
        return out

    with ThreadPoolExecutor(2) as pool:  # a compiler takes up to 1 GB
        here = Path(__file__).parent
        objects = list(pool.map(compile_one, [here / "targets.cpp", *KERNELS[::-1], here / "driver.cpp"]))
    program = FOLDER / "fuzz"
    if not program.exists() or program.stat().st_mtime < max(path.stat().st_mtime for path in objects):
        fresh = FOLDER / f"fuzz.{os.getpid()}"
        subprocess.run([compiler, *SANITIZE[:2], *objects, "-o", fresh], check=True)
        fresh.replace(program)
    return program


def write_seeds(folder: Path) -> None:
    """Sound inputs to begin with: JPEGs of every kind that is checked, and masks."""
    for name in ("jpeg", "rle"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:27, :35]
    pixels = np.stack([128 + 90 * np.sin(x / (3 + c)) * np.cos(y / (5 + c)) for c in range(3)], -1)
    image = Image.fromarray((pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8))
    kinds = {
        "baseline": {}, "grey": {"mode": "L"}, "cmyk": {"mode": "CMYK"}, "full": {"subsampling": 0},
        "restart": {"restart_marker_blocks": 2}, "optimized": {"optimize": True}, "progressive": {"progressive": True},
        "progressive-restart": {"progressive": True, "restart_marker_blocks": 3},
        "progressive-grey": {"mode": "L", "progressive": True, "quality": 95},
    }  # fmt: skip
    for name, options in kinds.items():
        out = io.BytesIO()
        image.convert(options.pop("mode", "RGB")).save(out, "JPEG", **options)
        (folder / "jpeg" / name).write_bytes(out.getvalue())
        if name == "optimized":  # with little memory before the entropy-coded data
            data = out.getvalue()
            frame = data.index(b"\xff\xc0")
            (folder / "jpeg" / "bare").write_bytes(data[:2] + data[frame:])
    for name, text in {
        "usual": "52203",
        "runs": "PXi=0d0nN2M3NOmd00O1N2O",
        "long": "0oooooo1Pooooo0",
        "zero": "0P2",
    }.items():
        (folder / "rle" / name).write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one target: see tests/fuzz/targets.cpp")
    arguments = parser.parse_args()
    program = build()
    write_seeds(FOLDER / "seeds")
    found = FOLDER / "failures"
    found.mkdir(exist_ok=True)
    command = [program, "--seconds", f"{arguments.seconds}", "--seed", f"{arguments.seed}"]
    command += ["--corpus", FOLDER / "seeds", "--out", found]
    command += ["--only", arguments.only] if arguments.only else []
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
