"""Errors that the user can mend end in one line and exit code 2, whichever rank meets them."""

import argparse
import contextlib
import errno
import os
import signal
import sys
import time
import warnings
from pathlib import Path

OPTIONAL = ("datasets", "huggingface_hub", "matplotlib", "pyarrow", "tiktoken", "tokenizers", "transformers")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk or a quota says that takes no more
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)  # what a path says that this user cannot use


class UserError(Exception):
    """A mistake in what the user gave: options, files, data. The message names it and the way out, one line a problem.

    shared: every rank raises it, so that rank 0 alone needs to say it.
    """

    def __init__(self, message, shared=False):
        super().__init__(message)
        self.shared = shared


class Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and the default of every option that has one."""

    def _get_help_string(self, action):
        text, default = action.help or "", said_of(action.default)
        shown = default and "default" not in text and action.option_strings and not action.required
        return text + (f" (default: {default.replace('%', '%%')})" if shown else "")


def said_of(default):
    """How help says a default; "" for what is none to be said."""
    if isinstance(default, Path):
        return os.path.relpath(default)
    if isinstance(default, list | tuple):
        return " ".join(map(str, default))
    return str(default) if type(default) in (int, float, str) and default != argparse.SUPPRESS else ""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line, and whose help names the defaults.

    An empty text, as of a shell's variable that is not set, is no value, but for arguments that say type=str.
    """

    def __init__(self, **options):
        super().__init__(formatter_class=Help, **options)
        self.register("type", None, not_empty)
        self.register("type", Path, lambda text: Path(not_empty(text)))

    def error(self, message):
        raise UserError(message)


def not_empty(text):
    """The text of an argument."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: expected a value")
    return text


def positive(text):
    """The whole number from 1 on that the text of an argument is, as in type=positive."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, not {text}")
    return number


def first_line(error):
    """What an exception says first; its kind where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class Heedless:
    """A stream for print that goes on where the disk behind the other is full, or who read it is gone: what that does
    not take is lost."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        self.dare(self.stream.write, text)
        return len(text)

    def flush(self):
        self.dare(self.stream.flush)

    def dare(self, function, *arguments):
        with contextlib.suppress(OSError):
            function(*arguments)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def one_line_errors(program, *others, interrupted="interrupted", leave=None):
    """Turn a `UserError`, one of the exceptions `others`, and Ctrl-C, into lines on stderr and an exit code (2, 130).

    leave: how to end the process with that code; by default at once, whatever threads or process groups are alive.
    Besides, nothing that is printed ends a command for want of a character, Ctrl-C is heard however it was started, and
    warnings of this project are lines too.

    Under torchrun the first rank to exit brings the others down, and what they would have said with them. So rank 0
    speaks at once and the others wait a moment: an error that all ranks share is said once, one that only a later
    rank meets is still said. A rank whose collective breaks because another has left waits longer: it has nothing to
    say unless it outlives the other.
    """
    rank, leave = int(os.environ.get("RANK", 0)), leave or exit_at_once
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what a console cannot show ends no run
    early = sys.modules.get("gpt2.early")
    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, early and early.leave):  # a shell has background jobs ignore
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with one_line_warnings():
            yield
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`: nobody is left to tell
        sys.stdout = sys.stderr = open(os.devnull, "w")
        leave(1)
    except (UserError, *others) as error:
        if rank:
            expect_the_end(5)
        if not (rank and getattr(error, "shared", False)):
            say_error(program, error)
        leave(2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        say_error(program, f"needs a package that is not installed: pip install {error.name.partition('.')[0]}")
        leave(2)
    except OSError as error:
        if error.errno in CLOSED and error.filename is not None:
            say_error(program, f"{os.fsdecode(error.filename)}: {error.strerror}; choose another place")
        elif error.errno in FULL:
            say_error(program, f"what is printed, or a file, cannot be written: {error}")
            sys.stdout = open(os.devnull, "w")
        else:
            raise
        leave(2)
    except RuntimeError as error:
        if not lost_a_peer(error):
            raise
        expect_the_end(15)
        say_error(program, f"rank {rank}: another rank has left: {str(error).splitlines()[0]}")
        leave(1)
    except KeyboardInterrupt:
        if rank == 0:
            print(f"\n{program}: {interrupted}", file=sys.stderr)
        leave(130)


def expect_the_end(seconds):
    """Wait as long for torchrun to end this rank, because another has left, with the SIGTERM that it sends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.SIGTERM in getattr(sys.modules.get("gpt2.early"), "heard", ()):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)


def warn(message):
    """A line on stderr from the main rank, of what goes on nevertheless."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_warnings():
    """Within, Python warnings that name a file of this project are shown by `warn`; others, as torch's, as they are."""
    project, show_others = Path(__file__).resolve().parents[1], warnings.showwarning

    def show(message, category, filename, *place):
        ours = Path(filename).is_relative_to(project) and "site-packages" not in Path(filename).parts
        warn(message) if ours else show_others(message, category, filename, *place)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = show_others


def say_error(program, error):
    for line in str(error).splitlines():
        print(f"{program}: error: {line}", file=sys.stderr)


def lost_a_peer(error):
    """Whether the process at the other end is gone, or never came: that of a collective, where gloo raises plain
    RuntimeErrors, or that of the store in which ranks meet."""
    from torch.distributed import DistError, DistNetworkError, DistStoreError, is_initialized

    if is_initialized():
        return isinstance(error, DistError) or "gloo" in str(error)
    cut_off = any(words in str(error) for words in ("reset by peer", "likely closed", "Broken pipe"))
    return isinstance(error, DistStoreError) or isinstance(error, DistNetworkError) and cut_off


def exit_at_once(code):
    """With process groups or a prefetch thread alive, a normal exit could wait for ranks that are gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
