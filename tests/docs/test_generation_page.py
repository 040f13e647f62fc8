"""Runs the examples of docs/generation.md, with a local server and the page's own detector and segmenter."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.config_parse import dotted_keys
from scenarioclip_fast.data import ShardSet, rle
from scenarioclip_fast.generate.config import PUBLISHED, GenerateConfig
from scenarioclip_fast.generate.drawn.vlm_server import StubServer
from scenarioclip_fast.generate.records import all_outcomes

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
ANSWER = {
    "caption": "A woman in a park throws a frisbee for her dog.",
    "action": "throwing a frisbee",
    "objects": ["woman", "dog", "frisbee"],
    "relations": [["woman", "throwing", "frisbee"], ["dog", "chasing", "frisbee"], ["dog", "near", "woman"]],
}
MODELS = ["--detector", "columns:Columns", "--segmenter", "ellipses:Ellipses", "--device", "cpu"]


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """(title, content) of a page's code blocks in a language, in order."""
    pattern = rf'^```{language}(?: title="([^"\n]*)")?\n(.*?)^```$'
    return [(found[1] or "", found[2]) for found in re.finditer(pattern, page, re.MULTILINE | re.DOTALL)]


def commands(page: str, name: str) -> list[list[str]]:
    """The arguments of a page's commands `scenarioclip-fast NAME`, in order."""
    lines = "".join(content for _, content in blocks(page, "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.partition("scenarioclip-fast ")[2], comments=True) for line in lines]
    return [found for found in words if found[:1] == [name]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files of the page and a folder of photos."""
    directory = tmp_path_factory.mktemp("page")
    for language in ("python", "yaml", "json"):
        for title, content in blocks(PAGE, language):
            if title:
                (directory / title).write_text(content)
    (directory / "photos").mkdir()
    for i, name in enumerate(("park", "beach", "street", "garden", "market", "kitchen")):
        # The size of the published prompt, so that all photos are sent unchanged, by which the server knows them.
        pixels = np.full((448, 448, 3), 40 * i, np.uint8)
        Image.fromarray(pixels).save(directory / "photos" / f"{name}.jpg", quality=95)
    return directory


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[StubServer]:
    photos = (directory / "photos").iterdir()
    with StubServer(dict.fromkeys([hashlib.sha256(one.read_bytes()).hexdigest() for one in photos], ANSWER)) as server:
        yield server


def run_here(arguments: list[str], server: StubServer) -> int:
    """Run a command with the models of this test."""
    options = {"--vlm-url": server.url, "--vlm-model": server.model}
    arguments = [options.get(before, word) for before, word in zip(["", *arguments], arguments, strict=False)]
    settings = ["--set", f"caption.url={server.url}", "--set", f"caption.model={server.model}"]
    return main([*arguments, *settings, *MODELS, "--review", "1"])


@pytest.fixture(scope="module")
def finished(directory: Path, server: StubServer) -> Path:
    """The directory after all commands `generate` of the page that need no other data, in order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.syspath_prepend(directory)
        done = []
        for arguments in commands(PAGE, "generate"):
            if arguments[1] == "photos" or arguments[arguments.index("--out") + 1] in done:
                assert run_here(arguments, server) == 0, arguments
                done.append(arguments[arguments.index("--out") + 1])
        assert {"data", "strict", "shapes", "as-published"} <= set(done)
    return directory


def result(run: Path) -> dict[str, Any]:
    """The curated record of the photo park.jpg."""
    return {one.key: one.result for one in all_outcomes(run / "curate")}["park"]


def is_part(part: Any, whole: Any) -> bool:
    """Whether all members of `part` are in `whole`."""
    if isinstance(part, dict):
        return all(name in whole and is_part(value, whole[name]) for name, value in part.items())
    if isinstance(part, list):
        return len(part) == len(whole) and all(map(is_part, part, whole))
    return bool(part == whole)


def test_the_record_is_as_printed_and_the_decisions_apply_to_it(finished: Path) -> None:
    printed = json.loads(dict(blocks(PAGE, "json"))["record"])
    assert printed["key"] == "park" and is_part(printed["result"], result(finished / "shapes"))
    scene = result(finished / "data")["scene"]
    assert scene["action"] == "playing frisbee"
    assert [one["name"] for one in scene["objects"]] == ["woman", "dog", "flying disc"]
    assert [(one["id"], one["predicate"]) for one in scene["relations"]] == [(0, "throwing"), (1, "running after")]
    assert sum(len(ShardSet(finished / "data/shards", split)) for split in ("train", "val", "test")) == 6


def test_the_record_is_found_as_printed(finished: Path) -> None:
    (command,) = re.findall(r"^python3 (-m json\.tool .*)$", PAGE, re.MULTILINE)
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=finished, capture_output=True, text=True)
    assert done.returncode == 0 and '"key": "park"' in done.stdout, done.stderr


def test_own_models_run_by_the_printed_command(directory: Path, server: StubServer) -> None:
    ((_, block),) = [one for one in blocks(PAGE, "sh") if "PYTHONPATH" in one[1]]
    command = block.replace("http://localhost:8000/v1", server.url).replace("Qwen/Qwen3-VL-8B-Instruct", server.model)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", command.replace("--out shapes", "--out shapes-too")],
        cwd=directory,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    scene = result(directory / "shapes-too")["scene"]
    boxes = [one["box"] for one in scene["objects"]]
    assert boxes == [[0, 0, 149.33, 448], [149.33, 0, 298.67, 448], [298.67, 0, 448, 448]]
    for one, (x1, y1, x2, y2) in zip(scene["objects"], boxes, strict=True):
        # An ellipse in its box; the pixels of its border are half inside, a fraction of 1 / 149 of the width.
        assert rle.area(one["mask"]) == pytest.approx(math.pi / 4 * (x2 - x1) * (y2 - y1), rel=0.01)


def test_the_settings_file_is_applied(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    config = GenerateConfig.load("generate.yaml")
    assert (config.ground.box_threshold, config.curate.min_relations, config.pack.val) == (0.3, 2, 0.05)
    assert (config.caption.url, config.caption.max_objects) == ("http://localhost:8000/v1", 8)
    assert json.loads(Path("strict/generate.json").read_text())["stages"]["ground"]["box_threshold"] == 0.3


def test_the_published_layout_has_the_files_that_the_page_names(
    finished: Path, server: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.syspath_prepend(finished)
    assert run_here(["generate", "--out", "shapes", "--stages", "pack", "--layout", "published"], server) == 0
    paths = [str(path.relative_to("shapes/published")) for path in Path("shapes/published").rglob("*.*")]
    found = {re.sub(r"(\w+)(?=\.jpg|_grounding)", "KEY", path) for path in paths}
    section = PAGE[PAGE.index("With `--layout published`") : PAGE.index("### Settings of a run")]
    assert found <= set(re.findall(r"`([\w/]+\.\w+)`", section))
    assert {"classes.json", "images/KEY.jpg", "sam_results/KEY_grounding_sam.npz"} <= found


def test_the_settings_are_those_of_the_config() -> None:
    spec = importlib.util.spec_from_file_location("settings", ROOT / "docs" / "settings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.rendered() == PAGE, "docs/generation.md is out of date: run python docs/settings.py"
    keys = [key for section in module.settings() for key in section.keys]
    assert {key.name for key in keys} == {key for key in dotted_keys(GenerateConfig) if "." in key}
    assert [key.name for key in keys if not key.meaning.removesuffix(module.MARK).strip()] == []
    free = {key.name for key in keys if key.meaning.endswith(module.MARK)}
    assert {"caption.url", "ground.batch_size"} <= free and "caption.model" not in free


def test_the_published_settings_are_as_listed() -> None:
    section = PAGE[PAGE.index("## Published settings") : PAGE.index("## Demo")]
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| (\S+) \| (\S+) \|", section, re.MULTILINE)
    defaults = asdict(GenerateConfig())

    def text(value: Any) -> str:
        return (
            str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        )

    expected = [(s, k, text(v), text(defaults[s][k])) for s, values in PUBLISHED.items() for k, v in values.items()]
    assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize("page", ["README.md", "docs/generation.md", "docs/quickstart.md", "docs/data.md"])
def test_commands_parse(page: str) -> None:
    from scenarioclip_fast.cli.main import build_parser

    text = (ROOT / page).read_text(encoding="utf-8")
    found = [words for name in ("generate", "train", "pack", "demo", "embed") for words in commands(text, name)]
    assert found
    for words in found:
        build_parser().parse_args(words)
        if words[0] == "train":  # the settings are valid, too
            assert main([*words, "--print-config"]) == 0


def test_settings_are_written_with_their_section() -> None:
    keys = [key.partition(".") for key in dotted_keys(GenerateConfig) if "." in key]
    names = {name for section, _, name in keys if section != "ray"} - {"model"}
    text = PAGE[: PAGE.index("## COCO")] + PAGE[PAGE.index("## Ray") :]  # the members of COCO's records
    assert [word for word in re.findall(r"`([a-z_]+)(?:=\w*)?`", text) if word in names] == []


def test_every_example_of_the_page_is_tested() -> None:
    """A new file or command of the page needs a place in the tests above."""
    titles = [title for language in ("python", "yaml", "json", "text") for title, _ in blocks(PAGE, language) if title]
    assert titles == ["columns.py", "ellipses.py", "generate.yaml", "record", "decisions.json"]
    given = {"boxes", "IMAGES"}  # tests/generate/test_generation_command.py, tests/ray
    sources = {words[1] for words in commands(PAGE, "generate")}
    assert sources <= {"photos", "--out"} | given
