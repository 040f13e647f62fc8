"""The directory of a run: its images, the settings of its records, and a lock, for one process at a time.

DIR/generate.json   {"schema", "settings": all settings of the last run that succeeded, those of models also of later
                    ones, "stages": those that each stage's records depend on}
DIR/images.jsonl    see `images`
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.images import SkippedImage
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import check_folder, kind_of, open_regular, read_regular, replacing, status_of
from scenarioclip_fast.generate.config import EXPENSIVE, RECORDED, STAGES, GenerateConfig, fingerprint
from scenarioclip_fast.generate.images import RUN_FILE, Item, Unit, divide, list_images, read_list, write_list
from scenarioclip_fast.generate.records import has_outcomes
from scenarioclip_fast.parsing import parse_json
from scenarioclip_fast.progress import progress as show_progress
from scenarioclip_fast.terminal import short, warn

_FOLDERS = (*RECORDED, "shards", "published")  # may be links to directories, on other disks
_APPENDED = ("lock", "runs.jsonl")  # written in place; other files replace what is there
_SCHEMA = 1
_LISTED = 5  # skipped files in a warning


class RunDirectory:
    """A directory that `generate` writes; it need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = path / "images.jsonl"
        self._marker = path / RUN_FILE

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Create the directory, and keep other processes out of it.

        Raises:
            UserError: it holds other files, or another process has opened it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; choose a directory")
        if self.path.is_dir() and any(self.path.iterdir()) and not self.exists:
            raise UserError(f"{self.path}: not empty and not written by generate; choose another directory")
        self.path.mkdir(parents=True, exist_ok=True)
        for name in _FOLDERS:
            check_folder(self.path / name)
        for name in _APPENDED:
            if (status := status_of(self.path / name)) is not None and not stat.S_ISREG(status.st_mode):
                raise UserError(
                    f"{self.path / name}: got a {kind_of(status.st_mode)}, expected a regular file; move it away"
                )
        lock = open_regular(self.path / "lock", os.O_RDWR | os.O_CREAT, follow=False)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(f"{self.path}: another process is generating into this directory") from None
        try:
            if not self.exists:
                self._write({}, {})
            yield
        finally:
            os.close(lock)

    @property
    def exists(self) -> bool:
        """Whether there has been a run."""
        return self._marker.is_file()

    def settings(self) -> dict[str, dict[str, Any]]:
        """All settings of the last run, by section; empty if there was none.

        Raises:
            UserError: the file is damaged.
        """
        found = self._read("settings") if self.exists else {}
        try:
            GenerateConfig.of(found)
        except UserError as error:
            raise UserError(f"{self._marker}: {error}") from None
        return found

    def list_units(self, sources: Sequence[str | Path], unit_size: int, *, progress: bool) -> list[Unit]:
        """Read the list of images, and append new ones.

        Raises:
            UserError: there are no images, or see `list_images`.
        """
        units = read_list(self.images)
        items: list[Item] = []
        skipped: list[SkippedImage] = []
        listed = list_images(sources, [item for unit in units for item in unit.items])
        for found in show_progress(listed, None, "listing new images", "images") if progress and sources else listed:
            if isinstance(found, SkippedImage):
                skipped.append(found)
            else:
                items.append(found)
        if skipped:
            shown = "; ".join(f"{one.key}: {one.reason}" for one in skipped[:_LISTED])
            warn(f"warning: {len(skipped)} files skipped: {shown}{'; ...' if len(skipped) > _LISTED else ''}")
        if items:
            units += divide(items, unit_size, units[-1].number + 1 if units else 0)
            write_list(units, self.images)
        if not units:
            raise UserError(f"{self.path}: no images; name a folder, tars, a list or a packed data set")
        return units

    def settle(self, config: GenerateConfig, stages: Sequence[str], redo: Sequence[str]) -> None:
        """Record the settings that the models of a run of `stages` use, of which `redo` are done again.

        The other settings are recorded by `save`, when they turned out to work.

        Raises:
            UserError: records that the run would use or continue were made with other settings. Those of curation are
                replaced instead.
        """
        found = self._read("stages")
        last = max((STAGES.index(name) for name in stages), default=-1)
        for at, name in enumerate(RECORDED):
            now = fingerprint(getattr(config, name))
            before = found.get(name, now)
            key = next((key for key, value in now.items() if before.get(key, value) != value), None)
            if key is not None and at < last + (name in stages) and has_outcomes(self.path / name):
                old, new = short(before[key]), short(now[key])
                conflict = f"{name}.{key}: got {new}, but {self.path} has records made with {old}"
                if name not in stages:
                    also = f" and discard them with --redo {name}" if name in EXPENSIVE else ""
                    raise UserError(f"{conflict}, and the stage {name} does not run; add {name} to --stages{also}")
                if name not in redo and name in EXPENSIVE:
                    raise UserError(
                        f"{conflict}; keep {old}, choose another --out, or discard the records with --redo {name}"
                    )
            if name in stages and name in EXPENSIVE:
                found[name] = now
        settings = self._read("settings")
        self._write(settings | {name: asdict(config)[name] for name in EXPENSIVE if name in stages}, found)

    def save(self, config: GenerateConfig, stages: Sequence[str]) -> None:
        """Record all settings after a run of `stages`."""
        found = self._read("stages")
        found |= {name: fingerprint(getattr(config, name)) for name in RECORDED if name in stages}
        self._write(asdict(config), found)

    def _read(self, member: str) -> dict[str, Any]:
        try:
            content = parse_json(read_regular(self._marker))
            if content["schema"] != _SCHEMA:
                schema = short(content["schema"])
                raise UserError(f"{self._marker}: got schema {schema}, expected {_SCHEMA}: it is of another version")
            found: dict[str, dict[str, Any]] = {str(name): dict(section) for name, section in content[member].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self._marker}: damaged ({error}); choose another --out") from None
        return found

    def _write(self, settings: dict[str, Any], stages: dict[str, Any]) -> None:
        with replacing(self._marker) as new:
            new.write_text(json.dumps({"schema": _SCHEMA, "settings": settings, "stages": stages}, indent=1) + "\n")
