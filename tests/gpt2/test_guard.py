"""A step whose numbers went wrong leaves weights, optimizer states and counters as they were."""

import math

import pytest
import torch

from gpt2.errors import UserError
from gpt2.guard import LEAST, Guard, tensors_of, weight_of
from pruning.optim import OPTIMIZERS, Spam, base_optimizer

BAD = (math.nan, math.inf, -math.inf)


def train(name, fused, gradients):
    """The tensors of an optimizer, and its Guard, after steps with these gradients of a weight."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 3))
    optimizer = base_optimizer(name, [{"params": [weight]}], 0.1, 0.1, (0.9, 0.95), fused)
    guard = Guard(optimizer, 0.0, 1000, weight.device)
    for gradient in gradients:
        weight.grad = gradient.clone()
        guard.step(weight.grad.norm())
    return {key[1]: tensor.clone() for key, tensor in tensors_of(optimizer).items()}, guard


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("first", [True, False])
def test_a_run_with_wrong_steps_is_bitwise_the_run_without_them(name, fused, first):
    torch.manual_seed(1)
    good = [torch.randn(5, 3) for _ in range(4)]
    wrong = [torch.randn(5, 3) for _ in BAD]
    for gradient, value in zip(wrong, BAD):
        gradient[2, 1] = value
    with_wrong = [*wrong, *good] if first else [good[0], wrong[0], good[1], wrong[1], wrong[2], *good[2:]]
    (without, _), (tensors, guard) = train(name, fused, good), train(name, fused, with_wrong)
    assert without.keys() == tensors.keys() and len(tensors) >= 2
    for key, tensor in without.items():
        assert torch.equal(tensors[key], tensor), key
    assert guard.skipped == 3 and guard.row == 0 and guard.longest == (3 if first else 2)


def guard_of(skip_outliers=0.0, max_bad_steps=3):
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    return Guard(torch.optim.SGD([weight], 0.1, fused=True), skip_outliers, max_bad_steps, weight.device)


def steps(guard, norms):
    """Whether each step of these norms was skipped."""
    before, verdicts = 0, []
    for norm in norms:
        guard.step(torch.tensor(norm))
        verdicts.append(bool(guard.skipped > before))
        before = guard.skipped.item()
    return verdicts


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("norm, skip_outliers", [(math.nan, 0.0), (50.0, 6.0)])
def test_a_wrong_step_with_a_reset_or_a_spike_changes_no_state(norm, skip_outliers, fused):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 3))
    optimizer = base_optimizer("adamwspam", [weight], 0.1, 0.1, (0.9, 0.95), fused)
    guard, spam = Guard(optimizer, skip_outliers, 1000, weight.device), Spam(optimizer, interval=LEAST + 1)
    for _ in range(LEAST + 1):
        weight.grad = torch.randn(5, 3)
        guard.step(weight.grad.norm(), spam)
    before, spikes = {key: tensor.clone() for key, tensor in tensors_of(optimizer).items()}, spam.spikes.clone()
    guard.step(torch.tensor(norm), spam)
    assert guard.skipped == 1 and spam.spikes == spikes
    for key, tensor in tensors_of(optimizer).items():
        assert torch.equal(tensor, before[key]), key[1]


def test_a_loss_that_is_not_finite_makes_the_weight_of_the_gradient_so():
    assert weight_of(torch.tensor(3.0), 8) == 1 / 8
    for value in BAD:
        assert weight_of(torch.tensor(value), 8).isnan()


def test_it_stops_after_as_many_wrong_steps_in_a_row_as_allowed_wherever_the_host_looks():
    guard, one = guard_of(), torch.tensor(1.0)
    steps(guard, [1.0, math.nan, math.nan, 1.0, math.nan])
    assert guard.read(5, one, one) == (1.0, 1.0, 3, True)
    steps(guard, [math.nan, 1.0])
    assert guard.read(7, one, one) == (1.0, 1.0, 4, False)
    steps(guard, [math.nan, math.nan, math.nan, 1.0])
    with pytest.raises(UserError, match="step 11: 3 steps in a row.*max_bad_steps=3.*learning_rate"):
        guard.read(11, one, one)


def test_outliers_are_skipped_once_enough_norms_are_known_and_the_mean_follows():
    torch.manual_seed(0)
    usual = (1 + 0.1 * torch.rand(200)).tolist()
    guard = guard_of(skip_outliers=6.0, max_bad_steps=1000)
    assert steps(guard, [9.0]) == [False], "the first norm is compared with nothing"
    guard = guard_of(skip_outliers=6.0, max_bad_steps=1000)
    assert not any(steps(guard, usual[: LEAST + 50]))
    assert steps(guard, [3.0, math.nan, 1.05, 0.1]) == [True, True, False, False], "only high norms are outliers"
    verdicts = steps(guard, [3.0] * 200)
    assert verdicts[0] and not verdicts[-1], "a level that stays becomes the usual one"
    guard = guard_of(skip_outliers=0.0)
    assert not any(steps(guard, [*usual, 1e30]))


def test_its_state_goes_on_where_it_was_saved():
    torch.manual_seed(0)
    norms = [*(1 + torch.rand(80)).tolist(), math.nan, 9.0, *(1 + torch.rand(20)).tolist(), 9.0, math.nan]
    whole, half, rest = guard_of(6.0), guard_of(6.0), guard_of(6.0)
    verdicts = steps(whole, norms)
    first = steps(half, norms[:82])
    rest.load_state_dict({name: tensor.clone() for name, tensor in half.state_dict().items()})
    assert rest.longest == rest.row == 2
    rest.skipped.zero_()
    assert first + steps(rest, norms[82:]) == verdicts and sum(verdicts) == 4
    for name, tensor in whole.state_dict().items():
        assert name == "skipped" or torch.equal(tensor, rest.state_dict()[name]), name


def test_a_stop_between_two_looks_forgets_no_row():
    stopped, continued = guard_of(), guard_of()
    steps(stopped, [math.nan, math.nan, math.nan, 1.0])
    state = {name: tensor.clone() for name, tensor in stopped.state_dict().items()}
    continued.load_state_dict(state)
    with pytest.raises(UserError, match="3 steps in a row"):
        continued.read(5, torch.tensor(1.0), torch.tensor(1.0))
    del state["longest"]  # as earlier versions wrote it
    continued.load_state_dict(state)
    assert continued.read(5, torch.tensor(1.0), torch.tensor(1.0)) == (1.0, 1.0, 3, False)
