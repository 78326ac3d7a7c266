"""What safety costs: python -m bench.safety [--shapes quickstart 124M] [--rounds N]

For each shape, in one process, updates with and without the guard against wrong numbers are taken in turn, so that
drift of the machine meets both alike; then a look for silent faults and a checkpoint are timed: what the loop waits for
it, and by how much it slows the steps that are taken while it is written. A step is one micro-batch here, the smallest
a run can have, so that every share is an upper bound for runs that accumulate gradients. Shares are of the time between
two such events at the intervals of the config. Writes results/safety/MACHINE.json and prints the tables.
"""

import dataclasses
import os
import statistics
import tempfile
import time

import torch

from bench.machine import RESULTS, facts, heading, path_of, write
from gpt2 import parallel, silent
from gpt2.config import load_config
from gpt2.errors import Parser, one_line_errors, positive
from gpt2.guard import Guard, weight_of
from gpt2.optimizer import make_optimizer
from gpt2.placement import place
from gpt2.state import save
from gpt2.stops import Stops
from gpt2.writer import Writer
from train_gpt2 import make_model

SHAPES = {"quickstart": ["config/quickstart.py"], "124M": ["config/gpt2_124m.py", "--batch_size=1"]}


class Run:
    """A model in training as train_gpt2.py has it, on random tokens, taken step by step."""

    def __init__(self, config):
        self.config, self.world = config, parallel.start(config.device)
        self.dtype = parallel.compute_dtype(config.dtype, self.world.device)
        compiling = parallel.should_compile(config.compile, self.world.device)
        self.how = f"{self.world.device.type} {str(self.dtype)[6:]}{', compiled' if compiling else ''}"
        self.exact = self.world.device.type == "cpu" and not compiling
        self.model = make_model(config)
        _, self.fast = place(self.model, config, self.world, self.dtype, compiling)
        self.optimizer = make_optimizer(self.model, config)
        self.guard = Guard(self.optimizer, 6.0, 10, self.world.device)
        self.batch = torch.randint(config.vocab_size, (config.batch_size, config.block_size + 1)).to(self.world.device)

    def loss_of(self, step):
        with parallel.autocast(self.world.device, self.dtype):
            return self.fast(self.batch[:, :-1], self.batch[:, 1:], False)[1]

    def step(self):
        """Seconds of a step."""
        begin = time.perf_counter()
        loss = self.loss_of(0)
        loss.backward(weight_of(loss.detach(), 1))
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.guard.step(self.grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.finish()
        return time.perf_counter() - begin

    def updates(self, rounds):
        """Seconds by which the median update is longer with the guard, and a look at what is asked, than without."""
        self.loss_of(0).backward()
        loss_sum, stops, seconds = torch.zeros((), device=self.world.device), Stops(), {False: [], True: []}
        for guarded in [False, True] * rounds:
            begin = time.perf_counter()
            for _ in stops.checked(range(1)) if guarded else range(1):
                weight_of(loss_sum, 1) if guarded else None
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.guard.step(norm) if guarded else self.optimizer.step()
            self.finish()
            seconds[guarded].append(time.perf_counter() - begin)
        self.optimizer.zero_grad(set_to_none=True)
        return statistics.median(seconds[True]) - statistics.median(seconds[False])

    def finish(self):
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


def measure(config, rounds):
    """What safety costs in a run of `config`: a dict of seconds and shares."""
    run = Run(config)
    plain = statistics.median([run.step() for _ in range(rounds + 2)][2:])
    guard = run.updates(20)
    searching = statistics.median(timed(run, look, run) for _ in range(3))
    waiting, slower, written = checkpoint(run, plain)
    shares = {
        "guard": guard / plain,
        "silent faults": searching / (config.check_interval * plain),
        "checkpoint, waiting": waiting / (config.checkpoint_interval * plain),
        "checkpoint, slower steps": slower / (config.checkpoint_interval * plain),
    }
    seconds = dict(step=plain, guard=guard, look=searching, waiting=waiting, slower=slower, writing=written)
    return dict(
        how=run.how,
        rounds=rounds,
        parameters=sum(p.numel() for p in run.model.parameters()),
        tokens_per_step=config.batch_size * config.block_size,
        check_interval=config.check_interval,
        checkpoint_interval=config.checkpoint_interval,
        seconds=seconds,
        shares=shares | {"all": sum(shares.values())},
    )


def timed(run, function, *arguments):
    begin = time.perf_counter()
    function(*arguments)
    run.finish()
    return time.perf_counter() - begin


def look(run):
    silent.check(0, run.model, run.fast, run.loss_of, (0,), run.exact, run.grad_norm)


def checkpoint(run, plain):
    """(seconds that the loop waits for it, that the steps taken meanwhile lose, until it is on the disk) of a save.

    The second one, as in a run: the first makes the buffers of host memory.
    """
    with tempfile.TemporaryDirectory(dir=".") as folder, Writer(folder, keep=2) as writer:
        for number in range(2):
            writer.wait()
            begin, lost = time.perf_counter(), 0.0
            save(writer, run.config, number, None, {}, run.model, run.optimizer, None, run.guard, None)
            waited = time.perf_counter() - begin
            while writer.thread.is_alive():
                lost += max(0.0, run.step() - plain)
            written = time.perf_counter() - begin
    return waited, lost, written


def report(name, result):
    """The lines of a shape's table."""
    seconds, shares = result["seconds"], result["shares"]
    ms = {part: f"{1000 * took:,.1f} ms" for part, took in seconds.items()}
    check, save = (f"every {result[key]:,} steps" for key in ("check_interval", "checkpoint_interval"))
    rows = [
        ("guard, stops", ms["guard"], "every step", shares["guard"]),
        ("look for silent faults", ms["look"], check, shares["silent faults"]),
        ("checkpoint, the loop waits", ms["waiting"], save, shares["checkpoint, waiting"]),
        ("checkpoint, slower steps", ms["slower"], save, shares["checkpoint, slower steps"]),
        ("all", "", "", shares["all"]),
    ]
    head = (
        f"{name}: {result['parameters'] / 1e6:,.1f} M parameters, {result['tokens_per_step']:,} tokens and "
        f"{ms['step']} a step, {result['how']}, median of {result['rounds']}; "
        f"a checkpoint is written in {seconds['writing']:.1f} s"
    )
    return "\n".join([head, *(f"  {what:28}{cost:>14}  {when:18}{share:9.3%}" for what, cost, when, share in rows)])


def main():
    parser = Parser(prog="python -m bench.safety", description=__doc__)
    parser.add_argument(
        "--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, help="of which configs (default: all)"
    )
    parser.add_argument("--rounds", type=positive, default=10, help="steps that count")
    parser.add_argument("--to", default=RESULTS, help="folder of safety/")
    args = parser.parse_args()
    found = facts(parallel.start().device) | {"load": os.getloadavg()[0], "shapes": {}}
    path = path_of(found, "safety", args.to)
    print(heading(found), flush=True)
    for name in args.shapes:
        config = load_config(SHAPES[name], {})
        config = dataclasses.replace(config, vocab_size=65 if name == "quickstart" else 50257)
        found["shapes"][name] = measure(config, args.rounds)
        print(report(name, found["shapes"][name]), flush=True)
    write(path, found)


if __name__ == "__main__":
    with one_line_errors("python -m bench.safety"):
        main()
