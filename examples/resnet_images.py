"""A residual network on images, bitter7 against magnitude at 90 %, three seeds: python examples/resnet_images.py

The images are the 1,797 digits of 8 x 8 pixels that scikit-learn carries, so that no network is needed. The model is
the one of He et al. 2015 for small images (arXiv:1512.03385, section 4.2), with one block a stage.
"""

import statistics
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

from pruning import Pruner


class Block(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.first = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm_1, self.norm_2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.short = nn.Conv2d(width, out, 1, stride, bias=False) if width != out else nn.Identity()

    def forward(self, x):
        y = F.relu(self.norm_1(self.first(x)))
        return F.relu(self.short(x) + self.norm_2(self.second(y)))


def resnet(width=16, classes=10):
    stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    blocks = Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def digits():
    """(images, labels) for training and for testing, the split the same for every run."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(labels)[order]
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def train(criterion, seed, epochs, sparsity=0.9):
    """(test accuracy, model) of a network pruned to `sparsity` while it trains."""
    (images, labels), (test_images, test_labels) = digits()
    torch.manual_seed(seed)
    model, batch = resnet(), 60
    steps = epochs * len(images) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pruner = Pruner(model, optimizer, criterion, sparsity, begin=steps // 4, end=steps * 3 // 4, interval=5)
    for step in range(steps):
        first = step * batch % len(images)
        if first == 0:
            order = torch.randperm(len(images))
        chosen = order[first : first + batch]
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        pruner.mask_gradients()
        optimizer.step()
        pruner.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return (model(test_images).argmax(1) == test_labels).float().mean().item(), model


def main(epochs=20, seeds=(0, 1, 2)):
    """Prints each criterion's accuracies, and the mean difference of the seeds' pairs with its 95 % interval."""
    from scipy import stats

    found = {}
    for criterion in ("magnitude", "bitter7"):
        found[criterion] = [100 * train(criterion, seed, epochs)[0] for seed in seeds]
        each = " ".join(f"{accuracy:.2f}" for accuracy in found[criterion])
        print(f"{criterion:10} {statistics.mean(found[criterion]):6.2f} % right at 90 % sparsity: {each}", flush=True)
    differences = [ours - theirs for ours, theirs in zip(found["bitter7"], found["magnitude"])]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(seeds) ** 0.5
    half = stats.t.ppf(0.975, len(seeds) - 1) * error
    print(f"bitter7 - magnitude, by seed: {mean:+.2f} points (95 %: {mean - half:+.2f} to {mean + half:+.2f})")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
