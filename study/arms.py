"""What is only tried: functions of a few lines that change a run before its first step. What wins moves to pruning/.

A plan's arm names one under "change", with its options: {"change": ("density_lr", {"power": 0.5, "most": 2.0})}. It is
called with (model, optimizer, pruner, config) before the pruner's state is loaded and returns the pruner of the run.
What it must remember, it keeps in the optimizer's state or in the pruner, so that a run continues from a checkpoint.
"""

import torch

from pruning import Pruner
from pruning.density_lr import own_groups
from pruning.layers import find_layers
from pruning.regrow import Regrow
from pruning.schedule import SCHEDULES, sparsity_at
from pruning.straight_through import StraightThrough


def remake(kind, model, optimizer, config, criterion=None, **options):
    """The Pruner of the config, as another class, with another criterion or with more options."""
    ramp = (config.schedule, config.prune_begin, config.prune_end, config.prune_interval)
    criterion = criterion or config.criterion
    return kind(
        model, optimizer, criterion, config.target_sparsity, *ramp, **{"allocation": config.allocation, **options}
    )


def regrow(model, optimizer, pruner, config, drop_fraction=0.3):
    """RigL's drop and regrow."""
    return remake(Regrow, model, optimizer, config, drop_fraction=drop_fraction)


def straight_through(model, optimizer, pruner, config):
    """The forward pass sees masked weights, the optimizer trains the dense ones."""
    return remake(StraightThrough, model, optimizer, config)


def density_lr(model, optimizer, pruner, config, power=0.5, most=2.0):
    """The learning rate of prunable matrices times min(most, density ** -power), after SMET and Sparse µP."""
    (place,) = own_groups(optimizer, [layer.parameter for layer in pruner.layers])

    def before(*hook):
        optimizer.param_groups[place]["lr"] *= min(most, (1 - pruner.sparsity) ** -power)

    optimizer.register_step_pre_hook(before)
    return pruner


def scheduled_lr(model, optimizer, pruner, config, target=0.9, power=1.0, most=4.0):
    """density_lr for a dense run: the rates that its matrices would have on the way to the sparsity `target`."""
    (place,) = own_groups(optimizer, [layer.parameter for layer in find_layers(model)])
    begin, end, interval = config.prune_begin, config.prune_end, config.prune_interval
    ramp = [
        (at, sparsity_at(at, SCHEDULES[config.schedule], target, begin - interval, end)) for at in range(begin, end)
    ]
    ramp = [(at, sparsity) for at, sparsity in ramp if (at - begin) % interval == 0] + [(end, target)]

    def before(*hook):
        taken = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
        density = 1 - max((sparsity for at, sparsity in ramp if at <= taken), default=0.0)
        optimizer.param_groups[place]["lr"] *= min(most, density**-power)

    optimizer.register_step_pre_hook(before)
    return pruner


def hold_linear(model, optimizer, pruner, config):
    """The learning rate is held from warm-up to the end of the ramp, then falls to 0 in a straight line. Dense too."""

    def before(*hook):
        taken = next((int(state["step"]) for state in optimizer.state.values() if "step" in state), 0)
        step = taken + 1
        warmth = min(1.0, step / (config.warmup_iters + 1))
        left = (config.max_iters - step) / max(1, config.max_iters - config.prune_end)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warmth * min(1.0, left)

    optimizer.register_step_pre_hook(before)
    return pruner


class Averaged(Pruner):
    """Ranks by |w|·v^¼ averaged over the updates so far: S ← 0.8 S + 0.2 s."""

    def prune_to(self, sparsity):
        optimizer, averages = self.scores.optimizer, {}
        for layer in self.layers:
            score = score_now(layer.parameter, optimizer)
            before = optimizer.state[layer.parameter].get("average_score", score)
            averages[layer.parameter] = before.lerp(score, 0.2)
        remember(optimizer, "average_score", averages)
        super().prune_to(sparsity)


def held_density_lr(model, optimizer, pruner, config, power=0.5, most=2.0):
    """hold_linear and density_lr together."""
    hold_linear(model, optimizer, pruner, config)
    return density_lr(model, optimizer, pruner, config, power, most)


def remember(optimizer, name, tensors):
    """Keep tensors, parameter -> tensor, as a state of the optimizer; the other parameters get an empty one."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter][name] = tensors.get(parameter, torch.zeros(()))


def average_score(weight, average_score):
    return average_score * (weight != 0)


def averaged(model, optimizer, pruner, config):
    """Scores averaged over updates, S ← 0.8 S + 0.2 s, s = |w|·v^¼."""
    return remake(Averaged, model, optimizer, config, criterion=average_score)


def extra_decay(model, optimizer, pruner, config, decay=1.0):
    """During the ramp, live weights that the target would prune now decay by `decay` times the learning rate a step."""

    @torch.no_grad()
    def before(*hook):
        step = pruner.steps + 1
        if not pruner.begin <= step < pruner.end:
            return
        if pruner.due(step):
            scores = [score_now(layer.parameter, optimizer) for layer in pruner.layers]
            everything, count = (
                torch.cat([s.flatten() for s in scores]),
                round(config.target_sparsity * pruner.prunable),
            )
            threshold = everything.kthvalue(count).values
            doomed = {layer.parameter: (s <= threshold).float() for layer, s in zip(pruner.layers, scores)}
            remember(optimizer, "doomed", doomed)
        for layer in pruner.layers:
            shrink = decay * optimizer.param_groups[0]["lr"] * optimizer.state[layer.parameter]["doomed"]
            layer.parameter.mul_(1 - shrink)

    optimizer.register_step_pre_hook(before)
    return pruner


def score_now(parameter, optimizer):
    """|w|·v^¼."""
    return parameter.detach().abs() * optimizer.state[parameter]["exp_avg_sq"].sqrt().sqrt()


def density_floor(model, optimizer, pruner, config, floor=0.05):
    """Global allocation, but every layer keeps at least the share `floor` of its weights."""
    return remake(Pruner, model, optimizer, config, max_layer_sparsity=1 - floor)


ARMS = {
    function.__name__: function
    for function in (
        regrow,
        straight_through,
        density_lr,
        scheduled_lr,
        hold_linear,
        held_density_lr,
        averaged,
        extra_decay,
        density_floor,
    )
}
