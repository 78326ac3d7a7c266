"""How the ranks of one start find each other in the store that all see, whatever an earlier start has left there."""

import os
import secrets
import socket
import sys
import time
from datetime import timedelta

import torch.distributed as dist

ORPHAN = "torchrun is gone"


def shared_store(timeout, is_master=False):
    """A connection of its own to the store that all ranks see; `timeout` seconds are what it waits, for it or in it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not is_master:
        wait_for(address, port, timeout)
    return dist.TCPStore(address, port, is_master=is_master, timeout=timedelta(seconds=timeout))


def wait_for(address, port, timeout):
    """Until somebody listens there; DistNetworkError after `timeout` seconds. In TCPStore signals would go unheard."""
    end = time.monotonic() + timeout
    while not is_orphan():
        try:
            return socket.create_connection((address, port), timeout=5).close()
        except OSError as error:
            if time.monotonic() > end:
                raise dist.DistNetworkError(f"failed to connect in {timeout:g} s: {error}") from None
        time.sleep(0.1)
    raise dist.DistStoreError(ORPHAN)


def is_orphan():
    """Whether torchrun, by which this rank was started, is gone."""
    early = sys.modules.get("gpt2.early")
    return "TORCHELASTIC_RUN_ID" in os.environ and early is not None and os.getppid() != early.parent


def meeting_point(rank, size, timeout):
    """(name, store) of this start, once all ranks are there; DistStoreError where one is not, `timeout` seconds later.

    The store holds nothing of other starts. torchrun keeps one for all: in it a rank may find the address of one that
    has died.
    """
    at_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = shared_store(timeout, is_master=rank == 0 and not at_agent)
    name = meet(store, rank, size, timeout)
    return name, dist.PrefixStore(name, store)


def meet(store, rank, size, timeout):
    """A name for this start of the ranks. torchrun's count of restarts is none: of two machines, the one whose rank
    died counts, the other follows it. So rank 0 makes up a name, and each of the others asks for it by a token that
    it has made up itself: an answer to it is of this start."""
    mine, end = secrets.token_hex(8), time.monotonic() + timeout
    if rank:
        store.set(f"asks/{rank}", mine)
    while time.monotonic() < end:  # awake, so that signals are heard
        if is_orphan():
            raise dist.DistStoreError(ORPHAN)
        if rank and store.check([f"answer/{mine}"]):
            name = store.get(f"answer/{mine}").decode()
            store.set(f"{name}/here/{rank}", "")
            return name
        if rank == 0:
            missing = [other for other in range(1, size) if not store.check([f"{mine}/here/{other}"])]
            if not missing:
                return mine
            for other in filter(lambda other: store.check([f"asks/{other}"]), missing):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", mine)
        time.sleep(0.02)
    late = f"ranks {', '.join(map(str, missing))} have" if rank == 0 else "rank 0 has"
    raise dist.DistStoreError(f"{late} not come in {timeout:g} s")
