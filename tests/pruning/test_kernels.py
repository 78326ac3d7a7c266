"""The kernels of an update against the torch operations that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import Pruner, kernels
from pruning.select import BUCKETS, EXCLUDED, PRUNED, count_buckets, divide, offsets, order_keys
from tests.pruning.helpers import adam_with, by_exp_avg, linears, zeros_of

compiler = pytest.mark.skipif(kernels.library() is None, reason="needs a C++ compiler")
CPU = torch.device("cpu")
BITS = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    st.sampled_from([0, -(2**31), 1, 0x7F800000, 0x7F800001, 0x7FFFFFFF, -1, -0x800000, 0x3F800000]),
)  # of floats: zeros, denormals, infinities and NaNs among them


def by_torch(function, *arguments):
    """What `function` gives without the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "library", lambda: None)
        return function(*arguments)


def looked_for(key, first, width):
    """(sorted offsets, most, worst) of keys in three pieces of two layers."""
    most, worst = torch.zeros(2, 2, dtype=torch.int64)
    pieces = list(zip((0, 1, 1), key.tensor_split(3)))
    near = torch.cat([*offsets(lambda: pieces, first, width, most, worst), torch.empty(0, dtype=torch.int32)])
    return near.sort().values, most, worst


@compiler
@settings(deadline=None)
@given(st.lists(st.tuples(BITS, BITS), min_size=1, max_size=200))
def test_keys_are_torchs_to_the_bit(numbers):
    scores, weight = torch.tensor(numbers, dtype=torch.int32).view(torch.float32).T
    assert torch.equal(order_keys(scores, weight), by_torch(order_keys, scores, weight))


@compiler
@settings(deadline=None)
@given(st.lists(st.tuples(BITS, BITS), min_size=1, max_size=200), st.data())
def test_scores_are_divided_as_torch_divides_them(numbers, data):
    scores, weight = torch.tensor(numbers, dtype=torch.int32).view(torch.float32).T
    at = data.draw(st.sampled_from([0.0, *scores[scores.isfinite()].tolist()]))
    (live, ties), expected = divide(scores, at, True, weight), by_torch(divide, scores, at, True, weight)
    assert torch.equal(live, expected[0]) and ties == expected[1] == ((scores == at) & (weight != 0)).sum()


@compiler
@settings(deadline=None)
@given(
    st.lists(st.one_of(BITS, st.integers(-300, 300)), min_size=1, max_size=300),
    st.one_of(st.integers(-(2**15), 2**15 - 1).map(lambda bucket: bucket << 16), st.integers(-300, 300)),
    st.sampled_from([1, 100, BUCKETS, 2**20, 2**31]),
)
def test_the_keys_of_a_window_are_torchs(keys, first, width):
    key, width = torch.tensor(keys, dtype=torch.int32), min(width, 2**31 - first)
    found, expected = looked_for(key, first, width), by_torch(looked_for, key, first, width)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
    assert torch.equal(found[0].long() + first, key[(key >= first) & (key <= first + width - 1)].long().sort().values)


@compiler
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [2**15, 2**15 + 1, 100_001, 2**18])
def test_any_number_of_threads_finds_the_same(size, threads):
    torch.manual_seed(size)
    scores, weight = torch.randn(2, size)
    weight[torch.rand(size) < 0.3] = 0
    before, expected = torch.get_num_threads(), by_torch(order_keys, scores, weight)
    first = int(expected.median())
    torch.set_num_threads(threads)
    try:
        key = order_keys(scores, weight)
        found = looked_for(key, first, 2**20), looked_for(key, PRUNED, 2**31), count_buckets([key, key[::3]], CPU)
        live, ties = divide(scores, scores[7].item(), True, weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(key, expected)
    for one, window in zip(found, [(first, 2**20), (PRUNED, 2**31)]):
        assert all(torch.equal(*pair) for pair in zip(one, by_torch(looked_for, key, *window)))
    assert torch.equal(found[2], by_torch(count_buckets, [key, key[::3]], CPU))
    assert torch.equal(live, (scores >= scores[7]).float()) and ties == (weight[7] != 0)


@compiler
def test_a_window_up_to_the_last_key_does_not_wrap():
    key = torch.tensor([PRUNED, -1, 0, EXCLUDED - 1, EXCLUDED], dtype=torch.int32)
    near, most, _ = looked_for(key, 0x7FFF0000, BUCKETS)
    assert near.tolist() == [BUCKETS - 2, BUCKETS - 1] and most.sum() == 5


@pytest.mark.parametrize("kept", [0, 2**20])
@pytest.mark.parametrize("criterion", ["bitter7", "movement", "random", "bitter5"])
def test_updates_without_a_compiler_prune_the_same_set(criterion, kept, monkeypatch):
    monkeypatch.setattr("pruning.scores.KEPT", kept)
    monkeypatch.setattr("pruning.scores.SAMPLED", 3000)

    def pruned():
        model = linears((130, 70), (65, 130), (3, 4), (1, 1))
        states = {name: [torch.rand_like(p) for p in model.parameters()] for name in ("exp_avg", "exp_avg_sq")}
        with torch.no_grad():
            model[1].weight.set_(model[1].weight.t().contiguous().t())  # as a user's transposed weight lies in memory
        pruner = Pruner(model, adam_with(model, **states), criterion, target_sparsity=0.8)
        for sparsity in (0.3, 0.6, 0.8):
            pruner.prune_to(sparsity)
        return zeros_of(model)

    found = pruned()
    assert (found == by_torch(pruned)).all() and found.sum() == round(0.8 * len(found))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
def test_default_dtypes_and_devices_change_nothing(default, monkeypatch):
    """Of a model whose keys are not kept, with ties at the threshold."""
    monkeypatch.setattr("pruning.scores.KEPT", 0)
    monkeypatch.setattr("pruning.scores.SAMPLED", 1000)
    model = linears((64, 64), (65, 63))
    scores = [torch.randint(9, p.shape).float() for p in model.parameters()]
    optimizer = adam_with(model, exp_avg=scores)
    set_default = torch.set_default_device if default == "meta" else torch.set_default_dtype
    set_default(default)
    try:
        pruner = Pruner(model, optimizer, by_exp_avg, target_sparsity=0.6)
        for sparsity in (0.3, 0.6):
            pruner.prune_to(sparsity)
    finally:
        set_default(None if default == "meta" else torch.float32)
    assert zeros_of(model).sum() == round(0.6 * pruner.prunable)


def test_scores_that_are_no_plain_tensors_are_left_to_torch():
    class Odd(torch.Tensor):
        pass

    model = linears((40, 30), (20, 40))
    pruner = Pruner(model, adam_with(model), lambda weight: weight.abs().as_subclass(Odd), target_sparsity=0.5)
    pruner.prune_to(0.5)
    other = linears((40, 30), (20, 40))
    Pruner(other, adam_with(other), "magnitude", target_sparsity=0.5).prune_to(0.5)
    assert (zeros_of(model) == zeros_of(other)).all()
