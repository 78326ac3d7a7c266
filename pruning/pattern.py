"""N:M patterns: of every m weights along the input dimension, at most n are pruned."""

from collections.abc import Sequence

import torch

from pruning.layers import Layer
from pruning.ranks import Ranks, local


def parse_pattern(text: str) -> tuple[int, int]:
    """(n, m) of "n:m". ValueError for anything else."""
    n, colon, m = str(text).partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise ValueError(f"pattern={text!r}: expected n:m with 0 < n < m, as in 2:4")
    return int(n), int(m)


def check_pattern(
    pattern: tuple[int, int], layers: Sequence[Layer], ranks: Ranks, target: float, allocation: str
) -> None:
    """ValueError where the pattern does not fit the target, the allocation or a layer's dimensions."""
    n, m = pattern
    if target > n / m:
        raise ValueError(f"pattern='{n}:{m}' allows a sparsity of at most {n / m:g}, below target_sparsity={target}")
    if allocation not in ("global", "uniform"):
        raise ValueError(
            f"pattern='{n}:{m}' fixes the layers' sparsity: allocation={allocation} cannot be combined with it"
        )
    if unclear := [layer.name for layer in layers if not layer.input_known]:
        raise ValueError(
            f"{unclear[0]}: pattern='{n}:{m}' runs along the input dimension, and which of three or more that is, is "
            "known of convolutions alone: leave the weight out with prunable=, or the pattern away"
        )
    if unfit := [layer for layer in layers if layer.shape[layer.input_dim] % m]:
        named = ", ".join(repr(layer.name) for layer in unfit)
        raise ValueError(
            f"{unfit[0].name}: its {unfit[0].shape[unfit[0].input_dim]} inputs are not divisible by {m}, as "
            f"pattern='{n}:{m}' needs; "
            f"leave such weights out, as with prunable=lambda name, p: p.dim() >= 2 and name not in [{named}]"
        )
    for layer in layers:
        if layer.input_dim == 0 and ranks.sharded and -(-layer.shape[0] // ranks.size) % m:
            raise ValueError(
                f"{layer.name}: pattern='{n}:{m}' runs along the dimension that is sharded, in pieces not divisible "
                f"by {m}"
            )


def check_zeros(pattern: tuple[int, int], layers: Sequence[Layer], ranks: Ranks) -> None:
    """ValueError where a layer has more zeros among m weights than the pattern allows; waits for the device once."""
    if not layers:
        return
    n, m = pattern
    crowded = torch.stack([crowded_groups(local(layer.parameter), layer.input_dim, n, m) for layer in layers])
    for layer, count in zip(layers, (ranks.all_reduce(crowded) if ranks.sharded else crowded).tolist()):
        if count:
            raise ValueError(
                f"{layer.name}: more than {n} of {m} weights are zero already, in {count:,} places, which "
                f"pattern='{n}:{m}' rules out: leave the pattern away, or let them train again with keep_zeros=False"
            )


def crowded_groups(weight: torch.Tensor, dim: int, n: int, m: int) -> torch.Tensor:
    """How many groups of m weights along `dim` hold more than n zeros."""
    zeros = (weight == 0).unflatten(dim, (weight.shape[dim] // m, m))
    return (zeros.sum(dim + 1, dtype=torch.int32) > n).sum()
