"""What each step of this loop brings, from a plain loop up: python -m bench.ladder [--nanogpt DIR]

Every rung is the one below with one thing switched on. All rungs train a GPT of the same size (6 layers, 256 wide,
context 256, batch 16, no bias: nanoGPT's default) on the same random tokens, a step of each in turn, so that the
machine's moods meet all alike; the first steps, which allocate and compile, are not counted. Memory is the peak of a
process that runs the rung alone. --nanogpt adds a rung with the model.py of a checkout, and its recipe for this device.

Writes results/speed/MACHINE.json (commit, versions, machine, every time) and results/speed.md, a table for each machine
measured so far. A step that gains nothing stays in the table, and is off where it does not pay.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from bench.train import SIZE, nanogpt
from gpt2 import parallel
from gpt2.config import Config
from gpt2.model import GPT, GPTConfig
from gpt2.optimizer import make_optimizer
from pruning import Pruner

RESULTS = Path(__file__).parent.parent / "results"
BATCH, WARMUP = 16, 2
RUNGS = {  # name: what is on; each holds all of the one before it, unless it says otherwise
    "plain loop": dict(),
    "fused AdamW": dict(fused=True),
    "the host never waits in a step": dict(fused=True, wait=False),
    "the loss without its logits": dict(fused=True, wait=False, logits=False),
    "bfloat16": dict(fused=True, wait=False, logits=False, dtype="bfloat16"),
    "torch.compile": dict(fused=True, wait=False, logits=False, dtype="auto", compile=True),
    "as the loop chooses here": dict(fused=True, wait=False, logits=False, dtype="auto", compile="auto"),
    "the same, pruned by bitter7 every 20 steps": dict(
        fused=True, wait=False, logits=False, dtype="auto", compile="auto", prune=20
    ),
    "the same, pruned at every step": dict(fused=True, wait=False, logits=False, dtype="auto", compile="auto", prune=1),
}
FIRST_OF_BOTH = "as the loop chooses here"  # what the rungs with pruning are compared with


def usable(name, world):
    """Whether the rung can be run here: not bfloat16 that is only emulated, not torch.compile without a compiler."""
    if name == "bfloat16":
        return parallel.compute_dtype("auto", world.device) == torch.bfloat16
    return name != "torch.compile" or parallel.has_compiler(world.device)


def rung(vocab_size, world, fused=False, wait=True, logits=True, dtype="float32", compile=False, prune=0):
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
    pruner = Pruner(model, optimizer, "bitter7", 0.5, begin=1, end=10_000, interval=prune) if prune else None

    def step(inputs, targets):
        with parallel.autocast(world.device, dtype):
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


def step_of(name, vocab_size, checkout, world):
    return nanogpt(checkout, vocab_size, BATCH) if name == "nanoGPT" else rung(vocab_size, world, **RUNGS[name])


def batch(vocab_size):
    tokens = torch.randint(vocab_size, (BATCH, SIZE["block_size"] + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def synchronize(world):
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def measure_together(names, vocab_size, rounds, checkout, world):
    """name -> (seconds of each counted step, the last loss), the rungs in turn on the same batches."""
    steps = {name: step_of(name, vocab_size, checkout, world) for name in names}
    seconds, losses = {name: [] for name in names}, {}
    torch.manual_seed(1)
    for _ in tqdm(range(WARMUP + rounds), desc=f"vocabulary {vocab_size:,}", leave=False):
        inputs, targets = batch(vocab_size)
        for name, step in steps.items():
            synchronize(world)
            begin = time.perf_counter()
            loss = step(inputs, targets)
            synchronize(world)
            seconds[name].append(time.perf_counter() - begin)
            losses[name] = loss.item()
    return {name: (times[WARMUP:], losses[name]) for name, times in seconds.items()}


def peak_memory(name, vocab_size, checkout):
    """Bytes: the peak of a process that makes two steps of the rung; on CUDA, of torch's allocator."""
    world = parallel.start()
    step = step_of(name, vocab_size, checkout, world)
    for _ in range(2):
        step(*batch(vocab_size))
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def machine(world):
    """(class of machine, facts): by what bounds the speed."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS)
    facts = {
        "commit": git.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
        return name, facts | {"device": name, "cuda": torch.version.cuda}
    kind = (
        "AMX"
        if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        else torch.backends.cpu.get_cpu_capability()
    )
    dtype = str(parallel.compute_dtype("auto", world.device))[6:]
    model = "unknown"
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    stand_in = {n: os.environ[n] for n in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA") if n in os.environ}
    return f"CPU {kind} {dtype}", facts | {"device": f"{model}, {os.cpu_count()} cores"} | stand_in


def run(vocab_sizes, rounds, checkout):
    world = parallel.start()
    kind, facts = machine(world)
    tables = {}
    for vocab_size in vocab_sizes:
        names = (["nanoGPT"] if checkout else []) + [name for name in RUNGS if usable(name, world)]
        measured = measure_together(names, vocab_size, rounds, checkout, world)
        tables[str(vocab_size)] = {
            name: {"seconds": times, "loss": loss, "memory": alone(peak_memory, name, vocab_size, checkout)}
            for name, (times, loss) in measured.items()
        }
    return kind, {"machine": kind, **facts, "rounds": rounds, "tables": tables}


def table(rows):
    """Markdown of one vocabulary's rungs."""
    lines = ["| | tokens/s | spread | gain | against nanoGPT | memory | loss |", "|---|---|---|---|---|---|---|"]
    rate = {name: BATCH * SIZE["block_size"] / statistics.median(row["seconds"]) for name, row in rows.items()}
    before = None
    for name, row in rows.items():
        spread = (max(row["seconds"]) - min(row["seconds"])) / statistics.median(row["seconds"])
        rival = FIRST_OF_BOTH if "pruned" in name else before
        gain = f"{rate[name] / rate[rival] - 1:+.1%}" if rival in rate else ""
        ratio = f"{rate[name] / rate['nanoGPT']:.2f}x" if "nanoGPT" in rate else ""
        lines.append(
            f"| {name} | {rate[name]:,.0f} | {spread:.0%} | {gain} | {ratio} | {row['memory'] / 1e6:,.0f} MB | "
            f"{row['loss']:.4f} |"
        )
        before = None if name == "nanoGPT" else name
    return lines


def page(runs):
    """results/speed.md of all that was measured."""
    lines = [
        "# Speed, step by step",
        "",
        "Written by `python -m bench.ladder` from results/speed/*.json. Each row has one thing more than the row",
        "above; `gain` is against that row, of the rows with pruning against the unpruned loop. Medians of turns,",
        f"the first {WARMUP} not counted; spread is (slowest - fastest) / median. 6 layers, 256 wide, context 256,",
        "batch 16, random tokens: the loss shows that all rungs compute the same.",
        "nanoGPT: its own model.py and optimizer, run as its README says for the device.",
    ]
    for one in runs:
        lines += [
            "",
            f"## {one['machine']}",
            "",
            "{device}; torch {torch}, {threads} threads; commit {commit}; medians of {rounds}.".format(**one),
        ]
        stand_in = {name: one[name] for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA") if name in one}
        if stand_in:
            lines += [f"A stand-in: the processor can do more, and was held back by {stand_in}."]
        for vocab_size, rows in one["tables"].items():
            lines += ["", f"### {int(vocab_size):,} tokens", "", *table(rows)]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", metavar="DIR", help="a checkout of nanoGPT to measure beside")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each rung that count")
    parser.add_argument("--vocab_size", type=int, nargs="+", default=[65, 50257])
    parser.add_argument("--to", type=Path, default=RESULTS, help="folder of speed.md and speed/")
    args = parser.parse_args()
    kind, facts = run(args.vocab_size, args.rounds, args.nanogpt)
    (args.to / "speed").mkdir(parents=True, exist_ok=True)
    path = args.to / "speed" / f"{kind.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    runs = [json.loads(found.read_text()) for found in sorted((args.to / "speed").glob("*.json"))]
    (args.to / "speed.md").write_text(page(runs))
    print((args.to / "speed.md").read_text())


if __name__ == "__main__":
    sys.exit(main())
