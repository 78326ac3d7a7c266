"""Time and memory of one global update, beside the alternatives: python -m bench.select [--layers 12 --width 768]

On synthetic weights and Adam states of a GPT-2's prunable weights, 50 % pruned by bitter7: this library's update,
scoring included; torch.nn.utils.prune.global_unstructured on scores computed beforehand for it; and scoring, then
kthvalue or topk on the concatenated scores, then masking. Each runs `--rounds` times, in turn; extra memory is what the
peak rises above the weights and states, each way in a process of its own on the CPU, by the allocator's count on CUDA.

Writes results/select/MACHINE.json. --part leaves it to several calls: `ways`, then larger models (`sizes`), then the
same over ranks (`ranks`, on a CPU).
"""

import gc
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune
from tqdm import tqdm

from bench.machine import RESULTS, alone, facts, heading, path_of, peak_memory, read, write
from gpt2.errors import Parser, one_line_errors, positive
from gpt2.parallel import device_of
from pruning import Pruner
from pruning.choice import lowest
from pruning.criteria import bitter7


def synthetic(layers, width, device, shard=False):
    """(model, optimizer) with the matrices of `layers` GPT-2 blocks and random states; shard: over all ranks."""
    torch.manual_seed(0)
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers
    model = nn.Sequential(*(nn.Linear(columns, rows, bias=False, device=device) for rows, columns in shapes))
    if shard:
        fully_shard(model, mesh=init_device_mesh(device, (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        states = dict(exp_avg=torch.randn_like(parameter), exp_avg_sq=torch.rand_like(parameter) * 1e-8)
        optimizer.state[parameter] = {"step": torch.tensor(1.0)} | states
    return model, optimizer


def scored(model, optimizer):
    return [bitter7(p.detach(), optimizer.state[p]["exp_avg_sq"]) for p in model.parameters()]


def streaming(model, optimizer):
    Pruner(model, optimizer, "bitter7").prune_to(0.5)


def with_kthvalue(model, optimizer):
    scores = torch.cat([s.flatten() for s in scored(model, optimizer)])
    mask_below(model, optimizer, scores.kthvalue(scores.numel() // 2).values)


def with_topk(model, optimizer):
    scores = torch.cat([s.flatten() for s in scored(model, optimizer)])
    mask_below(model, optimizer, scores.topk(scores.numel() // 2, largest=False, sorted=False).values.max())


@torch.no_grad()
def mask_below(model, optimizer, threshold):
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        mask = bitter7(parameter, state["exp_avg_sq"]) <= threshold
        for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"]):
            tensor.masked_fill_(mask, 0)


def global_unstructured(model, optimizer):
    scores = {(layer, "weight"): score for layer, score in zip(model, scored(model, optimizer))}
    prune.global_unstructured(list(scores), prune.L1Unstructured, importance_scores=scores, amount=0.5)


WAYS = {
    "streaming (this library)": streaming,
    "scoring + kthvalue": with_kthvalue,
    "scoring + topk": with_topk,
    "global_unstructured": global_unstructured,
}


def measure(way, layers, width, device):
    """(seconds, bytes of extra memory) of one update on fresh tensors."""
    gc.collect()
    model, optimizer = synthetic(layers, width, device)
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else peak_memory(torch.device(device))
    begin = time.perf_counter()
    WAYS[way](model, optimizer)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, peak_memory(torch.device(device)) - before


def measured(way, layers, width, device):
    """`measure`, in a process of its own on the CPU, where a peak cannot be reset."""
    if device == "cuda":
        return measure(way, layers, width, device)
    return alone(measure, way, layers, width, device)


def on_rank(rank, ranks, store, kind, layers, width, results):
    """Put into `results` the seconds that finding the threshold, and then a whole update, take on `ranks` processes of
    one thread each, with all weights on each (kind "DDP") or shared out ("FSDP2")."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    model, optimizer = synthetic(layers, width, "cpu", shard=kind == "FSDP2")
    pruner = Pruner(model, optimizer, "bitter7")
    threshold = timed(torch.no_grad()(lambda: lowest(pruner.scores, range(len(pruner.layers)), pruner.prunable // 2)))
    update = timed(lambda: pruner.prune_to(0.5))
    if rank == 0:
        results.put((threshold, update))


def timed(work):
    """Seconds from the moment all ranks begin `work` until all have done it."""
    dist.barrier()
    begin = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - begin


def over_ranks(kind, layers, width, rounds):
    """{"1 rank": [(threshold, update) of each round, in seconds], "2 ranks": ...}, in turn."""
    results, seconds = torch.multiprocessing.get_context("spawn").SimpleQueue(), {1: [], 2: []}
    for _ in range(rounds):
        for ranks, measured in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(on_rank, (ranks, f"{folder}/store", kind, layers, width, results), ranks)
            measured.append(results.get())
    one, two = (list(map(statistics.median, zip(*measured))) for measured in seconds.values())
    for what, single, shared in zip(("threshold", "whole update"), one, two):
        print(
            f"{kind:6} {what:13} 1 rank {single:.3f} s, 2 ranks {shared:.3f} s, ratio {single / shared:.2f}", flush=True
        )
    return {"1 rank": seconds[1], "2 ranks": seconds[2]}


def compare(layers, width, device, rounds, ways):
    """{way: [(seconds, bytes of extra memory) of each round]}, in turn; empty for one that the memory does not hold."""
    results = {way: [] for way in ways}
    with tqdm(total=rounds * len(ways), leave=False) as bar:
        for _ in range(rounds):
            for way in ways:
                bar.set_description(way)
                try:
                    results[way].append(measured(way, layers, width, device))
                except torch.OutOfMemoryError:
                    pass
                bar.update()
    first = None
    print(f"\n{12 * layers * width**2:,} weights\n{'':28}{'seconds':>10}{'spread':>8}{'ratio':>8}{'extra MB':>10}")
    for way, runs in results.items():
        if not runs:
            print(f"{way:28}{'out of memory':>10}")
            continue
        seconds, extra = (statistics.median(column) for column in zip(*runs))
        first = first or seconds
        spread = (max(runs)[0] - min(runs)[0]) / seconds
        print(f"{way:28}{seconds:10.3f}{spread:8.0%}{seconds / first:8.2f}{extra / 1e6:10.0f}", flush=True)
    return results


PARTS = ("ways", "sizes", "ranks")


def main():
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser = Parser(prog="python -m bench.select", description=__doc__)
    parser.add_argument("--layers", type=positive, default=12, help="blocks of the model")
    parser.add_argument("--width", type=positive, default=768, help="of its residual stream")
    parser.add_argument("--rounds", type=positive, default=3, help="updates of each way")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=usual, help="where it is measured")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS, help="of what is measured (default: all)")
    parser.add_argument("--to", default=RESULTS, help="folder of select/")
    args = parser.parse_args()
    layers, width, device, rounds = args.layers, args.width, args.device, args.rounds
    here = facts(device_of(device, 0, 1))
    path = path_of(here, "select", args.to)
    before = read(path)
    numbers = before if before.get("commit") == here["commit"] else {}
    print(heading(here) + f"; medians of {rounds} rounds, in turn, spread (slowest - fastest) / median")
    for way in WAYS:  # kernels are compiled, or loaded, on first use
        measured(way, 1, 256, device)
    if "ways" in args.part:
        numbers["ways"] = {f"{12 * layers * width**2} weights": compare(layers, width, device, rounds, list(WAYS))}
    if "sizes" in args.part:
        ours = ["streaming (this library)"]
        sizes = {factor: compare(layers * factor, width, device, rounds, ours) for factor in (2, 4)}
        numbers["sizes"] = {f"{12 * layers * f * width**2} weights": found for f, found in sizes.items()}
    if "ranks" in args.part and device == "cpu":
        print(
            "\nThe first of these on ranks of one thread; under DDP the last pass, which scores again and sets "
            "to zero, is every rank's own"
        )
        numbers["ranks"] = {kind: over_ranks(kind, layers, width, rounds) for kind in ("DDP", "FSDP2")}
    write(path, here | {"rounds": rounds} | numbers)


if __name__ == "__main__":
    with one_line_errors("python -m bench.select"):
        main()
