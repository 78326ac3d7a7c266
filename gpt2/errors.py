"""Errors that the user can mend end in one line and exit code 2, whichever rank meets them."""

import argparse
import contextlib
import os
import sys
import time


class UserError(Exception):
    """A mistake in what the user gave: options, files, data. The message names it and the way out, one line a problem."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line."""

    def error(self, message):
        raise UserError(message)


def first_line(error):
    """What an exception says first; its kind where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def one_line_errors(program, *others, interrupted="interrupted", leave=None):
    """Turn a `UserError`, one of the exceptions `others`, and Ctrl-C, into lines on stderr and an exit code (2, 130) instead of a traceback.

    leave: how to end the process with that code; by default at once, whatever threads or process groups are alive.

    Under torchrun the first rank to exit brings the others down, and what they would have said with them. So rank 0
    speaks at once and the others wait a moment: an error that all ranks share is said once, one that only a later
    rank meets is still said.
    """
    rank, leave = int(os.environ.get("RANK", 0)), leave or exit_at_once
    try:
        yield
    except (UserError, *others) as error:
        if rank:
            time.sleep(5)
        for line in str(error).splitlines():
            print(f"{program}: error: {line}", file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        if rank == 0:
            print(f"\n{program}: {interrupted}", file=sys.stderr)
        leave(130)


def exit_at_once(code):
    """With process groups or a prefetch thread alive, a normal exit could wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
