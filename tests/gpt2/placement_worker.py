"""Run in four processes by test_placement.py: stops and continues small runs in worlds of 1, 2, 3 and 4 of them."""

import contextlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gpt2.log
import gpt2.model
import train_gpt2
from gpt2 import parallel
from gpt2.config import load_config
from gpt2.errors import UserError
from pruning.allocation import ALLOCATIONS
from pruning.criteria import CRITERIA
from pruning.optim import OPTIMIZERS
from pruning.schedule import SCHEDULES

HALF, END = 4, 6
KINDS, SIZES = ("ddp", "fsdp"), (1, 2, 4)


def work(rank, ports, folder, data_dir, options):
    """Undisturbed runs, runs that stop after the checkpoint of step HALF, and each of these continued in each world."""
    gpt2.log.draw = lambda out_dir: out_dir  # pictures take longer than the runs
    folder, ports = Path(folder), iter(ports)
    options = [*options, f"--data_dir={data_dir}", f"--max_iters={END}"]

    def run(out_dir, kind, *more, change=None):
        names = {"criterion": tuple(CRITERIA), "schedule": tuple(SCHEDULES), "allocation": tuple(ALLOCATIONS)}
        names["optimizer"] = OPTIMIZERS
        config = load_config([*options, f"--out_dir={folder / out_dir}", f"--parallel={kind}", *more], names)
        train_gpt2.train(config, change)

    with world_of(rank, 3, next(ports)) as member:
        if member:
            with changed(gpt2.model, "chunking_pays", lambda vocab_size, device: True):
                for kind in KINDS:
                    run(f"blocks-{kind}-3", kind)
    for size in SIZES:
        with world_of(rank, size, next(ports)) as member:
            if member and size == 1:
                run("whole", "ddp")
                run("recomputed", "fsdp", "--activation_checkpointing=True")
            for kind in KINDS if member else ():
                with changed(gpt2.log.Log, "write", stop_after_half), contextlib.suppress(Stop):
                    run(f"{kind}-{size}", kind)
            for kind in KINDS if member and size == 2 else ():
                run(f"{kind}-one-loss-infinite", kind, change=infinite_loss_on(1, rank))
                refused(run, f"{kind}-not-the-same-twice", kind, "--check_interval=2", change=other_loss_on(1, rank))
            if member and size == 4:
                refused(run, "ddp-flipped-bit", "ddp", "--check_interval=2", change=flipped_bit_on(2, rank))
    for size in SIZES:
        with world_of(rank, size, next(ports)) as member:
            for saved in (f"{kind}-{size}" for kind in KINDS for size in SIZES):
                for kind in KINDS if member else ():
                    out_dir = f"{saved}-to-{kind}-{size}"
                    if rank == 0:
                        shutil.copytree(folder / saved, folder / out_dir)
                    dist.barrier()
                    run(out_dir, kind)


def refused(run, out_dir, *arguments, **options):
    """Run what ends in a UserError, and leave its message in a file beside the run."""
    with pytest.raises(UserError) as caught:
        run(out_dir, *arguments, **options)
    (Path(os.environ["WORLDS"]) / f"{out_dir}-{os.environ['RANK']}.txt").write_text(str(caught.value))


def infinite_loss_on(bad, rank):
    """What makes the loss of the rank `bad` infinite, its gradient being finite, in the third step."""

    def change(model, optimizer, pruner):
        calls = itertools.count()
        model.register_forward_hook(
            lambda module, arguments, output: (
                (None, output[1] + torch.inf) if module.training and next(calls) == 15 and rank == bad else None
            )
        )
        return pruner

    return change


def other_loss_on(bad, rank):
    """What makes the loss of the rank `bad` a little different each time."""

    def change(model, optimizer, pruner):
        calls = itertools.count()
        model.register_forward_hook(
            lambda module, arguments, output: (None, output[1] * (1 + 1e-6 * next(calls))) if rank == bad else None
        )
        return pruner

    return change


def flipped_bit_on(bad, rank):
    """What flips a bit of one weight that is not pruned on the rank `bad` after the first update."""

    def flip(optimizer, *arguments):
        if rank == bad and next(calls) == 0:
            optimizer.param_groups[0]["params"][0].data.view(torch.int32)[3, 5] ^= 1 << 18

    def change(model, optimizer, pruner):
        optimizer.register_step_post_hook(flip)
        return pruner

    calls = itertools.count()
    return change


class Stop(Exception):
    """The end of a run that is to be continued."""


write = gpt2.log.Log.write


def stop_after_half(log, step, metrics):
    if step > HALF:
        raise Stop
    write(log, step, metrics)


@contextlib.contextmanager
def changed(owner, name, value):
    """`owner.name` is `value` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def world_of(rank, size, port):
    """The first `size` processes are the world that train_gpt2 finds. Gives whether this process is one of them."""
    if rank >= size:
        yield False
        return
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = parallel.start("cpu")
    with changed(parallel, "start", lambda *arguments, **options: world):
        yield True
    parallel.stop()


if __name__ == "__main__":
    work(int(os.environ["RANK"]), *json.loads(sys.argv[1]))
