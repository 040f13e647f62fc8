"""Focused regions and rendered views in plain PyTorch: the reference for every backend. See README.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Kinds of views.
GLOBAL, MASKED, CROP, RELATION = range(4)
KIND_NAMES = ("global", "masked object", "cropped object", "relation")

# The columns of the plan, int32 [V, PLAN_WIDTH]. The source window (black outside the image) is resized to `width` x
# `height`, and the output is the square of `size` pixels at (left, top) of that.
(KIND, IMAGE, X1, Y1, X2, Y2, WIDTH, HEIGHT, LEFT, TOP, BOX_X1, BOX_Y1, BOX_X2, BOX_Y2, MASK_1, MASK_2) = range(16)
PLAN_WIDTH = 16

# The columns of the augmentation, float32 [V, 5].
BRIGHTNESS, CONTRAST, SATURATION, HUE, BLUR = range(5)

BLUR_BITS = 24  # fixed point of the Gaussian: 255 * 2^24 still fits 32 unsigned bits
BLUR_PASS_BITS = 8  # fixed point of colours between its two passes: 255 * 2^8 still fits 16 unsigned bits
RESIZE_BITS = 22  # Pillow's
GREY = (0.2989, 0.587, 0.114)
AUGMENT_RADIUS = 4  # the Gaussian of the augmentation has 9 taps


def blur_weights(sigma: float) -> list[int]:
    """Right half of a Gaussian truncated at 4 sigma, centre first, in units of 2^-24; the whole sums to 1 exactly."""
    radius = int(4.0 * sigma + 0.5)
    gaussian = [math.exp(-0.5 * (k / sigma) ** 2) if k else 1.0 for k in range(radius + 1)]
    total = math.fsum(gaussian + gaussian[1:])
    side = [round(w / total * 2**BLUR_BITS) for w in gaussian[1:]]
    return [2**BLUR_BITS - 2 * sum(side), *side]


def blur_axis(
    image: Tensor,  # [H, W, 3] integers
    weights: Sequence[int],
    axis: int,
) -> Tensor:  # [H, W, 3] int64, in units of 2^-24 of the image's
    """Blur along one axis, exactly; the border is mirrored, the edge pixel repeated (SciPy's "reflect")."""
    size, radius = image.shape[axis], len(weights) - 1
    wide = image.to(torch.int64).index_select(axis, _reflect(size, radius, image.device))
    total = weights[0] * wide.narrow(axis, radius, size)
    for k in range(1, radius + 1):
        total += weights[k] * (wide.narrow(axis, radius - k, size) + wide.narrow(axis, radius + k, size))
    return total


def gaussian_blur(
    image: Tensor,  # [H, W, 3] uint8
    weights: Sequence[int],
    published: bool,
) -> Tensor:  # [H, W, 3] uint8
    """Blur along rows and columns, rounded to the nearest byte once.

    With `published` (blur="reference") also along the colour axis, truncated to bytes after each axis.
    """
    if published:
        for axis in range(3):
            image = (blur_axis(image, weights, axis) >> BLUR_BITS).to(torch.uint8)
        return image
    # In between, 8 bits after the point: all backends share this rounding, which moves the result by at most 2^-9.
    image = _shift(blur_axis(image, weights, 0), BLUR_BITS - BLUR_PASS_BITS)
    return _shift(blur_axis(image, weights, 1), BLUR_BITS + BLUR_PASS_BITS).to(torch.uint8)


def _shift(fixed: Tensor, bits: int) -> Tensor:
    """fixed / 2^bits to the nearest integer, halves upwards."""
    return (fixed + (1 << (bits - 1))) >> bits


def _reflect(size: int, radius: int, device: torch.device) -> Tensor:  # [size + 2 radius]
    index = torch.arange(-radius, size + radius, device=device) % (2 * size)
    return torch.minimum(index, 2 * size - 1 - index)


def region_weight(
    subject_mask: Tensor,  # [H, W] bool
    object_mask: Tensor,  # [H, W] bool
    sigma: float,
) -> Tensor:  # [H, W] float64
    """r_1 w_1 + r_2 w_2 of the focused region; zero outside both masks."""
    d1, d2 = _distance(subject_mask), _distance(object_mask)
    # The square of sigma may underflow or overflow, that of a ratio only to a correct 0 or infinity.
    r1 = torch.exp(-(d1 / sigma).square() / 2) * subject_mask
    r2 = torch.exp(-(d2 / sigma).square() / 2) * object_mask
    both = d1 + d2
    return torch.where(both > 0, (r1 * d2 + r2 * d1) / both, (r1 + r2) / 2)


def _distance(mask: Tensor) -> Tensor:  # [H, W] float64
    y, x = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64, device=mask.device) for n in mask.shape), indexing="ij"
    )
    area = mask.sum()
    return torch.hypot(y - (y * mask).sum() / area, x - (x * mask).sum() / area)


def focused_region(
    image: Tensor,  # [H, W, 3] uint8
    subject_mask: Tensor,  # [H, W] bool, not empty
    object_mask: Tensor,  # [H, W] bool, not empty
    sigma: float,
    weights: Sequence[int],  # blur_weights(blur_sigma)
    published: bool,
) -> Tensor:  # [H, W, 3] uint8
    """The composite of a relation: weighted inside the two masks, blurred outside."""
    # A bool tensor may hold other bytes than 0 and 1, which arithmetic would use as they are.
    subject_mask, object_mask = (mask.view(torch.uint8) != 0 for mask in (subject_mask, object_mask))
    weight = region_weight(subject_mask, object_mask, sigma)
    inside = (subject_mask | object_mask)[:, :, None]
    focused = (image * weight[:, :, None]).floor().to(torch.uint8)
    return torch.where(inside, focused, gaussian_blur(image, weights, published))


def resize_matrix(
    source: int,  # pixels before the resize
    resized: int,  # pixels after it
    first: int,  # the first resized pixel to compute
    count: int,
    device: torch.device,
) -> Tensor:  # [count, source] float64, integers
    """The weights of an antialiased bicubic resize (a = -0.5) along one axis, in Pillow's units of 2^-22."""
    scale = source / resized
    stretch = max(scale, 1.0)
    centre = (torch.arange(first, first + count, dtype=torch.float64, device=device)[:, None] + 0.5) * scale
    low = (centre - 2 * stretch + 0.5).trunc().clamp(min=0)
    high = (centre + 2 * stretch + 0.5).trunc().clamp(max=source)
    x = torch.arange(source, dtype=torch.float64, device=device)
    distance = ((x - centre + 0.5) * (1 / stretch)).abs()
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weight = weight * ((x >= low) & (x < high))
    weight = weight / weight.sum(1, keepdim=True)
    return (weight * 2**RESIZE_BITS + 0.5 * weight.sign()).trunc()


def resize(
    image: Tensor,  # [h, w, 3] uint8
    width: int,
    height: int,
    left: int,
    top: int,
    size: int,
) -> Tensor:  # [3, size, size] uint8
    """Resize to width x height as Pillow does, and return the square of `size` at (left, top)."""
    horizontal = resize_matrix(image.shape[1], width, left, size, image.device)
    vertical = resize_matrix(image.shape[0], height, top, size, image.device)
    # Integers below 2^53: float64 is exact in any order of summation.
    rows = _to_bytes(image.permute(2, 0, 1).double() @ horizontal.T)
    return _to_bytes(vertical @ rows).to(torch.uint8)


def _to_bytes(fixed: Tensor) -> Tensor:
    return ((fixed + 2 ** (RESIZE_BITS - 1)) / 2**RESIZE_BITS).floor().clamp(0, 255)


def adjust_colours(
    pixels: Tensor,  # [3, S, S] float in [0, 1]
    augment: Sequence[float],  # brightness, contrast, saturation, hue
) -> Tensor:
    """Adjust brightness, contrast, saturation and hue, in this order, each clamped to [0, 1]."""
    brightness, contrast, saturation, hue = augment
    grey = torch.tensor(GREY, dtype=pixels.dtype, device=pixels.device)[:, None, None]
    if brightness != 1:
        pixels = (brightness * pixels).clamp(0, 1)
    if contrast != 1:
        mean = (pixels * grey).sum(0).mean()
        pixels = (contrast * pixels + (1 - contrast) * mean).clamp(0, 1)
    if saturation != 1:
        pixels = (saturation * pixels + (1 - saturation) * (pixels * grey).sum(0)).clamp(0, 1)
    if hue != 0:
        pixels = _rotate_hue(pixels, hue)
    return pixels


def _rotate_hue(pixels: Tensor, turns: float) -> Tensor:
    """Rotate the hue of HSV by `turns` full turns."""
    red, green, blue = pixels
    value = pixels.amax(0)
    chroma = value - pixels.amin(0)
    divisor = torch.where(chroma > 0, chroma, 1)
    sextant = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    offset = torch.tensor([5.0, 3.0, 1.0], dtype=pixels.dtype, device=pixels.device)[:, None, None]
    k = torch.remainder(sextant + 6 * turns + offset, 6)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def augmentation_blur(
    pixels: Tensor,  # [3, S, S] float
    sigma: float,
) -> Tensor:
    """Blur with a Gaussian of 9 taps on both axes; the border is mirrored about the edge pixel."""
    size = pixels.shape[-1]
    period = max(2 * size - 2, 1)
    k = torch.arange(-AUGMENT_RADIUS, AUGMENT_RADIUS + 1, device=pixels.device)
    gaussian = torch.exp(-0.5 * (k / sigma) ** 2).to(pixels.dtype)
    gaussian = gaussian / gaussian.sum()
    index = (torch.arange(size, device=pixels.device)[:, None] + k) % period
    index = torch.minimum(index, period - index)
    pixels = (pixels[:, :, index] * gaussian).sum(-1)
    return (pixels[:, index, :] * gaussian[:, None]).sum(2)


def expand_runs(
    runs: Tensor,  # [R] int32, starting with zeros
    height: int,
    width: int,
) -> Tensor:  # [height, width] bool
    """Decode a mask from its column-order run lengths."""
    value = torch.arange(runs.numel(), device=runs.device) % 2 == 1
    return value.repeat_interleave(runs.long()).reshape(width, height).T


def composite(
    image: Tensor,  # [H, W, 3] uint8
    view: Sequence[int],  # a row of the plan
    masks: Sequence[Tensor],  # two [H, W] bool for a relation
    sigma: float,
    weights: Sequence[int],
    published: bool,
) -> Tensor:  # [h, w, 3] uint8, the view's source window
    """Compose a view's source window, before the resize."""
    height, width = image.shape[:2]
    if view[KIND] == MASKED:
        box = (slice(view[BOX_Y1], view[BOX_Y2]), slice(view[BOX_X1], view[BOX_X2]))
        inside = torch.zeros_like(image)
        inside[box] = image[box]
        image = inside
    elif view[KIND] == RELATION:
        image = focused_region(image, masks[0], masks[1], sigma, weights, published)
    x1, y1, x2, y2 = view[X1], view[Y1], view[X2], view[Y2]
    window = image.new_zeros(y2 - y1, x2 - x1, 3)
    top, bottom, left, right = max(y1, 0), min(y2, height), max(x1, 0), min(x2, width)
    window[top - y1 : bottom - y1, left - x1 : right - x1] = image[top:bottom, left:right]
    return window


def render_views(
    images: Sequence[Tensor],  # [H_i, W_i, 3] uint8
    plan: Tensor,  # [V, 16] int32
    augment: Tensor,  # [V, 5] float32
    mask_runs: Tensor,  # [R] int32
    mask_start: Tensor,  # [M + 1] int64
    mean: Sequence[float],
    std: Sequence[float],
    sigma: float,
    weights: Sequence[int],
    published: bool,
    out: Tensor,  # [V, 3, S, S]
) -> None:
    """Render every view of the plan into `out`: composite, resize, adjust colours, blur, normalise."""
    device, size = out.device, out.shape[-1]
    centre = torch.tensor(mean, device=device)[:, None, None]
    spread = torch.tensor(std, device=device)[:, None, None]
    start = mask_start.tolist()
    for v, (view, augmentation) in enumerate(zip(plan.tolist(), augment.tolist(), strict=True)):
        image = images[view[IMAGE]]
        height, width = image.shape[:2]
        masks = [
            expand_runs(mask_runs[start[m] : start[m + 1]].to(device), height, width)
            for m in (view[MASK_1], view[MASK_2])
            if m >= 0
        ]
        window = composite(image, view, masks, sigma, weights, published)
        pixels = resize(window, view[WIDTH], view[HEIGHT], view[LEFT], view[TOP], size).float() / 255
        pixels = adjust_colours(pixels, augmentation[:BLUR])
        if augmentation[BLUR] > 0:
            pixels = augmentation_blur(pixels, augmentation[BLUR])
        out[v] = (pixels - centre) / spread
