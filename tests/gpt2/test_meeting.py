"""The ranks of one start find each other in a store that still holds what earlier starts have left there."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from gpt2.meeting import meet


def names(store, size, timeout=20.0):
    """What each of so many ranks calls their start."""
    with ThreadPoolExecutor(size) as ranks:
        return [*ranks.map(lambda rank: meet(store, rank, size, timeout), range(size))]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_ranks_agree_on_a_name_that_no_other_start_has(size):
    store, seen = dist.HashStore(), set()
    for _ in range(3):
        (name,) = set(names(store, size))
        assert name not in seen
        seen.add(name)


def test_a_start_whose_ranks_died_on_the_way_misleads_no_later_one():
    store = dist.HashStore()
    for rank, late in ((1, "rank 0 has"), (2, "rank 0 has"), (0, "ranks 1, 2, 3 have")):
        with pytest.raises(dist.DistStoreError, match=f"{late} not come in 0.2 s"):
            meet(store, rank, 4 if rank == 0 else 3, 0.2)
    store.set("asks/2", "of a dead rank")
    assert len(set(names(store, 3))) == 1
