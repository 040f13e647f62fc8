from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import ShardSet, generate_scenes, pack
from scenarioclip_fast.data.check import CheckedScene, SceneChecker
from scenarioclip_fast.data.sources import (
    Source,
    SourceOptions,
    SplitOf,
    by_split,
    format_names,
    open_source,
    register,
    registry,
)
from scenarioclip_fast.data.sources.memory import Indexed, MemoryReader
from scenarioclip_fast.errors import UserError


class CountedReader:
    def read(self, item: int) -> CheckedScene:
        (scene,) = generate_scenes(1, start=item)
        return MemoryReader(SceneChecker()).read(Indexed(item, replace(scene, split=None)))


class CountedSource(Source):
    """A directory with count.txt, which contains the number of synthetic scenes."""

    expects = "a directory with count.txt"

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def recognises(cls, paths: Sequence[str | Path]) -> bool:
        return len(paths) == 1 and Path(paths[0], "count.txt").exists()

    @classmethod
    def open(cls, paths: Sequence[str | Path], options: SourceOptions) -> CountedSource:
        return cls(Path(paths[0]))

    @property
    def directories(self) -> set[Path]:
        return {self.path.resolve()}

    def items(self, split_of: SplitOf) -> Iterable[int]:
        return range(int((self.path / "count.txt").read_text()))

    def reader(self) -> CountedReader:
        return CountedReader()


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(registry, "_FORMATS", dict(registry._FORMATS))
    register("counted", CountedSource)
    directory = tmp_path / "counted"
    directory.mkdir()
    (directory / "count.txt").write_text("6")
    yield directory


def test_built_in_formats() -> None:
    assert format_names()[0] == "auto" and {"published", "webdataset"} <= set(format_names())


@pytest.mark.parametrize("format", ["auto", "counted"])
def test_pack_reads_a_registered_format(counted: Path, tmp_path: Path, format: str) -> None:
    report = pack(counted, tmp_path / "out", format=format, progress=False)
    assert sum(n["scenes"] for n in report.splits.values()) == 6 and not report.up_to_date
    report = pack(counted, tmp_path / "out", format=format, progress=False)
    assert not report.up_to_date, "a source without a fingerprint is packed from the start"


def test_the_command_line_reads_the_registry(counted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["pack", str(counted), "--out", str(tmp_path / "out"), "--val", "0", "--test", "0", "--format"]
    assert main([*args, "counted"]) == 0
    assert len(ShardSet(tmp_path / "out")) == 6
    with pytest.raises(SystemExit):
        main([*args, "unheard-of"])
    error = capsys.readouterr().err
    assert "unheard-of" in error and "published" in error and "counted" in error
    with pytest.raises(SystemExit):
        main(["pack", "--help"])
    assert "counted" in capsys.readouterr().out


def test_unrecognised_and_ambiguous_sources(counted: Path, tmp_path: Path) -> None:
    (counted / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"counted: recognised as webdataset and counted; choose one with --format"):
        open_source([counted])
    with pytest.raises(UserError, match=r"none: no such file or directory$"):
        open_source([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"\(published: .*; webdataset: .*; counted: a directory with count\.txt\)$"):
        open_source([tmp_path / "empty"])
    with pytest.raises(UserError, match=f"format: got 'psq', expected one of {', '.join(format_names())}"):
        pack(counted, tmp_path / "out", format="psq")


def test_a_registered_name_is_not_replaced(counted: Path) -> None:
    register("counted", CountedSource)
    for name in ("auto", "published", "counted"):
        with pytest.raises(ValueError, match=f"format '{name}' is already registered"):
            register(name, "elsewhere:Source")


def install(site: Path, package: str, entry_points: str) -> None:
    dist = site / f"{package}-1.0.dist-info"
    dist.mkdir(parents=True)
    (dist / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (dist / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\n{entry_points}")


@pytest.fixture
def site(counted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    registry._load_entry_points.cache_clear()
    yield tmp_path / "site"
    registry._load_entry_points.cache_clear()


def test_formats_of_other_packages(counted: Path, site: Path) -> None:
    install(site, "other", f"other = {__name__}:CountedSource\n")
    assert "other" in format_names()
    assert isinstance(open_source([counted], "other"), CountedSource)


def test_registering_a_format_that_is_also_an_entry_point(counted: Path, site: Path) -> None:
    install(site, "other", f"other = {__name__}:CountedSource\n")
    assert "other" in format_names()
    register("other", CountedSource)
    register("other", f"{__name__}:CountedSource")


def test_a_broken_package_does_not_break_the_others(
    counted: Path, site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (site / "raising.py").parent.mkdir(parents=True)
    (site / "raising.py").write_text("raise RuntimeError('no licence')\n")
    install(site, "absent", "absent = no_such_module:Source\n")
    install(site, "raising", "raising = raising:Source\n")
    install(site, "incomplete", "incomplete = pathlib:Path\n")
    install(site, "greedy", f"auto = {__name__}:CountedSource\npublished = {__name__}:CountedSource\n")
    assert isinstance(open_source([counted]), CountedSource)
    for expected in (
        "format 'absent': cannot import no_such_module:Source: ModuleNotFoundError",
        "format 'raising': cannot import raising:Source: RuntimeError: no licence",
        "format 'incomplete': pathlib:Path lacks expects, recognises: expected the members of SourceFormat",
        "format 'auto' of greedy, because another format has this name",
        "format 'published' of greedy, because another format has this name",
    ):
        assert f"ignored: {expected}" in caplog.text
    assert format_names().count("auto") == 1
    for name, problem in (("absent", "cannot import"), ("raising", "no licence"), ("incomplete", "lacks expects")):
        with pytest.raises(UserError, match=f"format '{name}': .*{problem}"):
            open_source([counted], name)


def test_a_format_that_fails_to_inspect_a_source(
    counted: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(CountedSource):
        @classmethod
        def recognises(cls, paths: Sequence[str | Path]) -> bool:
            raise KeyError("count")

    register("failing", Failing)
    assert isinstance(open_source([counted]), CountedSource)
    assert "ignored: format 'failing' cannot inspect" in caplog.text


def test_an_incomplete_format_is_refused_at_registration(counted: Path) -> None:
    with pytest.raises(TypeError, match=r"format 'incomplete': .*Source'> lacks expects, recognises, open"):
        register("incomplete", Source)  # type: ignore[arg-type]


def _this_module() -> Any:
    import types

    module = types.ModuleType(__name__)
    module.CountedSource = CountedSource  # type: ignore[attr-defined]
    return module


def test_by_split_keeps_the_order() -> None:
    splits = {"a": "test", "b": "train", "c": "val", "d": "train"}
    items = by_split(["a", "b", "/", "c", "d"], lambda key, given: given or "train", lambda x: (x, splits.get(x)))
    assert list(items) == ["b", "/", "d", "c", "a"]


@pytest.mark.parametrize("option", ["images", "actions"])
def test_options_that_a_format_does_not_use(counted: Path, tmp_path: Path, option: str) -> None:
    (counted / "images").mkdir()
    with pytest.raises(
        UserError, match=rf"^{option}: data sets of format 'counted' do not use this option; remove it$"
    ):
        pack(counted, tmp_path / "out", **{option: counted / "images"})
    with pytest.raises(UserError, match=rf"^{option}: scenes in memory do not use this option; remove it$"):
        pack(generate_scenes(1), tmp_path / "out", **{option: counted / "images"})


def test_options_that_a_format_uses(counted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[SourceOptions] = []

    class Reading(CountedSource):
        accepts = frozenset({"actions"})

        @classmethod
        def open(cls, paths: Sequence[str | Path], options: SourceOptions) -> CountedSource:
            opened.append(options)
            return super().open(paths, options)

        def fingerprint(self) -> str:
            return "unchanged"

    monkeypatch.setitem(registry._FORMATS, "reading", Reading)
    actions = tmp_path / "actions.json"
    for content, up_to_date in (("{}", False), ("{}", True), ("{ }", False)):
        if not actions.exists() or actions.read_text() != content:
            actions.write_text(content)
        report = pack(
            counted, tmp_path / "out", format="reading", progress=False, actions=str(actions), max_pixels=1 << 20
        )
        assert report.up_to_date == up_to_date, "the pack depends on the file of actions, whatever the format"
    assert set(opened) == {SourceOptions(1 << 20, None, actions)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pixels": 0}, "max_pixels: got 0, expected at least 1"),
        ({"max_pixels": 1.5}, r"max_pixels: got 1\.5, expected an integer"),
        ({"images": "none"}, "images: none: no such directory"),
        ({"images": __file__}, r"images: .*test_registry\.py: no such directory"),
        ({"images": ""}, "images: got '', expected a path, or null"),
        ({"actions": "none"}, "actions: none: no such file or directory"),
    ],
)
def test_unusable_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SourceOptions(**options)
