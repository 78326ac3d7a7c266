import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt2.model import GPT, GPTConfig
from pruning import NotFiniteError, Pruner
from pruning.layers import find_layers
from tests.pruning.helpers import adam_with, by_exp_avg, linears, one_step, zeros_of


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 12, generator=generator), torch.randint(0, 4, (16,), generator=generator)


def train(model, optimizer, pruner, steps, forward=None, clip=1.0):
    for step in range(*steps):
        x, y = batch(step)
        F.cross_entropy((forward or model)(x), y).backward()
        if pruner:
            pruner.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if pruner:
            pruner.step()


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fixed_mask_is_training_the_sub_network(name):
    """After the last update: a reference with dense weights times a mask in the forward, and a plain optimizer, takes
    the same steps within float32 rounding."""
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = Pruner(model, optimizer, "magnitude", 0.6, begin=5, end=20, interval=5)
    train(model, optimizer, pruner, (0, 20))
    reference = copy.deepcopy(model)
    theirs = OPTIMIZERS[name](reference.parameters())
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    masks = {name: (p != 0).float() for name, p in reference.named_parameters() if p.dim() == 2}

    def masked(x):
        weights = {name: p * masks[name] if name in masks else p for name, p in reference.named_parameters()}
        return torch.func.functional_call(reference, weights, x)

    train(model, optimizer, pruner, (20, 60))
    train(reference, theirs, None, (20, 60), forward=masked)
    for (name, ours), dense in zip(model.named_parameters(), reference.parameters()):
        assert torch.allclose(ours, dense * masks.get(name, 1), atol=2e-6), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_exactly_zero_for_1000_steps(name):
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = Pruner(model, optimizer, "magnitude", 0.7, begin=1, end=10)
    train(model, optimizer, pruner, (0, 10))
    zero = zeros_of(model)
    assert zero.sum() == round(0.7 * zero.size)
    train(model, optimizer, pruner, (10, 1010))
    assert zeros_of(model)[zero].all()
    for parameter in [m.weight for m in model if isinstance(m, nn.Linear)]:
        for state in optimizer.state[parameter].values():
            if state.shape == parameter.shape:
                assert not state[parameter == 0].any()


@pytest.mark.parametrize("criterion", ["bitter0", "bitter5", "bitter7", "movement", "random"])
def test_200_updates_are_nested_and_exact(criterion):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, criterion, 0.9, "cubic", begin=1, end=200)
    before = zeros_of(model)
    for step in range(200):
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        pruner.mask_gradients()
        optimizer.step()
        assert pruner.step()
        after = zeros_of(model)
        assert after[before].all()
        assert (
            after.sum() == pruner.pruned == round(0.9 * ((step + 1) / 200) ** 3 * pruner.prunable)
            and pruner.sparsity == after.mean()
        )
        before = after


def test_updates_come_when_they_are_due():
    model = linears((10, 10))
    pruner = Pruner(model, adam_with(model), "magnitude", 0.5, "linear", begin=10, end=33, interval=10)
    due = [number for number in range(1, 50) if one_step(pruner)]
    assert due == [10, 20, 30, 33] and pruner.pruned == 50


def test_nothing_is_masked_before_the_first_update():
    model = linears((4, 4))
    with torch.no_grad():
        model[0].weight.zero_()
    optimizer = adam_with(model)
    pruner = Pruner(model, optimizer, begin=2, end=4)
    model[0].weight.grad = torch.ones(4, 4)
    pruner.mask_gradients()
    assert model[0].weight.grad.all()
    optimizer.step()
    assert model[0].weight.all()


def test_weights_that_are_zero_are_the_first_to_go():
    model = linears((1, 8))
    with torch.no_grad():
        model[0].weight[0, [2, 5]] = torch.tensor([0.0, -0.0])
    Pruner(model, adam_with(model, exp_avg=[-torch.ones(1, 8)]), by_exp_avg).prune_to(0.25)
    assert zeros_of(model).nonzero()[0].tolist() == [2, 5]


def test_gradients_of_pruned_weights_are_zero_whatever_they_were():
    model = linears((2, 4))
    pruner = Pruner(model, adam_with(model), begin=1, end=1)
    one_step(pruner)
    model[0].weight.grad = torch.tensor([[1.0, float("inf"), float("nan"), -2.0]] * 2)
    pruner.mask_gradients()
    pruned = model[0].weight == 0
    assert (model[0].weight.grad[pruned] == 0).all() and not torch.signbit(model[0].weight.grad[pruned]).any()
    expected = torch.tensor([[1.0, float("inf"), float("nan"), -2.0]] * 2)[~pruned]
    assert torch.equal(model[0].weight.grad[~pruned].nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(
    "tensor, value", [("weight", float("nan")), ("exp_avg_sq", float("inf")), ("exp_avg", -float("inf"))]
)
def test_what_is_not_finite_is_named_and_nothing_pruned(tensor, value):
    model = linears((3, 3), (3, 5))
    optimizer = adam_with(model)
    bad = model[1].weight.data if tensor == "weight" else optimizer.state[model[1].weight][tensor]
    bad[1, 2] = value
    pruner = Pruner(model, optimizer, "bitter7")
    with pytest.raises(NotFiniteError, match=r"1\.weight"):
        one_step(pruner)
    assert not zeros_of(model).any() and pruner.pruned == 0


def test_a_criterion_that_gives_nan_is_named_and_nothing_pruned():
    def nan(weight):
        return weight / 0 * 0

    model = linears((3, 3))
    with pytest.raises(NotFiniteError, match="0.weight.*nan"):
        one_step(Pruner(model, adam_with(model), nan))
    assert not zeros_of(model).any()


def test_huge_values_are_no_error():
    model = linears((1, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3e38, -3e38, 1.0, 3e38]]))
    Pruner(model, adam_with(model), "magnitude").prune_to(0.5)
    assert zeros_of(model).tolist() == [True, False, True, False]


def test_gpt2s_prunable_weights_are_its_blocks_matrices():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    layers = find_layers(model)
    assert len(layers) == 48 and sum(layer.size for layer in layers) == 84_934_656
    assert not any("wte" in layer.name or "lm_head" in layer.name for layer in layers)


def test_hugging_faces_gpt2_has_the_same_prunable_weights():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        layers = find_layers(transformers.GPT2LMHeadModel(transformers.GPT2Config()))
    assert (
        len(layers) == 48
        and sum(layer.size for layer in layers) == 84_934_656
        and {layer.input_dim for layer in layers} == {0}
    )


def test_tied_and_compiled_weights_count_once_and_under_their_own_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(2, 3, 2))
    model[1].weight = model[0].weight
    wrapped = torch.compile(model)
    pruner = Pruner(wrapped, torch.optim.AdamW(wrapped.parameters()))
    assert [layer.name for layer in pruner.layers] == ["0.weight", "2.weight"] and pruner.prunable == 16 + 24


def test_the_user_can_say_what_is_prunable():
    model = mlp()
    pruner = Pruner(
        model, torch.optim.SGD(model.parameters(), lr=0.1), prunable=lambda name, parameter: name == "2.weight"
    )
    pruner.prune_to(0.5)
    assert (model[2].weight == 0).sum() == 512 and model[0].weight.all()


def test_bfloat16_parameters():
    model = linears((64, 64), dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, "bitter7", 0.5, begin=2, end=4)
    for _ in range(6):
        model[0](torch.randn(8, 64, dtype=torch.bfloat16)).square().mean().backward()
        pruner.mask_gradients()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert zeros_of(model).sum() == 2048


def test_parameters_that_are_not_contiguous():
    model = nn.Conv2d(8, 16, 3, bias=False).to(memory_format=torch.channels_last)
    model.weight.grad = torch.randn_like(model.weight)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    expected = copy.deepcopy(model.weight.detach().contiguous())
    Pruner(model, optimizer, "magnitude").prune_to(0.5)
    k = expected.abs().flatten().kthvalue(576).values
    assert torch.equal(model.weight == 0, expected.abs() <= k)


def test_state_is_small_and_continues_the_run():
    def fresh():
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, Pruner(model, optimizer, "bitter7", 0.8, begin=5, end=45, interval=5)

    whole = fresh()
    train(*whole, (0, 60))
    first = fresh()
    train(*first, (0, 23))
    state = first[2].state_dict()
    assert len(json.dumps(state)) < 1000
    second = fresh()
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    second[2].load_state_dict(json.loads(json.dumps(state)))
    train(*second, (23, 60))
    for a, b in zip(whole[0].parameters(), second[0].parameters()):
        assert torch.equal(a, b)


def test_movement_carries_its_initial_weights():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, "movement", 0.5, begin=10, end=20)
    train(model, optimizer, pruner, (0, 8))
    state = copy.deepcopy(pruner.state_dict())
    other = copy.deepcopy(model)
    resumed = Pruner(other, torch.optim.AdamW(other.parameters()), "movement", 0.5, begin=10, end=20)
    with pytest.raises(ValueError, match="initial_weight"):
        resumed.load_state_dict(state | {"buffers": {}})
    resumed.load_state_dict(state)
    pruner.prune_to(0.5)
    resumed.prune_to(0.5)
    assert (zeros_of(model) == zeros_of(other)).all()


def test_state_of_another_criterion_or_target_or_model_is_refused():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = Pruner(model, optimizer, "magnitude", 0.5)
    one_step(pruner)
    state = pruner.state_dict()
    for changes, words in (
        (dict(criterion="bitter7"), "criterion=magnitude"),
        (dict(target_sparsity=0.6), "target_sparsity=0.5"),
    ):
        with pytest.raises(ValueError, match=words):
            Pruner(model, optimizer, **(dict(criterion="magnitude", target_sparsity=0.5) | changes)).load_state_dict(
                state
            )
    with pytest.raises(ValueError, match="not that of a Pruner: it lacks criterion, pattern, steps"):
        pruner.load_state_dict(model.state_dict())
    dense = mlp()
    with pytest.raises(ValueError, match="load the model first"):
        Pruner(dense, torch.optim.AdamW(dense.parameters()), "magnitude", 0.5).load_state_dict(state)


def power(weight, power):
    return weight.abs() ** power


class Scaled:
    def __call__(self, weight, **others):
        return 2 * weight.abs()


@pytest.mark.parametrize("criterion", [functools.partial(power, power=2.0), Scaled()])
def test_a_criterion_without_a_name_of_its_own_has_the_same_one_in_every_process(criterion):
    model = mlp()
    pruner = Pruner(model, torch.optim.AdamW(model.parameters()), criterion)
    assert pruner.state_dict()["criterion"] in ("power", "Scaled")
    pruner.prune_to(0.5)
    Pruner(model, torch.optim.AdamW(model.parameters()), criterion).load_state_dict(pruner.state_dict())


@pytest.mark.parametrize("needs", ["step", "beta1"])
def test_a_criterion_that_reads_what_sgd_has_not_falls_back_to_magnitude(needs):
    models = [mlp(), mlp()]
    criterion = {
        "step": lambda weight, step: -weight.abs() * step,
        "beta1": lambda weight, beta1: -weight.abs() * beta1,
    }
    pruner = Pruner(models[0], torch.optim.SGD(models[0].parameters(), lr=0.1), criterion[needs])
    with pytest.warns(UserWarning, match=f"the optimizer keeps no {needs}"):
        pruner.prune_to(0.5)
    Pruner(models[1], torch.optim.SGD(models[1].parameters(), lr=0.1), "magnitude").prune_to(0.5)
    assert (zeros_of(models[0]) == zeros_of(models[1])).all()


def test_float64_weights_too_small_for_float32_are_not_pruned_yet():
    model = linears((20, 20), (20, 20), dtype=torch.float64)
    model[0].weight.data.fill_(1e-60)
    pruner = Pruner(model, torch.optim.AdamW(model.parameters()), "random")
    for sparsity in (0.3, 0.6):
        pruner.prune_to(sparsity)
        assert zeros_of(model).sum() == round(sparsity * 800)


def test_sgd_falls_back_to_magnitude_with_one_warning():
    model, twin = mlp(), mlp()
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), "bitter7", begin=1, end=10)
    with pytest.warns(UserWarning, match="exp_avg_sq") as warned:
        for _ in range(10):
            one_step(pruner)
    assert len(warned) == 1
    Pruner(twin, torch.optim.SGD(twin.parameters(), lr=0.1), "magnitude").prune_to(0.5)
    assert (zeros_of(model) == zeros_of(twin)).all()


def test_factored_states_are_a_clear_error_for_criteria_that_need_v():
    model = mlp()
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, None, (0, 2))
    with pytest.raises(ValueError, match="Adafactor keeps sums of rows and columns: .* AdamW"):
        Pruner(model, optimizer, "bitter7")
    one_step(Pruner(model, optimizer, "magnitude"))
    assert zeros_of(model).mean() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("shape", [lambda rows, _: (), lambda rows, _: (rows, 1), lambda _, columns: (2, columns)])
def test_states_that_are_no_value_a_weight_are_a_clear_error_before_anything_is_pruned(shape):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = dict(exp_avg=torch.zeros_like(parameter), step=torch.tensor(1.0))
        optimizer.state[parameter]["exp_avg_sq"] = torch.ones(shape(*parameter.shape)) if parameter.dim() == 2 else None
    with pytest.raises(ValueError, match="0.weight: the criterion needs exp_avg_sq, but the optimizer keeps"):
        Pruner(model, optimizer, "bitter7")
    Pruner(model, optimizer, "bitter3")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(criterion="bitter77"), "did you mean bitter7"),
        (dict(schedule="gpm"), "did you mean gmp"),
        (dict(criterion=["bitter7"]), r"criterion=\['bitter7'\]: expected a function or one of magnitude"),
        (dict(allocation="globl"), "did you mean global"),
        (dict(target_sparsity=1.0), "target_sparsity=1.0"),
        (dict(begin=0), "begin=0"),
        (dict(begin=5, end=4), "begin=5, end=4"),
        (dict(interval=0), "interval=0"),
        (dict(begin=2.5, end=7.5), "begin=2.5: expected a whole number of steps"),
        (dict(end=float("inf")), "end=inf: expected a whole number of steps"),
        (dict(max_layer_sparsity=0), "max_layer_sparsity=0"),
        (dict(pattern="4:2"), "4:2"),
        (dict(pattern=(2, 4)), r"pattern=\(2, 4\): expected n:m"),
        (dict(pattern="1:4"), "at most 0.25"),
        (dict(pattern="2:5"), "12 inputs are not divisible by 5"),
        (dict(pattern="2:4", allocation="erk"), "allocation=erk"),
        (dict(criterion=lambda: None), "expected a function whose arguments"),
        (dict(criterion=lambda weight=None: weight), "expected a function whose arguments"),
        (dict(criterion=torch.abs), "criterion=abs: expected a function whose arguments"),
        (dict(criterion=torch.nn.Identity()), "criterion=Identity: expected a function whose arguments"),
        (dict(prunable=["0.weight"]), "expected a function"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    model = mlp()
    changes = {"target_sparsity": 0.3 if changes.get("pattern") == "2:5" else 0.5} | changes
    with pytest.raises(ValueError, match=words):
        Pruner(model, torch.optim.AdamW(model.parameters()), **changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(schedule=lambda progress: 2 * progress), "schedule gave 1.5 at progress 0.75"),
        (dict(schedule=lambda progress: math.nan), "schedule gave nan"),
        (dict(allocation=lambda shapes, sparsity: [sparsity]), "finite share for each of 3 layers"),
        (dict(criterion=lambda weight: weight.sum()), r"0.weight: the criterion gave a tensor of shape \(\)"),
        (dict(criterion=lambda weight: weight.t()), r"of shape \(12, 32\) for weights of shape \(32, 12\)"),
        (dict(criterion=lambda weight: None), "the criterion gave None"),
    ],
)
def test_functions_of_the_users_that_give_something_else_are_named(changes, words):
    model = mlp()
    pruner = Pruner(
        model, torch.optim.AdamW(model.parameters()), **({"begin": 1, "end": 4, "schedule": "oneshot"} | changes)
    )
    with pytest.raises(ValueError, match=words):
        for _ in range(3):
            one_step(pruner)
    assert zeros_of(model).sum() == pruner.pruned  # nothing was pruned by that update


@pytest.mark.parametrize("forgotten", ["mask_gradients", "weights set anew"])
def test_pruned_weights_that_come_back_are_noticed(forgotten):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = Pruner(model, optimizer, "magnitude", 0.5, schedule="linear", begin=1, end=10)
    with pytest.raises(
        RuntimeError, match=r"of 77 pruned weights are not zero any more: call mask_gradients\(\) .* before AdamW.step"
    ):
        for step in range(10):
            F.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
            if forgotten == "weights set anew":
                pruner.mask_gradients()
            optimizer.step()
            pruner.step()
            if forgotten == "weights set anew" and pruner.pruned:
                model[0].weight.data.fill_(0.5)


def test_numbers_may_be_numpys():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = Pruner(model, optimizer, "bitter7", np.float32(0.25), begin=np.int64(1), end=np.int64(3))
    optimizer.step()
    pruner.step(np.int64(1))
    pruner.prune_to(torch.tensor(0.5))
    assert json.loads(json.dumps(pruner.state_dict()))["steps"] == 1 and pruner.sparsity == 0.5


def test_schedules_and_allocations_may_give_tensors():
    model = mlp()
    schedule, allocation = (lambda progress: torch.tensor(progress)), (lambda shapes, share: torch.full((3,), share))
    pruner = Pruner(
        model, torch.optim.SGD(model.parameters(), lr=0.1), "magnitude", 0.5, schedule, 1, 4, allocation=allocation
    )
    for step in range(1, 4):
        one_step(pruner)
        assert pruner.pruned == round(0.5 * step / 4 * pruner.prunable)
    json.dumps(pruner.state_dict())


@pytest.mark.parametrize("kind, whose", [(torch.optim.Muon, "its whole matrix"), (torch.optim.LBFGS, "all others")])
def test_optimizers_that_mix_weights_are_refused(kind, whose):
    model = linears((8, 8))
    with pytest.raises(ValueError, match=f"{kind.__name__} moves each weight by the gradients of {whose}"):
        Pruner(model, kind(model.parameters()))


def test_a_model_or_optimizer_that_does_not_fit_is_refused():
    model = mlp()
    with pytest.raises(ValueError, match="expected a torch.nn.Module, not generator"):
        Pruner(model.parameters(), torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="no prunable weight"):
        Pruner(nn.Embedding(3, 3), torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="0.weight is not among the optimizer's parameters"):
        Pruner(model, torch.optim.AdamW(mlp().parameters()))
    with pytest.raises(ValueError, match="eps=0"):
        Pruner(model, torch.optim.AdamW(model.parameters(), eps=0))
    half = mlp().half()
    Pruner(half, torch.optim.AdamW(half.parameters(), fused=True))
    with pytest.raises(ValueError, match="which is 0 in float16"):
        Pruner(half, torch.optim.Adagrad(half.parameters(), fused=True))


def test_plain_global_pruning_is_capped_before_it_empties_a_layer():
    model = linears((10, 10), (10, 100))
    scores = [torch.full((10, 10), -1.0), torch.rand(10, 100)]
    pruner = Pruner(model, adam_with(model, exp_avg=scores), by_exp_avg, 0.8)
    pruner.prune_to(0.8)
    assert [(m.weight == 0).sum().item() for m in model] == [98, 880 - 98]


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
def test_more_than_the_cap_may_be_asked_for_by_hand(allocation):
    model = mlp()
    pruner = Pruner(model, torch.optim.AdamW(model.parameters()), allocation=allocation)
    pruner.prune_to(0.995)
    assert pruner.pruned == round(0.995 * pruner.prunable) and pruner.came_back() == 0


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.5, math.nan, 0.51])
def test_what_is_no_sparsity_is_refused(sparsity):
    model = mlp()
    pruner = Pruner(model, torch.optim.AdamW(model.parameters()), pattern="2:4" if sparsity == 0.51 else None)
    with pytest.raises(ValueError, match=f"sparsity={sparsity}: expected 0 <= sparsity"):
        pruner.prune_to(sparsity)
    assert not zeros_of(model).any()


def test_zeros_that_a_pattern_does_not_choose_count_all_the_same():
    """A layer that is zero altogether, as an initialisation, has more of them than the pattern takes."""
    model = linears(*[(16, 16)] * 4)
    nn.init.zeros_(model[1].weight)
    pruner = Pruner(model, torch.optim.SGD(model.parameters()), pattern="2:4", target_sparsity=0.5)
    pruner.prune_to(0.4)
    assert pruner.pruned == zeros_of(model).sum() == round(0.4 * pruner.prunable)
    assert all((model[i].weight.view(16, 4, 4) == 0).sum(-1).max() <= 2 for i in (0, 2, 3))


@pytest.mark.parametrize("criterion", ["magnitude", "bitter0", "random"])
def test_n_of_m_patterns(criterion):
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Conv2d(8, 6, 3, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    pruner = Pruner(model, optimizer, criterion, 0.5, "linear", begin=1, end=5, pattern="2:4")
    before, zero = [p.detach().clone() for p in model.parameters()], zeros_of(model)
    optimizer.zero_grad()
    for number in range(1, 6):
        one_step(pruner)
        assert zeros_of(model)[zero].all() and zeros_of(model).sum() == pruner.pruned == round(
            0.5 * number / 5 * pruner.prunable
        )
        zero = zeros_of(model)
        assert (model[0].weight.view(24, 4, 4) == 0).sum(-1).max() <= 2
    assert ((model[0].weight.view(24, 4, 4) == 0).sum(-1) == 2).all()
    assert ((model[1].weight.unflatten(1, (2, 4)) == 0).sum(2) == 2).all()
    if criterion == "magnitude":
        kept = before[0].view(24, 4, 4).abs().topk(2, dim=-1).indices
        assert model[0].weight.view(24, 4, 4).gather(-1, kept).all()


def test_report_and_log_say_what_was_pruned():
    model = linears((10, 10), (10, 30))
    pruner = Pruner(model, adam_with(model, exp_avg=[torch.randn(10, 10), torch.randn(10, 30)]), by_exp_avg)
    one_step(pruner)
    counts = [(m.weight == 0).sum().item() for m in model]
    lines = pruner.report().splitlines()
    assert [int(line.split()[2]) for line in lines[1:4]] == [*counts, 200]
    log = pruner.log()
    assert log["pruning/sparsity"] == 0.5 and log["pruning/0.weight"] == counts[0] / 100
    assert f"{log['pruning/threshold']:.6g}" in lines[-1]


class Syncs(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.bincount.default,
        )
        return function(*args, **(kwargs or {}))


def test_the_host_waits_only_when_an_update_is_due():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = Pruner(model, optimizer, "magnitude", 0.5, begin=1, end=11, interval=5)
    for number in range(1, 15):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with Syncs() as masking:
            pruner.mask_gradients()
        optimizer.step()
        with Syncs() as stepping:
            pruner.step()
        assert masking.count == 0 and (stepping.count > 0) == (number in (1, 6, 11))


def test_a_state_whose_layers_are_called_otherwise_is_refused():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, target_sparsity=0.5, begin=1, end=3)
    train(model, optimizer, pruner, (0, 4))
    inside = nn.Sequential()
    inside.add_module("backbone", model)
    renamed = Pruner(inside, torch.optim.AdamW(inside.parameters()), target_sparsity=0.5, begin=1, end=3)
    with pytest.raises(ValueError, match="has pruned 0.weight, which is not among"):
        renamed.load_state_dict(pruner.state_dict())


@pytest.mark.parametrize("failure", [NotFiniteError, KeyboardInterrupt])
def test_an_update_that_fails_is_made_up_for_at_the_next_step(failure, monkeypatch):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner, weight = Pruner(model, optimizer, target_sparsity=0.5, begin=3, end=3), model[0].weight
    train(model, optimizer, pruner, (0, 2))
    with monkeypatch.context() as patch, pytest.raises(failure):
        if failure is KeyboardInterrupt:  # in the middle: the first layer is pruned already
            zero, calls = Pruner.zero, []
            stop = lambda self, i, *rest: calls.append(i) or (zero(self, i, *rest) if i < 2 else interrupt())
            patch.setattr(Pruner, "zero", stop)
        else:
            before = weight[0, 0].item()
            one_gradient_step(model, optimizer, pruner, lambda: weight.data[0, 0].fill_(math.nan))
        train(model, optimizer, pruner, (2, 3))
    if failure is NotFiniteError:
        weight.data[0, 0] = before
    parts = copy.deepcopy([part.state_dict() for part in (model, optimizer, pruner)])
    train(model, optimizer, pruner, (3, 5))
    assert pruner.pruned == round(0.5 * pruner.prunable) == pruner.claimed
    resumed = mlp()
    optimizer = torch.optim.SGD(resumed.parameters(), lr=1e-2)
    again = Pruner(resumed, optimizer, target_sparsity=0.5, begin=3, end=3, keep_zeros=False)
    for part, state in zip((resumed, optimizer, again), parts):
        part.load_state_dict(state)
    train(resumed, optimizer, again, (3, 5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))


def interrupt():
    raise KeyboardInterrupt


def one_gradient_step(model, optimizer, pruner, between):
    """A step with something done between the optimizer's step and the pruner's."""
    x, y = batch(2)
    F.cross_entropy(model(x), y).backward()
    pruner.mask_gradients()
    optimizer.step()
    optimizer.zero_grad()
    between()
    pruner.step()


def test_layers_whose_parameters_were_replaced_are_noticed_at_the_next_update():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, target_sparsity=0.5, begin=2, end=9)
    train(model, optimizer, pruner, (0, 5))
    model[2] = nn.Linear(32, 32)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    with pytest.raises(ValueError, match="2.weight: the model has another parameter there"):
        train(model, optimizer, pruner, (5, 7))


def test_layers_that_had_no_gradient_yet_are_named_once():
    model = mlp()
    model.append(nn.Linear(4, 4))  # is in no forward pass
    forward = model[:5]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, "bitter7", target_sparsity=0.5, begin=2, end=9)
    with pytest.warns(UserWarning, match="^5.weight: the optimizer keeps no exp_avg_sq there") as warned:
        train(model, optimizer, pruner, (0, 9), forward)
    assert len(warned) == 1


@pytest.mark.parametrize("number", [-1, 2.5, torch.tensor(0.3), math.nan, math.inf])
def test_what_is_no_step_is_refused(number):
    model = mlp()
    pruner = Pruner(model, torch.optim.AdamW(model.parameters()), begin=1, end=9)
    with pytest.raises(ValueError, match="expected the number of the optimizer's last step"):
        pruner.step(number)


def test_what_is_no_parameter_is_not_masked_in_silence():
    model = mlp()
    pruner = Pruner(model, torch.optim.AdamW(model.parameters()), begin=1, end=9)
    pruner.mask_gradients(list(model.parameters()))
    with pytest.raises(ValueError, match="not one Tensor"):
        pruner.mask_gradients(model[0].weight)
    with pytest.raises(ValueError, match="not tuple"):
        pruner.mask_gradients(model.named_parameters())


def test_a_pattern_asks_for_an_input_dimension_that_is_known():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 8, 12))
            self.convolution = nn.Conv1d(8, 4, 3)

    model, chosen = Experts(), lambda name, parameter: parameter.dim() > 1
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="^up: pattern='2:4' runs along the input dimension"):
        Pruner(model, optimizer, target_sparsity=0.5, pattern="2:4", prunable=chosen)
    named = dict(pattern="2:4", prunable=lambda name, _: name == "convolution.weight")
    Pruner(model, optimizer, target_sparsity=0.5, **named).prune_to(0.5)
    Pruner(model, optimizer, target_sparsity=0.7, prunable=chosen).prune_to(0.7)


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(ValueError, match="no prunable weight|no values yet"):
        Pruner(model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize(
    "criterion, hint", [(lambda weights: weights, "weight"), (lambda weight, exp_avg_sqr: weight, "exp_avg_sq")]
)
def test_an_argument_that_is_misspelt_is_warned_of_with_the_nearest_name(criterion, hint):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = Pruner(model, optimizer, criterion, begin=1, end=1)
    with pytest.warns(UserWarning, match=rf"\(did you mean {hint}\?\): scores are abs"):
        train(model, optimizer, pruner, (0, 1))
