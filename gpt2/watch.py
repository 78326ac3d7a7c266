"""Ends a run that has stopped moving, and names the rank that holds up the others."""

import os
import signal
import socket
import sys
import threading

import torch.distributed as dist

from gpt2.meeting import is_orphan, shared_store


class Watch:
    """A thread on every rank: tells the others that this rank lives and how far it is, and sees whether it moves on.

    progress: a function that gives a number which changes while the run moves, and 0 before it is watched; timeout:
    seconds without a change after which the process ends with code 1. A rank whose thread is silent is stopped, or its
    machine is gone; where all threads speak, the one that is least far is the one that hangs. The time counted is that
    of this process: what pauses all of them at once is no fault.

    It also sees when torchrun is killed and leaves its ranks alone, where nobody would find them. On one machine they
    are asked to stop; of several machines this one counts as lost.
    """

    def __init__(self, world, progress, timeout):
        self.world, self.progress, self.timeout = world, progress, timeout
        self.beat, self.beats, self.ended = min(2.0, timeout / 5), 0, threading.Event()
        self.store = dist.PrefixStore(f"{world.start}/watch", shared_store(30))
        self.store.set(f"name/{world.rank}", f"rank {world.rank} ({socket.gethostname()}, pid {os.getpid()})")
        self.tell()
        threading.Thread(target=self.run, name="watch", daemon=True).start()

    def end(self):
        self.ended.set()

    def run(self):
        seen, still = self.progress(), 0.0
        while not self.ended.wait(self.beat):
            if is_orphan():
                return self.orphaned()
            try:
                self.tell()
                now = self.progress()
                still = still + self.beat if now == seen and now else 0.0
                seen = now
                if still > self.timeout and (culprits := self.look()) and self.progress() == seen:
                    self.leave(culprits)
            except RuntimeError:  # the store is gone, and with it the rank or the agent that kept it: so is the run
                return

    def orphaned(self):
        if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            os._exit(1)

    def tell(self):
        self.beats += 1
        self.store.set(f"beat/{self.world.rank}", f"{self.beats} {self.progress()}")

    def look(self):
        """Which ranks are to blame, and a word for it; nothing where the run has been let go in between."""
        before = self.read()
        if self.ended.wait(6.0):  # a machine under load may keep a thread from its turn for seconds
            return None
        self.tell()
        after = self.read()
        silent = [rank for rank, beat in after.items() if beat == before[rank] and rank != self.world.rank]
        if silent:
            return silent, "does not respond"
        progress = {rank: int(beat.split()[1]) for rank, beat in after.items()}
        return [rank for rank in progress if progress[rank] == min(progress.values())], "has come no further"

    def read(self):
        return {rank: self.store.get(f"beat/{rank}").decode() for rank in range(self.world.size)}

    def leave(self, found):
        """Say it, once for all ranks that can speak, and end."""
        culprits, what = found
        speaker = min(rank for rank in range(self.world.size) if rank not in culprits or what != "does not respond")
        names = ", ".join(self.store.get(f"name/{rank}").decode() for rank in culprits[:8])
        if self.world.rank == speaker:
            print(
                f"train_gpt2.py: error: no step in {self.timeout:g} s (dist_timeout_s): {names} {what}; "
                "the same command continues from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        else:
            self.ended.wait(2)
        os._exit(1)
