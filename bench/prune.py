"""What pruning costs a training step: python -m bench.prune [--model quickstart|124M]

The same model three times in one process, a step of each in turn on the same batches: dense; pruned by bitter7 every 20
steps, the default; pruned at every step. Steps of the two that prune to ever more follow the gmp schedule, so each
update works. Of a step the time that mask_gradients and an update take is measured by itself too. The first steps,
which allocate, are left out. Memory is the peak of a process that trains the one alone.

A step of the 124M model is one sequence of `--tokens` here, so that it ends on a CPU: an update is once a step however
many sequences a step has, and its share of the recipe's 524,288 tokens is worked out from that, and said to be.

Writes results/prune/MACHINE.json and prints the table.
"""

import statistics
import time

import torch
from tqdm import tqdm

from bench import machine
from bench.machine import RESULTS, alone, facts, heading, path_of, read, write
from gpt2 import parallel
from gpt2.config import Config
from gpt2.errors import Parser, UserError, one_line_errors, positive
from gpt2.model import GPT, GPTConfig
from gpt2.optimizer import make_optimizer
from pruning import Pruner

MODELS = {  # sizes, sequences a step, tokens in a step of the recipe that trains it
    "quickstart": (dict(vocab_size=68, block_size=128, n_layer=4, n_head=4, n_embd=128), 16, 2048),
    "124M": (dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768), 1, 524288),
}
SIDES = {"dense": 0, "bitter7 every 20 steps": 20, "bitter7 at every step": 1}  # steps from one update to the next
WARMUP = 2


class Side:
    """One of the models in training. `step` returns (seconds of a step, of them in pruning, the loss)."""

    def __init__(self, sizes, interval, steps, world):
        torch.manual_seed(0)
        self.model = GPT(GPTConfig(bias=False, **sizes)).to(world.device)
        self.optimizer = make_optimizer(self.model, Config(bias=False, learning_rate=1e-4, **sizes))
        self.world, self.dtype = world, parallel.compute_dtype("auto", world.device)
        self.pruner = None
        if interval:
            end = 1 + interval * (steps // interval)
            self.pruner = Pruner(self.model, self.optimizer, "bitter7", 0.5, begin=1, end=end, interval=interval)

    def step(self, inputs, targets):
        begin, pruning = self.now(), 0.0
        with parallel.autocast(self.world.device, self.dtype):
            loss = self.model(inputs.to(self.world.device), targets.to(self.world.device), False)[1]
        loss.backward()
        if self.pruner:
            pruning -= self.now()
            self.pruner.mask_gradients()
            pruning += self.now()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.pruner:
            pruning -= self.now()
            self.pruner.step()
            pruning += self.now()
        return self.now() - begin, pruning, loss.item()

    def now(self):
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def batch(sizes, sequences, tokens):
    drawn = torch.randint(sizes["vocab_size"], (sequences, tokens + 1))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def measure_together(sizes, sequences, tokens, steps, names, world):
    """side -> [(seconds, of them in pruning, loss) of each counted step], the sides in turn on the same batches."""
    sides = {name: Side(sizes, SIDES[name], WARMUP + steps, world) for name in names}
    taken = {name: [] for name in sides}
    torch.manual_seed(1)
    for _ in tqdm(range(WARMUP + steps), leave=False):
        inputs, targets = batch(sizes, sequences, tokens)
        for name, side in sides.items():
            taken[name].append(side.step(inputs, targets))
    return {name: rows[WARMUP:] for name, rows in taken.items()}


def peak_memory(sizes, sequences, tokens, name):
    """Bytes: the peak of a process that makes three steps of one side; on CUDA, of torch's allocator."""
    world = parallel.start()
    side = Side(sizes, SIDES[name], 3, world)
    for _ in range(3):
        side.step(*batch(sizes, sequences, tokens))
    return machine.peak_memory(world.device)


def table(model, numbers):
    """Markdown: each side's median step, what pruning takes of it, against dense and at the recipe's tokens a step."""
    rows, memory, tokens = numbers["steps"], numbers["memory"], numbers["tokens"]
    recipe = MODELS[model][2]
    dense = statistics.median(seconds for seconds, _, _ in rows["dense"])
    lines = [
        f"| {model}, {tokens:,} tokens a step | ms a step | spread | pruning, ms a step | share | share at {recipe:,} "
        "tokens a step | peak memory | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, taken in rows.items():
        seconds, pruning, losses = zip(*taken)
        middle, cost = statistics.median(seconds), statistics.mean(pruning)
        lines.append(
            f"| {name} | {1000 * middle:,.1f} | {(max(seconds) - min(seconds)) / middle:.0%} | {1000 * cost:,.2f} | "
            f"{cost / dense:.2%} | {cost / (dense * recipe / tokens):.3%} | {memory[name] / 1e6:,.0f} MB | "
            f"{losses[-1]:.4f} |"
        )
    return "\n".join(lines)


def main():
    parser = Parser(prog="python -m bench.prune", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="quickstart", help="whose shape is trained")
    parser.add_argument("--steps", type=positive, help="steps of each that count; default 60, on the 124M model 6")
    parser.add_argument("--tokens", type=positive, help="tokens of a sequence; default the model's whole context")
    parser.add_argument("--to", default=RESULTS, help="folder of prune/")
    args = parser.parse_args()
    world = parallel.start()
    sizes, sequences, _ = MODELS[args.model]
    tokens, steps = args.tokens or sizes["block_size"], args.steps or (60 if args.model == "quickstart" else 6)
    if tokens > sizes["block_size"]:
        raise UserError(f"--tokens {tokens}: the context of {args.model} is {sizes['block_size']} tokens")
    here = facts(world.device)
    path = path_of(here, "prune", args.to)
    before = read(path)
    rows = measure_together(sizes, sequences, tokens, steps, list(SIDES), world)
    memory = {name: alone(peak_memory, sizes, sequences, tokens, name) for name in SIDES}
    numbers = {"tokens": sequences * tokens, "steps": rows, "memory": memory} | here
    write(path, before | {args.model: numbers})
    print(f"{heading(here)}\nmedians of {steps} steps, in turn, after {WARMUP} that do not count\n")
    print(table(args.model, numbers))


if __name__ == "__main__":
    with one_line_errors("python -m bench.prune"):
        main()
