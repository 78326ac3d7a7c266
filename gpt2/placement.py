"""How a model lies on the ranks: whole on each of them (DDP), or in shards (FSDP2).

Under fsdp each rank holds, at rest, its rows of every parameter and of the optimizer's states of them: 16 bytes a
parameter (weight, gradient, two moments, in float32) divided by the number of ranks. While a block computes, its whole
weights are there too, in the dtype of the computation, and backward its whole gradients; so is what lies outside the
blocks (the embeddings, tied to the head, and the last normalisation). At the start a rank has one block, and the
embeddings, whole in host memory. For a checkpoint one tensor at a time is whole on the devices, and the main rank's
host memory takes them all. No device ever has the whole model or optimizer.
"""

from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from gpt2.compiling import backend_of
from gpt2.parallel import autocast
from pruning.ranks import is_distributed


def place(model, config, world, dtype, compiling):
    """Give a GPT made on the meta device its weights, on the devices of all ranks, before the optimizer is made.

    dtype: of the computation; compiling: whether to compile it, or "require". Returns the model as it evaluates and the
    model as it trains, both with the parameters that `model` owns: under fsdp they are DTensors.
    """
    if config.parallel == "fsdp":
        shard(model, config.seed, world, dtype, compiling)
        return model, model
    for _ in model.materialise(config.seed):
        pass
    model.to(world.device)
    compiled = torch.compile(model, backend=backend_of(compiling)) if compiling else model
    fast = data_parallel(compiled, world)
    if world.size > 2:
        lay_out_buckets(fast, (config.batch_size, config.block_size), world, dtype)
    return compiled, fast


def data_parallel(model, world):
    """The model under DDP where there are several ranks: gradients are averaged over them."""
    if world.size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        bucket_cap_mb=128,  # torch.compile cuts the model where a bucket ends: at the default of 25, a 124M into 14
        gradient_as_bucket_view=True,
    )


def lay_out_buckets(model, shape, world, dtype):
    """A micro-batch forward and backward, of which nothing stays, before the first that counts.

    DDP lays its buckets out anew after its first backward pass, and in which order more than two ranks' gradients are
    added depends on their place in a bucket. A run that is continued adds as one that was not stopped.
    """
    tokens = torch.zeros(shape, dtype=torch.int64, device=world.device)
    with autocast(world.device, dtype):
        model(tokens, tokens.clone(), False)[1].backward()  # one tensor for both would be compiled by itself
    model.zero_grad(set_to_none=True)


def shard(model, seed, world, dtype, compiling):
    """FSDP2 in place: each block is gathered when it computes and freed after.

    Blocks are compiled one by one, since hooks lie between them. In every micro-step gradients are reduced, in float32,
    and freed.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # which take a second, for other runs too

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32)
    blocks = set(model.transformer.h)
    for part in model.materialise(seed):
        if part in blocks:
            if compiling:
                part.compile(backend=backend_of(compiling))
            fully_shard(part, mesh=mesh, mp_policy=policy)
    # By default the root stays whole after a forward pass: after an evaluation its parameters were not the optimizer's.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def averaging(model, on):
    """The context of a micro-step: under DDP gradients are averaged over the ranks in the last one only."""
    return nullcontext() if on or not isinstance(model, DistributedDataParallel) else model.no_sync()


def at_rest(model):
    """Have only shards of an FSDP2 model in memory, as its parameters, wherever in a computation it was left."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # an FSDPModule, told without importing it
            module.reshard()


@torch.no_grad()
def fill(tensor, source):
    """Copy `source`, a full tensor or a slice of a file, into `tensor`; of a shard, this rank's rows alone are read."""
    if not is_distributed(tensor):
        tensor.copy_(source[...])
        return
    mine, mesh = tensor.to_local(), tensor.device_mesh
    first = min(tensor.shape[0], mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size()))
    mine.copy_(source[first : first + mine.shape[0]])
