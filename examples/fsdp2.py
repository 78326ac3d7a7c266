"""Sharded over processes with FSDP2: torchrun --nproc_per_node=2 examples/fsdp2.py

Every process holds some rows of each weight; the Pruner finds the threshold over all of them, so the set that is pruned
is that of one process, to the weight. Order matters: shard, then the optimizer, then the Pruner.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pruning import Pruner


def main(steps=200):
    """Trains in the process group that is there. Returns (sparsity, zeros among the weights of the whole model)."""
    torch.manual_seed(0)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in range(3)]
    model = torch.nn.Sequential(*blocks, torch.nn.Linear(64, 8)).to(device)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    begin, end = steps // 4, steps * 3 // 4
    pruner = Pruner(model, optimizer, "bitter7", target_sparsity=0.8, begin=begin, end=end, interval=5)
    teacher = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).to(device)
    for _ in range(steps):
        x = torch.randn(64, 64, device=device)
        torch.nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1)).backward()
        pruner.mask_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    report = pruner.report()  # every process takes part
    if dist.get_rank() == 0:
        print(report)
    weights = [p.full_tensor() for name, p in model.named_parameters() if name.endswith("weight")]
    return pruner.sparsity, sum(int((weight == 0).sum()) for weight in weights)


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    main()
    dist.destroy_process_group()
