import resource
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt2.data import TrainingBatches, Windows, evaluation_batches, shuffled, window_numbers
from gpt2.errors import UserError
from gpt2.shards import find_shards
from tests.conftest import write_shard


def config(**changes):
    return SimpleNamespace(**dict(batch_size=3, gradient_accumulation_steps=4, seed=5, eval_iters=4) | changes)


def world(rank=0, size=1):
    return SimpleNamespace(rank=rank, size=size, device=torch.device("cpu"))


@pytest.fixture
def windows(tmp_path):
    """Shards of 100, 51 and 7 tokens that count upwards: a window tells where it begins."""
    start = 0
    for number, size in enumerate((100, 51, 7)):
        write_shard(tmp_path / f"x_train_{number:06d}.bin", range(start, start + size))
        start += 1000
    return Windows(find_shards(tmp_path, "train"), block_size=10, vocab_size=5000)


def test_windows_are_disjoint_and_targets_are_the_next_tokens(windows):
    inputs, targets = windows[np.arange(len(windows))]
    assert inputs.dtype == torch.int64 and inputs.shape == (9 + 5, 10)
    assert inputs[:, 0].tolist() == [*range(0, 90, 10), *range(1000, 1050, 10)]
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_an_epoch_visits_every_window_once_in_a_shuffled_order(size):
    first, second = (window_numbers(epoch * size, size, size, seed=1) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(size))
    if size > 60:
        assert (first != second).mean() > 0.9 and (first != np.arange(size)).mean() > 0.9
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.3 and abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.3


def test_a_batch_that_crosses_epochs_is_their_concatenation():
    whole = window_numbers(0, 30, 10, seed=3)
    assert (window_numbers(7, 9, 10, seed=3) == whole[7:16]).all()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_world_sizes_see_the_same_global_batches(ranks, windows):
    alone = TrainingBatches(windows, config(), world())
    together = [TrainingBatches(windows, config(), world(rank, ranks)).from_step(2) for rank in range(ranks)]
    for step in (2, 3):
        for _ in range(4 // ranks):
            for batches in together:
                micro_step, inputs, targets = next(batches)
                expected = alone.at(step, micro_step)
                assert torch.equal(inputs, expected[0]) and torch.equal(targets, expected[1])


def test_the_split_into_micro_batches_does_not_change_the_global_batch(windows):
    def sequences(batch_size, steps):
        batches = TrainingBatches(windows, config(batch_size=batch_size, gradient_accumulation_steps=steps), world())
        return torch.cat([batches.at(3, micro)[0] for micro in range(steps)])

    assert torch.equal(sequences(3, 4), sequences(6, 2)) and torch.equal(sequences(3, 4), sequences(1, 12))


def test_evaluation_is_fixed_and_shared_out(windows):
    def all_of(ranks, **changes):
        parts = [list(evaluation_batches(windows, config(**changes), world(rank, ranks))) for rank in range(ranks)]
        return sorted(x[0].item() for part in parts for inputs, _, number in part for x in inputs[:number])

    assert all_of(1) == all_of(2) == all_of(3) == all_of(1, seed=99) and len(set(all_of(1))) == 12


def test_a_trillion_tokens_cost_no_more_than_a_thousand(tmp_path):
    """10,000 sparse files of 100 M tokens; the epoch's order is computed, and step 500,000 costs what step 0 does."""
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 100_000_000
    for number in range(10_000):
        with open(tmp_path / f"x_train_{number:06d}.bin", "wb") as file:
            file.write(header.tobytes())
            file.truncate(1024 + 200_000_000)
    batches = TrainingBatches(
        Windows(find_shards(tmp_path, "train"), 1024, 50257),
        config(batch_size=2, gradient_accumulation_steps=1),
        world(),
    )
    assert len(batches.windows) == 10_000 * 97656
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(1, 1001):
        batches.at(step, 0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB of memory grown in 1,000 steps"
    seconds = {}
    for start in (1, 500_000):
        begin = time.perf_counter()
        for step in range(start, start + 200):
            batches.at(step, 0)
        seconds[start] = time.perf_counter() - begin
    assert seconds[500_000] < 3 * seconds[1] + 0.1


def test_a_token_out_of_range_is_named_when_the_data_is_too_large_to_scan(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2.data.SCAN_TOKENS", 0)
    write_shard(tmp_path / "x_train_000000.bin", [1] * 50 + [77])
    windows = Windows(find_shards(tmp_path, "train"), 10, 60)
    windows[np.arange(4)]
    with pytest.raises(UserError, match="x_train_000000.bin: holds token 77"):
        windows[np.arange(5)]


def test_permutations_of_neighbouring_seeds_are_unrelated():
    orders = [shuffled(np.arange(5000), 5000, [seed, 0]) for seed in range(4)]
    for i in range(4):
        for j in range(i):
            assert (orders[i] == orders[j]).mean() < 0.005
