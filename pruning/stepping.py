"""The optimizer that a Pruner follows: taken out of its wrapper, looked at for what cannot be, its steps counted."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from pruning.layers import Layer

# Optimizers by the names of their classes and base classes
MIXING = dict.fromkeys(("Muon", "Shampoo", "DistributedShampoo", "SOAP"), "its whole matrix") | {"LBFGS": "all others"}
FACTORED = {"Adafactor"}  # keep sums of rows and columns instead of a state for each weight
QUANTISED = ("8bit", "4bit", "Fp8")  # parts of their names: bitsandbytes' and torchao's
PATIENCE = 10  # calls in a row without a step of the optimizer, between which weights change, before a warning


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper and its like. ValueError where there is none."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not hasattr(optimizer, "register_step_post_hook"):
        raise ValueError(f"{type(optimizer).__name__} is no torch.optim.Optimizer, whose steps could be followed")
    return optimizer


class StepCounter:
    """Counts the steps that an optimizer takes: not those that gradient accumulation or a GradScaler leaves out.

    An optimizer whose step calls that of its base class runs its hooks for both: the outer one counts.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.done, self.depth, self.in_closure = 0, 0, False
        self.version, self.elsewhere = 0, 0  # of a weight; calls in a row between which it changed without a step
        self.unread: list[torch.Tensor] = []  # whether steps done were skipped, which a GradScaler leaves on the device
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    def before(self, optimizer: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.depth += 1
        self.in_closure = any(map(callable, (*arguments, *options.values())))

    def after(self, optimizer: Any, *arguments: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.done += 1
            overflow = getattr(optimizer, "found_inf", None)  # how fused optimizers are told to skip a step
            self.unread += [] if overflow is None else [overflow != 0]

    @property
    def taken(self) -> int:
        """The steps taken so far. Waits for the device where a GradScaler may have had one skipped."""
        if self.unread:
            self.done -= int(torch.stack(self.unread).sum())
            self.unread = []
        return self.done

    @taken.setter
    def taken(self, number: int) -> None:
        self.done, self.unread = number, []

    def before_step(self) -> None:
        """No step is under way, whatever one that ended in an error left here, unless this is inside its closure."""
        if not self.in_closure:
            self.depth = 0

    def after_step(self) -> None:
        """No step is under way any more."""
        self.depth, self.in_closure = 0, False

    def overlook(self, weight: torch.Tensor) -> None:
        """Take what has changed in `weight` for the Pruner's own doing."""
        self.version = weight._version

    def look(self, weight: torch.Tensor, stepped: bool) -> None:
        """One warning where `weight` changes from call to call and the optimizer takes no step: another one trains it,
        and the Pruner would wait for ever. Reads no values."""
        changed, self.version = weight._version != self.version, weight._version
        self.elsewhere = self.elsewhere + 1 if changed and not stepped else 0
        if self.elsewhere == PATIENCE:
            warnings.warn(
                f"the weights have changed between {PATIENCE} calls of step() in a row, but the Pruner's optimizer has "
                "taken no step, so nothing is pruned: make the Pruner with the optimizer that trains them (one that is "
                "made anew, or copied, needs a Pruner of its own)",
                stacklevel=3,
            )


def check_optimizer(optimizer: torch.optim.Optimizer, layers: Sequence[Layer], states: Sequence[str]) -> None:
    """ValueError where zero weights would not stay zero, where states lie on other ranks, and where the optimizer will
    never keep one of `states` for each weight."""
    name, kinds = type(optimizer).__name__, {kind.__name__ for kind in type(optimizer).__mro__}
    if "ZeroRedundancyOptimizer" in kinds:
        raise ValueError(
            "ZeroRedundancyOptimizer keeps each state on one rank only, where the others cannot rank weights by it: "
            "use FSDP2 (fully_shard) to shard states and weights alike, or a plain optimizer under DDP"
        )
    if mixed := kinds & MIXING.keys():
        raise ValueError(
            f"{name} moves each weight by the gradients of {MIXING[mixed.pop()]}, so pruned weights would not stay "
            "zero: use an optimizer that works element by element, such as AdamW, for the prunable weights"
        )
    if states and kinds & FACTORED:
        raise ValueError(
            f"the criterion needs {states[0]} of each weight, but {name} keeps sums of rows and columns: "
            "use a criterion of the weights alone, such as magnitude, or an optimizer like AdamW"
        )
    if any(part in kind for part in QUANTISED for kind in kinds):
        raise ValueError(
            f"{name} keeps quantised states, which cannot be set to zero by element: use one that does not"
        )
    for layer in layers:
        group = group_of(optimizer, layer)
        if group is None:
            raise ValueError(
                f"{layer.name} is not among the optimizer's parameters: make the Pruner after the model is wrapped "
                "or sharded, and the optimizer from that model; or leave the layer out with prunable="
            )
        if divides_by_zero(group, layer.parameter, kinds):
            vanishes = f", which is 0 in {str(layer.parameter.dtype)[6:]}," if group["eps"] else ""
            raise ValueError(
                f"{layer.name}: with eps={group['eps']}{vanishes} the optimizer divides 0 by 0 at pruned weights: "
                "expected eps > 0" + (", float32 parameters, or Adam with fused=True" if vanishes else "")
            )


def divides_by_zero(group: dict[str, Any], parameter: torch.Tensor, kinds: set[str]) -> bool:
    """Whether eps, which is added in the parameter's dtype, by fused Adam in float32, vanishes there."""
    wide = group.get("fused") and kinds & {"Adam", "AdamW"}
    eps, dtype = group.get("eps"), torch.float32 if wide else parameter.dtype
    return isinstance(eps, (int, float)) and not torch.tensor(eps, dtype=dtype, device="cpu")


def group_of(optimizer: torch.optim.Optimizer, layer: Layer) -> dict[str, Any] | None:
    """The param group that holds the layer now, or None; `optimizer.load_state_dict` makes new ones."""
    return next((g for g in optimizer.param_groups if any(p is layer.parameter for p in g["params"])), None)
