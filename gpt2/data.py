"""Token shards to batches. The batch of a step is a pure function of (seed, step): there is no loader state to save.

Each shard is cut into windows of block_size tokens that do not overlap (plus the next token, as the last target). An
epoch is a permutation of all windows that is computed, element by element, not stored: any step of any epoch costs the
same, at any data size.
"""

import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from gpt2.errors import UserError
from gpt2.shards import check_tokens, read_meta
from gpt2.tokenizer import description_in

SAMPLES, SAMPLE_BYTES = 64, 4096  # of a file too large to be hashed at every start
SCAN_TOKENS = 2**28  # data up to this size are read in full at start, to find a token out of range before training does


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
            raise UserError(
                f"block_size={block_size} is larger than the data: {largest.path}, the largest of {len(shards)} such "
                f"shards, has {largest.tokens} tokens, and a window needs {block_size + 1}"
            )
        if sum(shard.tokens for shard in shards) <= SCAN_TOKENS:
            for shard in shards:
                for _, tokens in shard.chunks():
                    check_tokens(shard.path, tokens, vocab_size)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, numbers):
        rows = np.empty((len(numbers), self.block_size + 1), dtype="<u2")
        which = np.searchsorted(self.ends, numbers, side="right")
        starts = (numbers - np.concatenate([[0], self.ends])[which]) * self.block_size
        for index in np.unique(which):
            self.shards[index].check()
        for row, index, start in zip(rows, which.tolist(), starts.tolist()):
            self.shards[index].fill(row, start)
        if rows.size and rows.max() >= self.vocab_size:
            for row, index in zip(rows, which):
                check_tokens(self.shards[index].path, row, self.vocab_size)
        rows = torch.from_numpy(rows.astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def describe_data(data_dir, shards, validation=()):
    """What a checkpoint's manifest keeps of the data: {"data": [[name, tokens, fingerprint], ...], "validation": the
    same of its shards, "tokenizer": ...}.

    The fingerprint is the file's sha256: computed where the data are so small that they are read in full anyway, else
    as meta.json has it, else of samples. tokenizer: as meta.json describes it, or None where nothing does.
    """
    meta = read_meta(data_dir)
    rows = {"data": rows_of(shards, meta), "validation": rows_of(validation, meta)}
    return rows | {"tokenizer": description_in(meta)}


def rows_of(shards, meta):
    small = sum(shard.tokens for shard in shards) <= SCAN_TOKENS
    listed = {} if small else {shard["name"]: shard["sha256"] for shard in meta.get("shards", [])}
    rows = []
    for shard in shards:
        name = Path(shard.path).name
        known = listed.get(name)
        rows.append([name, shard.tokens, f"sha256:{known}" if known else fingerprint(shard, whole=small)])
    return rows


def fingerprint(shard, whole):
    """sha256 of a shard's file, or of 64 samples of it, spread evenly, where reading all takes too long."""
    with open(shard.path, "rb") as file:
        if whole:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        digest, size = hashlib.sha256(), os.path.getsize(shard.path)
        for number in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return "samples:" + digest.hexdigest()


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
        """Endless (micro_step, inputs, targets) of this rank, on its device."""
        share = self.config.gradient_accumulation_steps // self.world.size
        mine = range(self.world.rank * share, (self.world.rank + 1) * share)
        order = ((s, micro) for s in itertools.count(step) for micro in mine)
        return read_ahead(lambda place: (place[1], *self.at(*place)), order, self.world.device)


def read_ahead(read, places, device):
    """read(place) of each of `places`, its tensors on `device`: read by a thread while the one before is in use."""
    places, cuda = iter(places), device.type == "cuda"

    def pinned(place):
        return [item.pin_memory() if cuda and torch.is_tensor(item) else item for item in read(place)]

    # A thread starts on GPU 0, where pinning would take memory.
    own_gpu = dict(initializer=torch.cuda.set_device, initargs=(device,)) if cuda else {}
    with ThreadPoolExecutor(1, **own_gpu) as reader:
        ahead = [reader.submit(pinned, place) for place in itertools.islice(places, 1)]
        while ahead:
            items = ahead.pop().result()
            ahead += [reader.submit(pinned, place) for place in itertools.islice(places, 1)]
            yield [to_device(item, device) if torch.is_tensor(item) else item for item in items]


def to_device(tensor, device):
    """A copy on `device`: without waiting only from pinned memory, which is not used again before the copy is done."""
    return tensor.to(device, non_blocking=tensor.is_pinned())


def evaluation_batches(windows, config, world):
    """(inputs, targets, how many of the sequences count) of this rank's share of the evaluation's micro-batches.

    The same windows at every evaluation, seed and world size; as many micro-batches on every rank, since under fsdp a
    forward pass is all ranks' work: those that are too many count nothing.
    """
    count = min(len(windows), config.eval_iters * config.batch_size)
    count -= count % config.batch_size if count > config.batch_size else 0
    chosen = shuffled(np.arange(count), len(windows), seed=0)

    def read(first):
        mine = chosen[first + world.rank * config.batch_size :][: config.batch_size]
        return *windows[mine if len(mine) else chosen[: config.batch_size]], len(mine)

    return read_ahead(read, range(0, count, world.size * config.batch_size), world.device)
