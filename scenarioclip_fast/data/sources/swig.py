"""Situations With Groundings (SWiG): imSitu's verbs and roles, with boxes.

    train.json, dev.json, test.json
        {"hitchhiking_238.jpg": {"verb": "hitchhiking", "height": 683, "width": 512,
                                 "bb": {"place": [-1, -1, -1, -1], "agent": [195, 282, 380, 554]},
                                 "frames": [{"place": "n03519981", "agent": "n10287213"}, ... for three annotators]}}
    imsitu_space.json
        {"nouns": {"n10287213": {"gloss": ["man", "adult male"], "def": "..."}, ...},
         "verbs": {"hitchhiking": {"order": ["agent", "place"], "abstract": "...", ...}, ...}}

The verb is the action. Roles with a box are the objects, and the agent has a relation to each other one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from scenarioclip_fast.data.check import BadEntry, CheckedScene, SceneChecker, malformed_entries
from scenarioclip_fast.data.sources.annotations import (
    AnnotatedSource,
    Entry,
    SceneBuilder,
    four_numbers,
    load_image,
    single_path,
)
from scenarioclip_fast.data.sources.base import SourceOptions
from scenarioclip_fast.data.sources.classes import load_json
from scenarioclip_fast.data.sources.files import Folders
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.terminal import short

_SPACE = "imsitu_space.json"
_FILES = {"train.json": "train", "dev.json": "val", "test.json": "test"}
_FOLDER = "SWiG_jsons"  # in a clone of the data set's repository

AGENT = "agent"
PREPOSITIONS = {
    "coagent": "with",
    "destination": "to",
    "end": "to",
    "instrument": "with",
    "listener": "to",
    "obstacle": "over",
    "path": "along",
    "place": "in",
    "recipient": "to",
    "source": "from",
    "start": "from",
    "surface": "on",
    "tool": "with",
}
"""Role -> what follows the verb in the predicate of the agent's relation to it; of other roles, nothing does."""


class SwigSource(AnnotatedSource):
    """The images of a directory with the JSON files of SWiG.

    Raises:
        UserError: not such a directory, malformed JSON, or none of its images exists.
    """

    accepts = frozenset({"images"})
    expects = f"the directory {_FOLDER}, with {_SPACE} and train.json, dev.json or test.json"

    def __init__(self, directory: Path, options: SourceOptions) -> None:
        files = [directory / name for name in _FILES if (directory / name).is_file()]
        _, space = load_json(directory / _SPACE)
        nouns, verbs = (space.get(name) if isinstance(space, dict) else None for name in ("nouns", "verbs"))
        if not isinstance(nouns, dict) or not isinstance(verbs, dict):
            raise UserError(
                f'{directory / _SPACE}: got {short(space)}, expected {{"nouns": {{...}}, "verbs": {{...}}}}'
            )
        entries: list[Entry] = []
        for file in files:
            _, record = load_json(file, strict=False)
            if not isinstance(record, dict):
                raise UserError(f"{file}: got {short(record)}, expected {{image name: annotation}}")
            entries += [_entry(file.name, name, one, nouns, verbs) for name, one in record.items()]
        roots = [options.images] if options.images else [directory, directory.parent]
        self._images = Folders(roots, ["images_512"])
        super().__init__([directory / _SPACE, *files], entries, [self._images], options)

    @classmethod
    def recognises(cls, paths: Sequence[str | Path]) -> bool:
        """Whether `paths` is one directory with the JSON files, or its parent."""
        return len(paths) == 1 and _directory(Path(paths[0])) is not None

    @classmethod
    def open(cls, paths: Sequence[str | Path], options: SourceOptions) -> SwigSource:
        """Open the one directory in `paths`."""
        path = single_path(paths, cls.expects)
        if (directory := _directory(path)) is None:
            raise UserError(f"{path}: expected {cls.expects}")
        return cls(directory, options)

    def reader(self) -> SwigReader:
        """Create the reader of the entries."""
        return SwigReader(self._images, SceneChecker(self.options.max_pixels))


class SwigReader:
    """Reads single entries."""

    def __init__(self, images: Folders, checker: SceneChecker) -> None:
        self._images, self._checker = images, checker

    def read(self, entry: Entry) -> CheckedScene:
        """Read and check an entry.

        Raises:
            BadEntry: the whole scene is unusable.
        """
        with malformed_entries():
            record, glosses, order = entry.record
            verb, boxes, frames = (_field(record, name, kind) for name, kind in _FIELDS.items())
            declared = (record.get("height"), record.get("width"))
            image, size = load_image(self._images, self._checker, entry.image, declared)
            builder = SceneBuilder(entry)
            position: dict[str, int] = {}
            for role in dict.fromkeys((*order, *boxes)):
                if role in boxes and boxes[role] != [-1, -1, -1, -1]:
                    position[role] = len(builder.objects)
                    builder.add_object(_noun(frames, role, glosses), four_numbers(boxes[role]))
            for k, role in enumerate(other for other in position if other != AGENT and AGENT in position):
                predicate = f"{verb} {PREPOSITIONS.get(role, '')}"
                builder.add_relation(k, position[AGENT], predicate, position[role])
            return builder.build(self._checker, image, size, verb)


_FIELDS: dict[str, type] = {"verb": str, "bb": dict, "frames": list}


def _field(record: Any, name: str, kind: type) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise BadEntry("malformed_entry", f"got {short(value)} as {name!r}, expected {kind.__name__}")
    return value


def _noun(frames: list[Any], role: str, glosses: Mapping[str, str]) -> str | None:
    """The noun that most annotators gave to a role, the first of several; None if none gave one."""
    nouns = [glosses[frame[role]] for frame in frames if isinstance(frame, dict) and frame.get(role) in glosses]
    return Counter(nouns).most_common(1)[0][0] if nouns else None


def _entry(file: str, name: str, record: Any, nouns: dict[str, Any], verbs: dict[str, Any]) -> Entry:
    """An annotation with the glosses of its nouns and the order of its roles: all nouns are too many for a reader."""
    fields = record if isinstance(record, dict) else {}
    frames = fields.get("frames")
    used = {noun for frame in (frames if isinstance(frames, list) else []) for noun in _texts(frame)}
    glosses = {noun: gloss for noun in used if (gloss := _first_gloss(nouns.get(noun)))}
    verb = fields.get("verb")
    info = verbs.get(verb) if isinstance(verb, str) else None
    order = info.get("order") if isinstance(info, dict) else None
    roles = [role for role in order if isinstance(role, str)] if isinstance(order, list) else []
    return Entry(file, PurePosixPath(name).stem, name, (record, glosses, roles), _FILES[file])


def _texts(frame: Any) -> list[str]:
    return [noun for noun in frame.values() if isinstance(noun, str)] if isinstance(frame, dict) else []


def _first_gloss(noun: Any) -> str | None:
    gloss = noun.get("gloss") if isinstance(noun, dict) else None
    return gloss[0] if isinstance(gloss, list) and gloss and isinstance(gloss[0], str) else None


def _directory(path: Path) -> Path | None:
    """The directory of the JSON files: `path`, or its folder SWiG_jsons."""
    for one in (path, path / _FOLDER):
        if (one / _SPACE).is_file() and any((one / name).is_file() for name in _FILES):
            return one
    return None
