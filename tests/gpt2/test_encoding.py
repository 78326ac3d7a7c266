"""Text that cannot be tokenized, or ends the process that tries, is named; all other text has its tokens."""

import contextlib
import dataclasses
import multiprocessing
import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from gpt2 import encoding, tokenizer
from gpt2.encoding import batches, encode, encoded
from gpt2.errors import UserError
from gpt2.sources import Record
from gpt2.workers import pool

BYTE = {"tokenizer": "byte", "characters": ""}


class Panic(BaseException):
    """As what a library in Rust raises, which is no Exception."""


def delicate(description, pieces):
    """`encode` with a tokenizer that some texts make fail, and a process that some texts end, once or always."""
    words = tokenizer.load(BYTE)

    def encode_text(text):
        if "panic" in text:
            raise Panic("index out of bounds\nat line 7")
        if "memory" in text:
            raise MemoryError
        if "deadly" in text:
            os._exit(9)
        if text.startswith("once") and not Path(once := text.split()[1]).exists():
            Path(once).touch()
            os._exit(9)
        return words.encode(text)

    tokenizer.load = lambda description: dataclasses.replace(words, encode=encode_text)
    return encode(description, pieces)


def records(texts):
    return [Record(text.encode(), True, {"number": i}, None, f"a.txt:{i}") for i, text in enumerate(texts)]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 20)
    monkeypatch.setattr(encoding, "encode", delicate)


def test_workers_that_die_lose_no_text_and_what_they_die_of_is_named(small_batches, tmp_path):
    texts = [f"text {i}" for i in range(40)]
    texts[7], texts[20], texts[21] = f"once {tmp_path}/once", "the deadly one", "panic"
    texts[39] = "no memory"
    with pool(1) as workers:
        done = list(encoded(batches(records(texts)), workers, 1, BYTE))
    named = {batch.places[number]: why for batch, _, failures in done for number, why in failures}
    assert named == {
        "a.txt:20": "the process that does it ends",
        "a.txt:21": "Panic: index out of bounds",
        "a.txt:39": "MemoryError",
    }
    left = ["" if i in (20, 21, 39) else text for i, text in enumerate(texts)]
    expected = b"".join(b"\0" + text.encode() for text in left)
    tokens = np.concatenate([tokens for _, tokens, _ in done])
    assert bytes((tokens % 256).astype(np.uint8)) == expected and (tokens == 256).sum() == 40
    assert [batch.position["number"] for batch, _, _ in done] == sorted(
        batch.position["number"] for batch, _, _ in done
    )


def test_a_dead_worker_leaves_none_that_waits_for_ever():
    with pool(2) as workers:
        for dies in (os.getpid, os._exit):
            with contextlib.suppress(BrokenProcessPool):
                workers.submit(dies, *([9] if dies is os._exit else [])).result()
    assert not multiprocessing.active_children()


def no_start(description, pieces):
    os._exit(9)


def test_processes_that_die_without_a_text_are_no_texts_fault(monkeypatch):
    monkeypatch.setattr(encoding, "encode", no_start)
    with pytest.raises(UserError, match="a worker process died.*fewer workers"):
        with pool(1) as workers:
            list(encoded(batches(records(["text"])), workers, 1, BYTE))
