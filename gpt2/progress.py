"""How far along something is: a bar on a terminal, and elsewhere, as in the log of a job, a plain line now and then."""

import math
import sys
import time
from datetime import timedelta

FIRST, LONGEST = 5, 60  # seconds before the first plain line, and at most between two; in between they double


def progress(total, unit, initial=0, shown=True, **options):
    """A tqdm bar where stderr is a terminal, else `Lines`, which knows the same methods.

    shown: whether to show it at all, as on the main rank alone; options: of tqdm, for the bar's looks.
    """
    if shown and sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm(total=total, unit=unit, initial=initial, dynamic_ncols=True, **options)
    return Lines(total, unit, initial, options.get("desc", ""), shown)


class Lines:
    """Counts up to `total`, and says on stderr how far it is: after 5 seconds, 10, 20, 40, then once a minute.

    total: in units, or 1.0 where shares are counted, or None where nobody knows.
    """

    def __init__(self, total, unit, initial=0, desc="", shown=True):
        self.total, self.unit, self.n, self.initial, self.desc = total, unit, initial, initial, desc
        self.started = time.monotonic()
        self.due = self.started + FIRST if shown else math.inf

    def update(self, n=1):
        self.n += n
        if time.monotonic() >= self.due:
            print(self.line(), file=sys.stderr, flush=True)
            self.postpone()

    def postpone(self):
        now = time.monotonic()
        self.due = now + min(LONGEST, max(FIRST, now - self.started))

    def line(self):
        seconds = time.monotonic() - self.started
        if self.total is None:
            done = "" if self.desc else f"{self.unit} {self.n:,.0f}"
        elif self.total == 1.0:
            done = f"{self.n:.0%}"
        else:
            done = f"{self.unit} {self.n:,.0f} of {self.total:,.0f}"
        rate = (self.n - self.initial) / max(seconds, 1e-9)
        left = f", {clock((self.total - self.n) / rate)} left" if self.total and rate > 0 else ""
        return f"{', '.join(filter(None, (self.desc, done)))} after {clock(seconds)}{left}"

    def set_description_str(self, desc, refresh=True):
        self.desc = desc

    def write(self, text):
        """A line of the program's own on stdout; as it shows that something goes on, that of `update` can wait."""
        print(text, flush=True)
        self.postpone()

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def clock(seconds):
    return str(timedelta(seconds=round(seconds)))
