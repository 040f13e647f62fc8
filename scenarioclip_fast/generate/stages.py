"""What a stage of the pipeline is: it turns works, one per image, into outcomes, in any order.

A stage that loads a model does so in `run`, not in its constructor, so that it can be sent to other processes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from scenarioclip_fast.data.check import BadEntry, SceneChecker
from scenarioclip_fast.data.config import MAX_PIXELS
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.images import Item

# reason -> description of rejected images, objects and relations; the reasons of `data.check.REASONS` for images are
# used as well.
REASONS = {
    "image_changed": "the image is missing, unreadable or has another size than when it was listed",
    "server_error": "the server failed, also when the request was repeated",
    "server_timeout": "the server did not answer in time, also when the request was repeated",
    "request_refused": "the server refused the request",
    "context_exceeded": "the prompt and the image are longer than the model's context",
    "answer_truncated": "the answer was cut off at caption.max_tokens and cannot be parsed",
    "answer_not_json": "the answer contains no JSON object",
    "answer_malformed": "the JSON does not have the form that was asked for",
    "no_objects": "no objects were named",
    "no_relations": "no relations were named, or none was left",
    "no_boxes": "the detector found none of the objects",
    "no_masks": "the segmenter found none of the objects",
    "too_few_relations": "fewer relations were left than curate.min_relations",
    "not_annotated": "the image has no record to take annotations from",
    "rejected_by_hand": "rejected on the review page, or removed from an exported COCO file",
    "unnamed_object": "the object's name is empty",
    "low_box_score": "the detector's score is below curate.min_box_score",
    "low_mask_score": "the mask's predicted IoU is below curate.min_mask_score",
    "no_mask": "the object has no mask",
    "small_mask": "the mask is smaller than curate.min_mask_pixels or curate.min_mask_fraction",
    "mask_not_in_box": "the mask's bounds and the box differ more than curate.min_agreement allows",
    "duplicate_object": "the mask is that of a better object of the same name, which takes over the relations",
    "unused_object": "no relation uses the object",
    "unknown_end": "no object has the name of the relation's subject or object",
    "end_dropped": "the relation's subject or object was dropped",
    "same_ends": "the relation's subject and object are one object, or too near to each other",
    "empty_predicate": "the relation's predicate is empty",
    "long_predicate": "the relation's predicate is a sentence",
    "duplicate_relation": "an earlier relation has the same ends and predicate",
}


@dataclass(frozen=True)
class Work:
    """One image of a stage: where it is, and the results of the stages before by their names."""

    item: Item
    records: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return self.item.key


@dataclass(frozen=True)
class Outcome:
    """The result of a stage for one image: a JSON object, or the reason of its rejection.

    Attributes:
        reason: a key of REASONS or of `data.check.REASONS`; empty: not rejected.
        retry: the next run tries this image again.
    """

    key: str
    result: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    detail: str = ""
    retry: bool = False


@runtime_checkable
class Stage(Protocol):
    """A stage of the pipeline. Picklable, until `run` is called."""

    name: ClassVar[str]

    @property
    def counts(self) -> dict[str, float]:
        """What to report besides images: requests, retries, tokens, boxes, ...; summed over processes."""
        ...

    def run(self, works: Iterator[Work]) -> Iterator[Outcome]:
        """Yield the outcome of each work, in any order, reading ahead no further than it needs.

        Raises:
            UserError: the stage cannot go on: no such model, the server is down, ... Finished outcomes are kept.
        """
        ...

    def close(self) -> None:
        """Free the model and connections."""
        ...


class Images:
    """Reads and decodes the images of works, with the checks of `pack`."""

    def __init__(self) -> None:
        self._checker = SceneChecker(MAX_PIXELS)

    def encoded(self, work: Work) -> bytes | Outcome:
        """The encoded bytes of an image, or its rejection."""
        try:
            return work.item.read()
        except OSError as error:
            return Outcome(work.key, reason="image_changed", detail=str(error.strerror or error), retry=True)

    def decoded(self, work: Work) -> Tensor | Outcome:  # uint8 [H, W, 3]
        """The pixels of an image, or its rejection."""
        found = self.both(work)
        return found if isinstance(found, Outcome) else found[1]

    def both(self, work: Work) -> tuple[bytes, Tensor] | Outcome:
        """The encoded bytes and the pixels of an image, which is read once; or its rejection."""
        data = self.encoded(work)
        if isinstance(data, Outcome):
            return data
        try:
            return data, self._checker.decode(data)
        except BadEntry as error:
            return Outcome(work.key, reason=error.reason, detail=error.detail)


def load_class(text: str, key: str) -> Any:
    """Import a detector or segmenter given as MODULE:CLASS; None if `text` is not of this form.

    Raises:
        UserError: it cannot be imported; the message names the config key.
    """
    module, colon, name = text.partition(":")
    if not colon or "/" in text or "\\" in text or not name.isidentifier():
        return None
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # of another package: anything
        hint = "; is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(f"{key}: cannot import {text}: {type(error).__name__}: {error}{hint}") from error
