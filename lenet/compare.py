"""The whole comparison, or a part of it: six optimizers, pruned in several ways to several sparsities, each with
several seeds.

    python -m lenet.compare --data-dir MNIST

A run is one file in OUT/runs. What is there is not run again, so the same command continues where it was stopped.
"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import fnmatch
import json
import multiprocessing
import os
import sys
from concurrent.futures import wait
from pathlib import Path

import torch

from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.files import check_writable, write_json
from gpt2.progress import progress
from gpt2.workers import pool
from lenet.data import load_digits
from lenet.train import OPTIMIZERS, config_of, parse, train
from pruning import NotFiniteError

SPARSITIES = (50, 70, 90)


def matrix(seeds, epochs=10, device="cpu"):
    """{name of a run: its options, as lenet.train parses them}, all of one seed before the next."""
    runs = {}
    for seed in range(seeds):
        for optimizer in OPTIMIZERS:
            common = ["--optimizer", optimizer, "--seed", str(seed), "--epochs", str(epochs), "--device", device]
            runs[f"{optimizer}_baseline_seed{seed}"] = parse(common)
            for sparsity in SPARSITIES:
                for method, flags in methods(optimizer).items():
                    runs[f"{optimizer}_{method}_{sparsity}_seed{seed}"] = parse(
                        [*common, *flags, "--target-sparsity", str(sparsity / 100)]
                    )
    return runs


def methods(optimizer):
    """{name: flags of lenet.train}. AdamWPrune's `movement` is its bitter0, so it has no movement of its own."""
    if optimizer != "adamwprune":
        return {method: ["--pruning-method", method] for method in ("movement", "magnitude")}
    by_state = {
        variant: ["--pruning-method", "state", "--adamwprune-variant", variant] for variant in ("bitter0", "bitter7")
    }
    return by_state | {method: ["--pruning-method", method] for method in ("magnitude", "random")}


def missing(runs, folder, digits):
    """Those of `runs` whose file is not in `folder`. UserError where a file holds another run than its name says."""
    result = {}
    for name, options in runs.items():
        path = folder / f"{name}.json"
        if not path.exists():
            result[name] = options
            continue
        found = read_run(path)
        expected = config_of(options, len(digits.train_labels)) | {"data": digits.source}
        for key, value in expected.items():
            there = found["data"] if key == "data" else found["config"].get(key)
            if there != value:
                raise UserError(f"{path}: was run with {key} {there}, not {value}: remove it, or give another --out")
    return result


def read_run(path):
    """The metrics in the file `path`, as lenet.train wrote them; UserError where it holds something else."""
    try:
        metrics = json.loads(Path(path).read_text())
        config = metrics["config"]
        OPTIMIZERS.index(config["optimizer"]), config["criterion"], float(config["target_sparsity"]), metrics["data"]
        (
            metrics["epochs"][-1]["test_accuracy"],
            metrics["memory_bytes"]["total"],
            metrics["final_accuracy"],
            metrics["compression_ratio"],
        )
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(
            f"{path}: is not a file of metrics that lenet.train wrote ({type(error).__name__}: {error})"
        ) from None
    return metrics


def prepare_worker(data_dir, device, counter):
    """What each worker process does first: its digits are loaded once for all its runs, on one thread."""
    global digits, epochs_done
    torch.set_num_threads(1)
    digits, epochs_done = load_digits(data_dir, device), counter


def run(options, path):
    def count(epoch):
        with epochs_done.get_lock():
            epochs_done.value += 1

    write_json(path, train(options, digits, after_epoch=count)[1])


def run_all(runs, folder, data_dir, device, jobs):
    """Train `runs`, `jobs` of them at a time, under one progress bar; each leaves its file in `folder` when it ends."""
    counter = multiprocessing.get_context("spawn").Value("l", 0)
    with (
        pool(jobs, prepare_worker, data_dir, device, counter) as workers,
        progress(sum(options.epochs for options in runs.values()), "epoch", smoothing=0.05) as bar,
    ):
        waiting = {workers.submit(run, options, folder / f"{name}.json") for name, options in runs.items()}
        while waiting:
            done, waiting = wait(waiting, timeout=0.5)
            bar.update(counter.value - bar.n)
            for future in done:
                future.result()


def parse_command(arguments=None):
    parser = Parser(
        prog="python -m lenet.compare",
        description="Trains LeNet-5 with every optimizer and pruning method, and keeps the metrics of each run.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/lenet"), help="folder for the results; the runs go to its subfolder runs"
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="only runs whose names match, such as adamw_* or *_90_*",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind, with seeds from 0")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training digits, a run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, each on one thread")
    parser.add_argument("--data-dir", help="folder with MNIST's four IDX files; default: as lenet.train")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps, ...")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.jobs) < 1:
        raise UserError("--seeds and --jobs: expected at least 1")
    return options


def main(arguments=None):
    with one_line_errors(
        "python -m lenet.compare",
        NotFiniteError,
        OSError,
        interrupted="interrupted; the same command continues",
        leave=sys.exit,
    ):
        options = parse_command(arguments)
        runs = {
            name: run
            for name, run in matrix(options.seeds, options.epochs, options.device).items()
            if any(fnmatch.fnmatch(name, pattern) for pattern in options.runs)
        }
        if not runs:
            raise UserError(
                f"--runs {' '.join(options.runs)}: matches no run; there are, for example, "
                f"{', '.join(list(matrix(1))[:5])}"
            )
        digits = load_digits(options.data_dir)
        folder = options.out / "runs"
        check_writable(folder / "a run")
        todo = missing(runs, folder, digits)
        print(
            f"{digits.source}: {len(runs)} runs, of which {len(runs) - len(todo)} are done; the same command "
            "continues if this is stopped"
        )
        if todo:
            run_all(todo, folder, options.data_dir, options.device, min(options.jobs, len(todo)))
        print(f"metrics of {len(runs)} runs in {folder}")


if __name__ == "__main__":
    main()
