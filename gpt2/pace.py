"""How long the steps of training take, measured without making the host wait for the device."""

import time

import torch

from gpt2 import parallel


class Stopwatch:
    """Seconds spent inside `with stopwatch:`, summed until `read`. On CUDA the device's own time, by events."""

    def __init__(self, device):
        self.cuda, self.spans, self.seconds = device.type == "cuda", [], 0.0

    def __enter__(self):
        if self.cuda:
            self.begin = torch.cuda.Event(enable_timing=True)
            self.begin.record()
        else:
            self.begin = time.perf_counter()

    def __exit__(self, *error):
        if self.cuda:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self.spans.append((self.begin, end))
        else:
            self.seconds += time.perf_counter() - self.begin

    def read(self):
        """The seconds since the last `read`; waits for the device where it has not come that far."""
        if self.spans:
            self.spans[-1][1].synchronize()
        seconds = self.seconds + sum(begin.elapsed_time(end) for begin, end in self.spans) / 1000
        self.spans, self.seconds = [], 0.0
        return seconds


class Pace:
    """Seconds a step since the last `restart`, and those of them that pruning took (`with pace.pruning:`).

    The first step compiles and allocates. It is left out, unless a line is written after it alone.
    """

    def __init__(self, device):
        self.device, self.pruning, self.first = device, Stopwatch(device), True
        self.restart()

    def restart(self):
        self.pruning.read()
        self.steps, self.began = 0, time.perf_counter()

    def step(self, looked_at):
        """Count a step. looked_at: whether its numbers are read and the clock restarted after it."""
        self.steps += 1
        if self.first and not looked_at:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # once in a run
            self.restart()
        self.first = False

    def read(self, tokens_per_step, flops_per_token, world):
        """What metrics.jsonl says of the speed, once the device has done the steps, as after reading their loss."""
        seconds, pruning = (time.perf_counter() - self.began) / self.steps, self.pruning.read() / self.steps
        tokens_per_second = tokens_per_step / seconds
        return {
            "step_ms": 1000 * seconds,
            "prune_ms": 1000 * pruning if pruning else None,
            "tokens_per_second": tokens_per_second,
            "mfu": parallel.mfu(flops_per_token * tokens_per_second, world),
        }
