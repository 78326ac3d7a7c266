"""Linear layers that read only their non-zero weights, for decoding a pruned model on a CPU.

One token at a time, a Linear takes as long as its weights take to come from memory. Two ways to store fewer bytes, both
exact: a bit a weight and the non-zero ones, or each non-zero one with its column in 16 bits (more bytes, less work a
row, so faster where few are left). A matrix without zeros, as the tied head, is read whole by a kernel too, which keeps
up with the memory where torch's product does not. Which is fastest, torch's included, is measured layer by layer.
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
SPARE = 8  # floats that the kernels may read behind the last weight, as sparse_linear.cpp says


class SparseLinear(nn.Module):
    """A Linear for inference on a CPU: `multiply`, one of the ways below, multiplies up to `rows` float32
    input rows by the weights that the Linear had then.

    Other inputs, as the many rows of a prompt, go through the dense matrix, which is kept."""

    def __init__(self, linear, multiply, rows):
        super().__init__()
        self.weight, self.bias, self.multiply, self.rows = linear.weight, linear.bias, multiply, rows

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        if not 0 < len(flat) <= self.rows or x.dtype != torch.float32:
            return F.linear(x, self.weight, self.bias)
        return self.multiply(flat.contiguous()).view(*x.shape[:-1], -1)


@torch.no_grad()
def make_sparse(model, rows=1, always=False):
    """Replace, in place, a float32 GPT's Linears by SparseLinears where that is faster for `rows` rows at a time, by
    more than such a measurement errs.

    always: also where it is not. Layers that a cache holds whole are not worth measuring, and stay as they are. Returns
    how many were replaced.
    """
    places = [
        (owner, name, linear)
        for owner in model.modules()
        for name, linear in owner.named_children()
        if isinstance(linear, nn.Linear) and (always or linear.weight.numel() >= WORTH_IT)
    ]
    kernels, with_zeros = compiled(SOURCE), [has_zeros(linear.weight) for _, _, linear in places]
    replaced = 0
    for zeros, ways_of in ((True, sparse_ways(kernels)), (False, whole_ways(kernels))):
        group = [place for place, has in zip(places, with_zeros) if has == zeros]
        replaced += replace(group, ways_of, rows, always) if ways_of else 0
    return replaced


def replace(places, ways_of, rows, always):
    """`make_sparse` of some places, (owner, name, linear), by ways_of(linear)."""
    linears = [linear for _, _, linear in places]
    of_each = [[SparseLinear(linear, multiply, rows) for multiply in ways_of(linear)] for linear in linears]
    ways = [*([] if always else [linears]), *zip(*of_each)]
    seconds = [measured(way, rows) for way in ways]
    if not always:
        seconds[0] = [CLEARLY * second for second in seconds[0]]  # torch's
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


def has_zeros(weight):
    """Whether leaving the zeros out saves more than a bit a weight, of 32."""
    return 32 * int((weight == 0).sum()) > weight.numel()


# ---- how weights are stored: functions of a Linear that give ways to multiply(x) by them, as many for each Linear ----


def sparse_ways(kernels):
    """That for weights with zeros: by kernels of this project, or torch's where there is no compiler."""
    return functools.partial(by_non_zero, kernels) if kernels else csr


def whole_ways(kernels):
    """That for weights without zeros; None where there is no compiler."""
    return functools.partial(by_all, kernels) if kernels else None


def by_all(kernels, linear):
    return [multiply_by(kernels.dense, linear, None, linear.weight.detach().contiguous(), None)]


def by_non_zero(kernels, linear):
    """The weights that are not zero, with a bit for each weight, and with the column of each in 16 bits."""
    weight = linear.weight.detach()
    live = weight != 0
    starts = torch.zeros(len(weight) + 1, dtype=torch.int64)
    torch.cumsum(live.sum(1), 0, out=starts[1:])
    values = torch.cat([weight[live], weight.new_zeros(SPARE)])
    by_bits = multiply_by(kernels.bitmask, linear, bits_of(live), values, starts)
    readers = [kernels.columns, *([kernels.gathered] if hasattr(kernels, "gathered") else [])]
    if weight.shape[1] > 2**16:
        return [by_bits] * (1 + len(readers))
    columns = live.nonzero()[:, 1].to(torch.uint16)
    return [by_bits, *(multiply_by(kernel, linear, columns, values, starts) for kernel in readers)]


def bits_of(live):
    """uint8 [rows, bytes]: a bit for each of `live`, the lowest first, whole bytes a row."""
    eights = F.pad(live, (0, -live.shape[1] % 8)).view(len(live), -1, 8).to(torch.uint8)
    return (eights << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def multiply_by(kernel, linear, where, values, starts):
    """multiply(x) of a kernel, for x [rows, in], float32 and contiguous."""
    height, width = linear.weight.shape
    kept = where, values, starts, None if linear.bias is None else linear.bias.detach()
    fixed = [*map(as_c, kept), as_c(height), as_c(width)]

    def multiply(x, kept=kept):  # whose memory `fixed` names
        out = x.new_empty(len(x), height)
        kernel(*fixed, as_c(x), as_c(out), as_c(len(x)))
        return out

    return multiply


def csr(linear):
    """torch's compressed sparse rows."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # "in beta state"
        matrix = linear.weight.detach().to_sparse_csr()
    bias = linear.bias

    def multiply(x):
        out = torch.stack([torch.mv(matrix, row) for row in x])
        return out if bias is None else out + bias

    return [multiply]
