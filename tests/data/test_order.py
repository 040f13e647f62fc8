from __future__ import annotations

from itertools import chain, zip_longest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scenarioclip_fast.data.order import Order, epoch_order
from scenarioclip_fast.data.splitmix64 import hash64, splitmix64, uniforms


def test_order_is_a_permutation_determined_by_seed_and_epoch() -> None:
    a = epoch_order(1000, seed=3, epoch=5)
    assert sorted(a.tolist()) == list(range(1000))
    assert np.array_equal(a, epoch_order(1000, seed=3, epoch=5))
    for other in (epoch_order(1000, 3, 6), epoch_order(1000, 4, 5)):
        assert (a == other).mean() < 0.02
    # The orders of adjacent epochs must be uncorrelated.
    b = epoch_order(1000, seed=3, epoch=6)
    assert abs(np.corrcoef(np.argsort(a), np.argsort(b))[0, 1]) < 0.12  # 0.12 is four standard deviations at n = 1000
    assert np.array_equal(epoch_order(5, 0, 0, shuffle=False), np.arange(5))


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
    orders = [Order(n, batch, seed=1, rank=r, world_size=world, drop_last=drop_last) for r in range(world)]
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
    shares = [Order(n, batch, 9, r, after).share(0, position).tolist() for r in range(after)]
    dealt = [x for x in chain.from_iterable(zip_longest(*shares)) if x is not None]
    assert dealt == epoch_order(n, 9, 0)[position:].tolist()


def test_invalid_arguments() -> None:
    with pytest.raises(ValueError, match="batch_size: got 0"):
        Order(4, 0)
    with pytest.raises(ValueError, match="rank: got 2 of world_size 2"):
        Order(4, 1, rank=2, world_size=2)
