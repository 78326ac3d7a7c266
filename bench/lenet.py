"""An epoch of MNIST, beside a plain loop: python -m bench.lenet --data-dir MNIST

Both train with AdamW on batches of 512, sliced from the same tensors in memory, on one thread; the plain one runs the network
as it is usually written. Each epoch runs in a process of its own, the two in turn; the first steps are not timed.
"""

import argparse
import multiprocessing
import platform
import statistics
import time

import torch
import torch.nn.functional as F

from lenet.data import load_digits
from lenet.model import LeNet5
from tests.lenet.plain import Plain

WARM_UP = 10


def epoch(network, data_dir, batch_size=512):
    """(seconds an epoch, mean training loss of it) of `network`, "plain" or "ours"."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = load_digits(data_dir)
    model = (Plain if network == "plain" else LeNet5)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    batches = torch.randperm(len(digits.train_labels)).split(batch_size)
    total = torch.zeros(())
    for number, batch in enumerate(batches[:WARM_UP] + batches):
        if number == WARM_UP:
            start = time.perf_counter()
            total.zero_()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return time.perf_counter() - start, total.item() / len(batches)


def main():
    parser = argparse.ArgumentParser(prog="bench.lenet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with MNIST's four IDX files; default: as lenet.train")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    results = {"plain": [], "ours": []}
    for _ in range(args.rounds):
        for network, measured in results.items():
            with multiprocessing.get_context("spawn").Pool(1) as process:
                measured.append(process.apply(epoch, (network, args.data_dir)))
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, medians of {args.rounds} epochs")
    for network, measured in results.items():
        seconds, losses = zip(*measured)
        print(f"{network:6} {statistics.median(seconds):5.2f} s  (loss {statistics.median(losses):.5f})")
    print(f"ratio  {statistics.median(a / b for (a, _), (b, _) in zip(results['plain'], results['ours'])):5.2f}x")


if __name__ == "__main__":
    main()
