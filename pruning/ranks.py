"""How the prunable weights lie on the ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from pruning.layers import Layer


@dataclass(frozen=True)
class Ranks:
    """How the weights lie on the ranks of `group`: each holds all of them, or (sharded) rows of its own."""

    group: Any = None
    rank: int = 0
    size: int = 1
    sharded: bool = False

    @property
    def replicated(self) -> bool:
        """Whether several ranks hold all weights each."""
        return self.size > 1 and not self.sharded

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[ranks, *tensor.shape]."""
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, group=self.group)
        return torch.stack(parts)


def find_ranks(layers: Sequence[Layer], group: Any) -> Ranks:
    """The Ranks over which `layers` lie, each layer's `row` set. ValueError for placements that are not supported.

    Plain tensors count as replicated over `group` (default: all ranks, where torch.distributed is initialised), as
    under DDP. DTensors may be sharded along dimension 0 of one mesh dimension, as FSDP2 does, and replicated along
    others.
    """
    distributed = [layer for layer in layers if is_distributed(layer.parameter)]
    if not distributed:
        if not (dist.is_available() and dist.is_initialized()):
            return Ranks()
        if not (group is None or isinstance(group, dist.ProcessGroup)) or dist.get_rank(group) < 0:
            raise ValueError(f"process_group={group}: expected a group of torch.distributed that holds this rank")
        return Ranks(group, dist.get_rank(group), dist.get_world_size(group))
    if len(distributed) < len(layers):
        plain = next(layer.name for layer in layers if layer not in distributed)
        raise ValueError(
            f"{plain} is a plain tensor, {distributed[0].name} a DTensor: shard all prunable layers, or none"
        )
    return find_shards(layers)


def find_shards(layers: Sequence[Layer]) -> Ranks:
    """`find_ranks` of DTensors."""
    from torch.distributed.tensor import Replicate, Shard  # slow to import, and loaded already where there are DTensors

    mesh, placements = placed(layers[0])
    for layer in layers:
        if placed(layer) != (mesh, placements):
            raise ValueError(
                f"{layer.name}: placements {placed(layer)[1]}, but {layers[0].name} has {placements}: expected the "
                "same for all"
            )
    dims = [dim for dim, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if not dims:
        return Ranks(mesh.get_group(0), mesh.get_local_rank(0), mesh.size(0))
    if len(dims) > 1 or type(placements[dims[0]]) is not Shard or placements[dims[0]].dim != 0:
        raise ValueError(
            f"{layers[0].name}: placements {placements} are not supported: expected FSDP2's, Shard(0) along one mesh "
            "dimension"
        )
    rank, size = mesh.get_local_rank(dims[0]), mesh.size(dims[0])
    for layer in layers:
        layer.row = min(layer.shape[0], rank * -(-layer.shape[0] // size))
    return Ranks(mesh.get_group(dims[0]), rank, size, sharded=True)


def placed(layer: Layer) -> tuple[Any, Any]:
    """(mesh, placements) of a layer that is a DTensor."""
    parameter: Any = layer.parameter
    return parameter.device_mesh, parameter.placements


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules of `model` that fully_shard made FSDPModules, told without importing what defines them."""
    return [m for m in model.modules() if any(kind.__name__ == "FSDPModule" for kind in type(m).__mro__)]


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor, told without importing what defines it."""
    return hasattr(tensor, "placements")


def local(tensor: Any) -> torch.Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def part_like(whole: torch.Tensor, other: Any) -> torch.Tensor:
    """This rank's part of the tensor `whole`, which every rank has, as `other` lies on the ranks."""
    if not is_distributed(other):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return local(distribute_tensor(whole.to(local(other).device), other.device_mesh, other.placements))


def full(tensor: Any) -> torch.Tensor:
    """The whole tensor, gathered from all ranks where it is sharded."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def load_rows(layer: Layer, mine: torch.Tensor, saved: Any) -> None:
    """Copy what this rank holds of the layer from `saved`, a tensor of its full shape, perhaps sharded, to `mine`."""
    mine.copy_(full(saved)[layer.row : layer.row + mine.shape[0]])
