"""Token shards in llm.c's format, which llm.c and modded-nanogpt use too: how they are written, found and read.

A shard is 256 int32 (20240520, 1, number of tokens, zeros), then that many uint16 tokens, all little-endian. Beside
them lies a meta.json, where prepare_fineweb.py wrote them.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from gpt2.errors import UserError, first_line
from gpt2.files import from_json, sync

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
PROGRESS = "progress.json"  # lies beside shards whose preparation has not ended
OPEN_SHARDS = 64  # at a time
CHUNK = 2**22  # tokens, where a whole shard is read


def header(tokens):
    """The first 1,024 bytes of a shard of `tokens` tokens."""
    numbers = np.zeros(256, dtype="<i4")
    numbers[:3] = MAGIC, VERSION, tokens
    return numbers.tobytes()


class ShardFile:
    """A shard that is being written: beside, under a name that ends in .tmp, until `close` puts it in its place."""

    def __init__(self, path, size):
        self.path, self.beside = path, path.with_name(f".{path.name}.tmp")
        self.tokens, self.room, self.documents = 0, size, 0
        self.file = open(self.beside, "w+b")
        self.file.write(header(size))

    def append(self, tokens, end_of_text):
        self.file.write(tokens.astype("<u2", copy=False).data)
        self.tokens, self.room = self.tokens + len(tokens), self.room - len(tokens)
        self.documents += int(np.count_nonzero(tokens == end_of_text))

    def close(self):
        """What meta.json says of the shard, which is whole and in its place now."""
        self.file.seek(0)
        self.file.write(header(self.tokens))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.seek(0)
        digest = hashlib.file_digest(self.file, "sha256").hexdigest()
        self.file.close()
        os.replace(self.beside, self.path)
        sync(self.path.parent)
        return {"name": self.path.name, "tokens": self.tokens, "documents": self.documents, "sha256": digest}


def summary(path, end_of_text):
    """What meta.json says of the shard at `path`."""
    shard = check_header(path)
    documents = sum(int(np.count_nonzero(tokens == end_of_text)) for _, tokens in shard.chunks())
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "tokens": shard.tokens, "documents": documents, "sha256": digest}


@dataclass(frozen=True)
class Shard:
    """The tokens in a file. size and modified, in ns, are the file's when it was found: it must not change later."""

    path: str
    tokens: int
    offset: int  # of the first token, in bytes
    size: int
    modified: int

    def check(self):
        """UserError where the file is gone or not what it was."""
        try:
            status = os.stat(self.path)
            if status.st_size != self.size:
                raise UserError(f"{self.path}: was changed while in use: {status.st_size} bytes, not {self.size}")
            if status.st_mtime_ns != self.modified:
                check_unchanged(self.path, status.st_mtime_ns)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read any more: {error.strerror or error}") from None

    def fill(self, tokens, start):
        """Write the tokens from `start` on into `tokens`, a contiguous uint16 array. UserError where there are too few.

        They are read, not memory-mapped: a mapped file that shrinks ends the process with a signal.
        """
        try:
            file = open_file(self.path)  # held, so that another thread's reading closes it not before this one is done
            count = os.preadv(file.fileno(), [tokens], self.offset + 2 * start)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read any more: {error.strerror or error}") from None
        if count != tokens.nbytes:
            raise UserError(f"{self.path}: was changed while in use: it ends before token {start + len(tokens)}")

    def read(self, start, count):
        """The `count` tokens from `start` on, uint16. UserError as of `check` and `fill`."""
        tokens = np.empty(count, "<u2")
        self.check()
        self.fill(tokens, start)
        return tokens

    def chunks(self):
        """(number of the first token, tokens) from one end to the other, CHUNK tokens at a time."""
        for start in range(0, self.tokens, CHUNK):
            yield start, self.read(start, min(CHUNK, self.tokens - start))


@lru_cache(maxsize=OPEN_SHARDS)
def open_file(path):
    """A file for reads at random: without the advice, for a window of 2 kB the kernel reads a hundred times as much."""
    file = open(path, "rb", buffering=0)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


@lru_cache
def check_unchanged(path, modified):
    """UserError where the file at `path`, whose time of change is new, is not what the meta.json beside it says."""
    path = Path(path)
    listed = {shard["name"]: shard["sha256"] for shard in read_meta(path.parent).get("shards", [])}.get(path.name)
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != listed:
            known = "its sha256 is not that of meta.json" if listed else "no meta.json tells what it should hold"
            raise UserError(f"{path}: was changed while in use: its time of change is new, and {known}")


def read_meta(data_dir):
    """What meta.json in data_dir says of tokenizer and counts; {} where there is none, as beside llm.c's shards."""
    path = Path(data_dir) / "meta.json"
    try:
        meta = from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {first_line(error)}") from None
    if not (
        isinstance(meta, dict) and isinstance(meta.get("vocab_size", 0), int) and are_listed(meta.get("shards", []))
    ):
        raise UserError(
            f"{path}: is damaged, or not what prepare_fineweb.py writes: prepare the data again, or remove it"
        )
    return meta


def are_listed(shards):
    """Whether `shards` is a list of what `ShardFile.close` returns."""
    kinds = {"name": str, "tokens": int, "documents": int, "sha256": str}
    return isinstance(shards, list) and all(
        isinstance(shard, dict)
        and all(isinstance(shard.get(name), kind) for name, kind in kinds.items())
        and shard["name"] == Path(shard["name"]).name
        for shard in shards
    )


def find_shards(data_dir, split, data_format="shards"):
    """The shards of `split` ("train" or "val"), by name, headers and sizes checked. UserError names the wrong file.

    data_format "raw": files without a header, as nanoGPT's train.bin and val.bin. Nothing but tokens is read, so no
    meta.pkl.
    """
    folder = Path(data_dir)
    if folder.is_file():
        raise UserError(f"data_dir={data_dir}: is a file, expected the folder of the token shards")
    if not folder.is_dir():
        raise UserError(f"data_dir={data_dir}: no such folder; prepare_fineweb.py --out_dir={data_dir} writes one")
    if (folder / PROGRESS).exists() and not (folder / "meta.json").exists():
        raise UserError(
            f"data_dir={data_dir}: is not all there: the prepare_fineweb.py command that began it, given again, "
            f"finishes it (or remove its {PROGRESS} to train on the shards so far)"
        )
    name = re.compile(rf"(.*_)?{split}(_\d+)?\.bin")
    shard_at = raw_shard if data_format == "raw" else check_header
    try:
        paths = sorted(path for path in folder.iterdir() if name.fullmatch(path.name))
    except OSError as error:
        raise UserError(f"data_dir={data_dir}: cannot be read: {error.strerror}") from None
    if not paths:
        raise UserError(
            f"data_dir={data_dir}: holds no {split} shard (*_{split}_*.bin); "
            f"prepare_fineweb.py --out_dir={data_dir} writes them"
        )
    return [shard_at(path) for path in paths]


def look_at(path):
    """(the first 12 bytes of a file as int32, fewer where it is shorter; its size; its time of change in ns)."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            start = file.read(12)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return np.frombuffer(start[: len(start) // 4 * 4], "<i4").tolist(), status.st_size, status.st_mtime_ns


def check_header(path):
    """The Shard at `path`. UserError where the header is not a shard's or the size not what the header says."""
    start, size, modified = look_at(path)
    if len(start) < 3 or start[0] != MAGIC:
        raise UserError(
            f"{path}: not a token shard: it does not start with {MAGIC} (prepare_fineweb.py writes shards; "
            "files without a header, as nanoGPT's, are read with --data_format=raw)"
        )
    _, version, tokens = start
    if version != VERSION:
        raise UserError(f"{path}: shard version {version}, expected {VERSION}")
    expected = HEADER_BYTES + 2 * tokens
    if size != expected:
        raise UserError(
            f"{path}: {size} bytes, expected {expected} for the {tokens} tokens of its header: truncated or damaged; "
            "prepare it again"
        )
    return Shard(str(path), tokens, HEADER_BYTES, size, modified)


def raw_shard(path):
    """The Shard of a file that holds uint16 tokens and nothing else."""
    start, size, modified = look_at(path)
    if size % 2:
        raise UserError(f"{path}: {size} bytes, expected two a token: truncated or damaged")
    if start[:1] == [MAGIC]:
        raise UserError(f"{path}: has the header of a shard: leave --data_format=raw away")
    return Shard(str(path), size // 2, 0, size, modified)


def check_tokens(path, tokens, vocab_size):
    """UserError where one of `tokens`, read from `path`, is outside the vocabulary."""
    if len(tokens) and (highest := int(tokens.max())) >= vocab_size:
        raise UserError(
            f"{path}: holds token {highest}, but vocab_size={vocab_size}; was it prepared with another tokenizer?"
        )
