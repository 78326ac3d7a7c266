"""What bench/gpu.sh does between its runs: python -m bench.gpu train|numbers|cut|same ...

train OPTIONS: train_gpt2.py, in which on a GPU no micro-step, masking, clipping or optimizer step may wait for the
device, but for those of the first step; leaves the peak of memory beside the run. numbers FOLDER RUN ... --to RESULTS:
writes their metrics, machine and commit as RESULTS/RUN.json. cut FOLDER RUN: takes away a finished run's last
checkpoint, as if it had been killed before. same FOLDER RUN OTHER --to RESULTS: compares the weights of two runs.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch

import train_gpt2
from bench.machine import facts, write
from gpt2 import parallel
from gpt2.checkpoint import checkpoints
from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.guard import Guard
from gpt2.load import load_run
from pruning import Pruner


@contextlib.contextmanager
def without_waiting():
    """An error wherever the host waits for the GPU inside."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def watched(function, least):
    """`function`, in which the host may not wait from call `least` on."""
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        with without_waiting() if len(calls) >= least else contextlib.nullcontext():
            return function(*args, **kwargs)

    return call


def watched_context(context, least):
    """The function `context`, which returns contexts, in which the host may not wait from call `least` on."""
    calls = []

    @contextlib.contextmanager
    def call(*args, **kwargs):
        calls.append(1)
        with context(*args, **kwargs), without_waiting() if len(calls) >= least else contextlib.nullcontext():
            yield

    return call


def train(options):
    out_dir = next((option.partition("=")[2] for option in options if option.startswith("--out_dir=")), None)
    if out_dir is None:
        raise UserError("train needs --out_dir=FOLDER")
    with contextlib.ExitStack() as stack:
        if torch.cuda.is_available():
            put = lambda owner, name, new: stack.enter_context(mock.patch.object(owner, name, new))
            micro_steps = 64  # at least as many as a step has
            put(train_gpt2, "averaging", watched_context(train_gpt2.averaging, micro_steps))
            put(Pruner, "mask_gradients", watched(Pruner.mask_gradients, 2))
            put(torch.nn.utils, "clip_grad_norm_", watched(torch.nn.utils.clip_grad_norm_, 2))
            put(Guard, "step", watched(Guard.step, 2))
        else:
            print("no GPU here: whether the host waits for it is not looked at", file=sys.stderr)
        train_gpt2.main(options)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    write(Path(out_dir) / "peak.json", {"peak_memory_bytes": peak})


def numbers(folder, runs, to):
    here = facts(parallel.start().device)
    for name in runs:
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        peak = json.loads((folder / name / "peak.json").read_text())
        write(to / f"{name}.json", here | peak | {"lines": lines})
        last = lines[-1]
        print(f"{here['machine']}, {name}: {last['tokens_per_second']:,.0f} tokens/s, loss {last['train_loss']:.4f}")


def cut(folder, runs, to):
    found = checkpoints(folder / runs[0] / "checkpoints")
    if len(found) < 2:
        raise UserError(f"{folder / runs[0]}: expected two checkpoints, found {len(found)}")
    for path in found[1:]:
        shutil.rmtree(path)


def same(folder, runs, to):
    """The weights of two runs, to the bit; SystemExit where they differ."""
    one, other = (load_run(folder / name, "cpu")[1].tensors() for name in runs)
    difference = max(((one[n] - other[n]).norm() / one[n].norm()).item() for n in one)
    zeros = [sum(int((p == 0).sum()) for p in tensors.values()) for tensors in (one, other)]
    here = facts(parallel.start().device)
    write(to / "resume.json", here | {"largest_relative_difference": difference, "zeros": zeros})
    print(
        f"{here['machine']}: resumed against undisturbed, largest relative difference {difference:.1e}, zeros {zeros}"
    )
    if not all(torch.equal(one[name], other[name]) for name in one):
        sys.exit("a resumed run does not end as an undisturbed one")


def check(args):
    """UserError where a run is not there, or something is not given."""
    files = {"numbers": ("metrics.jsonl", "peak.json"), "cut": ("checkpoints",), "same": ("checkpoints",)}[args.what]
    for run in (args.folder / name for name in args.runs):
        if lacking := [file for file in files if not (run / file).exists()]:
            raise UserError(f"{run}: no such run: it has no {lacking[0]}, which python -m bench.gpu train leaves")
    if args.what == "same" and len(args.runs) != 2:
        raise UserError(f"same {' '.join(args.runs)}: expected two runs")
    if args.what != "cut" and not args.to:
        raise UserError(f"{args.what} needs --to, the folder of the results")


def main():
    if sys.argv[1:2] == ["train"]:
        return train(sys.argv[2:])
    parser = Parser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("what", choices=("numbers", "cut", "same"), help="as above, or train")
    parser.add_argument("folder", type=Path, help="where the runs lie")
    parser.add_argument("runs", nargs="+", help="their names")
    parser.add_argument("--to", type=Path, help="folder of the results")
    args = parser.parse_args()
    check(args)
    {"numbers": numbers, "cut": cut, "same": same}[args.what](args.folder, args.runs, args.to)


if __name__ == "__main__":
    with one_line_errors("python -m bench.gpu"):
        main()
