"""Allocations: how many weights each layer gives up. `global` leaves that to the scores; the others fix it beforehand.

An allocation takes the layers' shapes and the overall sparsity and returns the share of each layer that is to be zero,
which `exact_counts` turns into whole weights that add up to the total.
"""

import math


def uniform(shapes, sparsity):
    """The same sparsity in every layer."""
    return [sparsity for _ in shapes]


def layer_adaptive(shapes, sparsity):
    """More in later layers: sparsity · (0.7 + 0.6 · layer / (layers − 1)), at most 0.95, as the source's bitter4.

    That alone misses the overall sparsity, since layers differ in size, so the uncapped layers are then scaled by one
    common factor until the total is right. Above an overall 0.95 the cap gives way.
    """
    last = max(1, len(shapes) - 1)
    wanted = [sparsity * (0.7 + 0.6 * layer / last) for layer in range(len(shapes))]
    return scaled_to(wanted, [math.prod(shape) for shape in shapes], sparsity, cap=max(0.95, sparsity))


def erk(shapes, sparsity):
    """Erdős–Rényi-kernel: density in proportion to the sum of a layer's dimensions over their product (Evci et al.
    2020, arXiv:1911.11134, section 3), so that small layers stay denser; layers that would need more than all weights
    stay dense."""
    sizes = [math.prod(shape) for shape in shapes]
    wanted = [sum(shape) / math.prod(shape) for shape in shapes]
    return [1 - density for density in scaled_to(wanted, sizes, 1 - sparsity, cap=1.0)]


def scaled_to(wanted, sizes, overall, cap):
    """The shares min(cap, c · wanted) with the c for which their mean, weighted by `sizes`, is `overall`."""
    capped = set()
    while True:
        free = [i for i in range(len(sizes)) if i not in capped]
        rest = overall * sum(sizes) - cap * sum(sizes[i] for i in capped)
        weight = sum(wanted[i] * sizes[i] for i in free)
        c = rest / weight if weight else 0.0
        over = {i for i in free if c * wanted[i] > cap}
        if not over:
            return [cap if i in capped else c * wanted[i] for i in range(len(sizes))]
        capped |= over


ALLOCATIONS = {"global": None, "uniform": uniform, "layer_adaptive": layer_adaptive, "erk": erk}


def exact_counts(shares, sizes, total, at_least):
    """Whole numbers close to share · size that add up to `total`, none below `at_least` (weights already pruned) or
    above size.

    shares: sparsity of each layer; sizes, at_least: weights of each. Rounds down and hands out what is missing one by
    one, the largest remainder first; what `at_least` adds too much is taken so, where most lies above it. Where that
    is many times round all layers, these rounds are taken at once.
    """
    exact = [share * size for share, size in zip(shares, sizes)]
    counts = [min(size, max(low, math.floor(e))) for e, size, low in zip(exact, sizes, at_least)]
    missing = total - sum(counts)
    order = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])
    while missing > 0:
        room = [i for i in order if counts[i] < sizes[i]]
        rounds = min(max(1, missing // len(room)), min(sizes[i] - counts[i] for i in room))
        for i in room[:missing]:
            counts[i] += rounds
        missing -= rounds * len(room[:missing])
    while missing < 0:
        room = [i for i in reversed(order) if counts[i] > at_least[i]]
        rounds = min(max(1, -missing // len(room)), min(counts[i] - at_least[i] for i in room))
        for i in room[:-missing]:
            counts[i] -= rounds
        missing += rounds * len(room[:-missing])
    return counts
