"""Files that are whole or not there: written beside, flushed to the disk, renamed."""

import io
import json
import os
import sys
from pathlib import Path


def write_atomically(path, data):
    """Write the bytes `data` to `path`: a reader, or a crash, finds the old file or the new one, never a part."""
    path = Path(path)
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
