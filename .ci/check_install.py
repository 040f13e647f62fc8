"""Builds the sdist and the wheel from a clean clone, installs each in an empty environment and runs users' commands.

Run: python .ci/check_install.py [--keep DIR]

Needs git, a C++ compiler, a package index, and the extra `release` in this Python. Every command runs in an empty
directory, with only the extras that the documentation names for it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch>=2.11,<2.14"
# For --no-build-isolation, as documented.
BUILD_REQUIREMENTS = ["setuptools>=77", "wheel", "cmake", "ninja", "pybind11"]

# With only torch, numpy and einops.
LOSSES = """
import sys
import torch
import scenarioclip_fast as scf
from scenarioclip_fast.losses import ClipLoss, MultiLevelContrastiveLoss

image, text = torch.nn.functional.normalize(torch.randn(2, 12, 8), dim=-1).unbind()
image.requires_grad_()
scf.ops.contrastive_loss(image, text, 14.3).backward()
assert image.grad.abs().sum() > 0
loss = ClipLoss()(image, text, torch.tensor(14.3))
assert torch.isfinite(loss)
assert scf.ops.contrastive_loss(image, text, 14.3, backend="reference").isclose(loss, rtol=1e-5)
# The extensions are installed: an explicitly named backend never falls back.
index = torch.arange(4)
scf.ops.distillation_loss(image, text, index, index, torch.ones(4), backend="cpu").backward()
loaded = {name.partition(".")[0] for name in sys.modules}
unwanted = loaded & {"yaml", "PIL", "matplotlib", "simplejpeg", "triton", "nvidia", "tqdm", "safetensors"}
assert not unwanted, unwanted
assert not any(name.startswith(("scenarioclip_fast.train", "scenarioclip_fast.data")) for name in sys.modules)
"""

# The files of the review page are installed.
REVIEW = """
from scenarioclip_fast.generate.review import page_parts

assert all(page_parts("run"))
"""

TYPES = """
import torch
from typing_extensions import assert_type
import scenarioclip_fast as scf
from scenarioclip_fast.losses import ClipLoss

assert_type(scf.ops.contrastive_loss(torch.ones(2, 3), torch.ones(2, 3), 1.0), torch.Tensor)
loss: ClipLoss = ClipLoss()
config = scf.TrainConfig()
assert_type(config.data.batch_size, int)
"""


class Environment:
    """A virtual environment with only torch, and an empty working directory."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.work = folder / "venv" / "bin", folder / "work"
        self.work.mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.pip(TORCH)

    def pip(self, *requirements: str) -> None:
        command = [self.bin / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *requirements]
        self._call(command, {})

    def __call__(self, *command: str, code: int = 0, expect: str = "", **env: str) -> None:
        """Run a command of the environment; check its exit code, and that `expect` is in its output."""
        self._call([self.bin / command[0], *command[1:]], env, code, expect)

    def _call(self, command: Sequence[str | Path], env: dict[str, str], code: int = 0, expect: str = "") -> None:
        shown = " ".join(Path(word).name if isinstance(word, Path) else word for word in command)
        shown = shown if len(shown) < 110 and "\n" not in shown else f"{shown.strip()[:100].splitlines()[0]} ..."
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        begin = time.monotonic()
        done = subprocess.run(
            command,
            cwd=self.work,
            env={**inherited, "PATH": f"{self.bin}:{os.environ['PATH']}", **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(f"{time.monotonic() - begin:6.1f} s  {shown}", flush=True)
        if done.returncode != code or expect not in done.stdout:
            expected = f"code {code}" + (f" and {expect!r}" if expect else "")
            sys.exit(f"{done.stdout}\nerror: {shown}: got code {done.returncode}, expected {expected}")


def check_losses(env: Environment) -> None:
    """Check what needs only torch, numpy and einops."""
    env("python", "-c", LOSSES)
    env("python", "-m", "scenarioclip_fast", "--help", expect="usage: ")
    env("scenarioclip-fast", "--version")
    env("scenarioclip-fast", "doctor", expect="scenarioclip-fast[train]")
    env(
        "scenarioclip-fast",
        "scenes",
        "--out",
        "none",
        "-n",
        "1",
        code=2,
        expect="pip install 'scenarioclip-fast[train]'",
    )


def check_commands(env: Environment) -> None:
    """Run the README's sequence of commands, with the extra `train`."""
    env("python", "-c", REVIEW)
    train = ["train", "-c", "tiny", "data.shards=shards", "data.batch_size=4", "train.steps=3"]
    env("scenarioclip-fast", "scenes", "--out", "scenes", "-n", "40")
    env("scenarioclip-fast", "pack", "scenes", "--out", "shards")
    env("scenarioclip-fast", "inspect", "shards", "--out", "pictures")
    env("scenarioclip-fast", *train, "run.dir=run")
    env("scenarioclip-fast", "eval", "zeroshot", "run", "shards", "--report", "report")
    env("scenarioclip-fast", "report", "run")
    env("scenarioclip-fast", "embed", "run", "scenes", "--out", "embeddings.npz")
    env("scenarioclip-fast", "export", "run", "--to", "safetensors", "--out", "weights")
    torchrun = ["torchrun", "--nproc-per-node", "2", "-m", "scenarioclip_fast"]
    env(*torchrun, *train, "run.dir=run2", OMP_NUM_THREADS="1")
    env("scenarioclip-fast", "export", "run2", "--to", "safetensors", "--out", "weights2")


def check_benchmarks(env: Environment) -> None:
    """Rehearse the kernel benchmarks, with the extra `bench`."""
    env("scenarioclip-fast", "bench", "kernels", "--rehearse", "--out", "bench", expect="record: ")


def check_types(env: Environment) -> None:
    """Check a user's file with mypy."""
    env.pip("mypy")
    (env.work / "user.py").write_text(TYPES)
    env("mypy", "--strict", "user.py")


def build(work: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it, in a clean clone."""
    subprocess.run(["git", "clone", "--quiet", ROOT, work / "clone"], check=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "dist", work / "clone"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}\nerror: the build failed")
    (sdist,), (wheel,) = (work / "dist").glob("*.tar.gz"), (work / "dist").glob("*.whl")
    return sdist, wheel


def main() -> int:
    parser = argparse.ArgumentParser(description="Check that the sdist and the wheel install and work.")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR and keep it")
    args = parser.parse_args()
    work = args.keep or Path(tempfile.mkdtemp(prefix="scenarioclip-fast-install-"))
    work = work.resolve()
    try:
        sdist, wheel = build(work)
        print(f"== wheel: {wheel.name}", flush=True)
        env = Environment(work / "wheel")
        env.pip(str(wheel))
        check_losses(env)
        env.pip(f"{wheel}[train]")
        check_commands(env)
        env.pip(f"{wheel}[bench]")
        check_benchmarks(env)
        check_types(env)
        print(f"== sdist: {sdist.name}", flush=True)
        env = Environment(work / "sdist")
        env.pip(*BUILD_REQUIREMENTS)
        env.pip("--no-build-isolation", f"{sdist}")
        check_losses(env)
        env.pip("--no-build-isolation", f"{sdist}[train]")
        check_commands(env)
    finally:
        if args.keep is None:
            shutil.rmtree(work, ignore_errors=True)
    print("sdist and wheel install and work")
    return 0


if __name__ == "__main__":
    sys.exit(main())
