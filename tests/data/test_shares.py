"""Scenes of a global batch are distributed so that ranks get about the same number of views."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest

from scenarioclip_fast.data.order import Mix, Order
from scenarioclip_fast.data.shares import assign

# As in 128 annotated photos: 7.7 objects and relations in the mean, with a standard deviation of 3.7.
MEAN, DEVIATION = 7.7, 3.7


def random_views(n: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    ratio = DEVIATION**2 / MEAN
    found = np.random.default_rng(seed).gamma(MEAN / ratio, ratio, n)
    return np.clip(np.round(found), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("n", [0, 1, 5, 7, 64, 100, 1000])
@pytest.mark.parametrize("ranks", [1, 2, 7, 64])
def test_ranks_get_equally_many_scenes(n: int, ranks: int) -> None:
    counts = np.bincount(assign(random_views(n), ranks), minlength=ranks)
    assert counts.tolist() == [len(range(rank, n, ranks)) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 8, 64, 512])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_get_about_the_same_number_of_views(ranks: int, seed: int) -> None:
    """128 scenes on each."""
    views = random_views(128 * ranks, seed)
    loads = np.bincount(assign(views, ranks), weights=views)
    assert loads.max() < 1.01 * loads.mean()
    if ranks >= 8:
        assert max(views[rank::ranks].sum() for rank in range(ranks)) > 1.03 * loads.mean()  # without balance


def test_a_scene_with_very_many_views() -> None:
    views = np.array([255, *[1] * 7], np.uint8)
    assert assign(views, 2).tolist() == [0, 1, 1, 0, 1, 0, 1, 0]
    assert assign(np.zeros(4, np.uint8), 2).tolist() == [0, 1, 0, 1]


SIZES = [(3, 1, 100), (5, 4, 203), (2, 7, 97), (16, 3, 47), (4, 2, 3)]


@pytest.mark.parametrize(("batch_size", "ranks", "scenes"), SIZES)
@pytest.mark.parametrize("shuffle", ["scenes", "none", "sorted"])
def test_the_global_batches_are_those_without_balance(batch_size: int, ranks: int, scenes: int, shuffle: Any) -> None:
    """Also the last one, which is smaller, and for any slices of a share."""
    mix, views = Mix((scenes - 2, 2), (1.0, 2.5)), random_views(scenes)
    orders = [Order(mix, batch_size, 3, rank, ranks, shuffle) for rank in range(ranks)]
    for position in (0, batch_size * ranks, 11):
        balanced = [replace(order, views=views).share(1, position) for order in orders]
        plain = [order.share(1, position) for order in orders]
        assert [len(share) for share in balanced] == [len(share) for share in plain]
        for start in range(0, max(map(len, plain)), batch_size):
            parts = [[part[start : start + batch_size].tolist() for part in shares] for shares in (balanced, plain)]
            assert sorted(chain.from_iterable(parts[0])) == sorted(chain.from_iterable(parts[1]))
        for share in balanced:
            whole = share[:]
            assert share[:0].tolist() == [] == share[len(share) :].tolist()
            assert share.tolist() == whole.tolist() and share[1:2].tolist() == whole[1:2].tolist()
            for start in (0, 1, batch_size - 1, batch_size, 2 * batch_size + 1):
                assert share[start : start + 5].tolist() == whole[start : start + 5].tolist()
                assert share.skip(start)[:].tolist() == whole[start:].tolist()
                assert share.skip(start).skip(1)[2:9:3].tolist() == whole[start + 1 :][2:9:3].tolist()


def test_scenes_of_a_rank_stay_in_the_order_of_the_epoch() -> None:
    """Otherwise the first microbatch would have the scenes with most views."""
    views = random_views(200)
    order = Order(Mix((200,), (1.0,)), 20, 0, 1, 4, "none", views=views)
    share = order.share(0)[:20]
    assert (np.diff(share) > 0).all()


def test_a_batch_is_computed_once_for_adjacent_slices() -> None:
    calls = []
    order = Order(Mix((400,), (1.0,)), 20, 0, 1, 4, views=random_views(400))
    share = order.share(0)
    at = share._at
    share._at = lambda positions: calls.append(len(positions)) or at(positions)  # type: ignore[func-returns-value]
    found = [i for start in range(0, 40, 8) for i in share[start : start + 8].tolist()]
    assert calls == [80, 80] and found == order.share(0)[:40].tolist()
