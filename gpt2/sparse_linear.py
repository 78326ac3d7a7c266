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
    """A Linear for inference on a CPU: `multiply`, which one of the forms below gave, multiplies up to `rows` float32
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
    for zeros, forms in ((True, sparse_forms(kernels)), (False, whole_forms(kernels))):
        group = [place for place, has in zip(places, with_zeros) if has == zeros]
        replaced += replace(group, forms, rows, always and bool(forms))
    return replaced


def replace(places, forms, rows, always):
    """`make_sparse` of some places, (owner, name, linear), with some forms."""
    linears = [linear for _, _, linear in places]
    ways = [] if always else [linears]
    for form in forms:
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


def has_zeros(weight):
    """Whether leaving the zeros out saves more than a bit a weight, of 32."""
    return 32 * int((weight == 0).sum()) > weight.numel()


# ---- how weights are stored: functions of a Linear that give some ways to multiply(x) by them, as many for each ----


def sparse_forms(kernels):
    """Those of weights with zeros: two with kernels of this project, or torch's where there is no compiler."""
    if not kernels:
        return [csr]
    by_columns = [kernels.columns, *([kernels.gathered] if hasattr(kernels, "gathered") else [])]
    return [functools.partial(as_bits, kernels), functools.partial(as_columns, kernels, by_columns)]


def whole_forms(kernels):
    """Those of weights without zeros."""
    return [functools.partial(as_it_is, kernels)] if kernels else []


def as_it_is(kernels, linear):
    return [multiply_by(kernels.dense, linear, None, linear.weight.detach().contiguous(), None)]


def as_bits(kernels, linear):
    """A bit a weight, and the non-zero ones."""
    live = linear.weight != 0
    eights = F.pad(live, (0, -live.shape[1] % 8)).view(len(live), -1, 8).to(torch.uint8)
    bits = (eights << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return [multiply_by(kernels.bitmask, linear, bits, *non_zero(linear, live))]


def as_columns(kernels, readers, linear):
    """The non-zero weights, and of each its column in 16 bits; where these do not do, `as_bits`."""
    if linear.in_features > 2**16:
        return as_bits(kernels, linear) * len(readers)
    live = linear.weight != 0
    stored = live.nonzero()[:, 1].to(torch.uint16), *non_zero(linear, live)
    return [multiply_by(kernel, linear, *stored) for kernel in readers]


def non_zero(linear, live):
    """The weights that are live, row after row, and where in them each row begins, and the last one ends."""
    weight = linear.weight.detach()
    starts = torch.zeros(len(weight) + 1, dtype=torch.int64)
    torch.cumsum(live.sum(1), 0, out=starts[1:])
    return torch.cat([weight[live], weight.new_zeros(SPARE)]), starts


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
