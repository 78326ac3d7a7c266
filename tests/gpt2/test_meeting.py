"""The ranks of one start find each other in a store that still holds what earlier starts have left there."""

import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from gpt2 import meeting
from gpt2.meeting import meet
from tests.zygote import port


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


def test_who_keeps_the_store_may_come_later():
    later = socket.socket()
    later.bind(("localhost", 0))
    with pytest.raises(dist.DistNetworkError, match="failed to connect in 0.2 s"):
        meeting.wait_for(*later.getsockname(), 0.2)
    threading.Timer(0.3, later.listen).start()
    with later:
        meeting.wait_for(*later.getsockname(), 20)


def test_ranks_whose_torchrun_was_killed_wait_for_nobody(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setitem(sys.modules, "gpt2.early", SimpleNamespace(parent=os.getppid()))
    assert not meeting.is_orphan()
    monkeypatch.setitem(sys.modules, "gpt2.early", SimpleNamespace(parent=-1))
    with pytest.raises(dist.DistStoreError, match="torchrun is gone"):
        meet(dist.HashStore(), 0, 2, 20.0)
    with pytest.raises(dist.DistStoreError, match="torchrun is gone"):
        meeting.wait_for("localhost", port(), 20.0)
