"""What the stages with vision models share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from generate_works import caption, make_works

from scenarioclip_fast.generate.models import FittingBatches, decode_ahead, limit_aspect
from scenarioclip_fast.generate.stages import Outcome, Work


def test_images_are_decoded_in_order_and_not_too_far_ahead(tmp_path: Path) -> None:
    taken: list[str] = []

    def each() -> Iterator[Work]:
        for work in works:
            taken.append(work.key)
            yield work

    def early(work: Work) -> Outcome | None:
        return Outcome(work.key, reason="no_objects") if work.key == "image2" else None

    works = make_works(tmp_path, [caption("dog")] * 8)
    for i, (work, image) in enumerate(decode_ahead(each(), early, 3)):
        assert work is works[i] and len(taken) <= i + 4
        assert isinstance(image, Outcome) == (i == 2)
    assert i == 7


def test_errors_of_the_works_reach_the_caller() -> None:
    def each() -> Iterator[Work]:
        raise RuntimeError("the records are damaged")
        yield

    with pytest.raises(RuntimeError, match="damaged"):
        list(decode_ahead(each(), lambda work: None, 2))


@pytest.mark.parametrize("fits", [1, 2, 3, 5, 100])
def test_batches_shrink_until_they_fit(fits: int) -> None:
    sizes: list[int] = []

    def call(part: list[int]) -> list[int]:
        sizes.append(len(part))
        if len(part) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [2 * n for n in part]

    batches = FittingBatches("x.batch_size", 8)
    assert batches.run(call, list(range(11))) == [2 * n for n in range(11)]
    assert batches.run(call, []) == []
    assert batches.size <= max(fits, 1) or fits > 8
    before = len(sizes)
    batches.run(call, list(range(11)))
    assert all(size <= fits for size in sizes[before:])  # it remembers


@pytest.mark.parametrize(
    ("shape", "padded"),
    [((10, 10), (10, 10)), ((160, 10), (160, 10)), ((161, 10), (161, 11)), ((1, 1000), (63, 1000)), ((33, 1), (33, 3))],
)
def test_long_images_are_padded(shape: tuple[int, int], padded: tuple[int, int]) -> None:
    image = torch.randint(1, 256, (*shape, 3), dtype=torch.uint8)
    found = limit_aspect(image)
    assert found.shape == (*padded, 3)
    assert torch.equal(found[: shape[0], : shape[1]], image)
    assert found.long().sum() == image.long().sum()
