"""What a model is asked, and the picture that it is shown."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from torch import Tensor

from scenarioclip_fast.generate.config import CaptionConfig
from scenarioclip_fast.generate.images import shrunk_size
from scenarioclip_fast.requirements import require

if TYPE_CHECKING:
    from PIL import Image

MAX_RELATIONS = 64

_PUBLISHED_SIDE = 448
_QUALITY = 95  # as good as unchanged to a model; 90 and below are visible in flat areas
_JPEG_START = b"\xff\xd8\xff"

_DEFAULT = """\
Describe the scene in this image as one JSON object with these four members:
- "caption": one or two sentences that describe what happens, who or what takes part, and where.
- "action": the main action as a short phrase that begins with a verb ending in "-ing", such as "riding a bicycle" or \
"cooking"; if nothing happens, the state of the scene, such as "standing" or "lying on a table".
- "objects": the most important things that are visible, at most {objects}. Each name is a singular noun, with an \
adjective only where it is needed to tell two things apart: "dog", "red cup". Each name occurs once. Name only what \
can be seen and outlined: no feelings, no events, no weather, no "background" or "scene".
- "relations": how the objects relate to each other, as a list of [subject, predicate, object]. Subject and object are \
two different names from "objects", spelled exactly as there. The predicate is a short verb or preposition, such as \
"riding", "holding" or "next to". State only what the image shows, and each relation once, in one direction.
Answer with the JSON object alone, like this:
{{"caption": "A woman in a park throws a frisbee for her dog.", "action": "throwing a frisbee", "objects": ["woman", \
"dog", "frisbee"], "relations": [["woman", "throwing", "frisbee"], ["dog", "chasing", "frisbee"]]}}"""

# The contents of the published prompt, in other words.
_PUBLISHED = """\
Look at the image and answer with one JSON object with these members:
- "objects": the unique objects in the image, at most {objects}.
- "relations": triplets [subject, relation, object] between these objects.
- "action": the broad action of the image, in one word such as "playing" or "eating".
- "dense caption": a description of the image in one or two sentences.
Answer with nothing but the JSON object."""


def prompt_text(config: CaptionConfig) -> str:
    """The instructions that follow the image."""
    text = _PUBLISHED if config.prompt == "published" else _DEFAULT
    return text.format(objects=config.max_objects)


def answer_schema(config: CaptionConfig) -> dict[str, Any]:
    """The JSON schema of an answer.

    A model that is held to it writes the members in this order, so that an answer that is cut off loses only
    relations. The lengths of the lists keep a model from repeating itself until it is cut off.
    """
    text = {"type": "string"}
    objects = {"type": "array", "items": text, "minItems": 1, "maxItems": config.max_objects}
    triplet = {"type": "array", "items": text, "minItems": 3, "maxItems": 3}
    caption = "dense caption" if config.prompt == "published" else "caption"
    members = {
        caption: text,
        "action": text,
        "objects": objects,
        "relations": {"type": "array", "items": triplet, "minItems": 1, "maxItems": MAX_RELATIONS},
    }
    return {"type": "object", "properties": members, "required": list(members), "additionalProperties": False}


def picture(
    pixels: Tensor,  # uint8 [H, W, 3]
    config: CaptionConfig,
) -> Image.Image:
    """The image in the size in which the model sees it: resized if its longer side exceeds `image_side`."""
    height, width = pixels.shape[:2]
    pillow = require("PIL.Image")
    image: Image.Image = pillow.fromarray(pixels.numpy())
    if (size := _sent_size(height, width, config)) != (width, height):
        image = image.resize(size, pillow.Resampling.BICUBIC)
    return image


def encoded_picture(
    data: bytes,
    pixels: Tensor,  # uint8 [H, W, 3]
    config: CaptionConfig,
) -> bytes:
    """The same as a JPEG; `data`, the encoded image, if it is one of the right size."""
    height, width = pixels.shape[:2]
    if data.startswith(_JPEG_START) and _sent_size(height, width, config) == (width, height):
        return data
    buffer = io.BytesIO()
    picture(pixels, config).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _sent_size(height: int, width: int, config: CaptionConfig) -> tuple[int, int]:
    """Width and height, in the order of Pillow."""
    if config.prompt == "published":
        return _PUBLISHED_SIDE, _PUBLISHED_SIDE
    height, width = shrunk_size(height, width, config.image_side)
    return width, height
