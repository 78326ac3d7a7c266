"""Text, document by document, from files, and from any place in them again.

A source has `open()`, `text_bytes()` and `records(position=None)`: Records from the start, or from the position that
one of them carried. Files is one; gpt2/hub.py has the other.
"""

import codecs
import hashlib
import os
import re
from typing import NamedTuple

from gpt2.errors import UserError
from gpt2.files import from_json
from gpt2.inputs import format_of, input_files, opened, readable
from gpt2.tokenizer import clean

PIECE = 2**18  # bytes, or a little more, after which a long document is cut
UNBROKEN = 2**23  # bytes without a boundary after which it is cut anywhere
BLOCK = 2**20  # bytes read at a time
SAMPLES, SAMPLE = 33, 2**16  # stretches of a file, and their bytes, by which a changed file is known
LONGEST = 2**31  # bytes of a line, or of a document between separators: what is longer is no text
# Where GPT-2's pattern always ends a token, whatever comes before and after: between a character that is no white space
# and a space or line break. Of the characters beyond ASCII those whose first bytes white space shares (U+0080 to 00BF,
# 1000 to 200F, 2028 to 2FFF, 3000) are not looked for.
BOUNDARY = re.compile(
    rb"(?:[!-~]|[\xc3-\xdf][\x80-\xbf]|\xe2\x80[\x90-\xa7]|\xe3\x80[\x81-\xbf]|\xe3[\x81-\xbf][\x80-\xbf]"
    rb"|[\xe4-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})(?=[ \n])"
)


class Record(NamedTuple):
    """A document's text as UTF-8 or, where not `starts`, the next part of one.

    position: JSON from which `records` goes on with this very record; done: share of the source that was read before
    it, 0 to 1, or None where that is not known; place: what to call it when something is wrong with it.
    """

    text: bytes
    starts: bool
    position: dict
    done: float | None
    place: str = ""


def pieces(records, position=None):
    """The same text as Records that are not much longer than PIECE, for `records` read from `position`."""
    skip = (position or {}).get("byte", 0)
    for text, starts, position, done, place in records:
        start, starts = skip, starts and not skip
        skip = 0
        while True:
            end = cut(text, start)
            where = position | {"byte": start} if start else position
            yield Record(bytes(text[start:end]), starts, where, done, place)
            if end == len(text):
                break
            start, starts = end, False
        del text  # it may be large, and the next one too


def cut(text, start):
    """Where the piece of `text` that begins at `start` ends. Tokens of the pieces are the tokens of the whole.

    But for text without a boundary in UNBROKEN bytes, of which no tokenizer makes an end: there a token may be parted.
    """
    limit = start + UNBROKEN
    if len(text) - start <= PIECE:
        return len(text)
    if found := BOUNDARY.search(text, start + PIECE, limit):
        return found.end()
    if len(text) <= limit:
        return len(text)
    while text[limit] & 0xC0 == 0x80:  # inside a character
        limit -= 1
    return limit


class Columns:
    """What of a row, a mapping, becomes a document: the text, if the filters let it pass.

    Counts what they and skip_bad leave out.
    """

    def __init__(self, args):
        self.text, self.min_score, self.max_tokens = args.text_column, args.min_score, args.max_tokens
        self.skip_bad = args.skip_bad
        self.names = [self.text]
        self.names += ["score"] * (self.min_score is not None) + ["token_count"] * (self.max_tokens is not None)
        self.counts = {"filtered": 0, "skipped": 0}

    def check(self, place, there):
        """UserError where a column is not among those that are `there`, or more than once."""
        for name in self.names:
            option = {"score": "--min_score", "token_count": "--max_tokens"}.get(name, "--text_column")
            if name not in there:
                raise UserError(f"{place}: no column {name!r}, which {option} needs; there are {', '.join(there)}")
            if list(there).count(name) > 1:
                raise UserError(f"{place}: {list(there).count(name)} columns are called {name!r}: rename all but one")

    def document(self, text, row, place):
        """The text as UTF-8, or None where the row is to be left out.

        UserError, which names `place`, where there is none, unless bad rows are skipped.
        """
        try:
            wanted = self.wanted(row)
        except TypeError:
            return self.bad(f"{place}: {' or '.join(map(repr, self.names[1:]))} is no number")
        if not wanted:
            self.counts["filtered"] += 1
            return None
        if isinstance(text, str) and text:
            return utf8(text)
        if isinstance(text, bytes | memoryview) and len(text):
            return text if self.is_utf8(text, place) else None
        empty = isinstance(text, str | bytes | memoryview)
        return self.bad(f"{place}: {self.text!r} is {'null' if text is None else 'empty' if empty else 'no text'}")

    def wanted(self, row):
        """Whether the filters let the row pass; a missing number counts as 0. TypeError where it is none."""
        return (self.min_score is None or (row.get("score") or 0) >= self.min_score) and (
            self.max_tokens is None or (row.get("token_count") or 0) <= self.max_tokens
        )

    def is_utf8(self, text, place):
        """Whether bytes are UTF-8, or else a bad row."""
        try:
            str(text, "utf-8")
            return True
        except UnicodeDecodeError as error:
            return self.bad(f"{place}: is not UTF-8 text: {error.reason}")

    def bad(self, problem):
        """UserError, or None and one more skipped."""
        self.refuse(problem)
        self.counts["skipped"] += 1

    def refuse(self, problem):
        """UserError, unless bad documents are skipped."""
        if not self.skip_bad:
            raise UserError(f"{problem}; --skip_bad leaves such documents out, and counts them")


def utf8(text):
    try:
        return text.encode()
    except UnicodeEncodeError:
        return clean(text).encode()


def sampled(path, size):
    """A hash of SAMPLES stretches of a file of `size` bytes, from its first to its last: what is read again at once."""
    digest = hashlib.sha256()
    with readable(path), open(path, "rb") as file:
        for start in sorted({max(0, size - SAMPLE) * number // (SAMPLES - 1) for number in range(SAMPLES)}):
            file.seek(start)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


class Files:
    """Documents of files: rows of .parquet, lines of .jsonl, whole .txt or what is between its separator lines."""

    name = "tokens"

    def __init__(self, args):
        self.columns, self.separator = Columns(args), args.document_separator
        self.paths = input_files(args.input)
        for path in self.paths:
            if format_of(path)[0] == "text":
                self.columns.check(path, [self.columns.text])  # there are no others to filter by
        self.sizes = [os.path.getsize(path) for path in self.paths]
        self.identity = {"input": [[path, size, sampled(path, size)] for path, size in zip(self.paths, self.sizes)]}

    def open(self):
        """Nothing: each file is opened when its turn comes."""

    def text_bytes(self):
        """How much text there is, in bytes, as far as the files' sizes tell."""
        return sum(text_bytes(path, size, self.columns.text) for path, size in zip(self.paths, self.sizes))

    def records(self, position=None):
        position = position or {"file": 0}
        self.columns.counts.update({name: position.get(name, 0) for name in self.columns.counts})
        whole = sum(self.sizes) or 1

        def record(document):
            text, starts, where, done, place = document
            where = {"file": index} | where | self.columns.counts
            return Record(text, starts, where, (before + done * self.sizes[index]) / whole, place)

        for index in range(position["file"], len(self.paths)):
            path, before = self.paths[index], sum(self.sizes[:index])
            inside = position if index == position["file"] else {}
            with readable(path):  # map keeps no text while the next is read
                yield from map(record, documents(path, inside, self.columns, self.separator))


def text_bytes(path, size, text_column):
    """Of a file; half of JSON lines is taken to be other columns."""
    kind, _ = format_of(path)
    if kind == "parquet":
        metadata = open_parquet(path).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_column)
    return size // 2 if kind == "json" else size


def documents(path, position, columns, separator):
    """(text, starts, position in the file, share of it, place) of each document, or part of one, from `position` on."""
    kind, _ = format_of(path)
    if kind == "parquet":
        return parquet_documents(path, position, columns)
    if kind == "json":
        return json_documents(path, position, columns)
    if separator is None:
        return text_documents(path, position, columns)
    return separated_documents(path, position, columns, separator)


def open_parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # which gives the room of a large document back at once
    with readable(path):
        return pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK)


def as_text(kind):
    """The Arrow type in which to read a column of the type `kind` as text, or None where it holds something else."""
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    plain = (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary())
    views = {pyarrow.string_view(): pyarrow.large_string(), pyarrow.binary_view(): pyarrow.large_binary()}
    return kind if kind in plain else views.get(kind)


def parquet_documents(path, position, columns):
    """Rows; row groups before the position are not read, and of a large one about BLOCK bytes at a time."""
    file = open_parquet(path)
    columns.check(path, file.schema_arrow.names)
    kind = file.schema_arrow.field(columns.text).type
    if (wanted := as_text(kind)) is None:
        raise UserError(f"{path}: column {columns.text!r} holds {kind}, not text; --text_column names another")
    metadata, first = file.metadata, position.get("row_group", 0)
    number = sum(metadata.row_group(i).num_rows for i in range(first))
    for group in range(first, metadata.num_row_groups):
        rows, size = metadata.row_group(group).num_rows, metadata.row_group(group).total_byte_size
        rows = min(2**12, max(1, rows * BLOCK // max(1, size)))  # texts of a dictionary are larger than their group
        row, start = 0, position.get("row", 0) if group == first else 0
        for batch in file.iter_batches(rows, row_groups=[group], columns=columns.names):
            texts, others = batch.column(columns.text), batch.select(columns.names[1:]).to_pylist()
            texts = texts if texts.type == wanted else texts.cast(wanted)
            for i in range(len(texts)):
                if row >= start:
                    buffer, place = texts[i].as_buffer(), f"{path}: row {number}"
                    text = columns.document(buffer and memoryview(buffer), others[i] if others else {}, place)
                    if text is not None:
                        yield text, True, {"row_group": group, "row": row}, number / metadata.num_rows, place
                    del buffer, text
                row, number = row + 1, number + 1
            del batch, texts


def json_documents(path, position, columns):
    """Lines of JSON objects; blank lines are passed over."""
    offset, number = position.get("offset", 0), position.get("line", 0)
    checked = offset > 0
    with opened(path, offset) as (file, done):
        while line := file.readline(LONGEST):
            where, place = {"offset": offset, "line": number}, f"{path}:{number + 1}"
            rest = rest_of_line(file, line)
            offset, number = offset + len(line) + rest, number + 1
            if not line.strip():
                continue
            row, problem = (None, f"has more than {LONGEST:,} bytes") if rest else parsed(line)
            del line
            if problem:
                columns.bad(f"{place}: {problem}")
                continue
            if not checked:
                columns.check(path, row)
            checked = True
            text = columns.document(row.pop(columns.text, None), row, place)
            if text is not None:
                yield text, True, where, done(), place
            del text


def rest_of_line(file, line):
    """Read on to the end of a line that is longer than LONGEST: how many bytes that was."""
    count = 0
    while line and len(line) >= LONGEST and not line.endswith(b"\n"):
        line = file.readline(LONGEST)
        count += len(line)
    return count


def parsed(line):
    """(the JSON object in a line, None), or (None, what is wrong)."""
    try:
        row = from_json(line)
    except UnicodeDecodeError:
        return None, "is not UTF-8 text"
    except ValueError:
        row = None
    if isinstance(row, dict):
        return row, None
    array = ": one JSON array is made lines by jq -c '.[]'" if line.startswith(b"[") else ""
    return None, f"is no JSON object{array}"


def text_documents(path, position, columns):
    """One document, the whole file, a piece at a time. Where bad ones are left out, the file is read twice."""
    offset, starts, text, data = position.get("offset", 0), "inside" not in position, b"", b" "
    if columns.skip_bad and starts and not is_text(path, columns):
        return
    with opened(path, offset) as (file, done):
        while data:
            data = file.read(BLOCK)
            text += data
            while text and ((end := cut(text, 0)) < len(text) or not data):
                place = f"{path}: byte {offset}" if offset else path
                if not columns.is_utf8(text[:end], place):
                    return  # the rest of it is no text either
                yield text[:end], starts, {"offset": offset} | ({} if starts else {"inside": True}), done(), place
                offset, starts, text = offset + end, False, text[end:]
    if starts:
        columns.bad(f"{path}: is empty")


def is_text(path, columns):
    """Whether a file is text to its end, or else a bad document."""
    decoder, data = codecs.getincrementaldecoder("utf-8")(), b" "
    try:
        with opened(path, 0) as (file, _):
            while data:
                data = file.read(BLOCK)
                decoder.decode(data, final=not data)
        return True
    except UnicodeDecodeError as error:
        return columns.bad(f"{path}: is not {error.encoding.upper()} text: {error.reason}")


def separated_documents(path, position, columns, separator):
    """What is between lines that are `separator`; the line break before such a line belongs to it.

    Nothing between two is no document.
    """
    start = offset = position.get("offset", 0)
    document, separator, too_long = bytearray(), separator.encode(), False
    with opened(path, offset) as (file, done):
        while True:
            line = file.readline(LONGEST)
            offset += len(line)
            if line and line.rstrip(b"\r\n") != separator:
                too_long = too_long or len(document) + len(line) > LONGEST
                if too_long:
                    document = bytearray()
                else:
                    document += line  # in place: a long document is copied once
                continue
            if line:
                end = len(document) - (document.endswith(b"\n") + document.endswith(b"\r\n"))
                del document[end:]
            place = f"{path}: byte {start}"
            if too_long:
                columns.bad(f"{place}: no line {separator.decode()!r} in {LONGEST:,} bytes")
            elif document and columns.is_utf8(document, place):
                yield memoryview(document), True, {"offset": start}, done(), place
            if not line:
                return
            document, start, too_long = bytearray(), offset, False
