import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import Pruner
from pruning.select import EXCLUDED, PRUNED, histogram, order_key, score_of, search, thresholds
from tests.pruning.helpers import adam_with, by_exp_avg, linears, lowest, zeros_of

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, float("inf"), -float("inf"), 1.0000001]
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def kth_smallest(*arguments):
    """The Threshold of one search on one rank."""
    return thresholds([search(*arguments)])[0]


@given(st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False)), min_size=2, max_size=50))
def test_keys_have_the_order_of_the_scores(values):
    scores = torch.tensor(values, dtype=torch.float32)
    keys = order_key(scores)
    assert torch.equal(keys[:, None] < keys[None], scores[:, None] < scores[None])
    assert torch.equal(keys[:, None] == keys[None], scores[:, None] == scores[None])
    assert [score_of(key) for key in keys.tolist()] == scores.tolist()


@pytest.mark.parametrize("size", [1, 2, 1000, 2**16 + 1, 10**6])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "tiny"])
def test_the_kth_smallest_is_a_full_sorts(size, kind):
    torch.manual_seed(size)
    scores = {
        "normal": torch.randn(size),
        "ties": torch.randint(-3, 3, (size,)).float(),
        "equal": torch.full((size,), 0.25),
        "tiny": torch.randn(size) * 1e-42,
    }[kind]
    keys, order = order_key(scores), scores.sort().values
    chunks = list(zip((0, 1, 1, 1, 1), keys.tensor_split([size // 7, size // 3, size // 2, size - 1])))
    for k in sorted({1, 2, size // 3, size // 2, size - 1, size} - {0}):
        if k <= size:
            found = kth_smallest(lambda: iter(chunks), k, 2, keys.device, lambda x: x)
            assert score_of(found.key) == order[k - 1]
            assert found.below == (scores < order[k - 1]).sum() and found.ties == (scores == order[k - 1]).sum()
            assert all(
                most >= sum(int((key <= found.key).sum()) for place, key in chunks if place == layer)
                for layer, most in enumerate(found.most)
            )


@pytest.mark.parametrize("sampled", ["fair", "misleading", "empty", "one"])
@pytest.mark.parametrize("kind", ["normal", "ties", "wide", "pruned"])
def test_a_sample_changes_nothing_but_the_time(sampled, kind):
    torch.manual_seed(0)
    size = 200_000
    scores = {
        "normal": torch.randn(size),
        "ties": torch.randint(-3, 3, (size,)).float(),
        "wide": torch.randn(size) * 10 ** (40 * torch.rand(size) - 30),
        "pruned": torch.rand(size),
    }[kind]
    keys, passes = order_key(scores), []
    if kind == "pruned":
        keys[::2] = PRUNED
    order = keys.sort().values
    sample = {
        "fair": keys[torch.randperm(size)[: size // 2]],
        "misleading": order[-1000:],
        "empty": keys[:0],
        "one": keys[:1],
    }[sampled]

    def chunks():
        passes.append(1)
        return enumerate(keys.split(size // 2))

    for k in (1, size // 3, size * 5 // 12, size // 2 + 5, size):
        passes.clear()
        found = kth_smallest(chunks, k, 2, keys.device, lambda x: x, ([sample], size, int((keys == PRUNED).sum())))
        assert (found.key, found.below, found.ties) == (
            order[k - 1],
            (keys < found.key).sum(),
            (keys == found.key).sum(),
        )
        if sampled == "fair" and k == size // 2 + 5:
            assert len(passes) == (2 if kind == "ties" else 1)  # the keys of two ties, a third of all: too many to keep
        if sampled == "fair" and kind == "ties" and k == size * 5 // 12:
            assert len(passes) == 1


@pytest.mark.parametrize("nan", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -0x400000, -1, -0x7FFFFF])  # bits, a GPU's second
@pytest.mark.parametrize("sampled", [False, True])
def test_a_nan_is_noticed_and_infinities_are_not_taken_for_one(nan, sampled):
    scores = torch.tensor([1.0, 2.0, math.inf, -math.inf])
    for bad in (False, True):
        number = torch.tensor([nan], dtype=torch.int32).view(torch.float32)
        assert number.isnan()
        key = order_key(torch.cat([scores, number]) if bad else scores)
        key = torch.cat([key, torch.tensor([PRUNED, EXCLUDED], dtype=torch.int32)])
        sample = ([key], len(key), 1) if sampled else None
        with pytest.raises(FloatingPointError) if bad else contextlib.nullcontext():
            kth_smallest(lambda key=key: [(0, key)], 2, 1, key.device, lambda x: x, sample)


@pytest.mark.parametrize("criterion", ["bitter7", "bitter5", "random", "movement"])
def test_the_pruner_samples_large_models_and_prunes_the_same_set(criterion, monkeypatch):
    results = []
    cases = ((1, 0), (3000, 0), (2**62, 0), (3000, 2**20), (2**62, 2**20))  # every 64th row, every 5th, none; keys kept
    for least, kept in cases:
        monkeypatch.setattr("pruning.scores.SAMPLED", least)
        monkeypatch.setattr("pruning.scores.KEPT", kept)
        torch.manual_seed(0)
        model = linears((130, 70), (65, 130), (3, 4))
        optimizer = adam_with(
            model,
            exp_avg=[torch.randn_like(p) for p in model.parameters()],
            exp_avg_sq=[torch.rand_like(p) for p in model.parameters()],
        )
        pruner = Pruner(model, optimizer, criterion, target_sparsity=0.8)
        for sparsity in (0.3, 0.8):
            pruner.prune_to(sparsity)
        results.append(zeros_of(model))
    assert all((found == results[0]).all() for found in results)
    assert results[0].sum() == round(0.8 * len(results[0]))


def test_small_pieces_are_counted_like_large_ones():
    numbers = torch.randint(0, 2**16, (200_000,))
    expected = torch.bincount(numbers, minlength=2**16)
    for sizes in (1000, 70_000, 200_000):
        assert torch.equal(histogram(numbers.split(sizes), torch.zeros(2**16, dtype=torch.int64)), expected)


@st.composite
def layers_of_scores(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 9)), min_size=1, max_size=4))
    values = (
        st.one_of(st.sampled_from(SPECIAL[:-1]), finite)
        if draw(st.booleans())
        else st.sampled_from([0.0, -0.0, 1.0, -2.0])
    )
    scores = [draw(st.lists(values.filter(math.isfinite), min_size=r * c, max_size=r * c)) for r, c in shapes]
    return shapes, [np.array(s, np.float32) for s in scores]


@settings(deadline=None, max_examples=150)
@given(
    layers_of_scores(),
    st.floats(0, 0.999),
    st.floats(0, 0.999),
    st.sampled_from([1.0, 0.98, 0.6]),
    st.integers(1, 11),
    st.sampled_from([1, 20, 2**18]),
    st.booleans(),
)
def test_updates_take_exactly_what_a_full_sort_takes(problem, first, second, cap, chunk, sampled, kept):
    """Two updates after one another, ties, signed zeros, caps, chunks of any size, samples of all kinds, and kept keys
    included."""
    shapes, scores = problem
    model = linears(*shapes)
    optimizer = adam_with(model, exp_avg=[torch.tensor(s).view(shape) for s, shape in zip(scores, shapes)])
    target = max(first, second)
    pruner = Pruner(model, optimizer, by_exp_avg, target_sparsity=target, max_layer_sparsity=cap)
    caps = [math.ceil(max(cap, target) * len(s)) for s in scores]
    pruned = [np.zeros(len(s), bool) for s in scores]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pruning.scores.CHUNK", {"cpu": chunk})
        patch.setattr("pruning.scores.SAMPLED", sampled)
        patch.setattr("pruning.scores.KEPT", 2**20 if kept else 0)
        patch.setattr("pruning.select.FEW", 1)
        for sparsity in sorted((first, second)):
            k = round(sparsity * pruner.prunable)
            expected = lowest(scores, pruned, k, caps)
            pruner.prune_to(sparsity)
            assert (zeros_of(model) == expected).all() and pruner.pruned == expected.sum() == k
            pruned = np.split(expected, np.cumsum([len(s) for s in scores])[:-1])
            scores = [np.where(p, 0, s) for p, s in zip(pruned, scores)]


def test_large_layers_in_many_chunks_are_exact():
    torch.manual_seed(0)
    shapes = [(700, 900), (3, 200_000), (1, 5)]
    model = linears(*shapes)
    scores = [torch.randn(shape).round(decimals=2) for shape in shapes]
    Pruner(model, adam_with(model, exp_avg=scores), by_exp_avg, target_sparsity=0.7).prune_to(0.7)
    flat = [s.flatten().numpy() for s in scores]
    assert (
        zeros_of(model) == lowest(flat, [np.zeros(len(s), bool) for s in flat], round(0.7 * sum(map(len, flat))))
    ).all()


@pytest.mark.parametrize("kept", [False, True])
def test_ties_are_looked_for_once_more_only_where_they_are_taken(kept, monkeypatch):
    monkeypatch.setattr("pruning.scores.KEPT", 2**20 if kept else 0)
    model = linears(*[(5, 8)] * 20)
    scores = torch.arange(1.0, 801.0).view(20, 5, 8)
    scores[[3, 7, 11, 19], 2, 2] = 400.5  # the 398th to the 401st
    pruner = Pruner(model, adam_with(model, exp_avg=list(scores)), by_exp_avg, target_sparsity=0.5)
    scored, score = [], pruner.scores.score
    pruner.scores.score = lambda i, rows: scored.append(i) or score(i, rows)
    pruner.prune_to(0.5)
    expected = lowest([s.flatten().numpy() for s in scores], [np.zeros(40, bool)] * 20, 400)
    assert (zeros_of(model) == expected).all()
    if kept:  # each weight is scored once, and nothing is left of it
        assert scored == [*range(20)] and pruner.scores.kept is None
        return
    assert scored == [*range(20)] * 3 + [3, 7, 11][: len(scored) - 60] and 60 < len(scored) < 64
