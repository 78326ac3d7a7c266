"""Loops timed in turn: which steps count, on which batches, and what becomes of a loop that fails."""

import os
import time

import pytest
import torch

from bench import turns
from bench.turns import in_turn, ratio, spread

SHAPE = (2, 5)


def loop(seconds):
    """A step that takes so long, and whose loss is the sum of its tokens."""

    def step(inputs, targets):
        assert inputs.shape == targets.shape == SHAPE and torch.equal(inputs[:, 1:], targets[:, :-1])
        time.sleep(seconds)
        return inputs.sum()

    return step


def broken(how):
    if how == "when it is made":
        raise ValueError("no such model")
    return lambda inputs, targets: os._exit(3)


def test_all_loops_take_the_same_batches_and_their_second_steps_count():
    rows = in_turn({"fast": (loop, (0.0,)), "slow": (loop, (0.03,))}, 100, SHAPE, rounds=3)
    assert rows["fast"]["loss"] == rows["slow"]["loss"] > 0
    assert all(len(row["seconds"]) == 3 and row["memory"] > 1e6 for row in rows.values())
    assert min(rows["slow"]["seconds"]) >= 0.03 and ratio(rows["fast"]["seconds"], rows["slow"]["seconds"]) > 1


def test_a_loop_that_cannot_be_made_is_an_error():
    with pytest.raises(RuntimeError, match="no such model"):
        in_turn({"bad": (broken, ("when it is made",))}, 100, SHAPE, rounds=1)


def test_a_loop_that_dies_is_said_to_have_and_the_others_go_on():
    rows = in_turn({"bad": (broken, ("in a step",)), "good": (loop, (0.0,))}, 100, SHAPE, rounds=1)
    assert rows["bad"] == {"failed": "its process ended with 3"} and len(rows["good"]["seconds"]) == 1


def test_it_ends_in_time_with_a_round_at_least(monkeypatch):
    monkeypatch.setattr(turns, "Loop", Here)
    rows = in_turn({"one": (loop, (0.0,))}, 100, SHAPE, rounds=50, deadline=time.monotonic())
    assert len(rows["one"]["seconds"]) == 1


class Here:
    """A bench.turns.Loop in this process."""

    def __init__(self, make, arguments):
        self.made = make(*arguments)

    def step(self, batch):
        return turns.timed(self.made, *turns.draw(*batch))

    def rest(self):
        pass

    def close(self):
        pass


def test_ratio_and_spread_are_of_rounds():
    assert ratio([1.0, 2.0, 4.0], [2.0, 2.0, 16.0]) == 2.0 and spread([1.0, 2.0, 4.0]) == 1.5


def test_a_table_has_a_line_for_what_failed_and_ratios_of_the_rest():
    from bench.ladder import CHOSEN, table_of

    row = lambda *seconds: {"seconds": list(seconds), "memory": 2e6, "loss": 4.0}
    rows = {"nanoGPT": {"failed": "Traceback\nMemoryError"}, "plain": row(2.0, 2.0), CHOSEN: {"failed": "killed"}}
    lines = table_of(256, rows | {"the same, pruned": row(1.0, 1.0)})
    assert "| nanoGPT | failed: MemoryError |" in lines[2] and "| failed: killed |" in lines[4]
    assert lines[3] == "| plain | 128 | 0% |  |  | 2 MB | 4.0000 |" and "| 256 | 0% |  |  |" in lines[5]
    rows["nanoGPT"] = row(4.0, 4.0)
    assert "| 2.00x |" in table_of(256, rows)[3]
    assert "| plain | 128 (MFU 12.8%) |" in table_of(256, rows, share=0.001)[3]
