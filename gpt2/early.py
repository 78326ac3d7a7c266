"""What a signal does while a program still imports: one line instead of a traceback, or of silence.

A program imports this before all else, where it is `__main__`: importing torch takes seconds. Nothing is done by then,
so it ends at once: Ctrl-C with 130; what asks a training to stop (SIGTERM, SIGUSR1) with 0, as at any other time. Of
several ranks one must not leave the others waiting for it: gpt2/stops.py is told.
"""

import os
import signal
import sys


def leave(number, frame):
    """The handler, until the program has its own (gpt2/errors.py, gpt2/stops.py)."""
    interrupted = number == signal.SIGINT
    if not interrupted and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        heard.append(number)
        return
    if int(os.environ.get("RANK", 0)) == 0:
        stopped = f"stopped before its first step was done ({signal.Signals(number).name}); the same command continues"
        os.write(sys.stderr.fileno(), f"\n{program}: {'interrupted' if interrupted else stopped}\n".encode())
    os._exit(130 if interrupted else 0)


def open_closed():
    """What a program was started without, as by `>&-`, is the null device: to print is no error, and no file that is
    opened later is taken for it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free
    sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")


open_closed()
heard, parent = [], os.getppid()
spec = sys.modules["__main__"].__spec__
program = f"python -m {spec.name}" if spec else os.path.basename(sys.argv[0])
for number in (signal.SIGINT, *((signal.SIGTERM, signal.SIGUSR1) if program == "train_gpt2.py" else ())):
    signal.signal(number, leave)
