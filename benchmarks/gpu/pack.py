"""`make gpu-pack`: gathers in gpu-pack/ what a bare GPU machine without a registry lacks, and prints how to use it.

    wheels/         packages that such a machine does not have, for its Python
    native/         the compiled parts, for the case that the build fails there
    photos/         the real photographs, where they lie beside the checkout
    manifest.json   commit, versions, and every file with its size and SHA-256

The folder is ignored by git and travels beside the tracked files. Reading it needs the standard library alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "gpu-pack"
LIMIT_MIB = 60
CHANGED = " + changes"
PYTHON_VERSION = "3.12"
# Needed by the trainer, the loader and the demo; then the rivals of the contrastive benchmark, which need nothing but
# torch and Triton.
WHEELS = (
    "simplejpeg",
    "instant-clip-tokenizer",
    "inf-cl",
    "memeff",
    "cut-cross-entropy",
    "liger-kernel",
    "siglip-kernel",
)
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


@dataclass(frozen=True)
class Manifest:
    """What gpu-pack/ holds and where it comes from."""

    commit: str
    python: str  # of the wheels and of the compiled parts
    torch: str | None  # that the compiled parts were linked with; None: there are none
    missing: list[str] = field(default_factory=list)  # what could not be brought, with the reason
    files: dict[str, tuple[int, str]] = field(default_factory=dict)  # path -> bytes, SHA-256
    sources: dict[str, str] = field(default_factory=dict)  # tracked file -> SHA-256, when the pack was made


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a pack; None where there is no pack. Raises SystemExit where it is damaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(**{**content, "files": {name: tuple(entry) for name, entry in content["files"].items()}})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SystemExit(f"error: {path}: not a manifest of make gpu-pack ({error}): run make gpu-pack again") from None


def damaged(folder: Path, manifest: Manifest) -> list[str]:
    """Files that are missing or differ from the manifest."""
    return [
        name
        for name, entry in manifest.files.items()
        if not (folder / name).is_file() or _entry(folder / name) != tuple(entry)
    ]


def commit_here(root: Path, manifest: Manifest) -> str:
    """The commit of the files below `root`, which may have changed since the pack was made."""
    same = all((root / name).is_file() and _digest(root / name) == digest for name, digest in manifest.sources.items())
    return manifest.commit if same or manifest.commit.endswith(CHANGED) else manifest.commit + CHANGED


def _sources() -> dict[str, str]:
    """What git tracks, without texts and records, which change no measurement."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, check=False).stdout.decode()
    names = [name for name in listed.split("\0") if name and not name.endswith(".md")]
    return {
        name: _digest(ROOT / name)
        for name in names
        if not name.startswith("benchmarks/records/") and (ROOT / name).is_file()
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _entry(path: Path) -> tuple[int, str]:
    return path.stat().st_size, _digest(path)


def download(python: str, names: tuple[str, ...], folder: Path) -> list[str]:
    """Wheels of `names` for the machine's Python, each by itself; returns what could not be had, with the reason."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    options = ["--no-deps", "--only-binary=:all:", f"--python-version={PYTHON_VERSION}", "--implementation=cp"]
    options += [f"--platform={name}" for name in _PLATFORMS]
    for name in names:
        command = [python, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", *options]
        done = subprocess.run([*command, "-d", folder, name], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), "pip failed")
            missing.append(f"{name}: {reason}")
    return missing


def build(python: str, folder: Path) -> tuple[str | None, list[str]]:
    """Compiles for `python` into `folder`; returns the torch linked with, and what is missing."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None, [f"compiled parts: this machine is {platform.machine()}, the GPU machine x86-64"]
    query = "import sys, torch; print('%d.%d' % sys.version_info[:2], torch.__version__, torch.version.cuda)"
    version, torch, cuda = subprocess.run(
        [python, "-c", query], capture_output=True, text=True, check=True
    ).stdout.split()
    with tempfile.TemporaryDirectory() as work:
        env = {
            **os.environ,
            # Linking the CUDA library needs a CUDA build of torch.
            "SCENARIOCLIP_FAST_BUILD": "auto" if cuda != "None" else "cpu",
            "SCENARIOCLIP_FAST_ARCHS": "90a",
            "SCENARIOCLIP_FAST_BUILD_DIR": str(ROOT / "build" / "gpu-pack"),
        }
        command = [python, "setup.py", "--quiet", "build_ext", "--build-lib", work]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            return None, [f"compiled parts: the build failed: {done.stderr.strip()[-500:]}"]
        built = Path(work) / "scenarioclip_fast" / "_native"
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*built.glob("*.so"), built / "build.json"]:
            shutil.copy2(path, folder / path.name)
        left_out = json.loads((built / "build.json").read_text())["left_out"]
    missing = [f"compiled parts, {part}: {reason}" for part, reason in left_out.items()]
    if version != PYTHON_VERSION:
        missing.append(f"compiled parts, host: built for Python {version}, the GPU machine has {PYTHON_VERSION}")
    return torch, missing


def pack(python: str, folder: Path, photos: Path) -> Manifest:
    """Fills `folder` anew."""
    from scenarioclip_fast.bench import machine

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"downloading wheels for Python {PYTHON_VERSION}", flush=True)
    missing = download(python, WHEELS, folder / "wheels")
    print("compiling for sm_90a", flush=True)
    torch, not_built = build(python, folder / "native")
    missing += not_built
    if photos.is_dir():
        shutil.copytree(photos, folder / "photos", copy_function=shutil.copyfile)
        for path in [folder / "photos", *(folder / "photos").rglob("*")]:  # the source may be read-only
            path.chmod(0o755 if path.is_dir() else 0o644)
    else:
        missing.append(f"photos: {photos} does not exist (--photos DIR); synthetic scenes will be used instead")
    files = {str(path.relative_to(folder)): _entry(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = Manifest(machine.commit(ROOT), PYTHON_VERSION, torch, missing, files, _sources())
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    return manifest


def up_to_date(folder: Path) -> Manifest | None:
    """The manifest where nothing has changed since the pack was made, and nothing was missing then."""
    from scenarioclip_fast.bench import machine

    manifest = read_manifest(folder)
    if manifest is None or manifest.missing or damaged(folder, manifest):
        return None
    same = manifest.commit == machine.commit(ROOT) and commit_here(ROOT, manifest) == manifest.commit
    return manifest if same else None


def main() -> int:
    parser = argparse.ArgumentParser(description="Gathers what a bare GPU machine lacks, in gpu-pack/.")
    parser.add_argument("--python", default=sys.executable, help="Python like the machine's, with torch")
    parser.add_argument(
        "--photos",
        type=Path,
        default=ROOT.parent / "shared" / "data" / "photos",
        help="real photographs in the published layout, taken along where they exist (default: %(default)s)",
    )
    args = parser.parse_args()
    folder = ROOT / FOLDER
    manifest = up_to_date(folder)
    if manifest is None:
        manifest = pack(args.python, folder, args.photos)
    else:
        print(f"{FOLDER}/ is up to date")
    return report(manifest)


def report(manifest: Manifest) -> int:
    """Prints what the pack holds, and how to use it; 1 where it is too large."""
    by_part: dict[str, int] = {}
    for name, (size, _) in manifest.files.items():
        by_part[name.partition("/")[0]] = by_part.get(name.partition("/")[0], 0) + size
    total = sum(by_part.values()) / 2**20
    for part, size in by_part.items():
        print(f"{part:8} {size / 2**20:6.1f} MiB")
    print(f"{'total':8} {total:6.1f} MiB (limit {LIMIT_MIB} MiB); commit {manifest.commit}")
    for reason in manifest.missing:
        print(f"missing: {reason}")
    if total > LIMIT_MIB:
        print(f"error: {FOLDER}/ is larger than {LIMIT_MIB} MiB", file=sys.stderr)
        return 1
    print(
        f"""
What travels to the GPU machine (x86-64, Python {PYTHON_VERSION}; the compiled parts are for sm_90a) fits one archive:

    git ls-files -z | tar --null -czf checkout.tgz -T - {FOLDER}

Unpack it there in an empty directory and run, in that directory:

    make gpu OUT=runs/gpu

or, without make: PYTHONPATH=benchmarks python3 -m gpu.run --out runs/gpu

It takes at most eight minutes and leaves record.json, README.md, sections.csv, log.txt and all.tar.gz in OUT."""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
