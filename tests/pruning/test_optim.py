"""The source's optimizers: spikes, resets and warm-up, one at a time, and what they leave alone."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from pruning.optim import OPTIMIZERS, Spam, adamwadv, adamwprune, adamwspam, base_optimizer
from tests.pruning.helpers import zeros_of
from tests.pruning.test_pruner import batch, mlp


def run(training, model, steps):
    for step in range(*steps):
        x, y = batch(step)
        F.cross_entropy(model(x), y).backward()
        training.step()


def one_weight(**options):
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, amsgrad=True)
    optimizer.state[weight] = {
        "step": torch.tensor(5.0),
        **{name: torch.ones(4) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")},
    }
    return weight, optimizer, Spam(optimizer, **options)


def feed(spam, norms):
    for norm in norms:
        spam.before_step(torch.tensor(norm))
        spam.after_step()


def test_a_spike_resets_the_moments_once():
    weight, optimizer, spam = one_weight()
    feed(spam, [1.0] * 10)
    assert spam.spikes == 0 and optimizer.state[weight]["exp_avg"].tolist() == [1.0] * 4
    feed(spam, [50.0])
    assert spam.spikes == 1
    assert optimizer.state[weight]["exp_avg"].tolist() == [0.5] * 4
    assert optimizer.state[weight]["exp_avg_sq"].tolist() == pytest.approx([0.9] * 4)
    assert optimizer.state[weight]["max_exp_avg_sq"].tolist() == [1.0] * 4 and optimizer.state[weight]["step"] == 5
    feed(spam, [1.0] * 20)
    assert spam.spikes == 1


def test_ten_norms_are_needed_and_nan_is_none():
    _, _, spam = one_weight()
    feed(spam, [1.0] * 9 + [50.0])
    assert spam.spikes == 0
    _, _, spam = one_weight()
    feed(spam, [1.0] * 10 + [math.nan, math.inf, math.nan])
    assert spam.spikes == 0 and spam.norms[: spam.seen].tolist() == [1.0] * 10
    feed(spam, [50.0])
    assert spam.spikes == 1


def test_the_threshold_is_two_standard_deviations():
    norms = [1.0, 3.0] * 10  # mean 2, standard deviation 1
    for norm, spikes in ((3.99, 0), (4.01, 1)):
        _, _, spam = one_weight()
        feed(spam, norms)
        spam.before_step(torch.tensor(norm))
        assert spam.spikes == spikes


def test_elements_are_clipped_at_the_root_of_theta_v():
    weight, optimizer, spam = one_weight(theta=4.0)
    optimizer.state[weight]["exp_avg_sq"] = torch.tensor([1.0, 1.0, 0.25, 0.0])
    weight.grad = torch.tensor([1.5, -9.0, 9.0, 9.0])
    spam.before_step(torch.tensor(1.0))
    assert weight.grad.tolist() == [1.5, -2.0, 1.0, 9.0]


def test_the_periodic_reset_restarts_bias_correction_and_warms_up():
    weight, optimizer, spam = one_weight(interval=4, warmup_steps=3)
    rates = []
    for step in range(9):
        spam.before_step(torch.tensor(1.0))
        rates.append(optimizer.param_groups[0]["lr"] / 0.1)
        if step == 4:
            state = optimizer.state[weight]
            assert not any(state[name].any() for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"))
        spam.after_step()
        assert optimizer.param_groups[0]["lr"] == 0.1
    warm = [(1 - math.cos(math.pi * k / 3)) / 2 for k in (1, 2, 3)]
    assert rates == pytest.approx([1, 1, 1, 1, *warm, 1, warm[0]])
    assert spam.resets == 2


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
def test_the_rate_is_given_back_where_a_step_is_left_out_too(rate):
    """As by a GradScaler; and a rate that is a tensor is not changed in place."""
    weight, optimizer, spam = one_weight(interval=2, warmup_steps=4)
    optimizer.param_groups[0]["lr"], weight.grad = rate, torch.ones(4)
    shares = []
    for number in range(5):
        spam.before_step(torch.tensor(1.0))
        shares.append(float(optimizer.param_groups[0]["lr"]) / 0.1)
        if number != 3:
            optimizer.step()
            assert optimizer.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.1)
    warm = [(1 - math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 2)]
    assert shares == pytest.approx([1, 1, *warm]) and spam.steps == 4


def test_without_spikes_adamwspam_is_bitwise_adamwadv():
    models = [mlp(), mlp()]
    run(adamwadv(models[0].parameters(), 1e-2, 40), models[0], (0, 40))
    spam = adamwspam(models[1].parameters(), 1e-2, 40, z=1e9)
    run(spam, models[1], (0, 40))
    assert spam.spam.spikes == 0
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))


def test_adamwadv_is_amsgrad_with_cosine_and_clipping():
    model, twin = mlp(), mlp()
    run(adamwadv(model.parameters(), 1e-2, 30), model, (0, 30))
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.01, amsgrad=True)
    for step in range(30):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 30)) / 2
        x, y = batch(step)
        F.cross_entropy(twin(x), y).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("base", ["adamw", "adamwspam"])
def test_adamwprune_prunes_by_its_own_states_and_resumes(base):
    def fresh():
        model = mlp()
        return model, adamwprune(
            model, 1e-2, 40, base=base, variant="bitter0", target_sparsity=0.7, begin=5, end=30, interval=5
        )

    whole, training = fresh()
    run(training, whole, (0, 40))
    assert zeros_of(whole).sum() == training.pruner.pruned == round(0.7 * training.pruner.prunable)
    first, training = fresh()
    run(training, first, (0, 17))
    second, resumed = fresh()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(training.state_dict()))
    run(resumed, second, (17, 40))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters()))


def test_the_window_forgets_and_equal_norms_have_no_spike():
    _, _, spam = one_weight(window=12)
    feed(spam, [100.0] * 12 + [0.1] * 12)
    assert spam.spikes == 0 and spam.norms.tolist() == pytest.approx([0.1] * 12)
    feed(spam, [0.2])
    assert spam.spikes == 1


def test_each_optimizer_is_torchs_own():
    types = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    for name in OPTIMIZERS:
        made = base_optimizer(name, mlp().parameters(), 0.1, weight_decay=0.2, betas=(0.8, 0.9))
        assert type(made) is types.get(name, torch.optim.AdamW)
        group = made.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (0.1, 0.2)
        assert group.get("momentum") == 0.8 if name == "sgd" else group["betas"] == (0.8, 0.9)
        assert group.get("amsgrad", False) == (name in ("adamwadv", "adamwspam"))
    with pytest.raises(ValueError, match="adamwspam"):
        base_optimizer("adamax", mlp().parameters(), 0.1)


def test_an_unknown_base_is_refused():
    with pytest.raises(ValueError, match="base='sgd'"):
        adamwprune(mlp(), 1e-2, 10, base="sgd")
