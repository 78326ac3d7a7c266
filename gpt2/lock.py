"""One run at a time writes to an out_dir."""

import contextlib
import errno
import fcntl
import os
import sys
from pathlib import Path

from gpt2.errors import UserError, first_line


class OnlyRunIn:
    """Makes `out_dir` and holds its lock while it is entered, on the main rank; on others it does nothing.

    The lock is flock's on the folder itself: it leaves no file behind, and the kernel drops it when the process dies,
    however. NFS locks only files that are open for writing, so there it is `.lock` in the folder, which stays.
    """

    def __init__(self, out_dir):
        self.out_dir, self.active = Path(out_dir), int(os.environ.get("RANK", 0)) == 0

    def __enter__(self):
        """UserError where another process holds it, or it cannot be written."""
        if self.active:
            try:
                self.new = not self.out_dir.exists()
                self.hold()
            except BlockingIOError:
                raise UserError(
                    f"out_dir={self.out_dir}: another process is training there; wait until it ends, or choose another "
                    "--out_dir"
                ) from None
            except OSError as error:
                raise UserError(f"out_dir={self.out_dir}: cannot be written: {first_line(error)}") from None
        return self

    def __exit__(self, *error):
        if self.active:
            if self.new:
                with contextlib.suppress(OSError):
                    self.out_dir.rmdir()  # where nothing was written
            os.close(self.descriptor)

    def hold(self):
        for _ in range(2):
            self.out_dir.mkdir(parents=True, exist_ok=True)
            held = locked(self.out_dir)
            if is_there(*held):
                self.descriptor, self.locked = held
                return
            os.close(held[0])  # a run that had written nothing has removed it between the two
        raise BlockingIOError

    def hold_again(self):
        """Make and lock the folder anew where somebody has removed it; OSError where another process has it by now."""
        if is_there(self.descriptor, self.locked):
            return
        before = self.descriptor
        try:
            self.hold()
        except BlockingIOError:
            raise OSError(errno.EBUSY, "another process is training there", str(self.out_dir)) from None
        os.close(before)
        print(f"warning: {self.out_dir} was removed; it begins anew at this step", file=sys.stderr, flush=True)


def is_there(descriptor, path):
    """Whether what is open still has its name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def locked(folder):
    """(descriptor that holds the folder's lock while it is open, what it is of); BlockingIOError where another does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor, folder
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
    return descriptor, folder / ".lock"
