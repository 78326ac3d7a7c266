"""Named points at which the tests make a run fail: `faults.point("before_rename")` does nothing unless it is aimed at.

ADAMWPRUNE_FAULT=NAME:COUNT:WHAT[:RANK], for example after_fsync:3:SIGKILL:0, aims at the COUNT-th passing of a point
(of any point, where NAME is *) on that rank, or on all. WHAT is a signal, which the process sends itself, an error of
the disk (ENOSPC, EROFS, ...), which the point raises, or `hang`. Several are separated by commas. A restart
by torchrun meets them again only with ADAMWPRUNE_FAULT_AGAIN=1.
"""

import errno
import os
import signal
import time


class Aim:
    """One fault and when it happens."""

    def __init__(self, text):
        name, count, self.what, *rank = text.split(":")
        self.name, self.left = name, int(count)
        self.here = not rank or rank[0] == os.environ.get("RANK", "0")
        if "ADAMWPRUNE_FAULT_AGAIN" not in os.environ:
            self.here &= os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def pass_by(self, name):
        if not self.here or self.name not in (name, "*"):
            return
        self.left -= 1
        if self.left:
            return
        if self.what == "hang":
            while True:
                time.sleep(3600)
        if self.what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.what))
            return
        number = getattr(errno, self.what)
        raise OSError(number, os.strerror(number), name)


def take_aim(text):
    """Take aim at what `text` names, and at nothing else."""
    aims[:] = [Aim(part) for part in text.split(",") if part]


aims = []
take_aim(os.environ.get("ADAMWPRUNE_FAULT", ""))


def point(name):
    """A place in the program where a fault can be aimed at."""
    for aim in aims:
        aim.pass_by(name)
