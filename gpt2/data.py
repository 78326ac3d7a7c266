"""Token shards to batches. The batch of a step is a pure function of (seed, step): there is no loader state to save.

A shard is llm.c's: 256 int32 (20240520, 1, number of tokens, zeros), then that many uint16 tokens. Each is cut into
windows of block_size tokens that do not overlap (plus the next token, as the last target). An epoch is a permutation of
all windows that is computed, element by element, not stored: any step of any epoch costs the same, at any data size.
"""

import itertools
import json
import mmap
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from gpt2.errors import UserError

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SCAN_TOKENS = 2**28  # data up to this size are read in full at start, to find a token out of range before training does
OPEN_SHARDS = 16     # memory-mapped at a time


@dataclass(frozen=True)
class Shard:
    path: str
    tokens: int


def read_meta(data_dir):
    """What meta.json in data_dir says of tokenizer and counts; {} where there is none, as beside llm.c's shards."""
    path = Path(data_dir) / "meta.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None


def find_shards(data_dir, split):
    """The shards of `split` ("train" or "val"), by name; header and size of each are checked. UserError names the wrong file."""
    folder = Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"data_dir={data_dir}: no such folder; prepare_fineweb.py --out_dir={data_dir} writes one")
    name = re.compile(rf"(.*_)?{split}(_\d+)?\.bin")
    shards = [check_header(path) for path in sorted(folder.iterdir()) if name.fullmatch(path.name)]
    if not shards:
        raise UserError(f"data_dir={data_dir}: holds no {split} shard (*_{split}_*.bin); prepare_fineweb.py --out_dir={data_dir} writes them")
    return shards


def check_header(path):
    """The Shard at `path`. UserError where the header is not a shard's or the size not what the header says."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(12), dtype="<i4")
    if len(header) < 3 or header[0] != MAGIC:
        raise UserError(f"{path}: not a token shard: it does not start with {MAGIC} (a file of nanoGPT's, without header?); "
                        "prepare_fineweb.py writes shards")
    if header[1] != VERSION:
        raise UserError(f"{path}: shard version {header[1]}, expected {VERSION}")
    expected, size = HEADER_BYTES + 2 * int(header[2]), os.path.getsize(path)
    if size != expected:
        raise UserError(f"{path}: {size} bytes, expected {expected} for the {header[2]} tokens of its header: truncated or damaged; "
                        "prepare it again")
    return Shard(str(path), int(header[2]))


@lru_cache(maxsize=OPEN_SHARDS)
def tokens_of(path):
    """The tokens of the shard at `path`, uint16, memory-mapped for random access: without the advice, a cold window of 2 kB
    would make the kernel read ahead a hundred times as much."""
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        memory.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(memory, dtype="<u2", offset=HEADER_BYTES)


def check_tokens(path, tokens, vocab_size):
    """UserError where one of `tokens`, read from `path`, is outside the vocabulary."""
    if len(tokens) and (highest := int(tokens.max())) >= vocab_size:
        raise UserError(f"{path}: holds token {highest}, but vocab_size={vocab_size}; was it prepared with another tokenizer?")


class Windows:
    """The windows of some shards, numbered from 0.

    `self[numbers]` -> int64 tensors (inputs, targets), each [len(numbers), block_size], targets one token ahead.
    UserError where the shards hold no window, or a token that is not below vocab_size.
    """

    def __init__(self, shards, block_size, vocab_size):
        self.shards, self.block_size, self.vocab_size = shards, block_size, vocab_size
        self.ends = np.cumsum([max(0, shard.tokens - 1) // block_size for shard in shards])
        if self.ends[-1] == 0:
            largest = max(shards, key=lambda shard: shard.tokens)
            raise UserError(f"block_size={block_size} is larger than the data: {largest.path}, the largest of {len(shards)} such shards, "
                            f"has {largest.tokens} tokens, and a window needs {block_size + 1}")
        if sum(shard.tokens for shard in shards) <= SCAN_TOKENS:
            for shard in (shard for shard in shards if shard.tokens):
                check_tokens(shard.path, np.memmap(shard.path, dtype="<u2", mode="r", offset=HEADER_BYTES), vocab_size)

    def __len__(self):
        return int(self.ends[-1])

    def description(self):
        """[[file name, tokens], ...]: what a run must find again to see the same batches."""
        return [[Path(shard.path).name, shard.tokens] for shard in self.shards]

    def __getitem__(self, numbers):
        rows = np.empty((len(numbers), self.block_size + 1), dtype=np.int64)
        which = np.searchsorted(self.ends, numbers, side="right")
        for row, number, index in zip(rows, numbers, which):
            path = self.shards[index].path
            start = (number - (self.ends[index - 1] if index else 0)) * self.block_size
            window = tokens_of(path)[start : start + self.block_size + 1]
            check_tokens(path, window, self.vocab_size)
            row[:] = window
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def mix(x, key):
    """32 well-mixed bits of each x under `key`, uint64 arrays: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ key) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(32)


def shuffled(positions, size, seed):
    """Where a random permutation of range(size), chosen by `seed` (ints), sends each of `positions` (int64 array).

    A Feistel network permutes the next power of four; what lands outside is sent through again until it is inside
    (Black and Rogaway 2002), under four times on average. Nothing is stored.
    """
    keys = np.random.SeedSequence(seed).generate_state(4, np.uint64)
    half = np.uint64((max(size - 1, 1).bit_length() + 1) // 2)
    low = (np.uint64(1) << half) - np.uint64(1)
    out = np.array(positions, dtype=np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & low
        for key in keys:
            left, right = right, left ^ (mix(right, key) & low)
        out[outside] = left << half | right
        outside &= out >= size
    return out.astype(np.int64)


def window_numbers(first, count, size, seed):
    """The windows that the sequences first, first + 1, ... of training are: every one once an epoch, then all again."""
    sequence = np.arange(first, first + count)
    epoch, position = sequence // size, sequence % size
    out = np.empty(count, dtype=np.int64)
    for e in np.unique(epoch):
        out[epoch == e] = shuffled(position[epoch == e], size, [seed, int(e)])
    return out


class TrainingBatches:
    """The micro-batches of training. `at(step, micro_step)` is what any rank of any world size sees there."""

    def __init__(self, windows, config, world):
        self.windows, self.config, self.world = windows, config, world

    def at(self, step, micro_step):
        """(inputs, targets), each [batch_size, block_size]; step counts from 1, micro_step over all ranks from 0."""
        size = self.config.batch_size
        first = ((step - 1) * self.config.gradient_accumulation_steps + micro_step) * size
        return self.windows[window_numbers(first, size, len(self.windows), self.config.seed)]

    def from_step(self, step):
        """Endless (micro_step, inputs, targets) of this rank, on its device, each read while the one before is computed."""
        share = self.config.gradient_accumulation_steps // self.world.size
        mine = range(self.world.rank * share, (self.world.rank + 1) * share)
        order = ((s, micro) for s in itertools.count(step) for micro in mine)
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self.read, *next(order))
            while True:
                micro_step, inputs, targets = ahead.result()
                ahead = reader.submit(self.read, *next(order))
                yield micro_step, to_device(inputs, self.world.device), to_device(targets, self.world.device)

    def read(self, step, micro_step):
        inputs, targets = self.at(step, micro_step)
        if self.world.device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return micro_step, inputs, targets


def to_device(tensor, device):
    return tensor.to(device, non_blocking=True)


def evaluation_batches(windows, config, world):
    """This rank's share of the evaluation's micro-batches: the same windows at every evaluation, seed and world size."""
    count = min(len(windows), config.eval_iters * config.batch_size)
    count -= count % config.batch_size if count > config.batch_size else 0
    chosen = shuffled(np.arange(count), len(windows), seed=0)
    for first in range(world.rank * config.batch_size, count, world.size * config.batch_size):
        inputs, targets = windows[chosen[first : first + config.batch_size]]
        yield to_device(inputs, world.device), to_device(targets, world.device)
