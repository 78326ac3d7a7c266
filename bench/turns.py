"""Steps of several training loops, timed in turn, each loop in a process of its own.

In turn, so that the machine's moods meet all alike; apart, so that what one loop asks of the allocator, the threads or
torch helps no other. A turn is two steps, of which the second counts: in the first, a virtual machine may have to get
back from its host the memory that lay free while the others were at work, which a training that runs alone never meets.
"""

import multiprocessing
import statistics
import time
import traceback

import torch
from tqdm import tqdm

from bench.machine import peak_memory

WARMUP = 1  # turns that do not count: they allocate and compile


class Loop:
    """A process that holds what `make(*arguments)` returns: a step, from (inputs, targets) to the loss."""

    def __init__(self, make, arguments):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.answer()

    def step(self, batch):
        """(seconds, loss, the process's peak of memory in bytes) of a step on `batch`, (seed, vocabulary, shape)."""
        self.pipe.send(batch)
        return self.answer()

    def rest(self):
        """Leave a GPU's memory, what the model and its optimizer keep aside, to the others."""
        self.pipe.send(None)

    def answer(self):
        try:
            found = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"its process ended with {self.process.exitcode}") from None
        if isinstance(found, str):
            raise RuntimeError(found)
        return found

    def close(self):
        self.process.terminate()
        self.process.join()


def serve(pipe, make, arguments):
    """What a Loop's process does."""
    try:
        step = make(*arguments)
        pipe.send(True)
        while True:
            batch = pipe.recv()
            if batch is None:
                torch.cuda.empty_cache()
            else:
                pipe.send(timed(step, *draw(*batch)))
    except Exception:
        pipe.send(traceback.format_exc())


def draw(seed, vocab_size, shape):
    """(inputs, targets) of random tokens, int64 of `shape`."""
    tokens = torch.randint(vocab_size, (shape[0], shape[1] + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def timed(step, inputs, targets):
    begin = time.perf_counter()
    loss = step(inputs, targets).item()  # waits for the device
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return seconds, loss, peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def in_turn(makers, vocab_size, shape, rounds, deadline=float("inf")):
    """{name: {"seconds": [of each counted step], "loss": of the last, "memory": peak in bytes}}, or {name: {"failed":
    how}} of a loop whose process died on the way, as a compiler's may; the others go on.

    makers: {name: (function, arguments)}, as Loop takes them. Fewer rounds where they would end after `deadline`, in
    seconds of time.monotonic, but one at least.
    """
    loops = {name: Loop(make, arguments) for name, (make, arguments) in makers.items()}
    taken, failed = {name: [] for name in loops}, {}
    try:
        for number in tqdm(range(WARMUP + rounds), desc=f"vocabulary {vocab_size:,}", leave=False):
            begun = time.monotonic()
            for name in list(taken):
                try:
                    loops[name].step((2 * number, vocab_size, shape))
                    taken[name].append(loops[name].step((2 * number + 1, vocab_size, shape)))
                    loops[name].rest()
                except RuntimeError as error:
                    failed[name] = {"failed": str(error)}
                    del taken[name]
            if number >= WARMUP and 2 * time.monotonic() - begun > deadline:
                break
    finally:
        for loop in loops.values():
            loop.close()
    return {name: failed.get(name) or summary(taken[name]) for name in makers}


def summary(rows):
    seconds, losses, peaks = zip(*rows)
    return {"seconds": seconds[WARMUP:], "loss": losses[-1], "memory": max(peaks)}


def spread(seconds):
    """(slowest - fastest) / median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def ratio(ours, theirs):
    """How many times as fast `ours` is: the median over the rounds of their seconds over ours."""
    return statistics.median(b / a for a, b in zip(ours, theirs))
