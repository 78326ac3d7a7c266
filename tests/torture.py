"""Kills runs at every point where it could hurt, and compares what they end with: python -m tests.torture

Each case is a run that is made to fail and then continued by the same command: its last checkpoint must have the bytes
of an undisturbed run's, and its metrics the same losses. Results are kept in results/torture.jsonl, case by case, so
that the next call goes on; results/reliability.md is the table of them. TMPDIR says where the runs are: in memory, as
in /dev/shm, they take a fraction of the time.
"""

import itertools
import json
import math
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from bench.machine import facts
from gpt2.checkpoint import verify
from gpt2.errors import Parser, one_line_errors
from gpt2.files import write_atomically
from tests.gpt2.test_damage import damage
from tests.zygote import ROOT, Zygote

RUN = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 16,
    "batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_iters": 6,
    "warmup_iters": 2,
    "eval_interval": 3,
    "eval_iters": 2,
    "log_interval": 1,
    "checkpoint_interval": 2,
    "learning_rate": 1e-2,
    "dropout": 0.1,
    "criterion": "bitter7",
    "prune_begin": 1,
    "prune_end": 5,
    "prune_interval": 2,
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
}
PLACES = [("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)]
WRITES = {("ddp", 1): 1000, ("ddp", 2): 50, ("fsdp", 1): 50, ("fsdp", 2): 50}  # SIGKILL in a write of a checkpoint
KILLS, STOPS = 20, 15  # SIGKILL elsewhere, half of them at any moment, and SIGTERM, for each of PLACES
DAMAGES = 500  # of the checkpoints of one rank
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


PASSED = ("ok", "refused")  # verdicts


class Torture:
    """Runs in one folder, started by one zygote; `undisturbed` knows how each kind of run ends when it is let alone."""

    def __init__(self, zygote, folder):
        self.zygote, self.folder, self.ends, self.passed, self.seconds = zygote, Path(folder), {}, {}, {}
        self.data_dir = self.folder / "data"
        write_data(self.data_dir)

    def run(self, name, parallel, ranks, **options):
        given = RUN | {"parallel": parallel, "data_dir": self.data_dir, "out_dir": self.folder / name}
        return self.zygote.run(*(f"--{key}={value}" for key, value in given.items()), ranks=ranks, **options)

    def undisturbed(self, parallel, ranks):
        """How such a run ends; fills `passed`: rank -> point -> how often the run passes it, and `seconds`."""
        if (parallel, ranks) not in self.ends:
            done = self.run("undisturbed", parallel, ranks, fault="count")
            assert done.codes == [0] * ranks, done
            counts = [json.loads(line[7:]) for line in done.output.splitlines() if line.startswith("passed ")]
            self.passed[parallel, ranks] = {count.pop("rank"): count for count in counts}
            self.ends[parallel, ranks] = end_of(self.folder / "undisturbed")
            self.seconds[parallel, ranks] = self.run("timed", parallel, ranks).seconds
            shutil.rmtree(self.folder / "timed")
            shutil.rmtree(self.folder / "undisturbed")
        return self.ends[parallel, ranks]

    def case(self, parallel, ranks, fault=None, share=None):
        """Let a run fail once, continue it, and tell what came of it; the verdict is "ok", or what is wrong.

        fault: as in gpt2/faults.py; or share: of the time that such a run takes, after which rank 0 is killed."""
        expected, out_dir = self.undisturbed(parallel, ranks), self.folder / "case"
        shutil.rmtree(out_dir, ignore_errors=True)
        kill = share and (share * self.seconds[parallel, ranks], "SIGKILL")
        first = self.run("case", parallel, ranks, fault=fault, kill=kill)
        stopped = fault and "SIGTERM" in fault
        verdict, left = "ok", saved_step(out_dir)
        if "Traceback" in first.output and stopped:
            verdict = "traceback: " + first.output[-300:]
        if stopped and set(first.codes) != {0}:
            verdict = f"stopped with {first.codes}: {first.output[-300:]}"
        if stopped and set(first.codes) == {0} and left < done_step(out_dir):
            verdict = f"stopped at {done_step(out_dir)}, saved {left}"
        second = self.run("case", parallel, ranks)
        if set(second.codes) != {0}:
            verdict = f"not continued: {second.codes}: {second.output[-300:]}"
        elif (wrong := difference(end_of(out_dir), expected)) and verdict == "ok":
            verdict = wrong
        return dict(died=first.codes, saved=left, seconds=round(first.seconds + second.seconds, 2), verdict=verdict)

    def damaged(self, parallel, ranks, seed):
        """Damage the checkpoints of a run that was killed, once or twice, and continue it: as before, or a refusal."""
        killed, out_dir, generator = self.folder / "killed", self.folder / "case", random.Random(f"damage {seed}")
        expected = self.undisturbed(parallel, ranks)
        if not killed.exists():
            self.run("killed", parallel, ranks, fault="in_update:5:SIGKILL")
        shutil.rmtree(out_dir, ignore_errors=True)
        shutil.copytree(killed, out_dir)
        what = [damage(out_dir / "checkpoints", generator)[0] for _ in range(generator.choice([1, 1, 1, 2]))]
        done = self.run("case", parallel, ranks)
        if set(done.codes) == {2} and "error:" in done.output and "Traceback" not in done.output:
            verdict = "refused"
        elif set(done.codes) != {0}:
            verdict = f"not continued: {done.codes}: {done.output[-300:]}"
        else:
            verdict = difference(end_of(out_dir), expected) or "ok"
        fell_back = "skipping the damaged checkpoint" in done.output
        return dict(damage=what, fell_back=fell_back, seconds=round(done.seconds, 2), verdict=verdict)


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
    whole = ("step-", "damaged-step-")
    leftovers = [path.name for path in (out_dir / "checkpoints").iterdir() if not path.name.startswith(whole)]
    return dict(last=last.name, files=files, measured=measured, leftovers=leftovers)


def difference(found, expected):
    """What differs, in words; "" where nothing does."""
    wrong = [key for key in expected if found[key] != expected[key]]
    return f"differs in {', '.join(wrong)}" if wrong else ""


def cases(torture, parallel, ranks):
    """(name, arguments of `case` or `damaged`) of each case of one kind of run: the same at each call, in turn."""
    torture.undisturbed(parallel, ranks)
    passed, generator = torture.passed[parallel, ranks], random.Random(f"{parallel}{ranks}")
    counts = [(rank, point, count) for rank in sorted(passed) for point, count in sorted(passed[rank].items())]
    points = [(rank, point, n) for rank, point, count in counts for n in range(1, count + 1)]
    writes = [place for place in points if place[1] in WRITING and not is_repeated(place, passed)]
    others = [place for place in points if place[1] not in WRITING]
    pick = lambda places, count: generator.sample(places, len(places))[:count]
    kinds = [[], [], [], []]
    for rank, point, n in pick(writes, WRITES[parallel, ranks]):
        kinds[0].append((f"write {point}:{n}@{rank}", dict(fault=f"{point}:{n}:SIGKILL:{rank}")))
    for rank, point, n in pick(others, KILLS // 2):
        kinds[1].append((f"kill {point}:{n}@{rank}", dict(fault=f"{point}:{n}:SIGKILL:{rank}")))
    for number in range(KILLS // 2):
        share = round(generator.random(), 3)
        kinds[1].append((f"kill at {share} of its time #{number}", dict(share=share)))
    for rank, point, n in pick(points, STOPS):
        kinds[2].append((f"stop {point}:{n}@{rank}", dict(fault=f"{point}:{n}:SIGTERM:{rank}")))
    if (parallel, ranks) == ("ddp", 1):
        kinds[3] = [(f"damage {seed}", dict(seed=seed)) for seed in range(DAMAGES)]
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
        rows[result["parallel"], result["ranks"], kind, "ok"] += result["verdict"] in PASSED
    words = {"write": "SIGKILL in the writing of a checkpoint", "kill": "SIGKILL elsewhere", "stop": "SIGTERM"}
    words["damage"] = "bits flipped, files cut, deleted, exchanged in its checkpoints"
    text = [
        "# What was broken on purpose, and what came of it",
        "",
        "Written by `make torture` (`python -m tests.torture`), which anybody can repeat. A case is a run of 6 steps",
        "with dropout, pruning and a checkpoint every 2 steps, which is killed or asked to stop at one point and then",
        "continued by the same command. It passes when the last checkpoint has, byte for byte, the weights and",
        "optimizer states of an undisturbed run, when loss, validation loss and sparsity of every step are the same",
        "numbers, and when no half-written file is left. After SIGTERM the run must also have ended with 0 and saved",
        "the last step it had done. Where the checkpoints of a run that was killed were damaged, once or twice, it may",
        "also have been refused, with 2 and a line.",
        "",
        "| placement | ranks | fault | cases | passed |",
        "|---|---|---|---|---|",
    ]
    for parallel, ranks in PLACES:
        for kind, meaning in words.items():
            if count := rows[parallel, ranks, kind]:
                text.append(f"| {parallel} | {ranks} | {meaning} | {count} | {rows[parallel, ranks, kind, 'ok']} |")
    failed = [result for result in results if result["verdict"] not in PASSED]
    text += ["", f"{len(results)} cases, {len(results) - len(failed)} passed."]
    damaged = [result for result in results if result["name"].startswith("damage")]
    if damaged:
        fell_back, refused = sum(r["fell_back"] for r in damaged), sum(r["verdict"] == "refused" for r in damaged)
        text[-1] += (
            f" Of {len(damaged)} damaged runs {fell_back} named what they passed over, {refused} were refused, the "
            "others had lost a checkpoint that was not the newest, or all of the newest."
        )
    text += [f"- {r['parallel']}, {r['ranks']} ranks, {r['name']}: {r['verdict']}" for r in failed]
    where = sorted({f"{result['machine']}, at commit {result['commit']}" for result in results})
    text += ["", f"Measured on {'; '.join(where)}.", ""]
    return "\n".join(text)


def main():
    parser = Parser(prog="python -m tests.torture", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["ddp", "fsdp"], help="ddp, fsdp")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "torture.jsonl", help="what is done already")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; the next call goes on")
    args = parser.parse_args()
    done, end = {key_of(result) for result in read(args.results)}, time.monotonic() + 60 * args.minutes
    here = facts(torch.device("cpu"))
    machine = f"{here['device']}, {here['machine'].split()[1]}, torch {here['torch']}"
    with tempfile.TemporaryDirectory() as folder, Zygote() as zygote, open(args.results, "a", buffering=1) as out:
        torture = Torture(zygote, folder)
        places = [(place, cases(torture, *place)) for place in PLACES if place[0] in args.only]
        for turn in itertools.zip_longest(*([(place, case) for case in found] for place, found in places)):
            for (parallel, ranks), (name, what) in filter(None, turn):
                result = dict(parallel=parallel, ranks=ranks, name=name, machine=machine, commit=here["commit"])
                if key_of(result) in done or time.monotonic() > end:
                    continue
                result |= (torture.damaged if "seed" in what else torture.case)(parallel, ranks, **what)
                out.write(json.dumps(result) + "\n")
                print(f"{parallel} x {ranks}  {name:40} {result['verdict']}", flush=True)
                report = args.results.with_name("reliability.md")
                write_atomically(report, table(read(args.results)).encode())


def key_of(result):
    return result["parallel"], result["ranks"], result["name"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    with one_line_errors("python -m tests.torture"):
        main()
