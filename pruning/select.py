"""The exact k-th smallest score, by streaming: passes of counting, no sort, no gathering.

Scores become 32-bit integers of the same order. A first pass counts their high 16 bits into a histogram, which, summed
over the ranks, names the bucket that holds rank k; a second pass counts the keys in that bucket one by one. With a
sample at hand, one pass takes along the few keys among which rank k then must lie, and these two go over those; where
rank k turns out to lie elsewhere, they go over all keys. The memory is one chunk, the counts (512 KiB a pass) and what
is taken along, about a thirty-second of the keys at most; ranks exchange the counts alone, whatever the number of
weights.

On a GPU nothing here waits for the device before the result is read.
"""

import struct
from dataclasses import dataclass

import torch

from pruning import kernels
from pruning.zeros import zero_where_zero

PRUNED = -(2**31)  # the key of a weight that is pruned already: below every score
EXCLUDED = 2**31 - 1  # the key of one that may not be pruned: above every score
INFINITE = 0x7F800000  # the key of infinity; beyond it, and below that of -infinity, lie NaNs
BUCKETS = 2**16
FEW = 1 / 32  # share of the keys that may be taken along


def order_key(scores):
    """int32 of the same shape and order as the float32 `scores`; -0.0 and 0.0 give the same key. Those of NaNs lie
    beyond the infinities', and none is PRUNED or EXCLUDED, as that of a GPU's NaN, 0x7FFFFFFF, would be.

    Floats of one sign are ordered like their bits; flipping the negative ones' turns their order round (Herf 2001,
    "Radix tricks").
    """
    bits = (scores + 0.0).view(torch.int32)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF)).clamp_(PRUNED + 1, EXCLUDED - 1)


def order_keys(scores, weight):
    """The keys of the float32 `scores`, PRUNED where `weight`, float32 and of their shape, is zero."""
    if kernels.usable(scores, weight):
        return kernels.order_keys(scores, weight)
    key = order_key(scores).bitwise_xor_(PRUNED)  # in the order of unsigned integers: 0 comes first
    zero_where_zero(key.view(torch.float32), weight)
    return key.bitwise_xor_(PRUNED)


def score_of(key):
    """The score whose key is the int `key`."""
    return struct.unpack("<f", struct.pack("<i", key ^ ((key >> 31) & 0x7FFFFFFF)))[0]


@dataclass(frozen=True)
class Threshold:
    """key: the k-th smallest; below, ties: how many keys are smaller, and equal; most: for each layer, an upper bound
    of how many are smaller or equal."""

    key: int
    below: int
    ties: int
    most: list


def thresholds(found):
    """The Thresholds that `search` found: the one time that the host waits for the device in a selection.

    FloatingPointError where scores were NaN."""
    numbers = torch.stack(found).tolist()
    if any(nans for _, _, _, nans, *_ in numbers):
        raise FloatingPointError("scores are NaN")
    return [Threshold(key, below, ties, most) for key, below, ties, _, *most in numbers]


def search(keys, k, layers, device, all_reduce, sample=None):
    """int64 [4 + layers] on `device`: key, below, ties, whether scores were NaN, and most, of the Threshold of rank k,
    1 <= k <= number of keys.

    keys: called once a pass, yields (layer, int32 tensor) for the weights that this rank counts; layers: how many there
    are; all_reduce: sums an int64 tensor over the ranks, in place; sample: (int32 tensors of some of the keys, others
    on each rank, how many keys there are on all ranks, how many of these are PRUNED), or None.
    """
    if sample:
        found = search_near(keys, k, layers, device, all_reduce, sample)
        if found is not None:
            return found
    counts = all_reduce(count_buckets((key for _, key in keys()), device))
    first = first_key(torch.searchsorted(counts.cumsum(0), k))
    return search_bucket(keys, k, first, layers, device, all_reduce)[0]


def search_bucket(keys, k, first, layers, device, all_reduce):
    """(what `search` returns, whether rank k is in the bucket of keys from `first` on; the former holds only if it
    is)."""
    most, worst = torch.zeros(2, layers, dtype=torch.int64, device=device)
    counts = torch.zeros(BUCKETS, dtype=torch.int64, device=device)
    counts = histogram(offsets(keys, first, BUCKETS, most, worst), counts)
    counts, most, nans = all_reduce(torch.cat([counts, most, worst > INFINITE + 1])).split([BUCKETS, layers, layers])
    total = counts.cumsum(0)
    before = most.sum() - total[-1:]
    place = torch.searchsorted(total, k - before).clamp(max=BUCKETS - 1)
    ties = counts.gather(0, place)
    below = before + total.gather(0, place) - ties
    inside = (before < k) & (k <= before + total[-1:])
    return torch.cat([first + place, below, ties, nans.sum(0, keepdim=True), most]), inside


def search_near(keys, k, layers, device, all_reduce, sample):
    """What `search` returns, by one pass over all keys of a CPU; None where the sample does not say near which rank k
    is."""
    tensors, size, pruned = sample
    if k <= pruned:
        return None
    counts = all_reduce(count_buckets(tensors, device))
    first, width, share = likely_window(counts, (k - pruned) / (size - pruned))
    if width == BUCKETS:  # is counted as it is, however many tie there
        found, inside = search_bucket(keys, k, first, layers, device, all_reduce)
        return found if inside else None
    if not 0 < share <= FEW or width > 2**31:
        return None
    most, worst = torch.zeros(2, layers, dtype=torch.int64, device=device)
    near = list(offsets(keys, first, width, most, worst))
    near = torch.cat([torch.empty(0, dtype=torch.int32, device=device), *near])  # a rank may have none
    counts = torch.cat([torch.tensor([len(near)], device=device), most, worst > INFINITE + 1])
    number, most, nans = all_reduce(counts).split([1, layers, layers])
    before = most.sum() - number
    if not before < k <= before + number:
        return None
    place, below, ties = search(lambda: [(0, near)], k - int(before), 1, device, all_reduce)[:3].split(1)
    return torch.cat([first + place, before + below, ties, nans.sum(0, keepdim=True), most])


def count_buckets(keys, device):
    """int64 [BUCKETS]: how many of the keys, int32 tensors, are in each bucket."""
    counts = torch.zeros(BUCKETS, dtype=torch.int64, device=device)

    def without_kernel():
        for key in keys:
            if kernels.usable(key):
                kernels.count_buckets(key, counts)
            else:
                yield high_bits(key)

    return histogram(without_kernel(), counts)


def high_bits(key):
    """The number of the bucket, from 0, of each key."""
    return (key >> 16) + BUCKETS // 2


def first_key(bucket):
    """The first key of a bucket."""
    return (bucket - BUCKETS // 2) << 16


def likely_window(counts, share):
    """(first key, width, share of the sample inside) of a window of `width` keys in which the given share of all keys
    that are not PRUNED very likely ends.

    counts: how often each bucket occurs in a sample. Where a share p of the whole ends in a sample of n has a standard
    deviation of sqrt(n p (1 - p)); eight of them are allowed for, since rows of a weight are no independent draws.
    """
    total = counts[1:].cumsum(0)  # PRUNED keys are in the first bucket
    number = int(total[-1])
    margin = 8 * (number * share * (1 - share)) ** 0.5 + 8
    ranks = [max(1, int(share * number - margin)), min(int(share * number + margin), number)]
    low, high = (torch.searchsorted(total, torch.tensor(ranks, device=total.device)) + 1).tolist()
    inside = counts[low : high + 1]
    return first_key(low), len(inside) << 16, int(inside.sum()) / max(1, number)


def offsets(keys, first, width, most, worst):
    """Of each chunk of keys, how far those in the window of `width` keys are from the `first`: see `within`.

    On the way `most` of each layer grows by how many are not above the window, and `worst` to the largest magnitude, of
    which NaNs are known."""
    last = first + (width - 1)
    for layer, key in ((layer, key.flatten()) for layer, key in keys() if key.numel()):
        if kernels.usable(key):
            yield kernels.window(key, int(first), width, most[layer], worst[layer])
            continue
        spare = torch.empty_like(key)
        most[layer] += torch.le(key, last, out=spare).sum(dtype=torch.int32)
        magnitude = torch.bitwise_right_shift(key, 31, out=spare).bitwise_xor_(key).add_(1)
        worst[layer] = torch.maximum(worst[layer], magnitude.max())  # 1 too large: PRUNED and EXCLUDED wrap
        yield within(key - first, width, spare)


def within(offset, width, spare):
    """Those of the offsets that are below `width` and not negative; on a GPU, which would have to wait for a choice,
    (offsets, mask of those).

    offset: of one dimension; spare: like it, and overwritten. On a CPU a choice by single booleans would cost more than
    all else here, so eight are looked at together.
    """
    inside = torch.clamp(offset, 0, width - 1, out=spare) == offset
    if offset.device.type != "cpu":
        return offset, inside
    if offset.numel() % 8 == 0:
        eights = inside.view(torch.int64).nonzero().squeeze(1)
        offset, inside = offset.view(-1, 8).index_select(0, eights), inside.view(-1, 8).index_select(0, eights)
    return offset[inside]


def histogram(pieces, counts):
    """`counts`, int64 [BUCKETS], to which is added how often each number below BUCKETS occurs.

    pieces: integer tensors; on a GPU also (integer tensor, mask of those of its numbers that count; the others may be
    any), which adds all of them, the others as zeros. On a CPU small pieces are counted together.
    """
    waiting, length = [], 0
    for piece in pieces:
        if counts.device.type != "cpu":
            numbers, chosen = piece if isinstance(piece, tuple) else (piece, None)
            numbers = numbers.flatten().to(torch.int64)
            ones = torch.ones_like(numbers) if chosen is None else chosen.flatten().to(torch.int64)
            counts.scatter_add_(0, numbers & (BUCKETS - 1), ones)  # the others are spread, lest all meet at one address
            continue
        waiting.append(piece.flatten())
        length += len(waiting[-1])
        if length >= BUCKETS:
            counts += torch.bincount(torch.cat(waiting), minlength=BUCKETS)
            waiting, length = [], 0
    return counts + torch.bincount(torch.cat(waiting), minlength=BUCKETS) if length else counts


def leave_first(chosen, number):
    """int32 of the shape of the boolean `chosen`: 0 at the first `number` places, in order, where it holds, else 1."""
    return (~(chosen & (chosen.flatten().cumsum(0) <= number).view_as(chosen))).to(torch.int32)


def divide(numbers, at, ties_live, weight=None):
    """(live, ties) of `Scores.divide`, of numbers in the order of keys and the one to compare with.

    weight: with float32 numbers, of their shape, where ties at which it is zero do not count."""
    if ties_live and weight is not None and kernels.usable(numbers, weight):
        return kernels.divide(numbers, at, weight)
    live = torch.empty_like(numbers)
    if not ties_live:
        return torch.gt(numbers, at, out=live), None
    torch.ge(numbers, at, out=live)
    equal = torch.eq(numbers, at, out=torch.empty_like(numbers))
    if weight is not None:
        zero_where_zero(equal, weight)
    return live, equal.count_nonzero()
