"""focused_region and render_views: checks, geometry, choice of backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from scenarioclip_fast import dispatch
from scenarioclip_fast.kernels.views import reference

if TYPE_CHECKING:
    from scenarioclip_fast.data.views import Views

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAYOUTS = (torch.contiguous_format, torch.channels_last)


def focused_region(
    image: Tensor,  # [H, W, 3] uint8
    subject_mask: Tensor,  # [H, W] bool
    object_mask: Tensor,  # [H, W] bool
    *,
    sigma: float = 100.0,
    blur_sigma: float = 2.0,
    blur: str = "rgb",
    backend: str = "auto",
) -> Tensor:  # [H, W, 3] uint8
    """The picture of a relation: two masks, each fading around its centre of mass, before a blurred background.

    Source: ScenarioCLIP (arXiv 2511.20274); formulas in kernels/views/README.md.

    Args:
        image: uint8 [H, W, 3].
        subject_mask, object_mask: bool [H, W] on the image's device; the result is symmetric in them.
        sigma: width of the fading, in source pixels.
        blur_sigma: width of the background's Gaussian in source pixels, cut at 4 sigma; 0 leaves it sharp.
        blur: "rgb" blurs in the plane; "reference" also along the colour axis, as the published code does.
        backend: "auto", "reference", "cpu" or "cuda".

    Raises:
        TypeError: not tensors.
        ValueError: an empty mask, or shapes, dtypes and numbers that do not fit.
    """
    for name, value in (("image", image), ("subject_mask", subject_mask), ("object_mask", object_mask)):
        _check_tensor(name, value)
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[2] != 3 or image.numel() == 0:
        raise ValueError(f"image: got {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3] with H, W > 0")
    for name, mask in (("subject_mask", subject_mask), ("object_mask", object_mask)):
        if mask.dtype != torch.bool or mask.shape != image.shape[:2]:
            raise ValueError(
                f"{name}: got {mask.dtype} {list(mask.shape)}, expected bool {list(image.shape[:2])} like the image"
            )
        if mask.device != image.device:
            raise ValueError(f"{name}: got a tensor on {mask.device}, expected {image.device} like the image")
    weights, colours = _blur(sigma, blur_sigma, blur)
    backend = dispatch.resolve("focused_region", backend, image.device.type)
    region: Tensor = _focused_region(image, subject_mask, object_mask, sigma, weights, colours, backend)
    return region


def render_views(
    images: Sequence[Tensor],  # [H_i, W_i, 3] uint8
    views: Views,
    *,
    size: int = 224,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    sigma: float = 100.0,
    blur_sigma: float = 2.0,
    blur: str = "rgb",
    backend: str = "auto",
) -> Tensor:  # [V, 3, size, size]
    """Renders views of all kinds from a ragged batch of images: composite, resize, augment, normalise in one pass.

    Source: ScenarioCLIP (arXiv 2511.20274); formulas in kernels/views/README.md.

    Args:
        images: uint8 [H_i, W_i, 3], all on one device.
        views: what to render, `scenarioclip_fast.data.Views`.
        size: side of a view in pixels.
        mean, std: of the colours, in [0, 1].
        dtype: float32, bfloat16 or float16.
        memory_format: torch.contiguous_format or torch.channels_last.
        sigma, blur_sigma, blur: of the relation views, as in `focused_region`.
        backend: "auto", "reference", "cpu" or "cuda".

    Returns:
        [V, 3, size, size] on the images' device.

    Raises:
        TypeError: images that are not tensors.
        ValueError: a view whose image or mask is missing, empty or of the wrong size, or whose box lies outside its
            image; the view is named.
    """
    if size < 1:
        raise ValueError(f"size: got {size}, expected at least 1")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: got {dtype}, expected float32, bfloat16 or float16")
    if memory_format not in _LAYOUTS:
        raise ValueError(f"memory_format: got {memory_format}, expected contiguous_format or channels_last")
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) != 3 or (name == "std" and min(numbers) <= 0):
            raise ValueError(f"{name}: got {list(numbers)}, expected three numbers{' above 0' * (name == 'std')}")
    weights, colours = _blur(sigma, blur_sigma, blur)
    for i, image in enumerate(images):
        _check_tensor(f"images[{i}]", image)
    device = images[0].device if len(images) else torch.device("cpu")
    for i, image in enumerate(images):
        if image.device != device:
            raise ValueError(f"images[{i}]: got a tensor on {image.device}, expected {device} like the first")
    backend = dispatch.resolve("render_views", backend, device.type)
    pixels: Tensor = _render_views(
        list(images),
        views.tensors,
        size,
        list(mean),
        list(std),
        sigma,
        weights,
        colours,
        dtype,
        memory_format == torch.channels_last,
        backend,
    )
    return pixels


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        hint = "; torch.from_numpy makes one" if isinstance(value, np.ndarray) else ""
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor{hint}")


def _blur(sigma: float, blur_sigma: float, blur: str) -> tuple[list[int], bool]:
    if blur not in ("rgb", "reference"):
        raise ValueError(f"blur: got {blur!r}, expected 'rgb' or 'reference'")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma: got {sigma}, expected a number above 0")
    if not 0 <= blur_sigma <= 64:
        raise ValueError(f"blur_sigma: got {blur_sigma}, expected a number from 0 to 64")
    return reference.blur_weights(blur_sigma), blur == "reference"


@torch.library.custom_op("scenarioclip_fast::focused_region_forward", mutates_args=())
def _focused_region(
    image: Tensor,
    subject_mask: Tensor,
    object_mask: Tensor,
    sigma: float,
    weights: list[int],
    colours: bool,
    backend: str,
) -> Tensor:
    for name, mask in (("subject_mask", subject_mask), ("object_mask", object_mask)):
        if not mask.any():
            raise ValueError(f"{name}: got an empty mask, expected at least one pixel: it has no centre of mass")
    masks = (subject_mask.contiguous(), object_mask.contiguous())
    region: Tensor = dispatch.implementation("focused_region", backend).focused_region(
        image.contiguous(), *masks, sigma, weights, colours
    )
    return region


@_focused_region.register_fake
def _(image: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(image, memory_format=torch.contiguous_format)


@torch.library.custom_op("scenarioclip_fast::render_views_forward", mutates_args=())
def _render_views(
    images: list[Tensor],
    views: list[Tensor],
    size: int,
    mean: list[float],
    std: list[float],
    sigma: float,
    weights: list[int],
    colours: bool,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> Tensor:
    # Here and not in the public function: what follows looks at values, which a compiled graph cannot do.
    plan, augment, mask_runs, mask_start = plan_views(images, views, size)
    pixels: Tensor = dispatch.implementation("render_views", backend).render_views(
        [image.contiguous() for image in images],
        plan,
        augment,
        mask_runs,
        mask_start,
        size,
        mean,
        std,
        sigma,
        weights,
        colours,
        dtype,
        channels_last,
    )
    return pixels.permute(0, 3, 1, 2) if channels_last else pixels


@_render_views.register_fake
def _(
    images: list[Tensor],
    views: list[Tensor],
    size: int,
    mean: list[float],
    std: list[float],
    sigma: float,
    weights: list[int],
    colours: bool,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> Tensor:
    device = images[0].device if images else torch.device("cpu")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((views[0].shape[0], 3, size, size), dtype=dtype, device=device, memory_format=layout)


def plan_views(
    images: list[Tensor],  # [H_i, W_i, 3] uint8
    tensors: list[Tensor],  # Views.tensors
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [V, 16] int32, [V, 5] float32, [R] int32, [M + 1] int64
    """Checks every view and gives each its row of the plan (see kernels/views/reference.py), in whole pixels."""
    from scenarioclip_fast.data.views import Views, is_empty, pixel_box

    views = Views(*(t.cpu() for t in tensors))
    _check_arrays(views)

    def refuse(bad: ArrayLike, message: Callable[[int], str]) -> None:  # bad: bool [V]
        if np.any(bad):
            v = int(np.argmax(bad))
            raise ValueError(f"{views.describe(v)}: {message(v)}")

    kind, image = views.kind.numpy(), views.image.numpy()
    refuse((kind < 0) | (kind >= len(reference.KIND_NAMES)), lambda v: f"got kind {kind[v]}, expected 0 to 3")
    missing = (image < 0) | (image >= len(images))
    refuse(missing, lambda v: f"got image {image[v]}, expected one of the {len(images)} given")
    wrong = np.array([not _is_picture(i) for i in images], bool)
    refuse(
        wrong[image],
        lambda v: (
            f"got an image {images[image[v]].dtype} {list(images[image[v]].shape)}, "
            "expected uint8 [H, W, 3] with H, W > 0"
        ),
    )
    shapes = np.array([i.shape[:2] for i in images], np.int64).reshape(-1, 2)[image]
    height, width = shapes[:, 0], shapes[:, 1]

    source = views.source.numpy().astype(np.int64)
    refuse(
        (source[:, 2:] <= source[:, :2]).any(1) | (np.abs(source) > 1 << 24).any(1),
        lambda v: f"got source window {source[v].tolist()}, expected x1 < x2 and y1 < y2",
    )
    inside = np.concatenate([source[:, :2].clip(0), np.minimum(source[:, 2:], shapes[:, ::-1])], axis=1)
    refuse(
        is_empty(inside),
        lambda v: f"got source window {source[v].tolist()}, expected one that overlaps the image of {_size(shapes[v])}",
    )

    box = np.zeros_like(source)
    masked = kind == reference.MASKED
    box[masked] = pixel_box(views.box.numpy()[masked], height[masked], width[masked])
    refuse(
        masked & is_empty(box),
        lambda v: f"got box {views.box[v].tolist()}, expected one that overlaps the image of {_size(shapes[v])}",
    )

    relation, count = kind == reference.RELATION, len(views.mask_size)
    mask = np.where(relation[:, None], views.mask.numpy(), -1)
    missing = relation[:, None] & ((mask < 0) | (mask >= count))
    refuse(missing.any(1), lambda v: f"got masks {mask[v].tolist()}, expected two of {count}")
    # A mask -1 reads the last entry of these, which stands for a good mask.
    mask_sizes = np.concatenate([views.mask_size.numpy(), np.zeros((1, 2), np.int32)])
    areas, well_formed = _mask_areas(views)

    def check_masks(rows: NDArray[np.int64]) -> None:
        refuse(
            (rows >= 0) & (mask_sizes[rows] != shapes).any(1),
            lambda v: f"got a mask of {_size(mask_sizes[rows[v]])}, expected {_size(shapes[v])} like the image",
        )
        refuse(
            ~well_formed[rows],
            lambda v: f"the runs of mask {rows[v]} do not cover its {_size(mask_sizes[rows[v]])} pixels",
        )
        refuse(
            areas[rows] == 0,
            lambda v: f"mask {rows[v]} is empty, expected at least one pixel: it has no centre of mass",
        )

    check_masks(mask[:, 0])
    check_masks(mask[:, 1])

    # Short side to `size`, the long side cut off (not rounded) to whole pixels, then the middle, halves to even:
    # what Pillow and torchvision do.
    tall, wide = source[:, 3] - source[:, 1], source[:, 2] - source[:, 0]
    shorter = np.minimum(tall, wide)
    whole = views.stretch.numpy()
    resized = np.stack([wide, tall], axis=1) * size // shorter[:, None]
    resized[whole] = size
    refuse(
        (resized >= 1 << 30).any(1),
        lambda v: (
            f"got source window {source[v].tolist()}, expected one that is not so narrow: it becomes "
            f"{resized[v].tolist()} pixels"
        ),
    )
    spare = resized - size
    corner = spare // 2 + ((spare % 4) == 3)

    plan = np.concatenate([kind[:, None], image[:, None], source, resized, corner, box, mask], axis=1)
    mask_start = views.mask_start.contiguous()
    return torch.from_numpy(plan.astype(np.int32)), views.augment.contiguous(), views.mask_runs.contiguous(), mask_start


def _is_picture(image: Tensor) -> bool:
    return image.dtype == torch.uint8 and image.dim() == 3 and image.shape[2] == 3 and image.numel() > 0


def _size(height_width: NDArray[Any]) -> str:
    return f"{height_width[1]} x {height_width[0]}"


def _mask_areas(views: Views) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:  # [M + 1], [M + 1]
    """The number of set pixels of each mask, and whether its runs cover it exactly; then an entry for no mask."""
    runs, start = views.mask_runs.numpy().astype(np.int64), views.mask_start.numpy()
    position = np.arange(len(runs)) - np.repeat(start[:-1], np.diff(start))

    def per_mask(values: NDArray[Any]) -> NDArray[np.int64]:
        total = np.concatenate([[0], np.cumsum(values)])
        return total[start[1:]] - total[start[:-1]]

    pixels = views.mask_size.numpy().astype(np.int64).prod(1)
    well_formed = (per_mask(runs) == pixels) & (per_mask(runs < 0) == 0)
    return np.append(per_mask(runs * (position % 2)), 1), np.append(well_formed, True)


def _check_arrays(views: Views) -> None:
    count, masks = len(views), len(views.mask_size)
    runs = views.mask_runs.shape[0]
    expected: dict[str, tuple[torch.dtype, list[int]]] = {
        "kind": (torch.int32, [count]),
        "image": (torch.int64, [count]),
        "source": (torch.int32, [count, 4]),
        "stretch": (torch.bool, [count]),
        "box": (torch.float64, [count, 4]),
        "mask": (torch.int64, [count, 2]),
        "augment": (torch.float32, [count, 5]),
        "mask_runs": (torch.int32, [runs]),
        "mask_start": (torch.int64, [masks + 1]),
        "mask_size": (torch.int32, [masks, 2]),
    }
    for name, (dtype, shape) in expected.items():
        array = getattr(views, name)
        if array.dtype != dtype or list(array.shape) != shape:
            raise ValueError(f"views.{name}: got {array.dtype} {list(array.shape)}, expected {dtype} {shape}")
    start = views.mask_start
    if int(start[0]) != 0 or int(start[-1]) != runs or bool((start.diff() < 0).any()):
        raise ValueError(f"views.mask_start: expected to rise from 0 to {runs}")
