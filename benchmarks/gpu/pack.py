"""`make gpu-pack`: collects in gpu-pack/ what an offline GPU machine lacks, and prints how to use it.

    wheels/         packages that such a machine does not have, for its Python
    headers/        the wheel of CUTLASS, for its headers
    native/         prebuilt extensions, in case the build fails there
    photos/         the real photos, if present beside the checkout
    manifest.json   commit, versions, and every file with its size and SHA-256

git ignores the folder; copy it along with the tracked files. Reading it needs only the standard library.
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
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "gpu-pack"
LIMIT_MIB = 60
CHANGED = " + changes"
PYTHON_VERSION = "3.12"
# Needed by the trainer, the loader and the demo; then the third-party losses of the contrastive benchmark, which need
# only torch and Triton. nvImageCodec and nvJPEG, 28 MiB, do not fit beside the photos.
WHEELS = (
    "simplejpeg",
    "instant-clip-tokenizer",
    "inf-cl",
    "memeff",
    "cut-cross-entropy",
    "liger-kernel",
    "siglip-kernel",
)
# For the build; setup.py has the same version.
HEADERS = ("nvidia-cutlass==4.2.0.0",)
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


@dataclass(frozen=True)
class Manifest:
    """The contents of gpu-pack/ and their origin."""

    commit: str
    python: str  # version of the wheels and the extensions
    torch: str | None  # version the extensions were linked with; None without extensions
    missing: list[str] = field(default_factory=list)  # what could not be included, with the reason
    files: dict[str, tuple[int, str]] = field(default_factory=dict)  # path -> bytes, SHA-256
    sources: dict[str, str] = field(default_factory=dict)  # tracked file -> SHA-256 when the pack was made


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a pack, or None without a pack. Raises SystemExit if it is damaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(**{**content, "files": {name: tuple(entry) for name, entry in content["files"].items()}})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SystemExit(f"error: {path}: not a manifest of make gpu-pack ({error}): run make gpu-pack again") from None


def damaged_files(folder: Path, manifest: Manifest) -> list[str]:
    """The files that are missing or differ from the manifest."""
    return [
        name
        for name, entry in manifest.files.items()
        if not (folder / name).is_file() or _size_and_digest(folder / name) != tuple(entry)
    ]


def commit_here(root: Path, manifest: Manifest) -> str:
    """The commit of the files below `root`, marked if they have changed since the pack was made."""
    unchanged = all(
        (root / name).is_file() and _digest(root / name) == digest for name, digest in manifest.sources.items()
    )
    return manifest.commit if unchanged or manifest.commit.endswith(CHANGED) else manifest.commit + CHANGED


def _sources() -> dict[str, str]:
    """Digests of the tracked files, except documentation and records, which do not affect measurements."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, check=False).stdout.decode()
    names = [name for name in listed.split("\0") if name and not name.endswith(".md")]
    return {
        name: _digest(ROOT / name)
        for name in names
        if not name.startswith("benchmarks/records/") and (ROOT / name).is_file()
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _size_and_digest(path: Path) -> tuple[int, str]:
    return path.stat().st_size, _digest(path)


def download(python: str, names: tuple[str, ...], folder: Path) -> list[str]:
    """Download wheels of `names` for the GPU machine, one by one; return the unavailable ones with the reason."""
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


def headers(pack: Path, folder: Path) -> dict[str, str]:
    """Unpack the headers of a pack into `folder`; return the variable that names them to setup.py."""
    for wheel in (pack / "headers").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            inside = "cutlass_library/source/include/"
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(inside)])
        return {"SCENARIOCLIP_FAST_CUTLASS": str(folder / inside)}
    return {}


def build(python: str, pack: Path) -> tuple[str | None, list[str]]:
    """Build the extensions for `python` into the pack; return the torch version they use, and what is missing."""
    folder = pack / "native"
    if platform.machine() not in ("x86_64", "AMD64"):
        return None, [f"extensions: this machine is {platform.machine()}, the GPU machine is x86-64"]
    query = "import sys, torch; print('%d.%d' % sys.version_info[:2], torch.__version__, torch.version.cuda)"
    version, torch, cuda = subprocess.run(
        [python, "-c", query], capture_output=True, text=True, check=True
    ).stdout.split()
    with tempfile.TemporaryDirectory() as work:
        env = {
            **os.environ,
            **headers(pack, Path(work) / "headers"),
            # Linking the CUDA library needs a CUDA build of torch.
            "SCENARIOCLIP_FAST_BUILD": "auto" if cuda != "None" else "cpu",
            "SCENARIOCLIP_FAST_ARCHS": "90a",
            "SCENARIOCLIP_FAST_BUILD_DIR": str(ROOT / "build" / "gpu-pack"),
        }
        command = [python, "setup.py", "--quiet", "build_ext", "--build-lib", work]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            return None, [f"extensions: the build failed: {done.stderr.strip()[-500:]}"]
        built = Path(work) / "scenarioclip_fast" / "_native"
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*built.glob("*.so"), built / "build.json"]:
            shutil.copy2(path, folder / path.name)
        left_out = json.loads((built / "build.json").read_text())["left_out"]
    missing = [f"extensions, {part}: {reason}" for part, reason in left_out.items()]
    if version != PYTHON_VERSION:
        missing.append(f"extensions, host: built for Python {version}, the GPU machine has {PYTHON_VERSION}")
    return torch, missing


def pack(python: str, folder: Path, photos: Path) -> Manifest:
    """Create the pack in `folder` from scratch."""
    from scenarioclip_fast.bench import machine

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"downloading wheels for Python {PYTHON_VERSION}", flush=True)
    missing = download(python, WHEELS, folder / "wheels") + download(python, HEADERS, folder / "headers")
    print("compiling for sm_90a", flush=True)
    torch, not_built = build(python, folder)
    missing += not_built
    if photos.is_dir():
        shutil.copytree(photos, folder / "photos", copy_function=shutil.copyfile)
        for path in [folder / "photos", *(folder / "photos").rglob("*")]:  # the source may be read-only
            path.chmod(0o755 if path.is_dir() else 0o644)
    else:
        missing.append(f"photos: {photos} does not exist (--photos DIR); synthetic scenes will be used instead")
    files = {
        str(path.relative_to(folder)): _size_and_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    manifest = Manifest(machine.commit(ROOT), PYTHON_VERSION, torch, missing, files, _sources())
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    return manifest


def up_to_date(folder: Path) -> Manifest | None:
    """The manifest of a complete pack of the current sources; None if it must be made again."""
    from scenarioclip_fast.bench import machine

    manifest = read_manifest(folder)
    if manifest is None or manifest.missing or damaged_files(folder, manifest):
        return None
    current = manifest.commit == machine.commit(ROOT) and commit_here(ROOT, manifest) == manifest.commit
    return manifest if current else None


def main() -> int:
    parser = argparse.ArgumentParser(description="Collect what an offline GPU machine lacks, in gpu-pack/.")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the GPU machine's version, with torch")
    parser.add_argument(
        "--photos",
        type=Path,
        default=ROOT.parent / "shared" / "data" / "photos",
        help="real photos in the published layout, included if they exist (default: %(default)s)",
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
    """Print the contents and how to use them; return 1 if the pack is too large."""
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
Create one archive for the GPU machine (x86-64, Python {PYTHON_VERSION}; the extensions are for sm_90a):

    git ls-files -z | tar --null -czf checkout.tgz -T - {FOLDER}

Unpack it there in an empty directory and run in it:

    make gpu OUT=runs/gpu

or, without make: PYTHONPATH=benchmarks python3 -m gpu.run --out runs/gpu

It takes at most eight minutes and writes record.json, README.md, sections.csv, log.txt and all.tar.gz to OUT."""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
