from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import chain, zip_longest
from math import gcd

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scenarioclip_fast.data.order import Kind, Mix, Order
from scenarioclip_fast.data.splitmix64 import hash64, splitmix64, uniforms


def alone(scenes: int) -> Mix:
    return Mix((scenes,), (1,))


def epoch_order(scenes: int, seed: int, epoch: int, shuffle: Kind = "scenes") -> npt.NDArray[np.int64]:
    return np.array(Order(alone(scenes), 1, seed, shuffle=shuffle).share(epoch).tolist(), np.int64)


def test_order_is_a_permutation_determined_by_seed_and_epoch() -> None:
    a = epoch_order(1000, seed=3, epoch=5)
    assert sorted(a.tolist()) == list(range(1000))
    assert np.array_equal(a, epoch_order(1000, seed=3, epoch=5))
    for other in (epoch_order(1000, 3, 6), epoch_order(1000, 4, 5)):
        assert (a == other).mean() < 0.02
    # The orders of adjacent epochs must be uncorrelated.
    b = epoch_order(1000, seed=3, epoch=6)
    assert abs(np.corrcoef(np.argsort(a), np.argsort(b))[0, 1]) < 0.12  # 0.12 is four standard deviations at n = 1000
    assert np.array_equal(epoch_order(5, 0, 0, shuffle="none"), np.arange(5))


def test_order_has_fixed_values() -> None:
    """Checkpoints must be resumable with other library versions, so the values are fixed."""
    assert epoch_order(8, seed=1, epoch=2).tolist() == [7, 5, 6, 1, 4, 3, 0, 2]
    assert hash64(1, 2, 3) == 15020427595393229491
    assert hash64(1, 2, 3) != hash64(3, 2, 1)
    assert 0 <= hash64(-1) < 2**64


def test_splitmix64_reference_values() -> None:
    """The first outputs of the published generator for seed 1234567 (Vigna's splitmix64.c)."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    state = np.array([1234567], np.uint64)
    assert int(splitmix64(state)[0]) == expected[0]
    assert uniforms(state, 4).tolist() == [[(x >> 11) * 2.0**-53 for x in expected]]


@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 5), st.booleans())
def test_ranks_together_traverse_the_global_order(n: int, batch: int, world: int, drop_last: bool) -> None:
    orders = [Order(alone(n), batch, seed=1, rank=r, world_size=world, drop_last=drop_last) for r in range(world)]
    assert len({o.batches() for o in orders}) == 1
    shares = [o.share(4).tolist() for o in orders]
    dealt = [x for x in chain.from_iterable(zip_longest(*shares)) if x is not None]
    assert dealt == epoch_order(n, 1, 4).tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    full = orders[0].batches() * batch
    assert all(len(s) >= full for s in shares) if drop_last else all(len(s) <= full for s in shares)


@given(st.integers(0, 40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_another_world_size_resumes_the_same_order(n: int, steps: int, batch: int, before: int, after: int) -> None:
    position = min(steps * batch * before, n)
    shares = [Order(alone(n), batch, 9, r, after).share(0, position).tolist() for r in range(after)]
    dealt = [x for x in chain.from_iterable(zip_longest(*shares)) if x is not None]
    assert dealt == epoch_order(n, 9, 0)[position:].tolist()


def test_invalid_arguments() -> None:
    with pytest.raises(ValueError, match="batch_size: got 0"):
        Order(alone(4), 0)
    with pytest.raises(ValueError, match="rank: got 2 of world_size 2"):
        Order(alone(4), 1, rank=2, world_size=2)


SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=4)
WEIGHTS = st.sampled_from((1, 2, 3, 0.5, 0.3, 1.5, 2.7))


def mixes() -> st.SearchStrategy[Mix]:
    return SIZES.flatmap(
        lambda sizes: st.lists(WEIGHTS, min_size=len(sizes), max_size=len(sizes)).map(
            lambda weights: Mix(tuple(sizes), tuple(weights))
        )
    )


def counts_by_set(mix: Mix, occurrences: list[int]) -> list[Counter[int]]:
    """Occurrences of each set's scenes, by their number within the set."""
    scenes, first, found = Counter(i % max(1, sum(mix.sizes)) for i in occurrences), 0, []
    for size in mix.sizes:
        found.append(Counter({i: scenes[first + i] for i in range(size)}))
        first += size
    return found


@given(mixes(), st.integers(0, 3), st.integers(0, 50))
def test_an_epoch_of_a_mix_has_each_set_as_often_as_its_weight_says(mix: Mix, seed: int, epoch: int) -> None:
    total = sum(mix.sizes)
    found = mix.occurrences(seed, epoch).tolist()
    assert len(found) == len(mix) == sum(round(w * n) for w, n in zip(mix.weights, mix.sizes, strict=True))
    for counts, size, count in zip(counts_by_set(mix, found), mix.sizes, mix.counts, strict=True):
        assert counts.total() == count
        assert all(n in (count // size, -(-count // size)) for n in counts.values())
    # The occurrences of a scene are numbered from 0.
    numbers = Counter(i % total for i in found)
    assert sorted(found) == sorted(i + r * total for i, n in numbers.items() for r in range(n))


@given(mixes(), st.integers(0, 3), st.integers(0, 50))
def test_over_epochs_each_scene_of_a_set_occurs_equally_often(mix: Mix, seed: int, first: int) -> None:
    for number, (size, count) in enumerate(zip(mix.sizes, mix.counts, strict=True)):
        if size:
            epochs = size // gcd(size, count)
            found = list(chain.from_iterable(mix.occurrences(seed, first + e).tolist() for e in range(epochs)))
            assert set(counts_by_set(mix, found)[number].values()) == {epochs * count // size}


def test_half_of_a_set_alternates_and_depends_on_the_seed() -> None:
    mix = Mix((100,), (0.5,))
    halves = [set(mix.occurrences(7, epoch).tolist()) for epoch in range(4)]
    assert halves[0] | halves[1] == set(range(100)) and halves[2:] == halves[:2]
    others = [set(mix.occurrences(8, 0).tolist()), set(Mix((100, 100), (1, 0.5)).occurrences(7, 0).tolist())]
    for other, start in zip(others, (0, 100), strict=True):  # also on the set's number
        shared = {i % 100 for i in other if i >= start} & halves[0]
        assert len(shared) < 40  # six standard deviations above the mean of independent halves, 25


def test_the_order_of_a_mix_has_fixed_values() -> None:
    """As for one set; and one set of weight 1 keeps its order."""
    assert Order(alone(8), 2, seed=1).share(2).tolist() == [7, 5, 6, 1, 4, 3, 0, 2]
    mix = Mix((4, 3), (1.5, 0.5))
    assert Order(mix, 2, seed=1).share(2).tolist() == [5, 7, 6, 1, 8, 3, 0, 2]
    assert Order(mix, 2, seed=1, shuffle="none").share(2).tolist() == [0, 1, 2, 3, 8, 7, 6, 5]


def shards_of(mix: Mix, size: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Shards of `size` scenes, the last one of what is left; an empty one in between."""
    return tuple(np.array([size] * (n // size) + [0, n % size], np.int64) for n in mix.sizes)


KINDS: list[Kind] = ["scenes", "shards", "sorted", "none"]


@given(mixes(), st.integers(1, 4), st.integers(0, 30), st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 3))
def test_a_mix_has_the_same_order_for_any_number_of_ranks(
    mix: Mix, batch: int, position: int, shuffle: Kind, size: int, window: int
) -> None:
    def make(batch: int, rank: int = 0, world: int = 1) -> Order:
        return Order(mix, batch, 9, rank, world, shuffle, shards=shards_of(mix, size), window=window)

    def order(world: int) -> list[int]:
        shares = [make(batch, r, world).share(3, position).tolist() for r in range(world)]
        return [x for x in chain.from_iterable(zip_longest(*shares)) if x is not None]

    expected = order(1)
    assert all(order(world) == expected for world in (2, 3, 5))
    whole = make(batch).share(3).tolist()
    assert whole[position:] == expected
    if shuffle != "shards":
        assert Counter(whole) == Counter(mix.occurrences(9, 3).tolist())


@settings(deadline=None)  # up to 40 epochs
@given(mixes(), st.integers(0, 3), st.integers(0, 9), st.integers(1, 5), st.integers(1, 4))
def test_an_epoch_in_the_order_of_shards_has_each_set_as_often_as_its_weight_says(
    mix: Mix, seed: int, epoch: int, size: int, window: int
) -> None:
    total, shards = sum(mix.sizes), shards_of(mix, size)

    def found(epoch: int) -> list[int]:
        return Order(mix, 1, seed, shuffle="shards", shards=shards, window=window).share(epoch).tolist()

    whole = found(epoch)
    assert len(whole) == len(mix)
    for counts, scenes, count in zip(counts_by_set(mix, whole), mix.sizes, mix.counts, strict=True):
        assert counts.total() == count
        assert all(n in (count // scenes, -(-count // scenes)) for n in counts.values())
    numbers = Counter(i % total for i in whole)
    assert sorted(whole) == sorted(i + r * total for i, n in numbers.items() for r in range(n))
    for number, (scenes, count) in enumerate(zip(mix.sizes, mix.counts, strict=True)):
        if scenes:
            epochs = scenes // gcd(scenes, count)
            over = [counts_by_set(mix, found(epoch + e))[number] for e in range(epochs)]
            assert set(sum(over, Counter()).values()) == {epochs * count // scenes} - {0}


def test_a_window_holds_the_scenes_of_a_few_shards() -> None:
    """And every shard is in one window only."""
    shards, size, window = 50, 40, 8
    sizes = np.full(shards, size)
    order = Order(alone(shards * size), 1, 3, shuffle="shards", shards=(sizes,), window=window).share(0)
    found = np.array(order.tolist())
    windows = [set((found[start : start + window * size] // size).tolist()) for start in range(0, 2000, window * size)]
    assert [len(one) for one in windows] == [8, 8, 8, 8, 8, 8, 2] and sum(map(len, windows)) == shards
    assert set.union(*windows) == set(range(shards))
    inside = found[: window * size] // size
    assert len(set(inside[:window].tolist())) > window // 2, "shuffled within the window"
    other = Order(alone(shards * size), 1, 3, shuffle="shards", shards=(sizes,), window=window).share(1)
    assert set((other[: window * size] // size).tolist()) != windows[0]


def test_the_order_of_shards_has_fixed_values() -> None:
    order = Order(alone(10), 1, 1, shuffle="shards", shards=(np.array([3, 3, 3, 1]),), window=2)
    assert order.share(2).tolist() == [4, 1, 0, 3, 2, 5, 8, 9, 7, 6]


def test_the_first_scenes_of_a_hundred_million_take_little_memory() -> None:
    tracemalloc.start()
    share = Order(alone(100_000_000), 128, 5, rank=3, world_size=8).share(7, position=1_000_000)
    first = share[:4096]
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert len(share) == 99_000_000 // 8 and len(set(first.tolist())) == 4096
    assert np.array_equal(share.skip(100)[:50], first[100:150])
