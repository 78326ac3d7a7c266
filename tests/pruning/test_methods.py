"""Regrowth and straight-through, and what methods cost."""

import copy
import gc
import math

import pytest
import torch
import torch.nn.functional as F

from pruning import NotFiniteError, Pruner, Regrow, StraightThrough, memory, select
from tests.pruning.helpers import zeros_of
from tests.pruning.test_pruner import mlp, train


def run(kind, steps, criterion="magnitude", **options):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = kind(model, optimizer, criterion, 0.6, begin=5, end=45, interval=5, **options)
    sets = []
    for step in range(steps):
        train(model, optimizer, pruner, (step, step + 1))
        sets.append(zeros_of(model))
    return model, optimizer, pruner, sets


@pytest.mark.parametrize("kind", [Regrow, StraightThrough])
def test_sparsity_is_exact_at_every_step_and_sets_are_not_nested(kind):
    _, _, pruner, sets = run(kind, 60)
    for step in range(5, 46, 5):
        assert sets[step - 1].sum() == round(0.6 * (1 - (1 - step / 45) ** 3) * pruner.prunable)
    assert any((before & ~after).any() for before, after in zip(sets, sets[1:])), "nothing ever came back"
    assert (sets[44] == sets[59]).all() and sets[59].sum() == pruner.pruned


def test_regrow_grows_the_largest_gradients():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Regrow(model, optimizer, "magnitude", 0.5, "oneshot", begin=1, end=10, interval=1, drop_fraction=0.5)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=generator) for p in model.parameters()]

    def step():
        for parameter, gradient in zip(model.parameters(), gradients):
            parameter.grad = gradient.clone()
        pruner.mask_gradients()
        optimizer.step()
        pruner.step()

    step()
    before = [p.detach().clone() for p in model.parameters()]
    step()
    fraction = 0.5 * (1 + torch.cos(torch.tensor(torch.pi / 9)).item()) / 2
    for old, new, gradient in zip(before, model.parameters(), gradients):
        if old.dim() == 2:
            moving = round(fraction * int((old != 0).sum()))
            live = old.abs().flatten()
            lowest_live = torch.where(live > 0, live, torch.inf).argsort()[:moving]
            dropped = old.flatten().clone()
            dropped[lowest_live] = 0
            candidates = torch.where(dropped == 0, gradient.flatten().abs(), -1.0)
            grown = candidates.argsort(descending=True)[:moving]
            expected = dropped != 0
            expected[grown] = True
            assert torch.equal(new.flatten() != 0, expected)
            assert (new.flatten()[grown] * gradient.flatten()[grown] < 0).all() and new.flatten()[
                grown
            ].abs().max() < 1e-20


def test_without_dropping_regrow_is_the_plain_pruner_a_moment_earlier():
    model, _, _, sets = run(Regrow, 60, drop_fraction=0.0)
    assert all((after[before]).all() for before, after in zip(sets, sets[1:]))


def one_gradient(model, value=None):
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    if value is not None:
        model[2].weight.grad[0, 0] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_regrow_moves_nothing_by_gradients_that_are_not_finite(value):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Regrow(model, optimizer, "magnitude", 0.5, "linear", begin=1, end=4)
    for step in range(1, 5):
        before = zeros_of(model)
        one_gradient(model, value if step == 2 else None)
        pruner.mask_gradients()
        if step == 2:  # a loop that skips such steps, but counts them
            assert (zeros_of(model) == before).all()
        else:
            optimizer.step()
        pruner.step(step)
        assert zeros_of(model).sum() == round(0.125 * step * pruner.prunable)
        assert zeros_of(model)[before].all() == (step != 3)  # at the first and the last update nothing has to move


def test_regrow_updates_again_after_a_step_back_and_after_a_state_that_was_not_finite():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = Regrow(model, optimizer, "bitter7", 0.5, begin=3, end=3)
    train(model, optimizer, pruner, (0, 2))
    saved = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, pruner)]
    train(model, optimizer, pruner, (2, 4))
    for part, state in zip((model, optimizer, pruner), saved):
        part.load_state_dict(copy.deepcopy(state))
    assert pruner.sparsity == 0
    one_gradient(model)
    optimizer.state[model[0].weight]["exp_avg_sq"][0, 0] = math.nan
    with pytest.raises(NotFiniteError):
        pruner.mask_gradients()
    optimizer.state[model[0].weight]["exp_avg_sq"][0, 0] = 1.0
    train(model, optimizer, pruner, (2, 4))
    assert pruner.pruned == round(0.5 * pruner.prunable)


def test_regrow_without_gradients_of_pruned_weights_prunes_all_the_same():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Regrow(model, optimizer, "magnitude", 0.5, begin=2, end=2)
    for _ in range(3):
        one_gradient(model)
        optimizer.step()  # without mask_gradients
        pruner.step()
    assert pruner.sparsity == 0.5


def test_regrow_to_a_sparsity_of_zero_changes_nothing():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before, pruner = copy.deepcopy(model.state_dict()), Regrow(model, optimizer, "magnitude", 0.0, begin=1, end=9)
    for _ in range(5):
        one_gradient(model)
        pruner.mask_gradients()
        optimizer.step()
        pruner.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_straight_through_keeps_its_dense_weights_through_micro_steps(recwarn):
    """`step` may be called after every micro-step, `mask_gradients` before the optimizer's step alone."""
    models, dense = [mlp(), mlp()], []
    for model, micro_steps in zip(models, (1, 20)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = StraightThrough(model, optimizer, "magnitude", 0.5, begin=2, end=6)
        for number in range(8):
            for micro_step in range(1, micro_steps + 1):
                if micro_step == micro_steps:
                    torch.manual_seed(number)
                    one_gradient(model)
                    pruner.mask_gradients()
                    optimizer.step()
                pruner.step()
        dense.append(pruner.dense)
    assert all(torch.equal(a, b) and a.all() for a, b in zip(*dense)) and not recwarn.list


def test_straight_through_saves_no_dense_weights_for_masked_ones():
    model, _, pruner, _ = run(StraightThrough, 10)
    pruner.state_dict()
    one_gradient(model)
    pruner.mask_gradients()
    with pytest.raises(RuntimeError, match="save after step"):
        pruner.state_dict()
    pruner.step()
    pruner.state_dict()


def test_straight_throughs_own_changes_are_no_other_optimizers(recwarn):
    """`mask_gradients` may be called after every micro-step, too."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = StraightThrough(model, optimizer, "magnitude", 0.5, begin=2, end=2)
    for micro_step in range(1, 81):
        one_gradient(model)
        pruner.mask_gradients()
        if micro_step % 20 == 0:
            optimizer.step()
        pruner.step()
    assert pruner.pruned == pruner.prunable // 2 and not recwarn.list


def test_straight_through_without_mask_gradients_is_noticed():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = StraightThrough(model, optimizer, "magnitude", 0.5, begin=2, end=6)
    with pytest.raises(RuntimeError, match=r"stepped the masked weights .* before SGD.step\(\)"):
        for _ in range(4):
            one_gradient(model)
            optimizer.step()
            pruner.step()


def test_straight_through_trains_the_dense_weights_on_the_gradients_of_the_masked_ones():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = StraightThrough(model, optimizer, "magnitude", 0.5, "oneshot", begin=1, end=6, interval=5)
    dense = copy.deepcopy(model)
    masks = None
    for step in range(9):
        x, y = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)), torch.arange(8) % 4
        weights = dict(dense.named_parameters())
        seen = {
            name: (p * masks[name]).detach().requires_grad_() if masks and p.dim() == 2 else p.detach().requires_grad_()
            for name, p in weights.items()
        }
        F.cross_entropy(torch.func.functional_call(dense, seen, x), y).backward()
        F.cross_entropy(model(x), y).backward()
        pruner.mask_gradients()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        with torch.no_grad():
            for name, p in weights.items():
                p -= 0.1 * seen[name].grad
        if step in (0, 5):
            flat = torch.cat([p.detach().abs().flatten() for p in weights.values() if p.dim() == 2])
            k = flat.kthvalue(round(0.5 * flat.numel())).values
            masks = {name: p.abs() > k for name, p in weights.items() if p.dim() == 2}
        for name, p in model.named_parameters():
            assert torch.allclose(p, weights[name] * masks.get(name, 1), atol=1e-6)


@pytest.mark.parametrize("kind", [Regrow, StraightThrough])
def test_both_resume_exactly(kind):
    whole, *_ = run(kind, 50)
    model, optimizer, pruner, _ = run(kind, 23)
    fresh = mlp()
    fresh.load_state_dict(model.state_dict())
    again = torch.optim.AdamW(fresh.parameters(), lr=1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = kind(fresh, again, "magnitude", 0.6, begin=5, end=45, interval=5)
    resumed.load_state_dict(copy.deepcopy(pruner.state_dict()))
    train(fresh, again, resumed, (23, 50))
    for a, b in zip(whole.parameters(), fresh.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "kind, criterion, per_weight",
    [(Pruner, "bitter7", 0), (Pruner, "movement", 4), (Regrow, "bitter7", 0), (StraightThrough, "bitter7", 5)],
)
@pytest.mark.parametrize("optimizer", ["adamw", "amsgrad", "sgd"])
def test_the_account_is_what_is_allocated(kind, criterion, per_weight, optimizer):
    model = mlp()
    made = {
        "adamw": lambda p: torch.optim.AdamW(p),
        "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }[optimizer](model.parameters())
    pruner = kind(model, made, criterion, 0.5, begin=3, end=9)
    planned = pruner.plan(10)["memory"]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    made.step()
    measured = memory.measure(model, made, pruner)
    assert measured == planned
    assert measured["buffers"] == per_weight * pruner.prunable
    assert measured["weights"] == measured["gradients"] == 4 * sum(p.numel() for p in model.parameters())
    assert measured["total"] == sum(v for name, v in measured.items() if name != "total")
    held = [
        t for t in vars(pruner).values() for t in (t if isinstance(t, list) else [t]) if torch.is_tensor(t)
    ] + pruner.scores.initial
    assert measured["buffers"] == sum(t.nbytes for t in held)


@pytest.mark.parametrize("name", "SGD RMSprop Adagrad Adadelta Adamax Adam AdamW ASGD NAdam RAdam Rprop".split())
def test_the_account_of_every_optimizer_of_torch(name):
    model = mlp()
    options = dict(momentum=0.9, centered=True) if name == "RMSprop" else {}
    made = getattr(torch.optim, name)(model.parameters(), lr=0.1, **options)
    pruner = Pruner(model, made)
    planned = pruner.plan(10)["memory"]
    one_gradient(model)
    made.step()
    assert memory.measure(model, made, pruner) == planned


@pytest.mark.parametrize("all_given", [True, False])
def test_the_account_and_the_plan_of_a_model_that_is_partly_frozen(all_given):
    model = mlp()
    model[0].requires_grad_(False)
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad or all_given])
    pruner = Pruner(model, made, target_sparsity=0.5)
    planned = pruner.plan(2)
    model(torch.randn(2, 12)).sum().backward()
    made.step()
    assert memory.measure(model, made, pruner) == planned["memory"]
    everything = sum(p.numel() for p in model.parameters())
    assert planned["average_parameters"] == everything - pruner.prunable * 0.5 / 2


def test_the_sources_figures():
    without_gradients = lambda **options: (lambda a: a["total"] - a["gradients"])(memory.account(61_750, **options))
    assert without_gradients(method="source_movement") == 1_482_000
    assert without_gradients(method="source_mask", prunable=61_470) / 1000 == pytest.approx(801, abs=2)
    assert without_gradients(method="state") == 741_000
    with pytest.raises(ValueError, match="method='source_mvement': expected one of .*did you mean source_movement"):
        memory.account(10, method="source_mvement")
    text = memory.table({"AdamW + movement (source)": memory.account(61_750, method="source_movement")})
    assert "741 kB  3.00x" in text


def test_the_plan_says_what_then_happens():
    _, _, pruner, sets = run(Pruner, 60)
    plan = pruner.plan(60)
    assert [step for step, _ in plan["updates"]] == list(range(5, 46, 5))
    for step, sparsity in plan["updates"]:
        assert sets[step - 1].mean() == pytest.approx(sparsity, abs=1e-3)
    total = sum(p.numel() for p in pruner.scores.optimizer.param_groups[0]["params"])
    in_forward = [0, *(s.sum() for s in sets[:-1])]
    assert plan["average_parameters"] == pytest.approx(total - sum(in_forward) / 60, abs=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_regrows_lives_in_every_dtype(dtype):
    """A regrown weight is not zero: where its seed underflowed, float16 parameters ended far beyond the target."""
    model = mlp().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruner = Regrow(model, optimizer, "magnitude", 0.5, begin=1, end=30)
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        pruner.mask_gradients()
        assert zeros_of(model).sum() == round(0.5 * (1 - (1 - (step + 1) / 30) ** 3) * pruner.prunable)
        optimizer.step()
        pruner.step()


def test_regrow_keeps_the_initial_weights_that_movement_needs_once():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    before = {id(t) for t in gc.get_objects() if type(t) is torch.Tensor}
    pruner = Regrow(model, optimizer, "movement", 0.5, begin=1, end=2)
    made = [t for t in gc.get_objects() if type(t) is torch.Tensor and id(t) not in before and t.dim() > 1]
    assert sum(t.nbytes for t in made) == pruner.buffer_bytes() == 4 * pruner.prunable


def test_growth_samples_the_gradients_that_it_selects_by(monkeypatch):
    """Of a layer so large that its keys are sampled: the window that the sample gives holds what is looked for."""
    monkeypatch.setattr("pruning.scores.SAMPLED", 2000)
    monkeypatch.setattr(select, "FEW", 1)
    found = []
    monkeypatch.setattr(
        select, "search_near", lambda *args, near=select.search_near: found.append(near(*args)) or found[-1]
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(400, 200, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Regrow(model, optimizer, "magnitude", 0.5, "oneshot", begin=1, end=3, drop_fraction=0.5)
    for _ in range(3):
        model[0].weight.grad = torch.randn(200, 400)
        pruner.mask_gradients()
        optimizer.step()
        pruner.step()
    assert len(found) > 3 and all(one is not None for one in found)


def test_straight_through_keeps_what_is_done_to_its_live_weights():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = StraightThrough(model, optimizer, "magnitude", 0.5, begin=2, end=5)
    train(model, optimizer, pruner, (0, 8))
    with torch.no_grad():
        for layer in pruner.layers:
            layer.parameter.clamp_(-0.01, 0.01)
    shown = [layer.parameter.detach().clone() for layer in pruner.layers]
    pruner.mask_gradients()
    for layer, before, dense in zip(pruner.layers, shown, pruner.dense):
        assert torch.equal(layer.parameter, torch.where(before != 0, before, dense))


def test_a_pruner_that_goes_on_from_straight_through_keeps_its_zeros():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = StraightThrough(model, optimizer, "magnitude", 0.5, begin=2, end=5)
    train(model, optimizer, before, (0, 8))
    pruner = Pruner(model, optimizer, "magnitude", 0.5, begin=2, end=5)
    pruner.load_state_dict(before.state_dict())
    train(model, optimizer, pruner, (8, 20))
    assert pruner.pruned == round(0.5 * pruner.prunable)


def test_regrow_grows_on_the_device_of_its_weights():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Regrow(model, optimizer, "magnitude", 0.5, begin=1, end=3)
    with torch.device("meta"):
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            pruner.mask_gradients()
            with torch.device("cpu"):
                optimizer.step()
            pruner.step()
    assert pruner.sparsity == pytest.approx(0.5, abs=1e-3)


def test_an_update_that_is_stopped_half_way_costs_straight_through_no_dense_weight(monkeypatch):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner = StraightThrough(model, optimizer, "magnitude", 0.5, begin=1, end=3)
    train(model, optimizer, pruner, (0, 2))
    zero, dense = StraightThrough.zero, {}

    def stop(self, i, *rest):
        dense.update({j: tensor.clone() for j, tensor in enumerate(self.dense)})
        if i:
            raise KeyboardInterrupt
        zero(self, i, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StraightThrough, "zero", stop)
        train(model, optimizer, pruner, (2, 3))
    assert all(((layer.parameter != 0) == live).all() for layer, live in zip(pruner.layers, pruner.live))
    saved = copy.deepcopy(pruner.state_dict())
    assert pruner.step()  # after a micro-step, say: the update is made up for
    assert pruner.pruned == round(0.5 * pruner.prunable)
    pruner.load_state_dict(saved)
    pruner.mask_gradients()
    assert all(torch.equal(layer.parameter, dense[i]) for i, layer in enumerate(pruner.layers))


def test_a_state_with_a_live_weight_of_zero_goes_on_to_the_bit():
    def go_on(resumed):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        pruner = Pruner(model, optimizer, "magnitude", 0.5, begin=1, end=3)
        train(model, optimizer, pruner, (0, 6))
        weight = model[0].weight
        weight.data[tuple(weight.nonzero()[0])] = 0.0
        if resumed:
            saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, pruner)])
            model = mlp()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            pruner = Pruner(model, optimizer, "magnitude", 0.5, begin=1, end=3)
            for part, state in zip((model, optimizer, pruner), saved):
                part.load_state_dict(state)
        train(model, optimizer, pruner, (6, 9))
        return model

    straight, resumed = go_on(False), go_on(True)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))
