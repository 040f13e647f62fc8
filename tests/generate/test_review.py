"""The file of the review page: what it embeds, which scenes, and that texts of others cannot leave their elements."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generated_runs import Records, write_run
from PIL import Image

from scenarioclip_fast.data import rle
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.examples import choose, shrink_mask
from scenarioclip_fast.generate.images import read_list, shrunk_size
from scenarioclip_fast.generate.review import run_id, write_review
from scenarioclip_fast.generate.source import CuratedSource
from scenarioclip_fast.ops import focused_region


class Reader(HTMLParser):
    """Collects the scripts of a page, as a browser does."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.data: dict[str, Any] = {}
        self.code: list[str] = []
        self.policy = ""
        self._open: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert not any(name.startswith("on") for name in found)
        assert not {"src", "href"} & {name for name, value in found.items() if value}
        self.policy = found["content"] or "" if "http-equiv" in found else self.policy
        self._open = (found.get("id") or "") if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._open:
            self.data[self._open] = json.loads(data)
        elif self._open is not None:
            self.code.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._open = None


def read_page(path: Path) -> Reader:
    return Reader(path.read_text("utf-8"))


def decoded(uri: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")))))


def test_scenes(tmp_path: Path) -> None:
    units = write_run(tmp_path, 9, unit_size=4)
    page = read_page(write_review(tmp_path, units, tmp_path / "deep" / "review.html", scenes=0))
    index = page.data["index"]
    sources = CuratedSource(tmp_path, units).scenes
    assert [one["key"] for one in index["scenes"]] == [one.item.key for one in sources]
    assert index["total"] == len(sources) == 8
    for i, source in enumerate(sources):
        shown, record = page.data[f"scene-{i}"], source.read()
        assert shown["size"] == record["size"] == list(decoded(shown["image"]).shape[:2])
        assert [o["id"] for o in shown["objects"]] == [o["id"] for o in record["objects"]]
        assert [r["id"] for r in shown["relations"]] == [r["id"] for r in record["relations"]]
        assert [o["mask"] for o in shown["objects"]] == [o["mask"]["counts"] for o in record["objects"]]  # not reduced
        assert (shown["action"], shown["caption"]) == (record["action"], record["caption"])
        assert [o["score"] for o in shown["objects"]] == record["scores"]["boxes"]


def test_regions_are_those_of_the_relations(tmp_path: Path) -> None:
    units = write_run(tmp_path, 4)
    page = read_page(write_review(tmp_path, units, tmp_path / "review.html", scenes=0))
    for i, source in enumerate(CuratedSource(tmp_path, units).scenes):
        image = torch.from_numpy(np.array(Image.open(io.BytesIO(source.item.read()))))
        record = source.read()
        for shown, relation in zip(page.data[f"scene-{i}"]["relations"], record["relations"], strict=True):
            one, other = (rle.decode(record["objects"][relation[end]]["mask"]) for end in ("subject", "object"))
            region = Image.fromarray(focused_region(image, one, other).numpy())
            scale = 224 / min(region.size)
            large = region.resize([max(224, round(n * scale)) for n in region.size], Image.Resampling.BICUBIC)
            left, top = ((n - 224) // 2 for n in large.size)
            expected = np.asarray(large.crop((left, top, left + 224, top + 224)), np.float32)
            # JPEG of quality 78, and Pillow's bicubic filter in place of ours: a few levels on average; the region of
            # another relation differs by 15 or more.
            assert np.abs(decoded(shown["region"]) - expected).mean() < 6


def test_relations_without_masks_have_no_region(tmp_path: Path) -> None:
    def change(i: int, records: Records) -> None:
        scene = records["curate"]["scene"]
        scene["objects"][scene["relations"][0]["subject"]]["mask"] = None

    page = read_page(write_review(tmp_path, write_run(tmp_path, 3, change=change), tmp_path / "r.html", scenes=0))
    for i in range(2):
        lost = page.data[f"scene-{i}"]["relations"][0]
        assert lost["region"] is None
        assert page.data[f"scene-{i}"]["objects"][lost["subject"]]["mask"] is None


def test_hostile_texts_stay_data(tmp_path: Path) -> None:
    evil = '</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>&lt;{{script}}{{policy}}"'
    evil += "\u2028\ud800\x1b[2J\u202e"

    def change(i: int, records: Records) -> None:
        scene = records["curate"]["scene"]
        scene["caption"] = scene["action"] = scene["objects"][0]["name"] = scene["relations"][0]["predicate"] = evil

    directory = tmp_path / "<b>{{scenes}}"
    path = write_review(directory, write_run(directory, 3, change=change), tmp_path / "review.html", scenes=0)
    page = read_page(path)
    shown = page.data["scene-0"]
    escaped = evil[: evil.index("\u2028")] + r"\u2028\ud800\x1b[2J\u202e"
    assert shown["caption"] == shown["action"] == shown["objects"][0]["name"] == escaped
    assert page.data["run"] == "<b>{{scenes}}"
    (script,) = page.code
    # The policy allows this script and nothing else.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in page.policy and page.policy.startswith(
        "default-src 'none'; img-src data:;"
    )
    assert not re.search(r"https?:|innerHTML|insertAdjacentHTML|eval\(", path.read_text("utf-8"))


def test_sample(tmp_path: Path) -> None:
    units = write_run(tmp_path, 12, unit_size=5)
    scenes = CuratedSource(tmp_path, units).scenes
    keys = [scene.item.key for scene in scenes]
    samples = []
    for seed in range(8):
        chosen = [scene.item.key for scene in choose(scenes, 4, seed)]
        assert len(set(chosen)) == 4 and chosen == sorted(chosen, key=keys.index)
        assert chosen == [scene.item.key for scene in choose(scenes, 4, seed)]
        samples.append(tuple(chosen))
    assert len(set(samples)) > 4
    assert choose(scenes, 50, 0) == choose(scenes, 0, 0) == scenes
    page = read_page(write_review(tmp_path, units, tmp_path / "r.html", scenes=4, seed=3))
    assert tuple(one["key"] for one in page.data["index"]["scenes"]) == samples[3]
    assert page.data["index"]["total"] == 11


def test_run_id_is_that_of_captions_and_boxes(tmp_path: Path) -> None:
    """Decisions in a browser outlive another sample and another curation, but not other captions."""
    units = write_run(tmp_path, 5)
    before = run_id(tmp_path, units)
    curated = tmp_path / "curate" / "000000.jsonl"
    curated.write_bytes(curated.read_bytes().replace(b"A picture of", b"A photo of"))
    assert run_id(tmp_path, read_list(tmp_path / "images.jsonl")) == before
    captions = tmp_path / "caption" / "000000.jsonl"
    captions.write_bytes(captions.read_bytes().replace(b"A picture of", b"A photo of"))
    assert run_id(tmp_path, units) != before


def test_large_images_and_masks_are_reduced(tmp_path: Path) -> None:
    assert shrunk_size(480, 1280, 640) == (240, 640) and shrunk_size(100, 50, 640) == (100, 50)
    assert shrunk_size(30_000, 30, 640) == (640, 1)
    mask = torch.zeros(1200, 1600, dtype=torch.bool)
    mask[300:900, 400:1200] = True
    small = shrink_mask(rle.encode(mask), 640)
    assert small.shape == (480, 640) and rle.bounds(small, (480, 640)) == [160, 120, 480, 360]
    mask[:] = False
    mask[700, 800] = True
    assert shrink_mask(rle.encode(mask), 640).sum() == 1


def test_unreadable_scenes_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    units = write_run(tmp_path, 5)
    first, second = (Path(item.path) for item in units[0].items[:2])
    first.unlink()
    second.write_bytes(second.read_bytes()[:-200] + bytes(200))
    page = read_page(write_review(tmp_path, units, tmp_path / "review.html", scenes=0))
    assert [one["name"] for one in page.data["index"]["scenes"]] == ["002.jpg", "003.jpg"]
    warnings = capsys.readouterr().err
    assert "001: not on the page: image_" in warnings and "000: not on the page: missing_image" in warnings
    for path in (tmp_path / "photos").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="none of the chosen scenes can be read"):
        write_review(tmp_path, units, tmp_path / "other.html", scenes=0)
    assert not list(tmp_path.glob("*other.html*"))


def test_errors(tmp_path: Path) -> None:
    units = write_run(tmp_path, 3)
    with pytest.raises(UserError, match="scenes: got -1, expected at least 0"):
        write_review(tmp_path, units, tmp_path / "review.html", scenes=-1)
    with pytest.raises(UserError, match="seed: got -1"):
        write_review(tmp_path, units, tmp_path / "review.html", scenes=1, seed=-1)
    with pytest.raises(UserError, match="no curated scenes; run the stages up to curate first"):
        write_review(tmp_path / "elsewhere", units, tmp_path / "review.html", scenes=1)
