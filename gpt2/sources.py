"""Text, document by document, from files, and from any place in them again.

A source has `open()`, `text_bytes()` and `records(position=None)`: Records from the start, or from the position that one of
them carried. Files is one; gpt2/hub.py has the other.
"""

import contextlib
import glob
import io
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from gpt2.errors import UserError
from gpt2.tokenizer import clean

PIECE = 2**18  # bytes, or a little more, after which a long document is cut
BLOCK = 2**20  # bytes read at a time
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")
# Where GPT-2's pattern always ends a token, whatever comes before and after: between a character that is no white space and
# a space or line break. Of the characters beyond ASCII those whose first bytes white space shares (U+0080 to 00BF, 1000 to
# 200F, 2028 to 2FFF, 3000) are not looked for.
BOUNDARY = re.compile(
    rb"(?:[!-~]|[\xc3-\xdf][\x80-\xbf]|\xe2\x80[\x90-\xa7]|\xe3\x80[\x81-\xbf]|\xe3[\x81-\xbf][\x80-\xbf]"
    rb"|[\xe4-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})(?=[ \n])"
)


class Record(NamedTuple):
    """A document's text as UTF-8 or, where not `starts`, the next part of one. `position`: JSON from which `records` goes on with
    this very record. `done`: share of the source that was read before it, 0 to 1, or None where that is not known."""

    text: bytes
    starts: bool
    position: dict
    done: float | None


def pieces(records, position=None):
    """The same text as Records that are not much longer than PIECE, for `records` read from `position`."""
    skip = (position or {}).get("byte", 0)
    for text, starts, position, done in records:
        start, starts = skip, starts and not skip
        skip = 0
        while True:
            end = cut(text, start)
            yield Record(bytes(text[start:end]), starts, position | {"byte": start} if start else position, done)
            if end == len(text):
                break
            start, starts = end, False
        del text  # it may be large, and the next one too


def cut(text, start):
    """Where the piece of `text` that begins at `start` ends. Tokens of the pieces are the tokens of the whole."""
    found = BOUNDARY.search(text, start + PIECE) if len(text) - start > PIECE else None
    return found.end() if found else len(text)


class Columns:
    """What of a row (a mapping) becomes a document: the text, if the filters let it pass. Counts what they and skip_bad leave out."""

    def __init__(self, args):
        self.text, self.min_score, self.max_tokens, self.skip_bad = (
            args.text_column,
            args.min_score,
            args.max_tokens,
            args.skip_bad,
        )
        self.names = (
            [self.text] + ["score"] * (self.min_score is not None) + ["token_count"] * (self.max_tokens is not None)
        )
        self.counts = {"filtered": 0, "skipped": 0}

    def check(self, place, there):
        """UserError where a column is not among those that are `there`."""
        for name in self.names:
            if name not in there:
                option = {"score": "--min_score", "token_count": "--max_tokens"}.get(name, "--text_column")
                raise UserError(f"{place}: no column {name!r}, which {option} needs; there are {', '.join(there)}")

    def document(self, text, row, place):
        """The text as UTF-8, or None where the row is to be left out. UserError, which names `place`, where there is none, unless bad rows are skipped."""
        try:
            wanted = self.wanted(row)
        except TypeError:
            return self.bad(f"{place}: {' or '.join(map(repr, self.names[1:]))} is no number")
        if not wanted:
            self.counts["filtered"] += 1
        elif isinstance(text, str | bytes | memoryview) and len(text):
            return utf8(text) if isinstance(text, str) else text
        else:
            self.bad(
                f"{place}: {self.text!r} is {'null' if text is None else 'no text' if isinstance(text, int | float | list | dict) else 'empty'}"
            )

    def wanted(self, row):
        """Whether the filters let the row pass; a missing number counts as 0. TypeError where there is something else than a number."""
        return (self.min_score is None or (row.get("score") or 0) >= self.min_score) and (
            self.max_tokens is None or (row.get("token_count") or 0) <= self.max_tokens
        )

    def bad(self, problem):
        if not self.skip_bad:
            raise UserError(f"{problem}; --skip_bad leaves such documents out, and counts them")
        self.counts["skipped"] += 1


def utf8(text):
    try:
        return text.encode()
    except UnicodeEncodeError:
        return clean(text).encode()


class Files:
    """Documents of files: rows of .parquet, lines of .jsonl, whole .txt or what is between its separator lines; .gz and .zst of the last two."""

    name = "tokens"

    def __init__(self, args):
        self.columns, self.separator = Columns(args), args.document_separator
        self.paths = input_files(args.input)
        self.sizes = [os.path.getsize(path) for path in self.paths]
        self.identity = {"input": [list(pair) for pair in zip(self.paths, self.sizes)]}

    def open(self):
        """Nothing: each file is opened when its turn comes."""

    def text_bytes(self):
        """How much text there is, in bytes, as far as the files' sizes tell; half of a .jsonl is taken to be other columns."""
        return sum(text_bytes(path, size, self.columns.text) for path, size in zip(self.paths, self.sizes))

    def records(self, position=None):
        position = position or {"file": 0}
        self.columns.counts.update({name: position.get(name, 0) for name in self.columns.counts})
        whole = sum(self.sizes) or 1

        def record(document):
            text, starts, where, done = document
            return Record(
                text, starts, {"file": index} | where | self.columns.counts, (before + done * self.sizes[index]) / whole
            )

        for index in range(position["file"], len(self.paths)):
            path, before = self.paths[index], sum(self.sizes[:index])
            inside = position if index == position["file"] else {}
            with readable(path):
                yield from map(
                    record, documents(path, inside, self.columns, self.separator)
                )  # which keeps no text while the next is read


def input_files(patterns):
    """The files that --input names: files, globs, folders with all below; each once. UserError where one names none."""
    files = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            found = [
                path
                for path in sorted(map(str, Path(pattern).rglob("*")))
                if has_known_ending(path) and os.path.isfile(path)
            ]
        else:
            found = (
                [pattern]
                if os.path.isfile(pattern)
                else [path for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(path)]
            )
        if not found:
            raise UserError(f"--input {pattern}: no such file, and no folder that holds {', '.join(ENDINGS)}")
        for path in found:
            if not has_known_ending(path):
                raise UserError(f"--input {path}: expected one of {', '.join(ENDINGS)}")
        files += found
    return list(dict.fromkeys(files))


def has_known_ending(path):
    return path.endswith(ENDINGS)


def text_bytes(path, size, text_column):
    if path.endswith(".parquet"):
        metadata = open_parquet(path).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_column)
    return size // 2 if ".jsonl" in path else size


@contextlib.contextmanager
def readable(path):
    """What reading a damaged file raises, as a UserError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text: {error}") from None
    except (OSError, EOFError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def documents(path, position, columns, separator):
    """(text, whether a document starts, position in the file, share of the file) for each document, or part of one, from `position`."""
    if path.endswith(".parquet"):
        return parquet_documents(path, position, columns)
    if ".jsonl" in path:
        return json_documents(path, position, columns)
    return (
        text_documents(path, position, columns)
        if separator is None
        else separated_documents(path, position, columns, separator)
    )


def open_parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # which gives the room of a large document back at once
    with readable(path):
        return pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK)


def parquet_documents(path, position, columns):
    """Rows; row groups before the position are not read. A batch holds rows of about BLOCK bytes, however large a row group is."""
    import pyarrow

    file = open_parquet(path)
    columns.check(path, file.schema_arrow.names)
    kind = file.schema_arrow.field(columns.text).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: column {columns.text!r} holds {kind}, not text; --text_column names another")
    metadata, first = file.metadata, position.get("row_group", 0)
    number = sum(metadata.row_group(i).num_rows for i in range(first))
    for group in range(first, metadata.num_row_groups):
        rows, size = metadata.row_group(group).num_rows, metadata.row_group(group).total_byte_size
        row, start = 0, position.get("row", 0) if group == first else 0
        for batch in file.iter_batches(max(1, rows * BLOCK // max(1, size)), row_groups=[group], columns=columns.names):
            texts, others = batch.column(columns.text), batch.select(columns.names[1:]).to_pylist()
            for i in range(len(texts)):
                if row >= start:
                    buffer = texts[i].as_buffer()
                    text = columns.document(
                        buffer and memoryview(buffer), others[i] if others else {}, f"{path}: row {number}"
                    )
                    if text is not None:
                        yield text, True, {"row_group": group, "row": row}, number / metadata.num_rows
                    del buffer, text
                row, number = row + 1, number + 1
            del batch, texts


@contextlib.contextmanager
def opened(path, offset):
    """(the file, decompressed, from `offset` on; a function that tells the share of it that was read)."""
    with open(path, "rb") as raw:
        file = raw
        if path.endswith((".gz", ".zst")):
            import pyarrow

            file = io.BufferedReader(
                pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "gzip" if path.endswith(".gz") else "zstd"),
                BLOCK,
            )
            for start in range(0, offset, BLOCK):
                file.read(min(BLOCK, offset - start))
        else:
            raw.seek(offset)
        size = os.path.getsize(path)
        yield file, lambda: raw.tell() / size


def json_documents(path, position, columns):
    """Lines of JSON objects; blank lines are passed over."""
    offset, number = position.get("offset", 0), position.get("line", 0)
    with opened(path, offset) as (file, done):
        while line := file.readline():
            where = {"offset": offset, "line": number}
            offset, number = offset + len(line), number + 1
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            del line
            if not isinstance(row, dict):
                columns.bad(f"{path}:{number}: is no JSON object")
                continue
            if where["line"] == 0:
                columns.check(path, row)
            text = columns.document(row.pop(columns.text, None), row, f"{path}:{number}")
            if text is not None:
                yield text, True, where, done()
            del text


def text_documents(path, position, columns):
    """One document, the whole file, a piece at a time."""
    offset, starts, text, data = position.get("offset", 0), "inside" not in position, b"", b" "
    with opened(path, offset) as (file, done):
        while data:
            data = file.read(BLOCK)
            text += data
            while text and (not data or cut(text, 0) < len(text)):
                piece = text[: cut(text, 0)]
                piece.decode()
                yield piece, starts, {"offset": offset} | ({} if starts else {"inside": True}), done()
                offset, starts, text = offset + len(piece), False, text[len(piece) :]
    if starts:
        columns.bad(f"{path}: is empty")


def separated_documents(path, position, columns, separator):
    """What is between lines that are `separator`; the line break before such a line belongs to it. Nothing between two is no document."""
    start = offset = position.get("offset", 0)
    document, separator = bytearray(), separator.encode()
    with opened(path, offset) as (file, done):
        while True:
            line = file.readline()
            offset += len(line)
            if line and line.rstrip(b"\r\n") != separator:
                document += line
                continue
            if line:
                end = len(document) - (document.endswith(b"\n") + document.endswith(b"\r\n"))
                del document[end:]
            if document and is_utf8(document, columns, f"{path}: the document that begins at byte {start}"):
                yield memoryview(document), True, {"offset": start}, done()
            if not line:
                return
            document, start = bytearray(), offset


def is_utf8(text, columns, place):
    try:
        text.decode()
        return True
    except UnicodeDecodeError as error:
        columns.bad(f"{place} is not UTF-8 text: {error.reason}")
