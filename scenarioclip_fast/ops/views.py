"""focused_region and render_views: argument checks, geometry, custom ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from scenarioclip_fast import dispatch, native
from scenarioclip_fast.kernels.views import reference
from scenarioclip_fast.ops.view_batch import ViewBatch, is_empty, masked_box

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAYOUTS = (torch.contiguous_format, torch.channels_last)
# What decides a view's pixels apart from colours, in the order of the compiled `lower_views`.
_GEOMETRY = ("kind", "image", "source", "stretch", "box", "mask", "mask_runs", "mask_start", "mask_size")


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
    """Draw a relation: two masked regions that fade with distance from their centres, on a blurred background.

    Source: ScenarioCLIP (arXiv 2511.20274); formulas in kernels/views/README.md.

    Args:
        image: uint8 [H, W, 3].
        subject_mask, object_mask: bool [H, W] on the image's device; the result is symmetric in them.
        sigma: of the Gaussian falloff around each centre of mass, in source pixels.
        blur_sigma: of the background's Gaussian blur in source pixels, truncated at 4 sigma; 0: no blur.
        blur: "rgb" blurs the two image axes and rounds once, to the nearest byte. "reference" also blurs the colour
            axis and truncates to bytes after each of the three, as the published code does.
        backend: "auto", "reference", "cpu" or "cuda".

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an empty mask, or shapes, dtypes or numbers that do not match.
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
    weights, published = _blur(sigma, blur_sigma, blur)
    backend = dispatch.resolve("focused_region", backend, image.device.type)
    region: Tensor = _focused_region(image, subject_mask, object_mask, sigma, weights, published, backend)
    return region


def render_views(
    images: Sequence[Tensor],  # [H_i, W_i, 3] uint8
    views: ViewBatch,
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
    out: Tensor | None = None,
) -> Tensor:  # [V, 3, size, size]
    """Render views of all kinds from a ragged batch of images: composite, resize, augment, normalise in one pass.

    Source: ScenarioCLIP (arXiv 2511.20274); formulas in kernels/views/README.md.

    Args:
        images: uint8 [H_i, W_i, 3], all on one device.
        views: the views to render; `scenarioclip_fast.data.Views` builds them from scenes.
        size: side of a view, in pixels.
        mean, std: normalisation of the colours, which are in [0, 1].
        dtype: float32, bfloat16 or float16.
        memory_format: torch.contiguous_format or torch.channels_last.
        sigma, blur_sigma, blur: for the relation views, as in `focused_region`.
        backend: "auto", "reference", "cpu" or "cuda".
        out: [V, 3, size, size] of `dtype` and `memory_format` on the images' device, to be overwritten, in memory of
            its own; None: a new tensor.

    Returns:
        [V, 3, size, size] on the images' device: `out` if given.

    Raises:
        TypeError: an image or `out` is not a tensor.
        ValueError: a view whose image or mask is missing, empty or of the wrong size, or whose box lies outside its
            image; the message names the view.
    """
    if size < 1:
        raise ValueError(f"size: got {size}, expected at least 1")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected torch.float32, torch.bfloat16 or torch.float16")
    if memory_format not in _LAYOUTS:
        raise ValueError(f"memory_format: got {memory_format}, expected contiguous_format or channels_last")
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) != 3 or (name == "std" and min(numbers) <= 0):
            raise ValueError(f"{name}: got {list(numbers)}, expected three numbers{' above 0' * (name == 'std')}")
    weights, published = _blur(sigma, blur_sigma, blur)
    for i, image in enumerate(images):
        _check_tensor(f"images[{i}]", image)
    device = images[0].device if len(images) else torch.device("cpu")
    for i, image in enumerate(images):
        if image.device != device:
            raise ValueError(f"images[{i}]: got a tensor on {image.device}, expected {device}, the device of images[0]")
    backend = dispatch.resolve("render_views", backend, device.type)
    shape = (len(views), 3, size, size)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    else:
        _check_out(out, shape, dtype, memory_format, device)
    _render_views(list(images), views.tensors, list(mean), list(std), sigma, weights, published, out, backend)
    return out


def _check_out(
    out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device
) -> None:
    _check_tensor("out", out)
    if out.shape != shape or out.dtype != dtype or out.device != device:
        raise ValueError(
            f"out: got {out.dtype} {list(out.shape)} on {out.device}, expected {dtype} {list(shape)} on {device}"
        )
    if not out.is_contiguous(memory_format=memory_format):
        raise ValueError(f"out: got strides {out.stride()}, expected a tensor that is contiguous in {memory_format}")
    if out.requires_grad:
        raise ValueError("out: got a tensor that requires gradients, expected one that does not")
    compiling = torch.compiler.is_compiling()  # which cannot trace the question
    if not compiling and out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("out: got an inference tensor, which can be overwritten in torch.inference_mode() only")


def _check_overlap(out: Tensor, images: list[Tensor], views: list[Tensor]) -> None:
    begin, end = _addresses(out)
    for name, tensors in (("images", images), ("views", views)):
        for i, tensor in enumerate(tensors):
            first, last = _addresses(tensor)
            if max(begin, first) < min(end, last):
                raise ValueError(f"out: shares memory with {name}[{i}], which is read while out is written")


def _addresses(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the one after the last."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():  # as most images are, of which there are hundreds
        return begin, begin + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.itemsize


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        hint = "; convert it with torch.from_numpy" if isinstance(value, np.ndarray) else ""
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
    published: bool,
    backend: str,
) -> Tensor:
    for name, mask in (("subject_mask", subject_mask), ("object_mask", object_mask)):
        if not mask.any():
            raise ValueError(f"{name}: got an empty mask, expected at least one pixel: it has no centre of mass")
    masks = (subject_mask.contiguous(), object_mask.contiguous())
    region: Tensor = dispatch.implementation("focused_region", backend).focused_region(
        image.contiguous(), *masks, sigma, weights, published
    )
    return region


@_focused_region.register_fake
def _(image: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(image, memory_format=torch.contiguous_format)


@torch.library.custom_op("scenarioclip_fast::render_views_forward", mutates_args=("out",))
def _render_views(
    images: list[Tensor],
    views: list[Tensor],
    mean: list[float],
    std: list[float],
    sigma: float,
    weights: list[int],
    published: bool,
    out: Tensor,
    backend: str,
) -> None:
    # Inside the op, because they read addresses and values, which a compiled graph cannot do.
    _check_overlap(out, images, views)
    plan, augment, mask_runs, mask_start = lower_views(images, views, out.shape[-1])
    dispatch.implementation("render_views", backend).render_views(
        [image.contiguous() for image in images],
        plan,
        augment,
        mask_runs,
        mask_start,
        mean,
        std,
        sigma,
        weights,
        published,
        out,
    )


@_render_views.register_fake
def _(*_: Any) -> None:
    return None


def lower_views(
    images: list[Tensor],  # [H_i, W_i, 3] uint8
    tensors: list[Tensor],  # ViewBatch.tensors
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [V, 16] int32, [V, 5] float32, [R] int32, [M + 1] int64
    """Check every view and turn it into a row of the plan (see kernels/views/reference.py), in whole pixels."""
    views = ViewBatch(*(t.cpu() for t in tensors))
    _check_arrays(views)
    plan = _compiled_plan(views, images, size)
    if plan is None:
        plan = _plan(views, images, size)
    rest = (views.augment.contiguous(), views.mask_runs.contiguous(), views.mask_start.contiguous())
    return torch.from_numpy(plan), *rest


def _compiled_plan(views: ViewBatch, images: list[Tensor], size: int) -> NDArray[np.int32] | None:
    """The plan; None if a view is invalid or the compiled module is missing."""
    host = native.host()
    if host is None or not all(image.dtype is torch.uint8 for image in images):
        return None
    arrays = [getattr(views, name).numpy() for name in _GEOMETRY]
    plan: NDArray[np.int32] | None = host.lower_views(*arrays, [image.shape for image in images], size)
    return plan


def _plan(views: ViewBatch, images: list[Tensor], size: int) -> NDArray[np.int32]:
    """The plan; a ValueError names the first invalid view."""
    _check_mask_start(views)
    kind = _kinds(views)
    shapes = _image_shapes(views, images)
    source = _source_windows(views, shapes)
    box = _pixel_boxes(views, shapes)
    mask = _mask_rows(views, shapes)
    resized, corner = _resized(views, source, size)
    plan = np.concatenate([kind[:, None], views.image.numpy()[:, None], source, resized, corner, box, mask], axis=1)
    return plan.astype(np.int32)


def _reject(views: ViewBatch, bad: ArrayLike, message: Callable[[int], str]) -> None:  # bad: bool [V]
    """Raise a ValueError that names the first bad view."""
    if np.any(bad):
        v = int(np.argmax(bad))
        raise ValueError(f"{views.describe(v)}: {message(v)}")


def _kinds(views: ViewBatch) -> NDArray[np.int32]:  # [V]
    kind = views.kind.numpy()
    _reject(views, (kind < 0) | (kind >= len(reference.KIND_NAMES)), lambda v: f"got kind {kind[v]}, expected 0 to 3")
    return kind


def _image_shapes(views: ViewBatch, images: list[Tensor]) -> NDArray[np.int64]:  # [V, 2] height, width
    image = views.image.numpy()
    missing = (image < 0) | (image >= len(images))
    _reject(views, missing, lambda v: f"got image {image[v]}, expected one of the {len(images)} given")
    malformed = np.array([not _is_rgb(i) for i in images], bool)
    _reject(
        views,
        malformed[image],
        lambda v: (
            f"got an image {images[image[v]].dtype} {list(images[image[v]].shape)}, "
            "expected uint8 [H, W, 3] with H, W > 0"
        ),
    )
    return np.array([i.shape[:2] for i in images], np.int64).reshape(-1, 2)[image]


def _source_windows(views: ViewBatch, shapes: NDArray[np.int64]) -> NDArray[np.int64]:  # [V, 2] -> [V, 4]
    source = views.source.numpy().astype(np.int64)
    _reject(
        views,
        (source[:, 2:] <= source[:, :2]).any(1) | (np.abs(source) > 1 << 24).any(1),
        lambda v: f"got source window {source[v].tolist()}, expected x1 < x2 and y1 < y2",
    )
    inside = np.concatenate([source[:, :2].clip(0), np.minimum(source[:, 2:], shapes[:, ::-1])], axis=1)
    _reject(
        views,
        is_empty(inside),
        lambda v: f"got source window {source[v].tolist()}, expected one that overlaps the image of {_size(shapes[v])}",
    )
    return source


def _pixel_boxes(views: ViewBatch, shapes: NDArray[np.int64]) -> NDArray[np.int64]:  # [V, 2] -> [V, 4]
    """Return the boxes of masked views, zeros for the others."""
    masked = views.kind.numpy() == reference.MASKED
    box = np.zeros((len(views), 4), np.int64)
    box[masked] = masked_box(views.box.numpy()[masked], shapes[masked, 0], shapes[masked, 1])
    _reject(
        views,
        masked & is_empty(box),
        lambda v: f"got box {views.box[v].tolist()}, expected one that overlaps the image of {_size(shapes[v])}",
    )
    return box


def _mask_rows(views: ViewBatch, shapes: NDArray[np.int64]) -> NDArray[np.int64]:  # [V, 2] -> [V, 2]
    """Return the masks of relations, -1 for the others."""
    relation, count = (views.kind.numpy() == reference.RELATION)[:, None], len(views.mask_size)
    mask = np.where(relation, views.mask.numpy(), -1)
    missing = relation & ((mask < 0) | (mask >= count))
    _reject(views, missing.any(1), lambda v: f"got masks {mask[v].tolist()}, expected two of {count}")
    # Row -1 (no mask) reads the last entry of these arrays, a placeholder that passes the checks.
    sizes = np.concatenate([views.mask_size.numpy(), np.zeros((1, 2), np.int32)])
    areas, well_formed = _mask_areas(views)
    for rows in mask.T:
        _check_masks(views, rows, shapes, sizes, areas, well_formed)
    return mask


def _check_masks(
    views: ViewBatch,
    rows: NDArray[np.int64],  # [V], -1 for none
    shapes: NDArray[np.int64],  # [V, 2] of the images
    sizes: NDArray[np.int32],  # [M + 1, 2]
    areas: NDArray[np.int64],  # [M + 1]
    well_formed: NDArray[np.bool_],  # [M + 1]
) -> None:
    _reject(
        views,
        (rows >= 0) & (sizes[rows] != shapes).any(1),
        lambda v: f"got a mask of {_size(sizes[rows[v]])}, expected {_size(shapes[v])} like the image",
    )
    _reject(
        views,
        ~well_formed[rows],
        lambda v: f"the runs of mask {rows[v]} do not cover its {_size(sizes[rows[v]])} pixels",
    )
    _reject(
        views,
        areas[rows] == 0,
        lambda v: f"mask {rows[v]} is empty, expected at least one pixel: it has no centre of mass",
    )


def _resized(
    views: ViewBatch,
    source: NDArray[np.int64],  # [V, 4]
    size: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # [V, 2] width and height, [V, 2] left and top of the crop
    """Resize the short side to `size` and the long side to whole pixels, truncated; then crop the centre.

    Halves round to even, as in Pillow and torchvision.
    """
    height, width = source[:, 3] - source[:, 1], source[:, 2] - source[:, 0]
    shorter = np.minimum(height, width)
    resized = np.stack([width, height], axis=1) * size // shorter[:, None]
    resized[views.stretch.numpy()] = size
    _reject(
        views,
        (resized >= 1 << 30).any(1),
        lambda v: (
            f"got source window {source[v].tolist()}, expected a less narrow one: resized, it has "
            f"{resized[v].tolist()} pixels"
        ),
    )
    spare = resized - size
    return resized, spare // 2 + ((spare % 4) == 3)


def _is_rgb(image: Tensor) -> bool:
    return image.dtype == torch.uint8 and image.dim() == 3 and image.shape[2] == 3 and image.numel() > 0


def _size(height_width: NDArray[Any]) -> str:
    return f"{height_width[1]} x {height_width[0]}"


def _mask_areas(views: ViewBatch) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:  # [M + 1], [M + 1]
    """Return the area of each mask and whether its runs cover it exactly; the last entry stands for no mask."""
    runs, start = views.mask_runs.numpy().astype(np.int64), views.mask_start.numpy()
    position = np.arange(len(runs)) - np.repeat(start[:-1], np.diff(start))

    def per_mask(values: NDArray[Any]) -> NDArray[np.int64]:
        total = np.concatenate([[0], np.cumsum(values)])
        return total[start[1:]] - total[start[:-1]]

    pixels = views.mask_size.numpy().astype(np.int64).prod(1)
    well_formed = (per_mask(runs) == pixels) & (per_mask(runs < 0) == 0)
    return np.append(per_mask(runs * (position % 2)), 1), np.append(well_formed, True)


def _check_arrays(views: ViewBatch) -> None:
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


def _check_mask_start(views: ViewBatch) -> None:
    start, runs = views.mask_start, views.mask_runs.shape[0]
    if int(start[0]) != 0 or int(start[-1]) != runs or bool((start.diff() < 0).any()):
        raise ValueError(f"views.mask_start: expected to rise from 0 to {runs}")
