"""Tokens per second of this loop on this machine, and beside nanoGPT's: NANOGPT=path/to/nanoGPT python -m bench.train

Both train a GPT of the same size (on a CPU 6 layers, 256 wide; on a GPU GPT-2 124M) on the same random tokens, each in
a process of its own, a step of the one, a step of the other, and so on: drift of the machine meets both alike. nanoGPT
runs as its README says for a CPU (float32, no compile) or a GPU (bfloat16, compiled), with the model and the optimizer
of its own model.py; this loop as it chooses for the machine. Steps that allocate and compile do not count.

--shakespeare INPUT.TXT compares whole runs instead: seconds until nanoGPT's CPU quickstart has ended, and until
config/shakespeare_char.py has, and the same with nanoGPT's own recipe; each with the validation loss it reaches.

Writes results/train/MACHINE.json.
"""

import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.loops import SIZES, VOCABULARIES, device, nanogpt, ours, require_checkout, share_of_peak
from bench.machine import RESULTS, facts, heading, path_of, read, write
from bench.turns import in_turn, ratio
from gpt2.errors import Parser, UserError, one_line_errors, positive

QUICKSTART = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()
TOKENS = 2000 * 12 * 64
SAME = (  # nanoGPT's recipe for the model that config/shakespeare_char.py has: its steps, rates, evaluations
    "--batch_size=12 --max_iters=2000 --learning_rate=1e-3 --min_lr=1e-4 --warmup_iters=100 --lr_schedule=cosine "
    "--lr_decay_begin=0 --criterion=none --eval_interval=250 --eval_iters=20 --log_interval=10"
).split()
RECIPES = {"the same recipe": SAME, "config/shakespeare_char.py": []}


def compare_steps(checkout, vocab_size, batch_size, rounds):
    """{"this loop": {"seconds", "loss", "memory"}, "nanoGPT": ...}, printed as a line."""
    makers = {"this loop": (ours, (vocab_size,))}
    if checkout:
        makers["nanoGPT"] = (nanogpt, (vocab_size, checkout))
    here = device()
    context = SIZES[here.type]["block_size"]
    share = share_of_peak(vocab_size, torch.cuda.get_device_name(here)) if here.type == "cuda" else None
    rows = in_turn(makers, vocab_size, (batch_size, context), rounds)
    if failed := [f"{name}: {row['failed']}" for name, row in rows.items() if "failed" in row]:
        raise SystemExit("\n".join(failed))
    line = f"vocabulary {vocab_size:6,}"
    for name, row in rows.items():
        seconds = row["seconds"]
        rates = [batch_size * context / one for one in (statistics.median(seconds), max(seconds), min(seconds))]
        line += f"  {name} {rates[0]:,.0f} ({rates[1]:,.0f} to {rates[2]:,.0f}) tokens/s, last loss {row['loss']:.4f}"
        line += f", MFU {share * rates[0]:.1%}" if share else ""
    if checkout:
        line += f"  ratio {ratio(rows['this loop']['seconds'], rows['nanoGPT']['seconds']):.2f}x"
    print(line, flush=True)
    return {"batch_size": batch_size, "rows": rows}


def compare_runs(text_path, checkout, recipes=RECIPES):
    """{whose: {"seconds", "val_loss", "sparsity", "tokens"}} of whole runs on a text, one after the other.

    recipes: name -> what a run of this project changes in config/shakespeare_char.py."""
    here, text = Path(__file__).parent.parent, Path(text_path).read_text()
    with tempfile.TemporaryDirectory() as folder:
        folder, found = Path(folder), {}
        prepare = ["prepare_fineweb.py", "--input", text_path, "--tokenizer", "char"]
        timed([*prepare, "--val_tokens", str(len(text) // 10), "--out_dir", folder / "data"], here)
        if checkout:
            copy = folder / "nanoGPT"
            shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "data", "out*"))
            write_nanogpt_data(text, copy / "data" / "shakespeare_char")
            seconds, output = timed(["train.py", *QUICKSTART], copy)
            loss = re.findall(r"val loss ([\d.]+)", output)[-1]
            found["nanoGPT's CPU quickstart"] = dict(seconds=seconds, val_loss=float(loss), sparsity=0.0, tokens=TOKENS)
        for name, recipe in recipes.items():
            run = folder / name.replace("/", " ")
            options = [
                "config/shakespeare_char.py",
                f"--data_dir={folder / 'data'}",
                f"--out_dir={run}",
                "--device=cpu",
            ]
            seconds, _ = timed(["train_gpt2.py", *options, *recipe], here)
            last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
            found[name] = dict(seconds=seconds, sparsity=0.0) | {
                key: last[key] for key in ("val_loss", "sparsity", "tokens") if key in last
            }
    for name, row in found.items():
        print(
            "{:28}{seconds:6.1f} s for {tokens:,} tokens, val loss {val_loss:.4f} at {sparsity:.0%}".format(name, **row)
        )
    return found


def timed(command, folder):
    """(seconds, what it printed) of a Python program, start included."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{command[0]} ended with {done.returncode}")
    return time.perf_counter() - begin, done.stdout


def write_nanogpt_data(text, folder):
    """What nanoGPT's data/shakespeare_char/prepare.py leaves: nine tenths for training, the rest for validation."""
    folder.mkdir(parents=True)
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    tokens = np.array([number[character] for character in text], dtype=np.uint16)
    tokens[: int(0.9 * len(tokens))].tofile(folder / "train.bin")
    tokens[int(0.9 * len(tokens)) :].tofile(folder / "val.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": number}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def main():
    parser = Parser(prog="python -m bench.train", description=__doc__)
    parser.add_argument("--batch_size", type=positive, default=16, help="sequences of a step")
    parser.add_argument("--vocab_size", type=positive, nargs="+", help="default: 65 50257, on a GPU 50257")
    parser.add_argument("--rounds", type=positive, default=8, help="steps of each that count")
    parser.add_argument("--shakespeare", metavar="INPUT.TXT", help="compare whole runs on this text instead")
    parser.add_argument("--to", default=RESULTS, help="folder of train/")
    args = parser.parse_args()
    here, checkout = facts(device()), os.environ.get("NANOGPT")
    require_checkout(checkout)
    path = path_of(here, "train", args.to)
    found = read(path)
    print(heading(here))
    if args.shakespeare:
        found["shakespeare"] = here | {"load": os.getloadavg()[0], "runs": compare_runs(args.shakespeare, checkout)}
        write(path, found)
        return
    for vocab_size in args.vocab_size or VOCABULARIES[device().type]:
        load = os.getloadavg()[0]
        rows = compare_steps(checkout, vocab_size, args.batch_size, args.rounds)
        write(path, found := found | {str(vocab_size): here | {"load": load} | rows})


if __name__ == "__main__":
    with one_line_errors("python -m bench.train", OSError, UnicodeDecodeError):
        main()
