"""A step on 1, 2 and 4 ranks of one thread each, and what of it is exchange: python -m bench.scaling

The global batch is the same for all (strong scaling). For each number of ranks, in turn: a step as the loop takes it
under DDP; the same without exchange; and the exchange alone, an all-reduce of as many bytes. What the first
takes beyond the second is exchange that no computation hides. On a CPU over gloo, which copies through memory; more
ranks than cores share them.

Writes results/scaling/MACHINE.json and prints the table.
"""

import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist

from bench.loops import SIZES, finish
from bench.machine import RESULTS, facts, heading, path_of, write
from gpt2.config import Config
from gpt2.errors import Parser, UserError, one_line_errors, positive
from gpt2.memory import keep_freed
from gpt2.model import GPT, GPTConfig
from gpt2.optimizer import make_optimizer
from gpt2.parallel import World, autocast, compute_dtype
from gpt2.placement import averaging, data_parallel

SIZE, VOCABULARY, SEQUENCES = SIZES["cpu"], 65, 16  # sequences of a step, over all ranks


def on_rank(rank, ranks, store, rounds, results):
    """Put into `results` {"step", "without exchange", "exchange alone": seconds of each round} of `ranks` processes."""
    torch.set_num_threads(1)
    keep_freed()
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=VOCABULARY, bias=False, **SIZE))
    optimizer = make_optimizer(model, Config(vocab_size=VOCABULARY, bias=False, **SIZE))
    world = World(rank, ranks, torch.device("cpu"))
    replica, dtype = data_parallel(model, world), compute_dtype("auto", world.device)
    gradients = torch.zeros(sum(p.numel() for p in model.parameters()))
    tokens = torch.randint(VOCABULARY, (SEQUENCES // ranks, SIZE["block_size"] + 1))

    def step(exchange):
        with averaging(replica, exchange), autocast(world.device, dtype):
            loss = replica(tokens[:, :-1], tokens[:, 1:], False)[1]
            loss.backward()
        finish(model, optimizer)

    work = {
        "step": lambda: step(True),
        "without exchange": lambda: step(False),
        "exchange alone": lambda: dist.all_reduce(gradients),
    }
    taken = {name: [] for name in work}
    for _ in range(1 + rounds):
        for name, do in work.items():
            dist.barrier()
            begin = time.perf_counter()
            do()
            dist.barrier()
            taken[name].append(time.perf_counter() - begin)
    if rank == 0:
        results.put({name: seconds[1:] for name, seconds in taken.items()} | {"bytes": 4 * gradients.numel()})


def over(ranks, rounds):
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_rank, (ranks, f"{folder}/store", rounds, results), ranks)
    return results.get()


def table(found):
    """Markdown: a row a number of ranks."""
    lines = ["| ranks | tokens/s | of ideal | step | without exchange | exchange alone | hidden |", "|---" * 7 + "|"]
    one = statistics.median(found["1"]["step"])
    for ranks, measured in found.items():
        step, alone, exchange = (statistics.median(measured[k]) for k in ("step", "without exchange", "exchange alone"))
        hidden = f"{1 - max(0.0, step - alone) / exchange:.0%}" if int(ranks) > 1 else ""
        ideal = one / min(int(ranks), os.cpu_count())
        lines.append(
            f"| {ranks} | {SEQUENCES * SIZE['block_size'] / step:,.0f} | {ideal / step:.0%} | {1000 * step:,.0f} ms | "
            f"{1000 * alone:,.0f} ms | {1000 * exchange:,.1f} ms | {hidden} |"
        )
    return "\n".join(lines)


def main():
    parser = Parser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4], help="divisors of 16, 1 among them")
    parser.add_argument("--rounds", type=positive, default=7, help="steps of each kind that count")
    parser.add_argument("--to", default=RESULTS, help="folder of scaling/")
    args = parser.parse_args()
    if 1 not in args.ranks or any(SEQUENCES % ranks for ranks in args.ranks):
        raise UserError(f"--ranks {' '.join(map(str, args.ranks))}: expected divisors of {SEQUENCES}, 1 among them")
    here = facts(torch.device("cpu")) | {"threads": 1, "load": os.getloadavg()[0]}
    path = path_of(here, "scaling", args.to)
    found = {str(ranks): over(ranks, args.rounds) for ranks in args.ranks}
    write(path, here | {"ranks": found})
    print(f"{heading(here)}\n{found['1']['bytes'] / 1e6:,.1f} MB of gradients, float32\n\n{table(found)}")


if __name__ == "__main__":
    with one_line_errors("python -m bench.scaling"):
        main()
