from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data.inspect import collect_statistics, draw_sheet
from scenarioclip_fast.data.packing.packer import pack
from scenarioclip_fast.data.scene import Relation, Scene, SceneObject
from scenarioclip_fast.data.shards import BadSample
from scenarioclip_fast.data.views import Views
from scenarioclip_fast.ops.views import render_views


def box_mask(height: int, width: int, box: tuple[int, int, int, int]) -> torch.Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def make_scene(key: str, size: tuple[int, int] = (40, 80)) -> Scene:
    height, width = size
    boxes = [(0, 5, 12, 20), (30, 10, 50, 30), (60, 0, 80, 40)]
    objects = [
        SceneObject(f"thing ${k}", tuple(map(float, b)), box_mask(height, width, b))  # type: ignore[arg-type]
        for k, b in enumerate(boxes)
    ]
    image = torch.from_numpy(np.random.default_rng(len(key)).integers(0, 256, (height, width, 3), dtype=np.uint8))
    return Scene(key, image, "a $ dollar _ sign", objects, [Relation(0, "left of", 1), Relation(1, "near", 2)])


def test_statistics() -> None:
    scenes: list[Scene | BadSample] = [make_scene("a"), make_scene("bb"), BadSample("c", "short_shard", "...")]
    lonely = make_scene("d")
    lonely.relations, lonely.objects = [], [SceneObject("thing", (0.0, 0.0, 40.0, 40.0), None)]
    broken = make_scene("e")
    broken.objects[0].mask = torch.ones(3, 3, dtype=torch.bool)
    bare = replace(lonely, action=None, relations=[Relation(0, "near", 0)])
    statistics = collect_statistics([*scenes, lonely, bare, broken])
    assert (statistics.scenes, statistics.objects, statistics.relations) == (4, [3, 3, 1, 1], [2, 2, 0, 1])
    assert statistics.without_mask == 2 and len(statistics.mask_area) == 6
    assert statistics.without_action == 1 and "scenes     4  (without an action: 1)" in str(statistics)
    assert statistics.mask_area[:3] == [12 * 15 / 3200, 20 * 20 / 3200, 20 * 40 / 3200]
    assert statistics.all_black == 4  # the first and the last object of two scenes are outside the centre 40 x 40
    assert dict(statistics.bad) == {"short_shard": 1, "no_views": 1}
    assert "median area" not in str(collect_statistics([lonely]))
    assert "4 of 8 masked object views" in str(statistics) and "1 short_shard" in str(statistics)


@pytest.mark.parametrize("size", [(30, 90), (90, 30), (50, 50)])
def test_all_black_views_render_black(size: tuple[int, int]) -> None:
    height, width = size
    rng = np.random.default_rng(0)
    white = torch.full((height, width, 3), 255, dtype=torch.uint8)
    corners = rng.integers(0, [width, height], (60, 2))
    objects = [SceneObject("thing", (float(x), float(y), float(x) + 6, float(y) + 6)) for x, y in corners]
    scene = Scene("a", white, "resting", objects)
    views = Views.of_scenes([scene])
    # At the size of the centre crop, nothing is resampled, so no filter extends past its edge.
    pixels = render_views([white], views, size=min(size), mean=(0, 0, 0), std=(1, 1, 1))
    black = int((pixels[views.kind == 1].amax((1, 2, 3)) == 0).sum())
    assert collect_statistics([scene]).all_black == black
    assert (black > 0) == (height != width)


def test_sheet(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for views in ({"object_view": "masked"}, {"object_view": "crop"}, {"relation_view": "scene"}):
        out = tmp_path / f"{views}.png"
        draw_sheet([make_scene("a"), make_scene("b", (40, 85))], out, size=24, max_views=2, **views)  # type: ignore[arg-type]
        assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("simplejpeg")
    pack([make_scene(str(k)) for k in range(6)], tmp_path / "pack", val=0, test=0, progress=False)
    capsys.readouterr()
    command = ["inspect", str(tmp_path / "pack"), "--out", str(tmp_path / "out"), "--scenes", "2", "--size", "24"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "scenes     6" in printed and "objects    18" in printed and "12 of 18 masked object views" in printed
    for name in ("scenes.png", "histograms.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [("--scenes", "41", "1 to 40"), ("--seed", "-1", "at least 0"), ("--size", "1000000", "1 to 1024")],
)
def test_command_rejects_numbers_out_of_range(
    flag: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path), "--out", str(tmp_path), flag, value]) == 2
    assert f"{flag[2:]}: got {value}, expected {message}" in capsys.readouterr().err


def test_command_without_a_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not list(tmp_path.iterdir())


def test_command_rejects_files_as_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["inspect", str(tmp_path / "file"), "--out", str(tmp_path / "out")]) == 2
    assert "file: is a file; `scenarioclip-fast pack" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--out", str(tmp_path / "file")]) == 2
    assert "file: is a file; choose a directory for the pictures" in capsys.readouterr().err
