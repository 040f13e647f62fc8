"""`scenarioclip-fast embed`: embeddings of folders, tars and shards equal the model's; user errors are one line."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import scenarioclip_fast as scf
from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import ShardSet, generate_scenes, pack
from scenarioclip_fast.eval import embed
from scenarioclip_fast.model import FreezeConfig, ModelConfig, ScenarioCLIP, TextConfig, VisionConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/: random weights; images/: four good images and a bad one; shards/: ten synthetic scenes."""
    place = tmp_path_factory.mktemp("embed")
    torch.manual_seed(0)
    config = ModelConfig(
        embed_dim=12,
        vision=VisionConfig(16, 8, 24, 2, 3),
        text=TextConfig(16, width=16, layers=1, heads=2),
        freeze=FreezeConfig.nothing(),
    )
    model = ScenarioCLIP(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(place / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), np.uint8)
    folder = place / "images"
    (folder / "below").mkdir(parents=True)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.fromarray(pixels[0]).save(folder / "a.jpg")
    Image.fromarray(pixels[1]).save(folder / "below" / "b.PNG")
    Image.fromarray(pixels[2, ..., 0]).save(folder / "gray.jpg")
    Image.fromarray(pixels[3]).save(folder / "rotated.jpg", exif=rotated)
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.jpg").write_bytes(b"")
    pack(generate_scenes(10, seed=0, test=0.5), place / "shards")
    return place


def run(place: Path, images: Path, out: Path, *options: str) -> int:
    return main(["embed", str(place / "model"), str(images), "--out", str(out), "--device", "cpu", *options])


def read(path: Path) -> dict[str, Any]:
    with np.load(path) as arrays:
        return dict(arrays)


def expected(place: Path, images: list[Path]) -> torch.Tensor:
    with torch.no_grad():
        model = ScenarioCLIP.from_pretrained(place / "model").eval()
        return model.encode_image(scf.preprocess(images, size=16), "global")


def test_folder(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out.npz"
    assert run(place, place / "images", out, "--batch-size", "2") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"wrote {out}: 4 global embeddings of width 12 from 4 images, 1 skipped; ")
    assert (
        "warning: unusable images skipped (1): bad.jpg (truncated: 3 bytes of JPEG end inside the header)"
        in printed.err
    )
    found = read(out)
    assert found.keys() == {"keys", "embeddings", "level"} and found["level"] == "global"
    assert list(found["keys"]) == ["a.jpg", "below/b.PNG", "gray.jpg", "rotated.jpg"]
    assert found["embeddings"].dtype == np.float32
    # The order of float32 sums depends on the batch size.
    torch.testing.assert_close(
        torch.from_numpy(found["embeddings"]),
        expected(place, [place / "images" / key for key in found["keys"]]),
        rtol=1e-5,
        atol=1e-5,
    )
    assert list(out.parent.iterdir()) == [out]


def test_one_image_and_a_tar(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = place / "images" / "a.jpg"
    alone = embed(place / "model", image, device="cpu")
    assert alone.keys == ["a.jpg"] and alone.text_ids is None
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for name in ("x/1.jpg", "x/1.json", "2.jpg"):
            info = tarfile.TarInfo(name)
            info.size = image.stat().st_size
            tar.addfile(info, io.BytesIO(image.read_bytes()))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "2.jpg"
        tar.addfile(link)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "some.tar").read_bytes()[:700])
    with (tmp_path / "some.tar").open("ab") as more:
        more.write((tmp_path / "some.tar").read_bytes() + b"rubbish")
    table = embed(place / "model", tmp_path, device="cpu", batch_size=1)
    assert table.keys == ["some.tar/x/1.jpg", "some.tar/2.jpg"] * 2
    assert torch.equal(table.embeddings, alone.embeddings.expand(4, -1))
    size = (tmp_path / "some.tar").stat().st_size
    assert [tuple(skipped) for skipped in table.skipped] == [
        ("cut.tar", "damaged tar: byte 0: x/1.jpg extends past the end of the file, at byte 700"),
        *[("some.tar/link.jpg", "got a hard link, expected a regular file")] * 2,
        ("some.tar", f"damaged tar: byte {size - len(b'rubbish')}: no header"),
    ]
    assert "cut.tar (damaged tar: byte 0: x/1.jpg extends past" in capsys.readouterr().err


@pytest.mark.parametrize("level", ["global", "object", "relation"])
def test_shards(level: str, place: Path, tmp_path: Path) -> None:
    assert run(place, place / "shards", tmp_path / "out.npz", "--level", level, "--batch-size", "3") == 0
    found = read(tmp_path / "out.npz")
    shards = ShardSet(place / "shards", "test")
    scenes = sorted((shards.read(i) for i in range(len(shards))), key=lambda scene: scene.key)
    texts = {
        "global": [(s.key, s.action) for s in scenes],
        "object": [(s.key, o.name) for s in scenes for o in s.objects],
        "relation": [(s.key, s.relation_text(k)) for s in scenes for k in range(len(s.relations))],
    }
    assert [(key, found["texts"][i]) for key, i in zip(found["keys"], found["text_ids"], strict=True)] == texts[level]
    assert found["embeddings"].shape == (len(texts[level]), 12)
    if level == "global":
        images = [s.image for s in scenes]
        torch.testing.assert_close(torch.from_numpy(found["embeddings"]), expected(place, images), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


def test_shards_without_masks(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only relation views need masks."""
    scenes = list(generate_scenes(6, seed=0, val=0.0, test=1.0))
    bare = [replace(s, objects=[replace(o, mask=None) for o in s.objects]) for s in scenes]
    for name, of_set in (("masked", scenes), ("bare", bare)):
        pack(of_set, tmp_path / name)
    for level in ("global", "object"):
        for name in ("masked", "bare"):
            assert run(place, tmp_path / name, tmp_path / f"{name}.npz", "--level", level, "--force") == 0
        found, expected = read(tmp_path / "bare.npz"), read(tmp_path / "masked.npz")
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in expected)
    assert run(place, tmp_path / "bare", tmp_path / "relations.npz", "--level", "relation") == 2
    assert "none of the" in capsys.readouterr().err


def test_parquet(place: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = embed(place / "model", place / "shards", tmp_path / "out.parquet", level="object", device="cpu")
    found = parquet.read_table(tmp_path / "out.parquet")
    assert found["key"].to_pylist() == table.keys
    assert table.text_ids is not None and table.texts is not None
    assert found["text"].to_pylist() == [table.texts[i] for i in table.text_ids.tolist()]
    np.testing.assert_array_equal(np.array(found["embedding"].to_pylist(), np.float32), table.embeddings.numpy())


def test_links_are_followed_and_broken_ones_listed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "photos").symlink_to(place / "images" / "below")
    (folder / "again").symlink_to(folder)  # a loop
    (folder / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    assert run(place, folder, tmp_path / "out.npz") == 0
    assert read(tmp_path / "out.npz")["keys"].tolist() == ["photos/b.PNG"]
    assert "unusable images skipped (1): gone.jpg (unreadable: " in capsys.readouterr().err


def test_narrow_images_are_skipped(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (30, 20)).save(folder / "a.png")
    Image.new("RGB", (2000, 1)).save(folder / "line.png")
    assert run(place, folder, tmp_path / "out.npz") == 0
    assert read(tmp_path / "out.npz")["keys"].tolist() == ["a.png"]
    message = "unusable images skipped (1): line.png (got an image of 2000 x 1, expected a ratio of the sides of"
    assert message in capsys.readouterr().err


def test_file_names_that_are_not_utf_8(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    data = (place / "images" / "a.jpg").read_bytes()
    for name in (b"caf\xe9.jpg", b"caf\xe8.jpg"):
        (tmp_path / os.fsdecode(name)).write_bytes(data if name == b"caf\xe9.jpg" else b"bad")
    with tarfile.open(tmp_path / "more.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("caf\u00e9.jpg")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    assert run(place, tmp_path, tmp_path / "out.parquet") == 0
    keys = [r"caf\xe9.jpg", r"more.tar/caf\xe9.jpg"]
    assert parquet.read_table(tmp_path / "out.parquet")["key"].to_pylist() == keys
    assert r"caf\xe8.jpg (not_an_image" in capsys.readouterr().err
    assert run(place, tmp_path, tmp_path / "out.npz") == 0
    assert read(tmp_path / "out.npz")["keys"].tolist() == keys


def test_user_errors_are_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, empty = place / "images", tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.jpg").write_bytes(b"no JPEG")
    there = tmp_path / "there.npz"
    there.write_bytes(b"kept")
    out = tmp_path / "out.npz"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for arguments, message in (
        ((images, there / "out.npz"), "there.npz is a file, expected a directory"),
        ((images, tmp_path / "bad" / "bad.jpg" / "new" / "out.npz"), "bad.jpg is a file, expected a directory"),
        ((images, out, "--split", "val"), "split: got 'val', but "),
        ((images, out, "--level", "object"), "level 'object' requires annotations"),
        ((images, there), "there.npz exists: pass --force"),
        ((images, tmp_path / "out.csv"), "got suffix '.csv', expected .npz or .parquet"),
        ((images, tmp_path / "out.parquet"), r"pyarrow is not installed"),
        ((images, out, "--batch-size", "0"), "batch size: got 0, expected at least 1"),
        ((images, out, "--device", "abacus"), "device: got 'abacus'"),
        ((empty, out), "empty: no images found, expected files ending in .jpg, "),
        ((tmp_path / "gone", out), "gone: no such file or directory"),
        ((tmp_path / "bad", out), "bad: nothing to embed at level 'global' (1 images skipped)"),
        ((place / "shards", out, "--split", "more"), "split: got 'more', expected one of train, val, test"),
    ):
        assert run(place, *arguments) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and message in error[0]
    assert there.read_bytes() == b"kept" and not out.exists()
    assert run(place, images, there, "--force") == 0
    assert len(read(there)["keys"]) == 4
