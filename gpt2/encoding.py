"""Pieces of text to tokens, in order, by a pool of processes that no text brings down."""

import collections
import contextlib
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from gpt2 import tokenizer
from gpt2.errors import UserError
from gpt2.workers import pool

BATCH = 2**20  # bytes of text that a worker gets at a time, or a little more


class Batch(NamedTuple):
    """Consecutive pieces of text, [(text, whether a document starts), ...], and the place that each comes from.

    size: their bytes together; position: where reading them began; done: the share of the source before it.
    """

    pieces: list
    places: list
    size: int
    position: dict
    done: float | None


def batches(records):
    """The records' texts as Batches of BATCH bytes or a little more; which depends on where reading began alone."""
    texts, places, size, first = [], [], 0, None
    for record in records:
        first = first or record
        texts.append((record.text, record.starts))
        places.append(record.place)
        size += len(record.text)
        if size >= BATCH:
            yield Batch(texts, places, size, first.position, first.done)
            texts, places, size, first = [], [], 0, None
    if texts:
        yield Batch(texts, places, size, first.position, first.done)


def encode(description, pieces):
    """(the tokens of a Batch's pieces in one uint16 array; [(number of a piece that has none, why), ...]), in a worker.

    Where a document's text fails, its end-of-text token stays.
    """
    words = tokenizer.load(description)
    start, arrays, failures = np.array([words.end_of_text], np.uint16), [np.empty(0, np.uint16)], []
    for number, (text, starts) in enumerate(pieces):
        arrays += [start] * starts
        try:
            arrays.append(words.encode(text.decode()))
        except UserError:
            raise
        except BaseException as error:  # what Rust panics with is no Exception
            failures.append((number, f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")))
    return np.concatenate(arrays), failures


def encoded(batches, workers, count, description):
    """(Batch, what `encode` gives of it) in order from `workers`, a pool of `count`, kept four batches each ahead.

    Where one of them dies, of which the pool does too, what was under way is done again, a piece at a time, and a new
    pool goes on.
    """
    waiting = collections.deque()
    with contextlib.ExitStack() as pools:
        for batch in batches:
            try:
                future = workers.submit(encode, description, batch.pieces)
            except BrokenProcessPool:
                workers = pools.enter_context(pool(count))
                future = workers.submit(encode, description, batch.pieces)
            waiting.append((batch, future))
            if len(waiting) > 4 * count:
                yield finished(description, *waiting.popleft())
        while waiting:
            yield finished(description, *waiting.popleft())


def finished(description, batch, future):
    try:
        tokens, failures = future.result()
    except BrokenProcessPool:
        tokens, failures = one_by_one(description, batch.pieces)
    return batch, tokens, failures


def one_by_one(description, pieces):
    """What `encode` gives of the pieces, each alone in a process that may die of it."""
    end_of_text = np.array([tokenizer.load(description).end_of_text], np.uint16)
    arrays, failures, worker = [], [], None
    with contextlib.ExitStack() as pools:
        for number, piece in enumerate(pieces):
            worker = worker or pools.enter_context(living(description))
            try:
                tokens, failed = worker.submit(encode, description, [piece]).result()
            except BrokenProcessPool:
                worker, tokens, failed = None, end_of_text[: piece[1]], [(0, "the process that does it ends")]
            arrays.append(tokens)
            failures += [(number, why) for _, why in failed]
    return np.concatenate(arrays), failures


@contextlib.contextmanager
def living(description):
    """A pool of one process that tokenizes. UserError where it dies before there is any text."""
    with pool(1) as worker:
        worker.submit(encode, description, []).result()  # pool says what a death means
        yield worker
