"""The exact k-th smallest score, by streaming: two passes of counting, no sort, no gathering.

Scores become 32-bit integers of the same order. A first pass counts their high 16 bits into a histogram, which, summed
over the ranks, names the bucket that holds rank k; a second pass counts the low 16 bits inside that bucket. The memory is
one chunk and 512 KiB, and that is all that ranks exchange in a pass, whatever the number of weights.
"""

from dataclasses import dataclass

import torch

PRUNED = -(2**31)  # the key of a weight that is pruned already: below every score
EXCLUDED = 2**31 - 1  # the key of one that may not be pruned: above every score
BUCKETS = 2**16
NAN_BUCKETS = [*range(0xFFC0, 0xFFFF), *range(0x0001, 0x0040)]  # high bits of positive and negative quiet NaNs


def order_key(scores):
    """int32 of the same shape and order as the float32 `scores`; -0.0 and 0.0 give the same key. Scores must not be NaN.

    Floats of one sign are ordered like their bits; flipping the negative ones' turns their order round (Herf 2001,
    "Radix tricks").
    """
    bits = (scores + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def score_of(key):
    """The score whose key is the int `key`."""
    key = torch.tensor(key, dtype=torch.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32).item()


@dataclass(frozen=True)
class Threshold:
    """key: the k-th smallest; below, ties: how many keys are smaller, and equal; most: for each layer, an upper bound of
    how many are smaller or equal."""

    key: int
    below: int
    ties: int
    most: list


def kth_smallest(keys, k, layers, device, all_reduce):
    """The Threshold of rank k, 1 <= k <= number of keys. FloatingPointError where scores were NaN.

    keys: called once a pass, yields (layer, int32 tensor) for the weights that this rank counts;
    layers: how many there are; all_reduce: sums an int64 tensor over the ranks, in place.
    """
    high = histogram(((key >> 16) + BUCKETS // 2 for _, key in keys()), device)
    all_reduce(high)
    if int(high[NAN_BUCKETS].sum()):
        raise FloatingPointError("scores are NaN")
    bucket, before = bucket_of(high, k)

    most = torch.zeros(layers, dtype=torch.int64, device=device)
    last_of_bucket = ((bucket - BUCKETS // 2) << 16) + 0xFFFF

    def inside():
        for layer, key in keys():
            most[layer] += (key <= last_of_bucket).sum()
            yield key[(key >> 16) == bucket - BUCKETS // 2] & 0xFFFF

    low = histogram(inside(), device)
    both = all_reduce(torch.cat([low, most]))
    low, most = both[:BUCKETS], both[BUCKETS:]
    within, before_within = bucket_of(low, k - before)
    return Threshold(((bucket - BUCKETS // 2) << 16) + within, before + before_within, int(low[within]), most.tolist())


def histogram(pieces, device):
    """How often each number below BUCKETS occurs in the integer tensors `pieces`; small ones are counted together."""
    counts, waiting, size = torch.zeros(BUCKETS, dtype=torch.int64, device=device), [], 0
    for piece in pieces:
        waiting.append(piece.flatten())
        size += piece.numel()
        if size >= BUCKETS:
            counts += torch.bincount(torch.cat(waiting) if len(waiting) > 1 else waiting[0], minlength=BUCKETS)
            waiting, size = [], 0
    if size:
        counts += torch.bincount(torch.cat(waiting), minlength=BUCKETS)
    return counts


def bucket_of(counts, k):
    """(the bucket that holds rank k, how many lie in the buckets before it)."""
    total = counts.cumsum(0)
    bucket = int(torch.searchsorted(total, k))
    return bucket, int(total[bucket - 1]) if bucket else 0


def leave_ties(key, threshold, quota):
    """(live, taken): live is 0 where key < threshold and at the first `quota` places, in order, where it equals it, else 1."""
    ties = key == threshold
    count = int(ties.sum())
    if count > quota:
        ties = ties & (ties.flatten().cumsum(0) <= quota).view_as(ties)
    return ((key >= threshold) & ~ties).to(torch.int32), min(count, quota)
