"""Files and folders that are whole or not there: written beside, flushed to the disk, renamed."""

import contextlib
import errno
import io
import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from gpt2.errors import UserError


def write_atomically(path, data):
    """Write the bytes `data` to `path`: a reader, or a crash, finds the old file or the new one, never a part.

    A link stays, and what it names is written; a device, a pipe, and what stdout or stderr goes to, as /dev/stdout, are
    written as they are."""
    path = Path(path)
    if not path.name:  # as of "."
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    if is_stream(path):
        return write_to_stream(path, data)
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def is_stream(path):
    """Whether `path` is there, and neither a file of its own nor a folder."""
    return path.exists() and (descriptor_of(path) is not None or not path.is_file() and not path.is_dir())


def descriptor_of(path):
    """1 or 2 where stdout or stderr goes to what `path` names, else None."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
    return None


def write_to_stream(path, data):
    """Write behind what was printed before."""
    sys.stdout.flush()
    descriptor = descriptor_of(path)
    with open(path if descriptor is None else descriptor, "wb", closefd=descriptor is None) as file:
        file.write(data)


def is_utf8(path):
    """Whether the name is one that libraries which take no others, as safetensors, can open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def typed(path):
    """A path as a shell's command takes it, of which it is no option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def check_writable(path):
    """UserError, before the work rather than after it, where the file `path` could not be written."""
    if is_stream(path):
        return
    path = Path(os.path.realpath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected the name of a file")


@contextlib.contextmanager
def new_folder(to, option):
    """A folder beside `to` for the block to fill, which becomes `to` at its end; of a block that fails nothing is left.

    UserError, naming the command's `option`, where `to` holds something already or cannot be written.
    """
    to = Path(to)
    if not is_utf8(to.absolute()):
        raise UserError(f"{option} {str(to)!r}: is no UTF-8: choose another name")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{option} {to}: is there already; remove it or name another folder")
    beside = to.absolute().with_name(f".{to.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        yield beside
        if to.exists():
            to.rmdir()
        beside.rename(to)
        sync(beside.parent)
    except OSError as error:
        raise UserError(f"{option} {to}: cannot be written: {error}; nothing is left behind") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def from_json(text):
    """The value of JSON; ValueError where it is none, also where it is nested deeper than Python can follow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path):
    """The JSON value in the file `path`. FileNotFoundError where none is there, ValueError where it is no sane JSON."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.name}")
    if path.stat().st_size > 1 << 26:
        raise ValueError(f"{path.name} is larger than 64 MiB")
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read as JSON: {error}") from None


def write_json(path, value):
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def write_figure(path, figure, **options):
    """Write a matplotlib figure as PNG and close it; options: those of its savefig."""
    import matplotlib.pyplot as plt

    image = io.BytesIO()
    figure.savefig(image, format="png", **options)
    plt.close(figure)
    write_atomically(path, image.getvalue())


class Lines:
    """A text file that is appended to. What a disk that is full does not take is kept, and tried again with the
    next; a file that was removed is begun anew."""

    def __init__(self, path):
        self.name, self.file, self.waiting, self.warned = path, open(path, "ab", buffering=0), b"", False

    def write(self, text):
        self.waiting += text.encode()
        try:
            if not os.path.exists(self.name):
                anew = open(self.name, "ab", buffering=0)
                self.file.close()
                self.file = anew
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
            self.warned = False
        except OSError as error:
            if not self.warned:
                print(
                    f"warning: {self.name} cannot be written: {error}; it is tried again", file=sys.stderr, flush=True
                )
            self.warned = True

    def close(self):
        self.write("")
        self.file.close()
        if self.waiting:
            lost = self.waiting.count(b"\n")
            print(f"warning: {self.name} lacks its last {lost} lines", file=sys.stderr, flush=True)


def sync(path):
    """Make what was written to a file, or renamed inside a folder, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
