"""A learning rate that grows as the weights thin out."""

from collections.abc import Iterable, Sequence
from itertools import compress
from operator import not_
from typing import Any

import torch
import torch.nn as nn

from pruning.pruner import Pruner
from pruning.stepping import unwrapped


class DensityLR:
    """Has `optimizer` step the prunable weights with min(most, 1 / density) times the learning rate of their group,
    where density is the share of the prunable weights that is not pruned, over all layers.

        pruner = Pruner(model, optimizer, ...)
        DensityLR(pruner, optimizer)

    The pruned weights' share of a layer's change is gone, and a higher rate of the others makes up for it (as in
    Sparse µP: Dey et al. 2024, arXiv:2405.15743). The factor is there during a step alone: schedulers see and set
    the rates without it. Waits for no device and keeps nothing that a checkpoint would need.

    pruner:     whose weights they are
    optimizer:  the pruner's; its prunable weights get param groups of their own, at the end, so make this before a
                scheduler, and before `optimizer.load_state_dict`
    most:       highest factor; ValueError below 1
    """

    def __init__(self, pruner: Pruner, optimizer: Any, most: float = 4.0):
        if not most >= 1:
            raise ValueError(f"most={most}: expected a factor of at least 1")
        self.pruner, self.most = pruner, most
        optimizer = unwrapped(optimizer)
        self.groups = own_groups(optimizer, [layer.parameter for layer in pruner.layers])
        self.rates: list[tuple[Any, Any]] = []  # of these groups, without the factor and with it, while a step goes on
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    @property
    def factor(self) -> float:
        """What the learning rate of the prunable weights is multiplied by in the next step."""
        density = 1 - self.pruner.claimed / self.pruner.prunable
        return min(self.most, 1 / density) if density > 0 else self.most

    def before(self, optimizer: Any, *arguments: Any) -> None:
        self.after(optimizer)  # a step that ended in an error, or the same step of a base class
        for group in (optimizer.param_groups[place] for place in self.groups):
            raised = group["lr"] * self.factor
            self.rates.append((group["lr"], raised))
            group["lr"] = raised

    def after(self, optimizer: Any, *arguments: Any) -> None:
        for place, (rate, raised) in zip(self.groups, self.rates):
            if optimizer.param_groups[place]["lr"] is raised:  # else somebody has set it meanwhile
                optimizer.param_groups[place]["lr"] = rate
        self.rates = []


def own_groups(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> list[int]:
    """Have no param group hold some of `parameters` beside others, which stay where they are: the places of the groups
    that hold them, in param_groups, since `optimizer.load_state_dict` makes new groups."""
    own, places = {id(parameter) for parameter in parameters}, []
    for place, group in enumerate(list(optimizer.param_groups)):
        mine = [id(p) in own for p in group["params"]]
        if any(mine) and not all(mine):
            optimizer.add_param_group(taken_out(group, mine))
            place = len(optimizer.param_groups) - 1
        places += [place] if any(mine) else []
    return places


def taken_out(group: dict[str, Any], mine: Sequence[bool]) -> dict[str, Any]:
    """A group of the options of `group`, and of its parameters where `mine` holds, which leave it; with their names,
    where it has names."""
    lists = [name for name in ("params", "param_names") if name in group]
    ours = {name: list(compress(group[name], mine)) for name in lists}
    group.update({name: list(compress(group[name], map(not_, mine))) for name in lists})
    members = list(zip(ours["param_names"], ours["params"])) if "param_names" in ours else ours["params"]
    return {name: option for name, option in group.items() if name not in lists} | {"params": members}
