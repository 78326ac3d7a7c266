"""Each formula against a reference written here from the source's table, and what the repaired forms promise."""

import functools
import inspect
import math

import numpy as np
import pytest
import torch

from pruning import Pruner
from pruning.criteria import CRITERIA
from tests.pruning.helpers import adam_with, linears, zeros_of

E = 1e-8
REFERENCE = {
    "magnitude": lambda w, m, v, t, w0: abs(w),
    "bitter0": lambda w, m, v, t, w0: abs(w * m) * abs(w) / (v**0.5 + E),
    "bitter1": lambda w, m, v, t, w0: abs(w),
    "bitter2": lambda w, m, v, t, w0: abs(w),
    "bitter3": lambda w, m, v, t, w0: abs(w) * (abs(m) + E) ** 0.5,
    "bitter4": lambda w, m, v, t, w0: abs(w) * (abs(m) + E) ** 0.5,
    "bitter5": lambda w, m, v, t, w0: np.sign(w) * m / (v**0.5 + E) + 0.1 * abs(w),
    "bitter6": lambda w, m, v, t, w0: abs(w) * (abs(m) + E) ** 0.5 * (m**2 / (v + E)) ** 0.5,
    "bitter7": lambda w, m, v, t, w0: abs(w) * (abs(v) + E) ** 0.25,
    "bitter8": lambda w, m, v, t, w0: abs(w) * (abs(m / (1 - 0.9**t + E)) + E) ** 0.5,
    "bitter9": lambda w, m, v, t, w0: abs(w) * (abs(m) + E) ** 0.5 + 0.1 * np.sign(w) * m / (v**0.5 + E),
    "bitter5_turned": lambda w, m, v, t, w0: -np.sign(w) * m / (v**0.5 + E) + 0.1 * abs(w),
    "bitter9_turned": lambda w, m, v, t, w0: abs(w) * (abs(m) + E) ** 0.5 - 0.1 * np.sign(w) * m / (v**0.5 + E),
    "movement": lambda w, m, v, t, w0: w * (w - w0),
    "variance_quarter": lambda w, m, v, t, w0: abs(w) * v**0.25,
    "variance_half": lambda w, m, v, t, w0: abs(w) * v**0.5,
    "variance_within": lambda w, m, v, t, w0: abs(w) * (v / v.mean()) ** 0.25,
}


def tensors():
    """Random weights, moments and initial weights, with zeros, denormals and huge values among them."""
    generator = torch.Generator().manual_seed(0)
    w, m, w0 = (torch.randn(2000, generator=generator) for _ in range(3))
    v = torch.rand(2000, generator=generator) * 10 ** (torch.rand(2000, generator=generator) * 20 - 18)
    for tensor in (w, m, v, w0):
        tensor[torch.randint(2000, (60,), generator=generator)] = 0.0
        tensor[torch.randint(2000, (60,), generator=generator)] = 1e-42
        tensor[torch.randint(2000, (60,), generator=generator)] = 1e6
    return w, m, v, w0


def test_every_criterion_has_a_reference():
    assert set(REFERENCE) | {"random"} == set(CRITERIA)


@pytest.mark.parametrize("name", REFERENCE)
def test_formula(name):
    w, m, v, w0 = tensors()
    available = dict(
        weight=w,
        exp_avg=m,
        exp_avg_sq=v,
        initial_weight=w0,
        step=7,
        beta1=0.9,
        mean_exp_avg_sq=v.double().mean().float(),
    )
    ours = (
        CRITERIA[name](**{need: available[need] for need in inspect.signature(CRITERIA[name]).parameters})
        .double()
        .numpy()
    )
    reference = REFERENCE[name](*(t.double().numpy() for t in (w, m, v)), 7, w0.double().numpy())
    scale = abs(reference) + (
        abs(w.double().numpy()) + abs(m.double().numpy() / (v.double().numpy() ** 0.5 + E))
        if "5" in name or "9" in name
        else 0
    )
    underflow = 1e-30 + (
        1e-10 * abs(w.double().numpy()) if name == "variance_within" else 0
    )  # a denormal v over a mean of thousands
    assert (abs(ours - reference) <= 2e-6 * scale + underflow).all()


def test_step_and_beta_come_from_the_optimizer():
    model = linears((1, 50))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.99), lr=0.0)
    for _ in range(3):
        model[0].weight.grad = torch.randn(1, 50)
        optimizer.step()
    seen = {}

    def look(weight, step, beta1):
        seen.update(step=float(step), beta1=beta1)
        return weight.abs()

    Pruner(model, optimizer, look).prune_to(0.5)
    assert seen == {"step": 3.0, "beta1": 0.8}


def pruned_by(criterion, scale=1.0, **options):
    torch.manual_seed(3)
    shapes = [(20, 30), (30, 10)]
    model = linears(*shapes)
    v = [torch.rand(s) * 1e-9 * scale**2 for s in shapes]
    m = [torch.randn(s) * 1e-5 * scale for s in shapes]
    Pruner(model, adam_with(model, exp_avg=m, exp_avg_sq=v), criterion, **options).prune_to(0.5)
    return zeros_of(model)


@pytest.mark.parametrize(
    "name, free", [("variance_quarter", True), ("variance_half", True), ("variance_within", True), ("bitter7", False)]
)
def test_scale_free_means_the_same_set_for_all_gradients_times_a_constant(name, free):
    assert (pruned_by(name) == pruned_by(name, scale=2.0**10)).all() == free


def test_eps_swamps_v_in_bitter7_and_not_in_its_repair():
    """At second moments of 1e-9 bitter7 is nearly magnitude; the scale-free form is not."""
    magnitude = pruned_by("magnitude")
    assert (pruned_by("bitter7") != magnitude).mean() < (pruned_by("variance_quarter") != magnitude).mean() / 5


def test_turned_criteria_keep_what_grows():
    model = linears((1, 2))
    with torch.no_grad():
        model[0].weight.fill_(0.1)
    growing = torch.tensor([[-1e-3, 1e-3]])  # Adam steps along -m: the first weight grows, the second shrinks
    for name, keeps in (("bitter5", 1), ("bitter5_turned", 0)):
        model[0].weight.data.fill_(0.1)
        Pruner(model, adam_with(model, exp_avg=[growing], exp_avg_sq=[growing**2]), name).prune_to(0.5)
        assert model[0].weight[0, keeps] != 0


def test_random_is_uniform_and_unrelated_to_weights():
    scores = CRITERIA["random"](torch.arange(100_000))
    assert 0 <= scores.min() and scores.max() < 1
    counts = torch.histc(scores, 20, 0, 1)
    assert (counts - 5000).abs().max() < 5 * math.sqrt(5000)
    assert abs(np.corrcoef(scores[:-1], scores[1:])[0, 1]) < 0.02


def test_a_criterion_of_ones_own_in_a_few_lines():
    def snr(weight, exp_avg, exp_avg_sq):
        return weight.abs() * exp_avg.abs() / (exp_avg_sq.sqrt() + 1e-12)

    assert pruned_by(snr).mean() == 0.5
    weighted = functools.partial(
        lambda weight, exp_avg_sq, power, scale=2.0: scale * weight.abs() * exp_avg_sq**power, power=0.5
    )
    assert (pruned_by(weighted) == pruned_by("variance_half")).all()
