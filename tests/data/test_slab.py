from __future__ import annotations

import gc

from scenarioclip_fast.data.slab import SlabPool, layout


def test_blocks_are_aligned_and_disjoint() -> None:
    assert layout([1, 256, 0, 257]) == ([0, 256, 512, 512], 1024)
    assert layout([]) == ([], 0)


def test_a_slab_is_reused_only_after_its_last_view_is_gone() -> None:
    pool = SlabPool()
    slab = pool.lend(1000)
    address, view = slab.data_ptr(), slab[100:200].view(10, 10)
    del slab
    gc.collect()
    other = pool.lend(1000)
    assert other.data_ptr() != address
    other.fill_(1)
    view.fill_(7)
    assert bool((other == 1).all())
    del view
    gc.collect()
    assert pool.lend(500).data_ptr() == address


def test_a_closed_pool_keeps_nothing() -> None:
    pool = SlabPool()
    lent, returned = pool.lend(1000), pool.lend(1000)
    del returned
    pool.close()
    lent.fill_(3)
    assert bool((lent == 3).all())
    del lent
    gc.collect()
    assert pool._free == []
