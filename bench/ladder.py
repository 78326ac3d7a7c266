"""What each step of this loop brings, from a plain loop up: python -m bench.ladder [--nanogpt DIR]

Every rung is the one below with one thing switched on. All rungs train a GPT of the same size, without bias as is
nanoGPT's default (on a CPU 6 layers, 256 wide, context 256; on a GPU GPT-2 124M), on the same random tokens, each in a
process of its own, a step of each in turn (bench/turns.py); the first ones, which allocate and compile, do not count.
Memory is the peak of a rung's process, on CUDA of its allocator. --nanogpt adds a rung with the model.py of a checkout,
run as its README says.

Writes results/speed/MACHINE.json (commit, versions, machine, every time) and results/speed.md, a table for each machine
measured so far. What the file holds of the same commit, machine and batch is not measured again: with --minutes a call
ends by then, and the same call again goes on. A step that gains nothing stays in the table.
"""

import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from bench.loops import SIZES, VOCABULARIES, device, nanogpt, ours, require_checkout, share_of_peak
from bench.machine import RESULTS, facts, heading, path_of, read, write
from bench.turns import in_turn, ratio, spread
from gpt2 import kernels, parallel
from gpt2.errors import Parser, one_line_errors, positive
from gpt2.files import write_atomically

PLAIN = dict(fused=False, wait=True, logits=True, keep=False, own_kernels=False, dtype="float32", compile=False)
RUNGS = {  # name: what it has beyond the one before it
    "plain loop": {},
    "fused AdamW": dict(fused=True),
    "the host never waits in a step": dict(wait=False),
    "the loss without its logits": dict(logits=False),
    "freed memory is kept, in huge pages": dict(keep=True),
    "GELU and attention by kernels of this project": dict(own_kernels=True),
    "bfloat16": dict(dtype="bfloat16"),
    "torch.compile": dict(compile=True),
    "as the loop chooses here": dict(dtype="auto", compile="auto"),
    "the same, pruned by bitter7 every 20 steps": dict(prune=20),
    "the same, pruned at every step": dict(prune=1),
}
CHOSEN = "as the loop chooses here"  # what the rungs with pruning are compared with


def options():
    """{name: the options of bench.loops.ours} of the rungs that are something of their own on this machine."""
    here, cpu = device(), not torch.cuda.is_available()
    missing = {
        "freed memory": not cpu,
        "kernels of": not cpu or kernels.library() is None,
        "bfloat16": parallel.compute_dtype("auto", here) != torch.bfloat16,  # a CPU would emulate it
        "torch.compile": not parallel.has_compiler(here),
    }
    found, so_far = {}, PLAIN
    for name, more in RUNGS.items():
        if any(what in name and gone for what, gone in missing.items()):
            continue
        so_far = so_far | more
        found[name] = so_far
    return found


def run(path, here, sizes, rounds, checkout, deadline):
    """Measure one vocabulary, where `path` does not hold it yet, and write it there."""
    vocab_size, batch_size = sizes
    found = read(path)
    if any(found.get(name) != value for name, value in here.items()):
        found = {**here, "load": os.getloadavg()[0], "tables": {}}
    table = found["tables"].setdefault(str(vocab_size), {"batch_size": batch_size, "rows": {}})
    makers = {"nanoGPT": (nanogpt, (vocab_size, checkout))} if checkout else {}
    makers |= {name: (ours, (vocab_size, *chosen.values())) for name, chosen in options().items()}
    if table["batch_size"] != batch_size or set(makers) - set(table["rows"]):
        rows = in_turn(makers, vocab_size, (batch_size, SIZES[device().type]["block_size"]), rounds, deadline)
        found["tables"][str(vocab_size)] = {"batch_size": batch_size, "rows": rows}
        write(path, found)


def table_of(tokens, rows, share=None):
    """Markdown of one vocabulary's rungs, of `tokens` a step; share: what a token/s is of a GPU's peak, if known."""
    lines = ["| | tokens/s | spread | gain | against nanoGPT | memory | loss |", "|---|---|---|---|---|---|---|"]
    before, times = None, {name: row["seconds"] for name, row in rows.items() if "seconds" in row}
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | failed: {row['failed'].splitlines()[-1]} |" + " |" * 5)
            continue
        seconds, rival = row["seconds"], CHOSEN if "pruned" in name else before
        gain = f"{ratio(seconds, times[rival]) - 1:+.1%}" if rival in times else ""
        against = f"{ratio(seconds, times['nanoGPT']):.2f}x" if "nanoGPT" in times else ""
        rate = tokens / statistics.median(seconds)
        used = f" (MFU {share * rate:.1%})" if share else ""
        lines.append(
            f"| {name} | {rate:,.0f}{used} | {spread(seconds):.0%} | {gain} | {against} | "
            f"{row['memory'] / 1e6:,.0f} MB | {row['loss']:.4f} |"
        )
        before = None if name == "nanoGPT" else name
    return lines


def page(runs):
    """results/speed.md of all that was measured."""
    lines = [
        "# Speed, step by step",
        "",
        "Written by `python -m bench.ladder` from results/speed/*.json. Each row has one thing more than the row",
        "above; `gain` is against that row, of the rows with pruning against the unpruned loop. Medians of steps",
        "taken in turn, each loop in a process of its own, after steps that do not count; a ratio is the median of",
        "the rounds' ratios, spread is (slowest - fastest) / median, memory the peak of the row's process. On CPUs",
        "6 layers, 256 wide, context 256, on GPUs GPT-2 124M; random tokens; `loss` is that of the last step, of the",
        "same batches in each row: all compute the same, but for the pruned ones. nanoGPT: its own model.py and",
        "optimizer, run as its README says for the device. A row that the loop then does not choose there is a",
        "negative result, and stays.",
    ]
    for one in runs:
        lines += ["", f"## {one['machine']}", "", heading(one) + "."]
        context = SIZES["cpu" if one["machine"].startswith("CPU") else "cuda"]["block_size"]
        for vocab_size, table in one["tables"].items():
            tokens, share = table["batch_size"] * context, share_of_peak(int(vocab_size), one["machine"])
            steps = max(len(row.get("seconds", ())) for row in table["rows"].values())
            lines += ["", f"### {int(vocab_size):,} tokens, batch {table['batch_size']}, {one['machine']}", ""]
            lines += [f"{steps} steps of each count.", ""]
            lines += table_of(tokens, table["rows"], share)
    return "\n".join(lines) + "\n"


def main():
    parser = Parser(prog="python -m bench.ladder", description=__doc__)
    parser.add_argument("--nanogpt", metavar="DIR", help="a checkout of nanoGPT to measure beside")
    parser.add_argument("--rounds", type=positive, default=7, help="steps of each rung that count")
    parser.add_argument("--vocab_size", type=positive, nargs="+", help="default: 65 50257, on a GPU 50257")
    parser.add_argument("--batch_size", type=positive, default=16, help="sequences of a step")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which a call begins nothing new")
    parser.add_argument("--to", type=Path, default=RESULTS, help="folder of speed.md and speed/")
    args = parser.parse_args()
    require_checkout(args.nanogpt)
    deadline, here = time.monotonic() + 60 * args.minutes, facts(device())
    path = path_of(here, "speed", args.to)
    for vocab_size in args.vocab_size or VOCABULARIES[device().type]:
        if time.monotonic() > deadline:
            print("not all is measured yet: the same call again goes on", file=sys.stderr)
            break
        run(path, here, (vocab_size, args.batch_size), args.rounds, args.nanogpt, deadline)
    runs = [read(found) for found in sorted((args.to / "speed").glob("*.json"))]
    write_atomically(args.to / "speed.md", page(runs).encode())
    print((args.to / "speed.md").read_text())


if __name__ == "__main__":
    with one_line_errors("python -m bench.ladder"):
        main()
