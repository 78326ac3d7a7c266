"""Loss, perplexity and bits per byte of a model on token shards, with standard errors, over all ranks."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from gpt2 import parallel
from gpt2.data import shuffled
from gpt2.errors import UserError
from gpt2.shards import check_tokens

LOGITS = {"cpu": 2**26, "cuda": 2**29}  # computed at a time: 256 MiB and 2 GiB in float32


class Strides:
    """Windows of up to `block_size` tokens, each `stride` further than the one before; every token of a shard but its
    first is a target once, in the first window that reaches it.

    `self[number]` -> (inputs, targets), int64 [block_size] each, targets -1 where there is nothing to predict. With
    stride = block_size the windows do not overlap. A smaller stride costs block_size / stride times as much, and gives
    every token (but the first of a shard) at least block_size - stride tokens of context: the sliding window of
    transformers' guide to the perplexity of fixed-length models. whole=False leaves out the last window of a shard
    where it is not a full one.
    """

    def __init__(self, shards, block_size, stride, vocab_size, whole=True):
        self.shards, self.block_size, self.stride, self.vocab_size = shards, block_size, stride, vocab_size
        self.ends = np.cumsum([self.windows_in(shard.tokens - 1, whole) for shard in shards])
        if self.ends[-1] == 0:
            raise UserError(
                f"{shards[0].path}: holds no {'' if whole else 'full '}window of block_size={block_size} tokens"
            )

    def windows_in(self, targets, whole):
        beyond_first = (targets - self.block_size) / self.stride
        count = 1 + (math.ceil(max(0, beyond_first)) if whole else math.floor(beyond_first))
        return max(0, count) if targets > 0 else 0

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, number):
        index = int(np.searchsorted(self.ends, number, side="right"))
        shard, place = self.shards[index], number - (self.ends[index - 1] if index else 0)
        start = int(place) * self.stride
        tokens = shard.read(start, min(self.block_size + 1, shard.tokens - start))
        check_tokens(shard.path, tokens, self.vocab_size)
        tokens = torch.from_numpy(tokens.astype(np.int64))
        inputs, targets = torch.zeros(self.block_size, dtype=torch.int64), torch.full((self.block_size,), -1)
        inputs[: len(tokens) - 1], targets[: len(tokens) - 1] = tokens[:-1], tokens[1:]
        if place:
            targets[: self.block_size - self.stride] = -1
        return inputs, targets


@torch.no_grad()
def token_losses(model, inputs, targets, device, dtype):
    """The loss (nats, float32, on the CPU) of each target, [rows, time]; 0 where targets are -1."""
    with parallel.autocast(device, dtype):
        logits = model(inputs.to(device))[0]
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.to(device).flatten(), ignore_index=-1, reduction="none"
    )
    return losses.view(targets.shape).cpu()


def rows_at_a_time(device, block_size, vocab_size):
    """How many rows of block_size tokens are computed together."""
    return max(1, LOGITS.get(device.type, LOGITS["cpu"]) // (block_size * vocab_size))


def measure(model, windows, numbers, bytes_of, world, dtype, progress=lambda rows: None):
    """Losses of the windows `numbers`, shared out over the ranks, as a dict that evaluation.json holds.

    bytes_of: bytes that each token of the vocabulary stands for, or None. The standard errors take windows as what is
    drawn, since the tokens of one depend on each other: those of a ratio, sum(loss) / sum(tokens or bytes) over
    windows. Bits per byte leave out targets that stand for no byte (end-of-text), as the vocabulary decides whether
    there are any.
    """
    rows = min(rows_at_a_time(world.device, windows.block_size, windows.vocab_size), -(-len(numbers) // world.size))
    weights = torch.zeros(windows.vocab_size + 1)
    known = (bytes_of or [])[: windows.vocab_size]  # a tokenizer may have more: special tokens that no text holds
    weights[: len(known)] = torch.tensor(known, dtype=torch.float32)
    per_token, per_byte = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for first in range(world.rank * rows, len(numbers), world.size * rows):
        inputs, targets = map(torch.stack, zip(*(windows[int(number)] for number in numbers[first : first + rows])))
        losses, sizes = token_losses(model, inputs, targets, world.device, dtype).double(), weights[targets].double()
        per_token += moments(losses.sum(1), (targets >= 0).sum(1).double())
        per_byte += moments((losses * (sizes > 0)).sum(1), sizes.sum(1))
        progress(len(inputs))
    sums = parallel.sum_over_ranks(torch.cat([per_token, per_byte]), world)
    loss, error, tokens = ratio(sums[:6])
    facts = {"val_loss": loss, "val_loss_stderr": error, "perplexity": math.exp(min(loss, 700)), "tokens": int(tokens)}
    if bytes_of:
        bits, error, bytes_read = (value / math.log(2) for value in ratio(sums[6:]))
        facts |= {"bits_per_byte": bits, "bits_per_byte_stderr": error, "bytes": round(bytes_read * math.log(2))}
    facts = {name: value for name, value in facts.items() if not (name.endswith("_stderr") and math.isnan(value))}
    return facts | {"windows": len(numbers), "block_size": windows.block_size, "stride": windows.stride}


def moments(losses, sizes):
    """Sums over windows that `ratio` needs: count, losses, sizes, and their squares and product."""
    one = torch.ones_like(losses)
    return torch.stack([one, losses, sizes, losses**2, sizes**2, losses * sizes]).sum(1)


def ratio(sums):
    """(mean, its standard error, total size) of losses a size, from the sums of `moments`. Cochran 1977, section
    2.11."""
    count, losses, sizes, losses2, sizes2, products = sums.tolist()
    mean = losses / max(sizes, 1)
    scatter = max(0.0, losses2 - 2 * mean * products + mean**2 * sizes2)
    error = math.sqrt(scatter * count / max(1, count - 1)) / max(sizes, 1) if count > 1 else math.nan  # unknown
    return mean, error, sizes


def chosen(shards, block_size, stride, vocab_size, tokens):
    """(windows, numbers of those to measure): all of them, or as many as `tokens` targets need, spread over the shards.

    Without a stride these are the first windows in the order of training's evaluations, so that tokens = eval_iters ·
    batch_size · block_size gives a run's own val_loss.
    """
    windows = Strides(shards, block_size, stride, vocab_size, whole=tokens is None)
    if tokens is None:
        return windows, np.arange(len(windows))
    count = min(len(windows), max(1, tokens // stride))
    return windows, shuffled(np.arange(count), len(windows), seed=0)
