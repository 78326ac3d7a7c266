"""Zeros, which are the mask: counted, set, and brought to gradients and to copies of a model."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from pruning import kernels
from pruning.layers import Layer, clean
from pruning.ranks import full, is_distributed, local, part_like

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
EXACT = 2**18  # ones that a float32 sum counts exactly, and what fits into a CPU's cache


def live_of(tensor: torch.Tensor) -> torch.Tensor:
    """1 where `tensor` is not zero, else 0, as integers of the same width, which `zero_dead` is fastest with."""
    return torch.ne(tensor, 0, out=torch.empty_like(tensor, dtype=BITS[tensor.element_size()]))


def zero_dead(tensor: torch.Tensor, live: torch.Tensor) -> None:
    """Set the floating-point `tensor` to +0.0, in place, where `live` (0 or 1, of its shape) is 0.

    Multiplies the bits, but where `live` is of the same dtype, so that neither NaN, infinity nor a sign survives.
    masked_fill_ gives the same, several times slower on a CPU, where each weight of a random mask is a mispredicted
    branch.
    """
    if live.dtype == tensor.dtype:
        return zero_where_zero(tensor, live)
    integers = BITS[tensor.element_size()]
    tensor.view(integers).mul_(live.to(integers))


def zero_where_zero(tensor: torch.Tensor, weight: torch.Tensor) -> None:
    """Set `tensor` to +0.0, in place, where `weight` is zero, whatever was there.

    The gradient of hardshrink with lambda 0, one kernel that reads both and writes one. The torch._foreach functions
    would be fewer launches, but three times the memory traffic, and leave NaN and infinity at pruned weights.
    """
    torch.ops.aten.hardshrink_backward.grad_input(tensor, weight, 0.0, grad_input=tensor)


def zero_all_where_zero(tensors: Sequence[torch.Tensor], weight: torch.Tensor) -> None:
    """`zero_where_zero` of each of `tensors`, such as what an optimizer keeps of `weight`."""
    for tensor in tensors:
        zero_where_zero(tensor, weight)


def count_zeros(tensor: torch.Tensor) -> torch.Tensor:
    """How many elements are zero, an int64 scalar on the tensor's device.

    Without kernels by sums of float32 ones, three times as fast on a CPU as those of booleans; each of so few that it
    is exact.
    """
    if tensor.dtype == torch.float32 and kernels.usable(tensor):
        return kernels.count_zeros(tensor.detach())
    pieces = tensor.detach().flatten().split(EXACT if tensor.device.type == "cpu" else 2**24)
    ones = [torch.eq(piece, 0, out=torch.empty_like(piece, dtype=torch.float32)).sum() for piece in pieces]
    return torch.stack(ones).sum(dtype=torch.int64)


def count_all_zeros(layers: Sequence[Layer]) -> torch.Tensor:
    """int64 [layers]: how many weights of each this rank holds are zero."""
    return torch.stack([count_zeros(local(layer.parameter)) for layer in layers])


@torch.no_grad()
def zero_copy(layers: Sequence[Layer], other: nn.Module) -> None:
    """Set to zero in `other`, a copy of the layers' model, every weight that is zero in `layers`.

    ValueError, before anything changes, where `other` lacks a layer or has another shape of it. A collective where one
    of the two is sharded and the other is not, or otherwise.
    """
    theirs = {clean(name): parameter for name, parameter in other.named_parameters(remove_duplicate=False)}
    for layer in layers:
        found = theirs.get(layer.name)
        if found is None or tuple(found.shape) != layer.shape:
            has = "lacks it" if found is None else f"has it of shape {tuple(found.shape)}"
            raise ValueError(f"{layer.name}: the other model {has}, where this one has {layer.shape}")
    for layer in layers:
        copy: Any = theirs[layer.name]
        same = is_distributed(copy) and copy.placements == getattr(layer.parameter, "placements", None)
        weight = local(layer.parameter) if same else part_like(full(layer.parameter), copy)
        zero_dead(local(copy), live_of(weight).to(local(copy).device))
