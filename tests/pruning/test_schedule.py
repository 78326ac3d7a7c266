import pytest

from pruning.schedule import SCHEDULES, sparsity_at


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
