"""The Pruner: three lines in a training loop, and the weight is the mask."""

import difflib
import math
from functools import partial

import torch

from pruning.allocation import ALLOCATIONS, exact_counts
from pruning.criteria import CRITERIA
from pruning.layers import find_layers, find_ranks, full, is_prunable, keep, keep_where_nonzero, local
from pruning.memory import predict
from pruning.schedule import SCHEDULES, sparsity_at
from pruning.scores import NotFiniteError, Scores
from pruning.select import PRUNED, leave_ties, score_of, search, thresholds


class Pruner:
    """Prunes the weights of `model` while `optimizer` trains them.

        pruner = Pruner(model, optimizer, criterion="bitter7", target_sparsity=0.5, begin=250, end=750)
        ...
        loss.backward()
        pruner.mask_gradients()      # before clipping
        optimizer.step()
        pruner.step()                # prunes, when it is due

    A weight is pruned if and only if it is exactly 0.0. When it is pruned, it and its optimizer states become zero; from
    then on its gradient is set to zero before the optimizer steps, and Adam and SGD, with or without weight decay, leave
    it at zero by arithmetic. So no mask is stored, and a checkpoint of model and optimizer holds everything. Nothing is
    masked before the first update, so that layers that start at zero train; at an update, weights that are exactly zero
    are the first to be pruned.

    After an update round(sparsity(step) * prunable) weights are zero, to the weight, ties included (the earlier place in
    the model goes first): the same set for any number of ranks, under DDP or FSDP2.

    Make it after the model is on its device, wrapped or sharded, and after the optimizer.

    model:            any module: plain, compiled, under DistributedDataParallel, or fully_shard'ed
    optimizer:        any torch optimizer that keeps per-parameter tensors
    criterion:        a name of pruning/criteria.py, or a function with such arguments
    target_sparsity:  share of the prunable weights that is zero at `end`, 0 <= s < 1
    schedule:         a name of pruning/schedule.py, or a function of progress in [0, 1]
    begin, end:       optimizer steps, counted from 1, of the first and the last update
    interval:         steps from one update to the next; update i of n prunes to target_sparsity · schedule(i / n)
    allocation:       a name of pruning/allocation.py, or a function (shapes, sparsity) -> share of each layer
    max_layer_sparsity: under `global`, no layer is pruned beyond this share (or target_sparsity, where that is higher)
    pattern:          "n:m": prune only among the n lowest of every m weights along the input dimension
    prunable:         (module's name, module) -> bool, which modules' weights; default `is_prunable`
    process_group:    the ranks that train replicas of this model; default all

    Raises ValueError for values out of range, parameters that the optimizer does not hold, and placements or optimizers
    that cannot be pruned exactly; updates raise NotFiniteError for weights or states that are NaN or infinite, and RuntimeError where
    pruned weights came back, as they do without `mask_gradients`.
    """

    def __init__(
        self,
        model,
        optimizer,
        criterion="magnitude",
        target_sparsity=0.5,
        schedule="gmp",
        begin=1,
        end=1,
        interval=1,
        *,
        allocation="global",
        max_layer_sparsity=0.98,
        pattern=None,
        prunable=is_prunable,
        process_group=None,
    ):
        criterion, self.criterion_name = lookup(criterion, CRITERIA, "criterion")
        self.schedule, self.schedule_name = lookup(schedule, SCHEDULES, "schedule")
        self.allocation, self.allocation_name = lookup(allocation, ALLOCATIONS, "allocation")
        if not 0 <= target_sparsity < 1:
            raise ValueError(f"target_sparsity={target_sparsity}: expected 0 <= target_sparsity < 1")
        if not 1 <= begin <= end:
            raise ValueError(f"begin={begin}, end={end}: expected 1 <= begin <= end")
        if interval < 1:
            raise ValueError(f"interval={interval}: expected interval >= 1")
        if not 0 < max_layer_sparsity <= 1:
            raise ValueError(f"max_layer_sparsity={max_layer_sparsity}: expected 0 < max_layer_sparsity <= 1")
        self.target_sparsity, self.begin, self.end, self.interval = target_sparsity, begin, end, interval
        self.max_layer_sparsity = max(max_layer_sparsity, target_sparsity)
        self.layers = find_layers(model, prunable)
        if not self.layers:
            raise ValueError(
                "the model has no prunable weight: no Linear or convolution that is not tied to an embedding"
            )
        self.ranks = find_ranks(self.layers, process_group)
        self.pattern = self.checked_pattern(pattern)
        self.scores = Scores(self.layers, self.ranks, optimizer, criterion, self.pattern)
        self.prunable = sum(layer.size for layer in self.layers)
        self.steps, self.pruned, self.threshold = 0, 0, None

    def checked_pattern(self, pattern):
        """(n, m) of "n:m", or None. ValueError where it does not fit the target, the allocation or a layer's dimensions."""
        if pattern is None:
            return None
        n, colon, m = pattern.partition(":")
        if not (colon and n.isdigit() and m.isdigit() and 0 < int(n) < int(m)):
            raise ValueError(f"pattern={pattern!r}: expected n:m with 0 < n < m, as in 2:4")
        n, m = int(n), int(m)
        if self.target_sparsity > n / m:
            raise ValueError(
                f"pattern={pattern!r} allows a sparsity of at most {n / m:g}, below target_sparsity={self.target_sparsity}"
            )
        if self.allocation_name not in ("global", "uniform"):
            raise ValueError(
                f"pattern={pattern!r} fixes the layers' sparsity: allocation={self.allocation_name} cannot be combined with it"
            )
        for layer in self.layers:
            if layer.shape[layer.input_dim] % m:
                raise ValueError(
                    f"{layer.name}: its {layer.shape[layer.input_dim]} inputs are not divisible by {m}, as pattern={pattern!r} needs"
                )
            if layer.input_dim == 0 and self.ranks.sharded and -(-layer.shape[0] // self.ranks.size) % m:
                raise ValueError(
                    f"{layer.name}: pattern={pattern!r} runs along the dimension that is sharded, in pieces not divisible by {m}"
                )
        return n, m

    # ---- the calls of a training loop ----

    @torch.no_grad()
    def mask_gradients(self, parameters=None):
        """Set the gradient of every pruned weight to zero, or of those in `parameters` alone. Call it after backward, before
        clipping. Never waits for the device."""
        if not self.pruned:
            return
        for parameter in parameters or [layer.parameter for layer in self.layers]:
            if parameter.grad is not None:
                keep_where_nonzero(local(parameter.grad), local(parameter))

    def step(self):
        """Count one optimizer step, and prune to `schedule(step)` when an update is due. Returns whether it was.

        NotFiniteError, with nothing pruned, where a weight or an optimizer state is NaN or infinite."""
        self.steps += 1
        if not self.due(self.steps):
            return False
        self.prune_to(self.scheduled(self.steps))
        return True

    def due(self, step):
        """Whether there is an update at `step`: every `interval` from `begin` on, and at `end`."""
        return self.begin <= step <= self.end and ((step - self.begin) % self.interval == 0 or step == self.end)

    def scheduled(self, step):
        """The sparsity that the update at `step` prunes to. The ramp starts an interval before the first update, which
        so takes its share like all others."""
        return sparsity_at(step, self.schedule, self.target_sparsity, self.begin - self.interval, self.end)

    @property
    def sparsity(self):
        """Share of the prunable weights that the last update left at zero."""
        return self.pruned / self.prunable

    @torch.no_grad()
    def prune_to(self, sparsity):
        """Prune now, until round(sparsity * prunable) weights are zero; those that are pruned stay so."""
        total = round(sparsity * self.prunable)
        if total <= self.pruned:
            return
        zeros = self.zeros()
        self.check_none_came_back(sum(zeros))
        self.scores.prepare()
        self.pruned = (
            self.prune_globally(total) if self.allocation is None else self.prune_each_layer(total, sparsity, zeros)
        )

    # ---- an update ----

    def check_none_came_back(self, zeros):
        """RuntimeError where fewer weights are zero than the last update left: the loop or the optimizer moves pruned ones."""
        back = self.pruned - zeros
        if back > 0:
            raise RuntimeError(
                f"{back:,} of {self.pruned:,} pruned weights are not zero any more: call mask_gradients() after backward and before "
                f"{type(self.scores.optimizer).__name__}.step(), and change no weights in between"
            )

    def prune_globally(self, total):
        """Prune the `total` lowest of all layers, none beyond max_layer_sparsity; returns how many are zero then.

        Layers that the common threshold takes beyond their cap are pruned to exactly the cap, and the rest of the total
        is selected anew among the others: that only raises the threshold, so what is capped once stays capped.
        """
        free, done = list(range(len(self.layers))), 0
        while free:
            threshold = self.select(free, total - done)
            caps = [math.ceil(self.max_layer_sparsity * self.layers[i].size) for i in free]
            over = []
            if any(most > cap for most, cap in zip(threshold.most, caps)):
                below, ties = self.count(free, threshold)
                taken = below.sum(1) + shares_in_order(ties.sum(1), total - done - threshold.below)
                over = [(i, cap) for i, count, cap in zip(free, taken.tolist(), caps) if count > cap]
            if not over:
                self.threshold = threshold.key
                return done + self.apply(free, threshold, total - done)
            for (i, cap), capped in zip(over, self.select_each(over)):
                done += self.apply([i], capped, cap)
                free.remove(i)
        return done

    def prune_each_layer(self, total, sparsity, zeros):
        """Prune each layer, of which `zeros` are zero already, to its share by the allocation; returns how many are zero then."""
        sizes = [layer.size for layer in self.layers]
        shares = list(self.allocation([layer.shape for layer in self.layers], sparsity))
        if len(shares) != len(sizes) or not all(math.isfinite(share) for share in shares):
            raise ValueError(
                f"allocation {self.allocation_name} gave {shares}: expected a finite share for each of {len(sizes)} layers"
            )
        counts = exact_counts(shares, sizes, total, zeros)
        wanted = [(i, count) for i, count in enumerate(counts) if count]
        return sum(self.apply([i], threshold, count) for (i, count), threshold in zip(wanted, self.select_each(wanted)))

    def select(self, which, k, scores=None):
        """The Threshold of the k-th lowest weight among the layers `which`, by the criterion or by other `scores`."""
        return self.read([self.search(which, k, scores or self.scores)], which)[0]

    def select_each(self, wanted):
        """For each (i, k), the Threshold of the k-th lowest weight of layer i: one wait for the device, however many."""
        return self.read([self.search([i], k, self.scores) for i, k in wanted], [i for i, _ in wanted])

    def search(self, which, k, scores):
        keys = partial(scores.counted, which)
        return search(keys, k, len(which), scores.device, self.ranks.all_reduce, scores.sample(which))

    def read(self, found, which):
        """The Thresholds that were found among the layers `which`; NotFiniteError where scores are NaN."""
        try:
            return thresholds(found)
        except FloatingPointError:
            raise NotFiniteError(
                f"{self.scores.layer_with_nan(which)}: the criterion {self.criterion_name} gave NaN; nothing was pruned"
            ) from None

    def count(self, which, threshold, scores=None):
        """(keys below the threshold, keys equal to it), each int64 [layers, ranks], on the CPU."""
        scores = scores or self.scores
        counts = torch.zeros(2, len(which), dtype=torch.int64, device=scores.device)
        for place, key in scores.counted(which):
            counts[0, place] += (key < threshold.key).sum()
            counts[1, place] += (key == threshold.key).sum()
        return self.ranks.all_gather(counts).permute(1, 2, 0).cpu()

    def apply(self, which, threshold, k):
        """Set the k lowest weights of the layers `which`, and their optimizer states, to zero; returns how many are zero then."""
        for i, rows, live in self.chosen(which, threshold, k, self.scores):
            self.zero(i, rows, live)
        return threshold.ties if threshold.key == PRUNED else k

    def zero(self, i, rows, live):
        """Set to zero what belongs to the weights of these rows of layer i at which `live` is 0."""
        for tensor in self.scores.tensors_of(i):
            keep(tensor[rows], live)

    def chosen(self, which, threshold, k, scores):
        """(layer, rows, live) of each chunk on this rank, live being 0 at the k lowest weights and 1 elsewhere.

        Where more weights tie at the threshold than are to be taken, those that come first in the full tensors are."""
        quota = k - threshold.below
        partly = quota < threshold.ties
        quotas = [quota]
        if partly and self.ranks.sharded:
            ties = self.count(which, threshold, scores)[1]
            quotas = shares_in_order(ties.flatten(), quota).view_as(ties)[:, self.ranks.rank].tolist()
        for place, i in enumerate(which):
            mine = place if len(quotas) > 1 else 0
            for rows in scores.chunks(i):
                if partly:
                    live, taken = leave_ties(scores.keys(i, rows), threshold.key, quotas[mine])
                    quotas[mine] = quotas[mine] - taken
                else:
                    live = scores.above(i, rows, threshold.key)
                yield i, rows, live

    def zeros(self):
        """How many weights of each layer are zero, over all ranks."""
        counts = torch.stack([(local(layer.parameter) == 0).sum() for layer in self.layers])
        return (self.ranks.all_reduce(counts) if self.ranks.sharded else counts).tolist()

    # ---- state and reports ----

    def state_dict(self, whole=True):
        """What a resumed run needs beside model and optimizer, JSON but for "buffers": name -> tensor, which holds the
        initial weights where the criterion reads them and is empty otherwise.

        whole: gather buffers that are sharded, a collective; else they stay DTensors, to be gathered one by one.
        """
        buffers = {name: full(tensor) if whole else tensor for name, tensor in self.buffers().items()}
        return self.identity() | dict(steps=self.steps, pruned=self.pruned, threshold=self.threshold, buffers=buffers)

    def buffers(self):
        """name -> tensor, as this rank holds it, of what is kept beside weights and optimizer states."""
        return {f"{layer.name}.initial_weight": kept for layer, kept in zip(self.layers, self.scores.initial)}

    def load_state_dict(self, state):
        """Go on from `state`, saved at any world size; load the model and the optimizer first. Schedule and allocation may
        differ from those it was saved with. ValueError where criterion, target or pattern do, or where the model has fewer
        zeros than were pruned."""
        for name, ours in self.identity().items():
            if state[name] != ours:
                raise ValueError(f"the saved state is of {name}={state[name]}, this Pruner has {name}={ours}")
        if sum(self.zeros()) < state["pruned"]:
            raise ValueError(
                f"the saved state has {state['pruned']} pruned weights, the model only {sum(self.zeros())} zeros: load the model first"
            )
        self.scores.load_buffers(state["buffers"])
        self.steps, self.pruned, self.threshold = state["steps"], state["pruned"], state["threshold"]

    def identity(self):
        pattern = "{}:{}".format(*self.pattern) if self.pattern else None
        return dict(criterion=self.criterion_name, target_sparsity=self.target_sparsity, pattern=pattern)

    def plan(self, max_steps):
        """What a run of `max_steps` optimizer steps would do, before it does: a dict of

        updates: [(step, sparsity), ...] of every update; average_parameters: all parameters less the pruned ones,
        averaged over the steps; memory: bytes by item, as `memory.measure` gives them, gradients and states of the
        optimizer's first step included."""
        updates, current, pruned_steps = [], 0.0, 0.0
        for step in range(1, max_steps + 1):
            pruned_steps += current
            if self.due(step):
                current = self.scheduled(step)
                updates.append((step, current))
        parameters = {id(p): p for group in self.scores.optimizer.param_groups for p in group["params"]}.values()
        total = sum(p.numel() for p in parameters)
        return dict(
            updates=updates,
            average_parameters=total - self.prunable * pruned_steps / max_steps,
            memory=predict(parameters, self.scores.optimizer, self.buffer_bytes()),
        )

    def buffer_bytes(self):
        """Bytes that this Pruner keeps on this rank beside model and optimizer."""
        return sum(local(t).nbytes for t in self.scores.initial)

    def report(self):
        """A table, as text: layer, parameters, pruned, sparsity, and in the last line the global threshold."""
        rows = [(layer.name, layer.size, zeros) for layer, zeros in zip(self.layers, self.zeros())]
        rows.append(("total", self.prunable, sum(zeros for _, _, zeros in rows)))
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{'layer':{width}}  {'parameters':>13}  {'pruned':>13}  sparsity"]
        lines += [f"{name:{width}}  {size:13,}  {zeros:13,}  {zeros / size:8.2%}" for name, size, zeros in rows]
        if self.threshold is not None:
            lines.append(f"threshold: {self.criterion_name} <= {score_of(self.threshold):.6g}")
        return "\n".join(lines)

    def log(self):
        """{name: number} for wandb and the like: overall sparsity, threshold, and each layer's sparsity."""
        numbers = {f"pruning/{layer.name}": zeros / layer.size for layer, zeros in zip(self.layers, self.zeros())}
        numbers["pruning/sparsity"] = self.sparsity
        if self.threshold is not None:
            numbers["pruning/threshold"] = score_of(self.threshold)
        return numbers


def lookup(choice, table, what):
    """(function, its name) for a name in `table` or a function of the user's own."""
    if callable(choice):
        return choice, getattr(choice, "__name__", repr(choice))
    if choice not in table:
        close = difflib.get_close_matches(str(choice), table, n=1)
        raise ValueError(
            f"{what}={choice!r}: expected a function or one of {', '.join(table)}"
            + (f" (did you mean {close[0]}?)" if close else "")
        )
    return table[choice], choice


def shares_in_order(counts, quota):
    """What each of `counts` (int64, 1-d) may take of `quota` when they are served in order."""
    return torch.minimum((quota - (counts.cumsum(0) - counts)).clamp(min=0), counts)
