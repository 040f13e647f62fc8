"""Statistics and pictures of a packed data set: counts, histograms, and a contact sheet of scenes with their views."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.decode import DecodeError, make_decoder
from scenarioclip_fast.data.scene import Mask, Scene, mask_pixels, with_masks
from scenarioclip_fast.data.shards import BadSample, ShardSet
from scenarioclip_fast.data.views import Views
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import replacing
from scenarioclip_fast.ops.view_batch import is_empty, masked_box
from scenarioclip_fast.ops.views import render_views
from scenarioclip_fast.progress import progress
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import printable

COLOURS = ("#d9483b", "#2f7fc1", "#3f8f63", "#d9a036", "#7a5ba8", "#c2578f", "#4aa3a3", "#8a6d3b")
GREY = "#6b7480"
MAX_SCENES = 40  # per sheet: Matplotlib's layout time grows quadratically
MAX_SIDE = 1024  # pixels per view: far more than the sheet resolves
# Views without normalisation: values from 0 to 1, as Matplotlib expects.
_UNNORMALISED: Any = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@dataclass
class SplitStatistics:
    """Statistics of a split."""

    scenes: int = 0
    objects: list[int] = field(default_factory=list)  # per scene
    relations: list[int] = field(default_factory=list)  # per scene
    mask_area: list[float] = field(default_factory=list)  # per mask, fraction of the image
    without_mask: int = 0
    without_action: int = 0  # scenes
    all_black: int = 0  # masked object views that are all black: the box is outside the centre crop
    bad: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        objects, relations = sum(self.objects), sum(self.relations)
        area = f"median area {_percent(np.median(self.mask_area))} of the image; " if self.mask_area else ""
        lines = [
            f"scenes     {self.scenes}"
            + (f"  (without an action: {self.without_action})" if self.without_action else ""),
            f"objects    {objects}  ({_spread(self.objects)} per scene)",
            f"relations  {relations}  ({_spread(self.relations)} per scene; scenes without: {self.relations.count(0)})",
            f"masks      {len(self.mask_area)}  ({area}objects without: {self.without_mask})",
            f"all black  {self.all_black} of {objects} masked object views "
            f"({_percent(self.all_black / max(objects, 1))}): "
            "the box is outside the centre crop; object_view=crop shows them",
        ]
        if self.bad:
            lines.append("unusable   " + ", ".join(f"{n} {reason}" for reason, n in self.bad.most_common()))
        return "\n".join(lines)


def collect_statistics(scenes: Iterable[Scene | BadSample]) -> SplitStatistics:
    """Collect statistics of scenes. BadSamples and scenes without valid views are counted by reason."""
    statistics = SplitStatistics()
    for scene in scenes:
        if isinstance(scene, BadSample):
            statistics.bad[scene.reason] += 1
            continue
        try:
            views = Views.of_scenes([with_masks(scene)])
        except ValueError:
            statistics.bad["no_views"] += 1
            continue
        statistics.scenes += 1
        statistics.without_action += scene.action is None
        statistics.objects.append(len(scene.objects))
        statistics.relations.append(len(scene.relations))
        width, height = views.source[0, 2:].tolist()
        masks = [entry.mask for entry in scene.objects if entry.mask is not None]
        statistics.mask_area += [_area(mask) / (height * width) for mask in masks]
        statistics.without_mask += len(scene.objects) - len(masks)
        statistics.all_black += int(_outside_centre(views.box[views.kind == 1], height, width).sum())
    return statistics


def _area(mask: Mask) -> int:
    return rle.area(mask) if isinstance(mask, dict) else int(mask.sum())


def _outside_centre(boxes: Tensor, height: int, width: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mark boxes outside the centre crop of the image, the only part that a masked view shows."""
    ones = np.ones(len(boxes), int)
    pixels = masked_box(boxes.numpy(), ones * height, ones * width)
    side = min(height, width)
    corner = np.array([(width - side) / 2, (height - side) / 2])
    low, high = np.maximum(pixels[:, :2], np.floor(corner)), np.minimum(pixels[:, 2:], np.ceil(corner + side))
    return is_empty(np.concatenate([low, high], axis=1).astype(np.int64))


def read_scenes(shards: ShardSet, indices: Iterable[int]) -> Iterable[Scene | BadSample]:
    """Yield the scenes at `indices`, or a BadSample for each one that cannot be read."""
    for i in indices:
        try:
            yield shards.read(i)
        except BadSample as error:
            yield error


def draw_histograms(statistics: SplitStatistics, out: Path) -> None:
    """Write a PNG with histograms of objects and relations per scene and of mask areas."""
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    panels: list[tuple[str, Sequence[float], Any]] = [
        ("objects per scene", statistics.objects, np.arange(max(statistics.objects, default=0) + 2) - 0.5),
        ("relations per scene", statistics.relations, np.arange(max(statistics.relations, default=0) + 2) - 0.5),
        ("mask area (fraction of the image)", statistics.mask_area, np.geomspace(1e-5, 1, 31)),
    ]
    for k, (axis, (title, values, bins)) in enumerate(zip(axes, panels, strict=True)):
        axis.hist(np.maximum(values, 1e-5) if k == 2 else values, bins=bins, color=COLOURS[1], rwidth=0.9)
        axis.set_ylabel("masks" if k == 2 else "scenes", fontsize=8, color=GREY)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in axes[:2]:
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes:
        axis.yaxis.get_major_locator().set_params(integer=True)
    axes[2].set_xscale("log")
    total = max(sum(statistics.objects), 1)
    figure.suptitle(
        f"{statistics.scenes} scenes; {statistics.all_black} of {sum(statistics.objects)} masked object views are all "
        f"black ({_percent(statistics.all_black / total)})",
        fontsize=10,
        color=GREY,
    )
    _save(figure, out, 120)


def draw_sheet(
    scenes: Sequence[Scene],  # images decoded: uint8 [H, W, 3]
    out: Path,
    *,
    size: int = 224,
    object_view: str = "masked",
    relation_view: str = "focused",
    blur: str = "rgb",
    max_views: int = 4,
) -> None:
    """Write a PNG with one row per scene: its image with boxes and masks, its global view, and captioned views of its
    first `max_views` objects and relations.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    images = [scene.image for scene in scenes if isinstance(scene.image, Tensor)]
    views = Views.of_scenes(scenes, object_view=object_view, relation_view=relation_view)
    pixels = render_views(images, views, size=size, blur=blur, **_UNNORMALISED).clamp(0, 1).permute(0, 2, 3, 1).cpu()
    figure = Figure(figsize=(3 + 1.9 * (1 + max_views), 3.6 * len(scenes)), layout="constrained")
    rows = figure.subfigures(len(scenes), 1, squeeze=False)[:, 0]
    object_at, relation_at = len(scenes), len(scenes) + sum(len(scene.objects) for scene in scenes)
    for i, (scene, image, row) in enumerate(zip(scenes, images, rows, strict=True)):
        left, right = row.subfigures(1, 2, width_ratios=[3, 1.9 * (1 + max_views)])
        overview = left.subplots()
        _draw_overview(overview, scene, image, max_views)
        grid = right.subplots(2, 1 + max_views, squeeze=False)
        for axis in grid.flat:
            axis.set_axis_off()
        _draw_view(grid[0, 0], pixels[i], "global view", GREY)
        for k, entry in enumerate(scene.objects[:max_views]):
            _draw_view(grid[0, 1 + k], pixels[object_at + k], entry.name, COLOURS[k % len(COLOURS)])
        for k in range(len(scene.relations[: max_views + 1])):
            _draw_view(grid[1, k], pixels[relation_at + k], scene.relation_text(k), GREY)
        object_at += len(scene.objects)
        relation_at += len(scene.relations)
    _save(figure, out, 110)


def _save(figure: Any, out: Path, dpi: int) -> None:
    with replacing(out) as new:
        figure.savefig(new, dpi=dpi, format="png")


def _draw_overview(axis: Any, scene: Scene, image: Tensor, max_views: int) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    picture = image.float().cpu() / 255
    for k, entry in enumerate(scene.objects):
        if entry.mask is not None:
            mask = rle.decode(entry.mask) if isinstance(entry.mask, dict) else torch.tensor(mask_pixels(entry.mask))
            picture[mask] = 0.55 * picture[mask] + 0.45 * torch.tensor(to_rgb(COLOURS[k % len(COLOURS)]))
    axis.imshow(picture.numpy())
    height, width = image.shape[:2]
    for k, entry in enumerate(scene.objects):
        colour = COLOURS[k % len(COLOURS)]
        x1, y1, x2, y2 = entry.box
        axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1.2))
        label = {"facecolor": colour, "edgecolor": "none", "pad": 1}
        # Above the box, or inside it at the upper edge; right-aligned in the right half, so that it is never clipped.
        inside, leftwards = y1 < 0.06 * height, x1 + x2 > width
        x, edge = (x2 - 1, "right") if leftwards else (x1, "left")
        below = "top" if inside else "bottom"
        name = entry.name.replace("$", r"\$")
        axis.text(x, y1, _wrapped(name, 100), color="white", fontsize=6, ha=edge, va=below, bbox=label, clip_on=True)
    axis.set_axis_off()
    axis.set_title(f"{_wrapped(scene.key, 100)}: {_wrapped(scene.action or '(no action)', 36)}", fontsize=9, loc="left")
    counts = [(len(scene.objects), max_views, "objects"), (len(scene.relations), max_views + 1, "relations")]
    truncated = [f"views of {shown} of {total} {what}" for total, shown, what in counts if total > shown]
    note = "; ".join([f"{width} x {height}", *truncated])
    axis.text(0, -0.02, note, transform=axis.transAxes, fontsize=7, color=GREY, va="top")


def _draw_view(axis: Any, picture: Tensor, text: str, colour: str) -> None:
    axis.imshow(picture.numpy())
    axis.set_title(_wrapped(text, 24), fontsize=7.5, color=colour)


def _wrapped(text: str, width: int) -> str:
    # An unescaped dollar sign starts Matplotlib mathtext.
    return "\n".join(textwrap.wrap(printable(text), width)[:3]).replace("$", r"\$")


def inspect_shards(
    directory: str | Path,
    out: str | Path,
    *,
    split: str = "train",
    scenes: int = 6,
    size: int = 224,
    object_view: str = "masked",
    relation_view: str = "focused",
    blur: str = "rgb",
    seed: int = 0,
    verify: bool = False,
) -> SplitStatistics:
    """Collect statistics of a split, and write `histograms.png` and `scenes.png` (randomly chosen scenes) to `out`.

    With `verify`, the scenes of shards with another SHA-256 than in the manifest are unusable (see `ShardSet`).

    Raises:
        UserError: no packed data set, no usable scenes in the split, or an argument is out of range.
    """
    if not 1 <= scenes <= MAX_SCENES:
        raise UserError(f"scenes: got {scenes}, expected 1 to {MAX_SCENES}; another seed selects other scenes")
    if seed < 0:
        raise UserError(f"seed: got {seed}, expected at least 0")
    if not 1 <= size <= MAX_SIDE:
        raise UserError(f"size: got {size}, expected 1 to {MAX_SIDE} pixels")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose a directory for the pictures")
    require("matplotlib")  # before all scenes are read
    shards = ShardSet(directory, split, verify=verify)
    statistics = collect_statistics(
        read_scenes(shards, progress(range(len(shards)), total=len(shards), desc="counting", unit="scenes"))
    )
    if statistics.scenes == 0:
        raise UserError(f"{directory}: split {split!r} has no usable scenes ({dict(statistics.bad) or 'it is empty'})")
    out.mkdir(parents=True, exist_ok=True)
    draw_histograms(statistics, out / "histograms.png")
    decoder = make_decoder("auto", "cpu")
    chosen: list[Scene] = []
    for scene in read_scenes(shards, np.random.default_rng(seed).permutation(len(shards)).tolist()):
        if isinstance(scene, BadSample) or not isinstance(scene.image, bytes):
            continue
        image = decoder.decode([scene.image])[0]
        scene = with_masks(scene) if relation_view == "focused" else scene
        if isinstance(image, DecodeError) or not _has_views(scene, relation_view):
            continue
        scene.image = image
        chosen.append(scene)
        if len(chosen) == scenes:
            break
    decoder.close()
    if chosen:
        sheet = out / "scenes.png"
        draw_sheet(chosen, sheet, size=size, object_view=object_view, relation_view=relation_view, blur=blur)
    return statistics


def _has_views(scene: Scene, relation_view: str) -> bool:
    try:
        Views.of_scenes([scene], relation_view=relation_view)
    except ValueError:
        return False
    return True


def _spread(counts: Sequence[int]) -> str:
    if not counts:
        return "none"
    return f"{min(counts)} to {max(counts)}, mean {np.mean(counts):.1f}"


def _percent(fraction: float | np.floating[Any]) -> str:
    return f"{100 * float(fraction):.1f} %"
