"""Annotations of a packed data set in place of a model: for data sets that have boxes, but no masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from scenarioclip_fast.data.scene import Scene, scene_from_json
from scenarioclip_fast.generate.stages import Outcome, Work


class _Given:
    """Reads the record of each image."""

    counts: ClassVar[dict[str, float]] = {}

    def run(self, works: Iterator[Work]) -> Iterator[Outcome]:
        """Yield what the record of each image says."""
        for work in works:
            try:
                record = work.item.read_record()
                if record is None:
                    yield Outcome(work.key, reason="not_annotated", detail="expected a packed data set as IMAGES")
                    continue
                scene = scene_from_json(work.key, b"", record)
            except OSError as error:
                yield Outcome(work.key, reason="image_changed", detail=str(error.strerror or error), retry=True)
            except ValueError as error:
                yield Outcome(work.key, reason="malformed_entry", detail=str(error))
            else:
                yield Outcome(work.key, self._result(scene, record["size"]))

    def _result(self, scene: Scene, size: list[int]) -> dict[str, Any]:
        raise NotImplementedError

    def close(self) -> None:
        """Do nothing."""


class GivenCaptions(_Given):
    """The action, names and relations of each scene."""

    name: ClassVar[str] = "caption"

    def _result(self, scene: Scene, size: list[int]) -> dict[str, Any]:
        return {
            "size": size,
            "action": scene.action,
            "caption": scene.caption,
            "objects": list(dict.fromkeys(o.name for o in scene.objects)),
            "relations": [
                [scene.objects[r.subject].name, r.predicate, scene.objects[r.object].name] for r in scene.relations
            ],
            "ends": [[r.subject, r.object] for r in scene.relations],
        }


class GivenBoxes(_Given):
    """The boxes of each scene."""

    name: ClassVar[str] = "ground"

    def _result(self, scene: Scene, size: list[int]) -> dict[str, Any]:
        return {"objects": [{"name": o.name, "box": list(o.box), "score": 1.0} for o in scene.objects]}
