"""Speed of prepare_fineweb.py beside the tokenizer alone, and of the loader.

    python -m bench.prepare --input FILE.parquet ...

On the same text (the files, --repeat times over, so that the half second in which interpreters start weighs as little
as it does in practice), in turn, --rounds times: tiktoken's encode_ordinary in a plain loop over documents that lie
decoded in memory; and the whole command, from its start to its last shard, with one worker and with two. Then the
loader, on the shards it wrote. Medians of rates and, round by round, of ratios; memory is the highest resident set of
the command's process and of its largest worker.
"""

import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from bench.machine import peak_of
from gpt2 import tokenizer
from gpt2.errors import Parser, UserError, one_line_errors, positive
from gpt2.inputs import readable
from gpt2.shards import find_shards, read_meta


def write_repeated(files, times, path):
    """One parquet file, with row groups of 1,000 documents, that holds the files' texts `times` times."""
    import pyarrow.parquet

    with readable(", ".join(files)):
        table = pyarrow.concat_tables([pyarrow.parquet.read_table(file, columns=["text"]) for file in files])
    pyarrow.parquet.write_table(pyarrow.concat_tables([table] * times), path, row_group_size=1000)


def tokenizer_alone(path):
    """Tokens a second of tiktoken's own loop."""
    import pyarrow.parquet

    texts = pyarrow.parquet.read_table(path, columns=["text"]).column(0).to_pylist()
    encode = tokenizer.gpt2_encoding().encode_ordinary
    encode("the first call builds tables")
    start = time.perf_counter()
    count = sum(len(encode(text)) for text in texts)
    return count / (time.perf_counter() - start)


def whole_command(path, workers, out_dir):
    """(tokens a second, peak of the process and of its largest worker in MB) of prepare_fineweb.py."""
    shutil.rmtree(out_dir, ignore_errors=True)
    command = [
        sys.executable,
        "prepare_fineweb.py",
        "--input",
        path,
        "--out_dir",
        out_dir,
        "--val_tokens",
        "1_000_000",
        "--workers",
        str(workers),
    ]
    start, said = time.perf_counter(), tempfile.TemporaryFile("w+")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
    peaks = {}
    while process.poll() is None:
        for pid in (str(process.pid), *children_of(process.pid)):
            peaks[pid] = peak_of(pid) or peaks.get(pid, 0)
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    if process.returncode:
        said.seek(0)
        raise UserError(said.read().strip().rpartition("\n")[2])
    tokens = sum(shard["tokens"] for shard in read_meta(out_dir)["shards"])
    own = peaks.pop(str(process.pid))
    return tokens / seconds, own / 1e6, max(peaks.values()) / 1e6


def children_of(pid):
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def loader(out_dir, block_size, batch_size, batches=2000):
    """Tokens a second of reading shuffled micro-batches in one process."""
    import torch

    from gpt2.data import TrainingBatches, Windows

    config = SimpleNamespace(batch_size=batch_size, gradient_accumulation_steps=1, seed=1)
    windows = Windows(find_shards(out_dir, "train"), block_size, 50257)
    stream = TrainingBatches(windows, config, SimpleNamespace(rank=0, size=1, device=torch.device("cpu"))).from_step(1)
    next(stream)
    start = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return batches * batch_size * block_size / (time.perf_counter() - start)


def main():
    parser = Parser(prog="python -m bench.prepare", description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="parquet files with a column text")
    parser.add_argument("--repeat", type=positive, default=4, help="times the text is taken")
    parser.add_argument("--rounds", type=positive, default=3, help="times each is measured")
    args = parser.parse_args()
    results = {"alone": [], 1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        out_dir = f"{folder}/shards"
        text = f"{folder}/text.parquet"
        write_repeated(args.input, args.repeat, text)
        for _ in tqdm(range(args.rounds), unit="round", disable=None):
            for workers in (1, 2):
                results[workers].append(whole_command(text, workers, out_dir))
            results["alone"].append(tokenizer_alone(text))
        alone = statistics.median(results["alone"])
        ratios = {
            workers: statistics.median(rate / base for (rate, *_), base in zip(results[workers], results["alone"]))
            for workers in (1, 2)
        }
        print(
            f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}, "
            f"{args.rounds} rounds, medians"
        )
        print(f"tiktoken's encode_ordinary, alone   {alone:12,.0f} tokens/s")
        for workers in (1, 2):
            rate, own, worker = (statistics.median(column) for column in zip(*results[workers]))
            name = f"prepare_fineweb.py, {workers} worker{'s' * (workers > 1)}"
            print(
                f"{name:36}{rate:12,.0f} tokens/s  {ratios[workers]:5.2f} of it   "
                f"{own:.0f} MB, a worker {worker:.0f} MB"
            )
        gain = statistics.median(two / one for (one, *_), (two, *_) in zip(results[1], results[2]))
        print(f"{'two workers against one':36}{gain:12.2f}x")
        for block_size, batch_size in ((128, 32), (1024, 16)):
            name = f"loader, {batch_size:2} x {block_size:4}"
            print(f"{name:36}{loader(out_dir, block_size, batch_size):12,.0f} tokens/s")


if __name__ == "__main__":
    with one_line_errors("python -m bench.prepare"):
        main()
