"""A network that fails is asked again, and reading goes on from where it failed."""

from types import SimpleNamespace

import pytest

from gpt2.errors import UserError
from gpt2.hub import Hub
from gpt2.sources import Columns
from prepare_fineweb import require_same


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


class HttpError(Exception):
    def __init__(self, status):
        super().__init__(f"{status} for url https://hub/data.parquet\nmore about it")
        self.response = SimpleNamespace(status_code=status)


def caused(error, cause):
    error.__cause__ = cause
    return error


class CastError(ValueError):
    """As the library datasets calls it."""


PERMANENT = [
    (CastError("Couldn't cast\na: string\nto\nb: int64\nbecause column names don't match"), "don't match.*--input"),
    (HttpError(401), "401.*more about it.*hf auth login"),
    (HttpError(403), "hf auth login.*datasets/some/set"),
    (caused(FileNotFoundError("no such file"), HttpError(404)), "no such file.*right --dataset"),
    (ValueError("Failed to parse\nstring: 'x'"), "Failed to parse string.*--input"),
    (KeyError("text"), "'text'"),
    (NotImplementedError(), "NotImplementedError"),
    (PermissionError(13, "denied"), "denied"),
]
PASSING = [
    TimeoutError("slow"),
    ConnectionResetError("reset"),
    OSError(101, "Network is unreachable"),
    HttpError(429),
    HttpError(503),
    caused(ValueError("cannot be read"), ConnectionError("Server disconnected")),
    caused(FileNotFoundError("no such file"), HttpError(500)),
]


def failing_hub(errors):
    """A hub that raises the errors, in turn, before its rows."""

    class Failing(FlakyDataset):
        def __iter__(self):
            if errors:
                raise errors.pop(0)
            yield from super().__iter__()

    hub = flaky_hub({})
    hub.load = lambda: Failing(["text"], {})
    return hub


@pytest.mark.parametrize("error, message", PERMANENT, ids=lambda value: type(value).__name__)
def test_what_does_not_pass_is_said_at_once_and_whole(error, message, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("tried again"))
    with pytest.raises(UserError, match=message) as refusal:
        list(failing_hub([error]).records())
    assert "\n" not in str(refusal.value) and "continues" not in str(refusal.value)


def test_what_passes_is_tried_again(monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    for error in PASSING:
        assert [record.text for record in failing_hub([error]).records()] == [b"text"]
    assert pauses == [2] * len(PASSING)


def test_files_of_other_columns_are_said_at_once(tmp_path, monkeypatch):
    """With the library itself: the second file's columns are not the first one's."""
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "two", "other": "x"}\n')
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("tried again"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    columns = dict(text_column="text", min_score=None, max_tokens=None, skip_bad=False)
    hub = Hub(SimpleNamespace(dataset=str(tmp_path), name=None, split="train", revision=None, **columns), None)
    hub.open()
    with pytest.raises(UserError, match="column names don't match.*files differ in their columns.*--input") as refusal:
        list(hub.records())
    assert "\n" not in str(refusal.value) and "continues" not in str(refusal.value)


@pytest.mark.parametrize("asked, offline", [("0", False), ("false", False), ("1", True)])
def test_a_mistake_is_not_taken_for_a_network_that_is_away(asked, offline, monkeypatch):
    mistake = caused(FileNotFoundError("no such dataset"), HttpError(404))
    served = SimpleNamespace(load_dataset=lambda *_, **__: (_ for _ in ()).throw(mistake))
    monkeypatch.setattr("gpt2.hub.import_datasets", lambda: served)
    monkeypatch.setenv("HF_HUB_OFFLINE", asked)
    with pytest.raises(UserError, match="cannot be reached" if offline else "no such dataset.*right --dataset"):
        hub_of(monkeypatch, None, None).open()


def hub_of(monkeypatch, revision, found, newest="c2"):
    """A Hub of which --revision is `revision`, where the preparation so far is of `found`."""
    monkeypatch.setattr("gpt2.hub.commit", lambda dataset, revision: newest)
    columns = dict(text_column="text", min_score=None, max_tokens=None, skip_bad=False)
    return Hub(SimpleNamespace(dataset="some/set", name=None, split="train", revision=revision, **columns), found)


@pytest.mark.parametrize("revision", [None, "main"])
def test_the_same_command_reads_the_commit_that_it_began_with(revision, monkeypatch):
    begun = hub_of(monkeypatch, revision, None, newest="c1").identity
    assert begun["revision"] == "c1"
    for again in (revision, None, "c1"):  # the branch has moved since, or the hub is away
        assert hub_of(monkeypatch, again, begun).identity == begun
    assert hub_of(monkeypatch, "other", begun).identity["revision"] == "c2"
    as_before = {name: value for name, value in begun.items() if name != "revision_asked"}  # by earlier versions
    for found, asked in ((as_before, "main"), (begun, "a-tag-of-c1")):
        require_same(found, hub_of(monkeypatch, asked, found, newest="c1").identity, "out")
    with pytest.raises(UserError, match="was begun with --revision c1, not c2"):
        require_same(begun, hub_of(monkeypatch, "other", begun).identity, "out")
