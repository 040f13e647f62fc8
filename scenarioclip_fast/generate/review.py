"""The review page: scenes of a generation run in one HTML file, in which a person accepts, rejects and corrects them.

The file needs neither a server nor a network. Decisions are kept in the browser and saved as `decisions.json`, which
`curate.decisions` applies. The pixels of a scene are decoded when it is shown.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.check import BadEntry
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import replacing
from scenarioclip_fast.generate.examples import Example, ExampleReader, choose, jpeg_uri, shrink_image, shrink_mask
from scenarioclip_fast.generate.images import Unit
from scenarioclip_fast.generate.records import content_hash
from scenarioclip_fast.generate.source import CuratedItem, CuratedSource
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import printable, warn

SIDE = 640  # longer side of an embedded image, in pixels
_QUALITY, _REGION_QUALITY = 80, 78
_IDENTIFYING = ("caption", "ground")  # the stages whose records number objects and relations


def write_review(directory: Path, units: Sequence[Unit], out: Path, *, scenes: int, seed: int = 0) -> Path:
    """Write the review page: up to 100 KB per photo, and 15 KB per relation.

    Args:
        directory: of the run.
        units: its images, of `images.read_list`.
        out: the HTML file, replaced if it exists.
        scenes: how many curated scenes are shown, chosen by `seed`; 0: all.

    Returns:
        out.

    Raises:
        UserError: a number is negative, or there is no scene to show.
    """
    for name, value in (("scenes", scenes), ("seed", seed)):
        if value < 0:
            raise UserError(f"{name}: got {value}, expected at least 0")
    require("PIL")
    found = CuratedSource(directory, units).scenes
    if not found:
        raise UserError(f"{directory}: no curated scenes; run the stages up to curate first")
    index: list[dict[str, str]] = []
    before, after = page_parts(directory.resolve().name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as new, new.open("x", encoding="utf-8") as file:
        file.write(before)
        for example in _read(choose(found, scenes, seed)):
            file.write(_data(f"scene-{len(index)}", _scene(example)))
            index.append({"key": example.item.item.key, "name": printable(example.item.item.name)})
        if not index:
            raise UserError(f"{directory}: none of the chosen scenes can be read; see the warnings above")
        run = run_id(directory, units)
        file.write(_data("index", {"run": run, "total": len(found), "scenes": index}))
        file.write(after)
    return out


def run_id(directory: Path, units: Sequence[Unit]) -> str:
    """A hash of what the ids in decisions refer to: another sample or curation of a run has the same."""
    digest = hashlib.sha256()
    for unit in units:
        digest.update(json.dumps([item.key for item in unit.items]).encode())
        for stage in _IDENTIFYING:
            path = directory / stage / unit.file_name
            if path.is_file():
                digest.update(bytes.fromhex(content_hash(path)))
    return digest.hexdigest()[:16]


def _read(items: Sequence[CuratedItem]) -> Iterator[Example]:
    reader = ExampleReader()
    for item in items:
        try:
            yield reader.read(item)
        except BadEntry as error:
            warn(f"warning: {item.item.key}: not on the page: {error.reason}: {error.detail}")


def _scene(example: Example) -> dict[str, Any]:
    picture = shrink_image(example.image, SIDE)
    height, width = example.record["size"]
    across, down = picture.width / width, picture.height / height
    scores = example.record.get("scores") or {}
    objects = []
    for k, (record, entry) in enumerate(zip(example.record["objects"], example.scene.objects, strict=True)):
        x1, y1, x2, y2 = entry.box
        mask = None if entry.mask is None else rle.encode(shrink_mask(entry.mask, SIDE))["counts"]
        objects.append(
            {
                "id": record["id"],
                "name": printable(entry.name),
                "box": [round(v, 1) for v in (x1 * across, y1 * down, x2 * across, y2 * down)],
                "mask": mask,
                "score": _item(scores.get("boxes"), k),
            }
        )
    relations = [
        {
            "id": record["id"],
            "subject": entry.subject,
            "predicate": printable(entry.predicate),
            "object": entry.object,
            "negatives": [printable(text) for text in entry.negatives],
            "region": None if region is None else jpeg_uri(_picture(region), _REGION_QUALITY),
        }
        for record, entry, region in zip(
            example.record["relations"], example.scene.relations, example.regions, strict=True
        )
    ]
    return {
        "image": jpeg_uri(picture, _QUALITY),
        "size": [picture.height, picture.width],
        "source": [height, width],
        "action": _optional(example.scene.action),
        "caption": _optional(example.scene.caption),
        "objects": objects,
        "relations": relations,
    }


def _picture(pixels: Any) -> Any:
    return require("PIL.Image").fromarray(pixels.numpy())


def _optional(text: str | None) -> str | None:
    return None if text is None else printable(text)


def _item(values: Any, k: int) -> float | None:
    """The score of object k, if there are scores."""
    if not isinstance(values, list) or k >= len(values) or not isinstance(values[k], int | float):
        return None
    return round(float(values[k]), 3)


def page_parts(run: str) -> tuple[str, str]:
    """The page before and after the scenes; its policy lets the browser run the page's own script and nothing else."""
    files = importlib.resources.files(__package__)
    template, style, script = (files.joinpath(f"review.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    head, _, tail = template.partition("{{scenes}}")
    assert "{{" not in style + script
    return (
        head.replace("{{policy}}", policy).replace("{{style}}", style),
        _data("run", printable(run)) + tail.replace("{{script}}", script),
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(name: str, value: Any) -> str:
    """A JSON value in an element that is not executed. Escaped "<" cannot end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>\n'
