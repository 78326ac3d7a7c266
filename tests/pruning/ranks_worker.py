"""Run under torchrun by test_ranks.py: prunes models under DDP or FSDP2 and writes what every rank ends with."""

import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pruning import NotFiniteError, Pruner, Regrow, StraightThrough, scores, select
from pruning.ranks import full, local
from tests.pruning.helpers import by_exp_avg, one_step, zeros_of

SHAPES = [(13, 9), (3, 40), (1, 6), (64, 8)]  # rows that neither 2, 3 nor 4 ranks divide, and fewer rows than ranks


def linears():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(columns, rows, bias=False) for rows, columns in SHAPES))


def spread(model, kind):
    """The model as `kind` distributes it."""
    if kind == "ddp":
        return DistributedDataParallel(model) if dist.get_world_size() > 1 else model
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if kind == "fsdp_mixed"
        else MixedPrecisionPolicy()
    )
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


def like(parameter, tensor):
    """`tensor` laid out as the parameter is."""
    return (
        distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
        if hasattr(parameter, "device_mesh")
        else tensor.clone()
    )


def selections(kind):
    """name -> pruned sets after two updates, for criteria, allocations, ties and caps."""
    result = {}
    for name, options in {
        "ties": dict(criterion=by_exp_avg),
        "bitter7": dict(criterion="bitter7"),
        "random": dict(criterion="random"),
        "movement": dict(criterion="movement"),
        "within": dict(criterion="variance_within"),
        "uniform": dict(criterion="bitter0", allocation="uniform"),
        "erk": dict(criterion=by_exp_avg, allocation="erk"),
        "adaptive": dict(criterion="bitter3", allocation="layer_adaptive"),
        "capped": dict(criterion=by_exp_avg, max_layer_sparsity=0.71, target_sparsity=0.7),
        "sampled": dict(criterion="bitter7"),
    }.items():
        scores.KEPT = 2**20 if name in ("bitter7", "within", "erk", "adaptive") else 0
        if name == "sampled":  # and all that follows, training included; of so few weights all may be near
            scores.SAMPLED, select.FEW = 100, 1
        model = spread(linears(), kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(1)
        pruner = Pruner(model, optimizer, **({"target_sparsity": 0.7} | options))
        for parameter, shape in zip(model.parameters(), SHAPES):
            ties = torch.randint(-2, 3, shape, generator=generator).float()
            parameter.grad = like(parameter, torch.randn(shape, generator=generator))
            optimizer.state[parameter] = {
                "step": torch.tensor(3.0),
                "exp_avg": like(parameter, ties),
                "exp_avg_sq": like(parameter, torch.rand(shape, generator=generator) * 1e-6),
            }
        optimizer.step()
        if options["criterion"] is by_exp_avg:  # ties again, after the step has moved them
            for parameter, shape in zip(model.parameters(), SHAPES):
                optimizer.state[parameter]["exp_avg"].copy_(
                    like(parameter, torch.randint(-2, 3, shape, generator=generator).float())
                )
        for sparsity in (0.3, 0.7):
            pruner.prune_to(sparsity)
            result[f"{name}_{sparsity}"] = zeros_of(model)
            assert result[f"{name}_{sparsity}"].sum() == pruner.pruned == round(sparsity * pruner.prunable)
    return result


def methods(kind):
    """name -> zeros after 12 steps on the same gradients, for the methods whose sets are not nested."""
    result = {}
    for method in (Regrow, StraightThrough):
        model, generator = spread(linears(), kind), torch.Generator().manual_seed(2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        pruner = method(model, optimizer, "magnitude", 0.6, begin=2, end=10, interval=2)
        for _ in range(12):
            for parameter, shape in zip(model.parameters(), SHAPES):
                parameter.grad = like(parameter, torch.randn(shape, generator=generator))
            pruner.mask_gradients()
            optimizer.step()
            pruner.step()
        result[method.__name__] = zeros_of(model)
        assert result[method.__name__].sum() == pruner.pruned == round(0.6 * pruner.prunable)
    return result | {"not finite": not_finite(kind), "by chance": by_chance(kind)}


def steps_on_the_same_gradients(model, optimizer, pruner, count):
    """(step, its gradients) of each, for the caller to change; then the step is taken, unless one is not finite."""
    generator = torch.Generator().manual_seed(2)
    for step in range(1, count + 1):
        gradients = [torch.randn(shape, generator=generator) for shape in SHAPES]
        yield step, gradients
        for parameter, gradient in zip(model.parameters(), gradients):
            parameter.grad = like(parameter, gradient)
        pruner.mask_gradients()
        if all(gradient.isfinite().all() for gradient in gradients):
            optimizer.step()
        pruner.step(step)


def not_finite(kind):
    """The zeros of a Regrow of which one due step has gradients that are not finite, in the rows of one rank."""
    model = spread(linears(), kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Regrow(model, optimizer, "magnitude", 0.5, "linear", begin=1, end=5)
    for step, gradients in steps_on_the_same_gradients(model, optimizer, pruner, 7):
        assert pruner.pruned == round(pruner.scheduled(step - 1) * pruner.prunable)
        if step == 3:
            gradients[3][-1] = math.nan
    return zeros_of(model)


def by_chance(kind):
    """The zeros where some weights are zero at an update, and their states are not."""
    model = spread(linears(), kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, "random", 0.5, begin=3, end=3)
    for step, _ in steps_on_the_same_gradients(model, optimizer, pruner, 9):
        if step == 3:
            local(next(model.parameters()).detach())[:, :4] = 0
            optimizer.param_groups[0]["lr"] = 0.0
        if step == 4:
            optimizer.param_groups[0]["lr"] = 1e-2
    assert zeros_of(model)[: 13 * 9].reshape(13, 9)[:, :4].all() and pruner.pruned == round(0.5 * pruner.prunable)
    return zeros_of(model)


def evaluated(kind):
    """A forward pass without a backward one leaves FSDP2's root with gathered weights: before a Pruner is made, and
    before it prunes, the next pass sees what was pruned all the same."""
    model, inputs = spread(nn.Sequential(nn.Linear(9, 13), nn.Linear(13, 5)), kind), torch.ones(3, 9)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        model(inputs)
        pruner = Pruner(model, optimizer)
        model(inputs)
        pruner.prune_to(0.9)
        seen = model(inputs)
        pruner.reshard()
        assert torch.equal(seen, model(inputs))


def copied(kind):
    """A plain model's zeros reach a sharded copy, and a state whose buffers stayed sharded is loaded again."""
    model, copy = linears(), spread(linears(), kind)
    pruner = Pruner(model, torch.optim.AdamW(model.parameters()))
    pruner.prune_to(0.7)
    pruner.apply_to(copy)
    assert (zeros_of(copy) == zeros_of(model)).all()
    for method, criterion in ((Pruner, "movement"), (StraightThrough, "magnitude")):
        optimizer = torch.optim.AdamW(copy.parameters())
        pruner = method(copy, optimizer, criterion, 0.9)
        state = pruner.state_dict(whole=False)
        wanted = {name: full(tensor).clone() for name, tensor in pruner.buffers().items()}
        again = method(copy, optimizer, criterion, 0.9)
        for tensor in again.buffers().values():
            local(tensor).zero_()
        again.load_state_dict(state)
        assert all(torch.equal(full(tensor), wanted[name]) for name, tensor in again.buffers().items())


class Conv1D(nn.Module):
    """transformers' layer of that name: a weight of [in, out], so that patterns run down the dimension that ranks share
    out."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(inputs)))


def patterned():
    """The zeros of replicas pruned 2:4 along dimension 0, whose 52 and 4 rows no number of ranks above one divides into
    whole fours."""
    model = nn.Sequential(Conv1D(52, 5), Conv1D(4, 3))
    Pruner(model, torch.optim.AdamW(model.parameters()), "magnitude", 0.4, pattern="2:4").prune_to(0.4)
    zeros = zeros_of(model)
    assert zeros[:260].reshape(13, 4, 5).sum(1).max() <= 2 and zeros[260:].reshape(1, 4, 3).sum(1).max() <= 2
    return {"zeros": zeros}


def training(kind, folder):
    """Weights after 50 steps of a pruned run whose global batch does not depend on the ranks; its state goes to disk at
    step 25."""
    torch.manual_seed(0)
    model = spread(nn.Sequential(nn.Linear(10, 33), nn.ReLU(), nn.Linear(33, 5)), kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, "bitter7", 0.6, begin=5, end=40, interval=5)
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in range(50):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(24, 10, generator=generator), torch.randint(0, 5, (24,), generator=generator)
        loss = F.cross_entropy(model(x.chunk(size)[rank]).float(), y.chunk(size)[rank])
        loss.backward()
        pruner.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        if step == 24:
            torch.save(pruner.state_dict(), folder / f"{kind}-{rank}.state")
            torch.save([full(p.detach()).clone() for p in model.parameters()], folder / f"{kind}-{rank}.weights")
    return {f"weight{i}": full(p.detach()).numpy() for i, p in enumerate(model.parameters())} | {
        "zeros": zeros_of(model)
    }


def loading(kind, folder, other):
    """The zeros after loading what a world of another size saved, and one more update."""
    model = spread(nn.Sequential(nn.Linear(10, 33), nn.ReLU(), nn.Linear(33, 5)), kind)
    pruner = Pruner(model, torch.optim.AdamW(model.parameters(), lr=1e-2), "bitter7", 0.6, begin=5, end=40, interval=5)
    with torch.no_grad():
        for parameter, saved in zip(model.parameters(), torch.load(other / f"{kind}-0.weights")):
            parameter.copy_(like(parameter, saved))
    pruner.load_state_dict(torch.load(other / f"{kind}-0.state"))
    pruned = pruner.pruned
    for _ in range(5):
        one_step(pruner)
    return {"pruned": np.array(pruned), "zeros": zeros_of(model)}


def check_that_every_rank_names(kind, tensor):
    """A NaN in one `tensor` of one layer: every rank refuses with the same line, whichever rank looked at it; nothing
    is pruned."""
    model = spread(linears(), kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter, shape in zip(model.parameters(), SHAPES):
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": like(parameter, torch.ones(shape)),
            "exp_avg_sq": like(parameter, torch.ones(shape)),
        }
    pruner, third = Pruner(model, optimizer, "bitter7", 0.5), list(model.parameters())[2]
    local(third.detach() if tensor == "weight" else optimizer.state[third][tensor])[:, 4] = (
        math.nan
    )  # on the ranks that hold rows of it
    try:
        pruner.prune_to(0.5)
    except NotFiniteError as error:
        assert str(error).startswith("2.weight: "), error
        assert pruner.pruned == 0 and not zeros_of(model).any()
    else:
        raise AssertionError(f"a NaN in {tensor} was not noticed")


def check_that_other_weights_are_noticed():
    """Ranks that train different weights by the default process group: an error on all, not other sparsities."""
    ours, its_own = linears(), linears()
    with torch.no_grad():
        for parameter in [*ours.parameters(), *its_own.parameters()]:
            parameter.mul_(1 + dist.get_rank())
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3)
    try:
        Pruner(ours, optimizer, "magnitude", 0.5, max_layer_sparsity=1.0).prune_to(0.5)
    except RuntimeError as error:
        assert "do not train the same weights" in str(error)
    else:
        raise AssertionError("replicas that are none were not noticed")
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    optimizer = torch.optim.AdamW(its_own.parameters(), lr=1e-3)
    pruner = Pruner(its_own, optimizer, "magnitude", 0.5, process_group=alone[dist.get_rank()])
    pruner.prune_to(0.5)
    assert pruner.pruned == round(0.5 * pruner.prunable)
    try:
        Pruner(its_own, optimizer, process_group=alone[dist.get_rank() - 1])
    except ValueError as error:
        assert "holds this rank" in str(error)
    else:
        raise AssertionError("another rank's group was taken")


def check_that_regrow_needs_no_gradients():
    """A layer that has a gradient on the first rank alone grows nothing, and no rank waits for another."""
    model = linears()
    for number, parameter in enumerate(model.parameters()):
        if number != 3 or dist.get_rank() == 0:
            parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Regrow(model, optimizer, "magnitude", 0.5, begin=1, end=1)
    pruner.mask_gradients()
    optimizer.step()
    assert pruner.step() and pruner.pruned == round(0.5 * pruner.prunable)


def main(kind, folder, other=None):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(folder)
    for tensor in ("weight", "exp_avg", "exp_avg_sq"):
        check_that_every_rank_names(kind, tensor)
    evaluated(kind)
    copied(kind)
    if kind == "ddp" and dist.get_world_size() > 1:
        check_that_other_weights_are_noticed()
        check_that_regrow_needs_no_gradients()
    parts = {"selections": selections(kind), "methods": methods(kind), "training": training(kind, folder)}
    if kind == "ddp":
        parts["patterned"] = patterned()
    if other:
        parts["loading"] = loading(kind, folder, Path(other))
    for name, arrays in parts.items():
        np.savez(folder / f"{name}-{kind}-{dist.get_rank()}.npz", **arrays)
    dist.barrier()
    sys.stdout.flush()
    os._exit(
        0
    )  # what is to be said is written; threads of several groups and an interpreter's end do not always part well


if __name__ == "__main__":
    main(*sys.argv[1:])
