"""Token shards in llm.c's format, which llm.c and modded-nanogpt read and write too: where they lie, and whether they are whole.

A shard is 256 int32 (20240520, 1, number of tokens, zeros), then that many uint16 tokens, all little-endian. Beside them
lies a meta.json, where prepare_fineweb.py wrote them.
"""

import json
import mmap
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from gpt2.errors import UserError

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
PROGRESS = "progress.json"  # lies beside shards whose preparation has not ended
OPEN_SHARDS = 16  # memory-mapped at a time


def header(tokens):
    """The first 1,024 bytes of a shard of `tokens` tokens."""
    numbers = np.zeros(256, dtype="<i4")
    numbers[:3] = MAGIC, VERSION, tokens
    return numbers.tobytes()


@dataclass(frozen=True)
class Shard:
    path: str
    tokens: int
    offset: int = HEADER_BYTES  # of the first token, in bytes

    def read(self):
        """The tokens, uint16, memory-mapped for reading from one end to the other."""
        return (
            np.memmap(self.path, dtype="<u2", mode="r", offset=self.offset, shape=(self.tokens,))
            if self.tokens
            else np.empty(0, "<u2")
        )


def read_meta(data_dir):
    """What meta.json in data_dir says of tokenizer and counts; {} where there is none, as beside llm.c's shards."""
    path = Path(data_dir) / "meta.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None


def find_shards(data_dir, split, data_format="shards"):
    """The shards of `split` ("train" or "val"), by name; header and size of each are checked. UserError names the wrong file.

    data_format "raw": files without a header, as nanoGPT's train.bin and val.bin. Nothing but tokens is read (no meta.pkl).
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"data_dir={data_dir}: no such folder; prepare_fineweb.py --out_dir={data_dir} writes one")
    if (folder / PROGRESS).exists() and not (folder / "meta.json").exists():
        raise UserError(
            f"data_dir={data_dir}: is not all there: the prepare_fineweb.py command that began it, given again, finishes it "
            f"(or remove its {PROGRESS} to train on the shards so far)"
        )
    name = re.compile(rf"(.*_)?{split}(_\d+)?\.bin")
    check = raw_shard if data_format == "raw" else check_header
    shards = [check(path) for path in sorted(folder.iterdir()) if name.fullmatch(path.name)]
    if not shards:
        raise UserError(
            f"data_dir={data_dir}: holds no {split} shard (*_{split}_*.bin); prepare_fineweb.py --out_dir={data_dir} writes them"
        )
    return shards


def check_header(path):
    """The Shard at `path`. UserError where the header is not a shard's or the size not what the header says."""
    try:
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(12), dtype="<i4")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(header) < 3 or header[0] != MAGIC:
        raise UserError(
            f"{path}: not a token shard: it does not start with {MAGIC} (prepare_fineweb.py writes shards; "
            "files without a header, as nanoGPT's, are read with --data_format=raw)"
        )
    if header[1] != VERSION:
        raise UserError(f"{path}: shard version {header[1]}, expected {VERSION}")
    expected, size = HEADER_BYTES + 2 * int(header[2]), os.path.getsize(path)
    if size != expected:
        raise UserError(
            f"{path}: {size} bytes, expected {expected} for the {header[2]} tokens of its header: truncated or damaged; "
            "prepare it again"
        )
    return Shard(str(path), int(header[2]))


def raw_shard(path):
    """The Shard of a file that holds uint16 tokens and nothing else."""
    size = os.path.getsize(path)
    if size % 2:
        raise UserError(f"{path}: {size} bytes, expected two a token: truncated or damaged")
    with open(path, "rb") as file:
        if file.read(4) == MAGIC.to_bytes(4, "little"):
            raise UserError(f"{path}: has the header of a shard: leave --data_format=raw away")
    return Shard(str(path), size // 2, offset=0)


@lru_cache(maxsize=OPEN_SHARDS)
def tokens_of(shard):
    """The tokens of a Shard, uint16, memory-mapped for random access: without the advice, a cold window of 2 kB
    would make the kernel read ahead a hundred times as much."""
    with open(shard.path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        memory.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(memory, dtype="<u2", offset=shard.offset)


def check_tokens(path, tokens, vocab_size):
    """UserError where one of `tokens`, read from `path`, is outside the vocabulary."""
    if len(tokens) and (highest := int(tokens.max())) >= vocab_size:
        raise UserError(
            f"{path}: holds token {highest}, but vocab_size={vocab_size}; was it prepared with another tokenizer?"
        )
