"""A network that fails is asked again, and reading goes on from where it failed."""

from types import SimpleNamespace

import pytest

from gpt2.errors import UserError
from gpt2.hub import Hub
from gpt2.sources import Columns


class FlakyDataset:
    """A streamed dataset of `rows` whose network fails, `failures` times, at some of them."""

    def __init__(self, rows, failures):
        self.rows, self.failures, self.at = rows, failures, 0

    def load_state_dict(self, state):
        self.at = state["at"]

    def state_dict(self):
        return {"at": self.at}

    def __iter__(self):
        while self.at < len(self.rows):
            if self.failures.get(self.at, 0):
                self.failures[self.at] -= 1
                raise ConnectionError("the network is down")
            self.at += 1
            yield {"text": self.rows[self.at - 1]}


def flaky_hub(failures):
    hub = Hub.__new__(Hub)
    hub.args, hub.columns, hub.rows = (
        SimpleNamespace(dataset="some/set"),
        Columns(SimpleNamespace(text_column="text", min_score=None, max_tokens=None, skip_bad=False)),
        350,
    )
    hub.load = lambda: FlakyDataset([f"text {i}" for i in range(350)], failures)
    return hub


def test_the_hub_is_asked_again_and_read_on_from_where_it_failed(monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    records = list(flaky_hub({0: 2, 150: 3, 299: 1, 300: 5}).records())
    assert [record.text for record in records] == [f"text {i}".encode() for i in range(350)]
    assert pauses == [2, 4, 2, 4, 8, 2, 2, 4, 8, 16, 32]
    again = list(flaky_hub({}).records(records[217].position))
    assert again == records[217:]


def test_a_network_that_stays_away_is_one_line(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match="some/set: cannot be read on .*the network is down.*same command continues"):
        list(flaky_hub({7: 100}).records())
