"""What each step of this loop brings, from a plain loop up: python -m bench.ladder [--nanogpt DIR]

Every rung is the one below with one thing switched on. All rungs train a GPT of the same size (6 layers, 256 wide,
context 256, no bias: nanoGPT's default) on the same random tokens, a step of each in turn, so that the machine's moods
meet all alike; the first steps, which allocate and compile, are not counted. Memory is the peak of a process that runs
the rung alone. --nanogpt adds a rung with the model.py of a checkout, and its recipe for this device.

Writes results/speed/MACHINE.json (commit, versions, machine, every time) and results/speed.md, a table for each machine
measured so far. What the file holds of the same commit, machine and batch is not measured again: with --minutes a call
ends by then, and the same call again goes on. A step that gains nothing stays in the table.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

from bench import machine
from bench.machine import RESULTS, facts, heading, path_of, write
from bench.train import SIZE, nanogpt
from gpt2 import kernels, parallel
from gpt2.config import Config
from gpt2.model import GPT, GPTConfig
from gpt2.optimizer import make_optimizer
from pruning import Pruner

WARMUP = 2
LOOP = dict(fused=True, wait=False, logits=False)
RUNGS = {  # name: what is on; each holds all of the one before it, unless it says otherwise
    "plain loop": dict(),
    "fused AdamW": dict(fused=True),
    "the host never waits in a step": dict(fused=True, wait=False),
    "the loss without its logits": LOOP,
    "GELU and attention by kernels of this project": LOOP | dict(own_kernels=True),
    "bfloat16": LOOP | dict(own_kernels=True, dtype="bfloat16"),
    "torch.compile, which takes the kernels' place": LOOP | dict(dtype="auto", compile=True),
    "as the loop chooses here": LOOP | dict(own_kernels=True, dtype="auto", compile="auto"),
    "the same, pruned by bitter7 every 20 steps": LOOP | dict(own_kernels=True, dtype="auto", compile="auto", prune=20),
    "the same, pruned at every step": LOOP | dict(own_kernels=True, dtype="auto", compile="auto", prune=1),
}
CHOSEN = "as the loop chooses here"  # what the rungs with pruning are compared with


def usable(name, world):
    """Whether the rung can be run here: no emulated bfloat16, no compiler or kernels that are not there."""
    if name == "bfloat16":
        return parallel.compute_dtype("auto", world.device) == torch.bfloat16
    if "kernels of" in name:
        return kernels.usable(torch.zeros(1, device=world.device))
    return "compile" not in name or parallel.has_compiler(world.device)


def rung(
    vocab_size, world, fused=False, wait=True, logits=True, own_kernels=False, dtype="float32", compile=False, prune=0
):
    """The step of one rung: a function of (inputs, targets) that returns the loss."""
    config = Config(vocab_size=vocab_size, bias=False, **SIZE)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab_size, bias=False, **SIZE)).to(world.device)
    dtype = parallel.compute_dtype(dtype, world.device)
    compiling = parallel.should_compile(compile, world.device, vocab_size)
    fast = torch.compile(model) if compiling else model
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["fused"] = fused
    pruner = Pruner(model, optimizer, "bitter7", 0.5, begin=1, end=10_001, interval=prune) if prune else None

    def step(inputs, targets):
        with parallel.autocast(world.device, dtype), kernels_if(own_kernels):
            loss = fast(inputs.to(world.device), targets.to(world.device), logits)[1]
        loss.backward()
        if pruner:
            pruner.mask_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if pruner:
            pruner.step()
        if wait:
            loss.item()
        return loss

    return step


def kernels_if(on):
    """The context of a forward pass, with the kernels of this project where they are usable, or without them."""
    return mock.patch.object(kernels, "usable", kernels.usable if on else lambda x: False)


def step_of(name, sizes, checkout, world):
    vocab_size, batch_size = sizes
    return nanogpt(checkout, vocab_size, world) if name == "nanoGPT" else rung(vocab_size, world, **RUNGS[name])


def batch(sizes):
    vocab_size, batch_size = sizes
    tokens = torch.randint(vocab_size, (batch_size, SIZE["block_size"] + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def synchronize(world):
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def measure_together(names, sizes, rounds, checkout, world, deadline):
    """name -> (seconds of each counted step, the last loss), the rungs in turn on the same batches, to `deadline`."""
    steps = {name: step_of(name, sizes, checkout, world) for name in names}
    seconds, losses = {name: [] for name in names}, {}
    torch.manual_seed(1)
    for number in tqdm(range(WARMUP + rounds), desc=f"vocabulary {sizes[0]:,}", leave=False):
        begun = time.monotonic()
        inputs, targets = batch(sizes)
        for name, step in steps.items():
            synchronize(world)
            begin = time.perf_counter()
            loss = step(inputs, targets)
            synchronize(world)
            seconds[name].append(time.perf_counter() - begin)
            losses[name] = loss.item()
        if number > WARMUP and 2 * time.monotonic() - begun > deadline:
            break
    return {name: (times[WARMUP:], losses[name]) for name, times in seconds.items()}


def peak_memory(name, sizes, checkout):
    """Bytes: the peak of a process that makes two steps of the rung; on CUDA, of torch's allocator."""
    world = parallel.start()
    step = step_of(name, sizes, checkout, world)
    for _ in range(2):
        step(*batch(sizes))
    return machine.peak_memory(world.device)


def alone(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def run(path, here, sizes, rounds, checkout, world, deadline):
    """Measure what `path` lacks of one vocabulary, and write it there. Returns whether all is there now."""
    found = json.loads(path.read_text()) if path.exists() else {}
    if any(found.get(name) != value for name, value in here.items()):
        found = {**here, "load": os.getloadavg()[0], "tables": {}}
    table = found["tables"].setdefault(str(sizes[0]), {"batch_size": sizes[1], "rows": {}})
    names = (["nanoGPT"] if checkout else []) + [name for name in RUNGS if usable(name, world)]
    if table["batch_size"] != sizes[1] or any(name not in table["rows"] for name in names):
        table["batch_size"], table["rows"] = sizes[1], {}
        measured = measure_together(names, sizes, rounds, checkout, world, deadline)
        for name, (seconds, loss) in measured.items():
            table["rows"][name] = {"seconds": seconds, "loss": loss}
        write(path, found)
    for name, row in table["rows"].items():
        if "memory" not in row:
            if time.monotonic() > deadline:
                return False
            row["memory"] = alone(peak_memory, name, sizes, checkout)
            write(path, found)
    return True


def table_of(batch_size, rows):
    """Markdown of one vocabulary's rungs."""
    lines = ["| | tokens/s | spread | gain | against nanoGPT | memory | loss |", "|---|---|---|---|---|---|---|"]
    tokens = batch_size * SIZE["block_size"]
    rate = {name: tokens / statistics.median(row["seconds"]) for name, row in rows.items()}
    before = None
    for name, row in rows.items():
        spread = (max(row["seconds"]) - min(row["seconds"])) / statistics.median(row["seconds"])
        rival = CHOSEN if "pruned" in name else before
        gain = f"{rate[name] / rate[rival] - 1:+.1%}" if rival in rate else ""
        ratio = f"{rate[name] / rate['nanoGPT']:.2f}x" if "nanoGPT" in rate else ""
        memory = f"{row['memory'] / 1e6:,.0f} MB" if "memory" in row else ""
        lines.append(f"| {name} | {rate[name]:,.0f} | {spread:.0%} | {gain} | {ratio} | {memory} | {row['loss']:.4f} |")
        before = None if name == "nanoGPT" else name
    return lines


def page(runs):
    """results/speed.md of all that was measured."""
    lines = [
        "# Speed, step by step",
        "",
        "Written by `python -m bench.ladder` from results/speed/*.json. Each row has one thing more than the row",
        "above; `gain` is against that row, of the rows with pruning against the unpruned loop. Medians of steps",
        f"taken in turn, the first {WARMUP} of each not counted; spread is (slowest - fastest) / median. Memory is the",
        "peak of a process that runs the row alone. 6 layers, 256 wide, context 256, random tokens; `loss` is that of",
        "the last step, of the same batches in each row: all rows compute the same, but for the pruned ones.",
        "nanoGPT: its own model.py and optimizer, run as its README says for the device.",
    ]
    for one in runs:
        lines += ["", f"## {one['machine']}", "", heading(one) + "."]
        for vocab_size, table in one["tables"].items():
            steps = len(next(iter(table["rows"].values()))["seconds"])
            lines += ["", f"### {int(vocab_size):,} tokens, batch {table['batch_size']}, {one['machine']}", ""]
            lines += [f"{steps} steps of each count, and {WARMUP} before them.", ""]
            lines += table_of(table["batch_size"], table["rows"])
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", metavar="DIR", help="a checkout of nanoGPT to measure beside")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each rung that count")
    parser.add_argument("--vocab_size", type=int, nargs="+", default=[65, 50257])
    parser.add_argument("--batch_size", type=int, default=16, help="sequences of a step")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which a call begins nothing new")
    parser.add_argument("--to", type=Path, default=RESULTS, help="folder of speed.md and speed/")
    args = parser.parse_args()
    deadline, world = time.monotonic() + 60 * args.minutes, parallel.start()
    here = facts(world.device)
    path = path_of(here, "speed", args.to)
    done = [
        run(path, here, (vocab_size, args.batch_size), args.rounds, args.nanogpt, world, deadline)
        for vocab_size in args.vocab_size
        if time.monotonic() < deadline
    ]
    runs = [json.loads(found.read_text()) for found in sorted((args.to / "speed").glob("*.json"))]
    (args.to / "speed.md").write_text(page(runs))
    print((args.to / "speed.md").read_text())
    if len(done) < len(args.vocab_size) or not all(done):
        print("not all is measured yet: the same call again goes on", file=sys.stderr)


if __name__ == "__main__":
    main()
