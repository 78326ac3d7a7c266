"""One run at a time writes to an out_dir."""

import contextlib
import errno
import fcntl
import os
import sys
from pathlib import Path

from gpt2.errors import UserError, first_line


@contextlib.contextmanager
def only_run_in(out_dir):
    """Make the folder and hold its lock; UserError where another process has it. On the main rank; others do nothing.

    The lock is flock's on the folder itself: it leaves no file behind, and the kernel drops it when the process dies,
    however. NFS locks only files that are open for writing, so there it is `.lock` in the folder, which stays.
    """
    if int(os.environ.get("RANK", 0)):
        yield
        return
    out_dir = Path(out_dir)
    new = not out_dir.exists()
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        descriptor = locked(out_dir)
    except BlockingIOError:
        raise UserError(
            f"out_dir={out_dir}: another process is training there; wait until it ends, or choose another --out_dir"
        ) from None
    except OSError as error:
        raise UserError(f"out_dir={out_dir}: cannot be written: {first_line(error)}") from None
    try:
        yield
    finally:
        os.close(descriptor)
        if new:
            with contextlib.suppress(OSError):
                out_dir.rmdir()  # where nothing was written


def locked(folder):
    """A descriptor that holds the folder's lock while it is open; BlockingIOError where another one does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError as error:
        print(
            f"warning: {folder}: its filesystem has no locks ({error}): see that one run at a time uses it",
            file=sys.stderr,
        )
    return descriptor
