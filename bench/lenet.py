"""An epoch of MNIST, beside a plain loop: python -m bench.lenet --data-dir MNIST

All train with AdamW on batches of 512, sliced from the same tensors in memory, on one thread: the network as it is
usually written, LeNet5, and LeNet5 under torch.compile, as lenet.train runs it from 1,000 steps on. Each epoch runs in
a process of its own, the three in turn; the first steps, in which it compiles, are not timed.
"""

import platform
import statistics
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from gpt2.errors import Parser, one_line_errors, positive
from gpt2.workers import pool
from lenet.data import load_digits
from lenet.model import LeNet5
from tests.lenet.plain import Plain

WARM_UP = 10
NETWORKS = ("plain", "LeNet5", "LeNet5, compiled")


def epoch(network, data_dir, batch_size=512):
    """(seconds an epoch, mean training loss of it) of one of NETWORKS."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = load_digits(data_dir)
    model = (Plain if network == "plain" else LeNet5)()
    forward = torch.compile(model, dynamic=False) if "compiled" in network else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    batches = torch.randperm(len(digits.train_labels)).split(batch_size)
    total = torch.zeros(())
    for number, batch in enumerate(batches[:WARM_UP] + batches):
        if number == WARM_UP:
            start = time.perf_counter()
            total.zero_()
        optimizer.zero_grad()
        logits = (forward if len(batch) == batch_size else model)(digits.train_images[batch])
        loss = F.cross_entropy(logits, digits.train_labels[batch])
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return time.perf_counter() - start, total.item() / len(batches)


def main():
    parser = Parser(prog="python -m bench.lenet", description=__doc__)
    parser.add_argument("--data-dir", help="folder with MNIST's four IDX files; default: as lenet.train")
    parser.add_argument("--rounds", type=positive, default=5, help="epochs of each")
    args = parser.parse_args()
    results = {network: [] for network in NETWORKS}
    for _ in tqdm(range(args.rounds), unit="round", disable=None):
        for network, measured in results.items():
            with pool(1) as process:
                measured.append(process.submit(epoch, network, args.data_dir).result())
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, medians of {args.rounds} epochs")
    for network, measured in results.items():
        seconds, losses = zip(*measured)
        ratio = statistics.median(plain / own for (plain, _), own in zip(results["plain"], seconds))
        print(f"{network:18}{statistics.median(seconds):6.2f} s {ratio:6.2f}x  (loss {statistics.median(losses):.5f})")


if __name__ == "__main__":
    with one_line_errors("python -m bench.lenet"):
        main()
