"""Steps are the optimizer's own, and what it owns is looked up when it is used."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F

from pruning import Pruner
from pruning.stepping import unwrapped
from tests.pruning.helpers import linears, zeros_of
from tests.pruning.test_pruner import batch, mlp


def backward(model, step, scale=1.0):
    x, y = batch(step)
    (scale * F.cross_entropy(model(x), y)).backward()


def test_micro_steps_of_accelerates_accumulation_are_no_steps():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, cpu=True)
    model = mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    pruner = Pruner(model, optimizer, target_sparsity=0.5, begin=2, end=8, interval=2)
    due = []
    for micro_step in range(1, 41):
        with accelerator.accumulate(model):
            backward(model, micro_step)
            pruner.mask_gradients()
            optimizer.step()
            optimizer.zero_grad()
            if pruner.step():
                due.append(micro_step)
    assert due == [8, 16, 24, 32] and pruner.steps == 10 and pruner.sparsity == 0.5


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_are_no_steps(fused):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    pruner = Pruner(model, optimizer, target_sparsity=0.5, begin=3, end=3)
    taken = []
    for step in range(1, 8):
        scaler.scale(F.cross_entropy(model(batch(step)[0]), batch(step)[1])).backward()
        if step in (1, 2, 5):
            model[0].weight.grad[0, 0] = torch.inf
        pruner.mask_gradients()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if pruner.step():
            taken.append(step)
    assert taken == [6] and pruner.steps == 4
    assert all(state["step"] == 4 for state in optimizer.state.values())


def test_calls_between_the_optimizers_steps_do_nothing_and_late_ones_miss_nothing():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, optimizer, target_sparsity=0.5, begin=2, end=3)
    assert not pruner.step() and not pruner.step()
    for step in range(4):  # a loop that looks at the pruner every second step
        backward(model, step)
        optimizer.step()
    assert pruner.step() and pruner.sparsity == 0.5 and not pruner.step()


def test_betas_are_those_of_the_groups_that_load_state_dict_made():
    def criterion(weight, beta1):
        seen.append(beta1)
        return weight.abs()

    seen, model = [], linears((4, 4))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    pruner = Pruner(model, optimizer, criterion)
    other = torch.optim.AdamW(model.parameters(), betas=(0.7, 0.99))
    optimizer.load_state_dict(other.state_dict())
    pruner.prune_to(0.5)
    assert set(seen) == {0.7}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_state_that_load_state_dict_replaced_is_what_is_ranked_and_zeroed(when):
    model = mlp()
    source = torch.optim.AdamW(model.parameters(), lr=1e-2)
    backward(model, 0)
    source.step()
    saved = copy.deepcopy(source.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if when == "before":
        optimizer.load_state_dict(saved)
    pruner = Pruner(model, optimizer, "bitter7")
    if when == "after":
        optimizer.load_state_dict(saved)
    pruner.prune_to(0.5)
    for layer in pruner.layers:
        for name in ("exp_avg", "exp_avg_sq"):
            assert not optimizer.state[layer.parameter][name][layer.parameter == 0].any()
    assert zeros_of(model).mean() == 0.5


class MyAdafactor(torch.optim.Adafactor):
    pass


class AdamW8bit(torch.optim.AdamW):
    pass


@pytest.mark.parametrize(
    "make, criterion, words",
    [
        (torch.optim.Adafactor, "bitter7", "needs exp_avg_sq of each weight, but Adafactor keeps sums"),
        (MyAdafactor, "variance_within", "needs exp_avg_sq of each weight, but MyAdafactor keeps sums"),
        (MyAdafactor, "bitter3", "needs exp_avg of each weight"),
        (AdamW8bit, "magnitude", "AdamW8bit keeps quantised states"),
        (lambda parameters: object(), "magnitude", "object is no torch.optim.Optimizer"),
    ],
)
def test_optimizers_that_cannot_do_are_refused_at_construction(make, criterion, words):
    model = linears((4, 4))
    with pytest.raises(ValueError, match=words):
        Pruner(model, make(model.parameters()), criterion)


@pytest.mark.parametrize(
    "dtype, options, refused",
    [
        (torch.float16, {}, True),
        (torch.float16, dict(eps=1e-4), False),
        (torch.float16, dict(fused=True), False),
        (torch.bfloat16, {}, False),
        (torch.float32, dict(eps=0.0), True),
    ],
)
def test_an_eps_that_vanishes_is_refused_where_it_would_divide_zero_by_zero(dtype, options, refused):
    model = linears((4, 4)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    if refused:
        with pytest.raises(ValueError, match="divides 0 by 0 at pruned weights: expected eps > 0"):
            Pruner(model, optimizer)
        return
    pruner = Pruner(model, optimizer, begin=1, end=1)
    for _ in range(3):
        model[0].weight.grad = torch.randn_like(model[0].weight)
        pruner.mask_gradients()
        optimizer.step()
        pruner.step()
    assert pruner.pruned == 8 and model[0].weight.isfinite().all()


def test_wrappers_are_looked_through():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    inner = torch.optim.SGD(mlp().parameters(), lr=0.1)
    assert unwrapped(Wrapper(Wrapper(inner))) is inner


def test_a_scheduler_and_a_compiled_step_are_counted_too():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, begin=2, end=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(4):
        backward(model, number)
        step()
        scheduler.step()
    assert pruner.steps == 4


class Subclass(torch.optim.AdamW):
    """Its step calls that of its base class, which runs the hooks too."""

    fails = False

    def step(self, closure=None):
        super().step(closure)
        if self.fails:
            raise RuntimeError("out of memory")


def test_a_step_inside_a_step_is_one_and_one_that_failed_is_none():
    model = mlp()
    torch.optim.AdamW(mlp().parameters())  # the base class's step has its hooks from its first instance on
    optimizer = Subclass(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, begin=100, end=100)
    for number in range(6):
        backward(model, number)
        pruner.mask_gradients()
        optimizer.fails = number == 2
        with contextlib.suppress(RuntimeError):
            optimizer.step()
            pruner.step()
    assert pruner.steps == 5


@pytest.mark.parametrize("make", [torch.optim.AdamW, Subclass])
def test_gradients_are_masked_inside_a_closure_too(make):
    def closure():
        optimizer.zero_grad()
        backward(model, 0)
        pruner.mask_gradients()
        if next(fails):
            raise RuntimeError("out of memory")
        return torch.tensor(0.0)

    model = mlp()
    optimizer = make(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, target_sparsity=0.5, begin=2, end=4)
    fails = iter((False, False, True, False, False, True, False, False))
    for _ in range(8):
        with contextlib.suppress(RuntimeError):
            optimizer.step(closure)
        pruner.step()
    assert pruner.steps == 6 and pruner.sparsity == 0.5 and pruner.came_back() == 0


@pytest.mark.parametrize("how", ["copied", "made anew", "the Pruner's own"])
def test_weights_that_another_optimizer_trains_are_noticed(how, recwarn):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, target_sparsity=0.5, begin=3, end=50)
    if how == "copied":
        model, optimizer, pruner = copy.deepcopy((model, optimizer, pruner))
    elif how == "made anew":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for micro_steps in [12] * 20 + [1] * 30:  # gradient accumulation, then none
        assert not recwarn.list or micro_steps == 1
        backward(model, 0)
        for _ in range(micro_steps - 1):
            pruner.step()
        pruner.mask_gradients()
        optimizer.step()
        pruner.step()
    warned = [str(warning.message) for warning in recwarn.list]
    assert len(warned) == (how != "the Pruner's own") and all("has taken no step" in text for text in warned)
