"""A rate that grows as weights thin out: whose it is, how high, and that it is gone between steps."""

import copy

import pytest
import torch
import torch.nn as nn

from pruning import DensityLR, Pruner


def pieces(groups=lambda model: model.parameters(), kind=torch.optim.AdamW, most=4.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    optimizer = kind(groups(model), lr=0.01)
    pruner = Pruner(
        model,
        optimizer,
        target_sparsity=0.9,
        begin=2,
        end=8,
        interval=2,
        prunable=lambda n, p: p.dim() > 1 and n[0] != "0",
    )
    return model, optimizer, pruner, DensityLR(pruner, optimizer, most)


def step(model, optimizer, pruner):
    model(torch.arange(8)).square().mean().backward()
    pruner.mask_gradients()
    optimizer.step()
    optimizer.zero_grad()
    pruner.step()


def rates_of_a_step(optimizer):
    """id of a parameter -> the learning rate it is stepped with, of every coming step."""
    seen = {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]})
    )
    return seen


def test_prunable_weights_alone_are_stepped_at_one_over_their_density():
    model, optimizer, pruner, density_lr = pieces()
    seen, factors = rates_of_a_step(optimizer), []
    for _ in range(10):
        density = 1 - pruner.sparsity
        assert density_lr.factor == pytest.approx(min(4.0, 1 / density))
        factors.append(density_lr.factor)
        step(model, optimizer, pruner)
        own = {id(layer.parameter) for layer in pruner.layers}
        for parameter in model.parameters():
            assert seen[id(parameter)] == pytest.approx(0.01 * (factors[-1] if id(parameter) in own else 1))
        assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    assert factors[0] == factors[1] == 1 and factors[-1] == 4.0 and factors == sorted(factors)


def test_groups_keep_their_options_and_hold_each_parameter_once():
    groups = lambda model: [
        {"params": [model[1].weight, model[1].bias], "weight_decay": 0.3},
        {"params": [model[2].weight], "weight_decay": 0.0},
        {"params": [model[2].bias, *model[0].parameters()], "weight_decay": 0.1},
    ]
    model, optimizer, pruner, _ = pieces(groups)
    found = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found) == 5
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 2, 1]
    assert (found[id(model[1].weight)], found[id(model[1].bias)], found[id(model[2].weight)]) == (0.3, 0.3, 0.0)


def test_named_parameters_keep_their_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.named_parameters())
    DensityLR(Pruner(model, optimizer, "magnitude", 0.5), optimizer)
    named = dict(model.named_parameters())
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.bias", "1.bias"],
        ["0.weight", "1.weight"],
    ]
    for group in optimizer.param_groups:
        assert all(p is named[name] for name, p in zip(group["param_names"], group["params"], strict=True))


def test_a_scheduler_and_an_error_within_a_step_see_the_rate_without_the_factor():
    model, optimizer, pruner, _ = pieces()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for number in range(1, 8):
        step(model, optimizer, pruner)
        scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01 * 0.5**number] * 2)

    def stumble():
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(stumble)
    step(model, optimizer, pruner)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01 * 0.5**7] * 2)


def test_loaded_states_go_on_at_the_same_rates():
    model, optimizer, pruner, _ = pieces()
    for _ in range(5):
        step(model, optimizer, pruner)
    again, its_optimizer, its_pruner, its_rate = pieces()
    again.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    its_pruner.load_state_dict(pruner.state_dict())
    for _ in range(5):
        step(model, optimizer, pruner)
        step(again, its_optimizer, its_pruner)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert its_rate.factor == 4.0


def test_a_factor_below_one_is_refused():
    with pytest.raises(ValueError, match="most=0.5: expected a factor of at least 1"):
        pieces(most=0.5)
