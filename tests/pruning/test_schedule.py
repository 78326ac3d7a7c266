import pytest

from pruning import Pruner
from pruning.schedule import SCHEDULES, sparsity_at
from tests.pruning.helpers import adam_with, linears


@pytest.mark.parametrize("name, half", [("linear", 0.5), ("cubic", 0.125), ("gmp", 0.875), ("oneshot", 1.0)])
def test_shapes(name, half):
    schedule = SCHEDULES[name]
    values = [sparsity_at(step, schedule, 0.8, begin=10, end=30) for step in range(50)]
    assert values[:10] == [0.0] * 10 and values[30:] == [0.8] * 20
    assert values[20] == pytest.approx(0.8 * half)
    assert values == sorted(values)


def test_begin_at_the_end_prunes_at_once():
    assert [sparsity_at(step, SCHEDULES["gmp"], 0.5, 5, 5) for step in (4, 5, 6)] == [0.0, 0.5, 0.5]


def test_a_schedule_of_ones_own():
    assert sparsity_at(15, lambda progress: progress**2, 0.8, 10, 20) == pytest.approx(0.2)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("begin, end, interval", [(1, 10, 1), (250, 750, 10), (10, 33, 10), (7, 7, 20)])
def test_every_update_takes_its_step_of_the_ramp(name, begin, end, interval):
    """Update i of n prunes to schedule(i / n): the first prunes, none jumps, the last ends at the target."""
    model = linears((40, 40))
    pruner = Pruner(model, adam_with(model), "magnitude", 0.8, name, begin, end, interval)
    steps, shares = zip(*pruner.plan(end + 100)["updates"])
    assert (steps[0], steps[-1], shares[-1]) == (begin, end, 0.8)
    if (end - begin) % interval == 0:
        n = len(steps)
        assert shares == pytest.approx([0.8 * SCHEDULES[name](i / n) for i in range(1, n + 1)])
    assert shares[0] > 0 and list(shares) == sorted(shares)


@pytest.mark.parametrize("begin, end, interval", [(5, 7, 100), (1, 2, 10)])
def test_where_the_interval_is_longer_than_the_ramp_its_two_updates_share_it(begin, end, interval):
    model = linears((40, 40))
    pruner = Pruner(model, adam_with(model), "magnitude", 0.9, "linear", begin, end, interval)
    assert pruner.plan(end)["updates"] == [(begin, 0.45), (end, 0.9)]
