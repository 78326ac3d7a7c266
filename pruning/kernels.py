"""Keys, their counting and comparing on a CPU, by kernels of this project (kernels.cpp), a pass each.

They give, to the bit, what the torch operations give that select.py has for other devices and where there is no
compiler.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from pruning.native import call, compiled, has_memory


@functools.cache
def library() -> Any:
    """The kernels, compiled once a machine; None where they cannot be."""
    kernels = compiled(Path(__file__).with_suffix(".cpp"))
    if kernels:
        kernels.window.restype = kernels.divide.restype = kernels.count_zeros.restype = ctypes.c_int64
    return kernels


def usable(*tensors: torch.Tensor) -> bool:
    """Whether the kernels can read these tensors."""
    return all(map(has_memory, tensors)) and library() is not None


def order_keys(scores: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int32 of the shape of the float32 `scores` and `weight`: select.order_keys."""
    scores = scores.contiguous()
    keys = torch.empty_like(scores, dtype=torch.int32)
    call(library().order_keys, scores, weight.contiguous(), keys, keys.numel())
    return keys


def count_buckets(key: torch.Tensor, counts: torch.Tensor) -> None:
    """Add to `counts`, int64 [BUCKETS], how many of the int32 keys are in each bucket."""
    call(library().count_buckets, key.contiguous(), counts, key.numel())


def window(key: torch.Tensor, first: int, width: int, most: torch.Tensor, worst: torch.Tensor) -> torch.Tensor:
    """int32: how far the int32 keys, of one dimension, that are in the window of `width` keys are from its `first`.
    Adds to `most`, an int64 scalar, how many are not above it, and raises `worst` to the largest magnitude of all,
    plus 1."""
    key = key.contiguous()
    inside = torch.empty_like(key)
    number = call(library().window, key, first, width, most, worst, inside, key.numel())
    return inside[:number].clone()


def count_zeros(numbers: torch.Tensor) -> torch.Tensor:
    """An int64 scalar: how many of the float32 `numbers` are zero."""
    numbers = numbers.contiguous()
    return torch.tensor(call(library().count_zeros, numbers, numbers.numel()), device=numbers.device)


def divide(scores: torch.Tensor, at: float, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """select.divide of float32 scores, where ties live."""
    scores = scores.contiguous()
    live = torch.empty_like(scores)
    ties = call(library().divide, scores, weight.contiguous(), float(at), live, live.numel())
    return live, torch.tensor(ties, device=live.device)
