"""Tokens per second of this loop on this machine, and beside nanoGPT's: NANOGPT=path/to/nanoGPT python -m bench.train

Both train a GPT of the same size on the same random tokens, a step of the one, a step of the other, and so on, in one
process: drift of the machine meets both alike. nanoGPT runs as its README says for a CPU (float32, no compile), with
the model and the optimizer of its own model.py; this loop as it chooses for the machine. Median of the steps after
warm-up.

--shakespeare INPUT.TXT compares whole runs instead: seconds until nanoGPT's CPU quickstart has ended, and until
config/shakespeare_char.py has, each with the validation loss it reaches.
"""

import argparse
import importlib.util
import json
import os
import pickle
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gpt2 import parallel
from gpt2.config import Config
from gpt2.model import GPT, GPTConfig
from train_gpt2 import make_optimizer

SIZE = dict(block_size=256, n_layer=6, n_head=8, n_embd=256)
QUICKSTART = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()


def ours(vocab_size, world):
    """(what this loop does in a step, how it was run)."""
    config = Config(vocab_size=vocab_size, bias=False, **SIZE)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab_size, bias=False, **SIZE)).to(world.device)
    dtype, compiling = (
        parallel.compute_dtype("auto", world.device),
        parallel.should_compile("auto", world.device, vocab_size),
    )
    fast = torch.compile(model) if compiling else model
    optimizer = make_optimizer(model, config)

    def step(inputs, targets):
        with parallel.autocast(world.device, dtype):
            _, loss = fast(inputs.to(world.device), targets.to(world.device), False)
        loss.backward()
        finish(model, optimizer)
        return loss

    return step, f"{world.device.type} {str(dtype)[6:]}{' compiled' if compiling else ''}"


def nanogpt(path, vocab_size, world):
    """What nanoGPT's train.py does in a step, with the model.py of the checkout at `path`.

    As its README says for the device: on a CPU float32 without compiling, on CUDA bfloat16 autocast and compiled. Its
    fused optimizer and TF32 are on there too; its vocabulary is then padded to a multiple of 64, as its default is."""
    theirs = load_module(Path(path) / "model.py")
    torch.manual_seed(0)
    cuda = world.device.type == "cuda"
    sizes = dict(vocab_size=vocab_size + (-vocab_size % 64 if cuda else 0), dropout=0.0, bias=False, **SIZE)
    model = theirs.GPT(theirs.GPTConfig(**sizes)).to(world.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), world.device.type)
    fast = torch.compile(model) if cuda else model

    def step(inputs, targets):
        with parallel.autocast(world.device, torch.bfloat16 if cuda else torch.float32):
            _, loss = fast(inputs.to(world.device), targets.to(world.device))
        loss.backward()
        finish(model, optimizer)
        return loss

    return step


def finish(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def load_module(path):
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def interleaved(steps, vocab_size, batch_size, rounds, warmup=2):
    """name -> median seconds of a step, the steps taken in turn on the same batches."""
    seconds = {name: [] for name in steps}
    for _ in tqdm(range(rounds + warmup), desc=f"vocabulary {vocab_size:,}", unit="round", leave=False):
        tokens = torch.randint(vocab_size, (batch_size, SIZE["block_size"] + 1))
        for name, step in steps.items():
            begin = time.perf_counter()
            step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).item()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken[warmup:]) for name, taken in seconds.items()}


def compare_steps(vocab_size, batch_size, rounds):
    world = parallel.start()
    step, how = ours(vocab_size, world)
    steps = {"this loop": step}
    if os.environ.get("NANOGPT"):
        steps["nanoGPT"] = nanogpt(os.environ["NANOGPT"], vocab_size, world)
    seconds = interleaved(steps, vocab_size, batch_size, rounds)
    rates = {name: batch_size * SIZE["block_size"] / taken for name, taken in seconds.items()}
    ratio = f"  ratio {rates['this loop'] / rates['nanoGPT']:.2f}x" if "nanoGPT" in rates else ""
    print(
        f"vocabulary {vocab_size:6,}  "
        + "  ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in rates.items())
        + f"{ratio}  ({how})",
        flush=True,
    )


def compare_runs(text_path):
    """Whole runs on TinyShakespeare, one after the other."""
    text = Path(text_path).read_text()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        here = Path(__file__).parent.parent
        quiet = dict(check=True, stdout=subprocess.PIPE, text=True)
        subprocess.run(
            [
                sys.executable,
                "prepare_fineweb.py",
                "--input",
                text_path,
                "--tokenizer",
                "char",
                "--val_tokens",
                str(len(text) // 10),
                "--out_dir",
                folder / "data",
            ],
            cwd=here,
            **quiet,
        )
        if os.environ.get("NANOGPT"):
            checkout = folder / "nanoGPT"
            shutil.copytree(os.environ["NANOGPT"], checkout, ignore=shutil.ignore_patterns(".git", "data", "out*"))
            write_nanogpt_data(text, checkout / "data" / "shakespeare_char")
            begin = time.perf_counter()
            done = subprocess.run([sys.executable, "train.py", *QUICKSTART], cwd=checkout, **quiet)
            last = [line for line in done.stdout.splitlines() if "val loss" in line][-1]
            print(f"nanoGPT's CPU quickstart   {time.perf_counter() - begin:6.1f} s   {last}", flush=True)
        begin = time.perf_counter()
        subprocess.run(
            [
                sys.executable,
                "train_gpt2.py",
                "config/shakespeare_char.py",
                f"--data_dir={folder / 'data'}",
                f"--out_dir={folder / 'run'}",
            ],
            cwd=here,
            **quiet,
        )
        seconds = time.perf_counter() - begin
        last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        print(
            f"config/shakespeare_char.py {seconds:6.1f} s   step {last['step']}: val loss "
            f"{last['val_loss']:.4f} at {last['sparsity']:.0%} sparsity"
        )


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
    parser = argparse.ArgumentParser(
        prog="python -m bench.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8, help="steps of each that count")
    parser.add_argument("--shakespeare", metavar="INPUT.TXT", help="compare whole runs on this text instead")
    args = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    if args.shakespeare:
        compare_runs(args.shakespeare)
    else:
        for vocab_size in (65, 50257):
            compare_steps(vocab_size, args.batch_size, args.rounds)


if __name__ == "__main__":
    main()
