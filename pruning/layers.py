"""What is prunable in a model, and where this rank's part of it lies."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor, Replicate, Shard


def is_prunable(name, module):
    """The rule: the weight of every Linear and convolution, and of transformers' Conv1D. `name` is the module's."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or is_conv1d(module)


def is_conv1d(module):
    """transformers' Conv1D, a Linear whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and getattr(module, "weight", torch.empty(0)).dim() == 2


@dataclass
class Layer:
    """One prunable weight tensor.

    parameter: as the optimizer holds it, perhaps a DTensor; shape: of the full tensor; input_dim: along which N:M
    patterns run; first: place of its first weight among all prunable ones; row: first row of the full tensor that this
    rank holds.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple
    input_dim: int
    first: int = 0
    row: int = 0

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def row_size(self):
        return math.prod(self.shape[1:])


def find_layers(model, prunable):
    """The Layers of `model` in the order of its modules; tensors shared with an embedding or found before are left out."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    layers, seen, first = [], set(embedded), 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or id(weight) in seen or not prunable(name, module):
            continue
        seen.add(id(weight))
        transposed = is_conv1d(module) or isinstance(module, nn.modules.conv._ConvTransposeNd)
        layer = Layer(clean(name) + ".weight", weight, tuple(weight.shape), 0 if transposed else 1, first)
        layers.append(layer)
        first += layer.size
    return layers


def clean(name):
    """A module's name without the marks of its wrappers (DDP, torch.compile, activation checkpointing)."""
    wrappers = ("module", "_orig_mod", "_checkpoint_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


@dataclass(frozen=True)
class Ranks:
    """How the weights lie on the ranks of `group`: each holds all of them, or (sharded) rows of its own."""

    group: object = None
    rank: int = 0
    size: int = 1
    sharded: bool = False

    def all_reduce(self, tensor):
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor):
        """[ranks, *tensor.shape]."""
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, group=self.group)
        return torch.stack(parts)


def find_ranks(layers, group):
    """The Ranks over which `layers` lie, each layer's `row` set. ValueError for placements that cannot be pruned exactly.

    Plain tensors count as replicated over `group` (default: all ranks, where torch.distributed is initialised), as under
    DDP. DTensors may be sharded along dimension 0 of one mesh dimension, as FSDP2 does, and replicated along others.
    """
    sharded = [layer for layer in layers if isinstance(layer.parameter, DTensor)]
    if not sharded:
        if not (dist.is_available() and dist.is_initialized()):
            return Ranks()
        return Ranks(group, dist.get_rank(group), dist.get_world_size(group))
    if len(sharded) < len(layers):
        plain = next(layer.name for layer in layers if layer not in sharded)
        raise ValueError(f"{plain} is a plain tensor, {sharded[0].name} a DTensor: shard all prunable layers, or none")
    mesh, placements = sharded[0].parameter.device_mesh, sharded[0].parameter.placements
    for layer in sharded:
        theirs = layer.parameter
        if theirs.device_mesh != mesh or theirs.placements != placements:
            raise ValueError(
                f"{layer.name}: placements {theirs.placements}, but {layers[0].name} has {placements}: expected the same for all"
            )
    dims = [dim for dim, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if not dims:
        return Ranks(mesh.get_group(0), mesh.get_local_rank(0), mesh.size(0))
    if len(dims) > 1 or type(placements[dims[0]]) is not Shard or placements[dims[0]].dim != 0:
        raise ValueError(
            f"{layers[0].name}: placements {placements} are not supported: expected FSDP2's, Shard(0) along one mesh dimension"
        )
    rank, size = mesh.get_local_rank(dims[0]), mesh.size(dims[0])
    for layer in sharded:
        layer.row = min(layer.shape[0], rank * -(-layer.shape[0] // size))
    return Ranks(mesh.get_group(dims[0]), rank, size, sharded=True)


def local(tensor):
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor):
    """The whole tensor, gathered from all ranks where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def keep(tensor, live):
    """Set the floating-point `tensor` to +0.0, in place, where `live` (integers 0 or 1, of its shape) is 0.

    Multiplies the bits, so that neither NaN, infinity nor a sign survives. masked_fill_ gives the same, several times
    slower on a CPU, where each weight of a random mask is a mispredicted branch.
    """
    tensor.view(BITS[tensor.element_size()]).mul_(live)


def keep_where_nonzero(tensor, weight):
    """Set `tensor` to +0.0, in place, where `weight` is zero: what the gradient of hardshrink with lambda 0 does, in one kernel."""
    torch.ops.aten.hardshrink_backward.grad_input(tensor, weight, 0.0, grad_input=tensor)


def nonzero(tensor):
    """1 where `tensor` is not zero, else 0, as integers of the same width, which `keep` is fastest with."""
    return torch.ne(tensor, 0, out=torch.empty_like(tensor, dtype=BITS[tensor.element_size()]))
