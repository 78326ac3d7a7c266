"""Which files --input names, and their text as UTF-8, whatever compresses it and whatever mark it begins with."""

import codecs
import contextlib
import glob
import io
import os
from pathlib import Path

from gpt2.errors import UserError, first_line

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".txt": "text"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
EXPECTED = f"one of {', '.join(FORMATS)}, but for the first also with {', '.join(COMPRESSIONS)}"
MARKS = {
    codecs.BOM_UTF8: None,  # passed over
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",  # begins as UTF-32's does
    codecs.BOM_UTF16_BE: "utf-16",
}
BLOCK = 2**20  # bytes read at a time


def format_of(path):
    """(parquet, json or text; its compression or None) by the path's ending; (None, None) where that says neither."""
    root, ending = os.path.splitext(str(path).lower())
    compression = COMPRESSIONS.get(ending)
    known = FORMATS.get(os.path.splitext(root)[1] if compression else ending)
    return (None, None) if known == "parquet" and compression else (known, compression)


def input_files(patterns):
    """The files that --input names: files, globs, folders with all below, each once. UserError where one names none.

    In a folder, what is hidden is no data, and a plain .json is taken to be about the data.
    """
    files = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            found = [path for path in files_below(pattern) if format_of(path)[0] and not path.lower().endswith(".json")]
        elif os.path.isfile(pattern):
            found = [pattern]
        else:
            found = [path for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(path)]
        if not found:
            raise UserError(f"--input {pattern}: no such file, and no folder that holds {EXPECTED}")
        for path in found:
            if format_of(path)[0] is None:
                raise UserError(f"--input {path}: expected {EXPECTED}")
        files += found
    once = {}
    for path in files:
        once.setdefault(os.path.realpath(path), path)
    if len(once) < len(files):
        print(f"--input names {len(once)} files, some of them more than once: each counts once")
    return list(once.values())


def files_below(folder):
    """The files in a folder and those below it, through links too, sorted; nothing whose name begins with a dot."""
    files, seen = [], set()
    for here, folders, names in os.walk(Path(folder), onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
        if real not in seen:
            files += [os.path.join(here, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(path for path in files if os.path.isfile(path))


def refuse(error):
    raise UserError(f"--input {error.filename}: cannot be read: {error.strerror}")


@contextlib.contextmanager
def readable(path):
    """What reading a damaged file raises, as a UserError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not {error.encoding.upper()} text: {error.reason}") from None
    except Exception as error:
        known = isinstance(error, (OSError, EOFError, ValueError, MemoryError))
        if isinstance(error, UserError) or not (known or type(error).__module__.startswith("pyarrow")):
            raise
        problem = first_line(error)
        if "too much memory" in problem:
            problem = f"was compressed with zstd --long: unpack it first, with zstd -d --long=31 '{path}'"
        raise UserError(f"{path}: cannot be read: {problem}") from None


@contextlib.contextmanager
def opened(path, offset):
    """(The text of a file as UTF-8, from byte `offset` of it on; a function that tells the share of the file read)."""
    with open(path, "rb") as raw:
        file = unmarked(decompressed(raw, format_of(path)[1]))
        if file is raw:
            file.seek(offset, os.SEEK_CUR)
        else:
            for start in range(0, offset, BLOCK):
                file.read(min(BLOCK, offset - start))
        size = max(1, os.path.getsize(path))
        yield file, lambda: min(1.0, raw.tell() / size)


def decompressed(raw, compression):
    if not compression:
        return raw
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), compression), BLOCK)


def unmarked(file):
    """The file behind its byte-order mark, recoded where that says UTF-16 or UTF-32."""
    start = file.peek(4)[:4]
    mark = next((mark for mark in MARKS if start.startswith(mark)), b"")
    if encoding := MARKS.get(mark):
        return io.BufferedReader(Recoded(file, encoding), BLOCK)
    file.read(len(mark))
    return file


class Recoded(io.RawIOBase):
    """A binary file's text, which has another encoding, as UTF-8."""

    def __init__(self, file, encoding):
        self.file, self.decoder, self.left = file, codecs.getincrementaldecoder(encoding)(), b""

    def readable(self):
        return True

    def readinto(self, buffer):
        data = b" "
        while data and not self.left:
            data = self.file.read(BLOCK)
            self.left = self.decoder.decode(data, final=not data).encode()
        part, self.left = self.left[: len(buffer)], self.left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)
