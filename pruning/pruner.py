"""The Pruner: three lines in a training loop, and the weight is the mask."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from pruning import report
from pruning.allocation import ALLOCATIONS, exact_counts
from pruning.choice import Lowest, lowest_of_all, lowest_of_each, places
from pruning.criteria import CRITERIA
from pruning.layers import Layer, Prunable, check_model, find_layers
from pruning.memory import bytes_of
from pruning.pattern import check_pattern, check_zeros, parse_pattern
from pruning.ranks import find_ranks, full, local, sharded_modules
from pruning.schedule import SCHEDULES, sparsity_at
from pruning.scores import Scores
from pruning.settings import check_ranges, lookup
from pruning.stepping import StepCounter, unwrapped
from pruning.zeros import count_all_zeros, zero_all_where_zero, zero_copy, zero_dead, zero_where_zero

SAVED = ("criterion", "pattern", "steps", "pruned", "threshold", "target_sparsity", "buffers")  # what a state must hold
BY_CHANCE = 0.01  # share of the prunable weights that may be zero beyond the target: live ones that have met 0.0 since
LOOK_EVERY = 10  # steps, or `interval` where that is more, between two looks for pruned weights that came back


class Pruner:
    """Prunes the weights of `model` while `optimizer` trains them.

        pruner = Pruner(model, optimizer, criterion="bitter7", target_sparsity=0.5, begin=250, end=750)
        ...
        loss.backward()
        pruner.mask_gradients()      # before clipping
        optimizer.step()
        pruner.step()                # prunes, when it is due

    A weight is pruned if and only if it is exactly 0.0. When it is pruned, it and its optimizer states become zero;
    from then on its gradient is set to zero before the optimizer steps, and Adam and SGD, with or without weight decay,
    leave it at zero by arithmetic. So no mask is stored, and a checkpoint of model and optimizer holds everything.

    Zeros that are there when the Pruner is made, as in a sparse checkpoint, stay zeros (`keep_zeros`), and pruning goes
    on from them. A layer that is zero altogether is taken for an initialisation: it trains until the first update,
    which prunes weights that are exactly zero first.

    After an update round(sparsity(step) * prunable) weights are zero, to the weight, ties included (the earlier place
    in the model goes first): the same set for any number of ranks, under DDP or FSDP2.

    Make it after the model is loaded, on its device, wrapped or sharded, and after the optimizer.

    model:            any module: plain, compiled, under DistributedDataParallel, or fully_shard'ed
    optimizer:        any torch optimizer that keeps per-parameter tensors, or accelerate's wrapper; its own steps count
    criterion:        a name of pruning/criteria.py, or a function with such arguments
    target_sparsity:  share of the prunable weights that is zero at `end`, 0 <= s < 1; 0 prunes nothing, and keeps zeros
    schedule:         a name of pruning/schedule.py, or a function of progress in [0, 1]
    begin, end:       optimizer steps, counted from 1, of the first and the last update
    interval:         steps from one update to the next; where these divide end - begin, update i of n prunes to
                      target_sparsity · schedule(i / n)
    allocation:       a name of pruning/allocation.py, or a function (shapes, sparsity) -> share of each layer
    max_layer_sparsity: under `global`, no layer is pruned beyond this share (or target_sparsity, where that is higher),
                      rounded up to whole weights
    pattern:          "n:m": prune only among the n lowest of every m weights along the input dimension
    prunable:         (name, parameter) -> bool, which of the model's parameters, of two dimensions or more; by default
                      the weights of Linear layers, attention and convolutions that train and are not tied to an
                      embedding
    process_group:    the ranks that train replicas of this model; default all
    keep_zeros:       whether zeros that are there now stay zeros

    Raises ValueError for values out of range, parameters that cannot be pruned, and placements or optimizers that
    cannot be pruned exactly; updates raise NotFiniteError for weights or states that are NaN or infinite. Where pruned
    weights came back, as they do without `mask_gradients`, the next update, `state_dict`, or a look every few steps
    raises RuntimeError; where `step` is given numbers, nothing looks but the first two, and `check_none_came_back`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        criterion: str | Callable[..., torch.Tensor] = "magnitude",
        target_sparsity: float = 0.5,
        schedule: str | Callable[[float], float] = "gmp",
        begin: int = 1,
        end: int = 1,
        interval: int = 1,
        *,
        allocation: str | Callable[[list[tuple[int, ...]], float], Sequence[float]] = "global",
        max_layer_sparsity: float = 0.98,
        pattern: str | None = None,
        prunable: Prunable | None = None,
        process_group: Any = None,
        keep_zeros: bool = True,
    ):
        score, self.criterion_name = lookup(criterion, CRITERIA, "criterion")
        self.schedule, self.schedule_name = lookup(schedule, SCHEDULES, "schedule")
        self.allocation, self.allocation_name = lookup(allocation, ALLOCATIONS, "allocation")
        check_ranges(target_sparsity, begin, end, interval, max_layer_sparsity)
        self.target_sparsity = float(target_sparsity)
        self.begin, self.end, self.interval = int(begin), int(end), int(interval)
        self.max_layer_sparsity = max(max_layer_sparsity, self.target_sparsity)
        check_model(model, prunable)
        self.model = model
        self.sharded_modules = sharded_modules(model)
        self.reshard()
        self.layers = find_layers(model, prunable)
        if without := [layer.name for layer in self.layers if layer.parameter.is_meta]:
            raise ValueError(f"{without[0]}: has no values yet, on the device meta: make the Pruner when it has")
        self.ranks = find_ranks(self.layers, process_group)
        self.pattern = parse_pattern(pattern) if pattern else None
        if self.pattern:
            check_pattern(self.pattern, self.layers, self.ranks, target_sparsity, self.allocation_name)
        optimizer = unwrapped(optimizer)
        self.scores = Scores(self.layers, self.ranks, optimizer, score, self.pattern)
        self.prunable = self.scores.size
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.weight_bytes = bytes_of(model.parameters())
        self.counter, self.seen = StepCounter(optimizer), 0
        self.layer_of = {layer.parameter: layer for layer in self.layers}
        self.masked: dict[Layer, None] = {}  # layers whose zeros are kept: all of them from the first update on
        self.claimed = 0  # zeros that are there unless pruned weights came back
        self.zeros_found = False  # whether zeros were found, not made, of which the optimizer's states may not be zero
        self.threshold: int | None = None
        self.keep_zeros = keep_zeros
        if keep_zeros:
            self.keep_what_is_zero()

    def keep_what_is_zero(self, updated: bool = False) -> None:
        """Keep the zeros of every layer that is partly zero; after an update also of those that are zero altogether.
        ValueError where target or pattern rule them out."""
        counted = zip(self.layers, self.zeros())
        kept = [(layer, zeros) for layer, zeros in counted if zeros and (updated or zeros < layer.size)]
        self.masked, self.claimed = dict.fromkeys(layer for layer, _ in kept), sum(zeros for _, zeros in kept)
        self.zeros_found = bool(kept)
        if self.pattern:
            check_zeros(self.pattern, list(self.masked), self.ranks)
        if self.target_sparsity and self.claimed > (self.target_sparsity + BY_CHANCE) * self.prunable:
            raise ValueError(
                f"target_sparsity={self.target_sparsity} is below the {self.claimed / self.prunable:.2%} of the "
                "prunable weights that are zero already: raise it, or let them train again with keep_zeros=False"
            )

    # ---- the calls of a training loop ----

    @torch.no_grad()
    def mask_gradients(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Set the gradient of every pruned weight to zero, or of those in `parameters` alone. Call it after backward,
        before clipping. Never waits for the device."""
        self.counter.before_step()
        if self.zeros_found:
            self.zero_states()
        for layer in self.layers if parameters is None else self.layers_of(parameters):
            if layer in self.masked and layer.parameter.grad is not None:
                zero_where_zero(local(layer.parameter.grad), local(layer.parameter))

    def layers_of(self, parameters: Iterable[nn.Parameter]) -> Iterator[Layer]:
        """The layers among `parameters`. ValueError for what holds none."""
        if isinstance(parameters, torch.Tensor):
            raise ValueError("parameters: expected some of the model's, not one Tensor: [parameter]")
        for parameter in parameters:
            if not isinstance(parameter, torch.Tensor):
                raise ValueError(f"parameters: expected parameters of the model, not {type(parameter).__name__}s")
            if parameter in self.layer_of:
                yield self.layer_of[parameter]

    def step(self, number: int | None = None) -> bool:
        """Prune to `schedule(step)` when the optimizer's last step is one of an update. Returns whether it was.

        Call it after the optimizer's step; where that was left out (by gradient accumulation or a GradScaler), nothing
        happens. number: the step's, from a loop that counts steps itself, left out or not, and that looks for weights
        that came back where it waits for the device anyway. NotFiniteError, with nothing pruned, where a weight or an
        optimizer state is NaN or infinite."""
        self.counter.after_step()
        if number is not None:
            if not (0 <= number < math.inf and number == int(number)):
                raise ValueError(f"step({number}): expected the number of the optimizer's last step")
            self.counter.taken = int(number)
        taken = range(self.seen + 1, self.steps + 1)
        if number is None:
            self.counter.look(self.layers[0].parameter, stepped=bool(taken) or self.seen >= self.end)
        due = [step for step in taken if self.due(step)]
        if due:
            self.update(due[-1])
        self.seen = self.steps  # not before: an update that fails is made up for at the next step
        if not due and number is None and any(step % max(self.interval, LOOK_EVERY) == 0 for step in taken):
            self.check_none_came_back()
        return bool(due)

    @property
    def steps(self) -> int:
        """Steps that the optimizer has taken under this Pruner, those before a resume included."""
        return self.counter.taken

    def due(self, step: int) -> bool:
        """Whether there is an update at `step`: every `interval` from `begin` on, and at `end`."""
        return self.begin <= step <= self.end and ((step - self.begin) % self.interval == 0 or step == self.end)

    def scheduled(self, step: int) -> float:
        """The sparsity that the update at `step` prunes to. The ramp starts an interval before the first update, which
        so takes its share like all others."""
        interval = min(self.interval, self.end - self.begin or 1)  # there are two updates where it is longer
        return sparsity_at(step, self.schedule, self.target_sparsity, self.begin - interval, self.end)

    # ---- an update ----

    def update(self, step: int) -> None:
        """What is due at `step`."""
        self.prune_to(self.scheduled(step))

    @torch.no_grad()
    def prune_to(self, sparsity: float) -> None:
        """Prune now, until round(sparsity * prunable) weights are zero; those that are pruned stay so. ValueError for
        what is no share below 1, and for more than the pattern allows."""
        sparsity, most = float(sparsity), self.pattern[0] / self.pattern[1] if self.pattern else 1.0
        if not 0 <= sparsity < 1 or sparsity > most:
            allowed = f"0 <= sparsity <= {most:g}, as the pattern allows" if self.pattern else "0 <= sparsity < 1"
            raise ValueError(f"sparsity={sparsity}: expected {allowed}")
        self.reshard()
        self.check_layers_are_there()
        total, zeros = round(sparsity * self.prunable), self.agreed_zeros()
        self.check_none_came_back(sum(zeros))
        if not total:
            return
        if total > sum(zeros):
            self.scores.prepare(zeros)
            with self.scores.keeping():
                self.prune(self.choose(total, sparsity, zeros))
            if self.ranks.replicated:
                self.agreed_zeros()
        self.masked, self.claimed = dict.fromkeys(self.layers), max(total, sum(zeros))
        if total <= sum(zeros):
            self.zero_states()

    def check_layers_are_there(self) -> None:
        """ValueError where the model has other parameters in the place of layers than when the Pruner was made."""
        there = set(map(id, self.model.parameters()))
        if gone := [layer.name for layer in self.layers if id(layer.parameter) not in there]:
            raise ValueError(
                f"{', '.join(gone)}: the model has another parameter there than when the Pruner was made, or none: "
                "make the optimizer and the Pruner when its modules and their devices and dtypes are as they stay"
            )

    def agreed_zeros(self) -> list[int]:
        """`zeros`, of which replicas must have the same numbers: RuntimeError, on all ranks, where they have not. A
        collective where there are several ranks."""
        if not self.ranks.replicated:
            return self.zeros()
        first, *others = self.ranks.all_gather(count_all_zeros(self.layers)).tolist()
        if any(zeros != first for zeros in others):
            raise RuntimeError(
                "the ranks do not train the same weights: give process_group= the ranks that train replicas of this "
                "model, and bring their weights together before the Pruner is made, as DistributedDataParallel does"
            )
        return first

    def reshard(self) -> None:
        """Let FSDP2's modules give back weights that they gathered, as the root's keeps them after a forward pass
        without a backward one: the next pass would not see what is pruned now."""
        for module in self.sharded_modules:
            module.reshard()

    def choose(self, total: int, sparsity: float, zeros: Sequence[int]) -> list[Lowest]:
        """The `total` weights that are zero after this update: those `zeros` of each layer, and the lowest."""
        sizes = [layer.size for layer in self.layers]
        if self.allocation is None:
            most = max(self.max_layer_sparsity, sparsity)
            caps = [max(zero, math.ceil(most * size)) for zero, size in zip(zeros, sizes)]
            parts = lowest_of_all(self.scores, total, caps)
            self.threshold = parts[-1].threshold.key
            return parts
        shares = [float(share) for share in self.allocation([layer.shape for layer in self.layers], sparsity)]
        if len(shares) != len(sizes) or not all(math.isfinite(share) for share in shares):
            raise ValueError(
                f"allocation {self.allocation_name} gave {shares}: expected a finite share for each of {len(sizes)} "
                "layers"
            )
        counts = exact_counts(shares, sizes, total, zeros)
        return lowest_of_each(self.scores, [([i], count) for i, count in enumerate(counts) if count])

    def prune(self, parts: Sequence[Lowest]) -> None:
        """Set the chosen weights and their optimizer states to zero."""
        for i, rows, live in places(self.scores, parts):
            self.zero(i, rows, live)

    def zero(self, i: int, rows: slice, live: torch.Tensor) -> None:
        """Set to zero the weights of these rows of layer i at which `live` is 0, and what the optimizer keeps of those
        that are zero then."""
        weight, *states = (tensor[rows] for tensor in self.scores.tensors_of(i))
        zero_dead(weight, live)
        zero_all_where_zero(states, weight)

    def zero_states(self) -> None:
        """Set to zero what the optimizer keeps of the masked layers' weights that are zero, else they would move."""
        self.zeros_found = False
        for i, layer in enumerate(self.layers):
            if layer in self.masked:
                weight, *states = self.scores.tensors_of(i)
                zero_all_where_zero(states, weight)

    # ---- what is zero, counted when it is asked for ----

    def zeros(self) -> list[int]:
        """How many weights of each layer are zero. Waits for the device once; a collective where sharded."""
        counts = count_all_zeros(self.layers)
        return (self.ranks.all_reduce(counts) if self.ranks.sharded else counts).tolist()

    @property
    def pruned(self) -> int:
        """How many of the prunable weights are zero."""
        return sum(self.zeros())

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that is zero."""
        return self.pruned / self.prunable

    def layer_sparsity(self) -> dict[str, float]:
        """{name: share of its weights that is zero} of each layer."""
        return {layer.name: zeros / layer.size for layer, zeros in zip(self.layers, self.zeros())}

    def came_back(self, zeros: int | None = None) -> int:
        """How many pruned weights are not zero any more. zeros: how many are, where that is known."""
        return max(0, self.claimed - (self.pruned if zeros is None else zeros)) if self.masked else 0

    def check_none_came_back(self, zeros: int | None = None) -> None:
        """RuntimeError where pruned weights are not zero any more: the loop or the optimizer moves them."""
        if back := self.came_back(zeros):
            raise RuntimeError(
                f"{back:,} of {self.claimed:,} pruned weights are not zero any more: call mask_gradients() after "
                f"backward and before {type(self.scores.optimizer).__name__}.step(), and change no weights in between; "
                "after loading weights or states load the Pruner's too, and with a new optimizer make a new Pruner"
            )

    def apply_to(self, model: nn.Module) -> None:
        """Set to zero in `model`, such as an average of this one's weights, every prunable weight that is zero here.

        ValueError, before anything changes, where it lacks one of the weights or has another shape of it."""
        zero_copy(self.layers, model)

    # ---- state ----

    def state_dict(self, whole: bool = True) -> dict[str, Any]:
        """What a resumed run needs beside model and optimizer, JSON but for "buffers": name -> tensor, which holds the
        initial weights where the criterion reads them and is empty otherwise. RuntimeError where pruned weights came
        back.

        whole: gather buffers that are sharded, a collective; else they stay DTensors, to be gathered one by one.
        """
        pruned = self.pruned
        self.check_none_came_back(pruned)
        masked = [layer.name for layer in self.masked]
        progress = dict(steps=self.steps, seen=self.seen, pruned=pruned, claimed=self.claimed, masked=masked)
        progress |= dict(threshold=self.threshold)
        buffers = {name: full(tensor) if whole else tensor for name, tensor in self.buffers().items()}
        return self.identity() | progress | dict(target_sparsity=self.target_sparsity, buffers=buffers)

    def buffers(self) -> dict[str, torch.Tensor]:
        """name -> tensor, as this rank holds it, of what is kept beside weights and optimizer states."""
        return {f"{layer.name}.initial_weight": kept for layer, kept in zip(self.layers, self.scores.initial)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, saved at any world size; load the model and the optimizer first. Schedule, allocation and
        a target that can still be reached may differ from those it was saved with. ValueError where criterion or
        pattern do, where the target cannot be reached, or where the model has fewer zeros than were pruned."""
        if lacking := [name for name in SAVED if name not in state]:
            raise ValueError(f"the saved state is not that of a Pruner: it lacks {', '.join(lacking)}")
        for name, ours in self.identity().items():
            if state[name] != ours:
                raise ValueError(f"the saved state is of {name}={state[name]}, this Pruner has {name}={ours}")
        pruned, wanted = state["pruned"], round(self.target_sparsity * self.prunable)
        zeros = self.zeros()
        if sum(zeros) < pruned:
            raise ValueError(
                f"the saved state has {pruned:,} pruned weights, the model only {sum(zeros):,} zeros: load the model "
                "first, and let prunable= choose the same weights"
            )
        self.check_reachable(wanted, pruned, sum(zeros), state)
        names = state.get("masked", [layer.name for layer in self.layers] if pruned else [])
        if unknown := set(names) - {layer.name for layer in self.layers}:
            raise ValueError(
                f"the saved state has pruned {min(unknown)}, which is not among this Pruner's layers: the model's "
                "weights are called otherwise, or prunable= chooses others"
            )
        self.scores.load_buffers(state["buffers"])
        self.go_on_after(state["steps"])
        self.seen = state.get("seen", state["steps"])
        self.masked = dict.fromkeys(layer for layer in self.layers if layer.name in names)
        kept = sum(count for layer, count in zip(self.layers, zeros) if layer in self.masked)
        self.claimed, self.threshold = state.get("claimed", kept), state["threshold"]
        self.zeros_found = any(name.endswith(".dense") for name in state["buffers"])  # StraightThrough trains them

    def check_reachable(self, wanted: int, pruned: int, zeros: int, state: Mapping[str, Any]) -> None:
        """ValueError where the `wanted` zeros cannot be had from `state` and the `zeros` that are there."""
        change = f"target_sparsity={self.target_sparsity} cannot be reached: {zeros / self.prunable:.2%} is pruned"
        if state["target_sparsity"] != self.target_sparsity:
            before = state["target_sparsity"]
            change = f"the saved state is of target_sparsity={before}, this Pruner has {self.target_sparsity}"
            if wanted < pruned:
                raise ValueError(f"{change}: {pruned / self.prunable:.2%} is pruned already, and stays so")
        if wanted > zeros and state.get("seen", state["steps"]) >= self.end:
            raise ValueError(f"{change}: step {state['steps']} is done and no update comes after end={self.end}")

    def identity(self) -> dict[str, Any]:
        pattern = "{}:{}".format(*self.pattern) if self.pattern else None
        return dict(criterion=self.criterion_name, pattern=pattern)

    def continue_from(self, step: int) -> None:
        """Go on after `step` optimizer steps where no state was saved, from the zeros that the model has now."""
        if self.scores.initial:
            raise ValueError(
                f"the criterion {self.criterion_name} keeps the initial weights, which only state_dict() saves"
            )
        self.go_on_after(step)
        updated = self.target_sparsity > 0 and step >= self.begin
        if self.keep_zeros or updated:
            self.keep_what_is_zero(updated)

    def go_on_after(self, step: int) -> None:
        self.counter.taken = self.seen = step

    # ---- reports ----

    def describe(self) -> str:
        """One line: how many of how many parameters are prunable, and what is pruned from which step to which."""
        return report.describe(self)

    def plan(self, max_steps: int) -> dict[str, Any]:
        """What a run of `max_steps` optimizer steps would do, before it does: a dict of

        updates: [(step, sparsity), ...] of every update; average_parameters: all parameters less the pruned ones,
        averaged over the steps; memory: bytes by item, as `memory.measure` gives them, gradients and states of the
        optimizer's first step included."""
        return report.plan(self, max_steps)

    def buffer_bytes(self) -> int:
        """Bytes that this Pruner keeps on this rank beside model and optimizer."""
        return sum(local(t).nbytes for t in self.scores.initial)

    def report(self) -> str:
        """A table, as text: layer, parameters, pruned, sparsity; then the global threshold, and how many pruned weights
        came back, where there are such."""
        return report.table(self)

    def log(self) -> dict[str, float]:
        """{name: number} for wandb and the like: overall sparsity, threshold, and each layer's sparsity."""
        return report.numbers(self)
