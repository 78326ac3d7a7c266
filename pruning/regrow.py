"""Drop and regrow, as in RigL (Evci et al. 2020, arXiv:1911.11134): weights come back where their gradient is large."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn

from pruning.choice import lowest, places
from pruning.criteria import magnitude
from pruning.pruner import Pruner
from pruning.ranks import local
from pruning.scores import Scores
from pruning.select import EXCLUDED, divide, order_key


def seed_of(dtype: torch.dtype) -> float:
    """What a regrown weight starts from, against its gradient: RigL's zero, but for the weight being the mask. As near
    to zero as `dtype` comes: 1e-30, or its smallest normal number where that is larger (float16: 6e-5)."""
    return max(1e-30, torch.finfo(dtype).tiny)


class Regrow(Pruner):
    """A Pruner that, at each update, also drops the lowest live weights of each layer by the criterion and grows as
    many by the magnitude of their gradient. The sparsity is the schedule's, exactly; pruned sets are not nested.

    drop_fraction: share of each layer's live weights that changes place at `begin`; falls to 0 at `end` along a cosine.
    Takes Pruner's other arguments but `pattern`. The update happens in `mask_gradients`, the one moment at which the
    gradients of pruned weights are there: before the optimizer's step, with the states as the step before left them.
    Where gradients are not finite nothing changes place, and `step` prunes what is due.
    """

    def __init__(self, *args: Any, drop_fraction: float = 0.3, **options: Any):
        super().__init__(*args, **options)
        if not 0 <= drop_fraction < 1:
            raise ValueError(f"drop_fraction={drop_fraction}: expected 0 <= drop_fraction < 1")
        if self.pattern:
            raise ValueError("pattern= cannot be combined with regrowth, which moves weights about in a layer")
        self.drop_fraction, self.updated = drop_fraction, 0
        self.gradients = GradientScores(self.layers, self.ranks, self.scores.optimizer, magnitude, None)

    @torch.no_grad()
    def mask_gradients(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """As Pruner.mask_gradients; drops and grows first, when the step under way is due and was not updated yet.
        Call it when all gradients of the step are there."""
        step = self.steps + 1
        if self.due(step) and step != self.updated and (grown := self.layers_with_gradients()) is not None:
            self.prune_to(self.scheduled(step))
            self.updated = step
            ramp = (step - self.begin) / max(1, self.end - self.begin)
            self.drop_and_grow(self.drop_fraction * (1 + math.cos(math.pi * ramp)) / 2, grown)
        super().mask_gradients(parameters)

    def update(self, step: int) -> None:
        """Prune what is due where `mask_gradients` did not, before the optimizer's step."""
        if step != self.updated:
            self.prune_to(self.scheduled(step))

    def go_on_after(self, step: int) -> None:
        super().go_on_after(step)
        self.updated = 0

    def layers_with_gradients(self) -> list[bool] | None:
        """Which layers have one on all ranks; None where one is not finite on any. Waits for the device once."""
        counts = torch.zeros(2, len(self.layers), dtype=torch.int64, device=self.scores.device)
        for i, layer in enumerate(self.layers):
            if layer.parameter.grad is not None:
                counts[0, i] = ~local(layer.parameter.grad).isfinite().all()
                counts[1, i] = 1
        bad, having = self.ranks.all_reduce(counts).tolist()
        return None if any(bad) else [number == self.ranks.size for number in having]

    def drop_and_grow(self, fraction: float, grown: Sequence[bool]) -> None:
        """Give `fraction` of each layer's live weights another place in it, of those layers that `grown` says."""
        of_each = self.zeros()
        self.scores.prepare(of_each)
        for i, (layer, zeros) in enumerate(zip(self.layers, of_each)):
            moving = round(fraction * (layer.size - zeros)) if zeros else 0  # without zeros there is no other place
            if moving and grown[i]:
                with self.scores.keeping():
                    self.prune([lowest(self.scores, [i], zeros + moving)])
                for _, rows, live in places(self.gradients, [lowest(self.gradients, [i], moving)]):
                    weight, gradient = local(layer.parameter)[rows], local(layer.parameter.grad)[rows]
                    seed = torch.tensor(seed_of(weight.dtype), dtype=weight.dtype, device=weight.device)
                    weight.add_(torch.copysign(seed, -gradient).mul_(1 - live))


class GradientScores(Scores):
    """Pruned weights by the magnitude of their gradient, largest first; live ones are left out."""

    def new_keys(self, i: int, rows: slice) -> torch.Tensor:
        parameter: Any = self.layers[i].parameter
        key = order_key(-local(parameter.grad)[rows].float().abs())
        return torch.where(local(parameter)[rows] == 0, key, EXCLUDED)

    def divide(self, i: int, rows: slice, key: int, ties_live: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        return divide(self.keys(i, rows), key, ties_live)
