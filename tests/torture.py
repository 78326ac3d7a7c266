"""Kills runs at every point where it could hurt, and compares what they end with: python -m tests.torture [--only PART]

Each case is a run that is made to fail and then continued by the same command: its last checkpoint must have the bytes
of an undisturbed run's, and its metrics the same losses. Results are kept in results/torture.jsonl, case by case, so
that the next call goes on; results/reliability.md is the table of them.
"""

import argparse
import itertools
import json
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from gpt2.checkpoint import verify
from gpt2.files import write_atomically
from tests.zygote import ROOT, Zygote

RUN = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 16,
    "batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_iters": 12,
    "warmup_iters": 3,
    "eval_interval": 4,
    "eval_iters": 2,
    "log_interval": 1,
    "checkpoint_interval": 3,
    "learning_rate": 1e-2,
    "dropout": 0.1,
    "criterion": "bitter7",
    "prune_begin": 2,
    "prune_end": 10,
    "prune_interval": 2,
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
}
PLACES = [("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)]
WRITES = {("ddp", 1): 1000, ("ddp", 2): 20, ("fsdp", 1): 10, ("fsdp", 2): 20}  # SIGKILL in a write of a checkpoint
KILLS = {("ddp", 1): 40, ("ddp", 2): 20, ("fsdp", 1): 10, ("fsdp", 2): 20}  # SIGKILL elsewhere
STOPS = {("ddp", 1): 20, ("ddp", 2): 15, ("fsdp", 1): 5, ("fsdp", 2): 15}  # SIGTERM
WRITING = (
    "before_snapshot",
    "after_snapshot",
    "before_write",
    "in_write",
    "before_fsync",
    "after_fsync",
    "before_manifest",
)
WRITING += ("before_rename", "after_rename", "after_sync", "before_delete")


class Torture:
    """Runs in one folder, started by one zygote; `undisturbed` knows how each kind of run ends when it is let alone."""

    def __init__(self, zygote, folder):
        self.zygote, self.folder, self.ends, self.passed = zygote, Path(folder), {}, {}
        self.data_dir = self.folder / "data"
        write_data(self.data_dir)

    def run(self, name, parallel, ranks, **options):
        given = RUN | {"parallel": parallel, "data_dir": self.data_dir, "out_dir": self.folder / name}
        return self.zygote.run(*(f"--{key}={value}" for key, value in given.items()), ranks=ranks, **options)

    def undisturbed(self, parallel, ranks):
        """How such a run ends; fills `passed`: rank -> point -> how often the run passes it."""
        if (parallel, ranks) not in self.ends:
            done = self.run("undisturbed", parallel, ranks, fault="count")
            assert done.codes == [0] * ranks, done
            counts = [json.loads(line[7:]) for line in done.output.splitlines() if line.startswith("passed ")]
            self.passed[parallel, ranks] = {count.pop("rank"): count for count in counts}
            self.ends[parallel, ranks] = end_of(self.folder / "undisturbed")
            shutil.rmtree(self.folder / "undisturbed")
        return self.ends[parallel, ranks]

    def case(self, parallel, ranks, fault=None, kill=None):
        """Let a run fail once, continue it, and tell what came of it; the verdict is "ok", or what is wrong."""
        expected, out_dir = self.undisturbed(parallel, ranks), self.folder / "case"
        shutil.rmtree(out_dir, ignore_errors=True)
        first = self.run("case", parallel, ranks, fault=fault, kill=kill)
        stopped = "SIGTERM" in (fault or kill[1])
        verdict, left = "ok", saved_step(out_dir)
        if "Traceback" in first.output and stopped:
            verdict = "traceback: " + first.output[-300:]
        if stopped and set(first.codes) != {0} and -15 not in first.codes:
            verdict = f"stopped with {first.codes}: {first.output[-300:]}"
        if stopped and set(first.codes) == {0} and left < done_step(out_dir):
            verdict = f"stopped at {done_step(out_dir)}, saved {left}"
        second = self.run("case", parallel, ranks)
        if set(second.codes) != {0}:
            verdict = f"not continued: {second.codes}: {second.output[-300:]}"
        elif (wrong := difference(end_of(out_dir), expected)) and verdict == "ok":
            verdict = wrong
        return dict(died=first.codes, saved=left, seconds=round(first.seconds + second.seconds, 2), verdict=verdict)


def write_data(folder):
    """Shards whose next token can be learnt."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number, split in enumerate(["val", "train", "train"]):
        tokens = np.cumsum(generator.choice([1, 2, 3], p=[0.8, 0.1, 0.1], size=3000)) % 100
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, len(tokens)
        path = folder / f"toy_{split}_{number:06d}.bin"
        path.write_bytes(header.tobytes() + tokens.astype(np.uint16).tobytes())
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "byte", "vocab_size": 100}))


def saved_step(out_dir):
    return max((int(path.name[5:]) for path in (out_dir / "checkpoints").glob("step-*")), default=0)


def done_step(out_dir):
    return max((line["step"] for line in lines_of(out_dir)), default=0)


def lines_of(out_dir):
    path = out_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def end_of(out_dir):
    """What must not depend on what happened on the way: bytes of the last checkpoint, what every step measured."""
    last = max((out_dir / "checkpoints").glob("step-*"))
    verify(last)
    files = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
    measured = {}
    for line in lines_of(out_dir):
        kept = {key: line[key] for key in ("train_loss", "val_loss", "sparsity", "tokens") if key in line}
        measured.setdefault(line["step"], {}).update(kept)
    leftovers = [path.name for path in (out_dir / "checkpoints").iterdir() if not path.name.startswith("step-")]
    return dict(last=last.name, files=files, measured=measured, leftovers=leftovers)


def difference(found, expected):
    """What differs, in words; "" where nothing does."""
    wrong = [key for key in expected if found[key] != expected[key]]
    return f"differs in {', '.join(wrong)}" if wrong else ""


def cases(torture, parallel, ranks):
    """(name, what to do) of each case of one kind of run. The same ones at each call, the kinds in turn."""
    torture.undisturbed(parallel, ranks)
    passed, generator = torture.passed[parallel, ranks], random.Random(f"{parallel}{ranks}")
    counts = [(rank, point, count) for rank in passed for point, count in sorted(passed[rank].items())]
    points = [(rank, point, n) for rank, point, count in counts for n in range(1, count + 1)]
    writes = [place for place in points if place[1] in WRITING and not is_repeated(place, passed)]
    others = [place for place in points if place[1] not in WRITING]
    pick = lambda places, count: generator.sample(places, min(len(places), count))
    kinds = [[], [], []]
    for rank, point, n in pick(writes, WRITES[parallel, ranks]):
        kinds[0].append((f"write {point}:{n}@{rank}", dict(fault=f"{point}:{n}:SIGKILL:{rank}")))
    for rank, point, n in pick(others, KILLS[parallel, ranks] // 2):
        kinds[1].append((f"kill {point}:{n}@{rank}", dict(fault=f"{point}:{n}:SIGKILL:{rank}")))
    for number in range(KILLS[parallel, ranks] // 2):
        seconds = round(generator.uniform(0.01, 0.6), 3)
        kinds[1].append((f"kill after {seconds} s #{number}", dict(kill=(seconds, "SIGKILL"))))
    for rank, point, n in pick(points, STOPS[parallel, ranks]):
        kinds[2].append((f"stop {point}:{n}@{rank}", dict(fault=f"{point}:{n}:SIGTERM:{rank}")))
    return [case for turn in itertools.zip_longest(*kinds) for case in turn if case]


def is_repeated(place, passed):
    """Whether it is a chunk of a file in another checkpoint than the second: one that is killed at each is enough."""
    rank, point, n = place
    total, checkpoints = passed[rank][point], passed[rank]["before_write"]
    return point == "in_write" and not total // checkpoints < n <= 2 * total // checkpoints


def table(results):
    """results/reliability.md: what was done, how often, and what came of it."""
    rows = Counter()
    for result in results:
        kind = result["name"].split()[0]
        rows[result["parallel"], result["ranks"], kind] += 1
        rows[result["parallel"], result["ranks"], kind, "ok"] += result["verdict"] == "ok"
    words = {"write": "SIGKILL in the writing of a checkpoint", "kill": "SIGKILL elsewhere", "stop": "SIGTERM"}
    text = [
        "# What was broken on purpose, and what came of it",
        "",
        "Written by `make torture` (`python -m tests.torture`), which anybody can repeat. A case is a run of 12 steps",
        "with dropout, pruning and a checkpoint every 3 steps, which is killed or asked to stop at one point and then",
        "continued by the same command. It passes when the last checkpoint has, byte for byte, the weights and",
        "optimizer states of an undisturbed run, when loss, validation loss and sparsity of every step are the same",
        "numbers, and when no half-written file is left. After SIGTERM the run must also have ended with 0 and saved",
        "the last step it had done.",
        "",
        "| placement | ranks | fault | cases | passed |",
        "|---|---|---|---|---|",
    ]
    for parallel, ranks in PLACES:
        for kind, meaning in words.items():
            if count := rows[parallel, ranks, kind]:
                text.append(f"| {parallel} | {ranks} | {meaning} | {count} | {rows[parallel, ranks, kind, 'ok']} |")
    failed = [result for result in results if result["verdict"] != "ok"]
    text += ["", f"{len(results)} cases, {len(results) - len(failed)} passed."]
    text += [f"- {r['parallel']}, {r['ranks']} ranks, {r['name']}: {r['verdict']}" for r in failed]
    text += ["", "Measured on: AMD EPYC (Zen 3), 2 cores, AVX2, float32, torch 2.13 CPU.", ""]
    return "\n".join(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["ddp", "fsdp"], help="ddp, fsdp")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "torture.jsonl")
    args = parser.parse_args()
    known = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    done = {(result["parallel"], result["ranks"], result["name"]) for result in known}
    with tempfile.TemporaryDirectory() as folder, Zygote() as zygote, open(args.results, "a", buffering=1) as out:
        torture = Torture(zygote, folder)
        places = [(place, cases(torture, *place)) for place in PLACES if place[0] in args.only]
        for turn in itertools.zip_longest(*([(place, case) for case in found] for place, found in places)):
            for (parallel, ranks), (name, what) in filter(None, turn):
                if (parallel, ranks, name) in done:
                    continue
                result = dict(parallel=parallel, ranks=ranks, name=name) | torture.case(parallel, ranks, **what)
                out.write(json.dumps(result) + "\n")
                known.append(result)
                print(f"{parallel} x {ranks}  {name:40} {result['verdict']}", flush=True)
                write_atomically(ROOT / "results" / "reliability.md", table(known).encode())


if __name__ == "__main__":
    main()
