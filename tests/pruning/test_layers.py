"""What cannot be pruned exactly is refused, in words that name the parameter and the way out."""

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pruning import Pruner


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def placed(*placements, names=("0.weight", "1.weight")):
    """Two Linears, the named weights of which are DTensors with `placements` on a mesh of as many dimensions."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    mesh = init_device_mesh("cpu", (1,) * len(placements))
    for name in names:
        module = model[int(name[0])]
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, placements))
    return model


def prune(model, criterion="magnitude"):
    Pruner(model, torch.optim.AdamW(model.parameters(), foreach=False), criterion, 0.5).prune_to(0.5)
    return sum(int((weight.full_tensor() == 0).sum()) for weight in (model[0].weight, model[1].weight))


@pytest.mark.parametrize("placements", [(Shard(0),), (Replicate(),), (Replicate(), Shard(0))])
def test_placements_of_fsdp2_are_pruned_exactly(placements):
    assert prune(placed(*placements)) == (8 * 6 + 6 * 4) // 2


@pytest.mark.parametrize("placements", [(Shard(1),), (Shard(0), Shard(1)), (Shard(0), Shard(0))])
def test_placements_of_tensor_parallelism_are_refused(placements):
    with pytest.raises(ValueError, match=r"0.weight: placements .* not supported: expected FSDP2's, Shard\(0\)"):
        prune(placed(*placements))


def test_a_plain_tensor_among_dtensors_is_refused():
    with pytest.raises(ValueError, match="1.weight is a plain tensor, 0.weight a DTensor"):
        prune(placed(Shard(0), names=("0.weight",)))


def test_zero_redundancy_is_refused():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW)
    with pytest.raises(ValueError, match="ZeroRedundancyOptimizer keeps each state on one rank only"):
        Pruner(model, optimizer, "bitter7", 0.5).prune_to(0.5)
