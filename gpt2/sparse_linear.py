"""Linear layers that read only their non-zero weights, for decoding a pruned model on a CPU.

One token at a time, a Linear takes as long as its weights take to come from memory. Two ways to store fewer bytes, both
exact: a bit a weight and the non-zero ones, or each non-zero one with its column in 16 bits (more bytes, less work a
row, so faster where few are left). A matrix without zeros, as the tied head, is read whole by the same kernels, which
keep up with the memory where torch's product does not. Which is fastest, torch's included, is measured layer by layer.
"""

import functools
import time
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from pruning.native import as_c, compiled

SOURCE = Path(__file__).with_suffix(".cpp")
WORTH_IT = 2**18  # weights of a layer, a megabyte
CLEARLY = 0.9  # of torch's time
SPARE = 16  # floats that the kernels may read behind the last weight


class SparseLinear(nn.Module):
    """A Linear for inference, float32 on a CPU: up to `rows` input rows are multiplied by its non-zero weights alone.

    More rows, as when a prompt is read, go through the dense matrix, which is kept. multiply: one that a form gave."""

    def __init__(self, linear, multiply, rows):
        super().__init__()
        self.weight, self.bias, self.multiply, self.rows = linear.weight, linear.bias, multiply, rows

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) > self.rows:
            return F.linear(x, self.weight, self.bias)
        return self.multiply(flat.contiguous()).view(*x.shape[:-1], -1)


@torch.no_grad()
def make_sparse(model, rows=1, always=False):
    """Replace, in place, a GPT's Linears by SparseLinears where that is faster for `rows` rows at a time, by more than
    such a measurement errs.

    always: also where it is not. Layers that a cache holds whole are not worth measuring, and stay as they are. Returns
    how many were replaced.
    """
    places = [
        (owner, name, linear)
        for owner in model.modules()
        for name, linear in owner.named_children()
        if isinstance(linear, nn.Linear) and (always or linear.weight.numel() >= WORTH_IT)
    ]
    linears = [linear for _, _, linear in places]
    ways = [] if always else [linears]
    for form in forms():
        of_each = [[SparseLinear(linear, multiply, rows) for multiply in form(linear)] for linear in linears]
        ways += map(list, zip(*of_each))
    seconds = [measured(way, rows) for way in ways]
    if not always:
        seconds[0] = [CLEARLY * second for second in seconds[0]]
    replaced = 0
    for i, (owner, name, linear) in enumerate(places):
        best = ways[min(range(len(ways)), key=lambda way: seconds[way][i])][i]
        setattr(owner, name, best)
        replaced += best is not linear
    return replaced


def measured(layers, rows, rounds=3):
    """Seconds that each of `layers` takes for `rows` rows, the least of `rounds`. They run one after the other, as in a
    model, so that each finds its weights in memory, not in the cache."""
    inputs = [torch.randn(rows, layer.weight.shape[1]) for layer in layers]
    least = [float("inf")] * len(layers)
    for _ in range(rounds):
        for i, (layer, x) in enumerate(zip(layers, inputs)):
            start = time.perf_counter()
            layer(x)
            least[i] = min(least[i], time.perf_counter() - start)
    return least


# ---- how the non-zero weights are stored: functions of a Linear that give some ways to multiply(x) by them ----


def forms():
    """The forms to be had on this machine: two with kernels of this project, or torch's where there is no compiler."""
    kernels = compiled(SOURCE)
    if not kernels:
        return [csr]
    by_columns = ["columns", "gathered"] if hasattr(kernels, "gathered") else ["columns"]
    return [functools.partial(stored, kernels, names) for names in (["bitmask"], by_columns)]


def stored(kernels, names, linear):
    """A multiply of each of the named kernels, which read the same form; of others for what that cannot hold: the bit
    mask for columns beyond 16 bits, the whole matrix for fewer zeros than a bit a weight costs."""
    weight = linear.weight.detach()
    height, width = weight.shape
    live = weight != 0
    if not has_zeros(live):
        names, where, values, starts = ["dense"] * len(names), None, weight.contiguous(), None
    else:
        if width > 2**16:
            names = ["bitmask"] * len(names)
        where = bits_of(live) if "bitmask" in names else live.nonzero()[:, 1].to(torch.uint16)
        values = torch.cat([weight[live], weight.new_zeros(SPARE)])
        starts = torch.zeros(height + 1, dtype=torch.int64)
        torch.cumsum(live.sum(1), 0, out=starts[1:])
    arguments = where, values, starts, linear.bias, height, width
    return [kernel_call(getattr(kernels, name), arguments) for name in names]


def bits_of(live):
    """uint8 [rows, bytes]: a bit for each of `live`, the lowest first, whole bytes a row."""
    eights = F.pad(live, (0, -live.shape[1] % 8)).view(len(live), -1, 8).to(torch.uint8)
    return (eights << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def kernel_call(kernel, arguments):
    fixed = [as_c(argument) for argument in arguments]

    def multiply(x):
        out = x.new_empty(len(x), arguments[-2])  # names the tensors of `fixed`, which live as long as this
        kernel(*fixed, as_c(x), as_c(out), as_c(len(x)))
        return out

    return multiply


def csr(linear):
    """A multiply of torch's compressed sparse rows, or of the dense matrix where there are hardly any zeros."""
    weight, bias = linear.weight.detach(), linear.bias
    if not has_zeros(weight != 0):
        return [lambda x: F.linear(x, weight, bias)]
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # "in beta state"
        matrix = weight.to_sparse_csr()

    def multiply(x):
        out = torch.stack([torch.mv(matrix, row) for row in x])
        return out if bias is None else out + bias

    return [multiply]


def has_zeros(live):
    """Whether leaving the zeros out saves more than a bit a weight, of 32."""
    return 32 * int((~live).sum()) > live.numel()
