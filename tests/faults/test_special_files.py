"""Named pipes, sockets, devices and directories in place of files: refused at once, never waited for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from special import bounded, make_special

from scenarioclip_fast.data import ShardSet, generate_scenes, pack, scene_loader
from scenarioclip_fast.data.images import SkippedImage, find_images, read_images
from scenarioclip_fast.data.preprocess import preprocess
from scenarioclip_fast.data.shards import BadSample
from scenarioclip_fast.data.synthetic import write_published_layout
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.features import _load
from scenarioclip_fast.files import NotRegularError, open_file, read_regular

KINDS = ["named pipe", "socket", "device", "directory"]
SECONDS = 60.0  # much more than any case takes; a pipe would be waited for forever


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("special") / "pack"
    pack(generate_scenes(6, seed=6, val=0, test=0), directory, shard_size=2, progress=False)
    return directory


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("special") / "published"
    write_published_layout([replace(scene, split=None) for scene in generate_scenes(4, seed=7)], directory)
    return directory


def put(path: Path, kind: str) -> Path:
    """Replace a file."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    make_special(path, kind, path)
    return path


def pipes_below(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_fifo()]


def refused_by_pack(source: Any, tmp_path: Path, **options: Any) -> str:
    """Pack, and return the error, which is a single line."""
    with bounded(SECONDS, *pipes_below(tmp_path)), pytest.raises(UserError) as caught:
        pack(source, tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_opening(kind: str, tmp_path: Path) -> None:
    path = put(tmp_path / "file", kind)
    link = tmp_path / "link"
    link.symlink_to(path)
    for opened in (path, link):
        with bounded(10, *pipes_below(tmp_path)):
            with pytest.raises(NotRegularError, match=f"^got a {kind}, expected a regular file$") as caught:
                open_file(opened)
            assert caught.value.filename == str(opened)
            with pytest.raises(NotRegularError):
                read_regular(opened)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verify", [False, True])
def test_shards(kind: str, verify: bool, packed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(packed, tmp_path / "copy")
    put(copy / "train-000001.tar", kind)
    options: dict[str, Any] = {"size": 16, "epochs": 1, "drop_last": False, "max_bad_fraction": 1.0, "threads": 2}
    with bounded(SECONDS, *pipes_below(tmp_path)):
        shards = ShardSet(copy, verify=verify)
        with pytest.raises(BadSample, match=f"unreadable_shard: train-000001.tar: got a {kind}, expected a regular"):
            shards.read(2)
        shards.close()
        with scene_loader(copy, 2, verify=verify, **options) as loader:
            keys = [key for batch in loader for key in batch.keys]
    expected = ShardSet(packed).keys
    assert sorted(keys) == sorted(expected[:2] + expected[4:]) and loader.bad == {"unreadable_shard": 2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["manifest.json", "index.bin", "vocabulary.bin"])
def test_files_of_a_pack(kind: str, name: str, packed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(packed, tmp_path / "copy")
    path = put(copy / name, kind)
    with bounded(SECONDS, *pipes_below(tmp_path)):
        with pytest.raises(UserError, match=rf"{name}: not readable \(got a {kind}, expected a regular file\)"):
            assert ShardSet(copy).vocabulary
        with pytest.raises(UserError, match=f"got a {kind}, expected a regular file"):
            Vocabulary.load(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("images/{id}.jpg", "missing_image"),
        ("sam_results/{id}_grounding_sam.npz", "bad_masks"),
        ("sam_results/{id}_grounding_sam/0.png", "bad_masks"),
        ("sam_results/{id}/0.png", "bad_masks"),
    ],
)
def test_images_and_masks_are_rejected(kind: str, name: str, reason: str, published: Path, tmp_path: Path) -> None:
    source = shutil.copytree(published, tmp_path / "source")
    image = sorted((source / "images").iterdir())[1]
    path = source / name.format(id=image.stem)
    if path.suffix == ".png":
        (source / "sam_results" / f"{image.stem}_grounding_sam.npz").unlink()
    put(path, kind)
    with bounded(SECONDS, *pipes_below(tmp_path)):
        report = pack(source, tmp_path / "out", progress=False)
    assert report.rejected[reason] == 1 and report.rejected.keys() <= {reason, "relation_without_mask"}
    scenes = sum(split["scenes"] for split in report.splits.values())
    assert scenes == 3 + (reason == "bad_masks"), "a scene may do without masks"
    detail = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert f"got a {kind}, expected a regular file" in detail or "expected 0.png to" in detail, detail


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["metadata.json", "classes.json", "metadata_val.json"])
def test_metadata_is_refused(kind: str, name: str, published: Path, tmp_path: Path) -> None:
    source = shutil.copytree(published, tmp_path / "source")
    path = put(source / name, kind)
    message = refused_by_pack(source, tmp_path)
    assert message == f"{path}: not readable as JSON: got a {kind}, expected a regular file"


def captions_in_a_folder(root: Path, kind: str) -> dict[str, Any]:
    put(root / "captions" / "captions_train.json", kind)
    return {"actions": root / "captions"}


@pytest.mark.parametrize("kind", ["named pipe", "socket", "device"])
@pytest.mark.parametrize(
    "options",
    [
        lambda root, kind: {"actions": put(root / "actions.json", kind)},
        captions_in_a_folder,
        lambda root, kind: {"images": put(root / "images", kind)},
    ],
    ids=["actions", "captions", "images"],
)
def test_options_of_pack(kind: str, options: Callable[[Path, str], dict[str, Any]], tmp_path: Path) -> None:
    source = tmp_path / "psg.json"
    source.write_text(
        '{"data": [{"image_id": "1"}], "thing_classes": ["a"], "stuff_classes": ["b"], "predicate_classes": ["on"]}'
    )
    given = options(tmp_path, kind)
    message = refused_by_pack(source, tmp_path, format="psg", **given)
    assert f"got a {kind}, expected a regular file" in message or "images: " in message


VISUAL_GENOME = ("objects.json", "relationships.json", "image_data.json")
SWIG = ("train.json", "imsitu_space.json")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("format", "names"),
    [
        ("psg", ["psg.json"]),
        ("coco-panoptic", ["panoptic_val2017.json"]),
        ("coco-panoptic", ["annotations/panoptic_val2017.json"]),
        ("visual-genome", VISUAL_GENOME),
        ("swig", SWIG),
        ("webdataset", ["train-000.tar"]),
        ("published", ["metadata.json"]),
        ("auto", ["metadata.json"]),
        ("auto", ["train-000.tar"]),
        ("auto", ["psg.json"]),
    ],
)
@pytest.mark.parametrize("direct", [False, True])
def test_annotations_of_every_format(kind: str, format: str, names: Any, direct: bool, tmp_path: Path) -> None:
    """In a directory, and the first file itself."""
    paths = [put(tmp_path / "source" / name, kind) for name in names]
    refused_by_pack(paths[0] if direct else tmp_path / "source", tmp_path, format=format)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_file_of_several_of_a_format(kind: str, number: int, tmp_path: Path) -> None:
    """The others are well-formed."""
    source = tmp_path / "source"
    source.mkdir()
    for names in (VISUAL_GENOME, SWIG):
        for i, name in enumerate(names):
            if i == number:
                put(source / name, kind)
            else:
                (source / name).write_text("{}" if names is SWIG else "[]")
    put(source / "object_alias.txt", kind)
    for format in ("visual-genome", "swig"):
        refused_by_pack(source, tmp_path, format=format)


@pytest.mark.parametrize("kind", ["named pipe", "socket", "device"])
def test_a_tar_that_is_replaced_while_packing(
    kind: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scenarioclip_fast.data.sources.webdataset import WebDatasetSource

    source = shutil.copytree(packed, tmp_path / "source", ignore=shutil.ignore_patterns("*.json*"))
    scan = WebDatasetSource.scan

    def late(data: WebDatasetSource, workers: int, progress: bool) -> Any:
        found = scan(data, workers, progress)
        put(source / "train-000001.tar", kind)
        return found

    monkeypatch.setattr(WebDatasetSource, "scan", late)
    with bounded(SECONDS), pytest.raises(UserError, match=rf"train-000001.tar: got a {kind}, expected a regular file"):
        pack(source, tmp_path / "out", progress=False)


@pytest.mark.parametrize("kind", ["named pipe", "socket", "device"])
def test_images_without_annotations(kind: str, tmp_path: Path) -> None:
    """`embed` lists them, and `preprocess` ends with an error."""
    folder = tmp_path / "images"
    folder.mkdir()
    PIL.Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / "good.png")
    for name in ("bad.jpg", "bad.tar", "sub/bad.png"):
        put(folder / name, kind)
    skipped: list[SkippedImage] = []
    with bounded(SECONDS, *pipes_below(tmp_path)):
        assert [key for key, _ in read_images(folder, skipped.append)] == ["good.png"]
        reason = f"unreadable: got a {kind}, expected a regular file"
        assert skipped == [SkippedImage(name, reason) for name in ("bad.jpg", "bad.tar", "sub/bad.png")]
        with pytest.raises(UserError, match=f"bad.jpg: got a {kind}, expected a regular file"):
            preprocess([folder / "good.png", folder / "bad.jpg"])
        with pytest.raises(UserError, match="no images found"):
            find_images(folder / "bad.jpg")


@pytest.mark.parametrize("kind", KINDS)
def test_cached_features(kind: str, tmp_path: Path) -> None:
    path = put(tmp_path / "test.safetensors", kind)
    with bounded(SECONDS, *pipes_below(tmp_path)):
        assert _load(path) is None
    assert os.path.lexists(path)
