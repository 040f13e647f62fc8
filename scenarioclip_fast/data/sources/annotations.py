"""Common parts of data sets that describe images in annotation files: entries, folders of images, scenes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from scenarioclip_fast.data.check import (
    BadEntry,
    CheckedScene,
    Rejection,
    SceneChecker,
    normalise_scene,
    safe_key,
)
from scenarioclip_fast.data.scene import Mask, Relation, Scene, SceneObject
from scenarioclip_fast.data.sources.actions import load_actions
from scenarioclip_fast.data.sources.base import (
    LARGE,
    Source,
    SourceOptions,
    SplitOf,
    by_split,
    fingerprint_files,
    shuffled,
)
from scenarioclip_fast.data.sources.classes import load_json
from scenarioclip_fast.data.sources.files import Folders, read_file
from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.terminal import short

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Entry:
    """The annotation of one image, unparsed.

    Attributes:
        place: where it is, for rejections.
        id: of the image; empty if it is missing or has an invalid type.
        image: the name of the image file, as far as it is known.
    """

    place: str
    id: str
    image: Any
    record: Any
    split: str | None = None
    action: str | None = None

    def __str__(self) -> str:
        return self.place + (f" ({short(self.id)[1:-1]})" if self.id else "")


def id_text(value: object) -> str:
    """The id of an image as text; empty unless it is an integer or text."""
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""


def four_numbers(values: object) -> Box | None:
    """Parse a box, four numbers; None if it is malformed."""
    if not isinstance(values, (list, tuple)) or len(values) != 4:
        return None
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return None
    try:
        x1, y1, x2, y2 = (float(v) for v in values)
    except OverflowError:
        return None
    return x1, y1, x2, y2


def corners(values: object) -> Box | None:
    """Convert a box given by its top-left corner and size, (x, y, width, height); None if it is malformed."""
    box = four_numbers(values)
    return None if box is None else (box[0], box[1], box[0] + box[2], box[1] + box[3])


def single_path(paths: Sequence[str | Path], expects: str) -> Path:
    """Return the only path.

    Raises:
        UserError: none or several, or it does not exist.
    """
    if len(paths) != 1:
        raise UserError(f"got {len(paths)} sources, expected {expects}")
    if not (path := Path(paths[0])).exists():
        raise UserError(f"{path}: no such file or directory; expected {expects}")
    return path


class AnnotatedSource(Source):
    """A data set whose entries are known when it is opened.

    Args:
        files: the annotation files.
        folders: where images, and other files that entries name, may be; images first.

    Raises:
        UserError: no entries, none of the images exists, or none has one of the given actions.
    """

    accepts = frozenset({"images", "actions"})

    def __init__(self, files: list[Path], entries: list[Entry], folders: list[Folders], options: SourceOptions) -> None:
        self.files, self.folders, self.options = files, folders, options
        if not entries:
            raise UserError(f"{files[0]}: the data set is empty")
        self.entries = with_actions(entries, options.actions)
        for k, where in enumerate(folders):
            require_some(files[0], where, (self.named_files(entry)[k] for entry in entries))

    def named_files(self, entry: Entry) -> tuple[Any, ...]:
        """The names of an entry's files, one for each of `folders`."""
        return (entry.image,)

    @property
    def total(self) -> int:
        """The number of entries."""
        return len(self.entries)

    @property
    def directories(self) -> set[Path]:
        """The directories of the annotations and of the images."""
        return {
            path.resolve() for path in (*(f.parent for f in self.files), *(p for f in self.folders for p in f.paths))
        }

    @property
    def large(self) -> bool:
        """Whether worker processes pay off."""
        return len(self.entries) >= LARGE

    def items(self, split_of: SplitOf) -> Iterator[Entry]:
        """Yield the entries split by split, shuffled within each split by a hash of the id."""
        return by_split(shuffled(self.entries, lambda entry: entry.id), split_of, lambda entry: (entry.id, entry.split))

    def fingerprint(self) -> str:
        """A hash of the names, sizes and times of the annotation files, and of all files that the entries name."""
        paths = [
            path
            for entry in self.entries
            for where, name in zip(self.folders, self.named_files(entry), strict=True)
            if (path := find(where, name)) is not None
        ]
        return fingerprint_files([*self.files, *paths])


def load_lists(path: Path, names: Sequence[str]) -> tuple[dict[str, Any], list[list[Any]]]:
    """Read a JSON object with the lists `names`; return it and them.

    Raises:
        UserError: unreadable, or without one of these lists.
    """
    _, record = load_json(path, strict=False)
    lists = [record.get(name) if isinstance(record, dict) else None for name in names]
    for name, found in zip(names, lists, strict=True):
        if not isinstance(found, list):
            raise UserError(f"{path}: got {short(found)} as {name!r}, expected a list")
    return record, [found for found in lists if found is not None]


def find(folders: Folders, name: object) -> Path | None:
    """Find a file; None if it does not exist or has an unsafe name."""
    try:
        return folders.find(name)
    except BadEntry:
        return None


def require_some(annotations: Path, folders: Folders, names: Iterable[object]) -> None:
    """Check that at least one of the named files exists: a wrong directory would otherwise reject every scene.

    Raises:
        UserError: none exists.
    """
    example: object = None
    for name in names:
        if find(folders, name) is not None:
            return
        example = example or name
    raise UserError(
        f"{annotations}: none of its files, such as {short(example)}, is in {folders}; "
        "pass the directory in which this path starts as --images"
    )


def with_actions(entries: list[Entry], path: Path | None) -> list[Entry]:
    """Give each entry its action in the file `path`, found by its id or the name of its image.

    Raises:
        UserError: an unusable file, or one without an action for any entry.
    """
    if path is None:
        return entries
    actions = load_actions(path)
    found = [replace(entry, action=_action_of(entry, actions)) for entry in entries]
    if all(entry.action is None for entry in found):
        raise UserError(
            f"{path}: none of its {len(actions)} actions belongs to an image of this data set: got "
            f"{short(next(iter(actions)))}, expected the id or file name of an image, such as {short(entries[0].id)}"
        )
    return found


def _action_of(entry: Entry, actions: dict[str, str]) -> str | None:
    names = [entry.id]
    if isinstance(entry.image, str):
        names += [entry.image, PurePosixPath(entry.image).name]
    return next((actions[name] for name in names if name in actions), None)


def load_image(
    folders: Folders, checker: SceneChecker, name: object, declared: tuple[Any, Any]
) -> tuple[bytes, tuple[int, int]]:
    """Read and check an image; return its bytes and (H, W).

    Args:
        declared: (height, width) in the annotation; not checked if one is missing.

    Raises:
        BadEntry: missing, damaged, or of another size, which would put the boxes elsewhere.
    """
    path = folders.find(name)
    if path is None:
        raise BadEntry("missing_image", f"{name}: not in {folders}")
    image = read_file(path, str(name))
    size = checker.image_size(image, f"{name}: ")
    if None not in declared and declared != size:
        height, width = map(short, declared)
        raise BadEntry("other_size", f"the image is {size[1]} x {size[0]}, but its annotation has {width} x {height}")
    return image, size


class SceneBuilder:
    """Collects the objects and relations of an entry, and lists those that are unusable.

    Objects keep their positions until `build`, because relations refer to them by position.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.objects: list[SceneObject | None] = []
        self.relations: dict[tuple[int, str, int], None] = {}  # a relation that is repeated counts once
        self.rejected: list[Rejection] = []
        self._lost: set[int] = set()  # objects whose mask is unusable

    def add_object(self, name: object, box: Box | None, mask: Mask | None = None, *, lost: bool = False) -> None:
        """Append an object; it is rejected if `name` is not text or `box` is None.

        Args:
            lost: it has a mask, but an unusable one: its relations are rejected, as in `check.clean_scene`.
        """
        text = normalise(name) if isinstance(name, str) else ""
        if not text or box is None:
            self.reject_object(
                "malformed_object", f"got name {short(name)}" if not text else f"{text!r} has no valid box"
            )
        else:
            self._lost |= {len(self.objects)} if lost else set()
            self.objects.append(SceneObject(text, box, mask))

    def reject_object(self, reason: str, detail: str) -> None:
        """Append a rejected object."""
        self.reject(f"object {len(self.objects)}", reason, detail)
        self.objects.append(None)

    def add_relation(self, k: int, subject: int, predicate: object, object_: int) -> None:
        """Add relation number `k` between two objects, given by position."""
        text = normalise(predicate) if isinstance(predicate, str) else ""
        outside = [i for i in (subject, object_) if not 0 <= i < len(self.objects)]
        if not text:
            self.reject(f"relation {k}", "malformed_relation", f"got predicate {short(predicate)}")
        elif outside:
            detail = f"got object {outside[0]}, but the scene has {len(self.objects)} objects"
            self.reject(f"relation {k}", "relation_unknown_label", detail)
        elif rejected := [i for i in (subject, object_) if self.objects[i] is None]:
            self.reject(f"relation {k}", "relation_without_object", f"object {rejected[0]} was rejected")
        elif lost := [i for i in (subject, object_) if i in self._lost]:
            self.reject(f"relation {k}", "relation_without_mask", f"the mask of object {lost[0]} is unusable")
        else:
            self.relations[subject, text, object_] = None

    def reject(self, part: str, reason: str, detail: str) -> None:
        """List a part of the entry as rejected."""
        self.rejected.append(Rejection(f"{self.entry}: {part}" if part else str(self.entry), reason, detail))

    def build(self, checker: SceneChecker, image: bytes, size: tuple[int, int], action: str | None) -> CheckedScene:
        """Check the scene.

        Raises:
            BadEntry: the whole scene is unusable.
        """
        kept = [item for item in self.objects if item is not None]
        position = {i: k for k, i in enumerate(i for i, item in enumerate(self.objects) if item is not None)}
        relations = [Relation(position[s], predicate, position[o]) for s, predicate, o in self.relations]
        scene = Scene(safe_key(self.entry.id), image, action, kept, relations, self.entry.split)
        checked = checker.clean(normalise_scene(scene), size, str(self.entry))
        return replace(checked, rejected=self.rejected + checked.rejected)
