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

from pruning.native import call, compiled

SOURCE = Path(__file__).with_suffix(".cpp")
WORTH_IT = 2**18  # weights of a layer, a megabyte
SPARE = 8  # floats that the kernels may read behind the last weight


class SparseLinear(nn.Module):
    """A Linear for inference, float32 on a CPU: up to `rows` input rows are multiplied by its non-zero weights alone.

    More rows, as when a prompt is read, go through the dense matrix, which is kept. multiply: what a form gave."""

    def __init__(self, linear, multiply, rows):
        super().__init__()
        self.weight, self.bias, self.multiply, self.rows = linear.weight, linear.bias, multiply, rows

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) > self.rows:
            return F.linear(x, self.weight, self.bias)
        return self.multiply(flat.contiguous(), self.bias).view(*x.shape[:-1], -1)


@torch.no_grad()
def make_sparse(model, rows=1, always=False):
    """Replace, in place, a GPT's Linears by SparseLinears where that is faster for `rows` rows at a time.

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
    ways += [[SparseLinear(linear, form(linear.weight), rows) for linear in linears] for form in forms()]
    seconds = [measured(way, rows) for way in ways]
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


# ---- how the non-zero weights are stored: functions of the weight [out, in] that give multiply(x, bias) ----


def forms():
    """The forms to be had on this machine: two with kernels of this project, or torch's where there is no compiler."""
    kernels = compiled(SOURCE)
    return [functools.partial(stored, kernels, form) for form in ("bitmask", "columns")] if kernels else [csr]


def stored(kernels, form, weight):
    """multiply of a kernel: of the named form, or of the other one for widths that it cannot hold (no multiple of 8;
    beyond 16 bits), or a dense one where there are fewer zeros than a bit a weight costs."""
    height, width = weight.shape
    live = weight != 0
    if not has_zeros(live):
        return kernel_call(kernels.dense, None, weight.detach().contiguous(), None, height, width)
    values = torch.cat([weight[live], weight.new_zeros(SPARE)])
    starts = torch.zeros(height + 1, dtype=torch.int64)
    torch.cumsum(live.sum(1), 0, out=starts[1:])
    if width % 8 or form == "columns" and width <= 2**16:
        where, stride, kernel = live.nonzero()[:, 1].to(torch.uint16), 0, kernels.columns
    else:
        bits = live.view(height, width // 8, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
        where, stride, kernel = bits.sum(-1, dtype=torch.uint8), width // 8, kernels.bitmask
    return kernel_call(kernel, where, values, starts, height, stride)


def kernel_call(kernel, where, values, starts, height, stride):
    def multiply(x, bias):
        out = x.new_empty(len(x), height)
        for row, y in zip(x, out):
            call(kernel, where, values, starts, row, bias, y, height, stride)
        return out

    return multiply


def csr(weight):
    """multiply of torch's compressed sparse rows, or of the dense matrix where there are hardly any zeros."""
    if not has_zeros(weight != 0):
        return lambda x, bias: F.linear(x, weight, bias)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # "in beta state"
        matrix = weight.to_sparse_csr()

    def multiply(x, bias):
        out = torch.stack([torch.mv(matrix, row) for row in x])
        return out if bias is None else out + bias

    return multiply


def has_zeros(live):
    """Whether leaving the zeros out saves more than a bit a weight, of 32."""
    return 32 * int((~live).sum()) > live.numel()
