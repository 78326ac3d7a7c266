"""Zeros that are there stay there, what is said of them is counted, and their coming back is noticed."""

import copy
import json

import pytest
import torch
import torch.nn as nn

from pruning import Pruner, StraightThrough
from pruning.zeros import count_zeros
from tests.pruning.helpers import linears, zeros_of
from tests.pruning.test_pruner import OPTIMIZERS, mlp, train


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sparse(share=0.6):
    """A model of which `share` was pruned, as if read from a checkpoint."""
    model = mlp()
    Pruner(model, adamw(model)).prune_to(share)
    return model


@pytest.mark.parametrize("criterion, allocation", [("bitter7", "global"), ("movement", "uniform"), ("random", "erk")])
def test_a_pruner_goes_on_from_the_zeros_of_a_checkpoint(criterion, allocation):
    model = sparse(0.6)
    before, optimizer = zeros_of(model), adamw(model)
    pruner = Pruner(model, optimizer, criterion, 0.9, begin=10, end=20, interval=5, allocation=allocation)
    train(model, optimizer, pruner, (0, 9))
    assert (zeros_of(model) == before).all(), "zeros woke before the first update"
    train(model, optimizer, pruner, (9, 30))
    assert zeros_of(model)[before].all() and pruner.pruned == round(0.9 * pruner.prunable)


def test_a_target_of_zero_keeps_the_zeros_and_prunes_nothing():
    model = sparse(0.6)
    before, optimizer = zeros_of(model), adamw(model)
    pruner = Pruner(model, optimizer, target_sparsity=0.0)
    train(model, optimizer, pruner, (0, 30))
    assert (zeros_of(model) == before).all() and pruner.sparsity == before.mean()


def test_zeros_that_a_pattern_rules_out_are_refused():
    for sets, refused in (([[0, 1], [5, 7], [8]], False), ([[0, 1, 3], [5], []], True)):
        model = linears((4, 12), (4, 12))
        with torch.no_grad():
            for group in sets:
                model[1].weight[2, group] = 0
        optimizer, options = adamw(model), dict(target_sparsity=0.5, pattern="2:4")
        if refused:
            with pytest.raises(ValueError, match="^1.weight: more than 2 of 4 weights are zero already, in 1 places"):
                Pruner(model, optimizer, **options)
            Pruner(model, optimizer, keep_zeros=False, **options)
        else:
            Pruner(model, optimizer, **options).prune_to(0.5)
            assert ((model[1].weight == 0).unflatten(1, (3, 4)).sum(-1) == 2).all()


def test_keep_zeros_can_be_turned_off():
    model = sparse(0.6)
    optimizer = adamw(model)
    pruner = Pruner(model, optimizer, target_sparsity=0.3, begin=100, end=100, keep_zeros=False)
    train(model, optimizer, pruner, (0, 5))
    assert pruner.sparsity == zeros_of(model).mean() < 0.2


def test_a_layer_that_is_zero_altogether_is_an_initialisation():
    model = sparse(0.6)
    nn.init.zeros_(model[4].weight)
    optimizer = adamw(model)
    pruner = Pruner(model, optimizer, target_sparsity=0.95, begin=100, end=100)
    half = [(m.weight == 0).clone() for m in (model[0], model[2])]
    train(model, optimizer, pruner, (0, 5))
    assert model[4].weight.any()
    assert all(torch.equal(m.weight == 0, zero) for m, zero in zip((model[0], model[2]), half))


def test_a_layer_that_is_zero_altogether_trains_after_a_resume_too():
    model = sparse(0.6)
    nn.init.zeros_(model[4].weight)
    optimizer = adamw(model)
    state = Pruner(model, optimizer, target_sparsity=0.95, begin=100, end=100).state_dict()
    pruner = Pruner(model, optimizer, target_sparsity=0.95, begin=100, end=100)
    pruner.load_state_dict(json.loads(json.dumps(state)))
    train(model, optimizer, pruner, (0, 25))
    assert model[4].weight.all() and pruner.came_back() == 0


def test_a_state_of_earlier_versions_is_read():
    """Which did not say what is masked, nor how many zeros that makes."""
    model = sparse(0.6)
    optimizer = adamw(model)
    state = Pruner(model, optimizer, target_sparsity=0.9, begin=100, end=100).state_dict()
    pruner = Pruner(model, optimizer, target_sparsity=0.9, begin=100, end=100, keep_zeros=False)
    pruner.load_state_dict({name: value for name, value in state.items() if name not in ("claimed", "masked")})
    assert list(pruner.masked) == pruner.layers and pruner.claimed == pruner.pruned
    train(model, optimizer, pruner, (0, 12))
    assert pruner.sparsity == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("criterion, target", [("bitter7", 0.9), ("random", 0.9), ("magnitude", 0.1)])
def test_weights_that_are_zero_by_chance_stay_so_from_an_update_on(criterion, target):
    """As they happen to be in bfloat16, or where the first step's rate is zero: their states would move them."""
    model = mlp()
    optimizer = adamw(model)
    pruner = Pruner(model, optimizer, criterion, target, begin=5, end=5)
    train(model, optimizer, pruner, (0, 4))
    model[2].weight.data[:20] = 0
    train(model, optimizer, pruner, (4, 5))
    model[2].weight.data[:20] = 0
    zero = zeros_of(model)
    pruner.prune_to(target)
    train(model, optimizer, pruner, (5, 30))
    assert zeros_of(model)[zero].all() and pruner.pruned == max(round(target * pruner.prunable), zero.sum())


@pytest.mark.parametrize("states", ["there", "loaded later"])
def test_zeros_are_kept_from_the_states_that_the_optimizer_has_of_them(states):
    model = mlp()
    optimizer = adamw(model)
    train(model, optimizer, None, (0, 3))
    saved = copy.deepcopy(optimizer.state_dict())
    for layer in (model[0], model[2], model[4]):
        layer.weight.data[layer.weight.abs() < layer.weight.abs().median()] = 0
    optimizer = optimizer if states == "there" else adamw(model)
    pruner, before = Pruner(model, optimizer, target_sparsity=0.9, begin=100, end=200), zeros_of(model)
    if states == "loaded later":
        optimizer.load_state_dict(saved)
    train(model, optimizer, pruner, (3, 23))
    assert (zeros_of(model) == before).all()


def test_more_zeros_than_the_target_are_refused_when_the_pruner_is_made():
    model = sparse(0.6)
    with pytest.raises(ValueError, match=r"target_sparsity=0.5 is below the 60.03% .* keep_zeros=False"):
        Pruner(model, adamw(model), target_sparsity=0.5)
    Pruner(model, adamw(model), target_sparsity=0.5, keep_zeros=False)


def test_a_layer_sparser_than_the_cap_keeps_its_zeros():
    model = linears((10, 10), (10, 100))
    with torch.no_grad():
        model[0].weight.flatten()[1:] = 0
    pruner = Pruner(model, adamw(model), target_sparsity=0.5, max_layer_sparsity=0.9)
    pruner.prune_to(0.5)
    assert pruner.zeros() == [99, 451] and pruner.pruned == 550


@pytest.mark.parametrize("steps", [23, 50])
def test_resuming_may_raise_the_target_while_updates_are_left(steps):
    def fresh(target, end):
        model = mlp()
        optimizer = adamw(model)
        return model, optimizer, Pruner(model, optimizer, "bitter7", target, begin=5, end=end, interval=5)

    first = fresh(0.8, 45)
    train(*first, (0, steps))
    state = json.loads(json.dumps(first[2].state_dict()))
    second = fresh(0.9, 80)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    second[2].load_state_dict(state)
    before = zeros_of(second[0])
    train(*second, (steps, 90))
    assert zeros_of(second[0])[before].all() and second[2].pruned == round(0.9 * second[2].prunable)


@pytest.mark.parametrize(
    "target, end, words",
    [
        (0.5, 80, r"60.03% is pruned already, and stays so"),
        (0.9, 20, "step 30 is done and no update comes after end=20"),
    ],
)
def test_resuming_refuses_a_target_that_cannot_be(target, end, words):
    model = mlp()
    optimizer = adamw(model)
    pruner = Pruner(model, optimizer, target_sparsity=0.6, begin=5, end=20, interval=5)
    train(model, optimizer, pruner, (0, 30))
    other = Pruner(model, optimizer, target_sparsity=target, begin=5, end=end, interval=5, keep_zeros=False)
    with pytest.raises(ValueError, match=rf"target_sparsity=0.6, this Pruner has {target}: {words}") as refused:
        other.load_state_dict(pruner.state_dict())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(end=20), r"target_sparsity=0.6 cannot be reached: .*% is pruned: step 30 is done .* after end=20"),
        (dict(end=20, prunable=None), "is pruned: step 30 is done and no update comes after end=20"),
    ],
)
def test_resuming_refuses_what_leaves_no_update_to_reach_the_target(changes, words):
    model = mlp()
    optimizer = adamw(model)
    options = dict(target_sparsity=0.6, begin=5, interval=5, prunable=lambda name, parameter: name == "0.weight")
    pruner = Pruner(model, optimizer, **options, end=20 if "prunable" in changes else 60)
    train(model, optimizer, pruner, (0, 30))
    with pytest.raises(ValueError, match=words):
        Pruner(model, optimizer, **(options | changes)).load_state_dict(pruner.state_dict())


def test_a_run_resumes_though_weights_have_met_zero_since_its_last_update():
    def fresh():
        model = mlp()
        optimizer = adamw(model)
        return model, optimizer, Pruner(model, optimizer, target_sparsity=0.6, begin=5, end=20, interval=5)

    model, optimizer, pruner = fresh()
    train(model, optimizer, pruner, (0, 25))
    with torch.no_grad():
        model[0].weight[0, model[0].weight[0].abs().argmax()] = 0
    before, state = zeros_of(model), pruner.state_dict()
    assert before.sum() == round(0.6 * pruner.prunable) + 1
    other = fresh()
    other[0].load_state_dict(model.state_dict())
    resumed = Pruner(other[0], other[1], target_sparsity=0.6, begin=5, end=20, interval=5)  # made once it is loaded
    resumed.load_state_dict(state)
    train(other[0], other[1], resumed, (25, 40))
    assert zeros_of(other[0])[before].all()


def test_sparsity_is_counted_whatever_happened_to_the_weights():
    model = mlp()
    dense, optimizer = copy.deepcopy(model.state_dict()), adamw(model)
    pruner = Pruner(model, optimizer, target_sparsity=0.5)
    train(model, optimizer, pruner, (0, 1))
    assert pruner.sparsity == pruner.log()["pruning/sparsity"] == 0.5
    model.load_state_dict(dense)  # as a loop does that puts its best model back
    assert pruner.sparsity == pruner.log()["pruning/sparsity"] == 0.0
    assert set(pruner.layer_sparsity().values()) == {0.0}
    assert "768 of 768 pruned weights" in pruner.report().splitlines()[-1]
    assert pruner.report().splitlines()[4].split()[2] == "0"
    with pytest.raises(RuntimeError, match="768 of 768 pruned weights are not zero any more"):
        pruner.state_dict()


class Decaying(torch.optim.AdamW):
    """An optimizer by no known name that moves weights without gradient and states."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter += 1e-3 * torch.ones_like(parameter)


class Wrapped:
    """What hides an optimizer from `type(...)`."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


@pytest.mark.parametrize("interval", [1, 20])
@pytest.mark.parametrize("culprit", ["no mask_gradients", "optimizer", "wrapped optimizer"])
def test_weights_that_come_back_after_the_end_are_noticed_at_an_interval(culprit, interval):
    model = mlp()
    kind = torch.optim.AdamW if culprit == "no mask_gradients" else Decaying
    inner = kind(model.parameters(), lr=1e-2)
    optimizer = Wrapped(inner) if culprit == "wrapped optimizer" else inner
    pruner = Pruner(model, optimizer, target_sparsity=0.5, begin=3, end=3, interval=interval)
    train(model, inner, pruner, (0, 3))
    assert pruner.sparsity == 0.5
    with pytest.raises(RuntimeError, match="pruned weights are not zero any more"):
        for step in range(3, 3 + max(interval, 10)):
            train(model, inner, None if culprit == "no mask_gradients" else pruner, (step, step + 1))
            pruner.step()


def test_kept_zeros_that_come_back_before_the_first_update_are_noticed():
    model = sparse(0.6)
    optimizer = adamw(model)
    pruner = Pruner(model, optimizer, target_sparsity=0.9, begin=100, end=200)
    train(model, optimizer, None, (0, 2))
    with pytest.raises(RuntimeError, match="pruned weights are not zero any more"):
        pruner.state_dict()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_wakes_kept_zeros(name):
    model = sparse(0.6)
    before, optimizer = zeros_of(model), OPTIMIZERS[name](model.parameters())
    train(model, optimizer, Pruner(model, optimizer, target_sparsity=0.7, begin=200, end=200), (0, 60))
    assert (zeros_of(model) == before).all()


def test_straight_through_shows_the_zeros_it_started_with():
    model = sparse(0.6)
    before, optimizer = zeros_of(model), adamw(model)
    pruner = StraightThrough(model, optimizer, target_sparsity=0.6, begin=10, end=10)
    train(model, optimizer, pruner, (0, 9))
    assert (zeros_of(model) == before).all()
    train(model, optimizer, pruner, (9, 12))
    assert pruner.sparsity == pytest.approx(0.6, abs=1e-3) and (zeros_of(model) != before).any()


def test_straight_through_never_shows_less_zeros_than_before():
    model = sparse(0.6)
    optimizer = adamw(model)
    pruner = StraightThrough(model, optimizer, target_sparsity=0.9, begin=3, end=30, interval=3)
    shown = []
    for step in range(32):
        train(model, optimizer, pruner, (step, step + 1))
        shown.append(pruner.sparsity)
    assert shown == sorted(shown) and shown[0] == shown[5] == pytest.approx(0.6, abs=1e-3) and shown[-1] > 0.899


def test_straight_through_keeps_a_mask_that_was_asked_for_by_hand():
    model = mlp()
    optimizer = adamw(model)
    pruner = StraightThrough(model, optimizer, target_sparsity=0.9, begin=100, end=100)
    train(model, optimizer, pruner, (0, 2))
    pruner.prune_to(0.5)
    zero = zeros_of(model)
    train(model, optimizer, pruner, (2, 6))
    assert zero.sum() == pruner.pruned == 768 and (zeros_of(model) == zero).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_copy_is_brought_in_line(dtype, wrapped):
    model = mlp()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = adamw(model)
    pruner = Pruner(model, optimizer, target_sparsity=0.7, begin=2, end=20)
    for step in range(25):
        train(model, optimizer, pruner, (step, step + 1))
        average.update_parameters(model)
    other = (average if wrapped else average.module).to(dtype)
    assert zeros_of(average.module).sum() == 0
    biases = [m.bias.clone() for m in average.module if isinstance(m, nn.Linear)]
    pruner.apply_to(other)
    assert (zeros_of(average.module) == zeros_of(model)).all()
    assert all(torch.equal(m.bias, b) for m, b in zip((m for m in average.module if isinstance(m, nn.Linear)), biases))


class Dtypes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the dtypes of all that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        self.seen |= {tensor.dtype for tensor in tensors if torch.is_tensor(tensor)}
        return result


@pytest.mark.parametrize("criterion", ["bitter7", "movement", "random"])
def test_pruning_float32_computes_nothing_in_float64(criterion):
    """Which MPS lacks."""
    model = mlp()
    optimizer = adamw(model)
    train(model, optimizer, None, (0, 1))
    with Dtypes() as dtypes:
        pruner = Pruner(model, optimizer, criterion)
        pruner.prune_to(0.5)
        pruner.mask_gradients()
        pruner.report()
    assert torch.float32 in dtypes.seen and torch.float64 not in dtypes.seen


def test_a_copy_of_another_model_is_refused_and_left_as_it_is():
    model = sparse(0.6)
    pruner = Pruner(model, adamw(model), target_sparsity=0.7)
    other = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 31))
    with pytest.raises(ValueError, match=r"2.weight: the other model has it of shape \(31, 32\).*\(32, 32\)"):
        pruner.apply_to(other)
    with pytest.raises(ValueError, match="2.weight: the other model lacks it"):
        pruner.apply_to(nn.Sequential(other[0]))
    assert other[0].weight.all()


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (513, 1025), (2, 3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("kernel", [True, False])
def test_zeros_are_counted_exactly(shape, dtype, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr("pruning.kernels.library", lambda: None)
    tensor = torch.randint(0, 3, shape).to(dtype) * torch.randint(0, 2, shape).sub(0.5).sign().to(dtype)
    assert count_zeros(tensor).item() == (tensor == 0).sum().item()
    assert count_zeros(tensor.transpose(0, 1)).item() == (tensor == 0).sum().item()
