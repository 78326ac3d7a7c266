"""What is asked of a run from outside: to stop (signals, a time limit) and to save by the clock. All ranks agree on it.

    with Stops(max_hours=8) as stops:
        stops.join(world, timeout=600)
        try:
            for micro_step in stops.checked(range(4)):
                ...     # forward, backward: work that may be left undone
            ...         # the update: never interrupted
        except Stopped:
            ...         # on every rank at the same micro-step: save what is done, and leave

Agreeing is an all-reduce of two numbers between the hosts, started at one micro-step and read at the next, so that
nobody waits for it and no GPU is asked. A process that is alone leaves a micro-step or an evaluation batch, and a
compilation in it, at once: what it has computed so far would not be kept.
"""

import contextlib
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from gpt2.faults import point
from gpt2.watch import Watch

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(BaseException):
    """The run was asked to stop. No Exception, as torch.compile would take one for its own."""


class Stops:
    """Listens to SIGTERM, SIGINT, SIGUSR1 and, where nohup does not have it ignored, SIGHUP while it is entered, and to
    the clock.

    max_hours: of this process, 0 for no limit; checkpoint_minutes: from one save to the next, 0 for never by the clock.
    """

    def __init__(self, max_hours=0.0, checkpoint_minutes=0.0):
        now = time.monotonic()  # a clock that is set does not move it
        self.end, self.limit = now + 3600 * max_hours if max_hours else float("inf"), f"max_hours={max_hours:g}"
        self.save_every = 60 * checkpoint_minutes or float("inf")
        self.save_at = now + self.save_every
        self.reason = self.group = self.exchange = self.watch = None
        self.asked = self.may_raise = self.save_due = self.just_saved = False
        self.checks, self.size = 0, int(os.environ.get("WORLD_SIZE", 1))
        self.heard = getattr(sys.modules.get("gpt2.early"), "heard", [])

    def __enter__(self):
        heeded = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.receive) for number in heeded}
        self.before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self.alarm)
        for number in tuple(self.heard):
            self.receive(number, None)
        return self

    def __exit__(self, *error):
        self.rest()
        signal.alarm(0)
        early = sys.modules.get("gpt2.early")
        for number, handler in self.before.items():
            over = error[0] is None and early and handler is early.leave  # nothing is left to stop, or to tell
            signal.signal(number, signal.SIG_IGN if over else handler)

    def join(self, world, timeout):
        """Agree with the other ranks from now on; one that stands still for `timeout` seconds ends the run."""
        self.size, self.is_main = world.size, world.is_main
        if world.size > 1:
            self.group = dist.new_group(backend="gloo")
            self.watch = Watch(world, lambda: self.checks if self.checks > 2 else 0, timeout)

    def receive(self, number, frame):
        """The signals' handler; runs in the main thread, between two of its instructions."""
        again, self.reason = self.reason == number == signal.SIGINT, signal.Signals(number)
        self.heard.append(number)
        if again:
            leave(130, "left at once; the same command continues from the last checkpoint")
        if self.size > 1:
            signal.alarm(5)
        if self.may_raise:
            self.stop()

    def rest(self):
        """The steps are done: what comes now may take its time."""
        if self.watch:
            self.watch.end()

    def alarm(self, number, frame):
        """Some seconds after a signal: where the first micro-step still compiles, there is nothing to save."""
        if self.checks <= 1:
            leave(0, self.message(0, 0, 0))

    def checked(self, items):
        """The items one by one, each after a look at what is asked; raises Stopped, on all ranks before the same item.

        Every rank must go through as many items. Between two items nothing may be done that must not be left undone.
        """
        for item in items:
            self.check()
            self.may_raise = not dist.is_initialized()
            point("in_micro_step")
            yield item
        self.may_raise = False

    def check(self):
        now = time.monotonic()
        if now > self.end and not self.reason:
            self.reason = self.limit
        asked, due = self.reason is not None, now > self.save_at
        self.checks += 1
        if self.size > 1:
            asked, due = self.agree(asked, due and self.is_main)
        self.save_due = due and not self.just_saved
        self.just_saved = False
        if asked:
            self.stop()

    def stop(self):
        self.asked, self.may_raise = True, False
        raise Stopped

    def agree(self, *flags):
        """Start exchanging these flags; returns those of the check before, each true where any rank's was."""
        flags = torch.tensor(flags, dtype=torch.int32)
        exchange, self.exchange = self.exchange, (dist.all_reduce(flags, dist.ReduceOp.MAX, self.group, True), flags)
        if exchange is None:
            return False, False
        exchange[0].wait()
        return exchange[1].bool().tolist()

    def saved(self):
        """Take the time to the next save from here. An exchange under way may still ask for this one."""
        self.save_at, self.save_due, self.just_saved = time.monotonic() + self.save_every, False, self.size > 1

    def message(self, step, start, last):
        """What to tell the user of a run that has stopped after `step`, having begun at `start`."""
        reason = self.reason.name if isinstance(self.reason, signal.Signals) else self.reason or "asked on another rank"
        where = f"after step {step} of {last}" if step > start else "before its first step was done"
        return f"stopped {where} ({reason}); the same command continues"


def leave(code, message):
    """End the process at once, without what a normal exit would wait for."""
    if int(os.environ.get("RANK", 0)) == 0:
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"\ntrain_gpt2.py: {message}\n".encode())
    os._exit(code)
