"""Run a plan, through train_gpt2.py's own code: python -m study.run PLAN [--jobs N]

Each run is a process of its own, on one thread (or one GPU); several go on at a time. What is done stays done: a run's
result is one JSON in results/study/PLAN/, and the same command, given again, does what is missing. A run that was
stopped half way goes on from its checkpoint.
"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import train_gpt2
from bench.machine import STAND_INS, git, processor
from gpt2 import checkpoint, parallel
from gpt2.config import nearest
from gpt2.data import TrainingBatches, evaluation_batches
from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.files import check_writable, read_json, write_json
from gpt2.metrics import read_metrics
from gpt2.placement import place
from gpt2.progress import progress
from pruning.layers import find_layers
from study import data
from study.arms import ARMS
from study.plan import RESULTS, expected, facts_of, load_plan, problems

CURVE = ("step", "tokens", "train_loss", "val_loss", "learning_rate", "grad_norm", "sparsity")


def parse(arguments):
    parser = Parser(prog="python -m study.run", description=__doc__.partition(":")[0])
    parser.add_argument("plan", help="a name in study/plans, or a file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each; on CUDA, one GPU each")
    parser.add_argument("--seeds", type=whole_numbers, help="only these, as in 0,1")
    parser.add_argument("--arms", type=str, default="", help="only those in whose name this regular expression matches")
    parser.add_argument("--minutes", type=float, help="stop after so long; what was under way goes on next time")
    parser.add_argument("--results", default=str(RESULTS), help="folder of the results")
    parser.add_argument("--work", default="out/study", help="folder of data and unfinished runs")
    parser.add_argument("--repeat", action="store_true", help="do finished runs again and compare; writes nothing")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help="this run, in this process")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: expected at least 1")
    if args.minutes is not None and not args.minutes >= 0:
        raise UserError(f"--minutes {args.minutes:g}: expected at least 0")
    try:
        args.arms = re.compile(args.arms)
    except re.error as error:
        raise UserError(f"--arms {args.arms}: is no regular expression: {error}") from None
    return args


def whole_numbers(text):
    return [int(number) for number in text.split(",")]


# ---- one run ----


def run_one(plan, arm, seed, args):
    """Train the run and write its result, or compare with it where args.repeat. One process does a run at a time."""
    work = Path(args.work) / plan.name / (f"{arm}-seed{seed}" + ("-again" if args.repeat else ""))
    work.mkdir(parents=True, exist_ok=True)
    path = plan.path(arm, seed, args.results)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() != args.repeat:
            return  # another process did it meanwhile
        identity = data.prepare(plan.text, data_dir(plan, args))
        config = plan.config(arm, seed, out_dir=str(work / "run"), data_dir=str(data_dir(plan, args)))
        change = plan.arms[arm].get("change")
        facts = facts_before(config)
        start = time.perf_counter()
        if not is_finished(config):
            train_gpt2.train(config, change and (lambda *run: ARMS[change[0]](*run, config, **change[1])))
        if not is_finished(config):
            return  # stopped on request: the next call goes on
        result = {
            "plan": plan.name,
            "arm": arm,
            "seed": seed,
            "change": [change[0], dict(change[1])] if change else None,
            "data": identity,
            **facts,
            **facts_after(config),
            "wall_seconds": time.perf_counter() - start,
            **circumstances(config),
        }
        if args.repeat:
            shutil.rmtree(work / "run")
            return compare(plan, arm, seed, result, args)
        if unfair := problems(plan, {**read_results(plan, args.results), path.name: result}):
            raise UserError("\n".join(unfair))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        shutil.rmtree(work / "run")


def data_dir(plan, args):
    """Where the shards of the plan's text are made, or lie already."""
    return Path(args.work) / "data" / plan.text.name if plan.text.files else data.find(plan.text)[0].parent


def is_finished(config):
    found = checkpoint.newest(config.out_dir)
    return bool(found) and checkpoint.is_finished(found[1], config)


def facts_before(config):
    """What runs of a plan must share, measured: hashes of initial weights, batches and evaluation set."""
    config, training, validation = train_gpt2.open_data(config, None)
    world = parallel.World(0, 1, torch.device("cpu"))
    batches = TrainingBatches(training, config, world)
    steps = range(1, config.max_iters + 1, max(1, config.max_iters // 10))
    micro_steps = config.gradient_accumulation_steps
    model = initial_model(config)
    return {
        "config": asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "initial_weights": short_hash(model.parameters()),
        "batches": short_hash(t for step in steps for t in batches.at(step, step % micro_steps)),
        "evaluation": short_hash(t for batch in evaluation_batches(validation, config, world) for t in batch[:2]),
        "epochs": config.max_iters * config.tokens_per_step / (len(training) * config.block_size),
    }


def initial_model(config):
    """The model as the loop starts with it, on the CPU."""
    model = train_gpt2.make_model(config)
    place(model, config, parallel.World(0, 1, torch.device("cpu")), torch.float32, compiling=False)
    return model


def facts_after(config):
    """The curve, the final loss and the sparsity, from what the run left."""
    steps = {}
    for line in read_metrics(Path(config.out_dir) / "metrics.jsonl"):
        steps.setdefault(line["step"], {}).update(line)  # an evaluation that was broken off has a line of its own
    lines = list(steps.values())
    curve = [{key: line[key] for key in CURVE if key in line} for line in lines if "val_loss" in line]
    ends = [0, *(line["step"] for line in lines)]
    model = initial_model(train_gpt2.open_data(config, None)[0])
    path, manifest = checkpoint.at(config.out_dir)
    checkpoint.load_model(model, checkpoint.open_tensors(path, "model.safetensors"))
    layers = find_layers(model)
    zeros = {layer.name: int((layer.parameter == 0).sum()) for layer in layers}
    pruned, prunable = sum(zeros.values()), sum(layer.size for layer in layers)
    return {
        "val_loss": curve[-1]["val_loss"],
        "tokens": curve[-1]["tokens"],
        "curve": curve,
        "prunable": prunable,
        "sparsity": pruned / prunable if manifest["config"]["criterion"] != "none" else 0.0,
        "layer_sparsity": {layer.name: zeros[layer.name] / layer.size for layer in layers},
        "seconds": sum((line["step"] - before) * line["step_ms"] / 1000 for before, line in zip(ends, lines)),
    }


def short_hash(tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def circumstances(config):
    """Commit, versions and machine."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    cuda = config.device == "cuda"
    return {
        "commit": git("rev-parse", "HEAD") + (" with changes" if changed else ""),
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "numpy": np.__version__},
        "machine": {
            "processor": torch.cuda.get_device_name() if cuda else processor(),
            "capability": str(torch.cuda.get_device_capability()) if cuda else torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
    }


def compare(plan, arm, seed, result, args):
    before = json.loads(plan.path(arm, seed, args.results).read_text())
    difference = result["val_loss"] - before["val_loss"]
    print(f"{arm} seed {seed}: val_loss {result['val_loss']:.4f}, {difference:+.5f} from the one kept", flush=True)
    if abs(difference) > 0.002:
        raise UserError(f"{arm} seed {seed}: repeated, it ends {difference:+.4f} from {before['val_loss']:.4f}")


def read_results(plan, results):
    """file name -> result, of all that lie in the plan's folder. UserError for what cannot be read."""
    return {path.name: read_result(path) for path in sorted((Path(results) / plan.name).glob("*.json"))}


def read_result(path):
    try:
        result = read_json(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    try:
        if math.isfinite(result["val_loss"]) and result["val_loss"] == result["curve"][-1]["val_loss"]:
            return result
        raise ValueError("val_loss is not that of the curve's end")
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{path}: is no result of a run ({type(error).__name__}: {error}): remove it") from None


# ---- all of them ----


def take_over(plan, todo, results):
    """Write the results of those runs in todo that another plan has made, under this plan's names; returns the others.

    A run is the same if its config (places apart), change, text, tokens and torch version are.
    """
    made = {}
    for path in sorted(Path(results).glob("*/*-seed*.json")):
        if path.parent.name != plan.name:
            result = read_result(path)
            made[identity(facts_of(result), result["versions"]["torch"])] = path, result
    left = []
    for arm, seed in todo:
        path, result = made.get(identity(expected(plan, arm, seed), torch.__version__), (None, None))
        if result is None:
            left.append((arm, seed))
            continue
        own = plan.path(arm, seed, results)
        own.parent.mkdir(parents=True, exist_ok=True)
        write_json(own, {**result, "plan": plan.name, "arm": arm, "made_as": f"{path.parent.name}/{path.stem}"})
    return left


def identity(facts, version):
    """What equal runs share, as a string; a build of a torch version is as good as another."""
    return json.dumps([facts, version.partition("+")[0]], sort_keys=True)


def run_all(plan, args):
    """Start what is missing, `jobs` at a time; returns how many runs failed."""
    runs = [(arm, seed) for arm, seed in plan.runs() if seed in (args.seeds or plan.seeds) and args.arms.search(arm)]
    if not runs:
        raise UserError(f"{plan.name}: no run has these --seeds and --arms; its arms are {', '.join(plan.arms)}")
    todo = [run for run in runs if plan.path(*run, args.results).exists() == args.repeat]
    todo = todo if args.repeat else take_over(plan, todo, args.results)
    if unfair := problems(plan, read_results(plan, args.results)):
        raise UserError("\n".join(unfair))
    check_machine(plan, todo, args)
    data.prepare(plan.text, data_dir(plan, args))
    log = Path(args.work) / plan.name / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    end = float("inf") if args.minutes is None else time.monotonic() + 60 * args.minutes
    running, failed = {}, 0
    with open(log, "a") as output, progress(len(runs), "run", len(runs) - len(todo), desc=plan.name) as bar:
        try:
            while (todo or running) and time.monotonic() < end:
                for slot in range(args.jobs):
                    if todo and slot not in running:
                        running[slot] = (todo[0], start(args, todo.pop(0), slot, output))
                time.sleep(0.2)
                for slot, (run, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        bar.update()
                        failed += process.returncode != 0
                        bar.write(f"{run[0]} seed {run[1]}: " + outcome(plan, run, process.returncode, args, log))
        finally:
            for _, process in running.values():
                process.send_signal(signal.SIGTERM)
            for _, process in running.values():
                process.wait()
    return failed


def check_machine(plan, todo, args):
    """UserError where the runs in todo cannot be made here, or their results not be written."""
    for device in {plan.config(*run).device for run in todo}:
        parallel.device_of(device, 0, 1)
    if todo and not args.repeat:
        check_writable(plan.path(*todo[0], args.results))


def start(args, run, slot, output):
    """The process of one run, on a GPU of its own of those that this process may use; on a CPU with AVX-512 held back
    to AVX2, as all others, lest it rounds otherwise."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        environment |= STAND_INS
    if torch.cuda.is_available():
        ours = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = ours.split(",")[slot % torch.cuda.device_count()]
    command = [sys.executable, "-m", "study.run", args.plan, "--results", args.results, "--work", args.work]
    command += ["--one", run[0], str(run[1])] + (["--repeat"] if args.repeat else [])
    return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def outcome(plan, run, code, args, log):
    path = plan.path(*run, args.results)
    if code:
        return f"FAILED, see {log}: " + (log.read_text().strip() or f"exit code {code}, and no word").splitlines()[-1]
    if args.repeat:
        return "repeated"
    if not path.exists():
        return "stopped on the way"
    result = json.loads(path.read_text())
    return f"val_loss {result['val_loss']:.4f} at {result['sparsity']:.1%}, {result['seconds']:.0f} s"


def table(plan, results):
    """What is done: a line an arm, its losses seed by seed."""
    done = {(result["arm"], result["seed"]): result["val_loss"] for result in results.values()}
    width = max(map(len, plan.arms))
    lines = [f"{'arm':{width}}  " + "  ".join(f"seed {seed:<2}" for seed in plan.seeds)]
    for arm in plan.arms:
        losses = (done.get((arm, seed)) for seed in plan.seeds)
        lines.append(f"{arm:{width}}  " + "  ".join(f"{loss:7.4f}" if loss else "      -" for loss in losses))
    return "\n".join(lines)


def main(arguments):
    missing = "interrupted; the same command does what is missing"
    with one_line_errors("python -m study.run", OSError, interrupted=missing, leave=sys.exit):
        args = parse(arguments)
        plan = load_plan(args.plan)
        if args.one:
            torch.set_num_threads(1)
            arm, seed = args.one
            if (arm, seed) not in [(arm, str(seed)) for arm, seed in plan.runs()]:
                raise UserError(f"--one {arm} {seed}: no run of {plan.name}{nearest(arm, plan.arms)}")
            return run_one(plan, arm, int(seed), args)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        failed = run_all(plan, args)
        print(table(plan, read_results(plan, args.results)))
        if failed:
            raise UserError(f"{failed} runs failed; see {args.work}/{plan.name}/log.txt")


if __name__ == "__main__":
    main(sys.argv[1:])
