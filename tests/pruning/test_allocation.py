import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import Pruner
from pruning.allocation import ALLOCATIONS, erk, exact_counts, layer_adaptive
from tests.pruning.helpers import adam_with, linears

SHAPES = [(6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]
SIZES = [math.prod(shape) for shape in SHAPES]


@pytest.mark.parametrize("name", ["uniform", "layer_adaptive", "erk"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.9, 0.97])
def test_shares_average_to_the_sparsity(name, sparsity):
    shares = ALLOCATIONS[name](SHAPES, sparsity)
    assert np.average(shares, weights=SIZES) == pytest.approx(sparsity, abs=1e-9)
    assert all(-1e-9 <= share <= max(0.95, sparsity) + 1e-9 or name == "erk" for share in shares)


def test_layer_adaptive_rises_from_7_to_13_tenths():
    shares = layer_adaptive([(10, 10)] * 5, 0.5)
    assert shares == pytest.approx([0.35, 0.425, 0.5, 0.575, 0.65])


def test_layer_adaptive_caps_at_95_percent():
    shares = layer_adaptive([(10, 10)] * 5, 0.9)
    assert max(shares) == 0.95 and np.mean(shares) == pytest.approx(0.9)


def test_erk_densities_are_in_proportion_to_sum_over_product():
    density = 1 - np.array(erk(SHAPES, 0.8))
    assert density[0] == 1  # the small first layer would need more than all its weights
    expected = np.array([sum(shape) / math.prod(shape) for shape in SHAPES])
    free = density < 1 - 1e-9
    assert free.sum() >= 3 and density[free] / expected[free] == pytest.approx(
        np.full(free.sum(), (density / expected)[free][0])
    )
    assert (expected[~free] >= expected[free].max()).all()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=8), st.data())
def test_counts_add_up_within_their_bounds(layers, data):
    sizes, shares = [size for size, _ in layers], [share for _, share in layers]
    at_least = [data.draw(st.integers(0, size)) for size in sizes]
    total = data.draw(st.integers(sum(at_least), sum(sizes)))
    counts = exact_counts(shares, sizes, total, at_least)
    assert sum(counts) == total and all(low <= count <= size for low, count, size in zip(at_least, counts, sizes))
    assert counts == one_by_one(shares, sizes, total, at_least)


def one_by_one(shares, sizes, total, at_least):
    """What exact_counts gives, a weight at a time."""
    exact = [share * size for share, size in zip(shares, sizes)]
    counts = [min(size, max(low, int(e))) for e, size, low in zip(exact, sizes, at_least)]
    order = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])
    while sum(counts) != total:
        more = sum(counts) < total
        for i in order if more else order[::-1]:
            if sum(counts) != total and (counts[i] < sizes[i] if more else counts[i] > at_least[i]):
                counts[i] += 1 if more else -1
    return counts


def test_shares_far_from_the_total_take_no_longer():
    sizes = [2**21] * 60
    began = time.perf_counter()
    assert sum(exact_counts([0.001] * 60, sizes, 60 * 2**20 + 7, [0] * 60)) == 60 * 2**20 + 7
    assert sum(exact_counts([0.0] * 60, sizes, 60 * 2**20, [2**21] * 20 + [0] * 40)) == 60 * 2**20
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("name", ["uniform", "layer_adaptive", "erk"])
def test_each_layer_loses_its_lowest_weights_and_the_total_is_exact(name):
    torch.manual_seed(0)
    shapes = [(7, 9), (13, 5), (3, 40)]
    model = linears(*shapes)
    before = [m.weight.detach().clone() for m in model]
    pruner = Pruner(model, adam_with(model), "magnitude", 0.8, allocation=name)
    for sparsity in (0.1, 0.35, 0.36, 0.37, 0.8):
        pruner.prune_to(sparsity)
        zeros = [int((m.weight == 0).sum()) for m in model]
        assert sum(zeros) == round(sparsity * pruner.prunable)
    shares = ALLOCATIONS[name](shapes, 0.8)
    for layer, dense, zero, share in zip(model, before, zeros, shares):
        assert abs(zero - share * dense.numel()) <= 1
        assert torch.equal(layer.weight == 0, dense.abs() <= dense.abs().flatten().kthvalue(zero).values)
